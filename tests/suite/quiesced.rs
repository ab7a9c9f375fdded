//! A checkpoint of a machine whose agent has stilled its file systems: its disks are clean, and it goes on from there.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::process::run_ok;
use e2e::programs::system;
use e2e::{Cdpd, Guest, GuestBuilder, Scene, Tool, run_scene};
use serde_json::Value;

use crate::tap::{Moment, Side, Tap};

const LIMIT: Duration = Duration::from_secs(120);

/// A machine that writes to a file system all the time, with an agent; a tap is between the daemon and its QEMU.
fn machine(scene: &Scene, tool: &Tool) -> Result<(GuestBuilder, Guest, Tap)> {
    let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
    let (qmp, agent) = (scene.path("web1.qmp"), scene.path("web1.qga"));
    let builder = Guest::builder().disk(&socket).qmp(&qmp).serial(&agent);
    let mut guest = builder.clone().boot(scene)?;
    guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && stty -F /dev/ttyS2 raw -echo")?;
    guest.run("guest-agent still /dev/ttyS2 /mnt </dev/null >/dev/ttyS0 2>&1 &")?;
    let tapped = scene.path("tap.qmp");
    let tap = Tap::listen(&tapped, qmp)?;
    let (qmp, agent) = (tapped.to_string_lossy().into_owned(), agent.to_string_lossy().into_owned());
    tool.run(&["vm", "register", "web1", "--qmp", &qmp, "--volume", "web1", "--agent", &agent])?;
    // Its counter is on the console, which can be read wherever it goes on.
    let work = "i=0; while :; do i=$((i+1)); echo $i >/mnt/$((i%50)) && sync && echo count $i; done";
    guest.run(&format!("({work}) </dev/null >/dev/ttyS0 2>&1 &"))?;
    wait_for_count(&guest, 20)?;
    Ok((builder, guest, tap))
}

fn count(guest: &Guest) -> Result<u64> {
    let said = guest.said()?;
    let count = said.lines().rev().find_map(|line| line.trim().strip_prefix("count ")?.parse().ok());
    Ok(count.unwrap_or(0))
}

/// Waits until the guest has counted that much further.
fn wait_for_count(guest: &Guest, more: u64) -> Result<()> {
    let before = count(guest)?;
    e2e::process::wait_for("the guest to count on", LIMIT, || {
        Ok((count(guest)? >= before + more).then_some(()))
    })
}

/// The file system's features, on the disk at a checkpoint.
fn features(tool: &Tool, checkpoint: &Value) -> Result<(PathBuf, String)> {
    let epoch = checkpoint["epoch"].as_str().context("no epoch")?;
    let image = tool.extract(&format!("web1@{epoch}"), "at.img")?;
    let shown = run_ok(Command::new(system("dumpe2fs")?).arg("-h").arg(image.path()), LIMIT)?;
    let features = shown.lines().find_map(|line| line.strip_prefix("Filesystem features:"));
    Ok((image.path().to_owned(), features.context("no features")?.to_owned()))
}

#[test]
fn a_quiesced_checkpoint_has_clean_disks_and_a_machine_that_goes_on() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (builder, guest, _tap) = machine(scene, &tool)?;
        let crashed = tool.json(&["checkpoint", "take", "web1"])?;
        ensure!(features(&tool, &crashed)?.1.contains("needs_recovery"), "this test cannot fail");
        for mode in ["hot", "live", "pause"] {
            let taken =
                tool.json(&["checkpoint", "take", "web1", "--quiesce", "--mode", mode, "--label", mode])?;
            println!("{mode}: {}", taken["figures"]);
            ensure!(taken["figures"]["quiesced"]["filesystems"] == 1, "{taken}");
            let (image, features) = features(&tool, &taken)?;
            ensure!(!features.contains("needs_recovery"), "{mode}: {features}");
            e2e::Image::new(&image).must_be_clean()?;
            wait_for_count(&guest, 10)?;
        }
        guest.kill()?;
        tool.wait_until_free("web1")?;

        // In its memory the file system stands still.
        let twin = builder.waiting().boot(scene)?;
        let reverted = tool.json(&["vm", "revert", "web1", "--to", "hot"])?;
        ensure!(reverted["still_frozen"].is_null(), "{reverted}");
        wait_for_count(&twin, 20)?;
        let diagnosis = tool.json(&["doctor", "vm", "web1"])?;
        let checks = diagnosis["checks"].as_array().context("no checks")?;
        let agent = checks.iter().find(|check| check["subject"] == "guest agent").context("no agent")?;
        ensure!(agent["verdict"] == "ok", "{agent}");
        twin.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_daemon_that_is_killed_while_file_systems_stand_still_has_them_go_on_when_it_is_back() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (_builder, mut guest, tap) = machine(scene, &tool)?;
        for mode in ["hot", "live", "pause"] {
            std::thread::scope(|threads| -> Result<()> {
                let frozen = tap.hold_at(Moment(Side::Daemon, "\"execute\":\"migrate\""));
                let args = ["checkpoint", "take", "web1", "--quiesce", "--mode", mode];
                let tool = &tool;
                let taking = threads.spawn(move || tool.json(&args));
                let held = frozen.wait(LIMIT)?;
                let before = count(&guest)?;
                std::thread::sleep(Duration::from_secs(1));
                ensure!(count(&guest)? <= before + 1, "{mode}: the guest counts on, so nothing is frozen");
                cdpd.kill9()?;
                drop(held);
                let taken = taking.join().map_err(|_| anyhow!("the tool's thread has panicked"))?;
                ensure!(taken.is_err(), "{mode}: {taken:?}");
                Ok(())
            })?;
            cdpd.start_again()?;
            wait_for_count(&guest, 10)?;
            ensure!(guest.qmp().status()? == "running");
            e2e::process::wait_for(&format!("the {mode} checkpoint to be undone"), LIMIT, || {
                let listed = tool.json_lines(&["checkpoint", "list", "web1"])?;
                Ok(listed.iter().all(|one| one["state"] == "aborted").then_some(()))
            })?;
        }
        let taken = tool.json(&["checkpoint", "take", "web1", "--quiesce"])?;
        ensure!(taken["figures"]["quiesced"]["filesystems"] == 1, "{taken}");
        wait_for_count(&guest, 10)?;
        guest.kill()?;
        cdpd.stop()
    });
}
