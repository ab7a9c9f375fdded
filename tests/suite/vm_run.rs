//! Machines that `cdp-tool` runs: put back in place, copied, and saved on a schedule.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::process::wait_for;
use e2e::{Cdpd, Guest, GuestBuilder, Scene, Tool, run_scene};
use serde_json::Value;

use crate::load::Load;
use crate::machine::id_of;

const LIMIT: Duration = Duration::from_secs(120);

fn builder() -> GuestBuilder {
    Guest::builder().smp(2)
}

/// A machine under load, run by the tool.
pub(crate) fn machine(scene: &Scene, tool: &Tool) -> Result<Guest> {
    let data = scene.path("data.img");
    Load::SIMPLE.image(&data)?;
    tool.run(&["volume", "create", "web1", "--from", &data.to_string_lossy(), "--format", "raw"])?;
    let mut guest = builder().run_by(scene, tool, &["vm", "run", "web1", "--volume", "web1,addr=0x10"])?;
    let place = guest.run("readlink /sys/block/vda")?;
    ensure!(place.contains(":10.0/"), "the disk's properties have not arrived: {place}");
    Load::SIMPLE.start(&mut guest)?;
    Load::wait_for_progress(&guest, 4)?;
    Ok(guest)
}

pub(crate) fn supervised(tool: &Tool, vm: &str) -> Result<Value> {
    Ok(tool.json(&["vm", "show", vm])?["supervised"].clone())
}

/// Waits until nobody looks after a machine of one disk any more, which has its name, and that disk is free.
pub(crate) fn wait_for_end(tool: &Tool, vm: &str) -> Result<()> {
    wait_for("the supervisor's end", LIMIT, || Ok(supervised(tool, vm)?.is_null().then_some(())))?;
    tool.wait_until_free(vm)
}

pub(crate) fn is_sound(guest: &Guest) -> Result<()> {
    Load::wait_for_word(guest)?;
    Load::wait_for_progress(guest, 4)?;
    Load::must_match(guest)?;
    Ok(())
}

#[test]
fn a_machine_that_is_run_here_is_put_back_in_place_and_forth() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let guest = machine(scene, &tool)?;
        ensure!(supervised(&tool, "web1")? == "running");
        let said = tool.refused(&["vm", "run", "web1"])?;
        ensure!(said.contains("in use"), "{said}");

        let taken = tool.json(&["checkpoint", "take", "web1", "--label", "before"])?;
        Load::wait_for_progress(&guest, 2)?;
        let undo = {
            let said = tool.run(&["vm", "revert", "web1", "--to", "before"])?;
            println!("{said}");
            ensure!(said.contains("to undo that"), "{said}");
            is_sound(&guest)?;
            said.trim_end().rsplit(' ').next().unwrap_or_default().to_owned()
        };
        ensure!(supervised(&tool, "web1")? == "running");
        ensure!(tool.json(&["vm", "show", "web1"])?["current"] == taken["id"]);

        // The daemon may go away and come back: whoever looks after the machine tells it how it does.
        cdpd.kill9()?;
        cdpd.start_again()?;
        wait_for("the supervisor's return", LIMIT, || {
            Ok((supervised(&tool, "web1")? == "running").then_some(()))
        })?;
        let reverted = tool.json(&["vm", "revert", "web1", "--to", &undo, "--no-save"])?;
        ensure!(reverted["to"] == undo.parse::<u64>()? && reverted["saved"].is_null(), "{reverted}");
        is_sound(&guest)?;
        guest.kill()?;
        wait_for_end(&tool, "web1")?;

        // As the last time, from a checkpoint: the tool knows the command line.
        let twin = builder().waiting().run_by(scene, &tool, &["vm", "run", "web1", "--at", "before"])?;
        is_sound(&twin)?;
        twin.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_machine_whose_supervisor_is_gone_is_said_to_be_unattended() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        machine(scene, &tool)?.kill()?;
        wait_for_end(&tool, "web1")?;
        // As a supervisor that is killed leaves it, whose QEMU a test would not survive: on the same sockets.
        let shown = tool.json(&["vm", "show", "web1"])?;
        let qmp = PathBuf::from(shown["qmp"].as_str().unwrap_or_default());
        let serving = tool.json(&["volume", "show", "web1"])?["serving"]["socket"].clone();
        let disk = PathBuf::from(serving.as_str().unwrap_or_default());
        std::fs::remove_file(&qmp).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        let guest = Guest::builder().disk(&disk).qmp(&qmp).boot(scene)?;
        let taken = tool.json(&["checkpoint", "take", "web1"])?;
        let (said, listed) = (tool.run(&["vm", "show", "web1"])?, tool.run(&["vm", "list"])?);
        ensure!(listed.contains("running, unattended"), "{listed}");
        ensure!(said.contains("cdp-tool vm run web1 [--at CHECKPOINT]"), "{said}");
        let said = tool.refused(&["vm", "revert", "web1", "--to", &id_of(&taken)?])?;
        ensure!(said.contains("runs on without") && said.contains("vm run web1 --at"), "{said}");
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_copy_of_a_running_machine_runs_beside_it() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let guest = machine(scene, &tool)?;
        let copy = builder().waiting().run_by(scene, &tool, &["vm", "clone", "web1", "web2"])?;
        is_sound(&copy)?;
        is_sound(&guest)?;
        // It is a machine like any other.
        let taken = tool.json(&["checkpoint", "take", "web2"])?;
        tool.run(&["vm", "revert", "web2", "--to", &id_of(&taken)?, "--no-save"])?;
        is_sound(&copy)?;
        copy.kill()?;

        // One that has not been started yet, and whose disk is written before: its memory does not fit any more.
        tool.run(&["vm", "clone", "web1", "web3", "--at", "1", "--no-run"])?;
        let shown = tool.json(&["vm", "show", "web3"])?;
        ensure!(shown["start_from"]["vm"] == "web1", "{shown}");
        let socket = tool.serve(scene, "web3", 2)?;
        let mut stranger = Guest::builder().disk(&socket).boot(scene)?;
        stranger.run("head -c 4096 /dev/urandom >/dev/vda && sync")?;
        stranger.kill()?;
        let said = tool.refused(&["vm", "run", "web3"])?;
        ensure!(said.contains("has been written since"), "{said}");
        builder().run_by(scene, &tool, &["vm", "run", "web3", "--boot"])?.kill()?;
        ensure!(tool.json(&["vm", "show", "web3"])?["start_from"].is_null());
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn checkpoints_are_taken_on_schedule_and_the_oldest_go() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let guest = machine(scene, &tool)?;
        let said = tool.refused(&["checkpoint", "schedule", "web1", "--every", "1s"])?;
        ensure!(said.contains("10 seconds"), "{said}");
        tool.run(&["checkpoint", "schedule", "web1", "--every", "10s", "--keep", "2"])?;
        let list = || tool.json_lines(&["checkpoint", "list", "web1"]);
        wait_for("four scheduled checkpoints", LIMIT, || {
            let newest = list()?
                .iter()
                .filter(|one| one["state"] == "committed")
                .filter_map(|one| one["id"].as_u64())
                .max();
            Ok((newest >= Some(4)).then_some(()))
        })?;
        tool.run(&["checkpoint", "schedule", "web1", "--off"])?;
        let kept = wait_for("the older ones' end", LIMIT, || {
            let all = list()?;
            let settled = all.iter().all(|one| one["state"] != "begun");
            let kept: Vec<Value> = all.into_iter().filter(|one| one["state"] == "committed").collect();
            Ok((settled && kept.len() <= 2).then_some(kept))
        })?;
        // None is taken any more; those that were taken last stay.
        let ids: Vec<u64> = kept.iter().filter_map(|one| one["id"].as_u64()).collect();
        ensure!(ids.len() == 2 && ids.iter().all(|&id| id > 2), "{kept:?}");
        ensure!(
            kept.iter().all(|one| one["label"].as_str().is_some_and(|label| label.starts_with("auto-"))),
            "{kept:?}"
        );
        is_sound(&guest)?;
        guest.kill()?;
        cdpd.stop()
    });
}
