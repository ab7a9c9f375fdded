//! A volume in memory.

use std::collections::BTreeMap;
use std::time::Duration;

use cdp_types::{ByteRange, IoBuf, IoError};

use super::{Completion, PageStore, Request};
use crate::{Error, PAGE_SIZE, ZERO_PAGE};

/// A sparse volume in memory, which carries requests out at once. For tests and for looking into images.
#[derive(Debug, Default)]
pub struct MemoryPages {
    capacity: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_SIZE]>>,
    done: Vec<Completion>,
    bytes_written: u64,
    flushes: u64,
}

impl MemoryPages {
    /// A volume of zeroes.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Bytes that writes brought so far.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Flushes so far.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Bytes of pages that are not zero.
    #[must_use]
    pub fn bytes_used(&self) -> u64 {
        (self.pages.len() * PAGE_SIZE) as u64
    }

    /// Changes the byte at `offset`, as rot does.
    pub fn rot(&mut self, offset: u64) {
        let page = self.pages.entry(offset / PAGE_SIZE as u64).or_insert_with(|| Box::new(ZERO_PAGE));
        page[offset as usize % PAGE_SIZE] ^= 0x10;
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), IoError> {
        Ok(ByteRange::new(offset, len).check(self.capacity, PAGE_SIZE as u64)?)
    }

    fn read(&self, offset: u64, into: &IoBuf) {
        into.fill_zero(0, into.len());
        let (first, count) = (offset / PAGE_SIZE as u64, (into.len() / PAGE_SIZE) as u64);
        for (page, bytes) in self.pages.range(first..first + count) {
            into.copy_in((page - first) as usize * PAGE_SIZE, &bytes[..]);
        }
    }

    fn write(&mut self, offset: u64, from: &IoBuf) {
        for at in (0..from.len()).step_by(PAGE_SIZE) {
            let mut page = Box::new(ZERO_PAGE);
            from.copy_out(at, &mut page[..]);
            self.pages.insert((offset + at as u64) / PAGE_SIZE as u64, page);
        }
        self.bytes_written += from.len() as u64;
    }

    fn zero(&mut self, range: ByteRange) {
        let pages = range.whole_blocks();
        self.pages.retain(|page, _| !pages.contains(*page));
    }

    fn carry_out(&mut self, request: &Request) -> Result<(), IoError> {
        match request {
            Request::Read { offset, into } => {
                self.check(*offset, into.len() as u64)?;
                self.read(*offset, into);
            }
            Request::Write { offset, from } => {
                self.check(*offset, from.len() as u64)?;
                self.write(*offset, from);
            }
            Request::Zero(range) => {
                self.check(range.offset, range.len)?;
                self.zero(*range);
            }
            Request::Flush => self.flushes += 1,
        }
        Ok(())
    }
}

impl PageStore for MemoryPages {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn submit(&mut self, token: u64, request: Request) {
        let result = self.carry_out(&request);
        self.done.push(Completion { token, result });
    }

    fn completed(&mut self, _: Duration, done: &mut Vec<Completion>) -> Result<(), Error> {
        done.append(&mut self.done);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cdp_types::IoErrorKind;

    use super::*;

    #[test]
    fn what_leaves_the_volume_is_refused() {
        let mut pages = MemoryPages::new(8192);
        pages.submit(1, Request::Write { offset: 4096, from: IoBuf::from_bytes(&[1; 8192]) });
        let mut done = Vec::new();
        pages.completed(Duration::ZERO, &mut done).unwrap();
        assert_eq!(done[0].result.as_ref().unwrap_err().kind(), IoErrorKind::Invalid);
        assert_eq!(pages.bytes_used(), 0);
    }
}
