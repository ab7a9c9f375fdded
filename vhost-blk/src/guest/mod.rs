//! Guest memory. Every access to it, and above all every write into it, is in this module: data, status bytes,
//! used rings, event indices. Whatever must happen before the device writes to a page happens here.
//!
//! The guest and its virtual machine monitor can change the memory at any moment, so nothing here is ever a
//! reference into it: values are copied out once, and what was copied is what is checked and used.

mod dirty;
mod map;
mod ring;

use std::any::Any;
use std::ptr;
use std::sync::Arc;

use cdp_types::{IoBuf, IoSegment};
use smallvec::SmallVec;

use crate::guard::Page;

pub(crate) use dirty::DirtyLog;
pub(crate) use map::{MAX_REGIONS, MemoryMap, RegionSpec};
pub(crate) use ring::{Descriptor, Ring, RingAddresses, RingFault};

/// Bytes of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestRange {
    pub(crate) addr: u64,
    pub(crate) len: u32,
}

/// The guest's memory as one queue's thread sees it: the map, and the log of what is written.
pub(crate) struct GuestMemory {
    map: Arc<MemoryMap>,
    /// The map again, in an `Arc` of this queue's own: each request's buffer counts a reference, and counts shared
    /// by all queues would make their processors wait for each other.
    owner: Arc<dyn Any + Send + Sync>,
    log: Option<Arc<DirtyLog>>,
}

impl GuestMemory {
    pub(crate) fn new(map: Arc<MemoryMap>, log: Option<Arc<DirtyLog>>) -> Self {
        Self { owner: Arc::new(Arc::clone(&map)), map, log }
    }

    pub(crate) fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Whether all of the range is guest memory.
    pub(crate) fn covers(&self, range: GuestRange) -> bool {
        self.map.pieces(range.addr, u64::from(range.len), |_, _| {})
    }

    /// A buffer over `len` bytes of the ranges, after the first `skip`; none if a part is no guest memory.
    pub(crate) fn buffer(&self, ranges: &[GuestRange], skip: u64, len: u64) -> Option<IoBuf> {
        let mut segments: SmallVec<[IoSegment; 4]> = SmallVec::new();
        let whole = self.pieces(ranges, skip, len, |base, len| segments.push(IoSegment { base, len }));
        // SAFETY: `owner` holds the map, and so every mapping in it, readable and writable, until its last clone is
        // gone; no Rust reference into guest memory is ever made. The pieces lie inside mappings (`pieces`).
        whole.then(|| unsafe { IoBuf::new(segments, Arc::clone(&self.owner)) })
    }

    /// Copies bytes out of the ranges, from `skip` on; false if a part is no guest memory or they are too short.
    pub(crate) fn read(&self, ranges: &[GuestRange], skip: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        let len = to.len() as u64;
        self.pieces(ranges, skip, len, |base, len| {
            // SAFETY: `base..base+len` is mapped while `self.map` lives (`pieces`); `done + len <= to.len()`, since
            // the pieces add up to at most the length asked for; the memory is no Rust object, so nothing overlaps.
            unsafe { ptr::copy_nonoverlapping(base, to.as_mut_ptr().add(done), len) };
            done += len;
        })
    }

    /// Copies bytes into the ranges, from their start; false if a part is no guest memory or they are too short.
    pub(crate) fn write(&self, ranges: &[GuestRange], from: &[u8]) -> bool {
        let mut done = 0;
        self.pieces(ranges, 0, from.len() as u64, |base, len| {
            // SAFETY: as in `read`, in the other direction; mappings are writable.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr().add(done), base, len) };
            done += len;
        })
    }

    pub(crate) fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// Adds the pages of the ranges' first `len` bytes that are not touched in the present window.
    pub(crate) fn untouched(&self, ranges: &[GuestRange], len: u64, pages: &mut Vec<Page>) {
        let mut left = len;
        for range in ranges {
            let part = u64::from(range.len).min(left);
            self.map.untouched(range.addr, part, pages);
            left -= part;
        }
    }

    /// Writes a request's status byte; false if it is no longer guest memory.
    pub(crate) fn write_status(&self, addr: u64, status: u8) -> bool {
        self.map.pieces(addr, 1, |base, _| {
            // SAFETY: `base` is a mapped, writable byte while `self.map` lives.
            unsafe { ptr::write_volatile(base, status) }
        })
    }

    /// Notes that the device has written to the ranges. Called after the bytes have landed, whoever wrote them:
    /// the kernel does not know of the log.
    pub(crate) fn written(&self, ranges: &[GuestRange]) {
        if let Some(log) = &self.log {
            ranges.iter().for_each(|range| log.mark(range.addr, u64::from(range.len)));
        }
    }

    /// Calls `f(base, length)` for each mapped piece of `len` bytes of the ranges after the first `skip`. False
    /// if the ranges are shorter, or not all guest memory; some pieces may have been given by then.
    fn pieces(&self, ranges: &[GuestRange], skip: u64, len: u64, mut f: impl FnMut(*mut u8, usize)) -> bool {
        let (mut skip, mut left) = (skip, len);
        for range in ranges {
            let range_len = u64::from(range.len);
            if skip >= range_len {
                skip -= range_len;
                continue;
            }
            let part = (range_len - skip).min(left);
            let Some(addr) = range.addr.checked_add(skip) else { return false };
            if !self.map.pieces(addr, part, &mut f) {
                return false;
            }
            (skip, left) = (0, left - part);
            if left == 0 {
                return true;
            }
        }
        left == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use map::tests::memory_of;

    #[test]
    fn ranges_may_cross_regions_and_be_cut_anywhere() {
        // Two regions that touch in guest addresses, though not in ours.
        let memory = GuestMemory::new(Arc::new(memory_of(&[(0x1000, 0x1000), (0x2000, 0x1000)])), None);
        let ranges = [GuestRange { addr: 0x1ffe, len: 4 }, GuestRange { addr: 0x1000, len: 3 }];
        assert!(memory.write(&ranges, &[1, 2, 3, 4, 5, 6, 7]));
        let mut out = [0; 4];
        assert!(memory.read(&ranges, 2, &mut out));
        assert_eq!(out, [3, 4, 5, 6]);
        let buffer = memory.buffer(&ranges, 1, 5).unwrap();
        assert_eq!((buffer.to_vec(), buffer.segments().len()), (vec![2, 3, 4, 5, 6], 3));
    }

    #[test]
    fn what_is_not_guest_memory_is_refused() {
        let memory = GuestMemory::new(Arc::new(memory_of(&[(0x1000, 0x1000)])), None);
        for (addr, len) in [(0xfff, 2), (0x1fff, 2), (u64::MAX, 2), (0x3000, 1)] {
            let range = GuestRange { addr, len };
            assert!(!memory.covers(range), "{range:x?}");
            assert!(memory.buffer(&[range], 0, u64::from(len)).is_none());
        }
        let range = GuestRange { addr: 0x1000, len: 8 };
        assert!(memory.buffer(&[range], 0, 9).is_none(), "longer than the ranges");
        assert!(!memory.write_status(0x2000, 0));
    }
}
