//! A disk in memory whose queues can be made to fail as those of a real one do when the kernel refuses.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cdp_types::{
    BlockDevice, DeviceIdentity, DeviceInfo, DeviceQueue, Event, Listener, MemoryConfig, MemoryDevice, Op,
    Origin, RequestId, Wait,
};

#[derive(Debug)]
pub(crate) struct FaultyDisk {
    disk: MemoryDevice,
    pub(crate) faults: Arc<Faults>,
}

#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// The next poll fails, and what it had to tell is lost.
    pub(crate) poll: AtomicBool,
    /// No more eventfds can be watched.
    pub(crate) watch: AtomicBool,
    /// Queues that are open.
    pub(crate) queues: AtomicUsize,
}

impl FaultyDisk {
    pub(crate) fn new(capacity: u64) -> Self {
        let disk = MemoryDevice::new(MemoryConfig::new(capacity)).unwrap();
        Self { disk, faults: Arc::default() }
    }
}

impl BlockDevice for FaultyDisk {
    fn info(&self) -> DeviceInfo {
        self.disk.info()
    }
    fn identity(&self) -> DeviceIdentity {
        self.disk.identity()
    }
    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let queue = self.disk.open_queue()?;
        self.faults.queues.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(FaultyQueue { queue, faults: Arc::clone(&self.faults) }))
    }
    fn new_origin(&self) -> Origin {
        self.disk.new_origin()
    }
    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        self.disk.survived(origins)
    }
    fn on_change(&self, notify: Listener) {
        self.disk.on_change(notify);
    }
}

struct FaultyQueue {
    queue: Box<dyn DeviceQueue>,
    faults: Arc<Faults>,
}

impl Drop for FaultyQueue {
    fn drop(&mut self) {
        self.faults.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

impl DeviceQueue for FaultyQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        self.queue.submit(id, op);
    }
    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        if self.faults.watch.load(Ordering::Relaxed) {
            return Err(io::Error::other("too many are watched"));
        }
        self.queue.watch(eventfd, tag)
    }
    fn unwatch(&mut self, tag: u64) {
        self.queue.unwatch(tag);
    }
    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        self.queue.poll(wait, events)?;
        if self.faults.poll.swap(false, Ordering::Relaxed) {
            events.truncate(before);
            return Err(io::Error::other("the ring is broken"));
        }
        Ok(())
    }
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.queue.descriptor()
    }
    fn arm(&mut self) -> io::Result<Wait> {
        self.queue.arm()
    }
    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }
}
