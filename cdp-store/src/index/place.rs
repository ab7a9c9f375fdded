//! Where a block's data lies, and what can be known of a block.

use std::fmt;

/// A physical place in the log: segment incarnation ‖ byte offset in the segment / 512.
///
/// The incarnation has 44 bits and the offset 20, so a segment holds up to 512 MiB. It is kept as two halves so
/// that a [`BlockState`] has 16 bytes instead of 24; the order of places is that of (incarnation, offset).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPos {
    high: u32,
    low: u32,
}

impl LogPos {
    /// The granularity of the byte offset.
    pub const UNIT_BYTES: u64 = 512;
    /// What a segment's length must not exceed, in bytes.
    pub const MAX_SEGMENT_BYTES: u64 = Self::UNIT_BYTES << Self::OFFSET_BITS;
    /// The last incarnation that a place can name.
    pub const MAX_INCARNATION: u64 = (1 << (64 - Self::OFFSET_BITS)) - 1;

    const OFFSET_BITS: u32 = 20;

    /// The place `offset_bytes` into the segment of this incarnation; `None` if the offset is no multiple of
    /// [`Self::UNIT_BYTES`] or either number is too large.
    #[must_use]
    pub const fn new(incarnation: u64, offset_bytes: u64) -> Option<Self> {
        let fits = incarnation <= Self::MAX_INCARNATION && offset_bytes < Self::MAX_SEGMENT_BYTES;
        if !fits || !offset_bytes.is_multiple_of(Self::UNIT_BYTES) {
            return None;
        }
        Some(Self::from_bits((incarnation << Self::OFFSET_BITS) | (offset_bytes / Self::UNIT_BYTES)))
    }

    /// The packed form; every value is a place.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self { high: (bits >> 32) as u32, low: bits as u32 }
    }

    /// The packed form, as in `docs/format.md`.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        ((self.high as u64) << 32) | self.low as u64
    }

    /// The incarnation of the segment.
    #[must_use]
    pub const fn incarnation(self) -> u64 {
        self.to_bits() >> Self::OFFSET_BITS
    }

    /// The offset in the segment, in bytes.
    #[must_use]
    pub const fn offset_bytes(self) -> u64 {
        (self.to_bits() & ((1 << Self::OFFSET_BITS) - 1)) * Self::UNIT_BYTES
    }
}

impl fmt::Display for LogPos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.incarnation(), self.offset_bytes())
    }
}

/// Where one block's data lies, and the CRC-32C that it must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Its first byte in the log.
    pub pos: LogPos,
    /// CRC-32C of the block's 4096 bytes, as the log defines it.
    pub crc: u32,
}

/// What one branch says about a block at an instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Nothing: ask the parent branch at the fork; without a parent it reads as zeroes.
    #[default]
    Unsaid,
    /// Reads as zeroes, whatever a parent says.
    Zero,
    /// Its data is in the log.
    Mapped(Place),
}

// The head map holds one of these per block: 8 KiB for each 2 MiB of disk.
const _: () = assert!(size_of::<BlockState>() == 16);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_place_gives_back_what_it_was_made_of() {
        for (incarnation, offset) in
            [(0, 0), (1, 512), (LogPos::MAX_INCARNATION, LogPos::MAX_SEGMENT_BYTES - 512), (7, 256 << 20)]
        {
            let pos = LogPos::new(incarnation, offset).unwrap();
            assert_eq!((pos.incarnation(), pos.offset_bytes()), (incarnation, offset));
            assert_eq!(LogPos::from_bits(pos.to_bits()), pos);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(LogPos::new(LogPos::MAX_INCARNATION + 1, 0), None);
        assert_eq!(LogPos::new(0, LogPos::MAX_SEGMENT_BYTES), None);
        assert_eq!(LogPos::new(0, 100), None);
    }

    #[test]
    fn places_are_ordered_by_incarnation_and_then_by_offset() {
        let places = [(1, 0), (1, 1024), (255, 0), (256, 512), (1 << 33, 0)];
        let places: Vec<_> = places.iter().map(|&(i, o)| LogPos::new(i, o).unwrap()).collect();
        assert!(places.is_sorted());
    }
}
