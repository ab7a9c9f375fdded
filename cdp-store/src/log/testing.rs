//! What a log is written with, on a simulated disk.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use cdp_types::{Generation, Seq};

use super::LogContext;
use crate::clock::{StoreClock, SystemClock};
use crate::segments::{DIRECTORY, Segments};
use crate::storage::Storage;
use crate::storage::sim::SimDisk;

/// The first generation of a store on this disk, without a pool: whoever writes a log supplies its segments.
pub(super) fn context(disk: &SimDisk, segment_bytes: u64) -> LogContext {
    let storage = disk.open();
    storage.create_directory(DIRECTORY).unwrap();
    let segments = Arc::new(Segments::new(Arc::new(storage), segment_bytes, 0, 0));
    let generation = Generation(1);
    segments.start_generation(generation);
    LogContext {
        store: [1; 16],
        generation,
        segments,
        clock: StoreClock::new(Arc::new(SystemClock), 0),
        next_seq: AtomicU64::new(Seq::first_of(generation).0),
        secrets: || 7,
        batch_bytes: 64 << 10,
    }
}
