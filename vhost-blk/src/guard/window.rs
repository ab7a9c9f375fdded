//! The handle of an open window.

use std::fmt;
use std::sync::Arc;

use super::Guard;

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
