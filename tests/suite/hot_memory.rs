//! QEMU's background snapshot of a guest whose disk is ours: with the guard of guest memory it is the memory of one
//! instant; without, it is not, which shows that these tests can fail.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::process::{Process, tied, wait_for};
use e2e::programs::built;
use e2e::workload::block_content;
use e2e::{Guest, GuestBuilder, Scene, run_scene};
use serde_json::json;

const BLOCKS: u64 = 8192;
const STAMPS: u64 = 64;
const PAGES: u64 = 8192;
const LIMIT: Duration = Duration::from_secs(120);

/// A running `cutdisk`, an example of `vhost-blk`.
struct CutDisk {
    process: Process,
    socket: PathBuf,
    control: PathBuf,
}

impl CutDisk {
    fn serve(scene: &Scene, name: &str, data: &Path, mode: &str) -> Result<Self> {
        let (socket, control) = (scene.path(&format!("{name}.sock")), scene.path(&format!("{name}.control")));
        let mut command = tied(&built("examples/cutdisk")?);
        command.arg(&socket).arg(data).arg(&control).args([mode, "2"]);
        let mut process = Process::spawn(name, command, &scene.path(&format!("{name}.log")))?;
        wait_for("the disk's control socket", LIMIT, || {
            process.must_run()?;
            Ok(control.exists().then_some(()))
        })?;
        Ok(Self { process, socket, control })
    }

    fn command(&mut self, command: &str) -> Result<String> {
        self.process.must_run()?;
        let mut stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(LIMIT))?;
        writeln!(stream, "{command}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }
}

/// The last number behind a word in the last line of the console that begins with a program's name.
fn said(guest: &Guest, program: &str, word: &str) -> Option<u64> {
    let console = String::from_utf8_lossy(&std::fs::read(guest.console()).ok()?).into_owned();
    let line =
        console.lines().rev().find(|line| line.starts_with(program) && line.contains("mismatches "))?;
    line.split_whitespace().skip_while(|&it| it != word).nth(1)?.parse().ok()
}

fn wait_for_progress(guest: &Guest, sweeps: u64) -> Result<()> {
    let (before, stamp) =
        (said(guest, "pages:", "sweeps").unwrap_or(0), said(guest, "stamp:", "at").unwrap_or(0));
    wait_for("sweeps over all pages", LIMIT, || {
        let swept = said(guest, "pages:", "sweeps").unwrap_or(0) >= before + sweeps;
        let stamped = said(guest, "stamp:", "at").unwrap_or(0) > stamp + STAMPS;
        Ok((swept && stamped).then_some(()))
    })
}

fn mismatches(guest: &Guest) -> Result<(u64, u64)> {
    let of =
        |program| said(guest, program, "mismatches").with_context(|| format!("{program} has said nothing"));
    Ok((of("pages:")?, of("stamp:")?))
}

fn builder(disk: &CutDisk) -> GuestBuilder {
    Guest::builder().disk(&disk.socket).queues(2).smp(2)
}

/// Writes what comes on a socket to a file, no faster than some 60 MiB/s, so that much is read and written by the guest
/// while it is saved.
fn receive_slowly(socket: &Path, saved: &Path) -> Result<JoinHandle<std::io::Result<()>>> {
    let (listener, mut saved) = (UnixListener::bind(socket)?, File::create(saved)?);
    Ok(std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut piece = vec![0; 1 << 20];
        loop {
            match stream.read(&mut piece)? {
                0 => return Ok(()),
                len => saved.write_all(&piece[..len])?,
            }
            // A read brings what the socket holds: some 200 KiB.
            std::thread::sleep(Duration::from_millis(3));
        }
    }))
}

/// Saves a guest under load, and says how many mismatches its restored twin finds, in pages and in stamps.
fn save_and_restore(scene: &Scene, mode: &str) -> Result<(u64, u64)> {
    let (data, copy, saved) = (scene.path("data.img"), scene.path("copy.img"), scene.path("saved.state"));
    let mut image = BufWriter::new(File::create(&data)?);
    (0..BLOCKS).try_for_each(|block| image.write_all(&block_content(block)))?;
    image.into_inner()?.set_len((BLOCKS + STAMPS) * 4096)?;

    let mut disk = CutDisk::serve(scene, "disk", &data, mode)?;
    let mut guest = builder(&disk).boot(scene)?;
    guest.run(&format!("guest-agent pages /dev/vda {PAGES} {BLOCKS} </dev/null >/dev/ttyS0 2>&1 &"))?;
    guest.run(&format!("guest-agent stamp /dev/vda {BLOCKS} {STAMPS} </dev/null >/dev/ttyS0 2>&1 &"))?;
    wait_for_progress(&guest, 8)?;

    println!("{}", disk.command(&format!("arm {}", copy.display()))?);
    let capability = json!({ "capability": "background-snapshot", "state": true });
    guest.qmp().execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    let receiver = receive_slowly(&scene.path("stream.sock"), &saved)?;
    guest
        .qmp()
        .execute("migrate", json!({ "uri": format!("unix:{}", scene.path("stream.sock").display()) }))?;
    let migration = wait_for("the end of saving", LIMIT, || {
        let migration = guest.qmp().execute("query-migrate", json!({}))?;
        let status = migration["status"].as_str().unwrap_or_default().to_owned();
        ensure!(status != "failed" && status != "cancelled", "saving has failed: {migration}");
        Ok((status == "completed").then_some(migration))
    })?;
    println!("{mode}: saved in {} ms, downtime {} ms", migration["total-time"], migration["downtime"]);
    println!("{}", disk.command("close")?);
    receiver.join().map_err(|_| anyhow!("the receiver has panicked"))??;
    wait_for_progress(&guest, 8)?;
    ensure!(mismatches(&guest)? == (0, 0), "the guest itself has not noticed anything");
    guest.kill()?;
    drop(disk);

    let disk = CutDisk::serve(scene, "twin", &copy, "unguarded")?;
    let twin = builder(&disk).restored_from(&saved).boot(scene)?;
    wait_for("a word of the restored guest", LIMIT, || {
        Ok(said(&twin, "pages:", "sweeps").zip(said(&twin, "stamp:", "at")))
    })?;
    wait_for_progress(&twin, 8)?;
    let found = mismatches(&twin)?;
    println!("{mode}: the restored guest finds {} pages and {} stamps that do not match", found.0, found.1);
    twin.kill()?;
    Ok(found)
}

#[test]
fn a_guarded_guest_is_saved_at_one_instant_while_it_runs() {
    run_scene(|scene| {
        ensure!(save_and_restore(scene, "guarded")? == (0, 0), "memory of several instants");
        Ok(())
    });
}

#[test]
fn without_the_guard_pages_of_later_instants_are_saved() {
    run_scene(|scene| {
        ensure!(save_and_restore(scene, "unguarded")?.0 > 0, "this test bed does not notice unsound memory");
        Ok(())
    });
}
