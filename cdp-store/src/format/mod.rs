//! Byte layouts of everything that the store keeps outside RocksDB. The layouts are described once, in
//! `docs/format.md`; the constants here carry the same names and are checked at compile time.
//!
//! Every structure starts with the same [`PREFIX_LEN`] bytes, which can be read without knowing the version:
//! magic, kind, version, incompatible features, header length, CRC-32C.

mod batch;
mod bytes;
mod epoch;
mod segment;
mod superblock;

use cdp_types::crc32c;

pub use batch::{
    BATCH_FIXED_LEN, BatchHeader, BatchPlace, Cut, MAX_HEADER_LEN, Record, RecordFlags, RecordKind, block_crc,
};
pub use epoch::{EpochMember, EpochRecord, MAX_MEMBERS};
pub use segment::{SegmentHeader, data_start, header_stride};
pub use superblock::{SUPERBLOCK_LEN, Superblock};

/// The first bytes of every structure.
pub const MAGIC: [u8; 8] = *b"HINDSITE";
/// The format version that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 1;
/// Feature of a batch: it has an epoch record.
pub const FEATURE_EPOCH: u64 = 1;
/// Incompatible features that this program understands.
pub const KNOWN_FEATURES: u64 = FEATURE_EPOCH;
/// Length of the prefix that all structures share, in bytes.
pub const PREFIX_LEN: usize = 32;

const OFFSET_KIND: usize = 8;
const OFFSET_VERSION: usize = 12;
const OFFSET_FEATURES: usize = 16;
const OFFSET_LENGTH: usize = 24;
const OFFSET_CRC: usize = 28;

/// What a structure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum StructureKind {
    /// One of the store's two superblock slots.
    Superblock = 1,
    /// One of a segment's two header copies.
    Segment = 2,
    /// The header of a batch.
    Batch = 3,
}

/// Why bytes are no valid structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// There is no structure here at all: another magic, or another kind.
    #[error("no header of this store's format")]
    Absent,
    /// It was written by a newer program.
    #[error("format version {version}, features {features:#x}: written by a newer version of this program")]
    Newer {
        /// Its version.
        version: u16,
        /// Its feature flags.
        features: u64,
    },
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
    /// The checksum matches but a field cannot be.
    #[error("field out of range: {0}")]
    Field(&'static str),
}

/// Fills in the prefix of `bytes`, the checksum last. `seed` goes into the checksum before the bytes.
fn seal(bytes: &mut [u8], kind: StructureKind, features: u64, seed: u64) -> u32 {
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[OFFSET_KIND..OFFSET_KIND + 4].copy_from_slice(&(kind as u32).to_le_bytes());
    bytes[OFFSET_VERSION..OFFSET_VERSION + 2].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes[OFFSET_FEATURES..OFFSET_FEATURES + 8].copy_from_slice(&features.to_le_bytes());
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[OFFSET_LENGTH..OFFSET_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
    let crc = checksum(bytes, seed);
    bytes[OFFSET_CRC..OFFSET_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// The length that a structure's prefix states, if there is one of this kind; not yet trusted.
fn stated_length(bytes: &[u8], kind: StructureKind) -> Result<usize, FormatError> {
    if bytes.len() < PREFIX_LEN || bytes[..8] != MAGIC || bytes::u32_at(bytes, OFFSET_KIND) != kind as u32 {
        return Err(FormatError::Absent);
    }
    Ok(bytes::u32_at(bytes, OFFSET_LENGTH) as usize)
}

/// Checks the prefix and the checksum of `bytes`, which must be exactly the structure; returns its checksum.
fn unseal(bytes: &[u8], kind: StructureKind, seed: u64) -> Result<u32, FormatError> {
    if stated_length(bytes, kind)? != bytes.len() {
        return Err(FormatError::Field("header length"));
    }
    let stored = bytes::u32_at(bytes, OFFSET_CRC);
    if checksum(bytes, seed) != stored {
        return Err(FormatError::Checksum);
    }
    let version = bytes::u16_at(bytes, OFFSET_VERSION);
    let features = bytes::u64_at(bytes, OFFSET_FEATURES);
    if version == 0 || version > FORMAT_VERSION || features & !KNOWN_FEATURES != 0 {
        return Err(FormatError::Newer { version, features });
    }
    Ok(stored)
}

/// CRC-32C of the seed and the structure, its own checksum field taken as absent.
fn checksum(bytes: &[u8], seed: u64) -> u32 {
    crc32c([&seed.to_le_bytes(), &bytes[..OFFSET_CRC], &bytes[PREFIX_LEN..]])
}
