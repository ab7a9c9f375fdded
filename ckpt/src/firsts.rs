//! Which pages a guest writes first when a hot checkpoint lets it go on.
//!
//! Each first write to a page waits until QEMU has saved that page, and what a guest does in its first milliseconds
//! (a timer's interrupt, its scheduler, the stacks of what runs) writes some hundred pages, one after the other. They
//! are mostly the same each time. So what the guest asked for in one checkpoint is touched for it in the next, from the
//! stop on: QEMU has these pages in its queue as soon as it begins, and the guest hardly waits.
//!
//! A page that is touched without need costs QEMU one page out of turn. Nothing depends on a guess being right.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::PAGE_SIZE;
use crate::stream::RamBlock;

/// What a guest needs to come to life is about a hundred pages. With 1024, QEMU was busy with them for 20 to 60 ms.
const MOST: usize = 160;
/// How long after the stream's first page a page counts as one of the first.
const EARLY: Duration = Duration::from_millis(60);
/// Of those that were touched, one in so many is left out the next time: what is needed comes back by itself, and what
/// is not is forgotten.
const LEFT_OUT: usize = 8;

/// A page of guest memory, by its place in the file that is behind the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryPage {
    /// Bytes of the RAM block that it is in, which is the whole file.
    pub block_bytes: u64,
    /// Where in the block, in bytes.
    pub offset: u64,
}

/// What is touched ahead for one checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Ahead {
    /// In the order in which the guest asked for them the last time.
    pub pages: Arc<[MemoryPage]>,
    /// The guest runs again: QEMU's protection is there or has been, and whoever touches goes round once more.
    pub over: Arc<AtomicBool>,
}

impl Ahead {
    /// Says that the guest runs again.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
    }
}

/// What is known of one machine. It is not kept across a restart of this process: one checkpoint learns it again.
#[derive(Debug, Default)]
pub struct Firsts {
    learned: Mutex<Learned>,
}

#[derive(Debug, Default)]
struct Learned {
    pages: Vec<MemoryPage>,
    turn: usize,
}

impl Firsts {
    /// The pages to touch for the next checkpoint.
    pub(crate) fn expected(&self) -> Ahead {
        let mut learned = self.learned();
        learned.turn += 1;
        let turn = learned.turn;
        let kept = learned.pages.iter().enumerate().filter(|(n, _)| !(n + turn).is_multiple_of(LEFT_OUT));
        Ahead { pages: kept.map(|(_, page)| *page).collect(), over: Arc::default() }
    }

    fn learn(&self, pages: Vec<MemoryPage>) {
        self.learned().pages = pages;
    }

    fn learned(&self) -> MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at a stream's pages as they come. QEMU sends memory in its order and goes on behind whatever it has sent last
/// (`get_queued_page`, migration/ram.c), so a page that does not follow the one before it is one that somebody waited for.
///
/// What was seen is learned when this is dropped.
#[derive(Debug)]
pub struct Watch {
    firsts: Arc<Firsts>,
    /// Behind the last page that came, by block and offset.
    turn: (usize, u64),
    came: HashSet<(usize, u64)>,
    /// Those out of turn, in their order.
    asked: Vec<MemoryPage>,
    began: Option<Instant>,
}

impl Watch {
    /// Looks at the stream of this machine's next checkpoint.
    #[must_use]
    pub fn new(firsts: Arc<Firsts>) -> Self {
        Self { firsts, turn: (0, 0), came: HashSet::new(), asked: Vec::new(), began: None }
    }

    /// Takes in a page. Whether it is worth looking at more of them.
    pub(crate) fn note(&mut self, blocks: &[RamBlock], block: usize, offset: u64) -> bool {
        let began = *self.began.get_or_insert_with(Instant::now);
        let is_new = self.came.insert((block, offset));
        if let Some(RamBlock { length, .. }) = blocks.get(block)
            && is_new
            && !self.is_in_turn(blocks, block, offset)
        {
            self.asked.push(MemoryPage { block_bytes: *length, offset });
        }
        self.turn = (block, offset + PAGE_SIZE as u64);
        self.asked.len() < MOST && began.elapsed() < EARLY
    }

    /// Whether this page follows the last one; what has come before is passed over.
    fn is_in_turn(&self, blocks: &[RamBlock], block: usize, offset: u64) -> bool {
        let (mut at, mut next) = self.turn;
        loop {
            if (at, next) == (block, offset) {
                return true;
            }
            if blocks.get(at).is_none_or(|block| next >= block.length) {
                if at + 1 != block {
                    return false;
                }
                (at, next) = (block, 0);
            } else if self.came.contains(&(at, next)) {
                next += PAGE_SIZE as u64;
            } else {
                return false;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.began.is_some() {
            self.firsts.learn(std::mem::take(&mut self.asked));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn blocks() -> [RamBlock; 2] {
        [("ram", 64 * PAGE), ("rom", 4 * PAGE)].map(|(name, length)| RamBlock {
            name: name.to_owned(),
            length,
            address: None,
        })
    }

    fn learned(pages: &[(usize, u64)]) -> Vec<(u64, u64)> {
        let firsts = Arc::new(Firsts::default());
        let mut watch = Watch::new(Arc::clone(&firsts));
        for &(block, page) in pages {
            watch.note(&blocks(), block, page * PAGE);
        }
        drop(watch);
        let learned = firsts.learned();
        learned.pages.iter().map(|page| (page.block_bytes / PAGE, page.offset / PAGE)).collect()
    }

    #[test]
    fn a_page_that_does_not_follow_the_last_one_was_asked_for() {
        let pages = [(0, 0), (0, 1), (0, 40), (0, 41), (0, 42), (1, 2), (1, 3), (0, 30), (0, 31)];
        assert_eq!(learned(&pages), [(64, 40), (4, 2), (64, 30)]);
    }

    #[test]
    fn what_came_before_is_passed_over_also_into_the_next_block() {
        let mut pages = vec![(0, 2), (0, 3), (0, 0), (0, 1), (0, 4)];
        pages.extend((5..64).map(|page| (0, page)));
        pages.extend([(1, 0), (1, 1)]);
        assert_eq!(learned(&pages), [(64, 2), (64, 0)]);
        assert_eq!(learned(&[(1, 0), (0, 63), (1, 1)]), [(4, 0), (64, 63)]);
    }

    #[test]
    fn a_stream_that_never_came_teaches_nothing() {
        let firsts = Arc::new(Firsts::default());
        firsts.learn(vec![MemoryPage { block_bytes: 64 * PAGE, offset: 0 }]);
        drop(Watch::new(Arc::clone(&firsts)));
        assert_eq!(firsts.learned().pages.len(), 1);
    }

    #[test]
    fn what_is_not_asked_for_any_more_is_forgotten_and_what_is_comes_back() {
        let firsts = Firsts::default();
        let page = |n| MemoryPage { block_bytes: 64 * PAGE, offset: n * PAGE };
        firsts.learn((0..64).map(page).collect());
        for _ in 0..40 {
            let ahead = firsts.expected();
            assert!(ahead.pages.len() <= 64);
            // The guest itself asks for the first four, whether they were touched or not.
            let touched = ahead.pages.iter().copied().filter(|page| page.offset >= 4 * PAGE);
            firsts.learn((0..4).map(page).chain(touched).collect());
        }
        let left = firsts.learned().pages.len();
        assert!((4..16).contains(&left), "{left} pages are left");
    }

    #[test]
    fn it_learns_no_more_than_so_many() {
        let firsts = Arc::new(Firsts::default());
        let mut watch = Watch::new(Arc::clone(&firsts));
        let large = [RamBlock { name: "ram".to_owned(), length: 1 << 30, address: None }];
        let mut page = 1;
        while watch.note(&large, 0, page * 2 * PAGE) {
            page += 1;
            assert!(page < 10_000);
        }
        drop(watch);
        assert!(firsts.learned().pages.len() <= MOST);
    }
}
