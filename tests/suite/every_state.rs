//! QEMU and the daemon are killed in every state of a checkpoint and of a way back to one. Nothing that was complete is
//! lost, nothing stays half done, and the machine can be saved and brought back again.

use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use e2e::process::wait_for;
use e2e::{Cdpd, Guest, Scene, Tool, run_scene};
use serde_json::Value;

use crate::load::Load;
use crate::machine::{Machine, NAME, Shape, id_of};
use crate::tap::{Moment, Side, Tap};

use Side::{Daemon, Qemu};

/// How long a state may take to come, and how long the other side to notice a death.
const LIMIT: Duration = Duration::from_secs(120);

/// A state of taking a checkpoint: its name, the mode, and when it is reached.
type State = (&'static str, &'static str, Moment);

const BEGUN: State = ("begun", "hot", Moment(Daemon, "migrate-set-capabilities"));
const HOT_CUT: State = ("cut, standing still", "hot", Moment(Qemu, "\"STOP\""));
const HOT_SAVING: State = ("saving while it runs", "hot", Moment(Qemu, "\"RESUME\""));
const LIVE_SWITCHOVER: State =
    ("before the switchover", "live", Moment(Qemu, "\"status\": \"pre-switchover\""));

/// As an event: the daemon also asks how the migration before this one has ended.
pub(crate) const COMPLETED: Moment = Moment(Qemu, "\"data\": {\"status\": \"completed\"");

/// All of them.
const STATES: [State; 14] = [
    BEGUN,
    ("armed", "hot", Moment(Daemon, "\"execute\":\"migrate\"")),
    HOT_CUT,
    HOT_SAVING,
    ("saved", "hot", COMPLETED),
    ("armed", "live", Moment(Daemon, "\"execute\":\"migrate\"")),
    ("copying, not cut", "live", Moment(Qemu, "\"status\": \"active\"")),
    LIVE_SWITCHOVER,
    ("told to switch over", "live", Moment(Daemon, "migrate-continue")),
    ("saved", "live", COMPLETED),
    ("about to stop", "pause", Moment(Daemon, "\"execute\":\"stop\"")),
    ("cut", "pause", Moment(Qemu, "\"STOP\"")),
    ("saving", "pause", Moment(Qemu, "\"status\": \"active\"")),
    ("saved", "pause", COMPLETED),
];

/// A state of going back: its name, the lines that lead to it, and how much later somebody dies.
type Restoring = (&'static str, &'static [Moment], Duration);

const INCOMING: Moment = Moment(Daemon, "\"execute\":\"migrate-incoming\"");
/// Before the memory is given it is asked, too.
const ASKED: Moment = Moment(Daemon, "\"execute\":\"query-migrate\"");

/// All of them.
const RESTORING: [Restoring; 3] = [
    ("about to restore", &[INCOMING], Duration::ZERO),
    ("restoring", &[INCOMING], Duration::from_millis(60)),
    ("memory given", &[INCOMING, ASKED], Duration::ZERO),
];

/// A machine whose daemon speaks with QEMU through a tap.
struct Stage<'a> {
    machine: Machine<'a>,
    tool: Tool,
    tap: Tap,
}

impl<'a> Stage<'a> {
    fn new(scene: &'a Scene, tool: Tool) -> Result<Self> {
        let path = scene.path("tap.qmp");
        let machine = Machine::new(scene, &tool, Shape::SIMPLE, Some(path.clone()))?;
        let tap = Tap::listen(&path, machine.qmp().clone())?;
        Ok(Self { machine, tool, tap })
    }

    /// Begins what reaches these moments, has `death` come in the last, and waits for what the tool says of that.
    fn interrupt(
        &self,
        args: &[&str],
        moments: &[Moment],
        later: Duration,
        death: impl FnOnce() -> Result<()>,
    ) -> Result<Result<Value>> {
        thread::scope(|scope| {
            let (first, others) = moments.split_first().context("no moment")?;
            let caught = self.tap.hold_at(*first);
            let cdp_tool = &self.tool;
            let tool: ScopedJoinHandle<'_, Result<Value>> = scope.spawn(|| cdp_tool.json(args));
            let mut held = caught.wait(LIMIT)?;
            for next in others {
                let caught = self.tap.hold_at(*next);
                held.pass_on();
                held = caught.wait(LIMIT)?;
            }
            if later.is_zero() {
                death()?;
                drop(held);
            } else {
                held.pass_on();
                thread::sleep(later);
                death()?;
            }
            let since = Instant::now();
            let said = tool.join().map_err(|_| anyhow!("the tool's thread has panicked"))?;
            ensure!(since.elapsed() < LIMIT, "the tool has waited {:?} for the dead", since.elapsed());
            Ok(said)
        })
    }

    fn interrupt_saving(&self, state: State, death: impl FnOnce() -> Result<()>) -> Result<()> {
        let (name, mode, moment) = state;
        let args = ["checkpoint", "take", NAME, "--mode", mode];
        let said = self.interrupt(&args, &[moment], Duration::ZERO, death)?;
        // Where all has been saved, it may be complete without them.
        ensure!(said.is_err() || name == "saved", "{mode}, {name}: the death has met nothing: {said:?}");
        let said = said.map_or_else(|error| format!("{error:#}"), |taken| taken["state"].to_string());
        println!("{mode}, {name}: {}", said.lines().last().unwrap_or_default());
        Ok(())
    }

    /// Waits until a daemon that has just started has given up what the last one was at.
    fn wait_until_undone(&self) -> Result<()> {
        wait_for("the checkpoint to be undone", LIMIT, || {
            let listed = self.machine.checkpoints()?;
            Ok(listed.iter().all(|one| one["state"] != "begun").then_some(()))
        })
    }

    /// Nothing is half done, and what was complete is.
    fn must_be_settled(&self, complete: &str) -> Result<()> {
        let listed = self.machine.checkpoints()?;
        ensure!(listed.iter().all(|one| one["state"] != "begun"), "{listed:?}");
        let found = listed.iter().find(|one| id_of(one).is_ok_and(|id| id == complete));
        let found = found.with_context(|| format!("checkpoint {complete} is gone: {listed:?}"))?;
        ensure!(found["state"] == "committed", "{found}");
        Ok(())
    }

    /// QEMU dies while the machine is saved; another goes on from `complete` and is saved.
    fn kill_qemu_while_saving(&self, guest: Guest, state: State, complete: &mut String) -> Result<Guest> {
        self.interrupt_saving(state, || guest.kill())?;
        self.must_be_settled(complete)?;
        let twin = self.machine.bring_back(complete)?;
        *complete = id_of(&self.machine.take("hot")?)?;
        Ok(twin)
    }

    /// The daemon dies while the machine is saved, which runs on and can be saved.
    fn kill_daemon_while_saving(&self, cdpd: &mut Cdpd, guest: &Guest, state: State) -> Result<String> {
        self.interrupt_saving(state, || cdpd.kill9())?;
        cdpd.start_again()?;
        Load::wait_for_progress(guest, 1)?;
        Load::must_match(guest)?;
        self.wait_until_undone()?;
        let complete = id_of(&self.machine.take("hot")?)?;
        self.must_be_settled(&complete)?;
        Ok(complete)
    }

    /// Somebody dies on the way back to `complete`, the sooner the quicker that is; another QEMU gets there.
    fn kill_while_restoring(
        &self,
        (name, moments, mut later): Restoring,
        complete: &str,
        mut daemon: Option<&mut Cdpd>,
    ) -> Result<Guest> {
        let args = ["vm", "revert", NAME, "--to", complete];
        loop {
            let waiting = self.machine.waiting()?;
            let said = match &mut daemon {
                None => self.interrupt(&args, moments, later, || waiting.kill())?,
                Some(cdpd) => {
                    let said = self.interrupt(&args, moments, later, || cdpd.kill9())?;
                    waiting.kill()?;
                    cdpd.start_again()?;
                    self.wait_until_undone()?;
                    said
                }
            };
            self.must_be_settled(complete)?;
            if said.is_err() {
                println!("{name}, {later:?} later: did not get there");
                return self.machine.bring_back(complete);
            }
            ensure!(!later.is_zero(), "{name}: the death has met nothing: {said:?}");
            println!("{name}, {later:?} later: was quick enough, so the death comes sooner");
            later = if later > Duration::from_millis(4) { later / 4 } else { Duration::ZERO };
        }
    }
}

/// That its QEMU is gone cannot be undone, and is said.
fn allow_dead_qemu(scene: &Scene) {
    scene.allow("QEMU could not be put back as it was");
}

fn kill_qemu_in(states: &[State], restoring: &[Restoring]) {
    run_scene(|scene| {
        allow_dead_qemu(scene);
        let mut cdpd = Cdpd::start(scene)?;
        let stage = Stage::new(scene, cdpd.tool())?;
        let mut guest = stage.machine.boot()?;
        let mut complete = id_of(&stage.machine.take("hot")?)?;
        for &state in states {
            guest = stage.kill_qemu_while_saving(guest, state, &mut complete)?;
        }
        guest.kill()?;
        for &state in restoring {
            let guest = stage.kill_while_restoring(state, &complete, None)?;
            complete = id_of(&stage.machine.take("live")?)?;
            guest.kill()?;
        }
        stage.machine.bring_back(&complete)?.kill()?;
        stage.tool.run(&["verify"])?;
        cdpd.stop()
    });
}

fn kill_daemon_in(states: &[State], restoring: &[Restoring]) {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let stage = Stage::new(scene, cdpd.tool())?;
        let guest = stage.machine.boot()?;
        let mut complete = id_of(&stage.machine.take("hot")?)?;
        for &state in states {
            complete = stage.kill_daemon_while_saving(&mut cdpd, &guest, state)?;
        }
        guest.kill()?;
        for &state in restoring {
            let guest = stage.kill_while_restoring(state, &complete, Some(&mut cdpd))?;
            complete = id_of(&stage.machine.take("live")?)?;
            guest.kill()?;
        }
        stage.machine.bring_back(&complete)?.kill()?;
        stage.tool.run(&["verify"])?;
        cdpd.stop()
    });
}

#[test]
fn a_qemu_that_is_killed_while_it_is_saved_or_restored_costs_that_checkpoint_alone() {
    kill_qemu_in(&[HOT_SAVING, LIVE_SWITCHOVER], &RESTORING[1..2]);
}

#[test]
fn a_daemon_that_is_killed_at_the_cut_or_the_switchover_leaves_a_machine_that_runs() {
    kill_daemon_in(&[HOT_CUT, LIVE_SWITCHOVER], &[]);
}

#[test]
#[ignore = "takes five minutes"]
fn qemu_is_killed_in_every_state() {
    kill_qemu_in(&STATES, &RESTORING);
}

#[test]
#[ignore = "takes five minutes"]
fn the_daemon_is_killed_in_every_state() {
    kill_daemon_in(&STATES, &RESTORING);
}
