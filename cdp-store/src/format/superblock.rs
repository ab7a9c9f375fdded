//! The superblock: who the store is, and which generation claimed it last. `docs/format.md`, "Superblock".

use super::bytes::{put_u64, u64_at};
use super::{FormatError, StructureKind, seal, unseal};
use cdp_types::Generation;

/// Length of one slot, in bytes.
pub const SUPERBLOCK_LEN: usize = 4096;

const STORE: usize = 32;
const GENERATION: usize = 48;
const SEGMENT_BYTES: usize = 56;
const CREATED: usize = 64;
const END: usize = 72;
const _: () = assert!(END <= SUPERBLOCK_LEN);

/// One slot of two. The one that counts is never written over, so a torn write leaves it: a claim is durable or did not
/// happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The store's id.
    pub store: [u8; 16],
    /// The newest generation that was claimed.
    pub generation: Generation,
    /// Capacity of a full-sized segment, in bytes.
    pub segment_bytes: u64,
    /// When the store was made: nanoseconds since 1970.
    pub created_ns: u64,
}

impl Superblock {
    /// Fills `out`, which is [`SUPERBLOCK_LEN`] bytes long.
    pub fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        out[STORE..STORE + 16].copy_from_slice(&self.store);
        put_u64(out, GENERATION, self.generation.0);
        put_u64(out, SEGMENT_BYTES, self.segment_bytes);
        put_u64(out, CREATED, self.created_ns);
        seal(out, StructureKind::Superblock, 0, 0);
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        unseal(bytes, StructureKind::Superblock, 0)?;
        if bytes.len() != SUPERBLOCK_LEN {
            return Err(FormatError::Field("header length"));
        }
        let mut store = [0; 16];
        store.copy_from_slice(&bytes[STORE..STORE + 16]);
        Ok(Self {
            store,
            generation: Generation(u64_at(bytes, GENERATION)),
            segment_bytes: u64_at(bytes, SEGMENT_BYTES),
            created_ns: u64_at(bytes, CREATED),
        })
    }
}
