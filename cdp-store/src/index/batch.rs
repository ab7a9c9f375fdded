//! What one index write puts into the time index.

use std::collections::{BTreeMap, HashMap};

use cdp_types::{BranchId, Ordinal, Seq, VolumeId};

use super::codec::{self, States, Watermark};
use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::keys::{self, RowKind};
use super::kv::{Family, WriteBatch};
use super::leaf::{Change, ChangeState, LEVELS, NodeKey, NodeRun};
use super::present::{Leaves, add_leaf};

/// So many changes of a node are put into one row: a reader decodes a whole row for the one change that it wants.
const ROW_CHANGES: usize = 1024;
/// The same for points of a branch's time.
const ROW_TIMES: usize = 128;

/// What a time stands for: every request acknowledged at or before `time_ns` has a `Seq` up to `seq`, and every
/// later one a greater `Seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeEntry {
    /// The store clock's time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The last `Seq` of the branch at that time.
    pub seq: Seq,
    /// The batch that holds it, where a reader of the log can begin to refine the answer.
    pub ordinal: Ordinal,
}

/// The first and the last `Seq` among a batch's changes of one branch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) first: Seq,
    pub(super) last: Seq,
}

/// The rows of one index write: taken all or none by [`TimeIndex::write`](super::TimeIndex::write).
///
/// One batch holds, for each branch, *all* changes of a stretch of its log: everything after what was written
/// before and up to the watermark it carries. In particular no `Seq` may be split between two batches. Rows are
/// written fastest when nodes come in ascending order.
#[derive(Clone, Debug, Default)]
pub struct IndexBatch {
    pub(super) rows: WriteBatch,
    pub(super) spans: HashMap<BranchId, Span>,
    /// The leaves that it has rows of.
    pub(super) leaves: Vec<Leaves>,
}

/// Splits a node's changes into what single rows take. A request's changes stay together: a row's key is its first `Seq`.
fn rows(mut changes: &[Change]) -> impl Iterator<Item = &[Change]> {
    std::iter::from_fn(move || {
        let last = changes.get(..ROW_CHANGES.min(changes.len()))?.last()?;
        let end = changes.partition_point(|change| change.seq <= last.seq);
        let (row, rest) = changes.split_at(end);
        changes = rest;
        Some(row)
    })
}

impl IndexBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all changes of one node in the order of the log. To be called at most once per node.
    ///
    /// Changes with one `Seq` are one request's: on the same node they apply in the order given here, on nodes of
    /// different levels they must not concern the same block.
    ///
    /// # Errors
    /// `Invalid` if they do not ascend in `Seq` (equal ones may follow each other), if a change does not suit
    /// its node ([`Change::is_valid`]), or if `Seq` 0, which is before every change, is among them.
    pub fn changes(&mut self, node: NodeKey, changes: &[Change]) -> IndexResult<()> {
        let (Some(first), Some(last)) = (changes.first(), changes.last()) else { return Ok(()) };
        let sound = node.level < LEVELS
            && first.seq > Seq::ZERO
            && changes.is_sorted_by_key(|change| change.seq)
            && changes.iter().all(|change| change.is_valid(node.level));
        if !sound {
            return Err(IndexError::new(IndexErrorKind::Invalid, "add changes", format!("{node:?}")));
        }
        let span = self.spans.entry(node.branch).or_insert(Span { first: first.seq, last: last.seq });
        span.first = span.first.min(first.seq);
        span.last = span.last.max(last.seq);
        self.note_leaf(node);
        for row in rows(changes) {
            let key = keys::map(node, row[0].seq, RowKind::Delta);
            self.rows.put_with(Family::Map, &key, |out| codec::encode_delta(&key, row, out));
        }
        Ok(())
    }

    /// Adds a whole leaf as of `seq`: what every change of this branch up to and including it made of the leaf,
    /// on all levels. A read at or after `seq` looks no further back.
    ///
    /// States taken over from a parent branch may be in it, if `seq` is at or after the fork.
    pub fn image(&mut self, branch: BranchId, leaf: u64, seq: Seq, states: &States) {
        let node = NodeKey { branch, level: 0, node: leaf };
        self.note_leaf(node);
        let key = keys::map(node, seq, RowKind::Image);
        self.rows.put_with(Family::Map, &key, |out| codec::encode_image(&key, states, out));
    }

    /// Adds runs of zeroed children to a branch that holds only what others inherit, as of `seq`. To be called at
    /// most once; such a branch has no changes of its own.
    pub fn inherited_zeroes(&mut self, branch: BranchId, runs: &[NodeRun], seq: Seq) {
        let mut by_node: BTreeMap<NodeKey, Vec<Change>> = BTreeMap::new();
        for run in runs {
            let change = Change { seq, first: run.first, count: run.count, state: ChangeState::Zero };
            by_node.entry(NodeKey { branch, level: run.level, node: run.node }).or_default().push(change);
        }
        for (node, changes) in by_node {
            self.note_leaf(node);
            let key = keys::map(node, seq, RowKind::Delta);
            self.rows.put_with(Family::Map, &key, |out| codec::encode_delta(&key, &changes, out));
        }
    }

    fn note_leaf(&mut self, node: NodeKey) {
        if node.level == 0 {
            add_leaf(&mut self.leaves, node.branch, node.node);
        }
    }

    /// Says how a branch's line was flattened.
    pub fn flattening(&mut self, branch: BranchId, numbers: [u64; 4]) {
        let key = keys::flattening(branch);
        self.rows.put_with(Family::Time, &key, |out| codec::encode_numbers(&key, &numbers, out));
    }

    /// Adds points of a branch's time, oldest first. Many share a row: there is one for each batch of the log, and a row costs
    /// far more than what is in it.
    ///
    /// # Errors
    /// `Invalid` if they are not in the order of the log.
    pub fn times(&mut self, branch: BranchId, entries: &[TimeEntry]) -> IndexResult<()> {
        let follows =
            |a: &TimeEntry, b: &TimeEntry| a.time_ns <= b.time_ns && a.seq <= b.seq && a.ordinal <= b.ordinal;
        if !entries.is_sorted_by(follows) {
            return Err(IndexError::new(IndexErrorKind::Invalid, "add times", format!("branch {branch}")));
        }
        for row in entries.chunks(ROW_TIMES) {
            let TimeEntry { time_ns, seq, .. } = row[0];
            let key = keys::by_time(branch, time_ns, seq);
            self.rows.put_with(Family::Time, &key, |out| codec::encode_times(&key, row, out));
            let key = keys::by_seq(branch, seq);
            self.rows.put_with(Family::Time, &key, |out| codec::encode_times_by_seq(&key, row, out));
        }
        Ok(())
    }

    /// Sets how far a volume's log is indexed once this batch is written.
    pub fn watermark(&mut self, volume: VolumeId, mark: &Watermark) {
        let key = keys::watermark(volume);
        self.rows.put_with(Family::Watermark, &key, |out| codec::encode_watermark(&key, mark, out));
    }

    /// Removes the watermark of a volume that is gone.
    pub fn forget_watermark(&mut self, volume: VolumeId) {
        self.rows.delete(Family::Watermark, &keys::watermark(volume));
    }

    /// Bytes of its rows.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.rows.size_bytes()
    }

    /// Whether it has no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Makes it empty, for reuse.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.spans.clear();
        self.leaves.clear();
    }
}
