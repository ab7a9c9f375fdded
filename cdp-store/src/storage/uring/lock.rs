//! One owner per store.
//!
//! The owner holds an flock on the file `lock`. Every lane's ring has that file in its table, and the kernel lets
//! go of the table only when nothing is in flight in the ring any more: so after a SIGKILL the lock outlives the
//! process for as long as its writes do, and whoever gets the lock knows that no old write can land any more.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// The lock's name in the store's directory.
pub(super) const NAME: &str = "lock";

/// How often a lock that should come free is tried.
const RETRY: Duration = Duration::from_millis(5);

/// A lock that is held. Dropping it unlocks, even while a ring's table still names the file.
#[derive(Debug)]
pub(super) struct StoreLock {
    file: File,
}

impl StoreLock {
    /// Takes the lock for the one process that may write, creating its file if need be.
    ///
    /// # Errors
    /// `WouldBlock`, naming the store and the owner, if another process has it: at once if that is alive, after
    /// `outwait` if it is not.
    pub(super) fn exclusive(directory: BorrowedFd<'_>, store: &Path, outwait: Duration) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = File::from(openat(directory, NAME, flags, Mode::from_raw_mode(0o644))?);
        acquire(&file, FlockOperation::NonBlockingLockExclusive, store, outwait)?;
        let lock = Self { file };
        Owner::this_process().write(&lock.file)?;
        Ok(lock)
    }

    /// Takes the lock beside other readers; `None` where the store has no lock file, as in a copy.
    ///
    /// # Errors
    /// `WouldBlock` as above, if a writer has it.
    pub(super) fn shared(
        directory: BorrowedFd<'_>,
        store: &Path,
        outwait: Duration,
    ) -> io::Result<Option<Self>> {
        let file = match openat(directory, NAME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        acquire(&file, FlockOperation::NonBlockingLockShared, store, outwait)?;
        Ok(Some(Self { file }))
    }
}

impl AsFd for StoreLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for StoreLock {
    fn drop(&mut self) {
        // Closing would not be enough: rings close in the background, and would hold the lock until they have.
        if let Err(error) = flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(%error, "the store's lock could not be released");
        }
    }
}

fn acquire(file: &File, how: FlockOperation, store: &Path, outwait: Duration) -> io::Result<()> {
    let deadline = Instant::now() + outwait;
    loop {
        match flock(file, how) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        let owner = Owner::read(file);
        let running = owner.is_some_and(Owner::is_running);
        if running || Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                InUse { store, owner, running }.to_string(),
            ));
        }
        thread::sleep(RETRY);
    }
}

/// Why a store cannot be had.
struct InUse<'a> {
    store: &'a Path,
    owner: Option<Owner>,
    running: bool,
}

impl fmt::Display for InUse<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = self.store.display();
        match self.owner {
            Some(owner) if self.running => write!(f, "the store {store} is in use by process {}", owner.pid),
            Some(owner) => write!(
                f,
                "the store {store} is still locked, though its last owner, process {}, has ended: that one's last \
                 writes are still under way, or the store is being read",
                owner.pid
            ),
            None => write!(f, "the store {store} is in use by a process that has not said which"),
        }
    }
}

/// Who holds, or held, the lock: a process id alone can be given out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    pid: u32,
    /// In clock ticks since boot; zero where it is not known.
    started: u64,
}

impl Owner {
    fn this_process() -> Self {
        let pid = std::process::id();
        Self { pid, started: ProcStat::read(pid).map_or(0, |stat| stat.started) }
    }

    fn write(self, file: &File) -> io::Result<()> {
        let text = format!("{} {}\n", self.pid, self.started);
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(text.len() as u64)
    }

    /// What the lock file says; `None` if nothing, as for a moment after its creation.
    fn read(file: &File) -> Option<Self> {
        let mut text = [0; 64];
        let len = file.read_at(&mut text, 0).ok()?;
        let mut words = std::str::from_utf8(&text[..len]).ok()?.split_whitespace();
        Some(Self { pid: words.next()?.parse().ok()?, started: words.next()?.parse().ok()? })
    }

    fn is_running(self) -> bool {
        match ProcStat::read(self.pid) {
            Some(stat) => !stat.has_ended && (self.started == 0 || stat.started == self.started),
            // No /proc, or one that hides other users' processes.
            None => i32::try_from(self.pid)
                .ok()
                .and_then(Pid::from_raw)
                .is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH)),
        }
    }
}

/// What `/proc/PID/stat` says (proc_pid_stat(5)).
struct ProcStat {
    has_ended: bool,
    started: u64,
}

impl ProcStat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in parentheses, and may hold anything, parentheses included.
        let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
        let state = fields.next()?;
        // From here the fourth field is next, and the twenty-second is wanted.
        let started = fields.nth(18)?.parse().ok()?;
        Some(Self { has_ended: matches!(state, "Z" | "X"), started })
    }
}

/// The store's directory, opened as what all names are relative to.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(rustix::fs::CWD, path, flags, Mode::empty())?)
}
