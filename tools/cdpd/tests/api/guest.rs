//! A guest's driver, as small as it gets: `blkio`'s, with one queue.

use std::mem::MaybeUninit;
use std::path::Path;
use std::ptr;
use std::time::Duration;

use blkio::{Blkio, Blkioq, ReqFlags};

const DEADLINE: Duration = Duration::from_secs(20);
/// The longest read or write, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// A guest whose ring runs. Dropping it closes its connection, as the end of a virtual machine does.
pub(crate) struct Guest {
    // Before the driver, whose memory it uses.
    queue: Blkioq,
    /// The address of its only buffer, which is memory of the driver's.
    buffer: usize,
    _blkio: Blkio,
}

impl Guest {
    pub(crate) fn start(socket: &Path) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", 1).unwrap();
        let queue = blkio.start().unwrap().queues.remove(0);
        let region = blkio.alloc_mem_region(BUFFER_BYTES).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Self { queue, buffer: region.addr, _blkio: blkio }
    }

    /// Zeroes part of the disk.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        assert!(self.try_zero(offset, len, DEADLINE), "the guest's request has no end");
    }

    /// Writes whatever is in its buffer.
    pub(crate) fn write(&mut self, offset: u64, len: usize) {
        let buffer = self.buffer_of(len);
        self.queue.write(offset, buffer, len, 0, ReqFlags::empty());
        assert!(self.has_ended(DEADLINE), "the guest's request has no end");
    }

    /// Reads into its buffer.
    pub(crate) fn read(&mut self, offset: u64, len: usize) {
        let buffer = self.buffer_of(len);
        self.queue.read(offset, buffer, len, 0, ReqFlags::empty());
        assert!(self.has_ended(DEADLINE), "the guest's request has no end");
    }

    /// Has what it has written made durable.
    pub(crate) fn flush(&mut self) {
        self.queue.flush(0, ReqFlags::empty());
        assert!(self.has_ended(DEADLINE), "the guest's request has no end");
    }

    /// Whether nobody answers its requests any more.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        !self.try_zero(0, 4096, Duration::from_secs(1))
    }

    fn try_zero(&mut self, offset: u64, len: u64, patience: Duration) -> bool {
        self.queue.write_zeroes(offset, len, 0, ReqFlags::empty());
        self.has_ended(patience)
    }

    /// Whether its request has ended in time.
    fn has_ended(&mut self, mut patience: Duration) -> bool {
        let mut done = [MaybeUninit::uninit()];
        self.queue.do_io(&mut done, 1, Some(&mut patience), None).is_ok_and(|done| done == 1)
    }

    fn buffer_of(&self, len: usize) -> *mut u8 {
        assert!(len <= BUFFER_BYTES);
        ptr::with_exposed_provenance_mut(self.buffer)
    }
}
