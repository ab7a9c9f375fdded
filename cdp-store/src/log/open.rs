//! The segment that a log writes to, and what its guests do to it.

use std::sync::Arc;

use crate::segments::Segment;

/// A batch is large from this part of the most that a batch takes on, 128 KiB by default: zeroes written ahead of it would
/// cost the disk more than it costs to write into blocks that are only set aside.
const LARGE_PART: u64 = 8;
/// With fewer flushes than one in so many large batches, what each flush costs more there does not matter.
const LARGE_BATCHES_PER_FLUSH: u64 = 16;

/// A log's present segment.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) segment: Arc<Segment>,
    /// Where the next batch goes, in bytes.
    pub(super) offset: u64,
    /// Not all of its blocks were written before, which makes each sync dearer.
    pub(super) grows: bool,
    /// Batches in it.
    pub(super) batches: u64,
    /// Flushes of a guest since it was opened.
    pub(super) flushes: u64,
    /// From how many bytes on a batch is large.
    pub(super) large_batch: u64,
}

impl Open {
    /// A segment that has nothing in it, its first batch at `first_at`, in bytes; batches take at most `batch_bytes`.
    pub(super) fn new(segment: Arc<Segment>, first_at: u64, grows: bool, batch_bytes: u64) -> Self {
        let large_batch = batch_bytes / LARGE_PART;
        Self { segment, offset: first_at, grows, batches: 0, flushes: 0, large_batch }
    }

    /// Whether a batch of so many bytes fits in behind the others.
    pub(super) fn fits(&self, bytes: u64) -> bool {
        self.offset + bytes <= self.segment.header.capacity
    }

    /// Whether guests write much at a time, and seldom flush.
    pub(super) fn streams(&self) -> bool {
        self.offset >= self.batches.max(1) * self.large_batch
            && self.flushes * LARGE_BATCHES_PER_FLUSH <= self.batches
    }

    /// Whether guests wait for its syncs.
    pub(super) fn is_flushed(&self) -> bool {
        self.flushes > 0 && !self.streams()
    }
}
