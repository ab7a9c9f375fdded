//! The handle of an open window.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::ahead::{self, FilePage};
use super::{Guard, locked};

/// An open window of a guard. It closes when this is dropped, so whoever opened it can end in any way without leaving
/// requests parked; nobody else can close it, and it closes no other.
#[must_use = "the window closes when this is dropped"]
pub struct Window {
    guard: Arc<Guard>,
    id: u64,
}

impl Window {
    pub(super) fn new(guard: &Arc<Guard>, id: u64) -> Self {
        Self { guard: Arc::clone(guard), id }
    }

    /// Has pages touched that the guest is expected to write soon, in this order and as soon as QEMU has protected them, by
    /// threads that end by themselves: when all are touched, one round after `over` was set, or with the window. Nothing
    /// is written, and nobody waits for it. Quick.
    pub fn touch_ahead(&self, pages: impl IntoIterator<Item = FilePage>, over: &Arc<AtomicBool>) {
        let memory = Arc::clone(&locked(&self.guard.state).memory);
        ahead::spawn(&self.guard, self.id, &memory.region_guards(), pages.into_iter(), over);
    }

    /// Closes the window: QEMU has saved everything, or has given up. What waits goes on. Does not block.
    pub fn close(self) {}
}

impl Drop for Window {
    fn drop(&mut self) {
        self.guard.close(self.id);
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("id", &self.id).finish_non_exhaustive()
    }
}
