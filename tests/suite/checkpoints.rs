//! Whole machines are saved while they work, and go on from there: memory and disks of one instant.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use e2e::process::wait_for;
use e2e::{Cdpd, Guest, run_scene};

use crate::load::Load;
use crate::machine::{Machine, Shape, id_of};

/// Takes checkpoints of a working machine, goes back to one of them, and from there does it once more.
fn save_and_go_back(mode: &str) {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let machine = Machine::new(scene, &tool, Shape::SIMPLE, None)?;
        let guest = machine.boot()?;
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(machine.take(mode)?);
            Load::wait_for_progress(&guest, 1)?;
        }
        Load::must_match(&guest)?;
        let guest = machine.go_back(guest, &id_of(&taken[1])?)?;

        // A machine that was restored can be saved, and that be restored.
        let again = machine.take(mode)?;
        ensure!(again["parent"] == taken[1]["id"], "it has not gone on from {}: {again}", taken[1]);
        let guest = machine.go_back(guest, &id_of(&again)?)?;
        let listed = machine.checkpoints()?;
        let complete = listed.iter().filter(|one| one["state"] == "committed").count();
        ensure!(complete == 4 && listed.len() == 4, "{listed:?}");
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_working_machine_is_saved_hot_and_goes_on_from_there() {
    save_and_go_back("hot");
}

#[test]
fn a_working_machine_is_saved_live_and_goes_on_from_there() {
    save_and_go_back("live");
}

#[test]
fn a_working_machine_is_saved_paused_and_goes_on_from_there() {
    save_and_go_back("pause");
}

#[test]
fn a_daemon_that_is_killed_while_it_saves_leaves_a_machine_that_runs_and_can_be_saved() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let machine = Machine::new(scene, &tool, Shape::SIMPLE, None)?;
        let guest = machine.boot()?;
        machine.take("hot")?;
        for (mode, delay_ms) in [("hot", 0), ("live", 60), ("pause", 30), ("hot", 150)] {
            let before = machine.checkpoints()?.len();
            std::thread::scope(|threads| -> Result<()> {
                let saving = threads.spawn(|| tool.json(&["checkpoint", "take", "web1", "--mode", mode]));
                wait_for("the checkpoint to be begun", Duration::from_secs(60), || {
                    Ok((machine.checkpoints()?.len() > before).then_some(()))
                })?;
                std::thread::sleep(Duration::from_millis(delay_ms));
                cdpd.kill9()?;
                // It may have been quick enough.
                let saved = saving.join().map_err(|_| anyhow!("the tool's thread has panicked"))?;
                println!(
                    "{mode}, killed {delay_ms} ms after its beginning: {}",
                    if saved.is_ok() { "complete" } else { "not" }
                );
                Ok(())
            })?;
            cdpd.start_again()?;
            Load::wait_for_progress(&guest, 1)?;
            Load::must_match(&guest)?;
            wait_for("the checkpoint to be undone", Duration::from_secs(60), || {
                let listed = machine.checkpoints()?;
                Ok(listed.iter().all(|one| one["state"] != "begun").then_some(()))
            })?;
        }
        let listed = machine.checkpoints()?;
        ensure!(listed.iter().any(|one| one["state"] == "aborted"), "no kill has met a saving: {listed:?}");
        let last = machine.take("hot")?;
        machine.go_back(guest, &id_of(&last)?)?.kill()?;
        tool.run(&["verify"])?;
        cdpd.stop()
    });
}

#[test]
fn what_cannot_be_saved_is_refused_in_words_and_leaves_nothing() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let qmp = scene.path("web1.qmp");
        let said = tool.refused(&["checkpoint", "take", "web1"])?;
        ensure!(said.contains("web1"), "{said}");
        tool.run(&["vm", "register", "web1", "--qmp", &qmp.to_string_lossy(), "--volume", "web1"])?;
        let said = tool.refused(&["checkpoint", "take", "web1"])?;
        ensure!(said.contains("web1.qmp"), "no QEMU is there: {said}");
        let said = tool.refused(&["volume", "destroy", "web1", "--yes", "--force"])?;
        ensure!(said.contains("machine 'web1'"), "{said}");

        let mut guest = Guest::builder().disk(&socket).qmp(&qmp).boot(scene)?;
        let said = tool.refused(&["vm", "revert", "web1", "--to", "7"])?;
        ensure!(said.contains("no checkpoint '7'"), "{said}");
        guest.run("head -c 1024k /dev/urandom >/dev/vda && sync")?;
        let taken = tool.json(&["checkpoint", "take", "web1"])?;
        let said = tool.refused(&["vm", "revert", "web1", "--to", &id_of(&taken)?, "--disks-only"])?;
        ensure!(said.contains("-incoming defer"), "its guest runs: {said}");
        guest.kill()?;

        // Another machine than that which was saved is refused before anything is touched.
        let other = Guest::builder().disk(&socket).qmp(&qmp).memory_mb(320).waiting().boot(scene)?;
        let head = tool.head("web1")?;
        let said = tool.refused(&["vm", "revert", "web1", "--to", &id_of(&taken)?])?;
        ensure!(
            said.contains("268435456") && said.contains("335544320"),
            "both sizes are to be named: {said}"
        );
        ensure!(tool.head("web1")? == head, "a refused revert has changed the disk");
        other.kill()?;
        tool.run(&["checkpoint", "pin", "web1", &id_of(&taken)?])?;
        let said = tool.refused(&["checkpoint", "delete", "web1", &id_of(&taken)?])?;
        ensure!(said.contains("pinned"), "{said}");
        tool.run(&["checkpoint", "unpin", "web1", &id_of(&taken)?])?;
        tool.run(&["checkpoint", "delete", "web1", &id_of(&taken)?])?;
        tool.run(&["vm", "remove", "web1"])?;
        tool.run(&["volume", "destroy", "web1", "--yes", "--force"])?;
        cdpd.stop()
    });
}
