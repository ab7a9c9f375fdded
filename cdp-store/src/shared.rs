//! What all volumes of an open store share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::index::TimeIndex;
use crate::leaves::LeafBudget;
use crate::lineage::{Branches, Lineage};
use crate::loaders::Loaders;
use crate::log::LogContext;
use crate::queue::Landings;
use crate::reach::ReachTable;
use crate::storage::Storage;

/// Wakes a background thread, or tells it to stop.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    /// Wakes whoever waits, or spares the next one its wait.
    pub fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.heard.notify_all();
    }

    /// Waits until it rings, at most `limit`.
    pub fn wait(&self, limit: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.heard.wait_timeout_while(rung, limit, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

/// Limits and habits that a store is opened with.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// How long a request waits for space before it fails.
    pub full_wait: Duration,
    /// Largest request, in bytes.
    pub max_request_bytes: u64,
    /// Bytes of blocks that one batch takes, unless a single request is larger.
    pub batch_bytes: usize,
    /// Batches that one queue has in flight.
    pub batches_in_flight: usize,
}

/// The parts of a store that its volumes use.
#[derive(Debug)]
pub struct Shared {
    /// What the logs need.
    pub log: LogContext,
    /// The files.
    pub storage: Arc<dyn Storage>,
    /// The time index.
    pub index: TimeIndex,
    /// Raw clocks, for deadlines.
    pub clock: Arc<dyn Clock>,
    /// What the head maps may cache.
    pub leaf_budget: Arc<LeafBudget>,
    /// Who looks up places that the head maps do not know.
    pub loaders: Loaders,
    /// Where large reads land.
    pub landings: Arc<Landings>,
    /// Limits.
    pub tuning: Tuning,
    /// All branches.
    pub branches: Branches,
    /// The next number for a request in an in-flight region.
    pub next_origin: AtomicU64,
    /// Wakes the thread that supplies segments.
    pub pool_bell: Bell,
    /// Wakes the thread that writes the index.
    pub index_bell: Bell,
    /// That thread has nothing to do, and waits to be told that it has.
    pub index_rests: AtomicBool,
    /// Where volumes' logs end, for the next opening.
    pub reach: Option<Arc<ReachTable>>,
    /// Set once when the store is closing: nothing new is taken.
    pub closing: AtomicBool,
}

impl Shared {
    /// Reads along branches' lines.
    #[must_use]
    pub fn lineage(&self) -> Lineage<'_> {
        Lineage { branches: &self.branches, index: &self.index }
    }

    /// Says that there is something for the thread that writes the index: called after it is there to be seen.
    pub fn note_work(&self) {
        if self.index_rests.load(Ordering::SeqCst) && self.index_rests.swap(false, Ordering::SeqCst) {
            self.index_bell.ring();
        }
    }

    /// Whether the store is being closed.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
}
