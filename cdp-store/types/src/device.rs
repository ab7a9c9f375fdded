//! A volume as its front ends see it.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::{BranchId, ByteRange, IoBuf, IoError, Origin, VolumeId};

/// What a client needs to know before its first request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Size, in bytes; a multiple of `logical_block_size`.
    pub capacity: u64,
    /// What offsets and lengths must be multiples of, in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// What they had better be multiples of, in bytes.
    pub physical_block_size: u32,
    /// The most data that one write may carry, in bytes: a power of two, at least 256 KiB. Reads may be longer.
    pub max_write_bytes: u64,
    /// Whether writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// What GET_ID answers: at most 20 bytes of ASCII (virtio 1.3, 5.2.6).
    pub serial: String,
}

/// Which disk's history a request belongs to; it is written into the in-flight region that a guest's
/// virtual machine monitor keeps for us, so that old requests are not replayed into another history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// The store's id.
    pub store: [u8; 16],
    /// The volume within it.
    pub volume: VolumeId,
    /// The branch that is the volume's head.
    pub branch: BranchId,
}

/// Chosen by the front end to recognise a completion; unique among one queue's requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// The ranges of one discard or write-zeroes request: together one request, so one instant.
pub type Ranges = SmallVec<[ByteRange; 1]>;

/// One request. Offsets and lengths are bytes, multiples of the device's logical block size; a request that
/// breaks this, or leaves the device, completes with [`crate::IoErrorKind::Invalid`].
#[derive(Debug)]
pub enum Op {
    /// Fill `into` from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Where to; its length is the request's.
        into: IoBuf,
    },
    /// Write `from` at `offset`. The memory is read once, some time before the request completes.
    Write {
        /// First byte.
        offset: u64,
        /// Where from; its length is the request's.
        from: IoBuf,
        /// The request's number in the in-flight region.
        origin: Origin,
        /// Whether it must be durable before it completes.
        fua: bool,
    },
    /// Make the ranges read as zeroes, always, edges of blocks included.
    WriteZeroes {
        /// What to zero.
        ranges: Ranges,
        /// Whether the space may be given back.
        unmap: bool,
        /// The request's number in the in-flight region.
        origin: Origin,
        /// Whether it must be durable before it completes.
        fua: bool,
    },
    /// The ranges' contents are no longer needed. Whole blocks read as zeroes afterwards; the edges of blocks
    /// that a range covers only in part stay as they are.
    Discard {
        /// What to discard.
        ranges: Ranges,
        /// The request's number in the in-flight region.
        origin: Origin,
    },
    /// Everything that had completed when this was submitted is durable once it completes.
    Flush,
}

/// What happened on a queue.
#[derive(Debug)]
pub enum Event {
    /// A request has ended. It counts as delivered at the queue's next `poll`: until then a crash may find it
    /// in the in-flight region, and the store keeps what it needs to recognise it.
    Completed {
        /// As submitted.
        id: RequestId,
        /// How it went.
        result: Result<(), IoError>,
    },
    /// An eventfd that is watched was written to; its counter has been read and is zero again.
    Ready {
        /// As given to `watch`.
        tag: u64,
    },
}

/// How long `poll` may sleep while there is nothing to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// At most this long.
    For(Duration),
    /// Until something happens.
    Forever,
}

/// Called on a change; says whether to call it again.
pub type Listener = Box<dyn Fn() -> bool + Send + Sync>;

/// A disk: a volume's head, or one of its past instants.
pub trait BlockDevice: Send + Sync + fmt::Debug {
    /// Its present properties; the capacity can grow.
    fn info(&self) -> DeviceInfo;

    /// Whose history it is.
    fn identity(&self) -> DeviceIdentity;

    /// Opens one more queue. Each belongs to one thread; requests of several queues run side by side, and
    /// writes are acknowledged in the order of the log across all of them.
    ///
    /// # Errors
    /// When the operating system gives no io_uring or no memory for it.
    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>>;

    /// A number for a new request that changes data: never given out before by this store.
    fn new_origin(&self) -> Origin;

    /// Which of these requests, in flight when an earlier process died, are in the log that survived it.
    /// They are complete and must not be run again: a later, acknowledged write may lie over them.
    fn survived(&self, origins: &[Origin]) -> Vec<bool>;

    /// Has `notify` called, from any thread, whenever `info` has changed, until it says that nobody listens any more. It
    /// must not block.
    fn on_change(&self, notify: Listener);
}

/// One thread's lane into a [`BlockDevice`]. Dropping it waits for what is in flight in the kernel.
pub trait DeviceQueue: Send {
    /// Takes a request. Never blocks, never fails: how it went is told by [`Event::Completed`], in any order.
    /// Requests taken between two calls of `poll` may share one write to the log.
    fn submit(&mut self, id: RequestId, op: Op);

    /// Reports [`Event::Ready`] with `tag` whenever the eventfd is written to, until `unwatch`.
    ///
    /// # Errors
    /// When too many are watched.
    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()>;

    /// Stops reporting `tag`; no event with it is returned by any later `poll`.
    fn unwatch(&mut self, tag: u64);

    /// Starts what was submitted, and appends what has happened to `events`; sleeps only while there is
    /// nothing to append. The one place in which a queue's thread sleeps.
    ///
    /// # Errors
    /// Only when the ring itself is broken; the queue cannot be used any further.
    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()>;

    /// What becomes readable when an armed queue has something to report: for a thread that sleeps elsewhere, as
    /// an async runtime does. It belongs to the queue and is only ever waited on, never read.
    ///
    /// # Errors
    /// `Unsupported` from queues that only sleep in `poll`.
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>>;

    /// Arms [`DeviceQueue::descriptor`] for one sleep elsewhere, after a `poll` that returned nothing. Says how long
    /// that sleep may be: [`Wait::No`] asks for a `poll` at once, [`Wait::For`] for one after that time at the latest.
    /// The next `poll` disarms it.
    ///
    /// # Errors
    /// As `poll` and `descriptor`.
    fn arm(&mut self) -> io::Result<Wait>;

    /// Requests submitted whose completion no `poll` has returned yet.
    fn in_flight(&self) -> usize;
}
