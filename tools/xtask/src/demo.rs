//! `make demo`: what this project does, done before the reader's eyes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::workload::{Progress, must_survive};
use e2e::{Cdpd, Guest, Running, Scene, Tool};

const SEED: u64 = 2026;
const STEP: Duration = Duration::from_secs(60);

/// The narrator: numbers the chapters, shows every command, and says what came of it.
struct Narrator {
    started: Instant,
    chapter: u32,
}

impl Narrator {
    fn chapter(&mut self, title: &str) {
        self.chapter += 1;
        println!("\n[{:>3} s]  {}. {title}", self.started.elapsed().as_secs(), self.chapter);
    }

    fn say(&self, text: &str) {
        for line in text.lines() {
            println!("         {line}");
        }
    }

    /// Shows a command as it could be typed, runs it, and shows what it prints.
    fn tool(&self, tool: &Tool, args: &[&str]) -> Result<String> {
        self.say(&format!("$ {}", Tool::shown(args)));
        let output = tool.run(args)?;
        self.say(&output);
        Ok(output)
    }

    fn guest(&self, guest: &mut Guest, command: &str) -> Result<String> {
        self.say(&format!("guest# {command}"));
        let output = guest.run(command)?;
        self.say(&output);
        Ok(output)
    }
}

/// Runs the demonstration; on a failure the ends of all logs are printed.
///
/// # Errors
/// Anything did not go as it is told.
pub(crate) fn run() -> Result<()> {
    let scene = Scene::new()?;
    let mut narrator = Narrator { started: Instant::now(), chapter: 0 };
    println!("Hindsight: time travel for virtual machines.");
    println!("Everything below happens for real, in {}.", scene.dir().display());
    let told = tell(&scene, &mut narrator).and_then(|()| scene.judge_logs());
    if told.is_err() {
        println!("{}", scene.tails());
        return told;
    }
    summary(&scene, &narrator);
    Ok(())
}

fn tell(scene: &Scene, narrator: &mut Narrator) -> Result<()> {
    narrator.chapter("Start the server on a new store, and make a disk");
    let mut cdpd = Cdpd::start(scene)?;
    let tool = cdpd.tool();
    narrator.say("$ cdpd --store DIR &");
    narrator.tool(&tool, &["volume", "create", "web1", "--size", "1G"])?;

    narrator.chapter("Boot a Linux guest whose disk that is (QEMU, without KVM: give it some seconds)");
    let run = ["vm", "run", "web1", "--volume", "web1"];
    narrator.say(&format!("$ {} -- qemu-system-x86_64 -m 256 -smp 2 … &", Tool::shown(&run)));
    let mut guest = Guest::builder().smp(2).run_by(scene, &tool, &run)?;
    narrator.guest(&mut guest, "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && df -h /mnt")?;

    the_mistake(narrator, &tool, &mut guest)?;
    the_whole_machine(narrator, &tool, &mut guest)?;
    the_killed_server(narrator, &mut cdpd, &mut guest)?;
    the_power_cord(narrator, &mut cdpd, guest)?;

    narrator.chapter("Check every checksum of the store, and stop it");
    cdpd.start_again()?;
    narrator.tool(&tool, &["verify"])?;
    cdpd.stop()?;
    narrator.say("cdpd stopped cleanly on SIGTERM.");
    Ok(())
}

/// A file is overwritten, and read as it was before.
fn the_mistake(narrator: &mut Narrator, tool: &Tool, guest: &mut Guest) -> Result<()> {
    narrator.chapter("The guest writes a file, and later overwrites it by mistake");
    narrator.guest(guest, "echo 'balance: 1000' >/mnt/ledger && sync && cat /mnt/ledger")?;
    let before = tool.head("web1")?;
    narrator.say(&format!("It is now {}: the disk's history is at seq {}.", before.time, before.seq));
    narrator.tool(tool, &["mark", "web1", "good-ledger"])?;
    // In place: the old bytes are nowhere on the guest's disk any more.
    let mistake =
        "echo 'balance: 0000' | dd of=/mnt/ledger conv=notrunc,fsync 2>/dev/null && cat /mnt/ledger";
    narrator.guest(guest, mistake)?;

    narrator.chapter("Read the file at the instant before; the guest keeps running");
    let instants = [
        "web1@mark:good-ledger".to_owned(),
        format!("web1@seq:{}", before.seq),
        format!("web1@{}", before.time),
    ];
    for at in instants.iter().map(String::as_str).chain(["web1@head"]) {
        narrator.say(&format!(
            "$ {} && debugfs -R 'cat /ledger' past.img",
            Tool::shown(&["extract", at, "past.img"])
        ));
        let image = tool.extract(at, "past.img")?;
        image.replay_journal()?;
        image.must_be_clean()?;
        let ledger = String::from_utf8(image.cat("/ledger")?)?;
        narrator.say(&ledger);
        let expected = if at == "web1@head" { "balance: 0000\n" } else { "balance: 1000\n" };
        ensure!(ledger == expected, "{at} should say {expected}");
    }
    Ok(())
}

/// The machine itself goes back: what it had in memory, what ran, what was on its disk.
fn the_whole_machine(narrator: &mut Narrator, tool: &Tool, guest: &mut Guest) -> Result<()> {
    narrator.chapter("Save the running machine, ruin it, and go back: memory, processes and disk");
    narrator.guest(guest, "mkdir -p /mnt/site && echo welcome >/mnt/site/index && sync && ls /mnt")?;
    narrator.say("guest# (a process that counts, in memory only)");
    // Whoever looks finds a whole number: the file is never empty.
    let count = "n=0; while :; do n=$((n+1)); echo $n >/tmp/next && mv /tmp/next /tmp/count; sleep 0.1; done";
    guest.run(&format!("({count}) </dev/null >/dev/null 2>&1 &"))?;
    guest.run("sleep 1; until [ -e /tmp/count ]; do usleep 10000; done")?;
    narrator.tool(tool, &["checkpoint", "take", "web1", "--label", "good"])?;
    narrator.guest(guest, "cat /tmp/count")?;
    narrator.guest(guest, "sleep 3; rm -rf /mnt/* && sync && ls /mnt && cat /tmp/count")?;
    guest.run("touch /tmp/ruined")?;
    narrator.tool(tool, &["vm", "revert", "web1", "--to", "good"])?;
    guest.reconnect()?;
    let count: u64 = narrator.guest(guest, "cat /tmp/count")?.trim().parse()?;
    // /tmp is in memory. How far the process has come since is no proof: that depends on how busy this machine is.
    guest.run("test ! -e /tmp/ruined").context("the guest's memory did not go back")?;
    guest.run(&format!("until [ $(cat /tmp/count) -gt {count} ]; do usleep 10000; done"))?;
    narrator.say("The process counts on from there. It never noticed.");
    let found = narrator.guest(guest, "cat /mnt/site/index && rm -r /mnt/site && sync")?;
    ensure!(found == "welcome\n", "/mnt/site/index says {found}");
    Ok(())
}

/// The server dies under a busy guest, which does not notice more than a pause.
fn the_killed_server(narrator: &mut Narrator, cdpd: &mut Cdpd, guest: &mut Guest) -> Result<()> {
    narrator.chapter("kill -9 the server while the guest writes");
    narrator.say("guest# (writing files with known contents, an fsync after each)");
    let mut writer = guest.spawn(&format!("guest-agent write /mnt/work {SEED} synced"))?;
    for _ in 0..3 {
        wait_files(&mut writer, 8)?;
        narrator.say(&format!("$ kill -9 {} && cdpd --store DIR &", cdpd.pid()?));
        cdpd.kill9()?;
        let started = Instant::now();
        cdpd.start_again()?;
        let recovered = started.elapsed();
        wait_files(&mut writer, 1)?;
        narrator.say(&format!("cdpd was back after {} ms; the guest writes on.", recovered.as_millis()));
    }
    guest.run("touch /mnt/work.stop")?;
    let (status, output) = writer.finish(STEP)?;
    ensure!(status == 0, "the guest's writer failed:\n{output}");
    guest.drop_caches()?;
    let progress: Vec<Progress> = output.lines().filter_map(Progress::parse).collect();
    let check = format!("guest-agent check /mnt/work {SEED} {}", must_survive(&progress).len());
    narrator.guest(guest, &check).context("a file differs from what was written")?;
    let errors = guest.run("dmesg | grep -ci 'i/o error' || true")?;
    narrator.say(&format!("I/O errors in the guest's kernel log: {}", errors.trim()));
    ensure!(errors.trim() == "0", "the guest saw I/O errors");
    Ok(())
}

/// Guest and server die together; what the guest had synced is on the disk.
fn the_power_cord(narrator: &mut Narrator, cdpd: &mut Cdpd, mut guest: Guest) -> Result<()> {
    narrator.chapter("kill -9 guest and server together, and look at the disk");
    let mut writer = guest.spawn(&format!("guest-agent write /mnt/late {} synced", SEED + 1))?;
    wait_files(&mut writer, 25)?;
    guest.kill()?;
    cdpd.kill9()?;
    let lines = writer.last_words(STEP)?;
    let progress: Vec<Progress> = lines.iter().filter_map(|line| Progress::parse(line)).collect();
    let synced = must_survive(&progress);
    narrator.say(&format!("The guest had synced {} files when the lights went out.", synced.len()));

    narrator.say(&format!("$ {} && e2fsck -fn head.img", Tool::shown(&["extract", "web1@head", "head.img"])));
    let image = cdpd.tool().extract("web1@head", "head.img")?;
    image.replay_journal()?;
    image.must_be_clean()?;
    image.check_files("/late", SEED + 1, synced.iter().copied())?;
    narrator.say(&format!("The file system is clean, and all {} are there, byte for byte.", synced.len()));
    Ok(())
}

fn wait_files(writer: &mut Running, files: usize) -> Result<()> {
    // What it wrote before this call does not count.
    writer.new_lines();
    let mut seen = 0;
    while seen < files {
        let line = writer.next_line(STEP)?;
        seen += usize::from(matches!(Progress::parse(&line), Some(Progress::Synced(_))));
    }
    Ok(())
}

fn summary(scene: &Scene, narrator: &Narrator) {
    println!("\nAll of it held, in {} seconds.", narrator.started.elapsed().as_secs());
    println!("\nNow with a store of your own:");
    println!("  cdpd --store ~/store &");
    println!("  export CDP_STORE=~/store");
    println!("  cdp-tool volume create web1 --size 10G            # or --from disk.qcow2");
    println!(
        "  cdp-tool vm run web1 --volume web1 -- qemu-system-x86_64 -accel kvm -m 2G -cdrom installer.iso"
    );
    println!("  cdp-tool extract web1@-5m five-minutes-ago.img");
    println!("\nHow to attach a QEMU or libvirt guest that you start yourself is in README.md.");
    if std::env::var_os("KEEP").is_some() {
        println!("KEEP is set: the store is still in {}.", scene.dir().display());
    } else {
        println!("The store of this tour is gone; KEEP=1 would have kept it.");
    }
}
