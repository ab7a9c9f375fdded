//! Simulated clocks.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::clock::Clock;

/// The most that passes between two readings, in nanoseconds.
const TICK_NS: u64 = 5_000;
/// Where the wall clock starts: some moment in 2026.
const START_WALL_NS: u64 = 1_790_000_000_000_000_000;
/// Where the clock since boot starts: the machine has been up for a minute.
const START_BOOT_NS: u64 = 60_000_000_000;

/// The two clocks of a simulated machine. Each reading moves both on by a little, at random; a test can move them by
/// any amount, and set the wall clock back. Clones are handles on the same clocks.
#[derive(Clone)]
pub struct SimClock {
    state: Arc<Mutex<State>>,
}

#[derive(Clone)]
struct State {
    rng: SmallRng,
    wall_ns: u64,
    boot_ns: u64,
}

impl SimClock {
    /// Clocks whose random moves follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let state = State { rng, wall_ns: START_WALL_NS, boot_ns: START_BOOT_NS };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.state().pass(ns);
    }

    /// Sets the wall clock, forwards or back, as an administrator or NTP does.
    pub fn set_wall_ns(&self, ns: u64) {
        self.state().wall_ns = ns;
    }

    /// Sets the clock since boot. Setting it back is a reboot.
    pub fn set_boot_ns(&self, ns: u64) {
        self.state().boot_ns = ns;
    }

    /// The machine has been started again.
    pub(super) fn reboot(&self) {
        self.set_boot_ns(START_BOOT_NS);
    }

    /// Clocks that show the same and go their own way from here on.
    pub(super) fn fork(&self) -> Self {
        Self { state: Arc::new(Mutex::new(self.state().clone())) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pass(&mut self, ns: u64) {
        self.wall_ns = self.wall_ns.saturating_add(ns);
        self.boot_ns = self.boot_ns.saturating_add(ns);
    }

    fn tick(&mut self) {
        let ns = self.rng.random_range(1..=TICK_NS);
        self.pass(ns);
    }
}

impl Clock for SimClock {
    fn wall_ns(&self) -> u64 {
        let mut state = self.state();
        state.tick();
        state.wall_ns
    }

    fn boot_ns(&self) -> u64 {
        let mut state = self.state();
        state.tick();
        state.boot_ns
    }
}

impl fmt::Debug for SimClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "SimClock(wall {} ns, boot {} ns)", state.wall_ns, state.boot_ns)
    }
}
