//! What is on its way to the client.

use std::mem;

use tokio_uring::buf::IoBuf;

use crate::memory::Buffer;

/// Pieces in one send: as many as the kernel takes (IOV_MAX is 1024), with room.
const BATCH_PIECES: usize = 512;
/// Bytes in one send, so that memory is given back as it gets free.
const BATCH_BYTES: usize = 1 << 20;
/// Headers are gathered in pieces of about this size.
const GATHERED: usize = 16 << 10;
/// Payloads up to this size are copied behind their header: cheaper than an iovec of their own.
const COPIED: usize = 1 << 10;
/// Emptied pieces that are kept for further headers.
const SPARE: usize = BATCH_PIECES;

/// A run of bytes to be sent.
pub(crate) struct Piece {
    content: Content,
    /// Bytes of it that have been sent.
    sent: usize,
}

enum Content {
    Gathered(Vec<u8>),
    Payload(Buffer),
}

impl Piece {
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Gathered(bytes) => &bytes[self.sent..],
            Content::Payload(buffer) => &buffer.bytes()[self.sent..],
        }
    }
}

impl From<Vec<u8>> for Piece {
    fn from(bytes: Vec<u8>) -> Self {
        Self { content: Content::Gathered(bytes), sent: 0 }
    }
}

// SAFETY: the bytes of both kinds lie on the heap, and stay where they are when the piece is moved; nothing changes
// them while the kernel has the piece, since it has been moved into the operation.
unsafe impl IoBuf for Piece {
    fn stable_ptr(&self) -> *const u8 {
        self.bytes().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.bytes().len()
    }

    fn bytes_total(&self) -> usize {
        self.bytes().len()
    }
}

/// Takes note that this many bytes of a batch have been sent, and drops the pieces that have been sent whole.
pub(crate) fn advance(batch: &mut Vec<Piece>, mut sent: usize) {
    let mut whole = 0;
    for piece in batch.iter_mut() {
        let len = piece.bytes().len();
        if sent < len {
            piece.sent += sent;
            break;
        }
        sent -= len;
        whole += 1;
    }
    batch.drain(..whole);
}

/// Replies that wait to be sent, in order.
#[derive(Default)]
pub(crate) struct Outbox {
    pieces: Vec<Piece>,
    /// Of the gathered pieces: what payloads take is counted where they are.
    gathered_bytes: usize,
    spare: Vec<Vec<u8>>,
}

impl Outbox {
    /// Bytes of headers and other small things that wait.
    pub(crate) fn gathered_bytes(&self) -> usize {
        self.gathered_bytes
    }

    /// Appends what `write` writes.
    pub(crate) fn gather(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let open = match self.pieces.last_mut() {
            Some(Piece { content: Content::Gathered(bytes), .. }) => bytes.len() < GATHERED,
            _ => false,
        };
        if !open {
            self.pieces.push(self.spare.pop().unwrap_or_default().into());
        }
        if let Some(Piece { content: Content::Gathered(bytes), .. }) = self.pieces.last_mut() {
            let before = bytes.len();
            write(bytes);
            self.gathered_bytes += bytes.len() - before;
        }
    }

    /// Appends all of a buffer.
    pub(crate) fn payload(&mut self, buffer: Buffer) {
        if buffer.len() <= COPIED {
            self.gather(|bytes| bytes.extend_from_slice(buffer.bytes()));
        } else {
            self.pieces.push(Piece { content: Content::Payload(buffer), sent: 0 });
        }
    }

    /// The pieces to be sent next; none if nothing waits. `batch` is empty and lends its memory.
    pub(crate) fn take(&mut self, mut batch: Vec<Piece>) -> Vec<Piece> {
        let mut bytes = 0;
        let fits = |piece: &Piece| {
            let fits = bytes < BATCH_BYTES;
            bytes += piece.bytes().len();
            fits
        };
        let count = self.pieces.iter().take(BATCH_PIECES).map(fits).take_while(|fits| *fits).count();
        if count == self.pieces.len() {
            mem::swap(&mut self.pieces, &mut batch);
        } else {
            batch.extend(self.pieces.drain(..count));
        }
        for piece in &batch {
            if let Content::Gathered(bytes) = &piece.content {
                self.gathered_bytes -= bytes.len();
            }
        }
        batch
    }

    /// Takes what is left of a batch, which has been sent or will never be, for its memory.
    pub(crate) fn recycle(&mut self, mut batch: Vec<Piece>) -> Vec<Piece> {
        for piece in batch.drain(..) {
            if let Content::Gathered(mut bytes) = piece.content
                && self.spare.len() < SPARE
                && bytes.capacity() <= 2 * GATHERED
            {
                bytes.clear();
                self.spare.push(bytes);
            }
        }
        batch
    }

    /// Drops all of it.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.gathered_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(batch: &[Piece]) -> Vec<u8> {
        batch.iter().flat_map(Piece::bytes).copied().collect()
    }

    #[test]
    fn small_things_share_a_piece_and_are_counted() {
        let mut outbox = Outbox::default();
        for byte in 0..10 {
            outbox.gather(|bytes| bytes.push(byte));
        }
        assert_eq!(outbox.gathered_bytes(), 10);
        let batch = outbox.take(Vec::new());
        assert_eq!((batch.len(), sent(&batch)), (1, (0..10).collect()));
        assert_eq!(outbox.gathered_bytes(), 0);
        assert!(outbox.take(Vec::new()).is_empty());
        assert!(outbox.recycle(batch).is_empty());
    }

    #[test]
    fn a_batch_goes_on_where_the_kernel_has_stopped() {
        let mut batch: Vec<Piece> = vec![vec![0, 1, 2].into(), vec![3, 4].into(), vec![5].into()];
        advance(&mut batch, 4);
        assert_eq!((batch.len(), sent(&batch)), (2, vec![4, 5]));
        advance(&mut batch, 0);
        assert_eq!(sent(&batch), [4, 5]);
        advance(&mut batch, 2);
        assert!(batch.is_empty());
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut outbox = Outbox::default();
        for _ in 0..200 {
            outbox.gather(|bytes| bytes.extend([1; GATHERED]));
        }
        let first = outbox.take(Vec::new());
        assert_eq!(sent(&first).len(), BATCH_BYTES);
        assert_eq!(outbox.gathered_bytes(), 200 * GATHERED - BATCH_BYTES);
    }
}
