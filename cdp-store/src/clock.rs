//! Clocks behind a seam, and the store's own clock made of them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Raw readings of the wall clock and of the time since boot.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Nanoseconds since 1970 by the wall clock, which can jump.
    fn wall_ns(&self) -> u64;

    /// Nanoseconds since boot, suspension included; never jumps, means nothing across a reboot.
    fn boot_ns(&self) -> u64;
}

/// The operating system's clocks: `CLOCK_REALTIME` and `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

fn read(id: rustix::time::ClockId) -> u64 {
    let time = rustix::time::clock_gettime(id);
    // Neither clock can be before 1970 on a machine that runs this; a negative reading would be a broken one.
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

impl Clock for SystemClock {
    fn wall_ns(&self) -> u64 {
        read(rustix::time::ClockId::Realtime)
    }

    fn boot_ns(&self) -> u64 {
        read(rustix::time::ClockId::Boottime)
    }
}

/// One reading of all three clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The store's clock: nanoseconds since 1970, never twice the same, never backwards.
    pub time_ns: u64,
    /// The raw wall clock.
    pub wall_ns: u64,
    /// The raw boot clock.
    pub boot_ns: u64,
}

/// A wall clock step back of more than this is worth a line in the log, in nanoseconds.
const STEP_WORTH_TELLING_NS: u64 = 1_000_000_000;

/// The store's clock: the wall clock where it runs forward; where it steps back, the boot clock carries on from
/// the last reading, so that neither history's order nor its progress depends on who sets the time.
#[derive(Debug)]
pub struct StoreClock {
    clock: Arc<dyn Clock>,
    last: Mutex<Last>,
}

#[derive(Debug)]
struct Last {
    time_ns: u64,
    boot_ns: u64,
    behind: bool,
}

impl StoreClock {
    /// A clock that reads no earlier than `floor_ns`, the newest time in the store's logs.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, floor_ns: u64) -> Self {
        let boot_ns = clock.boot_ns();
        Self { clock, last: Mutex::new(Last { time_ns: floor_ns, boot_ns, behind: false }) }
    }

    /// Reads it. Two readings are never equal.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (wall_ns, boot_ns) = (self.clock.wall_ns(), self.clock.boot_ns());
        let carried = last.time_ns + boot_ns.saturating_sub(last.boot_ns).max(1);
        let behind = wall_ns + STEP_WORTH_TELLING_NS < carried;
        if behind && !last.behind {
            tracing::warn!(
                seconds = (carried - wall_ns) / 1_000_000_000,
                "the wall clock is behind the newest record of the store; its times run on from there"
            );
        }
        last.behind = behind;
        last.time_ns = wall_ns.max(carried);
        last.boot_ns = boot_ns;
        Stamp { time_ns: last.time_ns, wall_ns, boot_ns }
    }

    /// Raises the floor: nothing that is stamped from now on is at or before `time_ns`.
    pub fn not_before(&self, time_ns: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.time_ns = last.time_ns.max(time_ns);
    }
}
