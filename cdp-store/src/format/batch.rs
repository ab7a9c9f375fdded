//! Batches: the unit of appending. `docs/format.md`, "Batch".

use super::bytes::{put_u32, put_u64, u32_at, u64_at};
use super::{EpochRecord, FEATURE_EPOCH, FormatError, StructureKind, seal, stated_length, unseal};
use cdp_types::{BLOCK_SIZE, BranchId, Generation, Ordinal, Origin, Seq, VolumeId};

const STORE: usize = 32;
const VOLUME: usize = 48;
const BRANCH: usize = 56;
const INCARNATION: usize = 64;
const OFFSET: usize = 72;
const GENERATION: usize = 80;
const TERM: usize = 88;
const ORDINAL: usize = 96;
const PREVIOUS_CRC: usize = 104;
const RECORD_COUNT: usize = 108;
const DURABLE: usize = 112;
const FIRST_SEQ: usize = 120;
const TIME: usize = 128;
const WALL: usize = 136;
const BOOT: usize = 144;
const BLOCK_COUNT: usize = 152;
const BODY_LEN: usize = 156;

/// Length of a batch header before its records, in bytes.
pub const BATCH_FIXED_LEN: usize = 160;
/// Longest header that is read back, in bytes: what a damaged length field could make a scan allocate.
pub const MAX_HEADER_LEN: usize = 1 << 20;

const RECORD_LEN: usize = 32;
const BLOCK_BITS: u32 = 48;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// The blocks follow in the batch's payload.
    Write = 1,
    /// The blocks read as zeroes from here on.
    Zero = 2,
    /// The blocks were discarded; they read as zeroes.
    Discard = 3,
    /// A guest's flush that had completed: everything up to `Seq` `aux` is durable.
    Flush = 4,
    /// A cut across all disks of a machine; the body names the members.
    Epoch = 5,
    /// Blocks were copied here from a segment that is to be recycled; `aux` is the place they came from.
    Relocate = 6,
    /// What lies after the batch named in the body, in older segments, is not part of the log.
    Cut = 7,
    /// Everything up to ordinal `aux` is durable; written when idle and at a clean stop.
    Durable = 8,
    /// A change of the store's own state; the body is JSON.
    Store = 9,
    /// History before the place in `aux` is no longer kept.
    Expire = 10,
}

impl RecordKind {
    fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Discard,
            4 => Self::Flush,
            5 => Self::Epoch,
            6 => Self::Relocate,
            7 => Self::Cut,
            8 => Self::Durable,
            9 => Self::Store,
            10 => Self::Expire,
            _ => return None,
        })
    }

    /// Whether its blocks follow in the payload.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::Relocate)
    }
}

/// How a record belongs to its neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordFlags(pub u8);

impl RecordFlags {
    /// The next record belongs to the same request and has the same `Seq`.
    pub const MORE: u8 = 1;
    /// The guest wrote only part of this block; the rest is what was there before.
    pub const PARTIAL: u8 = 2;
    const KNOWN: u8 = Self::MORE | Self::PARTIAL;

    /// Whether the next record belongs to the same request.
    #[must_use]
    pub fn more(self) -> bool {
        self.0 & Self::MORE != 0
    }
}

/// One range of blocks that one request changed, or one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub kind: RecordKind,
    /// How it belongs to its neighbours.
    pub flags: RecordFlags,
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// The request's number in the guest's in-flight region, or 0.
    pub origin: Origin,
    /// By kind.
    pub aux: u64,
}

impl Record {
    /// Blocks and counts fit in this many bits.
    pub const BLOCK_LIMIT: u64 = 1 << BLOCK_BITS;

    /// An event without blocks.
    #[must_use]
    pub fn event(kind: RecordKind, aux: u64) -> Self {
        Self { kind, flags: RecordFlags::default(), first: 0, count: 0, origin: Origin(0), aux }
    }

    fn encode(&self, out: &mut [u8]) {
        let head = self.kind as u64 | u64::from(self.flags.0) << 8 | self.first << 16;
        put_u64(out, 0, head);
        put_u64(out, 8, self.count);
        put_u64(out, 16, self.origin.0);
        put_u64(out, 24, self.aux);
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let head = u64_at(bytes, 0);
        let kind = RecordKind::from_u8(head as u8).ok_or(FormatError::Field("record kind"))?;
        let flags = RecordFlags((head >> 8) as u8);
        let (first, count) = (head >> 16, u64_at(bytes, 8));
        if flags.0 & !RecordFlags::KNOWN != 0 {
            return Err(FormatError::Field("record flags"));
        }
        if count > Self::BLOCK_LIMIT || first + count > Self::BLOCK_LIMIT {
            return Err(FormatError::Field("record range"));
        }
        Ok(Self { kind, flags, first, count, origin: Origin(u64_at(bytes, 16)), aux: u64_at(bytes, 24) })
    }
}

/// Where a batch lies; part of what its checksum covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlace {
    /// The segment's incarnation.
    pub incarnation: u64,
    /// Start of its header, in bytes from the start of the file.
    pub offset: u64,
}

/// A batch's header, with its records and its blocks' checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// The store's id.
    pub store: [u8; 16],
    /// Whose log.
    pub volume: VolumeId,
    /// The volume's head branch when it was written.
    pub branch: BranchId,
    /// Where it lies.
    pub place: BatchPlace,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The volume's term.
    pub term: u64,
    /// Its place in the volume's chain.
    pub ordinal: Ordinal,
    /// Checksum of the header of the batch before it.
    pub previous_crc: u32,
    /// Everything up to this ordinal was durable when this was written.
    pub durable: Ordinal,
    /// `Seq` of its first request.
    pub first_seq: Seq,
    /// The store's monotonic clock: nanoseconds since 1970.
    pub time_ns: u64,
    /// The raw wall clock: nanoseconds since 1970.
    pub wall_ns: u64,
    /// The raw boot clock: nanoseconds.
    pub boot_ns: u64,
    /// What happened, in order.
    pub records: Vec<Record>,
    /// CRC-32C of each block of the payload, in order.
    pub block_crcs: Vec<u32>,
    /// What a cut, an epoch or a store record says.
    pub body: Vec<u8>,
}

/// CRC-32C of one block of the payload.
#[must_use]
pub fn block_crc(block: &[u8]) -> u32 {
    cdp_types::crc32c([block])
}

impl BatchHeader {
    /// Length of the encoded header, padded to `alignment` bytes.
    #[must_use]
    pub fn encoded_len(records: usize, blocks: usize, body: usize, alignment: u32) -> usize {
        (BATCH_FIXED_LEN + records * RECORD_LEN + blocks * 4 + body).next_multiple_of(alignment as usize)
    }

    /// Length of the payload, in bytes.
    #[must_use]
    pub fn payload_len(&self) -> u64 {
        self.block_crcs.len() as u64 * BLOCK_SIZE
    }

    /// How many `Seq` its records take.
    #[must_use]
    pub fn seq_count(&self) -> u64 {
        self.records.iter().filter(|r| !r.flags.more()).count() as u64
    }

    /// Everything up to here was durable, by the header's word and by that of *durable* records.
    #[must_use]
    pub fn claimed(&self) -> Ordinal {
        let noted =
            self.records.iter().filter(|r| r.kind == RecordKind::Durable).map(|r| Ordinal(r.aux)).max();
        self.durable.max(noted.unwrap_or_default())
    }

    /// `Seq` of its last request, or that before its first if it has none.
    #[must_use]
    pub fn last_seq(&self) -> Seq {
        Seq((self.first_seq.0 + self.seq_count()).saturating_sub(1))
    }

    /// What a reader must know of to read it.
    fn features(&self) -> u64 {
        let is_epoch = |r: &Record| r.kind == RecordKind::Epoch;
        if self.records.iter().any(is_epoch) { FEATURE_EPOCH } else { 0 }
    }

    /// The epoch record that it carries, if it does.
    ///
    /// # Errors
    /// If its body is none.
    pub fn epoch(&self) -> Result<Option<EpochRecord>, FormatError> {
        if self.records.iter().all(|r| r.kind != RecordKind::Epoch) {
            return Ok(None);
        }
        EpochRecord::decode(&self.body).map(Some)
    }

    /// Fills `out`, whose length [`Self::encoded_len`] gave; returns the header's checksum.
    pub fn encode(&self, secret: u64, out: &mut [u8]) -> u32 {
        out.fill(0);
        out[STORE..STORE + 16].copy_from_slice(&self.store);
        put_u64(out, VOLUME, self.volume.0);
        put_u64(out, BRANCH, self.branch.0);
        put_u64(out, INCARNATION, self.place.incarnation);
        put_u64(out, OFFSET, self.place.offset);
        put_u64(out, GENERATION, self.generation.0);
        put_u64(out, TERM, self.term);
        put_u64(out, ORDINAL, self.ordinal.0);
        put_u32(out, PREVIOUS_CRC, self.previous_crc);
        put_u32(out, RECORD_COUNT, self.records.len() as u32);
        put_u64(out, DURABLE, self.durable.0);
        put_u64(out, FIRST_SEQ, self.first_seq.0);
        put_u64(out, TIME, self.time_ns);
        put_u64(out, WALL, self.wall_ns);
        put_u64(out, BOOT, self.boot_ns);
        put_u32(out, BLOCK_COUNT, self.block_crcs.len() as u32);
        put_u32(out, BODY_LEN, self.body.len() as u32);
        let (mut at, crcs_at) = (BATCH_FIXED_LEN, BATCH_FIXED_LEN + self.records.len() * RECORD_LEN);
        for record in &self.records {
            record.encode(&mut out[at..at + RECORD_LEN]);
            at += RECORD_LEN;
        }
        at = crcs_at;
        for &crc in &self.block_crcs {
            put_u32(out, at, crc);
            at += 4;
        }
        out[at..at + self.body.len()].copy_from_slice(&self.body);
        seal(out, StructureKind::Batch, self.features(), secret)
    }

    /// The length that the header at the start of `bytes` states, before anything of it is trusted.
    ///
    /// # Errors
    /// [`FormatError::Absent`] if there is none, [`FormatError::Field`] if the length cannot be.
    pub fn peek_len(bytes: &[u8]) -> Result<usize, FormatError> {
        let len = stated_length(bytes, StructureKind::Batch)?;
        if !(BATCH_FIXED_LEN..=MAX_HEADER_LEN).contains(&len) {
            return Err(FormatError::Field("header length"));
        }
        Ok(len)
    }

    /// Whether the first [`BATCH_FIXED_LEN`] bytes of a header say that it belongs to this store and lies in this place. A guest
    /// that fills its blocks with something like headers knows neither.
    #[must_use]
    pub fn says_it_is_of(bytes: &[u8], store: [u8; 16], place: BatchPlace) -> bool {
        let found = BatchPlace { incarnation: u64_at(bytes, INCARNATION), offset: u64_at(bytes, OFFSET) };
        bytes[STORE..STORE + 16] == store && found == place
    }

    /// Reads a header of exactly the length that [`Self::peek_len`] told, and checks that it lies where it says.
    /// Returns it with its checksum.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8], secret: u64, place: BatchPlace) -> Result<(Self, u32), FormatError> {
        Self::peek_len(bytes)?;
        let crc = unseal(bytes, StructureKind::Batch, secret)?;
        let found = BatchPlace { incarnation: u64_at(bytes, INCARNATION), offset: u64_at(bytes, OFFSET) };
        if found != place {
            return Err(FormatError::Field("place"));
        }
        let counts = [RECORD_COUNT, BLOCK_COUNT, BODY_LEN].map(|at| u32_at(bytes, at) as usize);
        let [records, blocks, body_len] = counts;
        let crcs_at = BATCH_FIXED_LEN + records * RECORD_LEN;
        let body_at = crcs_at + blocks * 4;
        if body_at + body_len > bytes.len() {
            return Err(FormatError::Field("record, block or body count"));
        }
        let encoded = bytes[BATCH_FIXED_LEN..crcs_at].chunks_exact(RECORD_LEN);
        // Many are kept while a log is recovered, and most of them are short.
        let mut records = Vec::with_capacity(encoded.len());
        for record in encoded {
            records.push(Record::decode(record)?);
        }
        let stored: u64 = records.iter().filter(|r| r.kind.has_payload()).map(|r| r.count).sum();
        if stored != blocks as u64 || records.last().is_some_and(|r| r.flags.more()) {
            return Err(FormatError::Field("block count"));
        }
        let mut store = [0; 16];
        store.copy_from_slice(&bytes[STORE..STORE + 16]);
        let header = Self {
            store,
            volume: VolumeId(u64_at(bytes, VOLUME)),
            branch: BranchId(u64_at(bytes, BRANCH)),
            place,
            generation: Generation(u64_at(bytes, GENERATION)),
            term: u64_at(bytes, TERM),
            ordinal: Ordinal(u64_at(bytes, ORDINAL)),
            previous_crc: u32_at(bytes, PREVIOUS_CRC),
            durable: Ordinal(u64_at(bytes, DURABLE)),
            first_seq: Seq(u64_at(bytes, FIRST_SEQ)),
            time_ns: u64_at(bytes, TIME),
            wall_ns: u64_at(bytes, WALL),
            boot_ns: u64_at(bytes, BOOT),
            records,
            block_crcs: bytes[crcs_at..body_at].chunks_exact(4).map(|c| u32_at(c, 0)).collect(),
            body: bytes[body_at..body_at + body_len].to_vec(),
        };
        Ok((header, crc))
    }
}

/// The body of a cut: where the log that goes on here had ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Checksum of the header of the last batch that counts; 0 if there is none.
    pub last_crc: u32,
    /// Ordinal of that batch.
    pub last: Ordinal,
    /// Where that batch lies; all zero if there is none.
    pub place: BatchPlace,
}

impl Cut {
    /// Its length, in bytes.
    pub const LEN: usize = 32;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; Self::LEN];
        put_u32(&mut out, 0, self.last_crc);
        put_u64(&mut out, 8, self.last.0);
        put_u64(&mut out, 16, self.place.incarnation);
        put_u64(&mut out, 24, self.place.offset);
        out
    }

    /// From a batch's body.
    ///
    /// # Errors
    /// If it is no cut.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() != Self::LEN {
            return Err(FormatError::Field("cut length"));
        }
        Ok(Self {
            last_crc: u32_at(bytes, 0),
            last: Ordinal(u64_at(bytes, 8)),
            place: BatchPlace { incarnation: u64_at(bytes, 16), offset: u64_at(bytes, 24) },
        })
    }
}
