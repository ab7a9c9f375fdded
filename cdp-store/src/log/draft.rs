//! A batch while it is being filled: guest data is copied in and checksummed, block by block, in one pass.

use cdp_types::{BLOCK_SIZE, BlockRange, IoBuf, Op, Origin, RequestId};

use crate::format::{
    BATCH_FIXED_LEN, MAX_HEADER_LEN, Record, RecordFlags, RecordKind, block_crc, data_start,
};
use crate::storage::{AlignedBuf, Alignment};

/// A request that changes data, kept until its batch is acknowledged: after a cut it may have to be run again.
#[derive(Debug)]
pub struct Pending {
    /// The front end's name for it.
    pub id: RequestId,
    /// What it does.
    pub op: Op,
}

/// Bytes kept free before the payload for a header, besides a segment's own header copies.
const HEADER_ROOM: usize = 64 << 10;
const BLOCK: usize = BLOCK_SIZE as usize;

/// A batch before it has a place. Its payload lies in the buffer behind room for the headers, so that one aligned
/// write takes both.
#[derive(Debug)]
pub struct Draft {
    pub(super) buffer: AlignedBuf,
    head_room: usize,
    /// What a write to the file is a multiple of, in bytes.
    unit: usize,
    payload: usize,
    pub(super) records: Vec<Record>,
    pub(super) crcs: Vec<u32>,
    pub(super) body: Vec<u8>,
    pub(super) requests: Vec<Pending>,
    /// Blocks of which a request wrote only part, as merged: `(block, offset of the block in the payload)`.
    pub(super) merged: Vec<(u64, usize)>,
}

impl Draft {
    /// An empty draft that can take `payload` bytes of blocks.
    #[must_use]
    pub fn new(payload: usize, alignment: Alignment) -> Self {
        Self::over(AlignedBuf::zeroed(Self::buffer_len(payload, alignment)), alignment)
    }

    /// Length of the buffer of a draft that takes `payload` bytes of blocks: with room for the headers before them, and
    /// for the last physical block to be filled up.
    #[must_use]
    pub fn buffer_len(payload: usize, alignment: Alignment) -> usize {
        Self::room_for_headers(alignment)
            + payload.next_multiple_of(BLOCK)
            + alignment.physical_block as usize
    }

    fn room_for_headers(alignment: Alignment) -> usize {
        data_start(alignment.physical_block) as usize
            + HEADER_ROOM.next_multiple_of(alignment.physical_block as usize)
    }

    /// The same in a buffer that an earlier draft has left.
    #[must_use]
    pub fn over(buffer: AlignedBuf, alignment: Alignment) -> Self {
        Self {
            buffer,
            head_room: Self::room_for_headers(alignment),
            unit: alignment.physical_block as usize,
            payload: 0,
            records: Vec::new(),
            crcs: Vec::new(),
            body: Vec::new(),
            requests: Vec::new(),
            merged: Vec::new(),
        }
    }

    /// A draft that holds one event and no blocks.
    #[must_use]
    pub fn event(record: Record, body: Vec<u8>, alignment: Alignment) -> Self {
        let mut draft = Self::new(0, alignment);
        if body.len() + BATCH_FIXED_LEN + 4096 > HEADER_ROOM {
            let room = (body.len() + HEADER_ROOM).next_multiple_of(alignment.physical_block as usize);
            draft.head_room += room;
            let tail = alignment.physical_block as usize;
            draft.buffer = AlignedBuf::zeroed(draft.head_room + tail);
        }
        draft.records.push(record);
        draft.body = body;
        draft
    }

    /// Longest body that an event can carry, in bytes.
    pub const MAX_BODY: usize = MAX_HEADER_LEN - 8192;

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Whether `blocks` more blocks in `records` more records fit.
    #[must_use]
    pub fn has_room(&self, blocks: u64, records: usize) -> bool {
        let payload = self.payload as u64 + blocks * BLOCK_SIZE;
        let header = BATCH_FIXED_LEN
            + (self.records.len() + records) * 32
            + (self.crcs.len() + blocks as usize) * 4
            + self.body.len()
            + 64;
        payload <= self.payload_room() as u64 && header <= HEADER_ROOM
    }

    /// Bytes of blocks that an empty draft over this buffer takes. Where physical blocks are larger than ours, the last one
    /// is filled up behind them, which takes room as well.
    #[must_use]
    pub fn payload_room(&self) -> usize {
        let unit = self.unit.max(BLOCK);
        (self.buffer.len() - self.head_room) / unit * unit
    }

    pub(super) fn head_room(&self) -> usize {
        self.head_room
    }

    pub(super) fn payload_len(&self) -> usize {
        self.payload
    }

    fn push_block(&mut self, fill: impl FnOnce(&mut [u8])) {
        let at = self.head_room + self.payload;
        let block = &mut self.buffer[at..at + BLOCK];
        fill(block);
        self.crcs.push(block_crc(block));
        self.payload += BLOCK;
    }

    fn push_record(&mut self, kind: RecordKind, flags: u8, blocks: BlockRange, origin: Origin) {
        let flags = RecordFlags(flags);
        self.records.push(Record { kind, flags, first: blocks.first, count: blocks.count, origin, aux: 0 });
    }

    /// Adds whole blocks from a request's memory, copying and checksumming each.
    pub fn write(&mut self, blocks: BlockRange, from: &IoBuf, offset: usize, origin: Origin) {
        for index in 0..blocks.count as usize {
            self.push_block(|block| from.copy_out(offset + index * BLOCK, block));
        }
        self.push_record(RecordKind::Write, RecordFlags::MORE, blocks, origin);
    }

    /// Adds one block of which a request writes only a part: `base` is what it held before.
    pub fn merge(&mut self, block: u64, base: &[u8], origin: Origin, change: impl FnOnce(&mut [u8])) {
        self.merged.push((block, self.head_room + self.payload));
        self.push_block(|bytes| {
            bytes.copy_from_slice(base);
            change(bytes);
        });
        let flags = RecordFlags::MORE | RecordFlags::PARTIAL;
        self.push_record(RecordKind::Write, flags, BlockRange::new(block, 1), origin);
    }

    /// Adds a range that reads as zeroes.
    pub fn clear(&mut self, kind: RecordKind, blocks: BlockRange, origin: Origin) {
        self.push_record(kind, RecordFlags::MORE, blocks, origin);
    }

    /// Adds an event beside the requests.
    pub fn note(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Ends the request whose records were added since the last call: they become one instant.
    pub fn end_request(&mut self, pending: Pending) {
        if let Some(last) = self.records.last_mut() {
            last.flags.0 &= !RecordFlags::MORE;
        }
        self.requests.push(pending);
    }

    /// Takes the draft apart, for its buffer and for requests that could not be placed.
    #[must_use]
    pub fn into_parts(self) -> (AlignedBuf, Vec<Pending>) {
        (self.buffer, self.requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_has_room_for_its_padding_whatever_the_disks_blocks_are() {
        for physical_block in [512, 4096, 8192, 16 << 10, 64 << 10] {
            let alignment = Alignment { offset: 512, memory: 512, physical_block };
            for blocks in 0..40 {
                let draft = Draft::new(blocks * BLOCK, alignment);
                let room = draft.payload_room();
                assert!(room >= blocks * BLOCK, "{physical_block}: {room} bytes for {blocks} blocks");
                let padded = room.next_multiple_of(physical_block as usize);
                assert!(
                    draft.head_room() + padded <= draft.buffer.len(),
                    "{physical_block}, {blocks} blocks"
                );
            }
        }
    }
}
