//! Which pages of a machine's memory have come.

use crate::stream::RamBlock;
use crate::{Error, ErrorKind, PAGE_SIZE, Place};

/// One bit for each page of each block.
#[derive(Debug)]
pub(crate) struct Coverage {
    blocks: Vec<Pages>,
}

#[derive(Debug)]
struct Pages {
    bits: Vec<u64>,
    count: u64,
    came: u64,
}

impl Coverage {
    pub(crate) fn new(blocks: &[RamBlock]) -> Self {
        let pages = |block: &RamBlock| {
            let count = block.length / PAGE_SIZE as u64;
            // Zeroed memory that nobody has touched yet costs address space only.
            Pages { bits: vec![0; count.div_ceil(64) as usize], count, came: 0 }
        };
        Self { blocks: blocks.iter().map(pages).collect() }
    }

    /// Notes a page. Whether it had come before; nothing if there is no such page.
    pub(crate) fn note(&mut self, block: usize, offset: u64) -> Option<bool> {
        let pages = self.blocks.get_mut(block)?;
        let page = offset / PAGE_SIZE as u64;
        if !offset.is_multiple_of(PAGE_SIZE as u64) || page >= pages.count {
            return None;
        }
        let (word, bit) = ((page / 64) as usize, 1_u64 << (page % 64));
        let before = pages.bits[word] & bit != 0;
        pages.bits[word] |= bit;
        pages.came += u64::from(!before);
        Some(before)
    }

    /// Which blocks came, once all has come that will.
    ///
    /// With `x-ignore-shared` the stream says where each block lies, and of some blocks nothing comes: shared memory
    /// that is a file. Such a block may be missing as a whole; nothing else may.
    ///
    /// # Errors
    /// `Incomplete`: pages are missing.
    pub(crate) fn finish(&self, blocks: &[RamBlock]) -> Result<Vec<bool>, Error> {
        let missing = |(block, pages): (&RamBlock, &Pages)| {
            let left_out = pages.came == 0 && block.address.is_some();
            match pages.came == pages.count || left_out {
                true => Ok(!left_out),
                false => Err(Error::new(
                    ErrorKind::Incomplete,
                    Place::Nowhere,
                    format!(
                        "{} of the {} pages of RAM block '{}' never came, the first at {:#x}",
                        pages.count - pages.came,
                        pages.count,
                        block.name,
                        pages.first_missing() * PAGE_SIZE as u64,
                    ),
                )),
            }
        };
        blocks.iter().zip(&self.blocks).map(missing).collect()
    }
}

impl Pages {
    fn first_missing(&self) -> u64 {
        let word = self.bits.iter().position(|&word| word != u64::MAX).unwrap_or(0);
        word as u64 * 64 + u64::from(self.bits.get(word).map_or(0, |word| word.trailing_ones()))
    }
}
