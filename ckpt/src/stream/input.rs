//! Bytes of a stream, through a buffer of fixed size.

use std::io::{ErrorKind as IoKind, Read};

use crate::{Error, ErrorKind, Place};

/// Much larger than anything that is taken in one piece, so that moving the rest to the front is rare.
const BUFFER_BYTES: usize = 1 << 20;

/// Hands out a stream in pieces, however it arrives.
#[derive(Debug)]
pub(super) struct Input<R> {
    from: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The stream's position of `buffer[0]`.
    base: u64,
    /// What was taken since `record`.
    tape: Option<Vec<u8>>,
}

impl<R: Read> Input<R> {
    pub(super) fn new(from: R) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Self { from, buffer, start: 0, end: 0, base: 0, tape: None }
    }

    /// How many bytes have been taken.
    pub(super) fn position(&self) -> u64 {
        self.base + self.start as u64
    }

    /// An error about what comes next.
    pub(super) fn error(&self, kind: ErrorKind, what: impl Into<String>) -> Error {
        Error::new(kind, Place::Stream(self.position()), what)
    }

    /// Keeps what is taken from now on, from the last byte taken if `last` says so.
    pub(super) fn record(&mut self, last: bool) {
        self.tape = Some(if last { self.last(1).to_vec() } else { Vec::new() });
    }

    /// What was taken since `record`.
    pub(super) fn recorded(&mut self) -> Vec<u8> {
        self.tape.take().unwrap_or_default()
    }

    /// Takes `count` bytes: few enough for the buffer.
    pub(super) fn take(&mut self, count: usize) -> Result<&[u8], Error> {
        if self.end - self.start < count {
            self.fill(count)?;
        }
        let taken = &self.buffer[self.start..self.start + count];
        self.start += count;
        if let Some(tape) = &mut self.tape {
            tape.extend_from_slice(taken);
        }
        Ok(taken)
    }

    /// The last `count` bytes taken; at most as many as the last `take` took.
    pub(super) fn last(&self, count: usize) -> &[u8] {
        &self.buffer[self.start - count..self.start]
    }

    pub(super) fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_be_bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    /// A name behind the byte that says how long it is; none is empty.
    pub(super) fn name(&mut self) -> Result<String, Error> {
        let length = usize::from(self.u8()?);
        let name = String::from_utf8(self.take(length)?.to_vec());
        match name {
            Ok(name) if !name.is_empty() && !name.contains('\0') => Ok(name),
            _ => Err(self.error(ErrorKind::Malformed, "a name that is empty or no text")),
        }
    }

    /// The byte that comes next, without taking it; nothing at the end.
    pub(super) fn peek(&mut self) -> Result<Option<u8>, Error> {
        if self.start == self.end && !self.more(1)? {
            return Ok(None);
        }
        Ok(Some(self.buffer[self.start]))
    }

    /// Everything up to the end of the stream.
    pub(super) fn rest(mut self, limit: usize) -> Result<Vec<u8>, Error> {
        let mut rest = self.buffer[self.start..self.end].to_vec();
        let begin = self.position();
        let over = |length: usize| match length > limit {
            true => {
                let what = format!("more than {limit} bytes of device state");
                Err(Error::new(ErrorKind::Limit, Place::Stream(begin), what))
            }
            false => Ok(()),
        };
        loop {
            over(rest.len())?;
            (self.start, self.end) = (0, 0);
            self.base = begin + rest.len() as u64;
            if !self.more(1)? {
                return Ok(rest);
            }
            rest.extend_from_slice(&self.buffer[..self.end]);
        }
    }

    #[cold]
    fn fill(&mut self, count: usize) -> Result<(), Error> {
        while self.end - self.start < count {
            if !self.more(count)? {
                return Err(Error::new(
                    ErrorKind::Truncated,
                    Place::Stream(self.base + self.end as u64),
                    "it ends inside a section",
                ));
            }
        }
        Ok(())
    }

    /// Receives some more, with room for `count` bytes in one piece; false at the end of the stream.
    fn more(&mut self, count: usize) -> Result<bool, Error> {
        if self.start + count > self.buffer.len() || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            self.base += self.start as u64;
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == IoKind::Interrupted => {}
                Err(error) => {
                    let place = Place::Stream(self.base + self.end as u64);
                    return Err(Error::new(ErrorKind::Stream, place, "receiving").because(error));
                }
            }
        }
    }
}
