//! What is in flight: the operations' state and the memory that the kernel uses.
//!
//! A slot is filled before its entry is queued and emptied only by its completion, so that buffers, vectors, files
//! and eventfds live for as long as the kernel may use them. Slots do not move. An [`Id`] names a slot and its
//! present operation: a cancellation that comes too late must not hit the slot's next one.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cdp_types::IoBuf;
use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use crate::storage::{AlignedBuf, File, Token};

/// The most that is asked of the kernel at once: a multiple of every alignment, below its own limit.
const LONGEST: usize = 1 << 30;

/// How many times an operation that the device was too busy for is started again.
const ATTEMPTS: u8 = 100;

/// A read or write, between its start and its report.
pub(super) struct Transfer {
    pub(super) token: Token,
    pub(super) fd: RawFd,
    /// Keeps `fd` open.
    pub(super) file: Arc<dyn File>,
    pub(super) offset: u64,
    pub(super) memory: Memory,
    pub(super) done: usize,
    pub(super) failed_attempts: u8,
}

/// Where a transfer's bytes are.
pub(super) enum Memory {
    /// A read straight to where it should go.
    Into(IoBuf),
    /// A read by way of memory that direct I/O can use.
    Through { bounce: AlignedBuf, into: IoBuf },
    /// A write.
    From { buffer: AlignedBuf, range: Range<usize> },
}

impl Memory {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Into(into) | Self::Through { into, .. } => into.len(),
            Self::From { range, .. } => range.len(),
        }
    }
}

/// A read of an eventfd, again and again.
pub(super) struct Watch {
    pub(super) tag: u64,
    pub(super) eventfd: Arc<OwnedFd>,
    /// Written by the kernel at any time while the read is in flight.
    pub(super) value: Arc<AtomicU64>,
    /// The kernel would not wait in a read of this descriptor, so it waits in a poll before.
    pub(super) polling: bool,
    pub(super) cancelled: bool,
}

pub(super) enum Operation {
    Transfer(Transfer),
    /// The file is held, so that the descriptor stays open.
    Sync {
        token: Token,
        fd: RawFd,
        _file: Arc<dyn File>,
    },
    Watch(Watch),
    /// The lane's own eventfd, through which it is woken.
    Alarm {
        fd: RawFd,
        value: Arc<AtomicU64>,
    },
}

/// What follows from a completion of a read or write.
pub(super) enum Progress {
    /// The rest is to be started.
    Rest,
    Ended(io::Result<()>),
}

/// What the kernel gives back with a completion (`user_data`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u64);

impl Id {
    /// Marks the completions of cancellations, which say nothing: those of what they cancel do.
    pub(super) const CANCELLATION: Self = Self(u64::MAX);

    fn new(slot: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | slot as u64)
    }

    pub(super) fn from_user_data(data: u64) -> Self {
        Self(data)
    }

    pub(super) fn user_data(self) -> u64 {
        self.0
    }

    fn slot(self) -> usize {
        self.0 as u32 as usize
    }
}

#[derive(Default)]
struct Slot {
    /// How many operations it has had before.
    generation: u32,
    operation: Option<Operation>,
    vectors: Vectors,
}

/// The pieces of a scattered read, kept while the kernel may look at them.
#[derive(Default)]
struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are not followed here, only by the kernel, and are those of an `IoBuf`, which is Send.
unsafe impl Send for Vectors {}

/// All slots of a lane.
#[derive(Default)]
pub(super) struct InFlight {
    /// Boxed, so that a slot stays where it is when the table grows.
    #[allow(clippy::vec_box)]
    slots: Vec<Box<Slot>>,
    vacant: Vec<usize>,
}

impl InFlight {
    /// Takes the operation in.
    pub(super) fn insert(&mut self, operation: Operation) -> Id {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Box::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.operation = Some(operation);
        Id::new(index, slot.generation)
    }

    fn slot(&mut self, id: Id) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(id.slot())?;
        (Id::new(id.slot(), slot.generation) == id).then_some(slot)
    }

    /// An operation that has not been removed yet.
    pub(super) fn get(&mut self, id: Id) -> Option<&mut Operation> {
        self.slot(id)?.operation.as_mut()
    }

    /// Gives up an operation that the kernel has done with.
    pub(super) fn remove(&mut self, id: Id) -> Option<Operation> {
        let slot = self.slot(id)?;
        let operation = slot.operation.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.vacant.push(id.slot());
        Some(operation)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.vacant.len() == self.slots.len()
    }

    /// The entry that starts an operation, or goes on with it. It points to memory that the operation owns or shares,
    /// and to its slot's vectors: valid until the operation is removed.
    pub(super) fn entry(&mut self, id: Id) -> Option<squeue::Entry> {
        let Slot { operation, vectors, .. } = self.slot(id)?;
        let entry = match operation.as_mut()? {
            Operation::Transfer(transfer) => transfer.entry(vectors),
            Operation::Sync { fd, .. } => {
                opcode::Fsync::new(Fd(*fd)).flags(io_uring::types::FsyncFlags::DATASYNC).build()
            }
            Operation::Watch(watch) if watch.polling => {
                opcode::PollAdd::new(Fd(watch.eventfd.as_raw_fd()), libc::POLLIN as u32).build()
            }
            Operation::Watch(watch) => read_counter(watch.eventfd.as_raw_fd(), &watch.value),
            Operation::Alarm { fd, value } => read_counter(*fd, value),
        };
        Some(entry.user_data(id.user_data()))
    }
}

fn read_counter(fd: RawFd, value: &AtomicU64) -> squeue::Entry {
    opcode::Read::new(Fd(fd), value.as_ptr().cast(), size_of::<u64>() as u32).build()
}

impl Watch {
    pub(super) fn new(eventfd: Arc<OwnedFd>, tag: u64) -> Self {
        Self { tag, eventfd, value: Arc::default(), polling: false, cancelled: false }
    }

    /// What the completed read has taken out of the eventfd.
    pub(super) fn count(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}

impl Transfer {
    /// A read or write of all of `memory`.
    pub(super) fn new(token: Token, file: Arc<dyn File>, fd: RawFd, offset: u64, memory: Memory) -> Self {
        Self { token, fd, file, offset, memory, done: 0, failed_attempts: 0 }
    }

    fn entry(&mut self, vectors: &mut Vectors) -> squeue::Entry {
        let (fd, at, done) = (Fd(self.fd), self.offset + self.done as u64, self.done);
        let len = (self.memory.len() - done).min(LONGEST);
        let entry = match &mut self.memory {
            Memory::Into(into) if into.segments().len() == 1 => {
                let base = into.segments()[0].base.wrapping_add(done);
                opcode::Read::new(fd, base, len as u32).offset(at).build()
            }
            Memory::Into(into) => {
                vectors.fill(into, done);
                opcode::Readv::new(fd, vectors.0.as_ptr(), vectors.0.len() as u32).offset(at).build()
            }
            Memory::Through { bounce, .. } => {
                let base = bounce.as_mut_ptr().wrapping_add(done);
                opcode::Read::new(fd, base, len as u32).offset(at).build()
            }
            Memory::From { buffer, range } => {
                let base = buffer.as_ptr().wrapping_add(range.start + done);
                opcode::Write::new(fd, base, len as u32).offset(at).build()
            }
        };
        // After a refusal for want of resources: let a kernel thread wait for them.
        if self.failed_attempts > 0 { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }

    /// Takes note of a completion: `result` bytes, or an error's number negated. `align_down` rounds a length down
    /// to where direct I/O can go on.
    pub(super) fn progress(&mut self, result: i32, align_down: impl Fn(usize) -> usize) -> Progress {
        let Ok(moved) = usize::try_from(result) else {
            return self.failure(-result);
        };
        let reached = self.done + moved;
        if reached == self.memory.len() {
            if let Memory::Through { bounce, into } = &self.memory {
                into.copy_in(0, &bounce[..into.len()]);
            }
            return Progress::Ended(Ok(()));
        }
        let writes = matches!(self.memory, Memory::From { .. });
        let next = align_down(reached);
        // Only its end stops a read of a file between two sectors; and a write that gets nowhere never will.
        let stuck = next == self.done || (!writes && next != reached);
        if stuck {
            let kind = if writes { io::ErrorKind::WriteZero } else { io::ErrorKind::UnexpectedEof };
            let verb = if writes { "written" } else { "read" };
            let (len, offset, name) = (self.memory.len(), self.offset, self.file.name());
            let text = format!("only {reached} of {len} bytes at {offset} of {name} could be {verb}");
            return Progress::Ended(Err(io::Error::new(kind, text)));
        }
        self.done = next;
        Progress::Rest
    }

    fn failure(&mut self, number: i32) -> Progress {
        let passing = matches!(number, libc::EAGAIN | libc::EINTR);
        if passing && self.failed_attempts < ATTEMPTS {
            self.failed_attempts += 1;
            return Progress::Rest;
        }
        Progress::Ended(Err(io::Error::from_raw_os_error(number)))
    }
}

impl Vectors {
    /// Makes them say: `into`, without its first `skip` bytes.
    fn fill(&mut self, into: &IoBuf, mut skip: usize) {
        self.0.clear();
        for segment in into.segments() {
            let skipped = skip.min(segment.len);
            skip -= skipped;
            if skipped < segment.len {
                let iov_base = segment.base.wrapping_add(skipped).cast();
                self.0.push(libc::iovec { iov_base, iov_len: segment.len - skipped });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::storage::Storage;
    use crate::storage::sim::SimDisk;

    fn transfer(memory: Memory) -> Transfer {
        let disk = SimDisk::new(1);
        let file = disk.open().create("f").unwrap();
        Transfer::new(1, file, -1, 8192, memory)
    }

    fn sectors(len: usize) -> usize {
        len - len % 512
    }

    fn ended(progress: Progress) -> Option<io::Result<()>> {
        match progress {
            Progress::Rest => None,
            Progress::Ended(result) => Some(result),
        }
    }

    #[test]
    fn a_short_write_goes_on_at_the_sector_it_reached() {
        let mut write = transfer(Memory::From { buffer: AlignedBuf::zeroed(8192), range: 4096..8192 });
        assert!(ended(write.progress(700, sectors)).is_none());
        assert_eq!(write.done, 512);
        assert!(ended(write.progress(3584, sectors)).unwrap().is_ok());
    }

    #[test]
    fn a_write_that_gets_nowhere_ends() {
        let mut write = transfer(Memory::From { buffer: AlignedBuf::zeroed(4096), range: 0..4096 });
        let error = ended(write.progress(100, sectors)).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
        assert_eq!(error.to_string(), "only 100 of 4096 bytes at 8192 of f could be written");
    }

    #[test]
    fn a_short_read_goes_on_unless_it_was_the_end_of_the_file() {
        let mut read = transfer(Memory::Into(IoBuf::zeroed(4096)));
        assert!(ended(read.progress(1024, sectors)).is_none());
        assert_eq!(
            ended(read.progress(0, sectors)).unwrap().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let mut read = transfer(Memory::Into(IoBuf::zeroed(4096)));
        assert_eq!(
            ended(read.progress(7, sectors)).unwrap().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_busy_device_is_asked_again_but_not_for_ever() {
        let mut read = transfer(Memory::Into(IoBuf::zeroed(512)));
        let refusals = (0..).find_map(|n| ended(read.progress(-libc::EAGAIN, sectors)).map(|end| (n, end)));
        let (tries, end) = refusals.unwrap();
        assert_eq!((tries, end.unwrap_err().raw_os_error()), (ATTEMPTS, Some(libc::EAGAIN)));
        let mut read = transfer(Memory::Into(IoBuf::zeroed(512)));
        let end = ended(read.progress(-libc::EIO, sectors)).unwrap();
        assert_eq!(end.unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn an_id_is_not_that_of_the_next_operation_in_its_slot() {
        let mut all = InFlight::default();
        let alarm = || Operation::Alarm { fd: -1, value: Arc::default() };
        let first = all.insert(alarm());
        assert!(all.remove(first).is_some() && all.is_empty());
        let second = all.insert(alarm());
        assert_eq!((first.slot(), first == second), (second.slot(), false));
        assert!(all.get(first).is_none() && all.remove(first).is_none() && all.entry(first).is_none());
        assert!(all.get(Id::CANCELLATION).is_none() && all.get(second).is_some() && !all.is_empty());
    }

    #[test]
    fn vectors_leave_out_what_is_done() {
        let memory = IoBuf::zeroed(4096);
        let base = memory.segments()[0].base;
        let scattered = |pieces: &[(usize, usize)]| {
            let segments =
                pieces.iter().map(|&(at, len)| cdp_types::IoSegment { base: base.wrapping_add(at), len });
            // SAFETY: all pieces lie in `memory`, which is the owner.
            unsafe { IoBuf::new(segments.collect(), Arc::new(memory.share())) }
        };
        let into = scattered(&[(0, 512), (1024, 1024), (3072, 512)]);
        let mut vectors = Vectors::default();
        vectors.fill(&into, 1024);
        let found: Vec<_> = vectors.0.iter().map(|v| (v.iov_base.addr() - base.addr(), v.iov_len)).collect();
        assert_eq!(found, [(1536, 512), (3072, 512)]);
    }
}
