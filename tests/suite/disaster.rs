//! A disk that was ruined goes back to the instant before, and forth again; a clone of that instant runs beside it.
//! Under a guest that runs, a disk goes back only by force.

use anyhow::{Context, Result, ensure};
use e2e::workload::files_of;
use e2e::{Cdpd, Guest, Scene, Tool, run_scene};
use serde_json::{Value, json};

use crate::writers::{Writer, format, mount};

/// The seed of the files that the disaster takes.
const SEED: u64 = 11;
/// Bytes of files, in mebibytes.
const MIB: u64 = 24;
/// What of a guest's kernel is to be expected when its disk has been reverted under it.
const DISK_GONE: [&str; 4] =
    ["I/O error", "EXT4-fs error", "EXT4-fs warning", "another history of this disk"];

/// Reverts one volume and returns the instant that undoes it.
fn revert(tool: &Tool, at: &str, more: &[&str]) -> Result<String> {
    undo_of(&tool.json(&[&["revert", at], more].concat())?)
}

/// Where a volume was before a revert.
fn undo_of(reverted: &Value) -> Result<String> {
    let volume = reverted.pointer("/volume").and_then(Value::as_str);
    let seq = reverted.pointer("/undo/seq").and_then(Value::as_u64);
    let (volume, seq) = volume.zip(seq).with_context(|| format!("no undo in {reverted}"))?;
    Ok(format!("{volume}@seq:{seq}"))
}

/// Boots a guest with a disk on which there is a file system already.
fn boot(scene: &Scene, tool: &Tool, volume: &str) -> Result<Guest> {
    let socket = scene.path(&format!("{volume}.sock"));
    if !socket.exists() {
        tool.serve(scene, volume, 1)?;
    }
    let mut guest = Guest::builder().disk(&socket).boot(scene)?;
    mount(&mut guest, "vda")?;
    Ok(guest)
}

fn has_all_files(guest: &mut Guest) -> Result<()> {
    let count = files_of(SEED, MIB << 20);
    guest.run(&format!("guest-agent check /mnt/vda/files {SEED} {count}")).map(drop)
}

fn has_no_files(guest: &mut Guest) -> Result<()> {
    guest.run("test -e /mnt/vda/keep && test ! -e /mnt/vda/files").map(drop)
}

/// Shuts a guest down, its file system in order.
fn shut_down(mut guest: Guest) -> Result<()> {
    guest.run("umount /mnt/vda && e2fsck -f -n /dev/vda")?;
    guest.quit()
}

/// Makes a volume with files and removes them; returns the instant before, and that after.
fn ruin(scene: &Scene, tool: &Tool) -> Result<(String, String)> {
    let socket = tool.create_and_serve(scene, "web1", "256M", 1)?;
    let mut guest = Guest::builder().disk(&socket).boot(scene)?;
    format(&mut guest, "vda")?;
    guest.run(&format!("touch /mnt/vda/keep && guest-agent fill /mnt/vda/files {SEED} {MIB} && sync"))?;
    let before = tool.head("web1")?;
    // Another clock tick at least, so that the time names this instant and not the next.
    std::thread::sleep(std::time::Duration::from_millis(20));
    guest.run("rm -rf /mnt/vda/files && sync")?;
    has_no_files(&mut guest)?;
    shut_down(guest)?;
    Ok((format!("web1@{}", before.time), format!("web1@seq:{}", tool.head("web1")?.seq)))
}

#[test]
fn removed_files_come_back_and_go_again_and_a_clone_runs_beside() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (before, after) = ruin(scene, &tool)?;

        let undo = revert(&tool, &before, &[])?;
        ensure!(undo == after, "undo is {undo}, and it was {after}");
        // A revert that was acknowledged is there, whatever comes next.
        cdpd.kill9()?;
        cdpd.start_again()?;
        let mut guest = boot(scene, &tool, "web1")?;
        has_all_files(&mut guest)?;
        guest.run("echo written after the revert >/mnt/vda/later && sync")?;
        shut_down(guest)?;

        let redo = revert(&tool, &undo, &[])?;
        let mut guest = boot(scene, &tool, "web1")?;
        has_no_files(&mut guest)?;
        guest.run("test ! -e /mnt/vda/later")?;

        // The clone is made and boots while the first guest runs.
        tool.run(&["clone", &redo, "web1-copy"])?;
        let mut second = boot(scene, &tool, "web1-copy")?;
        has_all_files(&mut second)?;
        ensure!(second.run("cat /mnt/vda/later")? == "written after the revert\n");
        let mut writers =
            [Writer::synced(&mut guest, "/mnt/vda/one", 1)?, Writer::synced(&mut second, "/mnt/vda/two", 2)?];
        for writer in &mut writers {
            writer.wait_files(20)?;
        }
        let [one, two] = writers;
        one.stop_and_check(&mut guest)?;
        two.stop_and_check(&mut second)?;
        guest.run("test ! -e /mnt/vda/two")?;
        second.run("test ! -e /mnt/vda/one")?;
        has_no_files(&mut guest)?;
        has_all_files(&mut second)?;
        shut_down(guest)?;
        shut_down(second)?;

        tool.run(&["verify"])?;
        cdpd.stop()?;
        tool.run(&["rebuild-index"])?;
        for (at, has_files) in
            [(&before, true), (&after, false), (&redo, true), (&"web1-copy".to_owned(), true)]
        {
            let image = tool.extract(at, "past.img")?;
            image.replay_journal()?;
            image.must_be_clean()?;
            ensure!(image.cat("/files/file-000000").is_ok() == has_files, "{at}");
        }
        Ok(())
    });
}

#[test]
fn two_disks_of_a_guest_go_back_to_one_instant() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let first = tool.create_and_serve(scene, "data", "128M", 1)?;
        let second = tool.create_and_serve(scene, "log", "128M", 1)?;
        let mut guest = Guest::builder().disk(&first).disk(&second).boot(scene)?;
        for disk in ["vda", "vdb"] {
            format(&mut guest, disk)?;
        }
        guest.run("for d in vda vdb; do echo old >/mnt/$d/letter; done; sync")?;
        // Times of one form and length: the later is the larger text.
        let before = tool.head("data")?.time.max(tool.head("log")?.time);
        std::thread::sleep(std::time::Duration::from_millis(20));
        guest.run("for d in vda vdb; do echo new >/mnt/$d/letter; done; sync")?;
        guest.quit()?;

        let reverted = tool.json_lines(&["revert", "data", "log", "--at", &before])?;
        let undo = reverted.iter().map(undo_of).collect::<Result<Vec<_>>>()?;
        for expected in ["old\nold\n", "new\nnew\n"] {
            let mut guest = Guest::builder().disk(&first).disk(&second).boot(scene)?;
            mount(&mut guest, "vda")?;
            mount(&mut guest, "vdb")?;
            let found = guest.run("cat /mnt/vda/letter /mnt/vdb/letter")?;
            ensure!(found == expected, "{found} instead of {expected}");
            guest.run("umount /mnt/vda /mnt/vdb && e2fsck -f -n /dev/vda && e2fsck -f -n /dev/vdb")?;
            guest.quit()?;
            let arguments: Vec<&str> =
                ["revert"].into_iter().chain(undo.iter().map(String::as_str)).collect();
            tool.run(&arguments)?;
        }
        cdpd.stop()
    });
}

/// A guest with a letter that it has overwritten; returns the instant before.
fn with_letter(scene: &Scene, tool: &Tool) -> Result<(Guest, String)> {
    let socket = tool.create_and_serve(scene, "web1", "256M", 2)?;
    let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
    format(&mut guest, "vda")?;
    guest.run("echo old >/mnt/vda/letter && sync")?;
    let before = format!("web1@seq:{}", tool.head("web1")?.seq);
    guest.run("echo new >/mnt/vda/letter && sync")?;
    Ok((guest, before))
}

/// A guest whose disk was reverted under it gets errors and changes nothing; after a reset it has the old letter.
fn must_reset(guest: &mut Guest, tool: &Tool) -> Result<()> {
    let head = tool.head("web1")?;
    let write = guest.spawn("head -c 64k /dev/zero | dd of=/dev/vda seek=100 bs=64k conv=notrunc,fsync")?;
    let (status, said) = write.finish(crate::writers::STEP)?;
    ensure!(status != 0, "a guest of another history could write:\n{said}");
    ensure!(tool.head("web1")? == head, "a guest of another history has written");
    guest.reset()?;
    mount(guest, "vda")?;
    ensure!(guest.run("cat /mnt/vda/letter")? == "old\n");
    guest.run("echo newest >/mnt/vda/letter && umount /mnt/vda && e2fsck -f -n /dev/vda").map(drop)
}

#[test]
fn a_disk_goes_back_under_a_guest_only_while_that_stands_still() {
    run_scene(|scene| {
        DISK_GONE.iter().for_each(|line| scene.allow(line));
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (mut guest, before) = with_letter(scene, &tool)?;
        let said = tool.refused(&["revert", &before])?;
        for part in ["web1.sock is running", "QMP `stop`", "--force"] {
            ensure!(said.contains(part), "{said}");
        }
        // The head may move on, for the guest runs (ext4 writes lazily); it must be the same branch and the same file.
        let branches = tool.json_lines(&["branch", "list", "web1"])?;
        ensure!(branches.len() == 1, "a refused revert has left a branch: {branches:?}");
        let letter = guest.run("echo 3 >/proc/sys/vm/drop_caches && cat /mnt/vda/letter")?;
        ensure!(letter == "new\n", "a refused revert has changed the disk: {letter}");
        guest.run("echo newer >/mnt/vda/letter && sync")?;

        guest.qmp().execute("stop", json!({}))?;
        let undo = revert(&tool, &before, &[])?;
        guest.qmp().execute("cont", json!({}))?;
        must_reset(&mut guest, &tool)?;
        // Stopped, reverted and reset before it runs again, a guest does not notice.
        guest.qmp().execute("stop", json!({}))?;
        revert(&tool, &undo, &[])?;
        guest.reset()?;
        mount(&mut guest, "vda")?;
        ensure!(guest.run("cat /mnt/vda/letter")? == "newer\n");
        shut_down(guest)?;
        cdpd.stop()
    });
}

#[test]
fn force_takes_the_disk_from_a_guest_in_the_middle_of_its_writes() {
    run_scene(|scene| {
        DISK_GONE.iter().for_each(|line| scene.allow(line));
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (mut guest, before) = with_letter(scene, &tool)?;
        let mut writer = Writer::lazy(&mut guest, "/mnt/vda/lazy", 5)?;
        writer.wait_files(20)?;
        let undo = revert(&tool, &before, &["--force"])?;
        must_reset(&mut guest, &tool)?;
        // What the guest lost is a disk as after a power cut.
        let image = tool.extract(&undo, "undo.img")?;
        image.replay_journal()?;
        image.must_be_clean()?;
        ensure!(image.cat("/letter")? == b"new\n");
        guest.quit()?;
        cdpd.stop()
    });
}
