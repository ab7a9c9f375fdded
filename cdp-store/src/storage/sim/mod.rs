//! A simulated disk with faults, driven by one seed.
//!
//! A [`SimDisk`] is the machine: it survives the processes that run on it. [`SimDisk::open`] gives the storage that
//! one process sees. The same seed and the same calls, from one thread, give the same behaviour.
//!
//! # What is modelled
//! A file has a *volatile* content, which reads see, and a *durable* one, which a power cut leaves. A write changes
//! the first when it is executed; it reaches the second by a `sync` that was started after that. So does the length of
//! a file whose blocks are set aside, which disks of even seeds can. An operation of a lane is executed by
//! [`SimDisk::step`], or by a lane that has to wait, in an order that has nothing to do with the one in which
//! operations were started. Names have the two views too, and [`Storage::sync_directory`](super::Storage::sync_directory) between
//! them. Blocking calls are executed at once. Each execution and each blocking call is an *I/O step*: they are
//! counted, and the process can be made to die at any of them.
//!
//! # Faults it makes, and what must hold all the same (the invariants' numbers are those of the design)
//! | fault | tests |
//! |---|---|
//! | operations are executed in any order, a sync before the writes that were started before it | 1, 2 |
//! | *kill*: what was outstanding is dropped, executed, or torn by sectors, now or *late*, after the next start, also into a file that was removed meanwhile | 1, 4 |
//! | *power cut*: each write that was not synced is kept, dropped or torn by sectors, independently of the others; of a torn one, a whole physical block, with whatever else lay in it, can become garbage | 2, 4, 5 |
//! | a power cut takes back creations and removals whose directory was not synced, each name on its own | 2, 3 |
//! | a failed write has landed, or not, or in part, or lands late | 4 |
//! | a failed sync has lost some of what it covered, for good, though reads still show it, and no later sync says so | 2, 6 |
//! | reads fail; the disk is full | 6, 7 |
//! | on demand only: flipped bits, writes that land elsewhere or nowhere | 5, 6 |
//!
//! # Faults it never makes
//! - A sector of 512 bytes is never torn, and a write never changes bytes that it does not cover, except in the
//!   torn physical block of a power cut.
//! - What was executed before a successful sync was started survives every power cut (unless it lay in the physical
//!   block of a later write that was torn), and a kill takes back nothing that was executed.
//! - Two executed writes to one sector do not change places; but one that lands late lands over newer data.
//! - A running process never sees a write half executed.
//! - Of what lands late, a physical block comes at once.

mod clock;
mod content;
mod crash;
mod faults;
mod inode;
mod names;
mod storage;
#[cfg(test)]
mod tests;
mod world;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Alignment;
pub use clock::SimClock;
pub use faults::{Fault, OpKind, When};
pub use storage::SimStorage;
use world::World;

/// The unit that is never torn, in bytes.
const SECTOR: usize = 512;

/// A disk, and the machine that it is in; clones are handles on the same one.
#[derive(Clone)]
pub struct SimDisk {
    world: Arc<Mutex<World>>,
}

impl SimDisk {
    /// An empty disk. Everything random about it follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::from_world(World::new(seed))
    }

    fn from_world(world: World) -> Self {
        Self { world: Arc::new(Mutex::new(world)) }
    }

    /// A panicking test, such as one that reports a deadlock, must still be able to drop its store.
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Demands other than the default of 512 bytes for offsets and memory, and physical blocks of 4096.
    ///
    /// # Panics
    /// If a value is no power of two, or offsets may be finer than the 512 bytes that are never torn.
    #[must_use]
    pub fn with_alignment(self, alignment: Alignment) -> Self {
        let Alignment { offset, memory, physical_block } = alignment;
        assert!(
            [offset, memory, physical_block].iter().all(|value| value.is_power_of_two()),
            "{alignment:?}"
        );
        assert!(offset as usize >= SECTOR && physical_block >= offset, "{alignment:?}");
        self.world().alignment = alignment;
        self
    }

    /// The storage that a process started now sees. It works until the next crash, and is dead for ever after it.
    #[must_use]
    pub fn open(&self) -> SimStorage {
        SimStorage::new(self.clone())
    }

    /// The machine's clocks. Time passes with each reading, and with each wait for a lane that ended without an event.
    #[must_use]
    pub fn clock(&self) -> SimClock {
        self.world().clock.clone()
    }

    /// Executes one outstanding operation of any lane, chosen at random. False if there was none, or if the process
    /// is dead.
    #[must_use = "false says that nothing will ever happen by itself"]
    pub fn step(&self) -> bool {
        self.world().step()
    }

    /// Operations of all lanes that were started and not yet executed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.world().outstanding.len()
    }

    /// I/O steps so far, over all processes.
    #[must_use]
    pub fn io_steps(&self) -> u64 {
        self.world().steps
    }

    /// Lets the process die when [`SimDisk::io_steps`] has reached `steps`: the step after that fails, and so does
    /// every later call, until [`SimDisk::kill_restart`] or [`SimDisk::power_cut`], which also take this back.
    pub fn crash_at(&self, steps: u64) {
        self.world().crash_at = Some(steps);
    }

    /// Whether the process has died of [`SimDisk::crash_at`].
    #[must_use]
    pub fn crashed(&self) -> bool {
        self.world().crashed
    }

    /// Kills the process, if it lives, and makes the machine ready for the next.
    ///
    /// What had been executed is seen by the next process. Each write that had not been is dropped, executed, torn, or
    /// put off until some I/O step of a later process. Fault orders stay as they are.
    pub fn kill_restart(&self) {
        self.world().kill();
    }

    /// Cuts the power and makes the machine ready for the next process.
    ///
    /// As [`SimDisk::kill_restart`], but what was not synced is kept, dropped or torn at random, and nothing lands late
    /// any more. The clock since boot starts again.
    pub fn power_cut(&self) {
        self.world().cut_power();
    }

    /// A copy of the disk as it is now, with its own randomness, and with a process that has just died: call
    /// [`SimDisk::kill_restart`] or [`SimDisk::power_cut`] on it. So one run of a workload serves for many crashes.
    /// Fault orders are not copied; the clock is, and goes its own way.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        Self::from_world(self.world().fork(seed))
    }

    /// Writes of dead processes, and failed ones, that may still land.
    #[must_use]
    pub fn late_writes(&self) -> usize {
        self.world().late.len()
    }

    /// Lets them all land now, as opening a store does when it outwaits its last owner.
    pub fn land_late_writes(&self) {
        self.world().land_all();
    }

    /// Orders a fault. Of several that apply to an operation the one ordered first is taken.
    pub fn fail(&self, fault: Fault) {
        self.world().faults.add(fault);
    }

    /// Lets the operation of a kind fail that comes after `n` more of them, with an error number of libc.
    pub fn fail_nth(&self, kind: OpKind, n: u64, errno: i32) {
        self.fail(Fault { kind, file: None, when: When::Nth(n), errno });
    }

    /// Lets operations of a kind fail with a probability.
    pub fn fail_rate(&self, kind: OpKind, probability: f64, errno: i32) {
        self.fail(Fault { kind, file: None, when: When::Rate(probability), errno });
    }

    /// The write after `n` more is reported as done and never lands.
    pub fn lose_nth_write(&self, n: u64) {
        self.world().faults.lose(n);
    }

    /// The write after `n` more is reported as done and lands elsewhere: at `to`, a file and an offset, or somewhere in
    /// the same file.
    pub fn misdirect_nth_write(&self, n: u64, to: Option<(&str, u64)>) {
        self.world().faults.misdirect(n, to);
    }

    /// Takes back all orders of faults.
    pub fn clear_faults(&self) {
        self.world().faults = faults::Faults::default();
    }

    /// Flips a bit (0 to 7) of a byte of a file, wherever that byte is kept.
    ///
    /// # Panics
    /// If there is no such file, or it is shorter: the test is wrong.
    pub fn flip_bit(&self, name: &str, offset: u64, bit: u8) {
        self.world().flip_bit(name, offset, bit);
    }

    /// How many files have had blocks set aside for them. Disks of even seeds can do that.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.world().reserved
    }

    /// Limits the sum of the files' lengths (holes count); growing beyond it fails with ENOSPC.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.world().capacity = bytes;
    }

    /// What a reader would see in a file now; no I/O step. `None` if there is no such file.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        self.world().inode_named(name).map(|inode| inode.volatile.to_vec())
    }

    /// The names of all files, as a reader would see them now; no I/O step.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.world().names.files()
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world();
        f.debug_struct("SimDisk")
            .field("seed", &world.seed)
            .field("steps", &world.steps)
            .field("life", &world.life)
            .field("crashed", &world.crashed)
            .finish_non_exhaustive()
    }
}
