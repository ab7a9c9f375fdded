//! How bytes get to a client and back: the seam between the protocol and sockets.

mod plain;
mod tls;

use std::future::Future;
use std::io;

use tokio_uring::BufResult;
use tokio_uring::buf::BoundedBufMut;

pub(crate) use plain::Plain;
pub(crate) use tls::{Tls, TlsSettings};

use crate::outgoing::Piece;

/// A stream to and from one client. One reads and one sends at a time, side by side. Buffers are handed over and
/// come back, since the kernel works on them while the thread does something else.
pub(crate) trait Transport {
    /// Receives at least a byte, at most what fits; 0 at the end of the client's stream.
    ///
    /// When dropped, what is received is lost; the buffer is kept until the kernel is through with it.
    fn read<B: BoundedBufMut>(&self, into: B) -> impl Future<Output = BufResult<usize, B>>;

    /// Sends all pieces, in order. What comes back is only their memory.
    fn send(&self, batch: Vec<Piece>) -> impl Future<Output = (io::Result<()>, Vec<Piece>)>;

    /// Ends the stream to the client, as politely as it can be done without waiting for the client.
    fn farewell(&self) -> impl Future<Output = ()>;
}
