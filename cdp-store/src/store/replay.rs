//! Recovering the logs of an opening's volumes, several side by side.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cdp_types::{BranchId, Ordinal, Origin, Seq};

use super::inspect::VerifyProgress;
use super::opening::Mode;
use crate::catalogue::{BranchRow, BranchState, VolumeRow};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexErrorKind, TimeIndex, Watermark};
use crate::leaves::LeafBudget;
use crate::lineage::flattened;
use crate::log::{BatchAt, Fence, Recovery, recover};
use crate::map::HeadMap;
use crate::pace::Pace;
use crate::reach::End;
use crate::segments::Segment;
use crate::stretch::Stretch;
use crate::volume::Recovered;

/// How much of the logs is read between two words of how far an opening has come.
const TELL_EVERY_BYTES: u64 = 16 << 20;
/// From so many volumes on they are recovered side by side. For fewer it gains nothing, and what a simulated disk does
/// follows from the order of what is asked of it.
const SIDE_BY_SIDE_FROM: usize = 16;
/// Threads that recover volumes: some wait for the disk while others look at what they have read.
const THREADS: usize = 6;

/// Told how much of the logs an opening has read.
pub type OpeningProgress = Box<dyn FnMut(VerifyProgress) + Send>;

/// Who is told how far an opening has come, and what it was told.
#[derive(Default)]
pub(super) struct Told {
    progress: Option<OpeningProgress>,
    /// Bytes of volumes' logs read so far.
    read_bytes: u64,
    told_bytes: u64,
    /// And in all, as an upper bound.
    total_bytes: u64,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Told({} of {} bytes)", self.read_bytes, self.total_bytes)
    }
}

impl Told {
    pub(super) fn new(progress: OpeningProgress, total_bytes: u64) -> Self {
        Self { progress: Some(progress), total_bytes, ..Self::default() }
    }

    fn read(&mut self, bytes: u64) {
        self.read_bytes += bytes;
        if self.read_bytes - self.told_bytes >= TELL_EVERY_BYTES
            && let Some(progress) = &mut self.progress
        {
            self.told_bytes = self.read_bytes;
            let total_bytes = self.total_bytes;
            progress(VerifyProgress { done_bytes: self.read_bytes.min(total_bytes), total_bytes });
        }
    }
}

/// What a volume is recovered from.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) row: VolumeRow,
    pub(super) branches: BTreeMap<BranchId, BranchRow>,
    pub(super) chain: Vec<Arc<Segment>>,
    pub(super) fence: Fence,
    /// Where its last process left it.
    pub(super) reached: Option<End>,
}

/// Recovers volumes.
#[derive(Debug)]
pub(super) struct Replay<'a> {
    index: &'a TimeIndex,
    leaf_budget: &'a Arc<LeafBudget>,
    mode: Mode,
    told: Mutex<Told>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(
        index: &'a TimeIndex,
        leaf_budget: &'a Arc<LeafBudget>,
        mode: Mode,
        told: Told,
    ) -> Self {
        Self { index, leaf_budget, mode, told: Mutex::new(told) }
    }

    /// Recovers all volumes. What is acknowledged in a log's tail is durable then.
    ///
    /// # Errors
    /// The first one of any volume.
    pub(super) fn all(&self, logs: &[Log]) -> Result<Vec<Recovered>> {
        if logs.len() < SIDE_BY_SIDE_FROM {
            return logs.iter().map(|log| self.volume(log)).collect();
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(log) = logs.get(at) else { return done };
                done.push((at, self.volume(log)));
            }
        };
        let mut all = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            let done = joined.map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            done.flatten().collect::<Vec<_>>()
        });
        all.sort_unstable_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, recovered)| recovered).collect()
    }

    fn volume(&self, log: &Log) -> Result<Recovered> {
        let row = &log.row;
        let watermark = match self.index.watermark(row.id) {
            Err(error) if error.kind() == IndexErrorKind::Corrupt && self.mode == Mode::Write => {
                tracing::warn!(volume = %row.name, "{error}; its index is rebuilt from the log");
                self.forget_index(log)?;
                None
            }
            found => found.map_err(|e| {
                let text = format!("reading the time index of volume '{}'", row.name);
                Error::new(ErrorKind::Io, text).with(e)
            })?,
        };
        // An opening syncs what it recovers before it says in the store log where that ends.
        let fenced = log.fence.last;
        match self.replay(log, watermark.as_ref(), fenced) {
            Err(error) if error.kind() == ErrorKind::Corrupt && watermark.is_some() => {
                tracing::warn!(volume = %row.name, "{error}; its index is rebuilt from the log");
                // The index only ever says what was durable, so what it speaks of and the log lacks was not torn off.
                let known = watermark.map_or(fenced, |w| w.ordinal.max(fenced));
                if self.mode == Mode::Write {
                    self.forget_index(log)?;
                    self.replay(log, None, known)
                } else {
                    Err(error)
                }
            }
            other => other,
        }
    }

    fn forget_index(&self, log: &Log) -> Result<()> {
        let each = |branch: &BranchId| [flattened(*branch), *branch];
        let branches: Vec<BranchId> = log.branches.keys().flat_map(each).collect();
        self.index
            .drop_volume(log.row.id, &branches)
            .map_err(|e| Error::new(ErrorKind::Io, "clearing part of the time index").with(e))
    }

    fn replay(&self, log: &Log, watermark: Option<&Watermark>, known_durable: Ordinal) -> Result<Recovered> {
        let Log { row, branches, chain, fence, reached } = log;
        let indexed = watermark.map_or(Seq::ZERO, |w| w.seq);
        let (start, created_ns) =
            branches.get(&row.branch).map_or((Seq::ZERO, 0), |b| (b.start, b.created_ns));
        let mut map = HeadMap::new(indexed, row.branch, self.leaf_budget);
        let mut survived: Vec<Origin> = Vec::new();
        let writable = self.mode == Mode::Write;
        let recovery = recover(chain, *fence, watermark, known_durable, *reached, &mut |batch, durable| {
            let told = || self.told.lock().unwrap_or_else(PoisonError::into_inner);
            told().read(batch.end() - batch.header.place.offset);
            collect_origins(&batch, &mut survived);
            if branches.get(&batch.header.branch).is_some_and(|b| b.state != BranchState::Gone) {
                map.apply(&batch.header, batch.crc, batch.payload_at);
            } else {
                map.pass(&batch.header, batch.crc);
            }
            // A long replay, after the index was lost, is written to it on the way: memory stays bounded.
            if durable && writable {
                let chunks = map.oldest_closed(usize::MAX, Ordinal(u64::MAX));
                if let Some(stretch) = Stretch::new(&chunks) {
                    stretch.write(self.index, row.id, &mut Pace::hurried())?;
                    map.drop_oldest(chunks.len());
                }
            }
            Ok(())
        })?;
        if let Some(batch) = &recovery.at_watermark {
            collect_origins(batch, &mut survived);
        }
        survived.sort_unstable();
        survived.dedup();
        settle(chain, &recovery, self.mode)?;
        if let Some(damage) = &recovery.damage {
            tracing::error!(volume = %row.name, "{}; the volume is read-only", damage.text);
        }
        let whole_upto = recovery.damage.as_ref().map(|_| recovery.end.seq.max(map.applied()));
        let claimed = recovery.damage.as_ref().map(|damage| damage.claimed);
        let read_only = match (self.mode, recovery.damage) {
            (_, Some(damage)) => Some(damage.text),
            (Mode::Read, None) => Some("the store was opened for inspection".to_owned()),
            (Mode::Write, None) => None,
        };
        map.switch(row.branch, start);
        let end = recovery.end.on_branch(start, created_ns);
        Ok(Recovered { end, map, survived, read_only, whole_upto, claimed, reached: recovery.reached })
    }
}

/// Makes a log's recovered tail durable: the dead process may have acknowledged it, and a flush after this opening must
/// cover it.
pub(super) fn settle(chain: &[Arc<Segment>], recovery: &Recovery, mode: Mode) -> Result<()> {
    if mode == Mode::Read || recovery.end.ordinal <= recovery.durable {
        return Ok(());
    }
    let from = chain.partition_point(|s| s.header.first_ordinal <= recovery.durable).saturating_sub(1);
    for segment in &chain[from..] {
        segment.file.sync().map_err(|e| Error::io(format!("syncing {}", segment.file.name()), e))?;
    }
    Ok(())
}

fn collect_origins(batch: &BatchAt, into: &mut Vec<Origin>) {
    into.extend(batch.header.records.iter().map(|r| r.origin).filter(|o| o.0 != 0));
}
