//! The region in which the front end keeps, for us, which requests are in flight (vhost-user, "Inflight I/O
//! tracking"). It outlives this process, so that a restarted one neither loses nor repeats a request.
//!
//! # Layout
//! One part for each queue, at multiples of [`queue_len`], as the specification has it for split virtqueues:
//! ```text
//!  0  u64 features         0
//!  8  u16 version          1; 0 is a part never used
//! 10  u16 desc_num         entries
//! 12  u16 last_batch_head  newest request of the last batch that was reported
//! 14  u16 used_idx         index of the used ring, once the batch's entries are cleared
//! 16  desc_num entries of 16 bytes:
//!      0  u8  inflight     1 from when the request is taken until it was reported
//!      6  u16 next         the request before it in its batch
//!      8  u64 counter      the request's number; here its `Origin`
//! ```
//! Behind the parts, at a multiple of 64, lies a trailer of our own, which the specification leaves room for:
//! ```text
//!  0  u64 magic            "HSINFLT1"
//!  8  16 bytes             the store
//! 24  u64 volume
//! 32  u64 branch
//! 40  u8  write-through    1 while the guest has the write cache turned off, or may have
//! ```
//! All numbers are in the machine's byte order: the region never leaves the machine.
//!
//! # Crashes
//! Each step is one store to shared memory, in program order, so a killed process leaves a prefix of them.
//!
//! Taking a request: (1) counter, (2) inflight = 1, (3) the device gets it. Killed before 2: it is still the next
//! one in the available ring. After 2: it is found in flight. Requests are marked in the order in which they are taken,
//! so the ring position up to which they were taken is `used + number in flight`, whatever order they ended in.
//!
//! Reporting a batch: (1) the used entries, (2) for each request `next` and `last_batch_head`, (3) the used index,
//! (4) inflight = 0 for each, (5) `used_idx`. Killed before 3: none was reported, all are found in flight. Killed between
//! 3 and 5: the index differs from `used_idx` by the size of the batch, and the list from `last_batch_head` names its
//! requests: recovery does 4 and 5. A request that is found in flight although the device had finished it is
//! recognised by its number in the log, and only reported.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use cdp_types::{BranchId, DeviceIdentity, Origin, VolumeId};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

const VERSION: u16 = 1;
const MAGIC: u64 = u64::from_le_bytes(*b"HSINFLT1");
const ALIGNMENT: usize = 64;
const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 16;
const TRAILER_LEN: usize = 64;

// Offsets, as above.
const QUEUE_VERSION: usize = 8;
const QUEUE_ENTRIES: usize = 10;
const QUEUE_LAST_BATCH_HEAD: usize = 12;
const QUEUE_USED: usize = 14;
const ENTRY_INFLIGHT: usize = 0;
const ENTRY_NEXT: usize = 6;
const ENTRY_COUNTER: usize = 8;
const TRAILER_MAGIC: usize = 0;
const TRAILER_STORE: usize = 8;
const TRAILER_VOLUME: usize = 24;
const TRAILER_BRANCH: usize = 32;
const TRAILER_WRITE_THROUGH: usize = 40;

const _: () = {
    // The mirror of the specification's structures in the vhost crate agrees.
    use vhost::vhost_user::message::{DescStateSplit, QueueRegionSplit};
    assert!(size_of::<DescStateSplit>() == ENTRY_LEN);
    assert!(std::mem::offset_of!(DescStateSplit, inflight) == ENTRY_INFLIGHT);
    assert!(std::mem::offset_of!(DescStateSplit, next) == ENTRY_NEXT);
    assert!(std::mem::offset_of!(DescStateSplit, counter) == ENTRY_COUNTER);
    assert!(std::mem::offset_of!(QueueRegionSplit, version) == QUEUE_VERSION);
    assert!(std::mem::offset_of!(QueueRegionSplit, desc_num) == QUEUE_ENTRIES);
    assert!(std::mem::offset_of!(QueueRegionSplit, last_batch_head) == QUEUE_LAST_BATCH_HEAD);
    assert!(std::mem::offset_of!(QueueRegionSplit, used_idx) == QUEUE_USED);
};

/// Bytes of one queue's part.
fn queue_len(queue_size: u16) -> usize {
    (HEADER_LEN + ENTRY_LEN * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Bytes of a region.
pub(crate) fn region_len(queues: u16, queue_size: u16) -> u64 {
    (queue_len(queue_size) * usize::from(queues) + TRAILER_LEN) as u64
}

/// Whose requests a region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum History {
    /// This disk's present history, or nobody's yet.
    Ours,
    /// Another history: the disk has been reverted or exchanged under the guest.
    Foreign,
}

/// A mapped region.
pub(crate) struct InflightRegion {
    mapping: MmapRegion,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Makes the file of a new region, empty, for this history.
    pub(crate) fn create(
        queues: u16,
        queue_size: u16,
        identity: &DeviceIdentity,
        write_through: bool,
    ) -> io::Result<File> {
        let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(region_len(queues, queue_size))?;
        // Whoever gets the descriptor cannot cut the file short under our feet.
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let region = Self::map(file.try_clone()?, 0, region_len(queues, queue_size), queues, queue_size)?;
        region.stamp(identity);
        region.set_write_through(write_through);
        Ok(file)
    }

    /// Maps a region that the front end has kept.
    pub(crate) fn map(file: File, offset: u64, len: u64, queues: u16, queue_size: u16) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let end = offset.checked_add(len).ok_or_else(|| invalid("the region's bounds overflow"))?;
        let needed = region_len(queues, queue_size);
        if len < needed {
            return Err(invalid("the region is smaller than its queues need"));
        }
        if file.metadata()?.len() < end {
            return Err(invalid("the region's file is shorter than the region"));
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), needed as usize);
        Ok(Self { mapping: mapping.map_err(io::Error::other)?, queues, queue_size })
    }

    /// Whose requests it holds. A region that nobody has used becomes this history's.
    pub(crate) fn claim(&self, identity: &DeviceIdentity) -> History {
        if self.trailer64(TRAILER_MAGIC).load(Ordering::Acquire) != MAGIC {
            let used = |queue| self.queue_field(queue, QUEUE_VERSION).load(Ordering::Acquire) != 0;
            if (0..self.queues).any(used) {
                return History::Foreign;
            }
            self.stamp(identity);
        }
        if self.identity() == *identity { History::Ours } else { History::Foreign }
    }

    /// Whether the guest has the write cache turned off; kept here because no front end tells it again.
    pub(crate) fn write_through(&self) -> bool {
        self.write_through_byte().load(Ordering::Acquire) == 1
    }

    pub(crate) fn set_write_through(&self, on: bool) {
        self.write_through_byte().store(on.into(), Ordering::Release);
    }

    fn stamp(&self, identity: &DeviceIdentity) {
        for (word, bytes) in identity.store.chunks_exact(8).enumerate() {
            let bytes = bytes.try_into().unwrap_or_default();
            self.trailer64(TRAILER_STORE + 8 * word).store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        self.trailer64(TRAILER_VOLUME).store(identity.volume.0, Ordering::Relaxed);
        self.trailer64(TRAILER_BRANCH).store(identity.branch.0, Ordering::Relaxed);
        self.trailer64(TRAILER_MAGIC).store(MAGIC, Ordering::Release);
    }

    fn identity(&self) -> DeviceIdentity {
        let word = |at| self.trailer64(at).load(Ordering::Relaxed);
        let mut store = [0; 16];
        store[..8].copy_from_slice(&word(TRAILER_STORE).to_ne_bytes());
        store[8..].copy_from_slice(&word(TRAILER_STORE + 8).to_ne_bytes());
        DeviceIdentity {
            store,
            volume: VolumeId(word(TRAILER_VOLUME)),
            branch: BranchId(word(TRAILER_BRANCH)),
        }
    }

    fn trailer(&self) -> usize {
        queue_len(self.queue_size) * usize::from(self.queues)
    }

    fn trailer64(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `trailer() + at + 8` is within `region_len`, which is mapped while `self` lives; both are multiples of
        // 8 in a mapping that begins on a page; every process accesses the region atomically.
        unsafe { AtomicU64::from_ptr(self.at(self.trailer() + at).cast()) }
    }

    fn write_through_byte(&self) -> &AtomicU8 {
        // SAFETY: as in `trailer64`, for one byte.
        unsafe { AtomicU8::from_ptr(self.at(self.trailer() + TRAILER_WRITE_THROUGH)) }
    }

    /// A field of a queue's header; `queue` is below `queues`.
    fn queue_field(&self, queue: u16, at: usize) -> &AtomicU16 {
        // SAFETY: as in `trailer64`: a queue's header is inside the mapping, `at` is even and below 16.
        unsafe { AtomicU16::from_ptr(self.at(queue_len(self.queue_size) * usize::from(queue) + at).cast()) }
    }

    fn entry(&self, queue: u16, head: u16) -> *mut u8 {
        assert!(queue < self.queues && head < self.queue_size, "a caller's bug: no such entry");
        self.at(queue_len(self.queue_size) * usize::from(queue) + HEADER_LEN + ENTRY_LEN * usize::from(head))
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.mapping.as_ptr().wrapping_add(offset)
    }
}

/// A request that was in flight when a process died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unfinished {
    pub(crate) origin: Origin,
    pub(crate) head: u16,
}

/// One queue's part of a region; only the queue's thread changes it.
pub(crate) struct InflightQueue {
    region: Arc<InflightRegion>,
    queue: u16,
}

/// What was found at the start of a ring.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nobody has used this part.
    New,
    /// What was in flight, in the order in which it was taken; it may be nothing.
    Requests(Vec<Unfinished>),
    /// It does not belong to this ring: the ring has been set up anew since. It was made new.
    Stale,
}

impl InflightQueue {
    /// The part of a queue; none if the region has none, or not for rings of this size.
    pub(crate) fn new(region: Arc<InflightRegion>, queue: u16, ring_size: u16) -> Option<Self> {
        (queue < region.queues && ring_size <= region.queue_size).then_some(Self { region, queue })
    }

    /// Whether the region belongs to this history.
    pub(crate) fn is_of(&self, identity: &DeviceIdentity) -> bool {
        self.region.identity() == *identity
    }

    /// Finishes the batch that a dead process was reporting, and lists what it had in flight.
    pub(crate) fn recover(&self, used: u16) -> Found {
        let size = self.region.queue_size;
        if self.field(QUEUE_VERSION).load(Ordering::Acquire) == 0 {
            self.reset(used);
            return Found::New;
        }
        let batch = used.wrapping_sub(self.field(QUEUE_USED).load(Ordering::Acquire));
        if batch > size || self.field(QUEUE_ENTRIES).load(Ordering::Acquire) != size {
            self.reset(used);
            return Found::Stale;
        }
        let mut head = self.field(QUEUE_LAST_BATCH_HEAD).load(Ordering::Acquire);
        for _ in 0..batch {
            if head >= size {
                self.reset(used);
                return Found::Stale;
            }
            self.inflight(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Acquire);
        }
        self.field(QUEUE_USED).store(used, Ordering::Release);

        let taken = (0..size).filter(|&head| self.inflight(head).load(Ordering::Acquire) == 1);
        let mut requests: Vec<_> = taken
            .map(|head| Unfinished { origin: Origin(self.counter(head).load(Ordering::Acquire)), head })
            .collect();
        requests.sort_unstable();
        Found::Requests(requests)
    }

    /// Notes that the request at `head` is taken, before the device gets it.
    pub(crate) fn begin(&self, head: u16, origin: Origin) {
        self.counter(head).store(origin.0, Ordering::Relaxed);
        self.inflight(head).store(1, Ordering::Release);
    }

    /// Adds the request to the batch that is about to be reported.
    pub(crate) fn link(&self, head: u16) {
        let last = self.field(QUEUE_LAST_BATCH_HEAD);
        self.next(head).store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
    }

    /// Notes that the batch has been reported, with the used ring's index as it is now.
    pub(crate) fn end(&self, heads: impl Iterator<Item = u16>, used: u16) {
        heads.for_each(|head| self.inflight(head).store(0, Ordering::Release));
        self.field(QUEUE_USED).store(used, Ordering::Release);
    }

    fn reset(&self, used: u16) {
        self.field(QUEUE_VERSION).store(0, Ordering::Release);
        for head in 0..self.region.queue_size {
            self.inflight(head).store(0, Ordering::Release);
        }
        self.field(QUEUE_ENTRIES).store(self.region.queue_size, Ordering::Release);
        self.field(QUEUE_LAST_BATCH_HEAD).store(0, Ordering::Release);
        self.field(QUEUE_USED).store(used, Ordering::Release);
        self.field(QUEUE_VERSION).store(VERSION, Ordering::Release);
    }

    fn field(&self, at: usize) -> &AtomicU16 {
        self.region.queue_field(self.queue, at)
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: `entry` lies in the region's mapping, which lives as long as `self`; every process accesses it
        // atomically.
        unsafe { AtomicU8::from_ptr(self.region.entry(self.queue, head).add(ENTRY_INFLIGHT)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: as in `inflight`; the entry is aligned to 16 bytes and the offset is even.
        unsafe { AtomicU16::from_ptr(self.region.entry(self.queue, head).add(ENTRY_NEXT).cast()) }
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `inflight`; the entry is aligned to 16 bytes and the offset is a multiple of 8.
        unsafe { AtomicU64::from_ptr(self.region.entry(self.queue, head).add(ENTRY_COUNTER).cast()) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn identity(branch: u64) -> DeviceIdentity {
        DeviceIdentity { store: [7; 16], volume: VolumeId(3), branch: BranchId(branch) }
    }

    fn region() -> (Arc<InflightRegion>, File) {
        let file = InflightRegion::create(2, 8, &identity(1), false).unwrap();
        (Arc::new(map(&file).unwrap()), file)
    }

    fn map(file: &File) -> io::Result<InflightRegion> {
        InflightRegion::map(file.try_clone().unwrap(), 0, region_len(2, 8), 2, 8)
    }

    fn requests(list: &[(u64, u16)]) -> Found {
        Found::Requests(
            list.iter().map(|&(origin, head)| Unfinished { origin: Origin(origin), head }).collect(),
        )
    }

    /// Every store of one batch of three is a place to die. Whatever the place, the requests found in flight are
    /// those that the used index does not cover.
    #[test]
    fn dying_between_any_two_stores_loses_and_repeats_nothing() {
        for died_after in 0..=8 {
            let (region, _file) = region();
            let queue = InflightQueue::new(region, 1, 8).unwrap();
            let mut used = 65_534;
            assert_eq!(queue.recover(used), Found::New);
            for (origin, head) in [(10, 5), (11, 0), (12, 3), (13, 7)] {
                queue.begin(head, Origin(origin));
            }
            let batch = [3, 5, 7];
            let mut steps = 0;
            let mut alive = || {
                steps += 1;
                steps <= died_after
            };
            let died = 'dying: {
                for head in batch {
                    if !alive() {
                        break 'dying true;
                    }
                    queue.link(head);
                }
                if !alive() {
                    break 'dying true;
                }
                used = 1; // 65534 + 3
                for head in batch {
                    if !alive() {
                        break 'dying true;
                    }
                    queue.inflight(head).store(0, Ordering::Release);
                }
                if !alive() {
                    break 'dying true;
                }
                queue.end([].into_iter(), used);
                false
            };
            assert_eq!(died, died_after < 8);
            let expected = if used == 1 {
                requests(&[(11, 0)])
            } else {
                requests(&[(10, 5), (11, 0), (12, 3), (13, 7)])
            };
            assert_eq!(queue.recover(used), expected, "died after {died_after} stores");
            assert_eq!(queue.recover(used), expected, "recovering twice");
        }
    }

    #[test]
    fn a_ring_that_was_set_up_anew_does_not_get_the_old_requests() {
        let (region, _file) = region();
        let queue = InflightQueue::new(region, 0, 8).unwrap();
        assert_eq!(queue.recover(100), Found::New);
        queue.begin(1, Origin(1));
        assert_eq!(queue.recover(0), Found::Stale);
        assert_eq!(queue.recover(0), requests(&[]));
    }

    #[test]
    fn a_list_that_leads_nowhere_is_not_followed() {
        let (region, _file) = region();
        let queue = InflightQueue::new(region, 0, 8).unwrap();
        assert_eq!(queue.recover(0), Found::New);
        queue.field(QUEUE_LAST_BATCH_HEAD).store(9, Ordering::Release);
        assert_eq!(queue.recover(1), Found::Stale);
    }

    #[test]
    fn a_region_knows_its_history_and_its_write_cache() {
        let (region, file) = region();
        assert_eq!(region.claim(&identity(1)), History::Ours);
        assert_eq!(region.claim(&identity(2)), History::Foreign);
        region.set_write_through(true);
        assert!(map(&file).unwrap().write_through());

        // A region from elsewhere: ours as long as nobody has used it.
        let blank = File::from(memfd_create("blank", MemfdFlags::CLOEXEC).unwrap());
        blank.set_len(region_len(2, 8)).unwrap();
        let used = map(&blank).unwrap();
        used.queue_field(1, QUEUE_VERSION).store(1, Ordering::Release);
        assert_eq!(used.claim(&identity(1)), History::Foreign);
        used.queue_field(1, QUEUE_VERSION).store(0, Ordering::Release);
        assert_eq!(used.claim(&identity(1)), History::Ours);
        assert_eq!(used.claim(&identity(2)), History::Foreign);
    }

    #[test]
    fn a_region_that_is_too_small_is_refused_and_ours_cannot_be_cut_short() {
        let (_, file) = region();
        assert!(file.set_len(10).is_err(), "sealed");
        let map = |offset, len, queues, size| {
            InflightRegion::map(file.try_clone().unwrap(), offset, len, queues, size)
        };
        assert!(map(0, region_len(2, 8) - 1, 2, 8).is_err());
        assert!(map(4096, region_len(2, 8), 2, 8).is_err());
        assert!(map(u64::MAX, region_len(2, 8), 2, 8).is_err());
        assert!(map(0, region_len(3, 8), 3, 8).is_err());
    }
}
