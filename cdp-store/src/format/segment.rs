//! The header of a segment, kept in two copies. `docs/format.md`, "Segment".

use super::bytes::{put_u32, put_u64, u32_at, u64_at};
use super::{FormatError, StructureKind, seal, unseal};
use cdp_types::{BranchId, Generation, Ordinal, VolumeId};

const LEN: usize = 4096;
const STORE: usize = 32;
const INCARNATION: usize = 48;
const VOLUME: usize = 56;
const BRANCH: usize = 64;
const GENERATION: usize = 72;
const TERM: usize = 80;
const FIRST_ORDINAL: usize = 88;
const PREVIOUS_CRC: usize = 96;
const PHYSICAL: usize = 100;
const SECRET: usize = 104;
const CAPACITY: usize = 112;
const OPENED: usize = 120;
const END: usize = 128;
const _: () = assert!(END <= LEN);

/// Distance between the two header copies, in bytes: each has a physical block of its own.
#[must_use]
pub fn header_stride(physical_block: u32) -> u64 {
    u64::from(physical_block).max(LEN as u64)
}

/// Where a segment's first batch starts, in bytes.
#[must_use]
pub fn data_start(physical_block: u32) -> u64 {
    2 * header_stride(physical_block)
}

/// Whose segment it is, and how it continues its volume's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The store's id.
    pub store: [u8; 16],
    /// This use of the file; never reused.
    pub incarnation: u64,
    /// Whose log it is part of.
    pub volume: VolumeId,
    /// The branch that was the volume's head when it was opened.
    pub branch: BranchId,
    /// The generation that opened it.
    pub generation: Generation,
    /// The volume's term when it was opened.
    pub term: u64,
    /// Ordinal of its first batch.
    pub first_ordinal: Ordinal,
    /// Checksum of the header of the batch before that one; 0 before the first.
    pub previous_crc: u32,
    /// The unit on which batches start after a flush, in bytes.
    pub physical_block: u32,
    /// Random seed of its batches' header checksums: a guest that writes a header into its blocks cannot know it.
    pub secret: u64,
    /// How far batches may reach, in bytes from the start of the file.
    pub capacity: u64,
    /// When it was opened: nanoseconds since 1970 by the raw wall clock.
    pub opened_ns: u64,
}

impl SegmentHeader {
    /// Length of one copy, in bytes.
    pub const LEN: usize = LEN;

    /// Fills one copy: `out` is [`Self::LEN`] bytes long.
    pub fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        out[STORE..STORE + 16].copy_from_slice(&self.store);
        put_u64(out, INCARNATION, self.incarnation);
        put_u64(out, VOLUME, self.volume.0);
        put_u64(out, BRANCH, self.branch.0);
        put_u64(out, GENERATION, self.generation.0);
        put_u64(out, TERM, self.term);
        put_u64(out, FIRST_ORDINAL, self.first_ordinal.0);
        put_u32(out, PREVIOUS_CRC, self.previous_crc);
        put_u32(out, PHYSICAL, self.physical_block);
        put_u64(out, SECRET, self.secret);
        put_u64(out, CAPACITY, self.capacity);
        put_u64(out, OPENED, self.opened_ns);
        seal(out, StructureKind::Segment, 0, 0);
    }

    /// Reads one copy of [`Self::LEN`] bytes.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        unseal(bytes, StructureKind::Segment, 0)?;
        if bytes.len() != LEN {
            return Err(FormatError::Field("header length"));
        }
        let mut store = [0; 16];
        store.copy_from_slice(&bytes[STORE..STORE + 16]);
        let physical_block = u32_at(bytes, PHYSICAL);
        if !physical_block.is_power_of_two() || !(512..=1 << 20).contains(&physical_block) {
            return Err(FormatError::Field("physical block size"));
        }
        Ok(Self {
            store,
            incarnation: u64_at(bytes, INCARNATION),
            volume: VolumeId(u64_at(bytes, VOLUME)),
            branch: BranchId(u64_at(bytes, BRANCH)),
            generation: Generation(u64_at(bytes, GENERATION)),
            term: u64_at(bytes, TERM),
            first_ordinal: Ordinal(u64_at(bytes, FIRST_ORDINAL)),
            previous_crc: u32_at(bytes, PREVIOUS_CRC),
            physical_block,
            secret: u64_at(bytes, SECRET),
            capacity: u64_at(bytes, CAPACITY),
            opened_ns: u64_at(bytes, OPENED),
        })
    }
}
