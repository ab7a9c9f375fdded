//! Whole machines are saved while they work, and go on from there: memory and disks of one instant.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::process::wait_for;
use e2e::{Cdpd, Guest, GuestBuilder, Scene, Tool, run_scene};
use serde_json::Value;

use crate::load::Load;

/// A machine with one disk that holds what the load needs, registered as `web1`.
fn machine(scene: &Scene, tool: &Tool) -> Result<(GuestBuilder, Guest)> {
    let data = scene.path("data.img");
    Load::image(&data)?;
    tool.run(&["volume", "create", "web1", "--from", &data.to_string_lossy(), "--format", "raw"])?;
    let socket = tool.serve(scene, "web1", 2)?;
    let qmp = scene.path("web1.qmp");
    let builder = Guest::builder().disk(&socket).queues(2).smp(2).qmp(&qmp);
    let mut guest = builder.clone().boot(scene)?;
    register(tool, &qmp)?;
    Load::start(&mut guest)?;
    Load::wait_for_progress(&guest, 4)?;
    Ok((builder, guest))
}

fn register(tool: &Tool, qmp: &Path) -> Result<()> {
    tool.run(&["vm", "register", "web1", "--qmp", &qmp.to_string_lossy(), "--volume", "web1"]).map(drop)
}

fn take(tool: &Tool, mode: &str) -> Result<Value> {
    let taken = tool.json(&["checkpoint", "take", "web1", "--mode", mode])?;
    println!("{mode}: {}", taken["figures"]);
    Ok(taken)
}

fn id_of(checkpoint: &Value) -> Result<String> {
    checkpoint["id"].as_u64().map(|id| id.to_string()).with_context(|| format!("no id in {checkpoint}"))
}

/// Ends a guest's QEMU as a power cut would, and has the machine go on from a checkpoint in another.
fn go_back(scene: &Scene, tool: &Tool, builder: &GuestBuilder, guest: Guest, to: &str) -> Result<Guest> {
    guest.kill()?;
    let twin = builder.clone().waiting().boot(scene)?;
    tool.run(&["vm", "revert", "web1", "--to", to])?;
    Load::wait_for_word(&twin)?;
    Load::wait_for_progress(&twin, 6)?;
    ensure!(Load::mismatches(&twin)? == (0, 0), "memory and disk are not of one instant");
    Ok(twin)
}

/// Takes checkpoints of a working machine, goes back to one of them, and from there does it once more.
fn save_and_go_back(mode: &str) {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (builder, guest) = machine(scene, &tool)?;
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(take(&tool, mode)?);
            Load::wait_for_progress(&guest, 2)?;
        }
        ensure!(Load::mismatches(&guest)? == (0, 0), "the guest itself has noticed something");
        let guest = go_back(scene, &tool, &builder, guest, &id_of(&taken[1])?)?;

        // A machine that was restored can be saved, and that be restored.
        let again = take(&tool, mode)?;
        ensure!(again["parent"] == taken[1]["id"], "it has not gone on from {}: {again}", taken[1]);
        let guest = go_back(scene, &tool, &builder, guest, &id_of(&again)?)?;
        let listed = tool.json_lines(&["checkpoint", "list", "web1"])?;
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
        let (builder, guest) = machine(scene, &tool)?;
        take(&tool, "hot")?;
        for (mode, delay_ms) in [("hot", 60), ("live", 120), ("pause", 90), ("hot", 250)] {
            std::thread::scope(|threads| -> Result<()> {
                let saving = threads.spawn(|| tool.json(&["checkpoint", "take", "web1", "--mode", mode]));
                std::thread::sleep(Duration::from_millis(delay_ms));
                cdpd.kill9()?;
                // It may have been quick enough.
                let saved = saving.join().map_err(|_| anyhow!("the tool's thread has panicked"))?;
                println!(
                    "{mode}, killed after {delay_ms} ms: {}",
                    if saved.is_ok() { "complete" } else { "not" }
                );
                Ok(())
            })?;
            cdpd.start_again()?;
            Load::wait_for_progress(&guest, 1)?;
            ensure!(Load::mismatches(&guest)? == (0, 0), "the guest has noticed something");
            wait_for("the checkpoint to be undone", Duration::from_secs(60), || {
                let listed = tool.json_lines(&["checkpoint", "list", "web1"])?;
                Ok(listed.iter().all(|one| one["state"] != "begun").then_some(()))
            })?;
        }
        let last = take(&tool, "hot")?;
        go_back(scene, &tool, &builder, guest, &id_of(&last)?)?.kill()?;
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
        register(&tool, &qmp)?;
        let said = tool.refused(&["checkpoint", "take", "web1"])?;
        ensure!(said.contains("web1.qmp"), "no QEMU is there: {said}");
        let said = tool.refused(&["volume", "destroy", "web1", "--yes", "--force"])?;
        ensure!(said.contains("machine 'web1'"), "{said}");

        let mut guest = Guest::builder().disk(&socket).qmp(&qmp).boot(scene)?;
        let said = tool.refused(&["vm", "revert", "web1", "--to", "7"])?;
        ensure!(said.contains("no checkpoint '7'"), "{said}");
        guest.run("head -c 1024k /dev/urandom >/dev/vda && sync")?;
        let taken = take(&tool, "hot")?;
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
