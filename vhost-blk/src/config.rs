//! What a server is told, and the bounds that follow from it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, ErrorKind};

/// How one disk is served.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the socket is created. A stale one is replaced.
    pub socket: PathBuf,
    /// The socket's permission bits; who may connect may read and write the whole disk.
    pub mode: u32,
    /// How many queues a guest may use, 1 to 256; a thread runs for each one that it starts.
    pub queues: u16,
    /// The longest ring that is accepted: a power of two, at most 32768 (virtio 1.3, 2.7).
    pub max_queue_size: u16,
    /// How long a queue's thread at most looks for new requests before it sleeps; zero turns that off.
    pub busy_poll: Duration,
    /// A queue takes no new request while those it has taken carry this many bytes.
    pub queue_bytes: u64,
    /// How long, while a window of the guest's memory is open, touches may make no progress before whoever has opened
    /// it is told to give up (`Guard::open`). Not zero.
    pub guard_deadline: Duration,
}

/// The longest request, in bytes of data: what [`SEG_MAX`] segments of [`SIZE_MAX`] bytes can carry, rounded up.
/// A longer one is answered with an I/O error.
pub(crate) const MAX_REQUEST_BYTES: u64 = 32 << 20;
/// Data segments in a request, as a guest is told: with header and status they fill a ring of 128.
pub(crate) const SEG_MAX: u32 = 126;
/// Bytes in a data segment, as a guest is told.
pub(crate) const SIZE_MAX: u32 = 256 << 10;
/// Ranges in one discard or write-zeroes request.
pub(crate) const MAX_RANGES: u32 = 256;
/// Descriptors in an indirect table: as many as other devices take, though the specification stops at the ring's
/// size, because drivers use more than a small ring has.
pub(crate) const MAX_INDIRECT: u32 = 1024;

const _: () = assert!(SEG_MAX as u64 * SIZE_MAX as u64 <= MAX_REQUEST_BYTES);

impl ServerConfig {
    /// One queue of at most 1024, mode 0660, up to 200 µs of looking, 64 MiB in flight per queue, 5 s for the guard.
    #[must_use]
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            mode: 0o660,
            queues: 1,
            max_queue_size: 1024,
            busy_poll: Duration::from_micros(200),
            queue_bytes: 64 << 20,
            guard_deadline: Duration::from_secs(5),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |what: &str| Err(Error::because(ErrorKind::Config, &self.socket, what));
        if !(1..=256).contains(&self.queues) {
            return wrong("the number of queues must be 1 to 256");
        }
        if !self.max_queue_size.is_power_of_two() {
            return wrong("the queue size must be a power of two");
        }
        if self.queue_bytes == 0 {
            return wrong("a queue must be allowed some bytes in flight");
        }
        if self.guard_deadline.is_zero() {
            return wrong("touches of guest memory must be allowed some time");
        }
        Ok(())
    }
}
