//! One io_uring: setting it up, handing entries over, taking completions out.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, cqueue, squeue};

/// Entries that fit in between two submissions; more wait in a queue of our own.
const ENTRIES: u32 = 256;
/// The kernel keeps what does not fit, at a price; so it fits for any depth that makes sense.
const COMPLETIONS: u32 = 1024;
/// A pause when the kernel has no memory for more requests.
const STARVED: Duration = Duration::from_millis(1);

/// How a completion says what it belongs to, and the result: a count, or an error's number negated.
pub(super) type Completion = (u64, i32);

pub(super) struct Ring {
    ring: IoUring,
    /// What found the submission queue full, in order.
    backlog: VecDeque<squeue::Entry>,
}

impl Ring {
    /// Sets up a ring that may be used from any one thread at a time, and that holds on to `held` for as long as
    /// anything is in flight in it, even when the process is dead.
    ///
    /// # Errors
    /// `Unsupported` before Linux 5.11; what the operating system says, with a hint where io_uring is forbidden.
    pub(super) fn new(held: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let ring = build().map_err(explain)?;
        if !(ring.params().is_feature_ext_arg() && ring.params().is_feature_nodrop()) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring needs Linux 5.11 or newer"));
        }
        if let Some(held) = held {
            ring.submitter().register_files(&[held.as_raw_fd()])?;
        }
        Ok(Self { ring, backlog: VecDeque::new() })
    }

    /// Queues an entry; nothing happens before [`Ring::submit`] or [`Ring::sleep`].
    ///
    /// # Safety
    /// What the entry points to must stay valid, and for the kernel alone where it writes, until the entry's
    /// completion has been taken out.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry is valid by this function's own contract, which `fill` relies on as well.
        if !self.backlog.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Entries that were not handed over yet.
    pub(super) fn queued(&mut self) -> usize {
        self.ring.submission().len() + self.backlog.len()
    }

    /// Whether `submit` would do anything: entries to hand over, or completions that the kernel will only post when
    /// it is entered.
    pub(super) fn wants_kernel(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || !self.backlog.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Hands over what is queued, and has the kernel post what has ended. Does not sleep. Where the kernel takes no
    /// more for now, the rest stays queued.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            self.fill();
            match self.ring.submit() {
                Ok(_) if self.backlog.is_empty() => return Ok(()),
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Hands over what is queued and sleeps until something has ended, a signal comes or the time is over. It may
    /// also return early for no reason.
    ///
    /// # Errors
    /// When the ring is broken.
    pub(super) fn sleep(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        self.fill();
        // With more to hand over than fits, this is a submission only; the caller comes back to sleep.
        if !self.backlog.is_empty() {
            return self.submit();
        }
        let result = match at_most {
            None => self.ring.submit_and_wait(1),
            Some(duration) => {
                let timeout = Timespec::from(duration);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout))
            }
        };
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::EINTR | libc::ETIME | libc::EBUSY), _)) => Ok(()),
            Err((Some(libc::EAGAIN), _)) => {
                thread::sleep(STARVED.min(at_most.unwrap_or(STARVED)));
                Ok(())
            }
            Err((_, error)) => Err(error),
        }
    }

    /// What becomes readable when something has ended.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns this descriptor and closes it only when it is dropped, which the borrow of `self`
        // keeps from happening.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Whether something has ended that was not taken out.
    pub(super) fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Takes out what has ended.
    pub(super) fn reap(&mut self, into: &mut Vec<Completion>) {
        into.extend(self.ring.completion().map(|entry: cqueue::Entry| (entry.user_data(), entry.result())));
    }

    fn fill(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: by the contract of `Ring::push`, through which every entry has come.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }
}

/// Builds a ring with the newest flags that the kernel knows.
fn build() -> io::Result<IoUring> {
    let base = || {
        let mut builder: Builder<squeue::Entry, cqueue::Entry> = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETIONS);
        builder
    };
    let mut newest = base();
    newest.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    match newest.build(ENTRIES) {
        // Before Linux 5.19: completions then come by interrupting the thread, and need no asking for.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => base().build(ENTRIES),
        result => result,
    }
}

fn explain(error: io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM) => {
            "io_uring is not to be had here: see the sysctl kernel.io_uring_disabled and the container's seccomp profile"
        }
        Some(libc::ENOMEM) => "no memory for an io_uring; before Linux 5.12, see the limit RLIMIT_MEMLOCK",
        _ => "an io_uring could not be set up",
    };
    io::Error::new(error.kind(), format!("{hint} ({error})"))
}
