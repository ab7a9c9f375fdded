//! One thread's I/O on one ring.

use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_types::{IoBuf, Wait};
use io_uring::opcode;

use super::directory::Directory;
use super::file::StoreFile;
use super::in_flight::{Id, InFlight, Memory, Operation, Progress, Transfer, Watch};
use super::ring::{Completion, Ring};
use super::waker::{LaneWaker, signal};
use crate::storage::{AlignedBuf, Done, File, Lane, Token, Waker};

/// The kernel takes no more pieces of memory in one read (UIO_MAXIOV).
const MOST_SEGMENTS: usize = 1024;
/// Each has a read in flight, and their completions should fit into the ring at once.
const MOST_WATCHES: usize = 512;
/// With so many entries queued, reads are handed over without waiting for more: the disk begins while the next ones are
/// being prepared.
const READS_AT_ONCE: usize = 8;
/// The same while the disk has nothing to do.
const READS_AT_FIRST: usize = 2;

pub(super) struct UringLane {
    ring: Ring,
    in_flight: InFlight,
    /// Ended before they began: what could not even be queued.
    refused: Vec<Done>,
    /// Started and not yet reported, those refused included.
    unreported: usize,
    watches: Vec<(u64, Id)>,
    waker: Arc<LaneWaker>,
    /// Where the read of the alarm is in flight.
    alarm: Option<Id>,
    /// Somebody sleeps on the ring's descriptor, outside `poll`.
    armed: bool,
    completions: Vec<Completion>,
    /// Last, so that the store is unlocked after the ring has gone.
    directory: Arc<Directory>,
}

impl UringLane {
    pub(super) fn new(directory: Arc<Directory>) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(directory.lock())?,
            in_flight: InFlight::default(),
            refused: Vec::new(),
            unreported: 0,
            watches: Vec::new(),
            waker: Arc::new(LaneWaker::new()?),
            alarm: None,
            armed: false,
            completions: Vec::new(),
            directory,
        })
    }

    /// Takes an operation in and queues its entry.
    fn start(&mut self, operation: Operation) -> Id {
        let id = self.in_flight.insert(operation);
        self.queue(id);
        id
    }

    fn queue(&mut self, id: Id) {
        if let Some(entry) = self.in_flight.entry(id) {
            // SAFETY: the entry points to memory of the operation `id`, which is removed only when its completion
            // has been taken out (`complete`), or never if the ring cannot be drained (`drop`).
            unsafe { self.ring.push(entry) }
        }
    }

    /// Queues the cancellation of an operation, which then completes like any other.
    fn cancel(&mut self, id: Id) {
        let entry = opcode::AsyncCancel::new(id.user_data()).build().user_data(Id::CANCELLATION.user_data());
        // SAFETY: a cancellation points to no memory.
        unsafe { self.ring.push(entry) }
    }

    fn refuse(&mut self, token: Token, error: io::Error, buffer: Option<AlignedBuf>) {
        self.refused.push(Done::Io { token, result: Err(error), buffer });
    }

    /// The descriptor of a file that came from the same storage.
    fn descriptor(&self, file: &Arc<dyn File>) -> io::Result<RawFd> {
        match file.as_any().downcast_ref::<StoreFile>() {
            Some(file) if file.is_in(&self.directory) => Ok(file.fd()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a file of the store {}", file.name(), self.directory.path().display()),
            )),
        }
    }

    fn place(&self, file: &Arc<dyn File>, offset: u64, len: usize) -> io::Result<RawFd> {
        self.directory.check_place(offset, len)?;
        self.descriptor(file)
    }

    /// Reports what the ring has completed.
    fn reap(&mut self, done: &mut Vec<Done>) {
        let mut completions = mem::take(&mut self.completions);
        self.ring.reap(&mut completions);
        for (data, result) in completions.drain(..) {
            let id = Id::from_user_data(data);
            if id != Id::CANCELLATION {
                self.complete(id, result, done);
            }
        }
        self.completions = completions;
    }

    /// The kernel has done with an operation's entry.
    fn complete(&mut self, id: Id, result: i32, done: &mut Vec<Done>) {
        match self.in_flight.get(id) {
            Some(Operation::Transfer(transfer)) => {
                let directory = &self.directory;
                match transfer.progress(result, |len| directory.align_down(len)) {
                    Progress::Rest => self.queue(id),
                    Progress::Ended(result) => self.report(id, result, done),
                }
            }
            Some(Operation::Sync { .. }) if result == -libc::EINTR => self.queue(id),
            Some(Operation::Sync { .. }) => {
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
                self.report(id, result, done);
            }
            Some(Operation::Watch(_)) => self.complete_watch(id, result, done),
            Some(Operation::Alarm { .. }) => {
                self.in_flight.remove(id);
                self.alarm = None;
            }
            None => tracing::error!(?id, result, "a completion for nothing that is in flight"),
        }
    }

    fn report(&mut self, id: Id, result: io::Result<()>, done: &mut Vec<Done>) {
        let (token, buffer) = match self.in_flight.remove(id) {
            Some(Operation::Transfer(transfer)) => match transfer.memory {
                Memory::From { buffer, .. } => (transfer.token, Some(buffer)),
                Memory::Into(_) | Memory::Through { .. } => (transfer.token, None),
            },
            Some(Operation::Sync { token, .. }) => (token, None),
            Some(Operation::Watch(_) | Operation::Alarm { .. }) | None => return,
        };
        self.unreported -= 1;
        done.push(Done::Io { token, result, buffer });
    }

    fn complete_watch(&mut self, id: Id, result: i32, done: &mut Vec<Done>) {
        let Some(Operation::Watch(watch)) = self.in_flight.get(id) else { return };
        let counted = !watch.polling && result == size_of::<u64>() as i32;
        if watch.cancelled {
            if counted {
                signal(watch.eventfd.as_fd(), watch.count());
            }
            self.in_flight.remove(id);
            return;
        }
        let interrupted = matches!(-result, libc::EINTR | libc::ECANCELED);
        match -result {
            _ if counted => done.push(Done::Ready { tag: watch.tag }),
            // It is non-blocking and the kernel is older than 5.18 or so.
            libc::EAGAIN if !watch.polling => watch.polling = true,
            _ if watch.polling && result >= 0 => watch.polling = false,
            _ if interrupted => {}
            _ => {
                let (tag, error) = (watch.tag, io::Error::from_raw_os_error(-result));
                tracing::error!(tag, %error, "a watched descriptor cannot be read as an eventfd: not watched any more");
                self.watches.retain(|&(_, other)| other != id);
                self.in_flight.remove(id);
                return;
            }
        }
        self.queue(id);
    }

    /// Has the ring read the alarm that a waker of a sleeping lane sets off.
    fn set_alarm(&mut self) {
        if self.alarm.is_none() {
            let fd = self.waker.alarm();
            self.alarm = Some(self.start(Operation::Alarm { fd, value: Arc::default() }));
        }
    }

    /// Sleeps until there is something in `done`, the waker is called or the time is over.
    fn sleep(&mut self, deadline: Option<Instant>, done: &mut Vec<Done>) -> io::Result<()> {
        let before = done.len();
        loop {
            let rest = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            self.set_alarm();
            let slept = if self.waker.fall_asleep() { self.ring.sleep(rest) } else { self.ring.submit() };
            self.waker.get_up();
            slept?;
            self.reap(done);
            let over = rest == Some(Duration::ZERO);
            // The order matters: a call must not be forgotten because something else was there as well.
            if self.waker.take() || done.len() > before || over {
                return Ok(());
            }
        }
    }

    /// Waits until the kernel uses none of the lane's memory any more.
    fn drain(&mut self) -> io::Result<()> {
        for (tag, _) in self.watches.clone() {
            self.unwatch(tag);
        }
        if let Some(id) = self.alarm {
            self.cancel(id);
        }
        let mut ignored = Vec::new();
        while !self.in_flight.is_empty() {
            self.ring.sleep(None)?;
            self.reap(&mut ignored);
            ignored.clear();
        }
        Ok(())
    }
}

impl Lane for UringLane {
    fn read(&mut self, token: Token, file: &Arc<dyn File>, offset: u64, into: IoBuf) {
        self.unreported += 1;
        let fd = match self.place(file, offset, into.len()) {
            Ok(fd) => fd,
            Err(error) => return self.refuse(token, error, None),
        };
        let direct = into.segments().len() <= MOST_SEGMENTS
            && into.segments().iter().all(|piece| self.directory.takes_memory(piece.base, piece.len));
        let memory = if direct {
            Memory::Into(into)
        } else {
            Memory::Through { bounce: AlignedBuf::zeroed(into.len()), into }
        };
        self.start(Operation::Transfer(Transfer::new(token, Arc::clone(file), fd, offset, memory)));
        let queued = self.ring.queued();
        let idle = self.unreported <= queued;
        if queued >= if idle { READS_AT_FIRST } else { READS_AT_ONCE }
            && let Err(error) = self.ring.submit()
        {
            // The next poll meets it again, and returns it.
            tracing::debug!(%error, "reads could not be handed over");
        }
    }

    fn write(
        &mut self,
        token: Token,
        file: &Arc<dyn File>,
        offset: u64,
        from: AlignedBuf,
        range: Range<usize>,
    ) {
        self.unreported += 1;
        let piece = &from[range.clone()];
        let aligned = self.directory.takes_memory(piece.as_ptr(), piece.len());
        let fd = match self.place(file, offset, range.len()) {
            Ok(fd) if aligned => fd,
            Ok(_) => {
                let text = format!("a write from byte {} of a buffer: direct I/O cannot", range.start);
                return self.refuse(token, io::Error::new(io::ErrorKind::InvalidInput, text), Some(from));
            }
            Err(error) => return self.refuse(token, error, Some(from)),
        };
        let memory = Memory::From { buffer: from, range };
        self.start(Operation::Transfer(Transfer::new(token, Arc::clone(file), fd, offset, memory)));
    }

    fn sync(&mut self, token: Token, file: &Arc<dyn File>) {
        self.unreported += 1;
        match self.descriptor(file) {
            Ok(fd) => {
                self.start(Operation::Sync { token, fd, _file: Arc::clone(file) });
            }
            Err(error) => self.refuse(token, error, None),
        }
    }

    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        if self.watches.iter().any(|&(other, _)| other == tag) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("tag {tag} is watched already"),
            ));
        }
        if self.watches.len() == MOST_WATCHES {
            let text = format!("a lane watches at most {MOST_WATCHES} eventfds");
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        let id = self.start(Operation::Watch(Watch::new(eventfd, tag)));
        self.watches.push((tag, id));
        Ok(())
    }

    fn unwatch(&mut self, tag: u64) {
        let Some(at) = self.watches.iter().position(|&(other, _)| other == tag) else { return };
        let (_, id) = self.watches.swap_remove(at);
        if let Some(Operation::Watch(watch)) = self.in_flight.get(id) {
            watch.cancelled = true;
            self.cancel(id);
        }
    }

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::clone(&self.waker) as Arc<dyn Waker>
    }

    fn poll(&mut self, wait: Wait, done: &mut Vec<Done>) -> io::Result<()> {
        if std::mem::take(&mut self.armed) {
            self.waker.get_up();
        }
        let before = done.len();
        self.unreported -= self.refused.len();
        done.append(&mut self.refused);
        let woken = self.waker.take();
        self.reap(done);
        if woken || done.len() > before || matches!(wait, Wait::No) {
            if self.ring.wants_kernel() {
                self.ring.submit()?;
                self.reap(done);
            }
            return Ok(());
        }
        // A time beyond what the clock can count is for ever.
        let deadline = match wait {
            Wait::For(time) => Instant::now().checked_add(time),
            Wait::No | Wait::Forever => None,
        };
        self.sleep(deadline, done)
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.ring.descriptor())
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.set_alarm();
        self.armed = true;
        let still = self.waker.fall_asleep();
        if self.ring.wants_kernel() {
            self.ring.submit()?;
        }
        Ok(still && self.refused.is_empty() && !self.ring.has_completions())
    }

    fn in_flight(&self) -> usize {
        self.unreported
    }
}

impl Drop for UringLane {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            // The kernel may go on writing into that memory, and to those files: none of it may be used for
            // anything else, and the store has to stay locked, until the process ends.
            tracing::error!(%error, "a ring could not be drained: its memory is leaked, the store stays locked");
            mem::forget(mem::take(&mut self.in_flight));
            mem::forget(Arc::clone(&self.directory));
        }
    }
}
