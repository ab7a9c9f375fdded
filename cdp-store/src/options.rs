//! How a store is opened.

use std::time::Duration;

use crate::shared::Tuning;

/// Settings of an opening. Only the segment size is fixed when a store is made.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Capacity of a full-sized segment, in bytes: a power of two from 1 MiB to 256 MiB. Used when a store is made.
    pub segment_bytes: u64,
    /// Full-sized segments that are zero-filled ahead.
    pub pool_segments: usize,
    /// Bytes of map leaves that the volumes may keep in memory together.
    pub map_budget_bytes: usize,
    /// Memory of the time index's database, in bytes: rows that are not in a file yet, and cached blocks.
    pub index_memory_bytes: usize,
    /// How long writes wait while the store is full before they fail.
    pub full_wait: Duration,
    /// Bytes of the file system that only opening, destroying and recovering may use.
    pub reserve_bytes: u64,
    /// Bytes of blocks that one batch takes, unless a single request is larger.
    pub batch_bytes: usize,
    /// Batches that one queue has in flight.
    pub batches_in_flight: usize,
    /// How long changes stay out of the index while little happens.
    pub index_interval: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            pool_segments: 4,
            map_budget_bytes: 48 << 20,
            index_memory_bytes: 48 << 20,
            full_wait: Duration::from_secs(10),
            reserve_bytes: 256 << 20,
            batch_bytes: 1 << 20,
            batches_in_flight: 3,
            index_interval: Duration::from_secs(1),
        }
    }
}

impl StoreOptions {
    /// Largest request that a store with segments of this size takes, in bytes.
    #[must_use]
    pub fn max_request_bytes(segment_bytes: u64) -> u64 {
        (segment_bytes / 4).min(32 << 20)
    }

    pub(crate) fn tuning(&self, segment_bytes: u64) -> Tuning {
        let max_request_bytes = Self::max_request_bytes(segment_bytes);
        Tuning {
            full_wait: self.full_wait,
            max_request_bytes,
            batch_bytes: self.batch_bytes.min(max_request_bytes as usize),
            batches_in_flight: self.batches_in_flight.max(1),
        }
    }
}
