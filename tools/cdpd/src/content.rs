//! A volume's whole content, read at an instant or written to a new volume, several requests at a time.

use std::collections::VecDeque;
use std::io;

use cdp_store::{ExtentState, Import, Resolved, Store, Volume};
use cdp_types::{
    BLOCK_SIZE, BlockDevice, BlockRange, ByteRange, DeviceQueue, Event, IoBuf, IoError, Op, Origin,
    RequestId, VolumeAt, Wait,
};

use crate::api::{ApiError, At, ErrorKind};
use crate::frames::{ContentStart, Frame, MAX_PAYLOAD};

/// Bytes of one request. A larger one gains nothing; the product with [`DEPTH`] is memory.
const REQUEST_BYTES: u64 = 512 << 10;
/// Requests in flight.
const DEPTH: usize = 8;

const _: () = assert!(REQUEST_BYTES as usize <= MAX_PAYLOAD && REQUEST_BYTES.is_multiple_of(BLOCK_SIZE));

/// Where a content stream goes. `Ok(false)` ends it early, without an error.
pub type Sink<'a> = dyn FnMut(Frame) -> Result<bool, ApiError> + 'a;

/// Sends what a volume held at an instant to `sink`: a start, the data, an end. What is zero is left out.
///
/// Blocks. `sink` is called with no lock held, and may block too.
///
/// # Errors
/// No such volume or instant; damage found by a checksum; whatever `sink` says. Nothing is then sent to it.
pub fn read(store: &Store, what: &VolumeAt, sink: &mut Sink<'_>) -> Result<At, ApiError> {
    // Map and content are asked for separately; found once, the instant is the same for both.
    // So is the volume: that can take a while, and another one may have got the name meanwhile.
    let volume = store.volume(&what.volume)?;
    let resolved = store.resolve_of(&volume, &what.instant)?;
    let at = At::from(resolved);
    let device = volume.open_resolved(resolved)?;
    let size_bytes = device.info().capacity;
    if !sink(Frame::Start(ContentStart { size_bytes, at: Some(at.clone()) }))? {
        return Ok(at);
    }
    let mut reader = Reader::new(&*device, sink)?;
    if reader.read_mapped(&volume, resolved, size_bytes)? {
        sink(Frame::End)?;
    }
    Ok(at)
}

/// Reads in order, several requests ahead.
struct Reader<'a, 'b> {
    queue: Box<dyn DeviceQueue>,
    sink: &'a mut Sink<'b>,
    /// Requests in the order in which the sink gets them.
    ahead: VecDeque<Ahead>,
    /// The number of the request at the front of `ahead`.
    front: u64,
    events: Vec<Event>,
}

struct Ahead {
    offset: u64,
    buffer: IoBuf,
    result: Option<Result<(), IoError>>,
}

impl<'a, 'b> Reader<'a, 'b> {
    fn new(device: &dyn BlockDevice, sink: &'a mut Sink<'b>) -> Result<Self, ApiError> {
        let queue = device.open_queue().map_err(|e| no_queue(&e))?;
        Ok(Self { queue, sink, ahead: VecDeque::with_capacity(DEPTH), front: 0, events: Vec::new() })
    }

    /// Reads every mapped extent; false if the sink has had enough.
    fn read_mapped(&mut self, volume: &Volume, at: Resolved, size: u64) -> Result<bool, ApiError> {
        let mut run = BlockRange::default();
        let mut outcome = Ok(true);
        volume.extents(at, volume.blocks(), &mut |extent| {
            if !matches!(extent.state, ExtentState::Mapped { .. }) {
                return true;
            }
            // Neighbours in the volume are one run, wherever the log has them.
            if !run.is_empty() && run.end() == extent.first_block {
                run.count += extent.block_count;
                return true;
            }
            let next = BlockRange::new(extent.first_block, extent.block_count);
            outcome = self.read_run(std::mem::replace(&mut run, next), size);
            matches!(outcome, Ok(true))
        })?;
        if !outcome? || !self.read_run(run, size)? {
            return Ok(false);
        }
        while !self.ahead.is_empty() {
            if !self.deliver()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_run(&mut self, run: BlockRange, size: u64) -> Result<bool, ApiError> {
        let bytes = run.bytes();
        // The last block of a volume of 512-byte sectors may be cut short by its end.
        let end = bytes.end().min(size);
        let mut offset = bytes.offset;
        while offset < end {
            if self.ahead.len() == DEPTH && !self.deliver()? {
                return Ok(false);
            }
            let len = (end - offset).min(REQUEST_BYTES);
            let buffer = IoBuf::zeroed(len as usize);
            let id = RequestId(self.front + self.ahead.len() as u64);
            self.queue.submit(id, Op::Read { offset, into: buffer.share() });
            self.ahead.push_back(Ahead { offset, buffer, result: None });
            offset += len;
        }
        Ok(true)
    }

    /// Waits for the oldest request and hands it on.
    fn deliver(&mut self) -> Result<bool, ApiError> {
        loop {
            match self.ahead.front_mut().map(|oldest| oldest.result.take()) {
                None => return Ok(true),
                Some(Some(result)) => {
                    result.map_err(failed_request)?;
                    break;
                }
                Some(None) => self.reap()?,
            }
        }
        self.front += 1;
        match self.ahead.pop_front() {
            Some(done) => (self.sink)(Frame::Data { offset: done.offset, bytes: done.buffer.to_vec() }),
            None => Ok(true),
        }
    }

    fn reap(&mut self) -> Result<(), ApiError> {
        self.queue.poll(Wait::Forever, &mut self.events).map_err(|e| broken_queue(&e))?;
        for event in self.events.drain(..) {
            if let Event::Completed { id, result } = event {
                let place = id.0.wrapping_sub(self.front) as usize;
                if let Some(request) = self.ahead.get_mut(place) {
                    request.result = Some(result);
                }
            }
        }
        Ok(())
    }
}

/// Writes a content stream into a volume that nobody sees before it is complete.
pub struct Writer {
    /// First, so that what is in flight has ended when an unfinished import goes.
    queue: Box<dyn DeviceQueue>,
    import: Import,
    size_bytes: u64,
    block: u64,
    /// Longest single write, in bytes.
    longest: usize,
    /// Where the next data may begin.
    position: u64,
    next: u64,
    events: Vec<Event>,
}

impl Writer {
    /// A writer into the volume that `import` makes.
    ///
    /// # Errors
    /// The operating system gives no queue.
    pub fn new(import: Import) -> Result<Self, ApiError> {
        let volume = import.volume();
        let info = volume.info();
        let queue = volume.open_queue().map_err(|e| no_queue(&e))?;
        Ok(Self {
            queue,
            import,
            size_bytes: info.capacity,
            block: u64::from(info.logical_block_size),
            longest: REQUEST_BYTES.min(info.max_write_bytes) as usize,
            position: 0,
            next: 0,
            events: Vec::new(),
        })
    }

    /// Starts writing `bytes` at `offset`; waits only while too much is in flight.
    ///
    /// # Errors
    /// The range is unaligned, out of order or outside the volume, or an earlier write has failed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ApiError> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        range
            .check(self.size_bytes, self.block)
            .map_err(|e| ApiError::new(ErrorKind::Invalid, e.to_string()))?;
        if offset < self.position {
            let message = format!("data at byte {offset} comes after data up to byte {}", self.position);
            return Err(ApiError::new(ErrorKind::Invalid, message));
        }
        self.position = range.end();
        let mut offset = offset;
        for part in bytes.chunks(self.longest) {
            let from = IoBuf::from_bytes(part);
            self.submit(Op::Write { offset, from, origin: Origin::default(), fua: false })?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Waits for everything, makes it durable and the volume visible.
    ///
    /// # Durability
    /// Once this returns, a power cut loses neither the volume nor a byte of it.
    ///
    /// # Errors
    /// A write, the flush or the store failed; nothing of the volume is left.
    pub fn commit(mut self) -> Result<(), ApiError> {
        self.wait_until(0)?;
        self.submit(Op::Flush)?;
        self.wait_until(0)?;
        drop(self.queue);
        Ok(self.import.commit()?)
    }

    fn submit(&mut self, op: Op) -> Result<(), ApiError> {
        self.wait_until(DEPTH - 1)?;
        self.queue.submit(RequestId(self.next), op);
        self.next += 1;
        Ok(())
    }

    fn wait_until(&mut self, in_flight: usize) -> Result<(), ApiError> {
        while self.queue.in_flight() > in_flight {
            self.queue.poll(Wait::Forever, &mut self.events).map_err(|e| broken_queue(&e))?;
            for event in self.events.drain(..) {
                if let Event::Completed { result, .. } = event {
                    result.map_err(failed_request)?;
                }
            }
        }
        Ok(())
    }
}

fn failed_request(error: IoError) -> ApiError {
    use cdp_types::IoErrorKind as Io;
    let kind = match error.kind() {
        Io::Invalid | Io::Unsupported => ErrorKind::Invalid,
        Io::ReadOnly => ErrorKind::ReadOnly,
        Io::NoSpace => ErrorKind::NoSpace,
        Io::Corrupt => ErrorKind::Corrupt,
        Io::Device => ErrorKind::Io,
        Io::Gone => ErrorKind::Unavailable,
    };
    ApiError::new(kind, error.to_string())
}

fn no_queue(error: &io::Error) -> ApiError {
    ApiError::new(ErrorKind::Io, format!("the operating system gives no I/O queue: {error}"))
}

fn broken_queue(error: &io::Error) -> ApiError {
    ApiError::new(ErrorKind::Io, format!("the I/O queue is broken: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use cdp_store::{StoreOptions, VolumeSpec};
    use cdp_types::{Instant, VolumeName};

    use super::*;

    #[test]
    fn content_goes_through_a_store_of_the_smallest_segments() {
        const AT: u64 = 4096;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
        Store::create(&path, &options).unwrap();
        let store = Store::open(&path, options).unwrap();
        let volume: VolumeName = "web1".parse().unwrap();
        let spec = VolumeSpec { size_bytes: 4 << 20, logical_block_size: 512 };
        let mut writer = Writer::new(store.begin_import(&volume, spec).unwrap()).unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 512) as u8 | 1).collect();
        writer.write(AT, &bytes).unwrap();
        writer.commit().unwrap();

        let mut found = Vec::new();
        let mut sink = |frame| {
            if let Frame::Data { offset, bytes } = frame {
                assert_eq!(offset, AT + found.len() as u64);
                found.extend(bytes);
            }
            Ok(true)
        };
        read(&store, &VolumeAt { volume, instant: Instant::Head }, &mut sink).unwrap();
        assert!(found == bytes, "{} bytes of {}", found.len(), bytes.len());
        store.close().unwrap();
    }
}
