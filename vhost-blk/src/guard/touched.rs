//! Which pages of a region have been touched in the present window.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words in a chunk: 128 MiB of guest memory.
const CHUNK_WORDS: usize = 512;
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * 64;

/// A bit for each page. Chunks are made when their first bit is set, so that a region costs nothing without a window,
/// and a front end that shares an enormous sparse file costs next to nothing.
pub(crate) struct Touched {
    chunks: Box<[OnceLock<Box<[AtomicU64; CHUNK_WORDS]>>]>,
}

impl Touched {
    /// None of `pages` is touched.
    pub(crate) fn new(pages: u64) -> Self {
        Self { chunks: (0..pages.div_ceil(CHUNK_PAGES)).map(|_| OnceLock::new()).collect() }
    }

    pub(crate) fn has(&self, page: u64) -> bool {
        let chunk = self.chunks.get((page / CHUNK_PAGES) as usize).and_then(OnceLock::get);
        // Acquire: whoever sees the bit writes to the page after the touch has returned.
        chunk.is_some_and(|words| words[word(page)].load(Ordering::Acquire) & bit(page) != 0)
    }

    pub(crate) fn set(&self, page: u64) {
        if let Some(chunk) = self.chunks.get((page / CHUNK_PAGES) as usize) {
            let words = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]));
            words[word(page)].fetch_or(bit(page), Ordering::Release);
        }
    }

    /// Forgets everything. Nobody may set a bit meanwhile.
    pub(crate) fn clear(&self) {
        for words in self.chunks.iter().filter_map(OnceLock::get) {
            words.iter().for_each(|word| word.store(0, Ordering::Release));
        }
    }
}

fn word(page: u64) -> usize {
    (page % CHUNK_PAGES / 64) as usize
}

fn bit(page: u64) -> u64 {
    1 << (page % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_a_bit_of_its_own_and_none_lies_outside() {
        let touched = Touched::new(CHUNK_PAGES + 1);
        for page in [0, 63, 64, CHUNK_PAGES - 1, CHUNK_PAGES] {
            assert!(!touched.has(page));
            touched.set(page);
            assert!(touched.has(page));
        }
        assert_eq!((0..=CHUNK_PAGES).filter(|&page| touched.has(page)).count(), 5);
        touched.set(2 * CHUNK_PAGES);
        assert!(!touched.has(2 * CHUNK_PAGES));
        touched.clear();
        assert_eq!((0..=CHUNK_PAGES).filter(|&page| touched.has(page)).count(), 0);
    }
}
