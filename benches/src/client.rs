//! A disk as a guest's driver sees it, through `blkio`: a vhost-user server, or a file with `io_uring`.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkio::{Blkio, Blkioq, Completion, Errno, ReqFlags};
use e2e::process::wait_for;

/// Descriptors that one request takes: header, data, status. `blkio` does not use indirect tables.
const DESCRIPTORS: usize = 3;
/// The longest ring that qemu-storage-daemon accepts.
const MAX_RING: usize = 1024;
/// How long a server of others may take until it lets us in.
const CONNECT: Duration = Duration::from_secs(20);

/// Where a disk is to be had.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// The socket of a vhost-user-blk server.
    VhostUser(PathBuf),
    /// A raw file, read and written in place with `O_DIRECT` by this very process.
    File(PathBuf),
}

/// How a client connects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Its queues.
    pub(crate) queues: usize,
    /// Requests that each queue can have in flight.
    pub(crate) depth: usize,
    /// The longest request, in bytes.
    pub(crate) request_bytes: usize,
}

/// A connection to a disk. Dropping it closes the socket and says nothing before, whatever is in flight.
pub(crate) struct Client {
    // The queues use the driver's memory: they go first.
    lanes: Vec<Lane>,
    blkio: Blkio,
}

/// One queue, and a buffer for each request that it can have in flight: the request's *slot*.
pub(crate) struct Lane {
    queue: Blkioq,
    /// The address of the buffers. They are memory that `queue` keeps mapped.
    buffers: usize,
    shape: Shape,
    in_flight: usize,
    completions: Vec<MaybeUninit<Completion>>,
    done: Vec<Done>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// Its slot.
    pub(crate) slot: usize,
    /// Whether it succeeded.
    pub(crate) ok: bool,
}

impl Client {
    /// Connects and starts the queues.
    ///
    /// # Errors
    /// There is no server, or it refuses something.
    pub(crate) fn connect(place: &Place, shape: Shape) -> Result<Self> {
        let mut blkio = open(place, shape)?;
        let slots = shape.queues * shape.depth;
        let queues = blkio.start().context("cannot start the queues")?.queues;
        ensure!(queues.len() == shape.queues, "{} queues instead of {}", queues.len(), shape.queues);
        let region = blkio.alloc_mem_region(slots * shape.request_bytes)?;
        blkio.map_mem_region(&region).context("the server refuses the buffers' memory")?;
        let lane = |(index, queue)| Lane {
            queue,
            buffers: region.addr + index * shape.depth * shape.request_bytes,
            shape,
            in_flight: 0,
            completions: (0..shape.depth).map(|_| MaybeUninit::uninit()).collect(),
            done: Vec::with_capacity(shape.depth),
        };
        let lanes = queues.into_iter().enumerate().map(lane).collect();
        Ok(Self { lanes, blkio })
    }

    /// The same, again and again for a while. A server of others may have its socket before it listens there, and refuse a
    /// connection until it has done with the one before; guests try again, too.
    ///
    /// # Errors
    /// The last attempt's.
    pub(crate) fn connect_in_time(place: &Place, shape: Shape) -> Result<Self> {
        let mut last = None;
        let connected = wait_for("a connection", CONNECT, || match Self::connect(place, shape) {
            Ok(client) => Ok(Some(client)),
            Err(error) => {
                last = Some(error);
                Ok(None)
            }
        });
        connected.map_err(|error| match last {
            Some(last) => last.context(error.to_string()),
            None => error,
        })
    }

    /// The disk's size in bytes.
    ///
    /// # Errors
    /// The server does not say.
    pub(crate) fn capacity(&self) -> Result<u64> {
        Ok(self.blkio.get_u64("capacity")?)
    }

    /// Whether the disk has both discard and write-zeroes.
    ///
    /// # Errors
    /// The server does not say.
    pub(crate) fn can_zero(&self) -> Result<bool> {
        Ok(self.blkio.get_u64("max-discard-len")? > 0 && self.blkio.get_u64("max-write-zeroes-len")? > 0)
    }

    /// The queues.
    pub(crate) fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }
}

fn open(place: &Place, shape: Shape) -> Result<Blkio> {
    let mut blkio;
    match place {
        Place::VhostUser(socket) => {
            blkio = Blkio::new("virtio-blk-vhost-user")?;
            blkio.set_str("path", text(socket)?)?;
            blkio.connect().with_context(|| format!("cannot connect to {}", socket.display()))?;
            let ring = (shape.depth * DESCRIPTORS).next_power_of_two().clamp(128, MAX_RING);
            blkio.set_i32("queue-size", ring as i32)?;
        }
        Place::File(file) => {
            blkio = Blkio::new("io_uring")?;
            blkio.set_str("path", text(file)?)?;
            blkio.set_bool("direct", true)?;
            blkio.connect().with_context(|| format!("cannot open {}", file.display()))?;
            blkio.set_i32("num-entries", shape.depth.next_power_of_two().max(32) as i32)?;
        }
    }
    blkio.set_i32("num-queues", shape.queues as i32)?;
    Ok(blkio)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

impl Lane {
    /// How the client connected.
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts bytes into the start of a slot's buffer. The slot has no request in flight.
    pub(crate) fn fill(&mut self, slot: usize, bytes: &[u8]) {
        let buffer = self.buffer(slot, bytes.len());
        // SAFETY: `buffer` checks that `bytes.len()` bytes are within the slot's part of the region, which `queue`
        // keeps mapped and writable while `self` lives. No reference to that memory is ever made; a server that
        // touches it without a request in flight garbles the disk's content, which is what clients look for.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len()) }
    }

    /// Copies the start of a slot's buffer. The slot has no request in flight.
    pub(crate) fn copy(&self, slot: usize, bytes: &mut [u8]) {
        let buffer = self.buffer(slot, bytes.len());
        // SAFETY: as in `fill`; the memory comes zeroed from the kernel, so it is initialised.
        unsafe { ptr::copy_nonoverlapping(buffer.cast_const(), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Queues a read into a slot's buffer.
    pub(crate) fn read(&mut self, slot: usize, offset: u64, len: usize) {
        let buffer = self.buffer(slot, len);
        self.queue.read(offset, buffer, len, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Queues a write from a slot's buffer.
    pub(crate) fn write(&mut self, slot: usize, offset: u64, len: usize) {
        let buffer = self.buffer(slot, len);
        self.queue.write(offset, buffer, len, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Queues a flush.
    pub(crate) fn flush(&mut self, slot: usize) {
        self.queue.flush(slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Queues a write of zeroes.
    pub(crate) fn write_zeroes(&mut self, slot: usize, offset: u64, len: usize) {
        self.queue.write_zeroes(offset, len as u64, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Queues a discard.
    pub(crate) fn discard(&mut self, slot: usize, offset: u64, len: usize) {
        self.queue.discard(offset, len as u64, slot, ReqFlags::empty());
        self.in_flight += 1;
    }

    /// Tells the server of what was queued, waits for at least `least` of the requests in flight, or as long as
    /// `patience`, and returns those that have ended.
    ///
    /// # Errors
    /// The driver's. That nothing ended in time is none.
    pub(crate) fn reap(&mut self, least: usize, mut patience: Duration) -> Result<&[Done]> {
        self.done.clear();
        let least = least.min(self.in_flight);
        let ended = loop {
            match self.queue.do_io(&mut self.completions, least, Some(&mut patience), None) {
                Ok(ended) => break ended,
                Err(error) if error.errno() == Errno::TIME => break 0,
                // This program was stopped for a while, or looked at. The driver has taken what has passed off the patience.
                Err(error) if error.errno() == Errno::INTR => {}
                Err(error) => return Err(error).context("the driver cannot go on"),
            }
        };
        for completion in &self.completions[..ended] {
            // SAFETY: `do_io` has written as many completions as it returned; they are read before the next call.
            let completion = unsafe { completion.assume_init_ref() };
            self.done.push(Done { slot: completion.user_data, ok: completion.ret == 0 });
        }
        self.in_flight -= ended;
        Ok(&self.done)
    }

    /// The address of a slot's buffer, of which `len` bytes are going to be used.
    fn buffer(&self, slot: usize, len: usize) -> *mut u8 {
        assert!(slot < self.shape.depth && len <= self.shape.request_bytes, "slot {slot} has no {len} bytes");
        ptr::with_exposed_provenance_mut(self.buffers + slot * self.shape.request_bytes)
    }
}
