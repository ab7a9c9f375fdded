//! What a chain asks for (virtio 1.3, 5.2.6).

use cdp_types::{BlockDevice, ByteRange, IoError, IoErrorKind, Op, Origin, Ranges, SECTOR_SIZE};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::chain::Chain;
use crate::config::{MAX_RANGES, MAX_REQUEST_BYTES};
use crate::guest::{GuestMemory, GuestRange};

/// What the guest is told of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

impl From<&Result<(), IoError>> for Status {
    fn from(result: &Result<(), IoError>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(error) if error.kind() == IoErrorKind::Unsupported => Self::Unsupported,
            Err(_) => Self::IoError,
        }
    }
}

/// The types of requests, as they are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    #[default]
    Unknown,
}

/// What is to be done with a request.
pub(crate) enum Action {
    /// The device does it.
    Submit(Op),
    /// The disk's name is written into the request's memory, and it is answered.
    Identify,
    /// It is answered at once; the text says what the guest did wrong.
    Answer(Status, &'static str),
}

/// The fixed part at the start of each request.
const HEADER_LEN: u64 = 16;
/// One range of a discard or write-zeroes request.
const RANGE_LEN: u64 = 16;
/// Bytes of the answer to GET_ID.
pub(crate) const ID_LEN: usize = 20;

/// What follows from the features that were negotiated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Durability {
    /// Whether each write must be durable before it is answered.
    pub(crate) write_through: bool,
}

/// Reads what the chain asks for. Nothing is written to guest memory; data that is to be written to the disk is copied
/// by the device when the request is submitted.
pub(crate) fn parse(
    chain: &Chain,
    memory: &GuestMemory,
    durability: Durability,
    origin: Origin,
) -> (Kind, Action) {
    let refuse = |why| (Kind::Unknown, Action::Answer(Status::IoError, why));
    if let Some(fault) = chain.fault {
        return refuse(fault);
    }
    let mut header = [0; HEADER_LEN as usize];
    if chain.readable_len < HEADER_LEN || !memory.read(&chain.readable, 0, &mut header) {
        return refuse("a header of less than 16 bytes");
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let fua = durability.write_through;
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => (Kind::Read, read(chain, memory, sector)),
        VIRTIO_BLK_T_OUT => (Kind::Write, write(chain, memory, sector, origin, fua)),
        VIRTIO_BLK_T_FLUSH => (Kind::Flush, Action::Submit(Op::Flush)),
        VIRTIO_BLK_T_GET_ID => (Kind::GetId, Action::Identify),
        VIRTIO_BLK_T_DISCARD => {
            let op = ranges(chain, memory, 0).map(|(ranges, _)| Op::Discard { ranges, origin });
            (Kind::Discard, op.map_or_else(|answer| answer, Action::Submit))
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let op = ranges(chain, memory, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
            let op = op.map(|(ranges, flags)| Op::WriteZeroes { ranges, unmap: flags != 0, origin, fua });
            (Kind::WriteZeroes, op.map_or_else(|answer| answer, Action::Submit))
        }
        _ => (Kind::Unknown, Action::Answer(Status::Unsupported, "a request of an unknown type")),
    }
}

/// The byte offset of a request's data of `len` bytes.
fn place(sector: u64, len: u64) -> Result<u64, Action> {
    let refuse = |why| Err(Action::Answer(Status::IoError, why));
    match sector.checked_mul(SECTOR_SIZE) {
        None => refuse("a sector past the end of every disk"),
        Some(_) if len == 0 => refuse("a request without data"),
        Some(_) if len > MAX_REQUEST_BYTES => refuse("too much data"),
        Some(offset) => Ok(offset),
    }
}

fn read(chain: &Chain, memory: &GuestMemory, sector: u64) -> Action {
    // The last writable byte is the status.
    let len = chain.writable_len.saturating_sub(1);
    match place(sector, len) {
        Err(answer) => answer,
        Ok(offset) => match memory.buffer(&chain.writable, 0, len) {
            Some(into) => Action::Submit(Op::Read { offset, into }),
            None => Action::Answer(Status::IoError, "a buffer outside guest memory"),
        },
    }
}

fn write(chain: &Chain, memory: &GuestMemory, sector: u64, origin: Origin, fua: bool) -> Action {
    let len = chain.readable_len - HEADER_LEN;
    match place(sector, len) {
        Err(answer) => answer,
        Ok(offset) => match memory.buffer(&chain.readable, HEADER_LEN, len) {
            Some(from) => Action::Submit(Op::Write { offset, from, origin, fua }),
            None => Action::Answer(Status::IoError, "a buffer outside guest memory"),
        },
    }
}

/// Writes the disk's name, padded with zeroes, into a request's memory; a buffer that is too short gets its beginning.
/// The last of the bytes is the status.
pub(crate) fn identify(
    writable: &[GuestRange],
    writable_len: u32,
    memory: &GuestMemory,
    device: &dyn BlockDevice,
) -> Status {
    let mut id = [0; ID_LEN];
    let serial = device.info().serial;
    let kept = serial.len().min(ID_LEN);
    id[..kept].copy_from_slice(&serial.as_bytes()[..kept]);
    let len = (writable_len.saturating_sub(1) as usize).min(ID_LEN);
    if memory.write(writable, &id[..len]) { Status::Ok } else { Status::IoError }
}

/// The ranges of a discard or write-zeroes request, and the flags that all of them have; those that are not in
/// `allowed` are not supported.
fn ranges(chain: &Chain, memory: &GuestMemory, allowed: u32) -> Result<(Ranges, u32), Action> {
    let refuse = |status, why| Err(Action::Answer(status, why));
    let len = chain.readable_len - HEADER_LEN;
    if len == 0 || !len.is_multiple_of(RANGE_LEN) || len > u64::from(MAX_RANGES) * RANGE_LEN {
        return refuse(Status::IoError, "a list of ranges of a wrong length");
    }
    let mut ranges = Ranges::new();
    let mut common = allowed;
    for index in 0..len / RANGE_LEN {
        let mut bytes = [0; RANGE_LEN as usize];
        if !memory.read(&chain.readable, HEADER_LEN + index * RANGE_LEN, &mut bytes) {
            return refuse(Status::IoError, "a buffer outside guest memory");
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !allowed != 0 {
            return refuse(Status::Unsupported, "flags of ranges that are not supported");
        }
        common &= flags;
        if count == 0 {
            return refuse(Status::IoError, "an empty range");
        }
        match sector.checked_mul(SECTOR_SIZE) {
            Some(offset) => ranges.push(ByteRange::new(offset, u64::from(count) * SECTOR_SIZE)),
            None => return refuse(Status::IoError, "a sector past the end of every disk"),
        }
    }
    Ok((ranges, common))
}
