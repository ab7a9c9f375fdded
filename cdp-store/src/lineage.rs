//! Branches: what each inherits from which, and what a leaf or a time is along such a line.
//!
//! A branch's own changes are in the index under its number, and the newest of them in the map of the volume whose
//! log they come from; what it does not say, its parent said, up to the fork. Where that line has become long, a
//! [`Flattening`] stands for all branches between one and the far end, so that a read's cost does not grow with the
//! number of reverts and clones.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use cdp_types::{BranchId, Seq, VolumeId};

use crate::catalogue::BranchRow;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{BlockState, IndexBatch, IndexResult, NodeRun, TimeEntry, TimeIndex};
use crate::leaves::Leaf;
use crate::map::apply_changes;
use crate::volume::Volume;

/// Set in the number under which a branch's flattening has its images.
const FLATTENED: u64 = 1 << 63;

/// The number under which a branch's flattening has its images.
#[must_use]
pub fn flattened(branch: BranchId) -> BranchId {
    BranchId(branch.0 | FLATTENED)
}

/// An instant of one branch: everything up to and including `seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// On which branch.
    pub branch: BranchId,
    /// The last request that counts.
    pub seq: Seq,
}

/// Stands for all branches between one and the far end of its line: images of every leaf that one of them
/// speaks of, under a number of its own, and behind those the far end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattening {
    /// Where its images lie in the index.
    pub images: At,
    /// What they do not say, this does.
    pub base: At,
}

impl Flattening {
    /// As the index keeps it.
    #[must_use]
    pub fn numbers(&self) -> [u64; 4] {
        [self.images.branch.0, self.images.seq.0, self.base.branch.0, self.base.seq.0]
    }

    /// What [`Flattening::numbers`] gave.
    #[must_use]
    pub fn from_numbers([images, images_seq, base, base_seq]: [u64; 4]) -> Self {
        let at = |branch, seq| At { branch: BranchId(branch), seq: Seq(seq) };
        Self { images: at(images, images_seq), base: at(base, base_seq) }
    }
}

/// A branch of an open store. Whoever reads its history holds it: nothing that is held is given back.
#[derive(Debug)]
pub struct Branch {
    /// What the catalogue says of it; its `state` may be out of date here.
    pub row: BranchRow,
}

/// All branches of an open store. No two of its locks are held at a time.
#[derive(Debug, Default)]
pub struct Branches {
    table: RwLock<HashMap<BranchId, Arc<Branch>>>,
    flattened: RwLock<HashMap<BranchId, Flattening>>,
    owners: RwLock<HashMap<VolumeId, Weak<Volume>>>,
}

// A panic while one of these was held left nothing half-done: they hold plain tables.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Branches {
    /// Adds a branch.
    pub fn insert(&self, row: BranchRow) -> Arc<Branch> {
        let branch = Arc::new(Branch { row });
        write(&self.table).insert(row.id, Arc::clone(&branch));
        branch
    }

    /// Adds the volume whose log a branch's changes come from.
    pub fn own(&self, volume: &Arc<Volume>) {
        write(&self.owners).insert(volume.id(), Arc::downgrade(volume));
    }

    /// Removes a branch unless somebody holds it; says whether it did. From then on nobody can get hold of it.
    pub fn remove(&self, branch: BranchId) -> bool {
        {
            let mut table = write(&self.table);
            if table.get(&branch).is_some_and(|b| Arc::strong_count(b) > 1) {
                return false;
            }
            table.remove(&branch);
        }
        write(&self.flattened).remove(&branch);
        true
    }

    /// Removes a volume of which nothing is left.
    pub fn disown(&self, volume: VolumeId) {
        write(&self.owners).remove(&volume);
    }

    /// A branch.
    #[must_use]
    pub fn get(&self, branch: BranchId) -> Option<Arc<Branch>> {
        read(&self.table).get(&branch).cloned()
    }

    /// A volume's branches.
    #[must_use]
    pub fn of_volume(&self, volume: VolumeId) -> Vec<Arc<Branch>> {
        read(&self.table).values().filter(|b| b.row.volume == volume).cloned().collect()
    }

    /// Whether anybody reads a branch's history.
    #[must_use]
    pub fn is_held(&self, branch: BranchId) -> bool {
        read(&self.table).get(&branch).is_some_and(|b| Arc::strong_count(b) > 1)
    }

    /// The volume whose log a branch's changes come from.
    #[must_use]
    pub fn owner_of(&self, branch: BranchId) -> Option<Arc<Volume>> {
        let volume = self.get(branch)?.row.volume;
        read(&self.owners).get(&volume)?.upgrade()
    }

    /// Has reads take a shorter way behind a branch.
    pub fn flatten(&self, branch: BranchId, flattening: Flattening) {
        write(&self.flattened).insert(branch, flattening);
    }

    fn flattening_of(&self, branch: BranchId) -> Option<Flattening> {
        read(&self.flattened).get(&branch).copied()
    }

    /// From where a branch inherits, and up to where.
    #[must_use]
    pub fn parent_of(&self, branch: BranchId) -> Option<At> {
        let (branch, seq) = read(&self.table).get(&branch)?.row.parent?;
        Some(At { branch, seq })
    }

    /// The places in which a block of a branch is looked for, nearest first: the branch itself as of `at`, then what
    /// it inherits.
    pub fn line(&self, at: At) -> impl Iterator<Item = At> {
        let mut next = Some(at);
        let mut base = None;
        std::iter::from_fn(move || {
            let here = next?;
            next = match base.take() {
                Some(base) => Some(base),
                None => match self.flattening_of(here.branch) {
                    Some(flat) => {
                        base = Some(flat.base);
                        Some(flat.images)
                    }
                    None => self
                        .parent_of(here.branch)
                        .map(|parent| At { branch: parent.branch, seq: parent.seq.min(here.seq) }),
                },
            };
            Some(here)
        })
    }
}

/// Reads of the map along a branch's line.
#[derive(Clone, Copy, Debug)]
pub struct Lineage<'a> {
    /// The branches.
    pub branches: &'a Branches,
    /// The index.
    pub index: &'a TimeIndex,
}

/// Leaves of which something was ever said.
#[derive(Debug)]
pub struct Said<'a> {
    index: &'a TimeIndex,
    branches: Vec<BranchId>,
    /// Those that the index may not have yet.
    pending: BTreeSet<u64>,
}

impl Said<'_> {
    /// The first one at or after `from`.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn next(&self, from: u64) -> Result<Option<u64>> {
        let mut next = self.pending.range(from..).next().copied();
        for &branch in &self.branches {
            let indexed = self.index.next_leaf(branch, from).map_err(failed("walking the time index"))?;
            next = [next, indexed].into_iter().flatten().min();
        }
        Ok(next)
    }
}

fn failed(what: &'static str) -> impl Fn(crate::index::IndexError) -> Error {
    move |e| Error::new(ErrorKind::Io, what).with(e)
}

impl Lineage<'_> {
    /// A leaf of a branch after every change up to and including `at`; what the branch does not say is inherited.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the index cannot be read, or a log is damaged before `at`.
    pub fn leaf_at(&self, at: At, leaf: u64) -> Result<Leaf> {
        self.leaf_of(self.branches.line(at), leaf)
    }

    /// What several places say of a leaf, the nearest first.
    fn leaf_of(&self, mut places: impl Iterator<Item = At>, leaf: u64) -> Result<Leaf> {
        let mut states = match places.next() {
            Some(nearest) => self.own_leaf_at(nearest, leaf)?,
            None => crate::index::unsaid(),
        };
        while states.iter().any(|s| matches!(s, BlockState::Unsaid)) {
            let Some(next) = places.next() else { break };
            let inherited = self.own_leaf_at(next, leaf)?;
            for (state, from) in states.iter_mut().zip(inherited.iter()) {
                if matches!(state, BlockState::Unsaid) {
                    *state = *from;
                }
            }
        }
        Ok(states)
    }

    /// What a branch itself says about a leaf, whatever has become of those that it inherits from.
    ///
    /// # Errors
    /// As [`Lineage::leaf_at`].
    pub fn own_leaf_at(&self, at: At, leaf: u64) -> Result<Leaf> {
        self.own_leaf(at, leaf, |upto| self.index.states_at(at.branch, leaf, upto))
    }

    /// The same, from nothing but rows of what has happened.
    ///
    /// # Errors
    /// As [`Lineage::leaf_at`].
    pub fn own_leaf_of_history(&self, at: At, leaf: u64) -> Result<Leaf> {
        self.own_leaf(at, leaf, |upto| Ok(self.index.leaf_at(at.branch, leaf, upto)?.states))
    }

    fn own_leaf(&self, at: At, leaf: u64, indexed: impl FnOnce(Seq) -> IndexResult<Leaf>) -> Result<Leaf> {
        // Pending changes are taken first: what the indexer moves meanwhile is then seen twice, which does no harm,
        // as long as the index is not read further than the pending changes go.
        let owner = self.branches.owner_of(at.branch);
        if let Some(last) = owner.as_ref().and_then(|volume| volume.whole_upto()) {
            self.check_whole(at, last)?;
        }
        let (pending, limit) = match &owner {
            Some(volume) => {
                let map = volume.map();
                (map.pending(at.branch, leaf, Seq::ZERO, at.seq), map.applied())
            }
            None => (Vec::new(), Seq::MAX),
        };
        let mut states = indexed(at.seq.min(limit)).map_err(|e| {
            Error::new(ErrorKind::Corrupt, format!("reading the time index of leaf {leaf}")).with(e)
        })?;
        apply_changes(&mut states, &pending);
        Ok(states)
    }

    /// Refuses an instant of a branch that lies behind `last`, the last request before damage of its log. The present of the
    /// branch, and its beginning, do not.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn check_whole(&self, at: At, last: Seq) -> Result<()> {
        let start = self.branches.get(at.branch).map_or(Seq::ZERO, |branch| branch.row.start);
        if at.seq <= last.max(start) || at.seq == Seq::MAX {
            return Ok(());
        }
        let text = format!(
            "seq:{} of branch {} cannot be read: the log that it lies in is damaged, and whole only up to seq:{last}",
            at.seq, at.branch
        );
        Err(Error::new(ErrorKind::Corrupt, text))
    }

    /// The leaves of which some places have anything to say: those that were written by now.
    #[must_use]
    pub fn said(&self, places: impl IntoIterator<Item = At>) -> Said<'_> {
        let mut pending = BTreeSet::new();
        let mut branches: Vec<BranchId> = places.into_iter().map(|at| at.branch).collect();
        branches.sort_unstable();
        branches.dedup();
        for &branch in &branches {
            if let Some(volume) = self.branches.owner_of(branch) {
                volume.map().collect_leaves(branch, &mut pending);
            }
        }
        Said { index: self.index, branches, pending }
    }

    /// The newest entry of a branch's own time at or before a time.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn floor_time(&self, branch: BranchId, time_ns: u64) -> Result<Option<TimeEntry>> {
        let pending = self.branches.owner_of(branch).and_then(|v| v.map().floor_time(branch, time_ns));
        self.pending_or(pending, || self.index.floor_time(branch, time_ns))
    }

    /// The newest entry of a branch's own time at or before a `Seq`.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn time_of(&self, at: At) -> Result<Option<TimeEntry>> {
        let pending = self.branches.owner_of(at.branch).and_then(|v| v.map().time_of(at.branch, at.seq));
        self.pending_or(pending, || self.index.time_of(at.branch, at.seq))
    }

    fn pending_or(
        &self,
        pending: Option<TimeEntry>,
        ask: impl Fn() -> IndexResult<Option<TimeEntry>>,
    ) -> Result<Option<TimeEntry>> {
        match pending {
            Some(entry) => Ok(Some(entry)),
            None => ask().map_err(failed("asking the time index for an instant")),
        }
    }

    /// How many places a read of a branch may have to look in.
    #[must_use]
    pub fn depth(&self, at: At) -> usize {
        self.branches.line(at).count()
    }

    /// Puts images of everything that lies between a branch and the far end of its line into the index, so that reads
    /// need not walk it. Everything there is immutable, so this can run beside anything else.
    ///
    /// # Errors
    /// If the index cannot be read or written; what was written then does no harm.
    pub fn flatten(&self, row: &BranchRow) -> Result<()> {
        let between: Vec<At> = self.branches.line(At { branch: row.id, seq: row.start }).skip(1).collect();
        let Some((&base, between)) = between.split_last() else { return Ok(()) };
        if between.is_empty() {
            return Ok(());
        }
        let images = At { branch: flattened(row.id), seq: row.start };
        let mut batch = IndexBatch::new();
        batch.inherited_zeroes(images.branch, &self.zeroed_between(between)?, images.seq);
        let mut leaf = 0;
        let said = self.said(between.iter().copied());
        while let Some(found) = said.next(leaf)? {
            let mut states = self.leaf_of(between.iter().copied().chain([base]), found)?;
            // Behind an image nothing is left to be asked.
            for state in states.iter_mut().filter(|s| matches!(s, BlockState::Unsaid)) {
                *state = BlockState::Zero;
            }
            batch.image(images.branch, found, images.seq, &states);
            leaf = found + 1;
            if batch.size_bytes() > 1 << 20 {
                self.index.write(&batch).map_err(failed("writing the time index"))?;
                batch.clear();
            }
        }
        let flattening = Flattening { images, base };
        batch.flattening(row.id, flattening.numbers());
        self.index.write(&batch).map_err(failed("writing the time index"))?;
        self.branches.flatten(row.id, flattening);
        Ok(())
    }

    /// Runs of whole leaves that branches between have zeroed.
    fn zeroed_between(&self, between: &[At]) -> Result<Vec<NodeRun>> {
        let mut runs = Vec::new();
        for here in between {
            if let Some(volume) = self.branches.owner_of(here.branch) {
                runs.extend(volume.map().zeroed_nodes(here.branch, here.seq));
            }
            let indexed = self.index.zeroed_nodes(here.branch, here.seq);
            runs.extend(indexed.map_err(failed("walking the time index"))?);
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::catalogue::BranchState;

    fn row(id: u64) -> BranchRow {
        let parent = (id > 1).then(|| (BranchId(id - 1), Seq(id - 1)));
        let (id, volume, start) = (BranchId(id), VolumeId(1), Seq(id));
        BranchRow { id, volume, parent, start, created_ns: 0, state: BranchState::Kept }
    }

    #[test]
    fn lines_are_walked_while_branches_come_and_go() {
        let branches = Arc::new(Branches::default());
        (1..4).for_each(|id| drop(branches.insert(row(id))));
        let (done, ended) = channel();
        for remove in [false, true] {
            let (branches, done) = (Arc::clone(&branches), done.clone());
            std::thread::spawn(move || {
                for _ in 0..200_000 {
                    if remove {
                        assert!(branches.remove(BranchId(9)));
                    } else {
                        assert_eq!(branches.line(At { branch: BranchId(3), seq: Seq::MAX }).count(), 3);
                    }
                }
                done.send(()).unwrap();
            });
        }
        for _ in 0..2 {
            ended.recv_timeout(Duration::from_secs(30)).expect("a walk and a removal wait for each other");
        }
    }
}
