//! What has been received and not been understood yet.

use std::io;
use std::mem;

use tokio_uring::buf::BoundedBuf;

use crate::transport::Transport;

/// How much is received at a time: many requests, or a good part of a payload.
const CAPACITY: usize = 64 << 10;

/// A window on the stream from the client.
pub(crate) struct Input {
    /// As long as its capacity, except while it is being received into.
    memory: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// What can be asked for at once.
    pub(crate) const CAPACITY: usize = CAPACITY;

    pub(crate) fn new() -> Self {
        Self { memory: vec![0; CAPACITY], start: 0, end: 0 }
    }

    /// What is there.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// Takes `count` bytes off, which are there.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start += count.min(self.end - self.start);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives once; false if the client has ended its stream.
    ///
    /// It may be dropped while it waits, and must then not be used any further: what is received meanwhile is lost.
    pub(crate) async fn receive<T: Transport>(&mut self, transport: &T) -> io::Result<bool> {
        if self.end == CAPACITY {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let target = mem::take(&mut self.memory).slice(self.end..);
        let (received, target) = transport.read(target).await;
        self.memory = target.into_inner();
        let count = received?;
        self.end += count;
        Ok(count > 0)
    }

    /// Receives until `count` bytes, at most [`Input::CAPACITY`], are there; false if the stream ends before.
    pub(crate) async fn want<T: Transport>(&mut self, transport: &T, count: usize) -> io::Result<bool> {
        if CAPACITY - self.start < count {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < count {
            if !self.receive(transport).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes off `count` bytes that nobody wants; false if the stream ends before.
    pub(crate) async fn skip<T: Transport>(&mut self, transport: &T, mut count: u64) -> io::Result<bool> {
        loop {
            let here = count.min((self.end - self.start) as u64);
            self.consume(here as usize);
            count -= here;
            if count == 0 {
                return Ok(true);
            }
            if !self.receive(transport).await? {
                return Ok(false);
            }
        }
    }
}
