//! Lines of bounded length from a byte stream.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is asked of the stream at a time.
const READ_BYTES: usize = 16 << 10;
/// A buffer that a long line has made larger than this is given back after it.
const KEEP_BYTES: usize = 256 << 10;

/// What [`Lines::next`] found instead of a line.
#[derive(Debug)]
pub(crate) enum NoLine {
    /// The stream has ended between two lines.
    End,
    /// The stream has ended within a line.
    Torn,
    /// The line is longer than allowed.
    TooLong,
    Io(io::Error),
}

/// Splits a stream into lines, none longer than `max_bytes`.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    stream: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no line end.
    searched: usize,
    max_bytes: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(stream: R, max_bytes: usize) -> Self {
        Self { stream, buffer: Vec::new(), searched: 0, max_bytes }
    }

    /// The next line without its end. Cancel-safe: what has been read stays here.
    pub(crate) async fn next(&mut self) -> Result<Vec<u8>, NoLine> {
        loop {
            if let Some(line) = self.buffered() {
                return if line.len() > self.max_bytes { Err(NoLine::TooLong) } else { Ok(line) };
            }
            if self.buffer.len() > self.max_bytes {
                return Err(NoLine::TooLong);
            }
            self.buffer.reserve(READ_BYTES);
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) if self.buffer.is_empty() => return Err(NoLine::End),
                Ok(0) => return Err(NoLine::Torn),
                Ok(_) => {}
                Err(error) => return Err(NoLine::Io(error)),
            }
        }
    }

    /// What has come of a line that is not complete.
    pub(crate) fn partial(&self) -> &[u8] {
        &self.buffer
    }

    fn buffered(&mut self) -> Option<Vec<u8>> {
        let found = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = found.map(|at| self.searched + at) else {
            self.searched = self.buffer.len();
            return None;
        };
        let rest = self.buffer.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.buffer, rest);
        if self.buffer.capacity() > KEEP_BYTES {
            self.buffer.shrink_to(READ_BYTES);
        }
        self.searched = 0;
        line.truncate(end);
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Some(line)
    }
}

/// Bytes from outside, fit for a message: short, and without control characters.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const SHOWN_CHARS: usize = 80;
    let text = String::from_utf8_lossy(bytes);
    let mut shown: String = text.trim().chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.trim().chars().nth(SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(bytes: &[u8], max_bytes: usize) -> (Vec<Vec<u8>>, NoLine) {
        let mut lines = Lines::new(bytes, max_bytes);
        let mut found = Vec::new();
        loop {
            match lines.next().await {
                Ok(line) => found.push(line),
                Err(end) => return (found, end),
            }
        }
    }

    #[tokio::test]
    async fn lines_end_with_lf_or_crlf() {
        let (lines, end) = all(b"one\r\ntwo\n\nlast\n", 10).await;
        assert_eq!(lines, [&b"one"[..], b"two", b"", b"last"]);
        assert!(matches!(end, NoLine::End));
    }

    #[tokio::test]
    async fn a_line_without_end_is_torn_and_one_too_long_is_not_kept() {
        assert!(matches!(all(b"one\ntw", 10).await, (lines, NoLine::Torn) if lines.len() == 1));
        assert!(matches!(all(b"0123456789\n", 9).await.1, NoLine::TooLong));
        assert!(matches!(all(&[b'x'; 100_000], 1000).await.1, NoLine::TooLong));
        assert!(matches!(all(b"0123456789\n", 10).await, (lines, NoLine::End) if lines.len() == 1));
    }

    #[test]
    fn an_excerpt_is_short_and_printable() {
        assert_eq!(excerpt(b"\x1b[2JSSH-2.0\r\n"), "\\u{1b}[2JSSH-2.0");
        assert_eq!(excerpt(&[b'a'; 200]).chars().count(), 81);
    }
}
