//! What happened in a stretch of a log, by node, until the index has it.

use std::collections::HashMap;

use cdp_types::{BranchId, Ordinal, Seq};
use foldhash::fast::RandomState;

use crate::format::BatchPlace;
use crate::index::{Change, NodeKey, TimeEntry};

/// Marks the oldest change of a node.
const NONE: u32 = u32::MAX;

/// A stretch of a log that the index does not have yet: every change, by node.
///
/// A queue's thread fills it and the index's thread drops it. So its changes lie in one allocation: as many small ones, they
/// left the allocator's heap of each queue's thread full of holes, 20 bytes for each write until it was hundreds of megabytes.
///
/// Every block that a guest writes is looked up here, so the hash is a quick one; guests choose the keys, so it has a seed.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Where the newest change of each node is.
    newest: HashMap<NodeKey, u32, RandomState>,
    /// All changes, oldest first.
    changes: Vec<Link>,
    /// When each batch came.
    pub times: Vec<(BranchId, TimeEntry)>,
    /// The last batch in it.
    pub end: Option<ChunkEnd>,
}

#[derive(Debug)]
struct Link {
    change: Change,
    /// Where the node's change before this one is.
    before: u32,
}

/// The batch with which a chunk ends.
#[derive(Clone, Copy, Debug)]
pub struct ChunkEnd {
    /// Its ordinal.
    pub ordinal: Ordinal,
    /// Its last `Seq`, or that of the last request before it.
    pub seq: Seq,
    /// Its header's checksum.
    pub crc: u32,
    /// Where it lies.
    pub place: BatchPlace,
    /// Its time.
    pub time_ns: u64,
}

impl Chunk {
    /// Adds a change of a node, newer than all before.
    pub fn push(&mut self, node: NodeKey, change: Change) {
        // A chunk is closed long before it has that many.
        let at = u32::try_from(self.changes.len()).unwrap_or(NONE);
        let before = self.newest.insert(node, at).unwrap_or(NONE);
        self.changes.push(Link { change, before });
    }

    /// How many changes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// The nodes that changed, in no order.
    pub fn nodes(&self) -> impl Iterator<Item = NodeKey> {
        self.newest.keys().copied()
    }

    /// The changes of a node, newest first.
    pub fn changes(&self, node: NodeKey) -> impl Iterator<Item = &Change> {
        let mut at = self.newest.get(&node).copied().unwrap_or(NONE);
        std::iter::from_fn(move || {
            let link = self.changes.get(at as usize)?;
            at = link.before;
            Some(&link.change)
        })
    }
}

#[cfg(test)]
mod tests {
    use cdp_types::BranchId;

    use super::*;
    use crate::index::ChangeState;

    fn node(node: u64) -> NodeKey {
        NodeKey { branch: BranchId(1), level: 0, node }
    }

    #[test]
    fn each_node_has_its_changes_newest_first() {
        let mut chunk = Chunk::default();
        for seq in 1..=10 {
            let change = Change { seq: Seq(seq), first: 0, count: 1, state: ChangeState::Zero };
            chunk.push(node(seq % 3), change);
        }
        let of = |number| chunk.changes(node(number)).map(|change| change.seq.0).collect::<Vec<_>>();
        assert_eq!((of(0), of(1), of(2)), (vec![9, 6, 3], vec![10, 7, 4, 1], vec![8, 5, 2]));
        assert!(of(3).is_empty());
        let mut nodes: Vec<_> = chunk.nodes().collect();
        nodes.sort_unstable();
        assert_eq!((nodes, chunk.len()), (vec![node(0), node(1), node(2)], 10));
    }
}
