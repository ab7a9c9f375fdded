//! The time index: which place in the log held a block at which instant.
//!
//! It is derived from the volumes' logs and can be rebuilt from them. A branch's map is a tree of nodes
//! ([`NodeKey`]) of which only what happened to them is stored, as rows under (branch, level, node, newest
//! first): a *delta* has changes of a node in one stretch of the log, an *image* a whole leaf as of a
//! `Seq`. A leaf at any instant is the newest image at or before it, and the deltas since, of the leaf and of
//! the three nodes above it. Beside the map the index has each branch's times and each volume's watermark.
//!
//! Rules for whoever writes:
//! - rows only of batches that are durable in the log: RocksDB may make rows durable at any moment after `write`;
//! - rows and the watermark that covers them in one [`IndexBatch`], in the order of the log;
//! - only what was written before a `flush` that has returned counts as indexed.
//!
//! Here there are no logs, no branches' parents (a block that is [`BlockState::Unsaid`] is the caller's to look
//! up at the fork) and no policy. The same seam ([`Kv`]) carries the catalogue's database.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cdp_types::{BranchId, Seq, VolumeId};

mod batch;
mod codec;
mod error;
mod keys;
mod kv;
mod leaf;
mod place;
mod preload;
mod present;
mod read;
mod rocks;
mod rocks_tuning;
mod sim;

#[cfg(test)]
mod model_tests;

pub use batch::{IndexBatch, TimeEntry};
pub use codec::Watermark;
pub use error::{IndexError, IndexErrorKind, IndexResult};
pub use kv::{Family, Kv, KvStats, Visit, WriteBatch, WriteOp};
pub use leaf::{Change, ChangeState, FANOUT, LEVELS, LeafAt, NodeKey, NodeRun, child_of, decompose, unsaid};
pub use place::{BlockState, LogPos, Place};
pub use rocks::{RocksKv, RocksOptions};
pub use sim::SimKv;

use codec::{DecodeError, States};
use present::{Found, Presents};

/// Leaves whose presents are written together: neighbours cost less together.
const PRESENTS_AT_ONCE: usize = 16;

/// The time index over its database. All methods block and can be called from any thread.
pub struct TimeIndex {
    kv: Arc<dyn Kv>,
    written: Mutex<Written>,
    presents: Presents,
}

/// What was written since this was opened. Whoever writes holds its lock.
#[derive(Default)]
struct Written {
    /// The newest `Seq` of each branch.
    newest: HashMap<BranchId, Seq>,
    /// How often anything was that could change what a leaf looks like.
    times: u64,
}

impl TimeIndex {
    /// The index in this database, which has [`Family::TIME_INDEX`].
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>) -> Self {
        Self { presents: Presents::new(Arc::clone(&kv)), kv, written: Mutex::default() }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        // It holds no invariant that a panic elsewhere could break half-way.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a batch, all or none. Readers see it once this returns.
    ///
    /// # Durability
    /// As of [`Kv::write`]: none before [`Self::flush`], but possible at once. So whatever the batch and its
    /// watermarks speak of must be durable in the logs already.
    ///
    /// # Errors
    /// `Invalid` if it holds changes of a branch at or before one that was written earlier: they would hide or
    /// be hidden. Otherwise as [`Kv`]; nothing was written then, and the same batch can be tried again.
    pub fn write(&self, batch: &IndexBatch) -> IndexResult<()> {
        let mut written = self.written();
        for (branch, span) in &batch.spans {
            if written.newest.get(branch).is_some_and(|newest| span.first <= *newest) {
                let what = format!("branch {branch}, Seq {} of {}", span.first, self.kv.place());
                return Err(IndexError::new(IndexErrorKind::Invalid, "write again what is indexed", what));
            }
        }
        written.times += 1;
        let (stale, put) = self.presents.before_write(&batch.leaves);
        self.kv.write_together(&[&batch.rows, &stale])?;
        self.presents.after_write(&put);
        written.newest.extend(batch.spans.iter().map(|(branch, span)| (*branch, span.last)));
        Ok(())
    }

    /// The index flush: makes everything written before durable.
    ///
    /// # Durability
    /// On return, of every batch whose `write` had returned when this was called.
    ///
    /// # Errors
    /// As [`Kv`]. What was written may or may not survive; it stays readable.
    pub fn flush(&self) -> IndexResult<()> {
        self.kv.flush()
    }

    /// What a branch says about a leaf's 512 blocks at an instant: after every change up to and including `at`.
    ///
    /// It costs four scans; how long the first is depends on how often images of the leaf are written.
    ///
    /// # Errors
    /// `Corrupt` if a row is damaged; otherwise as [`Kv`].
    pub fn leaf_at(&self, branch: BranchId, leaf: u64, at: Seq) -> IndexResult<LeafAt> {
        match self.leaves_at(branch, &[leaf], at)?.pop() {
            Some(found) => Ok(found),
            None => unreachable!("one leaf was asked for"),
        }
    }

    /// The same of several leaves of a branch, in the order in which they are asked for. Neighbours cost less together: what
    /// lies above them is read once.
    ///
    /// # Errors
    /// As [`Self::leaf_at`].
    pub fn leaves_at(&self, branch: BranchId, leaves: &[u64], at: Seq) -> IndexResult<Vec<LeafAt>> {
        read::leaves_at(&*self.kv, branch, leaves, at)
    }

    /// What [`Self::leaf_at`] says of the blocks, from fewer rows where [`Self::write_presents`] has been since they changed.
    ///
    /// # Errors
    /// As [`Self::leaf_at`].
    pub fn states_at(&self, branch: BranchId, leaf: u64, at: Seq) -> IndexResult<Box<States>> {
        let found = self.presents.find(branch, leaf, at);
        if let Found::Known(since, states) = found {
            return read::leaf_since(
                &*self.kv,
                NodeKey { branch, level: 0, node: leaf },
                (since, states),
                at,
            );
        }
        let states = self.leaf_at(branch, leaf, at)?.states;
        if matches!(found, Found::Missing) && states.iter().any(|state| *state != BlockState::Unsaid) {
            self.presents.missed(branch, leaf);
        }
        Ok(states)
    }

    /// Leaves of a branch that have changed since [`Self::write_presents`] was there, or were read and found to have no such
    /// row: the first ones from `from` on, not all of them.
    #[must_use]
    pub fn stale_leaves(&self, branch: BranchId, from: u64) -> Vec<u64> {
        self.presents.stale_leaves(branch, from, PRESENTS_AT_ONCE)
    }

    /// Writes down what stale leaves of a branch look like now, so that they are found at once; `indexed` is the last
    /// `Seq` up to which the branch is in the index. Does nothing, and says so, if anything is written meanwhile, the
    /// branch is indexed further than that, or a leaf is not stale any more.
    ///
    /// # Durability
    /// As of [`Self::write`].
    ///
    /// # Errors
    /// As [`Self::leaf_at`] and [`Self::write`].
    pub fn write_presents(&self, branch: BranchId, leaves: &[u64], indexed: Seq) -> IndexResult<bool> {
        let times = self.written().times;
        let found = self.leaves_at(branch, leaves, indexed)?;
        let written = self.written();
        let later = written.newest.get(&branch).is_some_and(|newest| *newest > indexed);
        if written.times != times || later || !self.presents.are_stale(branch, leaves) {
            return Ok(false);
        }
        let states = leaves.iter().zip(&found).map(|(leaf, found)| (*leaf, &*found.states));
        let (rows, fresh) = self.presents.before_refresh(branch, indexed, states);
        let result = self.kv.write(&rows);
        self.presents.after_refresh(&fresh, result.is_ok());
        result.map(|()| true)
    }

    /// See [`Kv::fits_cache`].
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn fits_cache(&self) -> IndexResult<bool> {
        self.kv.fits_cache()
    }

    /// The first leaf at or after `from` of which the branch has rows of its own, to skip what was never written.
    /// Leaves that were only ever zeroed as a whole are not found: they differ from nothing only where a parent
    /// branch has data.
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn next_leaf(&self, branch: BranchId, from: u64) -> IndexResult<Option<u64>> {
        let first = keys::map(NodeKey { branch, level: 0, node: from }, Seq::MAX, keys::RowKind::Image);
        let end = keys::map_end(NodeKey { branch, level: 0, node: u64::MAX });
        let mut found = None;
        self.kv.scan(Family::Map, &first, &end, &mut |key, _| {
            found = keys::parse_node(key);
            false
        })?;
        Ok(found)
    }

    /// The runs of children that nodes above the leaves say were zeroed, up to and including `at`.
    ///
    /// # Errors
    /// `Corrupt` if a row is damaged; otherwise as [`Kv`].
    pub fn zeroed_nodes(&self, branch: BranchId, at: Seq) -> IndexResult<Vec<NodeRun>> {
        let first = keys::map(NodeKey { branch, level: 1, node: 0 }, Seq::MAX, keys::RowKind::Image);
        let mut runs = Vec::new();
        let mut failed = Ok(());
        self.kv.scan(Family::Map, &first, &keys::branch_end(branch), &mut |key, value| {
            if let Err(error) = zeroed_in_row(key, value, at, &mut runs) {
                failed = Err(read::corrupt(&*self.kv, (branch, key), error));
            }
            failed.is_ok()
        })?;
        failed.map(|()| runs)
    }

    /// How a branch's line was flattened, if it was.
    ///
    /// # Errors
    /// `Corrupt` if the row is damaged; otherwise as [`Kv`].
    pub fn flattening(&self, branch: BranchId) -> IndexResult<Option<[u64; 4]>> {
        let key = keys::flattening(branch);
        let Some(value) = self.kv.get(Family::Time, &key)? else { return Ok(None) };
        let numbers = codec::decode_numbers(&key, &value);
        numbers.map(Some).map_err(|error| read::corrupt(&*self.kv, branch, error))
    }

    /// The newest entry of a branch at or before a time; `None` if the branch has none so old.
    ///
    /// Requests between that entry and the time asked for are in the log after [`TimeEntry::ordinal`].
    ///
    /// # Errors
    /// `Corrupt` if the row is damaged; otherwise as [`Kv`].
    pub fn floor_time(&self, branch: BranchId, time_ns: u64) -> IndexResult<Option<TimeEntry>> {
        let from = keys::by_time(branch, time_ns, Seq::MAX);
        let found = self.first(Family::Time, &from, &keys::by_time_end(branch), |key, value| {
            let first = keys::parse_by_time(key).ok_or(DecodeError("malformed key"))?;
            codec::last_time(key, first, value, |entry| entry.time_ns <= time_ns)
        })?;
        Ok(found.flatten())
    }

    /// The newest entry of a branch at or before a `Seq`; `None` if the branch has none so old.
    ///
    /// # Errors
    /// As [`Self::floor_time`].
    pub fn time_of(&self, branch: BranchId, seq: Seq) -> IndexResult<Option<TimeEntry>> {
        let from = keys::by_seq(branch, seq);
        let named = || {
            self.first(Family::Time, &from, &keys::by_seq_end(branch), |key, value| {
                let first = keys::parse_by_seq(key).ok_or(DecodeError("malformed key"))?;
                let [time_ns, _] = codec::decode_numbers(key, value)?;
                Ok((time_ns, first))
            })
        };
        let Some(first) = named()? else { return Ok(None) };
        let key = keys::by_time(branch, first.0, first.1);
        let corrupt = |error| read::corrupt(&*self.kv, (Family::Time, &key[..]), error);
        match self.kv.get(Family::Time, &key)? {
            Some(row) => codec::last_time(&key, first, &row, |entry| entry.seq <= seq).map_err(corrupt),
            // The branch may have been dropped in between, all of its rows at once.
            None if named()?.is_none() => Ok(None),
            None => Err(corrupt(DecodeError("a row of times is missing"))),
        }
    }

    /// The first row of a range, decoded.
    fn first<T>(
        &self,
        family: Family,
        from: &[u8],
        to: &[u8],
        decode: impl Fn(&[u8], &[u8]) -> Result<T, DecodeError>,
    ) -> IndexResult<Option<T>> {
        let mut found = None;
        self.kv.scan(family, from, to, &mut |key, value| {
            found = Some(decode(key, value).map_err(|error| read::corrupt(&*self.kv, (family, key), error)));
            false
        })?;
        found.transpose()
    }

    /// How far a volume's log is indexed, as written; durable only if a flush has returned since. Right after
    /// opening, whatever is found is durable.
    ///
    /// # Errors
    /// `Corrupt` if the row is damaged; otherwise as [`Kv`].
    pub fn watermark(&self, volume: VolumeId) -> IndexResult<Option<Watermark>> {
        let key = keys::watermark(volume);
        let Some(value) = self.kv.get(Family::Watermark, &key)? else { return Ok(None) };
        let mark = codec::decode_watermark(&key, &value);
        mark.map(Some).map_err(|error| read::corrupt(&*self.kv, volume, error))
    }

    /// The watermarks of all volumes, by volume.
    ///
    /// # Errors
    /// As [`Self::watermark`].
    pub fn watermarks(&self) -> IndexResult<Vec<(VolumeId, Watermark)>> {
        let mut marks = Vec::new();
        let mut failed = Ok(());
        self.kv.scan(Family::Watermark, &[], &keys::WATERMARK_END, &mut |key, value| {
            let volume = keys::parse_watermark(key).ok_or(DecodeError("malformed key"));
            match volume.and_then(|volume| Ok((volume, codec::decode_watermark(key, value)?))) {
                Ok(mark) => marks.push(mark),
                Err(error) => failed = Err(read::corrupt(&*self.kv, (Family::Watermark, key), error)),
            }
            failed.is_ok()
        })?;
        failed.map(|()| marks)
    }

    /// Removes all that the index has of a branch nobody reads any more, and gives the space back. Takes as long
    /// as rewriting what lies around it: for background threads.
    ///
    /// # Durability
    /// On return. A crash meanwhile leaves some part of the branch: repeat the call.
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn drop_branch(&self, branch: BranchId) -> IndexResult<()> {
        self.remove(WriteBatch::new(), &[branch])?;
        let (from, to) = (keys::branch_start(branch), keys::branch_end(branch));
        self.kv.reclaim(Family::Map, &from, &to)?;
        self.kv.reclaim(Family::Time, &from, &to)?;
        keys::presents_of(branch).iter().try_for_each(|(from, to)| self.kv.reclaim(Family::Present, from, to))
    }

    /// Removes all that the index has of a volume whose log it does not belong to: all of its branches, and its watermark. The
    /// space comes back with what is written into them anew.
    ///
    /// # Durability
    /// On return. A crash meanwhile leaves all of it or none: rows without the watermark would be taken for what the log
    /// says, and a watermark without the rows would say that they are there.
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn drop_volume(&self, volume: VolumeId, branches: &[BranchId]) -> IndexResult<()> {
        let mut batch = WriteBatch::new();
        batch.delete(Family::Watermark, &keys::watermark(volume));
        self.remove(batch, branches)
    }

    /// Removes all rows of some branches together with what a batch says; durable on return.
    fn remove(&self, mut batch: WriteBatch, branches: &[BranchId]) -> IndexResult<()> {
        let mut written = self.written();
        written.times += 1;
        for &branch in branches {
            Presents::put_removal(branch, &mut batch);
            let (from, to) = (keys::branch_start(branch), keys::branch_end(branch));
            batch.delete_range(Family::Map, &from, &to);
            batch.delete_range(Family::Time, &from, &to);
        }
        self.kv.write(&batch)?;
        written.newest.retain(|branch, _| !branches.contains(branch));
        self.presents.forget(branches);
        drop(written);
        self.kv.flush()
    }

    /// Removes everything, for a rebuild from the logs.
    ///
    /// # Durability
    /// On return. A power cut meanwhile leaves either the old rows or none.
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn clear(&self) -> IndexResult<()> {
        let mut written = self.written();
        written.times += 1;
        self.kv.clear()?;
        written.newest.clear();
        self.presents.clear();
        Ok(())
    }

    /// See [`Kv::tidy`].
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn tidy(&self) -> IndexResult<()> {
        self.kv.tidy()
    }

    /// See [`Kv::preload`].
    pub fn preload(&self, stop: &dyn Fn() -> bool) {
        self.kv.preload(stop);
    }

    /// Figures for metrics.
    ///
    /// # Errors
    /// As [`Kv`].
    pub fn stats(&self) -> IndexResult<KvStats> {
        self.kv.stats()
    }
}

fn zeroed_in_row(key: &[u8], value: &[u8], at: Seq, runs: &mut Vec<NodeRun>) -> Result<(), DecodeError> {
    let malformed = DecodeError("malformed key");
    let (Some(level), Some(node)) = (keys::parse_level(key), keys::parse_node(key)) else {
        return Err(malformed);
    };
    let (seq, kind) = keys::parse_map_suffix(key).ok_or(malformed)?;
    if kind == keys::RowKind::Image {
        return Err(DecodeError("an image above level 0"));
    }
    for change in codec::decode_delta(key, level, seq, value)? {
        let Change { seq, first, count, .. } = change?;
        if seq > at {
            break;
        }
        runs.push(NodeRun { level, node, first, count });
    }
    Ok(())
}

impl fmt::Debug for TimeIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TimeIndex({})", self.kv.place())
    }
}
