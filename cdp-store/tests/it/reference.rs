//! What a volume must hold: every request that was made, and the order in which the log says they happened.

use std::collections::BTreeMap;

use cdp_types::{BLOCK_SIZE, ByteRange, IoBuf, Op, Origin, Ranges, Seq};

use crate::content::{SECTOR, Stamp, fill};

const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / SECTOR as u64;

/// A half-open range of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sectors {
    /// First sector.
    pub first: u64,
    /// Number of sectors.
    pub count: u64,
}

impl Sectors {
    /// The same range in bytes.
    pub fn bytes(self) -> ByteRange {
        ByteRange::new(self.first * SECTOR as u64, self.count * SECTOR as u64)
    }

    fn end(self) -> u64 {
        self.first + self.count
    }

    /// Those of its sectors whose whole blocks lie in it.
    fn whole_blocks(self) -> Self {
        let first = self.first.next_multiple_of(SECTORS_PER_BLOCK);
        let end = self.end() / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
        Self { first, count: end.saturating_sub(first) }
    }

    fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// What a request changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Data.
    Write(Sectors),
    /// Zeroes, edges included.
    Zero(Vec<Sectors>, bool),
    /// Whole blocks of zeroes.
    Discard(Vec<Sectors>),
}

/// A request that changes data.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its number; sector `i` of a write gets the stamp `number << 16 | i + 1`.
    pub number: u64,
    /// What it does.
    pub change: Change,
    /// Whether it is durable once it completes.
    pub fua: bool,
}

impl Request {
    fn stamp(&self, index: u64) -> Stamp {
        self.number << 16 | (index + 1)
    }

    /// As a front end submits it.
    pub fn op(&self, origin: Origin) -> Op {
        let ranges = |list: &[Sectors]| list.iter().map(|s| s.bytes()).collect::<Ranges>();
        match &self.change {
            Change::Write(sectors) => {
                let mut bytes = vec![0; sectors.bytes().len as usize];
                for (index, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
                    fill(self.stamp(index as u64), sector);
                }
                let from = IoBuf::from_bytes(&bytes);
                Op::Write { offset: sectors.bytes().offset, from, origin, fua: self.fua }
            }
            Change::Zero(list, unmap) => {
                Op::WriteZeroes { ranges: ranges(list), unmap: *unmap, origin, fua: self.fua }
            }
            Change::Discard(list) => Op::Discard { ranges: ranges(list), origin },
        }
    }

    /// Calls `f(sector, stamp)` for each sector that it changes.
    pub fn each(&self, mut f: impl FnMut(u64, Stamp)) {
        match &self.change {
            Change::Write(sectors) => (0..sectors.count).for_each(|i| f(sectors.first + i, self.stamp(i))),
            Change::Zero(list, _) => {
                list.iter().for_each(|s| (s.first..s.end()).for_each(|sector| f(sector, 0)))
            }
            Change::Discard(list) => {
                list.iter()
                    .map(|s| s.whole_blocks())
                    .for_each(|s| (s.first..s.end()).for_each(|sector| f(sector, 0)));
            }
        }
    }

    /// Whether it changes nothing, so that no record of it is kept: a discard of parts of blocks.
    pub fn is_void(&self) -> bool {
        match &self.change {
            Change::Discard(list) => list.iter().all(|s| s.whole_blocks().count == 0),
            Change::Write(_) | Change::Zero(..) => false,
        }
    }

    /// Whether it changes any sector of a range.
    pub fn touches(&self, range: Sectors) -> bool {
        match &self.change {
            Change::Write(sectors) => sectors.overlaps(range),
            Change::Zero(list, _) => list.iter().any(|s| s.overlaps(range)),
            Change::Discard(list) => list.iter().any(|s| s.whole_blocks().overlaps(range)),
        }
    }
}

/// The content of a volume's sectors as of one instant; what is not in it is zeroes.
pub type Image = BTreeMap<u64, Stamp>;

/// The image that requests make of one, in order.
pub fn replay<'a>(mut image: Image, requests: impl IntoIterator<Item = &'a Request>) -> Image {
    for request in requests {
        request.each(|sector, stamp| match stamp {
            0 => drop(image.remove(&sector)),
            _ => drop(image.insert(sector, stamp)),
        });
    }
    image
}

/// One request of a log, as [`cdp_store::Volume::records`] tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Its place in the order of the store.
    pub seq: Seq,
    /// Which request.
    pub origin: Origin,
    /// When, on the store's clock.
    pub time_ns: u64,
}

/// The requests in a volume's log, in the order of the log.
///
/// # Panics
/// If the log cannot be read, or does not keep to the order of `Seq`.
pub fn logged(volume: &cdp_store::Volume, from: Seq) -> Vec<Logged> {
    try_logged(volume, from).unwrap()
}

/// The same, where the log may not be readable.
pub fn try_logged(volume: &cdp_store::Volume, from: Seq) -> Result<Vec<Logged>, cdp_store::Error> {
    let mut list: Vec<Logged> = Vec::new();
    let mut newest = Seq::ZERO;
    let read = volume.records(from, Seq::MAX, &mut |record| {
        assert!(record.seq >= newest, "invariant 2 violated: Seq {} comes after {newest}", record.seq);
        newest = record.seq;
        let repeats = list.last().is_some_and(|last| last.seq == record.seq);
        if record.origin.0 != 0 && !repeats {
            list.push(Logged { seq: record.seq, origin: record.origin, time_ns: record.time_ns });
        }
        true
    });
    read.map(|()| list)
}
