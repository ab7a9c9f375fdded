//! Half-open ranges of bytes and of blocks.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a block: the unit in which the log maps a volume.
pub const BLOCK_SIZE: u64 = 4096;
/// Bytes in a sector: the smallest unit that a guest can address (virtio 1.3, 5.2.6).
pub const SECTOR_SIZE: u64 = 512;

/// Why a range cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Start or length is no multiple of the device's logical block size.
    #[error("{range} is not aligned to {alignment} bytes")]
    Unaligned {
        /// What was asked for.
        range: ByteRange,
        /// What it must be a multiple of, in bytes.
        alignment: u64,
    },
    /// It ends past the end of the device, or past 2⁶⁴.
    #[error("{offset}+{len} lies outside the device's {capacity} bytes")]
    OutOfBounds {
        /// Start, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The device's size, in bytes.
        capacity: u64,
    },
}

/// A half-open range of a device's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `offset`.
    #[must_use]
    pub fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// The first byte after it, saturating at 2⁶⁴−1.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Checks that it lies within `capacity` bytes and on multiples of `alignment`.
    ///
    /// # Errors
    /// [`RangeError`] names what is wrong with it.
    pub fn check(&self, capacity: u64, alignment: u64) -> Result<(), RangeError> {
        if !self.offset.is_multiple_of(alignment) || !self.len.is_multiple_of(alignment) {
            return Err(RangeError::Unaligned { range: *self, alignment });
        }
        match self.offset.checked_add(self.len) {
            Some(end) if end <= capacity => Ok(()),
            _ => Err(RangeError::OutOfBounds { offset: self.offset, len: self.len, capacity }),
        }
    }

    /// The blocks that lie wholly inside it; empty if there are none.
    #[must_use]
    pub fn whole_blocks(&self) -> BlockRange {
        let first = self.offset.div_ceil(BLOCK_SIZE);
        let end = self.end() / BLOCK_SIZE;
        BlockRange::new(first, end.saturating_sub(first))
    }

    /// The blocks that it touches, wholly or in part.
    #[must_use]
    pub fn touched_blocks(&self) -> BlockRange {
        if self.len == 0 {
            return BlockRange::new(self.offset / BLOCK_SIZE, 0);
        }
        let first = self.offset / BLOCK_SIZE;
        BlockRange::new(first, self.end().div_ceil(BLOCK_SIZE) - first)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

/// A half-open range of a volume's blocks of [`BLOCK_SIZE`] bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// The range of `count` blocks from `first`.
    #[must_use]
    pub fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// The first block after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Whether it holds no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `block` lies in it.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        block >= self.first && block < self.end()
    }

    /// Whether the two share a block.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }

    /// The same range in bytes.
    #[must_use]
    pub fn bytes(&self) -> ByteRange {
        ByteRange::new(self.first.saturating_mul(BLOCK_SIZE), self.count.saturating_mul(BLOCK_SIZE))
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.first, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_past_two_to_the_sixty_four_is_out_of_bounds() {
        let range = ByteRange::new(u64::MAX - 511, 1024);
        assert!(matches!(range.check(u64::MAX, 512), Err(RangeError::OutOfBounds { .. })));
    }

    #[test]
    fn whole_and_touched_blocks_differ_by_the_edges() {
        let range = ByteRange::new(512, 8192);
        assert_eq!(range.whole_blocks(), BlockRange::new(1, 1));
        assert_eq!(range.touched_blocks(), BlockRange::new(0, 3));
        let inside = ByteRange::new(512, 1024);
        assert!(inside.whole_blocks().is_empty());
        assert_eq!(inside.touched_blocks(), BlockRange::new(0, 1));
    }
}
