//! A disk in memory, for the tests of front ends.
//!
//! It completes requests late and out of order, and fails some, as one seed says. Its content lives in two
//! files, so that a test can kill the process that serves it and go on with what was left, as with a store.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use crate::{
    BlockDevice, BranchId, ByteRange, DeviceIdentity, DeviceInfo, DeviceQueue, Event, IoBuf, IoError,
    IoErrorKind, Listener, Op, Origin, RequestId, VolumeId, Wait,
};

/// How requests are delayed and failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFaults {
    /// What every choice follows from, together with the order in which queues are opened.
    pub seed: u64,
    /// Each request waits for a random part of this before it is carried out, so they end in any order.
    pub max_delay: Duration,
    /// How many of a million requests fail with [`IoErrorKind::Device`], having done nothing.
    pub errors_per_million: u32,
}

/// What a [`MemoryDevice`] is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// What [`BlockDevice::info`] says at first.
    pub info: DeviceInfo,
    /// Without faults, requests end in order at the next `poll`.
    pub faults: Option<MemoryFaults>,
}

impl MemoryConfig {
    /// A writable disk of this many bytes with blocks of 512 bytes, without faults.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        let info = DeviceInfo {
            capacity,
            logical_block_size: 512,
            physical_block_size: 4096,
            max_write_bytes: 32 << 20,
            read_only: false,
            serial: "memory".to_owned(),
        };
        Self { info, faults: None }
    }
}

/// A sparse disk in memory.
///
/// # Durability
/// What has been carried out outlives the process if the disk was made by [`MemoryDevice::in_files`]; nothing
/// outlives the machine.
pub struct MemoryDevice {
    shared: Arc<Shared>,
}

struct Shared {
    config: MemoryConfig,
    capacity: AtomicU64,
    branch: AtomicU64,
    data: File,
    /// The lock is held while a request is carried out and noted, so that no other can come between.
    journal: Mutex<Journal>,
    next_origin: AtomicU64,
    queues_opened: AtomicU64,
    flushes: AtomicU64,
    listeners: Mutex<Vec<Listener>>,
}

/// The numbers of the requests that were carried out: 8 bytes each, little-endian, behind the number of times
/// that the file has been opened.
struct Journal {
    file: File,
    len: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MemoryDevice {
    /// A disk that is gone with its last handle.
    ///
    /// # Errors
    /// When the operating system gives no memory file.
    pub fn new(config: MemoryConfig) -> io::Result<Self> {
        let memory = || memfd_create("memory-disk", MemfdFlags::CLOEXEC).map(File::from);
        Self::in_files(config, memory()?, memory()?)
    }

    /// A disk whose blocks are in `data`, and the numbers of the requests it has carried out in `journal`.
    ///
    /// # Errors
    /// What the operating system says of the files.
    pub fn in_files(config: MemoryConfig, data: File, journal: File) -> io::Result<Self> {
        let mut header = [0; 8];
        let len = journal.metadata()?.len().max(8) & !7;
        if journal.metadata()?.len() >= 8 {
            journal.read_exact_at(&mut header, 0)?;
        }
        let opening = u64::from_le_bytes(header) + 1;
        journal.write_all_at(&opening.to_le_bytes(), 0)?;
        let shared = Shared {
            capacity: AtomicU64::new(config.info.capacity),
            branch: AtomicU64::new(1),
            data,
            journal: Mutex::new(Journal { file: journal, len }),
            next_origin: AtomicU64::new(opening << 40 | 1),
            queues_opened: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            listeners: Mutex::new(Vec::new()),
            config,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Changes the size and tells whoever asked to be told.
    pub fn resize(&self, capacity: u64) {
        self.shared.capacity.store(capacity, Ordering::Release);
        locked(&self.shared.listeners).retain(|notify| notify());
    }

    /// Puts the disk on another branch, as a forced revert does; the content stays.
    pub fn switch_branch(&self, branch: BranchId) {
        self.shared.branch.store(branch.0, Ordering::Release);
    }

    /// How many flushes have been carried out, and requests with `fua`.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.shared.flushes.load(Ordering::Acquire)
    }

    /// The content of a range, as it is now.
    ///
    /// # Errors
    /// What the operating system says of the file.
    pub fn content(&self, range: ByteRange) -> io::Result<Vec<u8>> {
        self.shared.content(range)
    }
}

impl fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryDevice({} bytes)", self.shared.capacity.load(Ordering::Relaxed))
    }
}

impl BlockDevice for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            capacity: self.shared.capacity.load(Ordering::Acquire),
            ..self.shared.config.info.clone()
        }
    }

    fn identity(&self) -> DeviceIdentity {
        let branch = BranchId(self.shared.branch.load(Ordering::Acquire));
        DeviceIdentity { store: *b"memory device   ", volume: VolumeId(1), branch }
    }

    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let nth = self.shared.queues_opened.fetch_add(1, Ordering::Relaxed);
        let seed = self.shared.config.faults.map_or(0, |faults| faults.seed)
            ^ nth.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Ok(Box::new(MemoryQueue {
            shared: Arc::clone(&self.shared),
            random: SplitMix(seed),
            pending: Vec::new(),
            watched: Vec::new(),
            watching: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        }))
    }

    fn new_origin(&self) -> Origin {
        Origin(self.shared.next_origin.fetch_add(1, Ordering::Relaxed))
    }

    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        let journal = locked(&self.shared.journal);
        let mut noted = vec![0; journal.len as usize];
        // A journal that cannot be read says of no request that it survived: it is run again.
        if journal.file.read_exact_at(&mut noted, 0).is_err() {
            noted.clear();
        }
        let holds =
            |origin: &Origin| noted.chunks_exact(8).skip(1).any(|entry| entry == origin.0.to_le_bytes());
        origins.iter().map(holds).collect()
    }

    fn on_change(&self, notify: Listener) {
        locked(&self.shared.listeners).push(notify);
    }
}

impl Shared {
    fn content(&self, range: ByteRange) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; range.len as usize];
        let mut done = 0;
        while done < bytes.len() {
            match self.data.read_at(&mut bytes[done..], range.offset + done as u64)? {
                0 => break, // what lies past the end of the sparse file is zero
                read => done += read,
            }
        }
        Ok(bytes)
    }

    fn check(&self, range: ByteRange) -> Result<(), IoError> {
        let capacity = self.capacity.load(Ordering::Acquire);
        Ok(range.check(capacity, u64::from(self.config.info.logical_block_size))?)
    }

    fn writable(&self) -> Result<(), IoError> {
        match self.config.info.read_only {
            true => Err(IoError::new(IoErrorKind::ReadOnly, "the memory disk is read-only")),
            false => Ok(()),
        }
    }

    /// Checks a request and copies what it writes.
    fn prepare(&self, op: Op) -> Result<Work, IoError> {
        match op {
            Op::Read { offset, into } => {
                self.check(ByteRange::new(offset, into.len() as u64))?;
                Ok(Work::Read { offset, into })
            }
            Op::Write { offset, from, origin, fua } => {
                self.writable()?;
                self.check(ByteRange::new(offset, from.len() as u64))?;
                if from.len() as u64 > self.config.info.max_write_bytes {
                    return Err(IoError::new(IoErrorKind::Invalid, "more than one write may carry"));
                }
                Ok(Work::Write { offset, data: from.to_vec(), origin, fua })
            }
            Op::WriteZeroes { ranges, origin, fua, .. } => {
                self.writable()?;
                ranges.iter().try_for_each(|&range| self.check(range))?;
                Ok(Work::Zero { ranges: ranges.to_vec(), origin, fua })
            }
            Op::Discard { ranges, origin } => {
                self.writable()?;
                ranges.iter().try_for_each(|&range| self.check(range))?;
                let whole = ranges.iter().map(|range| range.whole_blocks().bytes()).collect();
                Ok(Work::Zero { ranges: whole, origin, fua: false })
            }
            Op::Flush => Ok(Work::Flush),
        }
    }

    fn carry_out(&self, work: Work) -> io::Result<()> {
        match work {
            Work::Read { offset, into } => {
                let bytes = self.content(ByteRange::new(offset, into.len() as u64))?;
                into.copy_in(0, &bytes);
                Ok(())
            }
            Work::Write { offset, data, origin, fua } => {
                self.change(origin, fua, || self.data.write_all_at(&data, offset))
            }
            Work::Zero { ranges, origin, fua } => self.change(origin, fua, || {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                for range in ranges.iter().filter(|range| range.len > 0) {
                    fallocate(&self.data, punch, range.offset, range.len)?;
                }
                Ok(())
            }),
            Work::Flush => {
                self.flushes.fetch_add(1, Ordering::AcqRel);
                Ok(())
            }
        }
    }

    fn change(&self, origin: Origin, fua: bool, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut journal = locked(&self.journal);
        act()?;
        if origin != Origin(0) {
            journal.file.write_all_at(&origin.0.to_le_bytes(), journal.len)?;
            journal.len += 8;
        }
        if fua {
            self.flushes.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }
}

enum Work {
    Read { offset: u64, into: IoBuf },
    Write { offset: u64, data: Vec<u8>, origin: Origin, fua: bool },
    Zero { ranges: Vec<ByteRange>, origin: Origin, fua: bool },
    Flush,
}

struct Pending {
    id: RequestId,
    due: Option<Instant>,
    work: Result<Work, IoError>,
}

struct MemoryQueue {
    shared: Arc<Shared>,
    random: SplitMix,
    pending: Vec<Pending>,
    watched: Vec<(u64, Arc<OwnedFd>)>,
    /// An epoll instance of the watched eventfds.
    watching: OwnedFd,
}

impl DeviceQueue for MemoryQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        let mut work = self.shared.prepare(op);
        let mut due = None;
        if let Some(faults) = self.shared.config.faults {
            due =
                Some(Instant::now() + faults.max_delay.mul_f64(self.random.next() as f64 / u64::MAX as f64));
            if self.random.next() % 1_000_000 < u64::from(faults.errors_per_million) {
                work = Err(IoError::new(IoErrorKind::Device, "an error that the test asked for"));
            }
        }
        self.pending.push(Pending { id, due, work });
    }

    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        epoll::add(&self.watching, &eventfd, epoll::EventData::new_u64(tag), epoll::EventFlags::IN)?;
        self.watched.push((tag, eventfd));
        Ok(())
    }

    fn unwatch(&mut self, tag: u64) {
        self.watched.retain(|(watched, eventfd)| {
            if *watched == tag {
                // It was added by `watch`, and is removed once: there is nothing that could fail.
                let _ = epoll::delete(&self.watching, eventfd);
            }
            *watched != tag
        });
    }

    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let until = match wait {
            Wait::No => Some(Instant::now()),
            Wait::For(time) => Some(Instant::now() + time),
            Wait::Forever => None,
        };
        let before = events.len();
        loop {
            self.finish_due(events);
            let next = self.pending.iter().filter_map(|pending| pending.due).min();
            let timeout = match events.len() > before {
                true => Some(Duration::ZERO),
                false => {
                    let wake = until.into_iter().chain(next).min();
                    wake.map(|at| at.saturating_duration_since(Instant::now()))
                }
            };
            self.collect_ready(timeout, events)?;
            if events.len() > before || until.is_some_and(|until| Instant::now() >= until) {
                return Ok(());
            }
        }
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.watching.as_fd())
    }

    fn arm(&mut self) -> io::Result<Wait> {
        // Completions are due by the clock; only eventfds come by the descriptor.
        let next = self
            .pending
            .iter()
            .map(|p| p.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now())));
        Ok(match next.min() {
            Some(Duration::ZERO) => Wait::No,
            Some(time) => Wait::For(time),
            None => Wait::Forever,
        })
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }
}

impl MemoryQueue {
    /// Carries out what is due: without faults in order, with faults in the order of the random delays.
    fn finish_due(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        let (mut due, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.pending).into_iter().partition(|p| p.due.is_none_or(|due| due <= now));
        self.pending = waiting;
        due.sort_by_key(|pending| pending.due);
        for Pending { id, work, .. } in due {
            let carried_out = |work| {
                let failed = |error: io::Error| IoError::new(IoErrorKind::Device, error.to_string());
                self.shared.carry_out(work).map_err(failed)
            };
            events.push(Event::Completed { id, result: work.and_then(carried_out) });
        }
    }

    fn collect_ready(&self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        let fds = |(_, fd): &(u64, Arc<OwnedFd>)| Arc::clone(fd);
        let eventfds: Vec<_> = self.watched.iter().map(fds).collect();
        let mut fds: Vec<_> = eventfds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let timeout =
            timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) | Ok(0) => return Ok(()),
            result => result?,
        };
        for (fd, (tag, eventfd)) in fds.iter().zip(&self.watched) {
            if fd.revents().contains(PollFlags::IN) {
                let mut counter = [0; 8];
                rustix::io::read(eventfd.as_fd(), &mut counter)?;
                events.push(Event::Ready { tag: *tag });
            }
        }
        Ok(())
    }
}

/// Sebastiano Vigna's SplitMix64: enough randomness for delays, in three lines.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn drain(queue: &mut dyn DeviceQueue) -> Vec<(u64, bool)> {
        let mut done = Vec::new();
        while queue.in_flight() > 0 {
            let mut events = Vec::new();
            queue.poll(Wait::For(Duration::from_secs(10)), &mut events).unwrap();
            assert!(!events.is_empty(), "nothing ended in ten seconds");
            for event in events {
                if let Event::Completed { id, result } = event {
                    done.push((id.0, result.is_ok()));
                }
            }
        }
        done
    }

    #[test]
    fn faults_reorder_and_fail_and_a_failed_write_changes_nothing() {
        let faults =
            MemoryFaults { seed: 7, max_delay: Duration::from_millis(5), errors_per_million: 300_000 };
        let device =
            MemoryDevice::new(MemoryConfig { faults: Some(faults), ..MemoryConfig::new(1 << 20) }).unwrap();
        let mut queue = device.open_queue().unwrap();
        for block in 0..200 {
            let from = IoBuf::from_bytes(&[1; 512]);
            let origin = device.new_origin();
            queue.submit(RequestId(block), Op::Write { offset: block * 512, from, origin, fua: false });
        }
        let done = drain(queue.as_mut());
        assert!(!done.is_sorted(), "with faults, requests end out of order");
        assert!(done.iter().any(|(_, ok)| !ok));
        for (block, ok) in done {
            let content = device.content(ByteRange::new(block * 512, 512)).unwrap();
            assert_eq!(content, [u8::from(ok); 512]);
        }
    }

    #[test]
    fn a_disk_in_files_remembers_what_it_carried_out() {
        let file = || File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let (data, journal) = (file(), file());
        let open = || {
            let (data, journal) = (data.try_clone().unwrap(), journal.try_clone().unwrap());
            MemoryDevice::in_files(MemoryConfig::new(1 << 20), data, journal).unwrap()
        };
        let first = open();
        let (done, never) = (first.new_origin(), first.new_origin());
        let mut queue = first.open_queue().unwrap();
        let from = IoBuf::from_bytes(&[9; 4096]);
        queue.submit(RequestId(1), Op::Write { offset: 8192, from, origin: done, fua: true });
        assert_eq!(drain(queue.as_mut()), [(1, true)]);

        let second = open();
        assert_eq!(second.survived(&[never, done]), [false, true]);
        assert!(second.new_origin() > never, "numbers are never given out twice");
        assert_eq!(second.content(ByteRange::new(8192, 4096)).unwrap(), [9; 4096]);
    }
}
