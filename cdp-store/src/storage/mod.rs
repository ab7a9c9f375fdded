//! The seam below the log: files, and lanes that do I/O on them without blocking.
//!
//! In production it is io_uring on a directory ([`uring`]); in tests a simulated disk ([`sim`]) that tears,
//! drops, reorders and fails, driven by one seed. Nothing above this seam knows which.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cdp_types::{IoBuf, Wait};

#[cfg(test)]
mod conformance;
pub mod sim;
pub mod uring;

pub use cdp_types::AlignedBuf;

/// What direct I/O demands of offsets and memory, and what a torn write can destroy; in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// File offsets and lengths are multiples of this.
    pub offset: u32,
    /// Memory addresses are multiples of this.
    pub memory: u32,
    /// The unit that the device writes whole: a torn write can destroy all of it.
    pub physical_block: u32,
}

impl Alignment {
    /// Refuses what direct I/O would refuse, so that every storage is as strict, and says why.
    fn check_place(&self, offset: u64, len: usize) -> io::Result<()> {
        let unit = u64::from(self.offset);
        let representable = offset.checked_add(len as u64).is_some_and(|end| i64::try_from(end).is_ok());
        if representable && offset.is_multiple_of(unit) && (len as u64).is_multiple_of(unit) {
            return Ok(());
        }
        let text = format!("{len} bytes at {offset} do not keep to blocks of {unit}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}

/// A file of the store, by direct I/O. Offsets and lengths keep to [`Alignment::offset`].
///
/// The blocking calls are for opening, recovery and background work; requests go through a [`Lane`].
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a segment is empty")]
pub trait File: Send + Sync + fmt::Debug {
    /// Its name, relative to the store's directory, for messages.
    fn name(&self) -> &str;

    /// Its length, in bytes.
    ///
    /// # Errors
    /// What the operating system says.
    fn len(&self) -> io::Result<u64>;

    /// Fills `into` from `offset`; what lies past the end of the file reads as zeroes.
    ///
    /// # Errors
    /// What the operating system says; never a short read.
    fn read_at(&self, offset: u64, into: &mut AlignedBuf) -> io::Result<()>;

    /// Writes all of `from` at `offset`.
    ///
    /// # Durability
    /// None before [`File::sync`].
    ///
    /// # Errors
    /// What the operating system says; how much was written is then unknown.
    fn write_at(&self, offset: u64, from: &AlignedBuf) -> io::Result<()>;

    /// fdatasync.
    ///
    /// # Durability
    /// Every write that had completed when this was called survives a power cut, once it returns.
    ///
    /// # Errors
    /// Whatever was written since the last sync may be lost: never retry, treat the file as poisoned.
    fn sync(&self) -> io::Result<()>;

    /// Has the file system set aside the blocks of the file's first `len` bytes, as far as it has none yet. They read as
    /// zeroes, and what is written there later neither lacks space nor makes the file longer.
    ///
    /// # Durability
    /// None before [`File::sync`].
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where that cannot be done; what the operating system says.
    fn reserve(&self, len: u64) -> io::Result<()>;

    /// For the other half of the same implementation.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// A directory that holds one store.
///
/// Names are relative to it, their parts separated by `/`; what could leave it (an absolute name, `..`) is an
/// [`io::ErrorKind::InvalidInput`].
pub trait Storage: Send + Sync + fmt::Debug {
    /// What I/O must keep to.
    fn alignment(&self) -> Alignment;

    /// Creates a file that must not exist, with its name in the directory not yet durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>>;

    /// Opens a file that exists.
    ///
    /// # Errors
    /// What the operating system says.
    fn open(&self, name: &str) -> io::Result<Arc<dyn File>>;

    /// Creates a sub-directory unless it is there already. `segments` is a name in the store's directory itself,
    /// whose name is `""` everywhere in this trait.
    ///
    /// # Durability
    /// None before [`Storage::sync_directory`] of the directory that it lies in.
    ///
    /// # Errors
    /// What the operating system says.
    fn create_directory(&self, name: &str) -> io::Result<()>;

    /// The names of the files in a sub-directory (relative to it), sorted; empty if there is no such directory.
    /// Directories are left out, and so is the file that locks the store.
    ///
    /// # Errors
    /// What the operating system says.
    fn list(&self, directory: &str) -> io::Result<Vec<String>>;

    /// Removes a name; whoever has the file open can go on using it.
    ///
    /// # Errors
    /// What the operating system says.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes creations and removals in a sub-directory durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn sync_directory(&self, directory: &str) -> io::Result<()>;

    /// Bytes that can still be written before the file system is full.
    ///
    /// # Errors
    /// What the operating system says.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Opens a lane for one thread.
    ///
    /// # Errors
    /// What the operating system says.
    fn lane(&self) -> io::Result<Box<dyn Lane>>;
}

/// Chosen by the caller to recognise an operation; unique among one lane's operations in flight.
pub type Token = u64;

/// What a lane reports.
#[derive(Debug)]
pub enum Done {
    /// A read, write or sync has ended. Reads and writes are never short: what falls short is an error.
    Io {
        /// As given.
        token: Token,
        /// How it went.
        result: io::Result<()>,
        /// A write's buffer, to be used again.
        buffer: Option<AlignedBuf>,
    },
    /// A watched eventfd was written to, and has been read back to zero.
    Ready {
        /// As given to `watch`.
        tag: u64,
    },
}

/// Wakes one lane out of its `poll`, from any thread.
pub trait Waker: Send + Sync {
    /// Makes the lane's present `poll`, or its next one, return at once. Cheap when it is not asleep.
    fn wake(&self);
}

/// One thread's I/O: operations are started in order and end in any order. The lane owns or shares the memory of
/// what is in flight until it has ended. Dropping it waits for that, however long the device takes.
pub trait Lane: Send {
    /// Starts filling `into` from the file's `offset`; past the end of the file is an error here
    /// ([`io::ErrorKind::UnexpectedEof`]). Memory that direct I/O cannot use costs a copy, no more.
    fn read(&mut self, token: Token, file: &Arc<dyn File>, offset: u64, into: IoBuf);

    /// Starts writing `from[range]` at the file's `offset`; the buffer comes back with the completion. The range's
    /// start keeps to [`Alignment::memory`].
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    fn write(
        &mut self,
        token: Token,
        file: &Arc<dyn File>,
        offset: u64,
        from: AlignedBuf,
        range: std::ops::Range<usize>,
    );

    /// Starts an fdatasync. It covers the writes that had *ended* when this was called, whatever their lane.
    fn sync(&mut self, token: Token, file: &Arc<dyn File>);

    /// Reports [`Done::Ready`] whenever the eventfd is written to, until `unwatch`. Several writes may be reported
    /// as one.
    ///
    /// # Errors
    /// When too many are watched, or something is watched under that tag already.
    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()>;

    /// Stops reporting `tag`: no [`Done::Ready`] with it comes from here on. What had been written to the eventfd
    /// and not reported is left in it, or put back at one of the next polls.
    fn unwatch(&mut self, tag: u64);

    /// A handle that wakes this lane.
    fn waker(&self) -> Arc<dyn Waker>;

    /// Hands what was started to the kernel, as far as a lane has not done so by itself, and appends what has ended to
    /// `done`; sleeps only while there is nothing to append and nobody has called the waker.
    ///
    /// # Errors
    /// Only when the ring itself is broken.
    fn poll(&mut self, wait: Wait, done: &mut Vec<Done>) -> io::Result<()>;

    /// What becomes readable when an armed lane has something to report, for a thread that sleeps elsewhere.
    ///
    /// # Errors
    /// `Unsupported` from a simulated lane, which only sleeps in `poll`.
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>>;

    /// Arms [`Lane::descriptor`] for one sleep elsewhere; false if `poll` has something to report already. The next
    /// `poll` disarms it.
    ///
    /// # Errors
    /// As `poll` and `descriptor`.
    fn arm(&mut self) -> io::Result<bool>;

    /// Operations started (watches not counted) and not yet reported.
    fn in_flight(&self) -> usize;
}

/// Refuses a name that could leave the store's directory.
fn check_name(name: &str) -> io::Result<()> {
    let stays = |part: &str| !matches!(part, "" | "." | "..");
    if name.split('/').all(stays) && !name.contains('\0') {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is not a name in a store's directory")))
}
