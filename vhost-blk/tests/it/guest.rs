//! A front end and its guest in one: the least that can drive the server, or misbehave. It kicks only when the
//! server asks for kicks and looks only when it is interrupted, so a lost one ends in a missed deadline.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::DEADLINE;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_LOG_ALL: u64 = 1 << 26;
pub(crate) const F_CONFIG_WCE: u64 = 1 << 11;
pub(crate) const F_FLUSH: u64 = 1 << 9;

/// Where guest memory begins, in guest addresses.
pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const MEMORY_LEN: u64 = 64 << 20;
/// Each ring has 128 KiB for itself, and 12 MiB for its requests behind all rings.
const RING_STRIDE: u64 = 0x2_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0x1_0000;
const REQUESTS: u64 = 0x10_0000;
const REQUESTS_STRIDE: u64 = 12 << 20;
/// A request's own memory: header, status, indirect table, data.
const SLOT_STRIDE: u64 = 0x9000;
const SLOT_STATUS: u64 = 0x80;
const SLOT_TABLE: u64 = 0x100;
const SLOT_DATA: u64 = 0x1000;
pub(crate) const SLOT_DATA_LEN: u64 = 0x8000;

/// Guest memory, which outlives every connection.
pub(crate) struct Memory {
    pub(crate) file: File,
    mapping: MmapRegion,
    /// Where the front end says that it has mapped the memory.
    claimed: AtomicU64,
}

impl Memory {
    fn new() -> Self {
        let file = File::from(memfd_create("guest-memory", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_LEN).unwrap();
        let mapping =
            MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), MEMORY_LEN as usize);
        let mapping = mapping.unwrap();
        Self { file, claimed: AtomicU64::new(mapping.as_ptr() as u64), mapping }
    }

    fn at(&self, addr: u64, len: u64) -> *mut u8 {
        assert!(addr >= BASE && addr + len <= BASE + MEMORY_LEN);
        self.mapping.as_ptr().wrapping_add((addr - BASE) as usize)
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        // SAFETY: `at` has checked the bounds of the mapping, into which no references exist.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(addr, bytes.len() as u64), bytes.len())
        }
    }

    pub(crate) fn read(&self, addr: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(addr, len), bytes.as_mut_ptr(), bytes.len()) }
        bytes
    }

    pub(crate) fn u16(&self, addr: u64) -> &AtomicU16 {
        assert_eq!(addr % 2, 0);
        // SAFETY: mapped and aligned; both sides access it atomically.
        unsafe { AtomicU16::from_ptr(self.at(addr, 2).cast()) }
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: MEMORY_LEN,
            userspace_addr: self.user(BASE),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Where the front end says that it has mapped a guest address.
    pub(crate) fn user(&self, addr: u64) -> u64 {
        self.claimed.load(Ordering::Relaxed) + (addr - BASE)
    }

    /// From now on the front end says that its mapping begins here.
    pub(crate) fn claim(&self, address: u64) {
        self.claimed.store(address, Ordering::Relaxed);
    }

    /// Where a guest address is really mapped, for the guest.
    pub(crate) fn mapped(&self, addr: u64) -> u64 {
        self.mapping.as_ptr() as u64 + (addr - BASE)
    }
}

/// A ring as the guest sees it, which outlives connections too.
pub(crate) struct Ring {
    pub(crate) index: usize,
    pub(crate) size: u16,
    pub(crate) added: u16,
    pub(crate) seen: u16,
    event_idx: bool,
    memory: Arc<Memory>,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
}

impl Ring {
    fn new(index: usize, size: u16, event_idx: bool, memory: Arc<Memory>) -> Self {
        let eventfd = || EventFd::new(libc_nonblock()).unwrap();
        Self {
            index,
            size,
            added: 0,
            seen: 0,
            event_idx,
            memory,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
        }
    }

    fn base(&self) -> u64 {
        BASE + RING_STRIDE * self.index as u64
    }

    pub(crate) fn available(&self) -> u64 {
        self.base() + AVAILABLE
    }

    pub(crate) fn used(&self) -> u64 {
        self.base() + USED
    }

    pub(crate) fn config(&self, log: Option<u64>) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: log.is_some().into(),
            desc_table_addr: self.memory.user(self.base()),
            used_ring_addr: self.memory.user(self.used()),
            avail_ring_addr: self.memory.user(self.available()),
            log_addr: log,
        }
    }

    /// The guest sets the ring up anew.
    pub(crate) fn reset(&mut self) {
        self.memory.write(self.base(), &vec![0; RING_STRIDE as usize]);
        (self.added, self.seen) = (0, 0);
        let _ = (self.kick.read(), self.call.read());
    }

    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.memory.write(self.base() + 16 * u64::from(index), &descriptor(addr, len, flags, next));
    }

    /// Puts a head into the available ring, without telling of it.
    pub(crate) fn put(&mut self, head: u16) {
        let entry = self.available() + 4 + 2 * u64::from(self.added % self.size);
        self.memory.u16(entry).store(head, Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
    }

    /// Tells of what was put, with a kick if the server wants one.
    pub(crate) fn submit(&mut self, count: u16) {
        self.memory.u16(self.available() + 2).store(self.added, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.memory.u16(self.used() + 4 + 8 * u64::from(self.size)).load(Ordering::Relaxed);
            self.added.wrapping_sub(event).wrapping_sub(1) < count
        } else {
            self.memory.u16(self.used()).load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.memory.u16(self.used() + 2).load(Ordering::Acquire)
    }

    /// What was reported since the last time: heads and lengths.
    pub(crate) fn reap(&mut self) -> Vec<(u16, u32)> {
        let mut done = Vec::new();
        while self.seen != self.used_index() {
            let entry = self.memory.read(self.used() + 4 + 8 * u64::from(self.seen % self.size), 8);
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            assert!(word(0) < u32::from(self.size), "an entry of the used ring that is no head");
            done.push((word(0) as u16, word(4)));
            self.seen = self.seen.wrapping_add(1);
        }
        done
    }

    /// Waits for an interrupt until at least one request was reported.
    pub(crate) fn wait(&mut self) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if self.event_idx {
                self.memory
                    .u16(self.available() + 4 + 2 * u64::from(self.size))
                    .store(self.seen, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            let done = self.reap();
            if !done.is_empty() {
                return done;
            }
            assert!(
                wait_for(&self.call, deadline),
                "no interrupt on ring {}; used index {}, seen {}",
                self.index,
                self.used_index(),
                self.seen
            );
        }
    }

    /// Waits until the server says that the ring is broken.
    pub(crate) fn wait_for_error(&self) {
        assert!(wait_for(&self.err, Instant::now() + DEADLINE), "the ring was not declared broken");
    }
}

fn libc_nonblock() -> i32 {
    rustix::event::EventfdFlags::NONBLOCK.bits() as i32
}

/// Waits for an eventfd and resets it; false when the time is over.
fn wait_for(eventfd: &EventFd, deadline: Instant) -> bool {
    loop {
        if eventfd.read().is_ok() {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        // SAFETY: the descriptor is open for as long as `eventfd` lives.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout));
    }
}

pub(crate) fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// One range of a discard or write-zeroes request.
pub(crate) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// What a guest's front end asks for.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) rings: usize,
    pub(crate) size: u16,
    /// Features that are declined.
    pub(crate) without: u64,
    pub(crate) inflight: bool,
    /// The write cache is turned off before the rings are started.
    pub(crate) cache_off: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { rings: 1, size: 64, without: F_LOG_ALL, inflight: false, cache_off: false }
    }
}

pub(crate) struct Guest {
    /// None while disconnected.
    pub(crate) connection: Option<Frontend>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) options: Options,
    pub(crate) features: u64,
    pub(crate) inflight: Option<(VhostUserInflight, File)>,
    /// The next connection is the first of a machine: it reads the configuration.
    pub(crate) begins: bool,
}

impl Guest {
    /// A machine begins: connects and starts all rings.
    pub(crate) fn start(socket: &Path, options: Options) -> Self {
        let memory = Arc::new(Memory::new());
        let event_idx = options.without & F_EVENT_IDX == 0;
        let rings =
            (0..options.rings).map(|index| Ring::new(index, options.size, event_idx, Arc::clone(&memory)));
        let rings = rings.collect();
        let (connection, inflight) = (None, None);
        let mut guest = Self { connection, memory, rings, options, features: 0, inflight, begins: true };
        guest.connect(socket);
        guest.start_rings(None);
        guest
    }

    pub(crate) fn frontend(&mut self) -> &mut Frontend {
        self.connection.as_mut().unwrap()
    }

    /// Connects, negotiates and shares memory, with the in-flight region of before if there is one.
    pub(crate) fn connect(&mut self, socket: &Path) {
        // A client that is turned away, because the last one is not quite gone, tries again.
        let mut connected = None;
        crate::eventually("a connection", || {
            connected = Frontend::connect(socket, 16).ok().and_then(|frontend| {
                frontend.set_owner().ok()?;
                let features = frontend.get_features().ok()?;
                Some((frontend, features))
            });
            connected.is_some()
        });
        let (mut frontend, offered) = connected.unwrap();
        self.features = offered & !self.options.without;
        let mut protocol = frontend.get_protocol_features().unwrap();
        protocol &= !VhostUserProtocolFeatures::STATUS;
        if !self.options.inflight {
            protocol &= !VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_features(self.features).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let no_flags = VhostUserConfigFlags::empty();
        // Without protocol features there is no such message.
        if std::mem::take(&mut self.begins) && self.features & F_PROTOCOL_FEATURES != 0 {
            frontend.get_config(0, 60, no_flags, &[0; 60]).unwrap();
        }
        if self.options.cache_off {
            frontend.set_config(32, no_flags, &[0]).unwrap();
        }
        if self.options.inflight {
            if self.inflight.is_none() {
                let asked = VhostUserInflight::new(0, 0, self.options.rings as u16, self.options.size);
                self.inflight = Some(frontend.get_inflight_fd(&asked).unwrap());
            }
            let (region, file) = self.inflight.as_ref().unwrap();
            frontend.set_inflight_fd(region, file.as_raw_fd()).unwrap();
        }
        frontend.set_mem_table(&[self.memory.region()]).unwrap();
        self.connection = Some(frontend);
    }

    /// Starts all rings, from where the guest has got to, or from the given positions.
    pub(crate) fn start_rings(&mut self, bases: Option<&[u16]>) {
        let Self { connection, rings, .. } = self;
        let frontend = connection.as_mut().unwrap();
        for ring in rings.iter() {
            let base = bases.map_or(ring.used_index(), |bases| bases[ring.index]);
            start_ring(frontend, ring, base);
        }
        if self.features & F_PROTOCOL_FEATURES != 0 {
            for ring in rings.iter() {
                frontend.set_vring_enable(ring.index, true).unwrap();
            }
        }
    }

    fn slot(&self, ring: usize, slot: u16) -> u64 {
        assert!(SLOT_STRIDE * (u64::from(slot) + 1) <= REQUESTS_STRIDE);
        BASE + REQUESTS + REQUESTS_STRIDE * ring as u64 + SLOT_STRIDE * u64::from(slot)
    }

    /// The guest address of a slot's data.
    pub(crate) fn data(&self, ring: usize, slot: u16) -> u64 {
        self.slot(ring, slot) + SLOT_DATA
    }

    pub(crate) fn status_addr(&self, ring: usize, slot: u16) -> u64 {
        self.slot(ring, slot) + SLOT_STATUS
    }

    /// The status that was written for a slot's request; 255 if none.
    pub(crate) fn status(&self, ring: usize, slot: u16) -> u8 {
        self.memory.read(self.status_addr(ring, slot), 1)[0]
    }

    /// Builds a request in a slot, with an indirect table if that was negotiated, and puts it into the available
    /// ring. `out` is what it carries to the device, `into` how many bytes it wants back. Its head is `4 * slot`.
    pub(crate) fn put(&mut self, ring: usize, slot: u16, kind: u32, sector: u64, out: &[u8], into: u64) {
        assert!(4 * slot + 3 < self.options.size && out.len() as u64 + into <= SLOT_DATA_LEN);
        let base = self.slot(ring, slot);
        self.memory.write(base, &header(kind, sector));
        self.memory.write(base + SLOT_STATUS, &[255]);
        self.memory.write(base + SLOT_DATA, out);
        let mut parts = vec![(base, 16, 0)];
        if !out.is_empty() {
            parts.push((base + SLOT_DATA, out.len() as u32, 0));
        }
        if into > 0 {
            parts.push((base + SLOT_DATA + out.len() as u64, into as u32, WRITE));
        }
        parts.push((base + SLOT_STATUS, 1, WRITE));
        let head = 4 * slot;
        let indirect = self.features & F_INDIRECT != 0;
        let first = if indirect { 0 } else { head };
        let count = parts.len() as u16;
        for (index, (addr, len, flags)) in (0..).zip(parts) {
            let next = if index + 1 < count { NEXT } else { 0 };
            let bytes = descriptor(addr, len, flags | next, first + index + 1);
            if indirect {
                self.memory.write(base + SLOT_TABLE + 16 * u64::from(index), &bytes);
            } else {
                self.rings[ring].descriptor(head + index, addr, len, flags | next, head + index + 1);
            }
        }
        if indirect {
            self.rings[ring].descriptor(head, base + SLOT_TABLE, 16 * u32::from(count), INDIRECT, 0);
        }
        self.rings[ring].put(head);
    }

    /// Makes one request and waits for it: its status, and what it has brought.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, out: &[u8], into: u64) -> (u8, Vec<u8>) {
        self.put(0, 0, kind, sector, out, into);
        self.rings[0].submit(1);
        let done = self.rings[0].wait();
        assert_eq!(done, [(0, into as u32 + 1)]);
        let data = self.memory.read(self.data(0, 0) + out.len() as u64, into);
        (self.status(0, 0), data)
    }
}

/// Sends all that a ring needs except that it is enabled.
pub(crate) fn start_ring(frontend: &mut Frontend, ring: &Ring, base: u16) {
    frontend.set_vring_num(ring.index, ring.size).unwrap();
    frontend.set_vring_base(ring.index, base).unwrap();
    frontend.set_vring_addr(ring.index, &ring.config(None)).unwrap();
    frontend.set_vring_err(ring.index, &ring.err).unwrap();
    frontend.set_vring_call(ring.index, &ring.call).unwrap();
    frontend.set_vring_kick(ring.index, &ring.kick).unwrap();
}
