//! Whether a guest has its write cache on, from one connection to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The write cache of a disk, as its guest has set it (virtio 1.3, 5.2.5.2).
///
/// A front end does not say it again when it reconnects, so it is kept until a machine begins: here, and in the in-flight
/// region for the next process. While a guest resets there is no region, and a process that was started meanwhile does not
/// know it: off is what breaks no promise (5.2.6.2).
#[derive(Debug)]
pub struct WriteCache {
    off: AtomicBool,
    /// How many expect a machine whose guest has it off.
    expected_off: AtomicUsize,
}

impl WriteCache {
    /// That of a disk of which nothing is known yet.
    pub(crate) fn unknown() -> Self {
        Self { off: AtomicBool::new(true), expected_off: AtomicUsize::new(0) }
    }

    /// Whether the guest has turned it off, or may have: it relies on each write that is answered.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Acquire)
    }

    pub(crate) fn set_off(&self, off: bool) {
        self.off.store(off, Ordering::Release);
    }

    /// A machine begins. It has the cache on, unless it is expected to be one that goes on from where it was off.
    pub(crate) fn begin(&self) {
        self.set_off(self.expected_off.load(Ordering::Acquire) > 0);
    }

    /// Has machines that begin have it off, and see that in the configuration, for as long as what this returns lives.
    pub fn expect_off(self: &Arc<Self>) -> ExpectedOff {
        self.expected_off.fetch_add(1, Ordering::AcqRel);
        ExpectedOff(Arc::clone(self))
    }

    /// The machine that is connected, and whose rings do not run yet, goes on from where its guest had it off, whatever it
    /// was shown when it began.
    pub fn restored_off(&self) {
        self.set_off(true);
    }
}

/// An expectation of a machine whose guest has its write cache off. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "the expectation ends when this is dropped"]
pub struct ExpectedOff(Arc<WriteCache>);

impl Drop for ExpectedOff {
    fn drop(&mut self) {
        self.0.expected_off.fetch_sub(1, Ordering::AcqRel);
    }
}
