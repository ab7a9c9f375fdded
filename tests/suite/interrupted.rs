//! Whoever has asked for something is interrupted, or gone, before it is done: it is given up, or comes to its end, as was
//! promised, and the machine runs on.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::{Process, wait_for};
use e2e::{Cdpd, Scene, Tool, run_scene};
use rustix::process::Signal;

use crate::every_state::COMPLETED;
use crate::load::Load;
use crate::machine::{Machine, NAME, Shape, id_of};
use crate::tap::{Moment, Side, Tap};
use crate::vm_run;

const LIMIT: Duration = Duration::from_secs(120);
/// SIGINT among the signals of a process (proc_pid_status(5)): signal N is bit N - 1.
const SIGINT_BIT: u64 = 1 << 1;
/// QEMU is about to be told to save memory, in each mode.
const MIGRATE: Moment = Moment(Side::Daemon, "\"execute\":\"migrate\"");
/// What the tool says once the daemon has heard of an interruption.
const GIVEN_UP: &str = "giving the checkpoint up";

/// A command of the tool at work, and what it says.
struct Command {
    process: Process,
    log: PathBuf,
}

impl Command {
    fn start(scene: &Scene, tool: &Tool, name: &str, args: &[&str]) -> Result<Self> {
        let log = scene.path(&format!("{name}.log"));
        Ok(Self { process: Process::spawn(name, tool.command(args)?, &log)?, log })
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Presses Ctrl-C, once that does not just end it.
    fn interrupt(&mut self) -> Result<()> {
        let status = format!("/proc/{}/status", self.process.pid());
        wait_for("the tool to listen for signals", LIMIT, || {
            self.process.must_run()?;
            let text = fs::read_to_string(&status)?;
            let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:")).context("no signals")?;
            Ok((u64::from_str_radix(caught.trim(), 16)? & SIGINT_BIT != 0).then_some(()))
        })?;
        self.process.signal(Signal::INT)
    }

    fn wait_until_given_up(&self) -> Result<()> {
        wait_for("the checkpoint to be given up", LIMIT, || Ok(self.said().contains(GIVEN_UP).then_some(())))
    }

    /// Waits for its failure, and returns all that it has said.
    fn must_fail(mut self) -> Result<String> {
        let status = self.process.wait(LIMIT)?;
        let said = self.said();
        println!("{said}");
        ensure!(status.code() == Some(2), "{status}: {said}");
        Ok(said)
    }
}

/// A machine whose daemon speaks with QEMU through a tap.
fn tapped<'a>(scene: &'a Scene, tool: &Tool) -> Result<(Machine<'a>, Tap)> {
    let path = scene.path("tap.qmp");
    let machine = Machine::new(scene, tool, Shape::SIMPLE, Some(path.clone()))?;
    let tap = Tap::listen(&path, machine.qmp().clone())?;
    Ok((machine, tap))
}

#[test]
fn a_checkpoint_whose_taking_is_interrupted_is_given_up_and_the_machine_runs_on() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (machine, tap) = tapped(scene, &tool)?;
        let guest = machine.boot()?;
        for mode in ["hot", "live", "pause"] {
            let begun = tap.hold_at(MIGRATE);
            let args = ["checkpoint", "take", NAME, "--mode", mode];
            let mut taking = Command::start(scene, &tool, &format!("take-{mode}"), &args)?;
            let held = begun.wait(LIMIT)?;
            taking.interrupt()?;
            taking.wait_until_given_up()?;
            held.pass_on();
            let said = taking.must_fail()?;
            ensure!(said.contains("no checkpoint was taken: it was cancelled"), "{mode}: {said}");
            Load::wait_for_progress(&guest, 1)?;
            Load::must_match(&guest)?;
        }
        let listed = machine.checkpoints()?;
        ensure!(listed.len() == 3 && listed.iter().all(|one| one["state"] == "aborted"), "{listed:?}");
        let taken = machine.take("hot")?;
        machine.go_back(guest, &id_of(&taken)?)?.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_machine_whose_revert_is_interrupted_while_it_is_saved_runs_on_where_it_was() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let guest = vm_run::machine(scene, &tool)?;
        let before = tool.json(&["checkpoint", "take", NAME, "--label", "before"])?;
        // The tap takes the place of QEMU's socket, which answers under its new name.
        let shown = tool.json(&["vm", "show", NAME])?;
        let qmp = PathBuf::from(shown["qmp"].as_str().context("no QMP socket")?);
        let behind = qmp.with_extension("behind");
        fs::rename(&qmp, &behind)?;
        let tap = Tap::listen(&qmp, behind.clone())?;

        let args = ["vm", "revert", NAME, "--to", "before"];
        let begun = tap.hold_at(MIGRATE);
        let mut reverting = Command::start(scene, &tool, "early", &args)?;
        let held = begun.wait(LIMIT)?;
        reverting.interrupt()?;
        reverting.wait_until_given_up()?;
        held.pass_on();
        let said = reverting.must_fail()?;
        ensure!(said.contains("cannot be saved as it is now") && said.contains("it was cancelled"), "{said}");
        vm_run::is_sound(&guest)?;

        // Nor is a copy made of a checkpoint that was given up.
        let begun = tap.hold_at(MIGRATE);
        let mut cloning = Command::start(scene, &tool, "clone", &["vm", "clone", NAME, "copy"])?;
        let held = begun.wait(LIMIT)?;
        cloning.interrupt()?;
        cloning.wait_until_given_up()?;
        held.pass_on();
        let said = cloning.must_fail()?;
        ensure!(said.contains("cannot be saved as it is now") && said.contains("it was cancelled"), "{said}");
        ensure!(tool.json_lines(&["vm", "list"])?.len() == 1, "there is a copy");
        vm_run::is_sound(&guest)?;

        // When all is saved, the checkpoint may be complete all the same. Then, too, that is all that happens.
        let saved = tap.hold_at(COMPLETED);
        let mut reverting = Command::start(scene, &tool, "late", &args)?;
        let held = saved.wait(LIMIT)?;
        reverting.interrupt()?;
        reverting.wait_until_given_up()?;
        held.pass_on();
        let said = reverting.must_fail()?;
        let listed = tool.json_lines(&["checkpoint", "list", NAME])?;
        let complete = listed.iter().filter(|one| one["state"] == "committed").count();
        let (stays, gone) =
            (said.contains("was not put back; checkpoint"), said.contains("it was cancelled"));
        ensure!(
            (stays, gone, complete) == (true, false, 2) || (stays, gone, complete) == (false, true, 1),
            "{said}"
        );
        ensure!(listed.iter().all(|one| one["state"] != "begun"), "{listed:?}");
        vm_run::is_sound(&guest)?;

        // None of those that were given up can be gone back to, and the machine is not saved for that.
        let aborted = listed.iter().find(|one| one["state"] == "aborted").context("none was given up")?;
        let said = tool.refused(&["vm", "revert", NAME, "--to", &id_of(aborted)?])?;
        ensure!(said.contains("no complete checkpoint"), "{said}");
        ensure!(tool.json_lines(&["checkpoint", "list", NAME])?.len() == listed.len(), "it was saved");

        // The QEMU that runs is the one that ran before: a new one would have its socket under the old name.
        ensure!(std::os::unix::net::UnixStream::connect(&behind).is_ok(), "QEMU was started anew");
        ensure!(vm_run::supervised(&tool, NAME)? == "running");
        let found = tool.json(&["checkpoint", "show", NAME, "before"])?;
        ensure!(found["id"] == before["id"] && found["state"] == "committed", "{found}");
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_machine_whose_revert_has_lost_its_client_is_put_back_and_left_alone_until_then() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (machine, tap) = tapped(scene, &tool)?;
        let guest = machine.boot()?;
        let taken = machine.take("hot")?;
        let to = id_of(&taken)?;
        guest.kill()?;

        let twin = machine.waiting()?;
        let disks_reverted = tap.hold_at(Moment(Side::Daemon, "migrate-incoming"));
        let mut reverting = Command::start(scene, &tool, "revert", &["vm", "revert", NAME, "--to", &to])?;
        let held = disks_reverted.wait(LIMIT)?;
        reverting.process.kill()?;
        let disk = format!("{NAME}-0@head");
        for args in
            [&["checkpoint", "take", NAME][..], &["vm", "revert", NAME, "--to", &to], &["revert", &disk]]
        {
            let said = tool.refused(args)?;
            ensure!(said.contains("is being put back to a checkpoint"), "{args:?}: {said}");
        }
        held.pass_on();
        Load::wait_for_word(&twin)?;
        Load::wait_for_progress(&twin, 2)?;
        Load::must_match(&twin)?;

        // It runs before the daemon has heard so.
        let again = wait_for("the revert's end", LIMIT, || {
            Ok(tool.json(&["checkpoint", "take", NAME, "--mode", "hot"]).ok())
        })?;
        ensure!(again["parent"] == taken["id"], "it has not gone on from {taken}: {again}");
        let shown = tool.json(&["volume", "show", &format!("{NAME}-0")])?;
        ensure!(shown["serving"]["status"] == "connected", "{shown}");
        machine.go_back(twin, &id_of(&again)?)?.kill()?;
        tool.run(&["verify"])?;
        cdpd.stop()
    });
}
