//! Nodes of a branch's map, what happens to them, and which nodes a range of blocks concerns.
//!
//! A leaf (level 0) covers [`FANOUT`] blocks, a node of level `n` covers `FANOUT` nodes of level `n - 1`. Writes
//! only ever touch leaves; zeroing whole leaves touches the levels above, so that it costs the same for a
//! gigabyte and for sixteen terabytes. What a leaf looks like is the newest word of all levels.

use cdp_types::{BlockRange, BranchId, Seq};

use super::place::{BlockState, Place};

/// Children of a node; blocks of a leaf.
pub const FANOUT: usize = 512;
/// Levels of nodes. One of the top level covers 256 TiB.
pub const LEVELS: u8 = 4;

const FANOUT_BITS: u32 = 9;
const _: () = assert!(1 << FANOUT_BITS == FANOUT);

/// A node of one branch's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey {
    /// Whose history.
    pub branch: BranchId,
    /// 0 for a leaf, below [`LEVELS`].
    pub level: u8,
    /// Its number: the first block that it covers / `FANOUT` ^ (level + 1).
    pub node: u64,
}

impl NodeKey {
    /// The leaf that holds a block.
    #[must_use]
    pub fn leaf_of(branch: BranchId, block: u64) -> Self {
        Self { branch, level: 0, node: block >> FANOUT_BITS }
    }
}

/// The place of a block in its leaf.
#[must_use]
pub fn child_of(block: u64) -> u16 {
    (block % FANOUT as u64) as u16
}

/// What became of a run of children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeState {
    /// They read as zeroes, whatever a parent branch says.
    Zero,
    /// One block's data is at a place in the log.
    Mapped(Place),
}

/// One change of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Of the request that made it.
    pub seq: Seq,
    /// The first child concerned: a block of a leaf, or a node of the level below.
    pub first: u16,
    /// How many children, 1 to [`FANOUT`]; 1 for `Mapped`, which only leaves have.
    pub count: u16,
    /// What became of them.
    pub state: ChangeState,
}

impl Change {
    /// Whether it is one that a node of this level can have.
    #[must_use]
    pub fn is_valid(&self, level: u8) -> bool {
        let fits = self.count >= 1 && usize::from(self.first) + usize::from(self.count) <= FANOUT;
        fits && match self.state {
            ChangeState::Zero => level < LEVELS,
            ChangeState::Mapped(_) => level == 0 && self.count == 1,
        }
    }
}

/// What one branch says about a leaf's blocks at an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafAt {
    /// Each block's state.
    pub states: Box<[BlockState; FANOUT]>,
    /// Delta rows, of all levels, that had to be read on top of the last image.
    pub deltas_since_image: u32,
    /// Changes in those rows.
    pub changes_since_image: u32,
}

/// A leaf of which nothing is said.
#[must_use]
pub fn unsaid() -> Box<[BlockState; FANOUT]> {
    Box::new([BlockState::Unsaid; FANOUT])
}

/// The node of `level` that covers a leaf, and which child of it does; `level` is at least 1.
pub(super) fn cover(leaf: u64, level: u8) -> (u64, u16) {
    let child = leaf >> (u32::from(level - 1) * FANOUT_BITS);
    (child >> FANOUT_BITS, (child % FANOUT as u64) as u16)
}

/// A run of children of one node, as [`decompose`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRun {
    /// The node's level.
    pub level: u8,
    /// The node's number.
    pub node: u64,
    /// The first child.
    pub first: u16,
    /// How many children, 1 to [`FANOUT`].
    pub count: u16,
}

/// Splits a range of blocks into runs of children, from left to right, each on the highest level that it fills.
///
/// Up to two runs a level, and on the top level one per 256 TiB: seven for whatever a volume can hold.
pub fn decompose(range: BlockRange) -> impl Iterator<Item = NodeRun> {
    let end = range.end();
    let mut at = range.first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let child_blocks = |level: u8| 1u64 << (u32::from(level) * FANOUT_BITS);
        let fits = |level: u8| at.is_multiple_of(child_blocks(level)) && end - at >= child_blocks(level);
        let level = (1..LEVELS).rev().find(|level| fits(*level)).unwrap_or(0);
        let size = child_blocks(level);
        let child = at / size;
        let first = child % FANOUT as u64;
        let count = ((end - at) / size).min(FANOUT as u64 - first);
        at += count * size;
        Some(NodeRun { level, node: child >> FANOUT_BITS, first: first as u16, count: count as u16 })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(run: NodeRun) -> BlockRange {
        let size = 1 << (u32::from(run.level) * FANOUT_BITS);
        BlockRange::new((run.node * FANOUT as u64 + u64::from(run.first)) * size, u64::from(run.count) * size)
    }

    #[test]
    fn sixteen_tebibytes_less_a_block_at_either_end_take_seven_changes() {
        let blocks = (16 << 40) / cdp_types::BLOCK_SIZE;
        assert_eq!(decompose(BlockRange::new(0, blocks)).count(), 1);
        assert_eq!(decompose(BlockRange::new(1, blocks - 2)).count(), 7);
        assert_eq!(decompose(BlockRange::new(5, 0)).count(), 0);
    }

    #[test]
    fn a_leaf_is_covered_by_the_nodes_whose_runs_hold_it() {
        let leaf = 3 << 18 | 5 << 9 | 7;
        assert_eq!(cover(leaf, 1), (3 << 9 | 5, 7));
        assert_eq!(cover(leaf, 2), (3, 5));
        assert_eq!(cover(leaf, 3), (0, 3));
    }

    proptest! {
        #[test]
        fn runs_are_the_range_from_left_to_right_and_few(
            first in prop_oneof![0u64..4096, 0u64..1 << 36, (1u64 << 27) - 600..(1 << 27) + 600],
            count in prop_oneof![0u64..2048, 0u64..1 << 34, (1u64 << 18) - 600..(1 << 18) + 600],
        ) {
            let runs: Vec<_> = decompose(BlockRange::new(first, count)).collect();
            let mut at = first;
            for run in &runs {
                let covered = blocks(*run);
                prop_assert_eq!(covered.first, at);
                prop_assert!(usize::from(run.first) + usize::from(run.count) <= FANOUT);
                at = covered.end();
            }
            prop_assert_eq!(at, first + count);
            prop_assert!(runs.len() <= 8);
        }

        #[test]
        fn a_run_lies_where_cover_says(first in 0u64..1 << 34, count in 1u64..1 << 30) {
            for run in decompose(BlockRange::new(first, count)).filter(|run| run.level > 0) {
                let covered = blocks(run);
                for block in [covered.first, covered.end() - 1] {
                    let (node, child) = cover(block >> FANOUT_BITS, run.level);
                    prop_assert_eq!(node, run.node);
                    prop_assert!((run.first..run.first + run.count).contains(&child));
                }
            }
        }
    }
}
