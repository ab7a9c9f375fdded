//! The head map: what the log has said of a volume's blocks since the index was last written, and a bounded
//! cache of whole leaves as they are at the head.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use cdp_types::{BlockRange, BranchId, Ordinal, Seq};

use crate::chunk::{Chunk, ChunkEnd};
use crate::format::{BatchHeader, RecordKind};
use crate::index::{
    BlockState, Change, ChangeState, FANOUT, LEVELS, LogPos, NodeKey, NodeRun, Place, TimeEntry, child_of,
    decompose,
};
use crate::leaves::{Leaf, LeafBudget, LeafCache, SharedLeaves, States, lock_leaves};

/// A chunk is closed once it has this many changes, so that one index write stays small.
const CHUNK_CHANGES: usize = 128 << 10;
/// Flushes remembered for `flush:-N`.
const FLUSHES_KEPT: usize = 4096;

/// The map of a volume's head.
#[derive(Debug)]
pub struct HeadMap {
    closed: VecDeque<Arc<Chunk>>,
    current: Chunk,
    /// The branch whose leaves are cached.
    head: BranchId,
    /// Everything up to here has been applied.
    applied: Seq,
    /// Everything up to here is in the index and no longer here.
    indexed: Seq,
    cache: SharedLeaves,
    flushes: VecDeque<(Seq, u64)>,
}

/// Leaves that every volume may cache, whatever the budget says.
const LEAVES_ALWAYS: usize = 16;

/// One change of one leaf, as a run of its blocks.
#[derive(Clone, Copy, Debug)]
pub struct LeafChange {
    seq: Seq,
    first: u16,
    count: u16,
    state: BlockState,
}

/// Applies changes, oldest first, to a leaf.
pub fn apply_changes(states: &mut Leaf, changes: &[LeafChange]) {
    for change in changes {
        let first = usize::from(change.first);
        states[first..first + usize::from(change.count)].fill(change.state);
    }
}

impl HeadMap {
    /// The map of a volume whose index goes up to `indexed`. Batches of any branch can be applied to it; leaves are
    /// cached of `head`, once [`HeadMap::switch`] has said where that begins.
    #[must_use]
    pub fn new(indexed: Seq, head: BranchId, budget: &Arc<LeafBudget>) -> Self {
        Self {
            closed: VecDeque::new(),
            current: Chunk::default(),
            head,
            applied: indexed,
            indexed,
            cache: budget.cache(LEAVES_ALWAYS),
            flushes: VecDeque::new(),
        }
    }

    /// The branch whose leaves are cached.
    #[must_use]
    pub fn head(&self) -> BranchId {
        self.head
    }

    /// Makes another branch the head, which begins at `start`.
    pub fn switch(&mut self, head: BranchId, start: Seq) {
        lock_leaves(&self.cache).clear();
        self.head = head;
        self.applied = self.applied.max(start);
    }

    /// Passes over an acknowledged batch of a branch of which nothing is to be kept.
    pub fn pass(&mut self, header: &BatchHeader, crc: u32) {
        self.applied = self.applied.max(header.last_seq());
        self.end_batch(header, crc);
    }

    /// Takes in an acknowledged batch. Batches come in the order of the log.
    pub fn apply(&mut self, header: &BatchHeader, crc: u32, payload_at: u64) {
        let mut seq = header.first_seq;
        let mut payload_at = payload_at;
        let mut crcs = header.block_crcs.iter();
        let cache = Arc::clone(&self.cache);
        let mut cache = lock_leaves(&cache);
        for record in &header.records {
            let blocks = BlockRange::new(record.first, record.count);
            match record.kind {
                RecordKind::Write => {
                    for (block, &crc) in (blocks.first..blocks.end()).zip(crcs.by_ref()) {
                        // A place that cannot be packed would lie in no segment that this store can have.
                        if let Some(pos) = LogPos::new(header.place.incarnation, payload_at) {
                            self.map_block(&mut cache, header.branch, block, seq, Place { pos, crc });
                        }
                        payload_at += cdp_types::BLOCK_SIZE;
                    }
                }
                RecordKind::Zero | RecordKind::Discard => self.clear(&mut cache, header.branch, blocks, seq),
                RecordKind::Flush => self.remember_flush(Seq(record.aux), header.time_ns),
                RecordKind::Relocate
                | RecordKind::Epoch
                | RecordKind::Cut
                | RecordKind::Durable
                | RecordKind::Store
                | RecordKind::Expire => {}
            }
            if !record.flags.more() {
                self.applied = self.applied.max(seq);
                seq = seq.plus(1);
            }
        }
        let entry = TimeEntry { time_ns: header.time_ns, seq: self.applied, ordinal: header.ordinal };
        let repeats =
            |(branch, last): &(BranchId, TimeEntry)| *branch == header.branch && last.seq == entry.seq;
        if entry.seq > Seq::ZERO && !self.current.times.last().is_some_and(repeats) {
            self.current.times.push((header.branch, entry));
        }
        self.end_batch(header, crc);
    }

    fn end_batch(&mut self, header: &BatchHeader, crc: u32) {
        self.current.end = Some(ChunkEnd {
            ordinal: header.ordinal,
            seq: self.applied,
            crc,
            place: header.place,
            time_ns: header.time_ns,
        });
        if self.current.len() >= CHUNK_CHANGES {
            self.close_chunk();
        }
    }

    fn map_block(&mut self, cache: &mut LeafCache, branch: BranchId, block: u64, seq: Seq, place: Place) {
        let key = NodeKey::leaf_of(branch, block);
        let first = child_of(block);
        let change = Change { seq, first, count: 1, state: ChangeState::Mapped(place) };
        self.current.push(key, change);
        if branch == self.head
            && let Some(cached) = cache.get_mut(&key.node)
        {
            cached[usize::from(first)] = BlockState::Mapped(place);
        }
    }

    fn clear(&mut self, cache: &mut LeafCache, branch: BranchId, blocks: BlockRange, seq: Seq) {
        for run in decompose(blocks) {
            let key = NodeKey { branch, level: run.level, node: run.node };
            let change = Change { seq, first: run.first, count: run.count, state: ChangeState::Zero };
            self.current.push(key, change);
        }
        if branch == self.head {
            cache.zero(blocks);
        }
    }

    fn remember_flush(&mut self, seq: Seq, time_ns: u64) {
        if self.flushes.back().is_some_and(|&(last, _)| last >= seq) {
            return;
        }
        if self.flushes.len() == FLUSHES_KEPT {
            self.flushes.pop_front();
        }
        self.flushes.push_back((seq, time_ns));
    }

    /// The flush that is `back` before the newest (1 is the newest itself), if it is remembered.
    #[must_use]
    pub fn flush_back(&self, back: u64) -> Option<Seq> {
        let index = self.flushes.len().checked_sub(usize::try_from(back).ok()?)?;
        self.flushes.get(index).map(|&(seq, _)| seq)
    }

    /// Notes a flush that has completed and is in no batch yet.
    pub fn note_flush(&mut self, seq: Seq, time_ns: u64) {
        self.remember_flush(seq, time_ns);
    }

    /// Everything up to here has been applied.
    #[must_use]
    pub fn applied(&self) -> Seq {
        self.applied
    }

    /// Everything up to here is in the index, and only there.
    #[must_use]
    pub fn indexed(&self) -> Seq {
        self.indexed
    }

    /// A block's state, if its leaf is cached.
    pub fn cached(&self, block: u64) -> Option<BlockState> {
        lock_leaves(&self.cache).state(block)
    }

    /// Copies the states of consecutive blocks into `out`, as far as their leaf is cached; returns how many.
    pub fn cached_run(&self, blocks: BlockRange, out: &mut States) -> u64 {
        lock_leaves(&self.cache).run(blocks, out)
    }

    /// What is not in the index yet of a branch's leaf, with `after < seq <= until`, oldest first.
    #[must_use]
    pub fn pending(&self, branch: BranchId, leaf: u64, after: Seq, until: Seq) -> Vec<LeafChange> {
        let mut found = Vec::new();
        for chunk in self.chunks() {
            collect(chunk, branch, leaf, &mut found);
        }
        found.retain(|c| c.seq > after && c.seq <= until);
        // Several levels of one chunk are collected one after the other; a stable sort puts them in log order.
        found.sort_by_key(|c| c.seq);
        found
    }

    /// Whether it is known that nothing has changed a block of the head since this request. What has gone into the index
    /// meanwhile is not.
    #[must_use]
    pub fn is_unchanged_since(&self, block: u64, seq: Seq) -> bool {
        let child = child_of(block);
        let covers = |change: &LeafChange| child >= change.first && child - change.first < change.count;
        let leaf = block / FANOUT as u64;
        self.indexed <= seq && !self.pending(self.head, leaf, seq, Seq::MAX).iter().any(covers)
    }

    /// Whether anything of a branch is not in the index yet, of what ends with this batch at the latest.
    #[must_use]
    pub fn has_changes_of(&self, branch: BranchId, last: Ordinal) -> bool {
        let ends = |chunk: &&Chunk| chunk.end.is_some_and(|end| end.ordinal <= last);
        // Whatever changes something has its time in the same chunk.
        self.chunks().filter(ends).any(|chunk| chunk.times.iter().any(|(of, _)| *of == branch))
    }

    /// Adds the leaves of a branch of which something is not in the index yet.
    pub fn collect_leaves(&self, branch: BranchId, into: &mut BTreeSet<u64>) {
        let here = |k: &NodeKey| k.branch == branch && k.level == 0;
        into.extend(self.chunks().flat_map(Chunk::nodes).filter(here).map(|k| k.node));
    }

    /// The runs of children that nodes above a branch's leaves say were zeroed, up to and including `until`, of what
    /// is not in the index yet.
    #[must_use]
    pub fn zeroed_nodes(&self, branch: BranchId, until: Seq) -> Vec<NodeRun> {
        let above = |k: &NodeKey| k.branch == branch && k.level > 0;
        let run = |key: NodeKey, c: &Change| NodeRun {
            level: key.level,
            node: key.node,
            first: c.first,
            count: c.count,
        };
        let nodes = self.chunks().flat_map(|chunk| chunk.nodes().filter(above).map(move |k| (chunk, k)));
        nodes
            .flat_map(|(chunk, k)| chunk.changes(k).filter(|c| c.seq <= until).map(move |c| run(k, c)))
            .collect()
    }

    fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.closed.iter().map(|c| &**c).chain([&self.current])
    }

    /// Puts a leaf into the cache; it must be up to date with `applied`.
    pub fn insert(&self, leaf: u64, states: Leaf) {
        lock_leaves(&self.cache).insert(leaf, states);
    }

    /// Leaves in the cache.
    #[must_use]
    pub fn cached_leaves(&self) -> usize {
        lock_leaves(&self.cache).len()
    }

    /// Closes the present chunk, so that it can be indexed once it is durable.
    pub fn close_chunk(&mut self) {
        if self.current.end.is_some() {
            self.closed.push_back(Arc::new(std::mem::take(&mut self.current)));
        }
    }

    /// Whether there is anything that the index does not have.
    #[must_use]
    pub fn has_unindexed(&self) -> bool {
        self.current.end.is_some() || self.has_closed()
    }

    /// Whether a chunk is closed.
    #[must_use]
    pub fn has_closed(&self) -> bool {
        !self.closed.is_empty()
    }

    /// The oldest closed chunks, up to and including this batch: one, and more as long as they have no more changes than
    /// this together.
    #[must_use]
    pub fn oldest_closed(&self, changes: usize, until: Ordinal) -> Vec<Arc<Chunk>> {
        let ended = |chunk: &&Arc<Chunk>| chunk.end.is_some_and(|end| end.ordinal <= until);
        let mut room = changes;
        let fits = |(number, chunk): &(usize, &Arc<Chunk>)| {
            let fits = *number == 0 || chunk.len() <= room;
            room = room.saturating_sub(chunk.len());
            fits
        };
        let chunks = self.closed.iter().take_while(ended).enumerate().take_while(fits);
        chunks.map(|(_, chunk)| Arc::clone(chunk)).collect()
    }

    /// Drops so many of the oldest closed chunks, whose changes are in the index now.
    pub fn drop_oldest(&mut self, chunks: usize) {
        if let Some(end) =
            self.closed.drain(..chunks.min(self.closed.len())).next_back().and_then(|chunk| chunk.end)
        {
            self.indexed = self.indexed.max(end.seq);
        }
    }

    /// Changes not in the index yet.
    #[must_use]
    pub fn pending_changes(&self) -> usize {
        self.chunks().map(Chunk::len).sum()
    }

    /// The newest batch at or before a time, of those that are not in the index yet.
    #[must_use]
    pub fn floor_time(&self, branch: BranchId, time_ns: u64) -> Option<TimeEntry> {
        self.times(branch).filter(|t| t.time_ns <= time_ns).last()
    }

    /// The newest batch at or before a `Seq`, of those that are not in the index yet.
    #[must_use]
    pub fn time_of(&self, branch: BranchId, seq: Seq) -> Option<TimeEntry> {
        self.times(branch).filter(|t| t.seq <= seq).last()
    }

    /// The batch of a branch with which everything up to a `Seq` is in the log; zero if the index has it, so that it is
    /// durable. Beyond the last batch the answer is the largest ordinal.
    #[must_use]
    pub fn reaching(&self, branch: BranchId, seq: Seq) -> Ordinal {
        if seq <= self.indexed {
            return Ordinal(0);
        }
        self.times(branch).find(|t| t.seq >= seq).map_or(Ordinal(u64::MAX), |t| t.ordinal)
    }

    fn times(&self, branch: BranchId) -> impl Iterator<Item = TimeEntry> {
        self.chunks().flat_map(|c| &c.times).filter(move |(b, _)| *b == branch).map(|&(_, entry)| entry)
    }
}

/// Adds what a chunk says of a leaf: of the changes of one node the oldest first.
fn collect(chunk: &Chunk, branch: BranchId, leaf: u64, out: &mut Vec<LeafChange>) {
    let own = out.len();
    out.extend(chunk.changes(NodeKey { branch, level: 0, node: leaf }).map(|c| LeafChange {
        seq: c.seq,
        first: c.first,
        count: c.count,
        state: match c.state {
            ChangeState::Zero => BlockState::Zero,
            ChangeState::Mapped(place) => BlockState::Mapped(place),
        },
    }));
    out[own..].reverse();
    // A node above concerns the leaf if the run covers the child through which the leaf hangs below it.
    let mut child = leaf;
    for level in 1..LEVELS {
        let (node, index) = (child / FANOUT as u64, (child % FANOUT as u64) as u16);
        let covers = |c: &&Change| c.first <= index && index - c.first < c.count;
        // All of one level say the same, so their order does not matter.
        out.extend(chunk.changes(NodeKey { branch, level, node }).filter(covers).map(|c| LeafChange {
            seq: c.seq,
            first: 0,
            count: FANOUT as u16,
            state: BlockState::Zero,
        }));
        child = node;
    }
}

#[cfg(test)]
mod tests {
    use crate::chunk::ChunkEnd;
    use crate::format::BatchPlace;

    use super::*;

    /// A map with closed chunks of so many changes each; they end with batches 1, 2, and so on.
    fn with_closed(changes: &[u64]) -> HeadMap {
        let mut map = HeadMap::new(Seq::ZERO, BranchId(1), &LeafBudget::new(0));
        let mut seq = Seq::ZERO;
        for (ordinal, &changes) in (1..).zip(changes) {
            for _ in 0..changes {
                seq = seq.plus(1);
                let change = Change { seq, first: 0, count: 1, state: ChangeState::Zero };
                map.current.push(NodeKey::leaf_of(BranchId(1), seq.0), change);
            }
            let place = BatchPlace { incarnation: 1, offset: 0 };
            map.current.end = Some(ChunkEnd { ordinal: Ordinal(ordinal), seq, crc: 0, place, time_ns: 0 });
            map.close_chunk();
        }
        map
    }

    #[test]
    fn chunks_are_taken_from_the_oldest_as_far_as_they_fit_and_may_be_written() {
        let map = with_closed(&[5, 3, 0, 4]);
        let taken = |changes, until| map.oldest_closed(changes, Ordinal(until)).len();
        assert_eq!((taken(12, 4), taken(usize::MAX, 9)), (4, 4));
        assert_eq!((taken(11, 4), taken(8, 4), taken(7, 4)), (3, 3, 1));
        assert_eq!((taken(1, 4), taken(12, 2), taken(12, 0)), (1, 2, 0));
    }

    #[test]
    fn what_is_dropped_counts_as_indexed() {
        let mut map = with_closed(&[5, 3, 4]);
        map.drop_oldest(2);
        assert_eq!((map.indexed(), map.pending_changes()), (Seq(8), 4));
        assert!(map.pending(BranchId(1), 0, Seq::ZERO, Seq(8)).is_empty());
        assert_eq!(map.pending(BranchId(1), 0, Seq::ZERO, Seq(11)).len(), 3);
        map.drop_oldest(9);
        assert_eq!((map.indexed(), map.pending_changes()), (Seq(12), 0));
    }
}
