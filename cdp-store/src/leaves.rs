//! Leaves in memory: a bounded cache of which blocks lie where, for heads and for past instants that are open.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cdp_types::BlockRange;
use smallvec::SmallVec;

use crate::index::{BlockState, FANOUT, child_of};

/// The states of a leaf's blocks.
pub type Leaf = Box<[BlockState; FANOUT]>;

/// The states of consecutive blocks.
pub type States = SmallVec<[BlockState; 32]>;

/// How many leaves a store may cache, all its caches together.
#[derive(Debug)]
pub struct LeafBudget {
    limit: usize,
    used: AtomicUsize,
}

impl LeafBudget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        let leaf_bytes = size_of::<[BlockState; FANOUT]>() + 128;
        Arc::new(Self { limit: bytes / leaf_bytes, used: AtomicUsize::new(0) })
    }

    fn is_spent(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.limit
    }
}

/// Leaves of one branch as of one instant, which may move. Those that were not used for long make way.
#[derive(Debug)]
pub struct LeafCache {
    leaves: BTreeMap<u64, Cached>,
    /// Where the search for one to be evicted goes on.
    hand: u64,
    /// How many it may have whatever the budget says.
    always: usize,
    budget: Arc<LeafBudget>,
}

#[derive(Debug)]
struct Cached {
    states: Leaf,
    used: bool,
}

impl LeafCache {
    /// An empty cache that shares a budget with others, and may have `always` leaves in any case.
    #[must_use]
    pub fn new(budget: Arc<LeafBudget>, always: usize) -> Self {
        Self { leaves: BTreeMap::new(), hand: 0, always, budget }
    }

    /// A block's state, if its leaf is there.
    pub fn state(&mut self, block: u64) -> Option<BlockState> {
        let cached = self.leaves.get_mut(&(block / FANOUT as u64))?;
        cached.used = true;
        Some(cached.states[usize::from(child_of(block))])
    }

    /// Copies the states of consecutive blocks into `out`, as far as their leaves are there; returns how many.
    pub fn run(&mut self, blocks: BlockRange, out: &mut States) -> u64 {
        let mut done = 0;
        while done < blocks.count {
            let block = blocks.first + done;
            let Some(cached) = self.leaves.get_mut(&(block / FANOUT as u64)) else { break };
            cached.used = true;
            let from = usize::from(child_of(block));
            let count = ((blocks.count - done) as usize).min(FANOUT - from);
            out.extend_from_slice(&cached.states[from..from + count]);
            done += count as u64;
        }
        done
    }

    /// A leaf that is there, to be changed.
    pub fn get_mut(&mut self, leaf: &u64) -> Option<&mut Leaf> {
        self.leaves.get_mut(leaf).map(|cached| &mut cached.states)
    }

    /// Those of some leaves that are there, to be changed.
    pub fn range_mut(&mut self, leaves: RangeInclusive<u64>) -> impl Iterator<Item = (u64, &mut Leaf)> {
        self.leaves.range_mut(leaves).map(|(leaf, cached)| (*leaf, &mut cached.states))
    }

    /// Puts a leaf in.
    pub fn insert(&mut self, leaf: u64, states: Leaf) {
        while self.leaves.len() >= self.always && self.budget.is_spent() {
            self.evict();
        }
        if self.leaves.insert(leaf, Cached { states, used: true }).is_none() {
            self.budget.used.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// CLOCK: the first leaf from the hand on that was not used since the hand last passed it.
    fn evict(&mut self) {
        while !self.leaves.is_empty() {
            match self.leaves.range_mut(self.hand..).next() {
                None => self.hand = 0,
                Some((&leaf, cached)) => {
                    self.hand = leaf + 1;
                    if !std::mem::take(&mut cached.used) {
                        self.leaves.remove(&leaf);
                        self.budget.used.fetch_sub(1, Ordering::Relaxed);
                        return;
                    }
                }
            }
        }
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.budget.used.fetch_sub(self.leaves.len(), Ordering::Relaxed);
        self.leaves.clear();
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.leaves.len()
    }
}

impl Drop for LeafCache {
    fn drop(&mut self) {
        self.clear();
    }
}
