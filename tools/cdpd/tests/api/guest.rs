//! A guest's driver, as small as it gets: `blkio`'s, with one queue.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, ReqFlags};

const DEADLINE: Duration = Duration::from_secs(20);

/// A guest whose ring runs. Dropping it closes its connection, as the end of a virtual machine does.
pub(crate) struct Guest {
    // Before the driver, whose memory it uses.
    queue: Blkioq,
    _blkio: Blkio,
}

impl Guest {
    pub(crate) fn start(socket: &Path) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", 1).unwrap();
        let queue = blkio.start().unwrap().queues.remove(0);
        Self { queue, _blkio: blkio }
    }

    /// Zeroes part of the disk.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        assert!(self.try_zero(offset, len, DEADLINE), "the guest's request has no end");
    }

    /// Whether nobody answers its requests any more.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        !self.try_zero(0, 4096, Duration::from_secs(1))
    }

    fn try_zero(&mut self, offset: u64, len: u64, mut patience: Duration) -> bool {
        self.queue.write_zeroes(offset, len, 0, ReqFlags::empty());
        let mut done = [MaybeUninit::uninit()];
        self.queue.do_io(&mut done, 1, Some(&mut patience), None).is_ok_and(|done| done == 1)
    }
}
