//! A split virtqueue (virtio 1.3, 2.7): descriptor table, available ring, used ring.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use super::{GuestMemory, MemoryMap};
use crate::guard::Page;

/// Where the front end says the parts of a ring are, in its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// The guest address at which writes to the used ring are logged, if they are.
    pub(crate) used_log: Option<u64>,
}

impl RingAddresses {
    /// The first guest address behind the logged used ring of `size` entries.
    pub(crate) fn used_log_end(&self, size: u16) -> u64 {
        self.used_log.map_or(0, |addr| addr.saturating_add(used_len(size)))
    }

    /// The pages of the used ring that are not touched in the present window: all that we write of a ring.
    pub(crate) fn untouched(&self, map: &MemoryMap, size: u16) -> Vec<Page> {
        map.untouched_user(self.used, used_len(size), idle_byte)
    }
}

/// A byte of the used ring, from `from` up to `to`, that never changes: the upper half of the flags, the top byte of an
/// entry's head, of its length. Where there is none, before the end of the ring, the upper half of the event index.
fn idle_byte(from: u64, to: u64) -> u64 {
    let entry_byte =
        |nth| (from..to).find(|at| *at >= ENTRIES as u64 && (at - ENTRIES as u64) % USED_ENTRY as u64 == nth);
    match from {
        0 => FLAGS as u64 + 1,
        _ => entry_byte(3).or_else(|| entry_byte(7)).unwrap_or(to - 1),
    }
}

/// What makes a ring unusable until it is set up anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingFault {
    /// A part of it is not in guest memory, not aligned, or split over two regions.
    Unmapped(&'static str),
    /// The available index is further ahead than the ring is long.
    IndexJump { from: u16, to: u16 },
    /// A head is no descriptor of the table.
    HeadOutside(u16),
    /// A chain was made available again before it was used.
    HeadBusy(u16),
    /// A chain has no end, or more descriptors than it may.
    Endless(u16),
    /// A chain goes on at what is no descriptor, or in a table that is not in guest memory.
    Lost(u16),
    /// A chain has no byte for the status, or its address is not in guest memory.
    NoStatus(u16),
    /// The front end's in-flight region has no room for this ring.
    Untracked,
    /// The device's queue cannot be opened, or has failed.
    Device,
    /// Requests wait for touches, and this server ends.
    GivenUp,
}

impl fmt::Display for RingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unmapped(part) => write!(f, "its {part} is not in one aligned piece of guest memory"),
            Self::IndexJump { from, to } => {
                write!(f, "the available index went from {from} to {to}, further than the ring is long")
            }
            Self::HeadOutside(head) => write!(f, "head {head} is outside the descriptor table"),
            Self::HeadBusy(head) => write!(f, "head {head} was made available while it was in flight"),
            Self::Endless(head) => write!(f, "the chain at head {head} loops or is too long"),
            Self::Lost(head) => write!(f, "the chain at head {head} goes on outside its table"),
            Self::NoStatus(head) => write!(f, "the chain at head {head} has no place for a status byte"),
            Self::Untracked => f.write_str("the in-flight region has no room for it"),
            Self::Device => f.write_str("the disk's queue has failed"),
            Self::GivenUp => f.write_str("what waits for pages to be saved is left to the next server"),
        }
    }
}

/// One descriptor, as it was when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Bytes of one in memory.
    pub(crate) const LEN: u64 = 16;

    /// Reads one at a mapped address.
    ///
    /// # Safety
    /// 16 bytes from `at` must be mapped and readable.
    pub(super) unsafe fn read(at: *const u8) -> Self {
        let mut bytes = [0; 16];
        // The compiler must read the guest's memory exactly once, or a value could change between check and use.
        if (at as usize).is_multiple_of(8) {
            // SAFETY: the caller promises 16 readable bytes; they are aligned for two u64.
            let (low, high) = unsafe {
                (ptr::read_volatile(at.cast::<u64>()), ptr::read_volatile(at.cast::<u64>().add(1)))
            };
            bytes[..8].copy_from_slice(&low.to_ne_bytes());
            bytes[8..].copy_from_slice(&high.to_ne_bytes());
        } else {
            for (index, byte) in bytes.iter_mut().enumerate() {
                // SAFETY: the caller promises 16 readable bytes.
                *byte = unsafe { ptr::read_volatile(at.add(index)) };
            }
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// The index of the descriptor after it, if there is one.
    pub(crate) fn next(&self) -> Option<u16> {
        (self.flags & VRING_DESC_F_NEXT as u16 != 0).then_some(self.next)
    }

    /// Whether the device writes to it, rather than reads.
    pub(crate) fn device_writes(&self) -> bool {
        self.flags & VRING_DESC_F_WRITE as u16 != 0
    }

    /// Whether it names a table of descriptors.
    pub(crate) fn indirect(&self) -> bool {
        self.flags & VRING_DESC_F_INDIRECT as u16 != 0
    }
}

impl GuestMemory {
    /// Reads descriptor `index` of a table at a guest address; none if it is not in guest memory.
    pub(crate) fn descriptor(&self, table: u64, index: u32) -> Option<Descriptor> {
        let addr = table.checked_add(u64::from(index) * Descriptor::LEN)?;
        let host = self.map.host_of_guest(addr, Descriptor::LEN)?;
        // SAFETY: `host` has 16 mapped bytes while `self.map` lives.
        Some(unsafe { Descriptor::read(host) })
    }
}

// Offsets within the available and the used ring (virtio 1.3, 2.7.6 and 2.7.8).
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const AVAILABLE_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

fn available_len(size: u16) -> u64 {
    (ENTRIES + AVAILABLE_ENTRY * usize::from(size) + 2) as u64
}

fn used_len(size: u16) -> u64 {
    (ENTRIES + USED_ENTRY * usize::from(size) + 2) as u64
}

/// The device's side of a ring.
pub(crate) struct Ring {
    parts: Parts,
    size: u16,
    /// The position in the available ring up to which requests have been taken.
    taken: u16,
    /// The position in the used ring up to which the guest has been told.
    used: u16,
    event_idx: bool,
    /// Whether the guest has been asked to kick when it adds requests.
    wants_kicks: bool,
}

/// Where the parts of a ring are mapped. The mappings are kept by the `GuestMemory` that every method is given.
struct Parts {
    descriptors: *const u8,
    available: *mut u8,
    used: *mut u8,
    used_log: Option<u64>,
}

// SAFETY: the pointers lead into mappings that any thread may access; only the queue's thread uses the ring.
unsafe impl Send for Parts {}

impl Parts {
    fn find(memory: &GuestMemory, addresses: &RingAddresses, size: u16) -> Result<Self, RingFault> {
        let find = |addr, len, align, part| {
            memory.map.host_of_user(addr, len, align).ok_or(RingFault::Unmapped(part))
        };
        let table_len = Descriptor::LEN * u64::from(size);
        Ok(Self {
            descriptors: find(addresses.descriptors, table_len, 16, "descriptor table")?,
            available: find(addresses.available, available_len(size), 2, "available ring")?,
            used: find(addresses.used, used_len(size), 4, "used ring")?,
            used_log: addresses.used_log,
        })
    }
}

impl Ring {
    /// A ring of `size` entries, of which `taken` is the next to take. The used index is what the guest sees. Nothing
    /// is written to it before `say_wish`.
    pub(crate) fn new(
        memory: &GuestMemory,
        addresses: &RingAddresses,
        size: u16,
        taken: u16,
        event_idx: bool,
    ) -> Result<Self, RingFault> {
        let parts = Parts::find(memory, addresses, size)?;
        let mut ring = Self { parts, size, taken, used: 0, event_idx, wants_kicks: false };
        ring.used = u16::from_le(ring.used_field(INDEX).load(Ordering::Acquire));
        Ok(ring)
    }

    /// Goes on in other memory or with other logging, where it was. Nothing is written to it before `say_wish`.
    pub(crate) fn move_to(
        &mut self,
        memory: &GuestMemory,
        addresses: &RingAddresses,
    ) -> Result<(), RingFault> {
        self.parts = Parts::find(memory, addresses, self.size)?;
        Ok(())
    }

    /// Tells the guest anew whether it should kick.
    pub(crate) fn say_wish(&mut self, memory: &GuestMemory) {
        self.set_wants_kicks(memory, self.wants_kicks);
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn taken(&self) -> u16 {
        self.taken
    }

    pub(crate) fn set_taken(&mut self, taken: u16) {
        self.taken = taken;
    }

    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    /// How many requests can be taken.
    pub(crate) fn available(&self) -> Result<u16, RingFault> {
        // Acquire: the entries and descriptors below the index are read after it.
        let to = u16::from_le(self.available_field(INDEX).load(Ordering::Acquire));
        let count = to.wrapping_sub(self.taken);
        if count > self.size {
            return Err(RingFault::IndexJump { from: self.taken, to });
        }
        Ok(count)
    }

    /// The head of the next chain to take. There must be one available.
    pub(crate) fn head(&self) -> Result<u16, RingFault> {
        let slot = usize::from(self.taken & (self.size - 1));
        let head =
            u16::from_le(self.available_field(ENTRIES + AVAILABLE_ENTRY * slot).load(Ordering::Relaxed));
        if head >= self.size { Err(RingFault::HeadOutside(head)) } else { Ok(head) }
    }

    /// Takes the chain that `head` named.
    pub(crate) fn take(&mut self) {
        self.taken = self.taken.wrapping_add(1);
    }

    /// Reads a descriptor of the table; none if there is no such one.
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: `index < size`, and the table's `16 * size` bytes were mapped in `Parts::find`; the mapping lives as
        // long as the `GuestMemory` that this queue holds together with the ring.
        Some(unsafe {
            Descriptor::read(self.parts.descriptors.add(usize::from(index) * Descriptor::LEN as usize))
        })
    }

    /// Writes the entry that is `nth` after those the guest has been told of.
    pub(crate) fn put_used(&self, memory: &GuestMemory, nth: u16, head: u16, len: u32) {
        let slot = usize::from(self.used.wrapping_add(nth) & (self.size - 1));
        let offset = ENTRIES + USED_ENTRY * slot;
        let entry = u64::from(head) | u64::from(len) << 32;
        // SAFETY: `slot < size`, so the entry lies in the used ring that `Parts::find` mapped; entries are aligned to
        // 4 bytes. The guest reads it only after the index, which is stored with release after this.
        unsafe { ptr::write_unaligned(self.parts.used.add(offset).cast::<u64>(), entry.to_le()) };
        self.log_used(memory, offset, USED_ENTRY as u64);
    }

    /// Tells the guest of the `count` entries that were put.
    pub(crate) fn publish_used(&mut self, memory: &GuestMemory, count: u16) {
        self.used = self.used.wrapping_add(count);
        // Release: status bytes, data and entries are in place before the guest sees the index.
        self.used_field(INDEX).store(self.used.to_le(), Ordering::Release);
        self.log_used(memory, INDEX, 2);
    }

    /// Whether the guest wants to be interrupted for the last `count` entries it was told of (virtio 1.3, 2.7.7).
    pub(crate) fn wants_interrupt(&self, count: u16) -> bool {
        // The guest sets its wish and then looks at the index; here it is the other way round. Without a full fence
        // both could look before the other's store arrives, and the guest would sleep on finished requests.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = ENTRIES + AVAILABLE_ENTRY * usize::from(self.size);
            let event = u16::from_le(self.available_field(event).load(Ordering::Relaxed));
            self.used.wrapping_sub(event).wrapping_sub(1) < count
        } else {
            let flags = u16::from_le(self.available_field(FLAGS).load(Ordering::Relaxed));
            flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    /// Asks the guest to kick when it adds a request, and returns whether it has added one in the meantime.
    pub(crate) fn ask_for_kicks(&mut self, memory: &GuestMemory) -> Result<bool, RingFault> {
        self.set_wants_kicks(memory, true);
        // As in `wants_interrupt`, with the roles exchanged.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    /// Lets the guest know that its ring is looked at without a kick.
    pub(crate) fn decline_kicks(&mut self, memory: &GuestMemory) {
        if self.wants_kicks {
            self.set_wants_kicks(memory, false);
        }
    }

    fn set_wants_kicks(&mut self, memory: &GuestMemory, wants: bool) {
        self.wants_kicks = wants;
        if !self.event_idx {
            let flags = if wants { 0 } else { VRING_USED_F_NO_NOTIFY as u16 };
            self.used_field(FLAGS).store(flags.to_le(), Ordering::Relaxed);
            self.log_used(memory, FLAGS, 2);
        } else if wants {
            // The guest kicks when it adds the entry at this position. To decline, the old position is left: it has
            // been passed.
            let event = ENTRIES + USED_ENTRY * usize::from(self.size);
            self.used_field(event).store(self.taken.to_le(), Ordering::Relaxed);
            self.log_used(memory, event, 2);
        }
    }

    fn log_used(&self, memory: &GuestMemory, offset: usize, len: u64) {
        if let (Some(log), Some(base)) = (memory.log(), self.parts.used_log) {
            log.mark(base.saturating_add(offset as u64), len);
        }
    }

    fn available_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: every caller's offset is even and inside the available ring, which is mapped and aligned to 2 bytes
        // (`Parts::find`) while the queue's `GuestMemory` lives; the guest's accesses are atomic too.
        unsafe { AtomicU16::from_ptr(self.parts.available.add(offset).cast()) }
    }

    fn used_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `available_field`, for the used ring.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(offset).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_that_is_written_over_itself_in_a_used_ring_is_one_that_does_not_change() {
        let size = 512u16;
        let event = used_len(size) - 2;
        assert_eq!(idle_byte(0, 4), 1, "the flags");
        assert_eq!(idle_byte(2048, 6144), 2055, "cut inside an entry: the next one's head");
        assert_eq!(idle_byte(2052, 6144), 2055, "cut between entries");
        assert_eq!(idle_byte(event - 4, event), event - 1, "the second half of an entry: its length");
        assert_eq!(idle_byte(event, event + 2), event + 1, "nothing but the event index");
    }
}
