//! A socket as it is.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use smallvec::SmallVec;
use tokio_uring::BufResult;
use tokio_uring::buf::BoundedBufMut;
use tokio_uring::net::{TcpStream, UnixStream};

use super::Transport;
use crate::control::Control;
use crate::outgoing::{Piece, advance};
use crate::socket::Socket;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A Unix or TCP socket.
pub(crate) struct Plain {
    stream: Stream,
    control: Arc<Control>,
}

impl Plain {
    pub(crate) fn new(socket: Socket, control: Arc<Control>) -> Self {
        let stream = match socket {
            Socket::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)),
            Socket::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)),
        };
        Self { stream, control }
    }

    /// Sends what the socket's buffer has room for, without waiting.
    fn send_now(&self, batch: &[Piece]) -> io::Result<usize> {
        let raw = match &self.stream {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        };
        // SAFETY: the stream owns the descriptor, and closes it only when it is dropped, which cannot be while this
        // function borrows it.
        let fd = unsafe { BorrowedFd::borrow_raw(raw) };
        let slices: SmallVec<[IoSlice<'_>; 64]> =
            batch.iter().map(|piece| IoSlice::new(piece.bytes())).collect();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(fd, &slices, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn moved(&self, bytes: usize) {
        self.control.moved_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Transport for Plain {
    async fn read<B: BoundedBufMut>(&self, into: B) -> BufResult<usize, B> {
        let (result, into) = match &self.stream {
            Stream::Unix(stream) => stream.read(into).await,
            Stream::Tcp(stream) => stream.read(into).await,
        };
        if let Ok(count) = result {
            self.moved(count);
        }
        (result, into)
    }

    async fn send(&self, mut batch: Vec<Piece>) -> (io::Result<()>, Vec<Piece>) {
        // Nearly always the socket has room: then the replies are on their way before the thread goes to sleep, and no
        // completion has to be waited for.
        let mut result = match self.send_now(&batch) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        };
        loop {
            match result {
                Ok(count) => {
                    self.moved(count);
                    advance(&mut batch, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(error), batch),
            }
            if batch.is_empty() {
                return (Ok(()), batch);
            }
            let _turn = self.control.wait_for_client();
            (result, batch) = match &self.stream {
                Stream::Unix(stream) => stream.writev(batch).await,
                Stream::Tcp(stream) => stream.writev(batch).await,
            };
        }
    }

    async fn farewell(&self) {
        self.control.end_sending();
    }
}
