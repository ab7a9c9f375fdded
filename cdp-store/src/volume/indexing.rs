//! From the log into the time index: background work of a volume.
//!
//! The order is the invariant: a chunk of changes goes into the index only when the log that it comes from is
//! durable, because RocksDB may make rows durable at any moment; and only when the front end has seen its
//! completions, because recovery recognises requests in flight by replaying what lies behind the watermark.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_types::{BranchId, Ordinal, Seq, VolumeId};

use super::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Record, RecordKind};
use crate::index::{IndexBatch, LogPos, NodeKey, TimeIndex, Watermark, image_due};
use crate::map::{Chunk, ChunkEnd};
use crate::queue::Inbox;

/// How long a sync may take before whoever waits for it is told.
const SYNC_PATIENCE: Duration = Duration::from_secs(60);
/// One in so many leaves that get a delta is looked at for whether it is due an image.
const IMAGE_SAMPLE: u64 = 16;
/// Images at which the sample aims: more rows or changes than this cost reads more than images cost space.
const SAMPLED_DELTAS: u32 = 16;

impl Volume {
    /// Closes the changes gathered so far, so that [`Volume::index_step`] will take them.
    pub(crate) fn close_chunk(&self) {
        self.map().close_chunk();
    }

    /// Writes one chunk into the index, if there is one and it may be written; says whether it did.
    pub(crate) fn index_step(&self) -> Result<bool> {
        let Some(chunk) = self.map().oldest_closed() else { return Ok(false) };
        let Some(end) = chunk.end else { return Ok(false) };
        if self.is_read_only() {
            return Ok(false);
        }
        {
            let log = self.log();
            if end.ordinal > log.delivered() {
                return Ok(false);
            }
            if end.ordinal > log.durable() {
                drop(log);
                self.sync_in_background()?;
                if end.ordinal > self.log().durable() {
                    return Ok(false);
                }
            }
        }
        write_chunk(&self.shared().index, self.id(), &chunk)?;
        self.map().drop_oldest();
        self.write_images(&chunk, &end)?;
        Ok(true)
    }

    /// Writes images of some of the leaves that a chunk touched, so that no leaf's chain of deltas grows for ever.
    fn write_images(&self, chunk: &Arc<Chunk>, end: &ChunkEnd) -> Result<()> {
        let index = &self.shared().index;
        let failed = |e| Error::new(ErrorKind::Io, "writing images into the time index").with(e);
        let mut batch = IndexBatch::new();
        let mut sampled: Vec<&NodeKey> =
            chunk.nodes.keys().filter(|k| k.level == 0 && is_sampled(k, end.ordinal)).collect();
        sampled.sort_unstable();
        for key in sampled {
            let found = index.leaf_at(key.branch, key.node, end.seq).map_err(failed)?;
            if found.deltas_since_image >= SAMPLED_DELTAS
                || image_due(found.deltas_since_image, found.changes_since_image)
            {
                batch.image(key.branch, key.node, end.seq, &found.states);
            }
        }
        if batch.is_empty() { Ok(()) } else { index.write(&batch).map_err(failed) }
    }

    /// Makes what is acknowledged durable, from a background thread; does nothing, and says so, while a queue is at it.
    pub(crate) fn sync_in_background(&self) -> Result<bool> {
        let nobody = Inbox::nobody();
        let Some(plan) = self.log().begin_sync(&nobody) else { return Ok(false) };
        let mut result = Ok(());
        for segment in &plan.segments {
            if let Err(error) = segment.file.sync() {
                result = Err(format!("syncing {}: {error}", segment.file.name()));
                break;
            }
        }
        let outcome = result.clone();
        let mut log = self.log();
        let waiters = log.end_sync(&plan, result);
        self.cut_if_due(&mut log, None);
        drop(log);
        for waiter in waiters {
            waiter.send(crate::queue::Mail::Retry, None);
        }
        outcome.map(|()| true).map_err(|why| Error::new(ErrorKind::Io, why))
    }

    /// Makes every acknowledged batch up to and including this one durable.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// If a file cannot be synced; the volume takes no writes then.
    pub(crate) fn make_durable(&self, ordinal: Ordinal) -> Result<()> {
        let target = ordinal.min(self.log().acked());
        let started = Instant::now();
        while self.log().durable() < target {
            if let Some(why) = self.log().poisoned() {
                return Err(Error::new(ErrorKind::Io, why.to_owned()));
            }
            if !self.sync_in_background()? {
                // A queue is at it, and its sync may have begun too early for us.
                std::thread::sleep(Duration::from_millis(1));
                if started.elapsed() > SYNC_PATIENCE {
                    return Err(Error::new(ErrorKind::Busy, "the disk has not finished a sync for a minute"));
                }
            }
        }
        Ok(())
    }

    /// Whether something acknowledged would not survive a power cut.
    pub(crate) fn has_unsynced(&self) -> bool {
        let log = self.log();
        log.acked() > log.durable() && log.poisoned().is_none()
    }

    /// Whether there is nothing to sync, to note or to index: until it is written again.
    pub(crate) fn is_at_rest(&self) -> bool {
        let log = self.log();
        if self.is_read_only() || log.poisoned().is_some() {
            return true;
        }
        let noted = log.acked() == Ordinal(0) || log.claimed() >= log.acked();
        drop(log);
        noted && !self.map().has_unindexed()
    }

    /// Appends a record that says how far the log is durable, so that rot of its tail is not taken for a torn write.
    /// Nothing must be in flight, and no epoch armed, whose cut would have to wait; what is asked for then is skipped.
    ///
    /// # Durability
    /// The record and all before it, once this returns.
    pub(crate) fn note_durable(&self) -> Result<()> {
        let mut log = self.log();
        let nothing_new = log.acked() == Ordinal(0) || log.claimed() >= log.acked();
        let busy = log.in_flight() > 0 || log.is_syncing() || log.needs_cut() || log.durable() < log.acked();
        if nothing_new || busy || log.poisoned().is_some() || self.is_armed() {
            return Ok(());
        }
        let record = Record::event(RecordKind::Durable, log.acked().0);
        match log.append_synced(&self.shared().log, record, Vec::new()) {
            Ok(acked) => {
                let at = acked.header.ordinal;
                log.claim(at);
                self.map().apply(&acked.header, acked.crc, acked.payload_at);
                Ok(())
            }
            // No segment at hand: the claim is a precaution, not worth a wait.
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Indexed up to here: `Seq`.
    #[must_use]
    pub fn indexed(&self) -> Seq {
        self.map().indexed()
    }
}

/// Writes a chunk's rows and the watermark that covers them, all or none.
///
/// # Durability
/// None before the next index flush, but possible at once: the chunk's part of the log must be durable.
pub(crate) fn write_chunk(index: &TimeIndex, volume: VolumeId, chunk: &Arc<Chunk>) -> Result<()> {
    let mut batch = IndexBatch::new();
    let failed = |e| Error::new(ErrorKind::Io, "writing the time index").with(e);
    let mut keys: Vec<&NodeKey> = chunk.nodes.keys().collect();
    keys.sort_unstable();
    for key in keys {
        batch.changes(*key, &chunk.nodes[key]).map_err(failed)?;
    }
    for &(branch, entry) in &chunk.times {
        batch.time(branch, entry);
    }
    if let Some(end) = &chunk.end
        && let Some(pos) = LogPos::new(end.place.incarnation, end.place.offset)
    {
        let watermark =
            Watermark { ordinal: end.ordinal, seq: end.seq, pos, header_crc: end.crc, time_ns: end.time_ns };
        batch.watermark(volume, &watermark);
    }
    index.write(&batch).map_err(failed)
}

fn is_sampled(key: &NodeKey, ordinal: Ordinal) -> bool {
    let BranchId(branch) = key.branch;
    let mixed =
        (key.node ^ branch.rotate_left(32) ^ ordinal.0.rotate_left(17)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32).is_multiple_of(IMAGE_SAMPLE)
}
