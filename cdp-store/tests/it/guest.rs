//! What guests do at random, and what a volume must remember of it.

use std::collections::{BTreeMap, BTreeSet};

use cdp_types::{Label, Origin, Seq, VolumeName};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::reference::{Change, Image, Logged, Request, Sectors, replay};

/// Blocks of a new volume: a little more than two leaves of the map.
pub const VOLUME_BLOCKS: u64 = 1040;
/// First blocks of the areas that guests use; leaves of the map meet in two of them.
pub const AREAS: [u64; 3] = [0, 504, 1016];
/// Blocks of each area.
pub const AREA_BLOCKS: u64 = 16;
const SECTORS_PER_BLOCK: u64 = 8;

/// How a request stands, as its guest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// No completion has been seen.
    InFlight,
    /// Its guest went away and does not ask after it.
    Abandoned,
    /// It completed without an error.
    Acknowledged,
    /// It completed with an error.
    Failed,
    /// It completed with an error of a volume that takes no writes any more: the store could neither make it durable nor
    /// record that it does not count.
    Undecided,
    /// A recovered log did not have it: it must never come back.
    Dead,
}

/// A request, and what is known of it.
#[derive(Clone, Debug)]
pub struct Tracked {
    /// The request.
    pub request: Request,
    /// How it stands.
    pub fate: Fate,
    /// When it was submitted, on the machine's count of events.
    pub submitted: u64,
    /// When its completion was seen; `u64::MAX` before.
    pub completed: u64,
    /// A completed flush covers it.
    pub flushed: bool,
    /// A crash found it in flight: a guest may ask after it.
    pub orphaned: bool,
}

/// What a volume must remember.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Its size, in blocks.
    pub blocks: u64,
    /// Sectors in one logical block.
    pub unit: u64,
    /// Every request that was ever made.
    pub requests: BTreeMap<Origin, Tracked>,
    /// The log, as the last opening found it.
    pub order: Vec<Logged>,
    /// Named instants.
    pub marks: BTreeMap<Label, Seq>,
    /// What it held when it was made: a clone's history begins with it.
    pub base: Image,
    /// How it was reverted, oldest first. The first branch is number 0, and each of these begins another one.
    pub forks: Vec<Fork>,
    /// The numbers of branches that were deleted.
    pub deleted: BTreeSet<usize>,
    /// The clones that were made of it, or were to be, and of which instants.
    pub clones: Vec<(VolumeName, Seq)>,
}

/// One revert of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The new branch's first instant.
    pub start: Seq,
    /// When that was.
    pub time_ns: u64,
    /// The instant that the volume went back to.
    pub to: Seq,
}

impl Memory {
    /// Of a new volume, which is addressed in this many sectors.
    pub fn new(unit: u64) -> Self {
        Self {
            blocks: VOLUME_BLOCKS,
            unit,
            requests: BTreeMap::new(),
            order: Vec::new(),
            marks: BTreeMap::new(),
            base: Image::new(),
            forks: Vec::new(),
            deleted: BTreeSet::new(),
            clones: Vec::new(),
        }
    }

    /// Whether a request's effect is there at an instant: its own branch leads there, not one that was left behind.
    pub fn counts(&self, request: Seq, at: Seq) -> bool {
        let mut end = at;
        for fork in self.forks.iter().rev().filter(|f| f.start <= at) {
            if fork.start > end {
                continue;
            }
            if request >= fork.start {
                return request <= end;
            }
            end = fork.to;
        }
        request <= end
    }

    /// The last instant at or before a time.
    pub fn floor_time(&self, log: &[Logged], time_ns: u64) -> Seq {
        let requests = log.iter().filter(|l| l.time_ns <= time_ns).map(|l| l.seq);
        let forks = self.forks.iter().filter(|f| f.time_ns <= time_ns).map(|f| f.start);
        requests.chain(forks).max().unwrap_or(Seq::ZERO)
    }

    /// Everything that has completed, in no order.
    pub fn acknowledged(&self) -> Vec<Origin> {
        let done = self.requests.iter().filter(|(_, t)| t.fate == Fate::Acknowledged);
        done.map(|(&origin, _)| origin).collect()
    }

    /// A flush that covers these has completed.
    pub fn flushed(&mut self, origins: &[Origin]) {
        for origin in origins {
            if let Some(tracked) = self.requests.get_mut(origin) {
                tracked.flushed = true;
            }
        }
    }

    /// The image at an instant, given the volume's log.
    pub fn image(&self, log: &[Logged], at: Seq) -> Image {
        let requests =
            log.iter().filter(|l| self.counts(l.seq, at)).filter_map(|l| self.requests.get(&l.origin));
        replay(self.base.clone(), requests.map(|t| &t.request))
    }
}

/// The sectors of an area.
pub fn area(index: usize) -> Sectors {
    Sectors { first: AREAS[index] * SECTORS_PER_BLOCK, count: AREA_BLOCKS * SECTORS_PER_BLOCK }
}

/// Some sectors of one area.
pub fn some_sectors(rng: &mut SmallRng, unit: u64, longest: u64) -> Sectors {
    let area = area(rng.random_range(0..AREAS.len()));
    let units = area.count / unit;
    let count = rng.random_range(1..=(longest / unit).clamp(1, units));
    let first = rng.random_range(0..=units - count);
    Sectors { first: area.first + first * unit, count: count * unit }
}

/// All from somewhere in one area to somewhere in a later one: whole nodes of the map lie in it.
fn large_sectors(rng: &mut SmallRng, unit: u64) -> Sectors {
    let from = some_sectors(rng, unit, unit);
    let until = some_sectors(rng, unit, unit);
    let (first, last) = (from.first.min(until.first), from.first.max(until.first));
    Sectors { first, count: last + unit - first }
}

/// Some request of at most `most` sectors, for a volume that is addressed in `unit` sectors.
pub fn some_request(rng: &mut SmallRng, unit: u64, most: u64, number: u64) -> Request {
    let longest = [1, 8, 24, 48, 128][rng.random_range(0..5)].min(most);
    let whole = rng.random_bool(0.4);
    let unit = if whole { SECTORS_PER_BLOCK } else { unit };
    let change = match rng.random_range(0..20) {
        0..15 => Change::Write(some_sectors(rng, unit, longest)),
        15..18 => {
            let count = rng.random_range(1..=3);
            let ranges = (0..count).map(|_| some_sectors(rng, unit, longest)).collect();
            if rng.random() { Change::Zero(ranges, rng.random()) } else { Change::Discard(ranges) }
        }
        _ if rng.random() => Change::Zero(vec![large_sectors(rng, unit)], rng.random()),
        _ => Change::Discard(vec![large_sectors(rng, unit)]),
    };
    let fua = !matches!(change, Change::Discard(_)) && rng.random_bool(0.1);
    Request { number, change, fua }
}
