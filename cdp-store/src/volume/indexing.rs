//! From the log into the time index: background work of a volume.
//!
//! The order is the invariant: a chunk of changes goes into the index only when the log that it comes from is
//! durable, because RocksDB may make rows durable at any moment; and only when the front end has seen its
//! completions, because recovery recognises requests in flight by replaying what lies behind the watermark.

use std::time::{Duration, Instant};

use cdp_types::{BranchId, Ordinal, Seq};

use super::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Record, RecordKind};
use crate::pace::Pace;
use crate::queue::Inbox;
use crate::stretch::Stretch;

/// How long a sync may take before whoever waits for it is told.
const SYNC_PATIENCE: Duration = Duration::from_secs(60);
/// Chunks that are written together have about so many changes at most: a step's rows are in memory several times.
const STEP_CHANGES: usize = 256 << 10;

/// What one step has put into the index.
#[derive(Debug)]
pub(crate) struct Step {
    /// Changes that are in it now.
    pub changes: usize,
    /// What became of the images after that.
    pub images: Result<()>,
}

impl Volume {
    /// Closes the changes gathered so far, so that [`Volume::index_step`] will take them.
    pub(crate) fn close_chunk(&self) {
        self.map().close_chunk();
    }

    /// Writes the oldest closed chunks into the index, as many as may be written and make one step; says how many changes
    /// that were, if there was any chunk, and whether images could be written, too. If it is not `hurried` it
    /// takes its time.
    pub(crate) fn index_step(&self, hurried: bool) -> Result<Option<Step>> {
        if self.is_read_only() {
            return Ok(None);
        }
        let delivered = self.log().delivered();
        let chunks = self.map().oldest_closed(STEP_CHANGES, delivered);
        let Some(last) = chunks.last().and_then(|chunk| chunk.end) else { return Ok(None) };
        if last.ordinal > self.log().durable() {
            self.sync_in_background()?;
        }
        let durable = self.log().durable();
        let written = chunks.partition_point(|chunk| chunk.end.is_some_and(|end| end.ordinal <= durable));
        let chunks = &chunks[..written];
        let Some(stretch) = Stretch::new(chunks) else { return Ok(None) };
        let index = &self.shared().index;
        let changes = chunks.iter().map(|chunk| chunk.len()).sum();
        let mut pace = if hurried { Pace::hurried() } else { Pace::gentle() };
        let looks = stretch.write(index, self.id(), &mut pace)?;
        let images = stretch.write_images(index, &looks, &mut pace);
        // Not before: while it is here, its branches are not forgotten, and nothing is written of one that is.
        self.map().drop_oldest(written);
        Ok(Some(Step { changes, images }))
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
        let context = &self.shared().log;
        if log.set_aside(context, 0).is_err() {
            // The disk is full: the claim is a precaution, and not worth a write that may fail.
            return Ok(());
        }
        let record = Record::event(RecordKind::Durable, log.acked().0);
        match log.append_synced(context, record, Vec::new()) {
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

    /// Whether anything of a branch is still to be written into the index.
    pub(crate) fn is_to_index(&self, branch: BranchId) -> bool {
        let last = {
            let log = self.log();
            // What a poisoned log has not synced yet stays out of the index.
            if log.poisoned().is_some() { log.durable() } else { Ordinal(u64::MAX) }
        };
        !self.is_read_only() && self.map().has_changes_of(branch, last)
    }

    /// Indexed up to here: `Seq`.
    #[must_use]
    pub fn indexed(&self) -> Seq {
        self.map().indexed()
    }
}
