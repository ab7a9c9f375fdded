//! Changes that the time index does not have yet. They are in memory, and nothing bounds them but how fast the index is
//! written; so where it falls far behind, writers are slowed down to its pace.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Writers wait only for an index that is being written. One that cannot be (its disk is full, or damaged) must not stop
/// guests, who do not depend on it.
const STUCK_AFTER: Duration = Duration::from_secs(3);

/// How fast a queue may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As it likes.
    Full,
    /// One batch at a time.
    Slow,
    /// Not now.
    Wait,
}

/// The changes of all volumes of a store that the index does not have yet.
#[derive(Debug)]
pub struct Backlog {
    most: usize,
    changes: AtomicUsize,
    /// When some were indexed, on the clock since boot; 0 if none were.
    indexed_ns: AtomicU64,
    /// Writers wait, and this was said.
    told: AtomicBool,
}

impl Backlog {
    /// One in which writers have to wait when there are `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            changes: AtomicUsize::new(0),
            indexed_ns: AtomicU64::new(0),
            told: AtomicBool::new(false),
        }
    }

    /// So many came.
    pub fn grow(&self, changes: usize) {
        self.changes.fetch_add(changes, Ordering::Relaxed);
    }

    /// So many are in the index now, or nobody's any more.
    pub fn shrink(&self, changes: usize) {
        let left = self.changes.fetch_sub(changes, Ordering::Relaxed) - changes;
        if left < self.most / 2
            && self.told.load(Ordering::Relaxed)
            && self.told.swap(false, Ordering::Relaxed)
        {
            tracing::info!("the time index has caught up: writes go on at full speed");
        }
    }

    /// The index was written, at this time since boot.
    pub fn note_indexed(&self, now_ns: u64) {
        self.indexed_ns.store(now_ns, Ordering::Relaxed);
    }

    /// How fast writers may go on; `now_ns` tells the time since boot.
    pub fn pace(&self, now_ns: impl FnOnce() -> u64) -> Pace {
        let changes = self.changes.load(Ordering::Relaxed);
        if changes < self.most - self.most / 4 {
            return Pace::Full;
        }
        let since = now_ns().saturating_sub(self.indexed_ns.load(Ordering::Relaxed));
        if u128::from(since) > STUCK_AFTER.as_nanos() {
            return Pace::Full;
        }
        if changes < self.most {
            return Pace::Slow;
        }
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::info!(changes, "the time index is far behind: writes wait for it");
        }
        Pace::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_slow_down_and_wait_for_an_index_that_is_being_written_and_for_no_other() {
        let backlog = Backlog::new(100);
        let second = 1_000_000_000;
        backlog.note_indexed(10 * second);
        let pace = |seconds: u64| backlog.pace(|| seconds * second);
        backlog.grow(74);
        assert_eq!(pace(11), Pace::Full);
        backlog.grow(1);
        assert_eq!(pace(11), Pace::Slow);
        backlog.grow(25);
        assert_eq!((pace(11), pace(13), pace(14)), (Pace::Wait, Pace::Wait, Pace::Full));
        backlog.note_indexed(14 * second);
        assert_eq!(pace(14), Pace::Wait);
        backlog.shrink(60);
        assert_eq!(pace(14), Pace::Full);
    }
}
