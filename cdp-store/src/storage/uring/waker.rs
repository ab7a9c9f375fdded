//! Getting a lane out of its sleep, without a system call while it is awake.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::storage::Waker;

/// One lane's alarm clock.
///
/// The sleeper sets `asleep`, then looks at `woken`; a waker sets `woken`, then looks at `asleep`. All four are
/// sequentially consistent, so at least one of the two sees the other: either the sleeper stays up, or the waker
/// writes to the eventfd, which the sleeper's ring is reading.
#[derive(Debug)]
pub(super) struct LaneWaker {
    asleep: AtomicBool,
    woken: AtomicBool,
    alarm: OwnedFd,
}

impl LaneWaker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            asleep: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            alarm: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    /// What the lane's ring reads while the lane sleeps.
    pub(super) fn alarm(&self) -> RawFd {
        self.alarm.as_raw_fd()
    }

    /// Whether somebody called since the last time; acquires what they had written before.
    pub(super) fn take(&self) -> bool {
        self.woken.swap(false, Ordering::SeqCst)
    }

    /// Announces a sleep. False: somebody called, so do not.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        let may_sleep = !self.woken.load(Ordering::SeqCst);
        if !may_sleep {
            self.get_up();
        }
        may_sleep
    }

    /// The sleep has ended, for whatever reason.
    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }
}

impl Waker for LaneWaker {
    fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        // Of several callers only the one that takes `asleep` away pays for the system call.
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            signal(self.alarm.as_fd(), 1);
        }
    }
}

/// Adds to an eventfd. It can fail only where that does no harm: when the counter is full, its reader is about to
/// wake up anyway, and a descriptor that is no eventfd has been reported when it was first read.
pub(super) fn signal(eventfd: BorrowedFd<'_>, count: u64) {
    if let Err(error) = rustix::io::write(eventfd, &count.to_ne_bytes()) {
        tracing::debug!(%error, "an eventfd could not be written to");
    }
}
