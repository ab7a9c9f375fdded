//! A crash at every I/O step of random workloads, in every way, and what must hold after each: invariants 1 to 6, 8
//! and 9 of `docs/architecture.md`, asserted by name.
//!
//! `CRASH_SEEDS=n` runs that many seeds, `CRASH_SEED=x` one of them; a failure prints its seed.

mod check;

pub use check::try_assert_holds;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use cdp_store::storage::sim::OpKind;
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::machine::{Crash, Machine};
use crate::reference::Logged;

/// I/O steps of one workload.
const STEPS: u64 = 220;
/// Kinds of faults that workloads meet, none among them.
const FAULTS: u64 = 7;

/// What happens to a machine after its process has died.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// It is started again, and checked.
    Restart(Crash),
    /// It is started again, and dies while it opens the store; in so many steps.
    DieOpening(Crash),
    /// The guests go on for so many I/O steps, until the process dies.
    Work(u64),
    /// Every late write lands.
    LandLate,
}

use Crash::{Kill, PowerCut};
use Then::{DieOpening, LandLate, Restart, Work};

const STORIES: &[&[Then]] = &[
    &[Restart(Kill), Restart(Kill)],
    &[Restart(Kill), Restart(PowerCut)],
    &[Restart(PowerCut), Restart(PowerCut)],
    &[Restart(PowerCut), Restart(Kill)],
    &[Restart(Kill), LandLate, Restart(Kill)],
    &[Restart(Kill), Work(20), Restart(Kill)],
    &[Restart(Kill), Work(30), Restart(PowerCut)],
    &[Restart(PowerCut), Work(25), Restart(Kill)],
    &[Restart(PowerCut), Work(40), Restart(PowerCut)],
    &[Restart(Kill), Work(15), Restart(Kill), LandLate, Restart(PowerCut)],
    &[DieOpening(Kill), Restart(Kill)],
    &[DieOpening(Kill), Restart(PowerCut)],
    &[DieOpening(PowerCut), Restart(Kill)],
    &[DieOpening(Kill), DieOpening(Kill), LandLate, Restart(Kill), Work(10), Restart(PowerCut)],
    &[Restart(Kill), Work(60), DieOpening(Kill), Restart(PowerCut), Work(30), Restart(Kill)],
];

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    match number("CRASH_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("CRASH_SEEDS").unwrap_or(default)).collect(),
    }
}

/// Runs `test` for each seed, and says which one failed.
fn for_each_seed(default: u64, test: impl Fn(u64)) {
    for seed in seeds(default) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(seed))) {
            eprintln!("to replay it: CRASH_SEED={seed}");
            resume_unwind(panic);
        }
    }
}

/// Whether a sync fails in a seed's workload.
fn fails_a_sync(seed: u64) -> bool {
    seed % FAULTS == 4
}

/// Faults that a workload meets, by its seed.
fn order_faults(machine: &mut Machine, seed: u64) {
    let when = machine.rng.random_range(5..STEPS / 4);
    let (kind, errno) = match seed % FAULTS {
        1 | 3 => (OpKind::Write, libc::EIO),
        2 => (OpKind::Write, libc::ENOSPC),
        5 => return machine.fail_index_after(when / 4),
        6 => {
            let left = machine.rng.random_range(1 << 20..4 << 20);
            return machine.fill_disk(left);
        }
        _ if fails_a_sync(seed) => (OpKind::Sync, libc::EIO),
        _ => return,
    };
    machine.faulty = true;
    machine.disk.fail_nth(kind, when, errno);
    if seed % FAULTS == 3 {
        machine.disk.fail_nth(kind, when + machine.rng.random_range(0..10), errno);
    }
    if fails_a_sync(seed) {
        machine.openings = 1;
    }
}

/// The workload of a seed, until it has made all its I/O steps or died at one of them.
fn workload(seed: u64, die_at: Option<u64>) -> Machine {
    let mut machine = Machine::new(seed);
    machine.open().unwrap();
    machine.create();
    machine.create();
    machine.checkpoint_once();
    let start = machine.disk.io_steps();
    order_faults(&mut machine, seed);
    if let Some(step) = die_at {
        machine.disk.crash_at(start + step);
    }
    while machine.is_alive() && machine.disk.io_steps() < start + STEPS {
        machine.tick();
    }
    machine
}

/// What a crash at one step of a workload leaves, in several ways.
fn crash_at(seed: u64, step: u64) {
    let dead = workload(seed, Some(step));
    if !dead.disk.crashed() {
        return;
    }
    let fork_seed = seed << 20 | step << 4;
    let (mut killed, mut cut) = (dead.fork(fork_seed), dead.fork(fork_seed + 1));
    let after_kill = killed.restart(Kill);
    let after_cut = cut.restart(PowerCut);
    for (name, log) in &after_cut {
        if let Some(other) = after_kill.get(name) {
            check::one_continues_the_other(other, log);
        }
    }
    if fails_a_sync(seed) {
        // What a failed sync has lost shows until the power is cut: with what follows, the damage is certain.
        return;
    }
    let mut machine = dead.fork(fork_seed + 2);
    let story = STORIES.choose(&mut machine.rng).unwrap();
    for then in *story {
        if std::env::var_os("CRASH_TRACE").is_some() {
            eprintln!("-- {then:?}");
        }
        machine.go_on(*then);
    }
}

impl Machine {
    /// Starts the machine again after a crash, and checks what it finds.
    fn restart(&mut self, how: Crash) -> std::collections::BTreeMap<cdp_types::VolumeName, Vec<Logged>> {
        self.crash(how);
        if let Err(error) = self.open() {
            panic!("after {how:?} the store does not open: {error:?}");
        }
        self.trace(how);
        self.check()
    }

    /// With `CRASH_TRACE` set, tells what a crash has left.
    fn trace(&self, how: Crash) {
        if std::env::var_os("CRASH_TRACE").is_none() {
            return;
        }
        eprintln!("-- after {how:?}, at I/O step {}", self.disk.io_steps());
        for segment in self.store().segments().unwrap() {
            eprintln!("{segment:?}");
        }
        for info in self.store().volumes() {
            eprintln!("{} {}: {:?} {:?}", info.name, info.id, info.head, info.state);
            for branch in self.store().branches(&info.name).unwrap() {
                eprintln!("  {branch:?}");
            }
            eprintln!("  {:?}", self.volumes.get(&info.name).map(|memory| &memory.forks));
            let told = self.volume(&info.name).records(cdp_types::Seq::ZERO, cdp_types::Seq::MAX, &mut |r| {
                eprintln!(
                    "  {} {} {} {}+{} origin {}",
                    r.ordinal, r.seq, r.kind, r.first_block, r.block_count, r.origin
                );
                true
            });
            told.unwrap();
        }
    }

    fn go_on(&mut self, then: Then) {
        match then {
            Restart(how) => drop(self.restart(how)),
            DieOpening(how) => {
                self.crash(how);
                self.disk.crash_at(self.disk.io_steps() + self.rng.random_range(0..40));
                // It dies, or it is through before it would have died.
                let _ = self.open();
            }
            Work(steps) => {
                self.disk.crash_at(self.disk.io_steps() + steps);
                let end = self.disk.io_steps() + steps;
                while self.is_alive() && self.disk.io_steps() <= end {
                    self.tick();
                }
            }
            LandLate => self.disk.land_late_writes(),
        }
    }
}

/// A crash test sees only what its workloads do.
#[test]
fn the_workloads_replace_worn_memory_volumes() {
    let replaced: Vec<u32> = (0..12).map(|seed| workload(seed, None).vm.replaced).collect();
    println!("replaced: {replaced:?}");
    assert!(replaced.iter().sum::<u32>() > 3, "{replaced:?}");
}

#[test]
fn the_workloads_set_blocks_aside() {
    let reserved: Vec<u64> = (0..12).map(|seed| workload(seed, None).disk.reserved()).collect();
    println!("set aside: {reserved:?}");
    assert!(reserved.iter().sum::<u64>() > 3, "{reserved:?}");
}

#[test]
fn a_crash_at_every_step_keeps_the_invariants() {
    for_each_seed(FAULTS, |seed| {
        let only = std::env::var("CRASH_STEP").ok().map(|text| text.parse::<u64>().unwrap());
        for step in only.map_or(0..STEPS, |step| step..step + 1) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| crash_at(seed, step))) {
                eprintln!("seed {seed}, crash at step {step}");
                resume_unwind(panic);
            }
        }
        workload(seed, None).finish();
    });
}
