//! Leaves in memory: a bounded cache of which blocks lie where, for heads and for past instants that are open.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cdp_types::BlockRange;
use smallvec::SmallVec;

use crate::index::{BlockState, FANOUT, child_of};

/// The states of a leaf's blocks.
pub type Leaf = Box<[BlockState; FANOUT]>;

/// The states of consecutive blocks.
pub type States = SmallVec<[BlockState; 32]>;

/// A cache that its user and the budget share.
pub type SharedLeaves = Arc<Mutex<LeafCache>>;

/// When another cache has to make way it gives back so many leaves at once.
const RECLAIMED: usize = 64;
/// Up to so many leaves are zeroed by one change; of more the whole ones are dropped.
const MOST_ZEROED: usize = 16;

/// How many leaves a store may cache, all its caches together. A cache with less than its fair share grows at the
/// cost of the largest; so what is in use now does not starve because something else was first.
#[derive(Debug)]
pub struct LeafBudget {
    limit: usize,
    used: AtomicUsize,
    /// Caches that are not empty.
    active: AtomicUsize,
    caches: Mutex<Vec<Weak<Mutex<LeafCache>>>>,
}

/// Locks a cache.
pub fn lock_leaves(cache: &Mutex<LeafCache>) -> MutexGuard<'_, LeafCache> {
    // It holds nothing that could be half-done.
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LeafBudget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Arc<Self> {
        let leaf_bytes = size_of::<[BlockState; FANOUT]>() + 128;
        Arc::new(Self {
            limit: bytes / leaf_bytes,
            used: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            caches: Mutex::default(),
        })
    }

    /// An empty cache, which may have `always` leaves in any case.
    #[must_use]
    pub fn cache(self: &Arc<Self>, always: usize) -> SharedLeaves {
        let budget = Arc::clone(self);
        let cache = Arc::new(Mutex::new(LeafCache { leaves: BTreeMap::new(), hand: 0, always, budget }));
        let mut caches = self.caches();
        caches.retain(|cache| cache.strong_count() > 0);
        caches.push(Arc::downgrade(&cache));
        cache
    }

    fn caches(&self) -> MutexGuard<'_, Vec<Weak<Mutex<LeafCache>>>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_spent(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.limit
    }

    fn fair_share(&self) -> usize {
        self.limit / self.active.load(Ordering::Relaxed).max(1)
    }

    /// Has the largest cache give back some leaves; says whether it did. One that is locked now, as the caller's own
    /// is, is passed over: nobody waits for a lock here.
    fn reclaim(&self) -> bool {
        let caches: Vec<SharedLeaves> = self.caches().iter().filter_map(Weak::upgrade).collect();
        let largest = caches.iter().filter_map(|cache| cache.try_lock().ok()).max_by_key(|cache| cache.len());
        let Some(mut largest) = largest.filter(|cache| cache.len() > cache.always) else { return false };
        let most = largest.len() - largest.always;
        (0..RECLAIMED.min(most)).for_each(|_| largest.evict());
        true
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

    /// Has blocks be zero whose leaves are there. Of many leaves those are dropped of which nothing else is left: a guest can
    /// say the same of all of its disk a thousand times, and they are filled again only for what it reads.
    pub fn zero(&mut self, blocks: BlockRange) {
        if blocks.is_empty() {
            return;
        }
        let fanout = FANOUT as u64;
        let whole = blocks.first.div_ceil(fanout)..blocks.end() / fanout;
        if !whole.is_empty() && self.leaves.range(whole.clone()).nth(MOST_ZEROED).is_some() {
            let dropped: Vec<u64> = self.leaves.range(whole).map(|(&leaf, _)| leaf).collect();
            dropped.iter().for_each(|leaf| drop(self.leaves.remove(leaf)));
            self.given_back(dropped.len());
        }
        for (leaf, cached) in self.leaves.range_mut(blocks.first / fanout..=(blocks.end() - 1) / fanout) {
            let from = blocks.first.saturating_sub(leaf * fanout).min(fanout) as usize;
            let to = (blocks.end() - leaf * fanout).min(fanout) as usize;
            cached.states[from..to].fill(BlockState::Zero);
        }
    }

    /// Puts a leaf in.
    pub fn insert(&mut self, leaf: u64, states: Leaf) {
        while self.leaves.len() >= self.always && self.budget.is_spent() {
            if self.leaves.len() >= self.budget.fair_share() || !self.budget.reclaim() {
                self.evict();
            }
        }
        if self.leaves.is_empty() {
            self.budget.active.fetch_add(1, Ordering::Relaxed);
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
                        self.given_back(1);
                        return;
                    }
                }
            }
        }
    }

    /// Drops all.
    pub fn clear(&mut self) {
        let count = self.leaves.len();
        self.leaves.clear();
        self.given_back(count);
    }

    fn given_back(&self, count: usize) {
        self.budget.used.fetch_sub(count, Ordering::Relaxed);
        if count > 0 && self.leaves.is_empty() {
            self.budget.active.fetch_sub(1, Ordering::Relaxed);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::unsaid;

    fn fill(cache: &SharedLeaves, leaves: std::ops::Range<u64>) {
        leaves.for_each(|leaf| lock_leaves(cache).insert(leaf, unsaid()));
    }

    fn budget_of(leaves: usize) -> Arc<LeafBudget> {
        LeafBudget::new(leaves * (size_of::<[BlockState; FANOUT]>() + 128))
    }

    #[test]
    fn a_new_cache_gets_its_share_from_one_that_has_all() {
        let budget = budget_of(1000);
        let (first, second) = (budget.cache(16), budget.cache(16));
        fill(&first, 0..2000);
        assert_eq!(lock_leaves(&first).len(), 1000);
        fill(&second, 0..2000);
        let lens = [&first, &second].map(|cache| lock_leaves(cache).len());
        assert!(lens.iter().sum::<usize>() <= 1000, "{lens:?}");
        assert!(lens[1] >= 450, "{lens:?}");
        // It does not take more than that.
        assert!(lens[0] >= 450, "{lens:?}");
    }

    #[test]
    fn what_is_zeroed_is_zero_where_it_is_still_known() {
        let fanout = FANOUT as u64;
        let (few, many) = (MOST_ZEROED as u64, 100);
        let budget = budget_of(1000);
        for (whole, left) in [(few, few), (few + 1, 0), (many, 0)] {
            let cache = budget.cache(16);
            fill(&cache, 0..many + 2);
            let mut cache = lock_leaves(&cache);
            // Half of the leaf before the whole ones, and one block of the leaf behind them.
            cache.zero(BlockRange::new(fanout / 2, fanout / 2 + whole * fanout + 1));
            assert_eq!(cache.len() as u64, many + 2 - whole + left);
            let zeroed = [fanout / 2, fanout - 1, (whole + 1) * fanout].map(|block| cache.state(block));
            assert_eq!(zeroed, [Some(BlockState::Zero); 3]);
            let other = [0, fanout / 2 - 1, (whole + 1) * fanout + 1].map(|block| cache.state(block));
            assert_eq!(other, [Some(unsaid()[0]); 3]);
            let inside = [fanout, (whole + 1) * fanout - 1].map(|block| cache.state(block));
            assert_eq!(inside, [(left > 0).then_some(BlockState::Zero); 2]);
            assert_eq!(cache.len(), budget.used.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn what_a_cache_had_is_there_for_others_when_it_has_gone() {
        let budget = budget_of(100);
        let (first, second) = (budget.cache(1), budget.cache(1));
        fill(&first, 0..100);
        drop(first);
        fill(&second, 0..200);
        assert_eq!((lock_leaves(&second).len(), budget.used.load(Ordering::Relaxed)), (100, 100));
    }

    #[test]
    fn every_cache_may_have_a_few_leaves_whatever_others_have() {
        let budget = budget_of(10);
        let caches: Vec<SharedLeaves> = (0..10).map(|_| budget.cache(4)).collect();
        caches.iter().for_each(|cache| fill(cache, 0..100));
        assert!(caches.iter().all(|cache| lock_leaves(cache).len() >= 4));
    }
}
