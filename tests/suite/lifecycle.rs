//! Guests and daemons come and go in every order.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::wait_for;
use e2e::workload::must_survive;
use e2e::{Cdpd, Guest, run_scene};

use crate::writers::{Writer, format, mount};

#[test]
fn a_guest_goes_on_across_a_clean_stop_and_start_of_its_server() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "512M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut guest, "vda")?;
        let mut writer = Writer::synced(&mut guest, "/mnt/vda/synced", 3)?;
        for _ in 0..3 {
            writer.wait_files(5)?;
            cdpd.stop()?;
            cdpd.start_again()?;
        }
        writer.wait_files(5)?;
        writer.stop_and_check(&mut guest)?;
        guest.quit()?;
        cdpd.stop()
    });
}

#[test]
fn a_second_guest_finds_what_the_first_left_whether_it_quit_or_was_killed() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "512M", 2)?;
        let mut first = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        format(&mut first, "vda")?;
        first.run("echo first >/mnt/vda/first && sync")?;
        first.quit()?;

        // Another number of queues, too: nothing of the first guest's device may stay behind.
        let mut second = Guest::builder().disk(&socket).boot(scene)?;
        mount(&mut second, "vda")?;
        ensure!(second.run("cat /mnt/vda/first")? == "first\n");
        let mut writer = Writer::synced(&mut second, "/mnt/vda/synced", 4)?;
        writer.wait_files(10)?;
        second.kill()?;
        let survivors = must_survive(&writer.progress_of_the_dead()?);

        let mut third = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        mount(&mut third, "vda")?;
        ensure!(third.run("cat /mnt/vda/first")? == "first\n");
        third.run("umount /mnt/vda && e2fsck -f -n /dev/vda")?;
        third.quit()?;
        let image = cdpd.tool().extract("web1", "after.img")?;
        image.must_be_clean()?;
        image.check_files("/synced", 4, survivors)?;
        cdpd.stop()
    });
}

#[test]
fn a_guest_that_is_reset_in_the_middle_of_its_writes_has_what_it_had_synced() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "512M", 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        format(&mut guest, "vda")?;
        for round in 0..2 {
            let dir = format!("/synced{round}");
            let mut synced = Writer::synced(&mut guest, &format!("/mnt/vda{dir}"), round)?;
            let mut lazy = Writer::lazy(&mut guest, &format!("/mnt/vda/lazy{round}"), 100 + round)?;
            lazy.wait_files(20)?;
            synced.wait_files(15)?;
            guest.reset()?;
            let survivors = must_survive(&synced.progress_of_the_dead()?);
            ensure!(survivors.len() >= 15);
            let image = cdpd.tool().extract("web1@head", "reset.img")?;
            image.replay_journal()?;
            image.must_be_clean()?;
            image.check_files(&dir, round, survivors)?;
            mount(&mut guest, "vda")?;
        }
        guest.quit()?;
        cdpd.stop()
    });
}

#[test]
fn a_stopped_guest_continues_where_it_was() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "256M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut guest, "vda")?;
        let mut writer = Writer::synced(&mut guest, "/mnt/vda/synced", 6)?;
        for _ in 0..5 {
            writer.wait_files(2)?;
            guest.qmp().execute("stop", serde_json::json!({}))?;
            // Nothing is written by a guest that stands still.
            let head = cdpd.tool().head("web1")?;
            std::thread::sleep(std::time::Duration::from_millis(100));
            ensure!(cdpd.tool().head("web1")? == head, "a stopped guest has written");
            guest.qmp().execute("cont", serde_json::json!({}))?;
        }
        writer.wait_files(2)?;
        writer.stop_and_check(&mut guest)?;
        guest.quit()?;
        cdpd.stop()
    });
}

#[test]
fn an_idle_guest_costs_no_wake_ups() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "512M", 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        format(&mut guest, "vda")?;
        guest.run("echo first >/mnt/vda/first && sync && umount /mnt/vda")?;
        wait_for_rest(cdpd.pid()?)?;
        // What slept is there when it is needed.
        mount(&mut guest, "vda")?;
        guest.run("echo second >/mnt/vda/second && sync && umount /mnt/vda")?;
        wait_for_rest(cdpd.pid()?)?;
        cdpd.kill9()?;
        cdpd.start_again()?;
        ensure!(guest.run("mount /dev/vda /mnt && cat /mnt/second")? == "second\n");
        guest.quit()?;
        cdpd.stop()
    });
}

/// Waits until no thread of a process has run for five seconds.
fn wait_for_rest(pid: u32) -> Result<()> {
    let mut before = switches(pid)?;
    let mut woken = Vec::new();
    let rested = wait_for("five seconds without a wake-up of cdpd", Duration::from_secs(120), || {
        std::thread::sleep(Duration::from_secs(5));
        let now = switches(pid)?;
        woken = now
            .iter()
            .filter(|(thread, count)| before.get(*thread) != Some(*count))
            .map(|(t, _)| t.clone())
            .collect();
        before = now;
        Ok(woken.is_empty().then_some(()))
    });
    rested.with_context(|| format!("at last ran {woken:?}"))
}

/// How often each thread of a process has been given a processor: by number and name. Not the kernel's own, of which it keeps
/// one for each io_uring that has synced a file, and not RocksDB's clock, which flushes a log every ten seconds: neither can
/// be turned off.
fn switches(pid: u32) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = entry?.path();
        // It may have ended.
        let Ok(status) = std::fs::read_to_string(task.join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let switches = ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"];
        if field("Name:").starts_with("iou-wrk") || field("Name:") == "rocksdb" {
            continue;
        }
        let count = switches.iter().filter_map(|name| field(name).parse::<u64>().ok()).sum();
        found.insert(format!("{} {}", field("Pid:"), field("Name:")), count);
    }
    ensure!(!found.is_empty(), "no process {pid}");
    Ok(found)
}
