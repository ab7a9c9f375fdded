//! The loop that receives requests, checks them and hands them on.

use std::io;
use std::pin::pin;
use std::sync::atomic::Ordering;

use cdp_types::{ByteRange, Op};
use smallvec::smallvec;
use tokio_uring::buf::{IoBuf, IoBufMut};

use super::device::{Kind, Pending};
use super::status::{Ask, Query};
use super::{Ended, MAX_GATHERED, NO_ORIGIN, Session};
use crate::input::Input;
use crate::memory::{Buffer, Pool};
use crate::protocol::{Errno, Headers, RequestHeader, Whose, command, command_flag};
use crate::transport::Transport;

/// What is wrong with a request, and what the client is told.
struct Refusal(Errno, &'static str);

/// A payload that nobody wants is skipped up to this many times the longest request; then the client is left.
const SKIPPED: u64 = 2;

impl<T: Transport> Session<'_, T> {
    pub(super) async fn read(&self, input: Input) {
        let why = {
            // Whatever the reader waits for, it can be dropped there: requests are submitted whole or not at all.
            let requests = pin!(self.read_requests(input));
            let stopped = pin!(self.control.stopped());
            tokio::select! {
                biased;
                () = stopped => Ended::Stopped,
                result = requests => result.unwrap_or_else(Ended::Failed),
            }
        };
        self.end(why);
    }

    async fn read_requests(&self, mut input: Input) -> io::Result<Ended> {
        loop {
            if !input.want(self.transport, self.view.headers.request_len()).await? {
                return Ok(Ended::Client);
            }
            let Some(header) = RequestHeader::parse(input.bytes(), self.view.headers) else {
                return Ok(Ended::Protocol("a request without its magic number"));
            };
            input.consume(self.view.headers.request_len());
            if header.command == command::DISC {
                return Ok(Ended::Client);
            }
            self.wait_for_room(&header).await;
            self.control.requests.fetch_add(1, Ordering::Relaxed);
            if let Some(why) = self.take(&header, &mut input).await? {
                return Ok(why);
            }
        }
    }

    /// Waits until the request may be taken. One alone always may.
    async fn wait_for_room(&self, header: &RequestHeader) {
        let needs = match header.command {
            command::READ | command::WRITE | command::CACHE => {
                Pool::cost(header.length.min(self.limits.max_request as u64) as usize)
            }
            _ => 0,
        };
        loop {
            let requests = self.open_requests.get() < self.limits.requests;
            let held = self.held.get();
            let bytes = held == 0 || held + needs <= self.limits.connection_bytes;
            if requests && bytes && self.outbox.borrow().gathered_bytes() < MAX_GATHERED {
                return;
            }
            self.room.wait().await;
        }
    }

    /// Takes one request, with its payload.
    async fn take(&self, header: &RequestHeader, input: &mut Input) -> io::Result<Option<Ended>> {
        let whose = Whose { cookie: header.cookie, offset: header.offset };
        let payload = header.payload();
        if payload > SKIPPED * self.limits.max_request as u64 {
            return Ok(Some(Ended::Protocol("a payload that is far too long")));
        }
        if let Err(Refusal(errno, message)) = self.check(header) {
            if !input.skip(self.transport, payload).await? {
                return Ok(Some(Ended::Client));
            }
            self.refuse(whose, errno, message);
            return Ok(None);
        }
        match header.command {
            command::WRITE => return self.take_write(header, whose, input).await,
            command::BLOCK_STATUS => return self.take_query(header, whose, input).await,
            command::READ if header.length == 0 => {
                self.reply(|encoder, bytes| encoder.nothing(bytes, whose));
            }
            // Flushes have no length.
            _ if header.length == 0 && header.command != command::FLUSH => {
                self.reply(|encoder, bytes| encoder.done(bytes, whose));
            }
            command::READ => {
                let Some(buffer) = self.buffer(header.length as usize).await else { return Ok(None) };
                let op = Op::Read { offset: header.offset, into: buffer.io() };
                let whole = header.has(command_flag::DF);
                self.submit(op, Pending::new(whose, Kind::Read { whole }, Some(buffer)));
            }
            command::CACHE => {
                // What is read now is at hand in the store's caches later; one request's worth is enough of that.
                let len = header.length.min(self.limits.max_request as u64) as usize;
                let Some(buffer) = self.buffer(len).await else { return Ok(None) };
                let op = Op::Read { offset: header.offset, into: buffer.io() };
                self.submit(op, Pending::new(whose, Kind::Other, Some(buffer)));
            }
            command::FLUSH => self.submit(Op::Flush, Pending::new(whose, Kind::Other, None)),
            command::TRIM => {
                let ranges = smallvec![ByteRange::new(header.offset, header.length)];
                let kind = Kind::Trim { flush: header.has(command_flag::FUA) };
                self.submit(Op::Discard { ranges, origin: NO_ORIGIN }, Pending::new(whose, kind, None));
            }
            // `check` lets nothing else through.
            _ => {
                let ranges = smallvec![ByteRange::new(header.offset, header.length)];
                let unmap = !header.has(command_flag::NO_HOLE);
                let fua = header.has(command_flag::FUA);
                let op = Op::WriteZeroes { ranges, unmap, origin: NO_ORIGIN, fua };
                self.submit(op, Pending::new(whose, Kind::Other, None));
            }
        }
        Ok(None)
    }

    /// What of a request can be judged by its header.
    fn check(&self, header: &RequestHeader) -> Result<(), Refusal> {
        let refuse = |errno, message| Err(Refusal(errno, message));
        if header.command > command::BLOCK_STATUS {
            return refuse(Errno::Inval, "there is no such command");
        }
        if !header.flags_are_known() {
            return refuse(Errno::Inval, "a flag that the command does not have");
        }
        if header.command == command::FLUSH {
            return Ok(());
        }
        let writes = matches!(header.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && !self.view.writable {
            return refuse(Errno::Perm, "the export is read-only");
        }
        if header.command == command::BLOCK_STATUS && header.has(command_flag::PAYLOAD_LEN) {
            return self.check_filter(header);
        }
        let longest = self.limits.max_request as u64;
        match header.command {
            command::READ if header.length > longest && self.view.headers != Headers::Simple => {
                return refuse(Errno::Overflow, "the read is longer than the longest payload");
            }
            command::READ if header.length > longest => {
                return refuse(Errno::Inval, "the read is longer than the longest payload");
            }
            command::WRITE if header.length > self.view.longest_write => {
                return refuse(Errno::Inval, "the write is longer than the longest payload");
            }
            _ => {}
        }
        if !self.is_whole(header.offset, header.length) {
            return refuse(Errno::Inval, "offset or length is no multiple of the minimum block size");
        }
        if !self.is_inside(header.offset, header.length) {
            let full = matches!(header.command, command::WRITE | command::WRITE_ZEROES);
            return refuse(if full { Errno::NoSpc } else { Errno::Inval }, "the export ends before that");
        }
        if header.command == command::BLOCK_STATUS && self.view.contexts.is_empty() {
            return refuse(Errno::Inval, "no metadata context is selected");
        }
        if header.command == command::BLOCK_STATUS && header.length == 0 {
            return refuse(Errno::Inval, "the status of no bytes");
        }
        Ok(())
    }

    fn is_inside(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.view.size)
    }

    /// Whether a part consists of whole blocks of the minimum size.
    fn is_whole(&self, offset: u64, length: u64) -> bool {
        offset.is_multiple_of(self.view.block) && length.is_multiple_of(self.view.block)
    }

    /// A block status request that says which contexts it wants.
    fn check_filter(&self, header: &RequestHeader) -> Result<(), Refusal> {
        let ids = header.length.checked_sub(8).filter(|ids| ids.is_multiple_of(4)).map(|ids| ids / 4);
        match ids {
            Some(count) if (1..=self.view.contexts.len() as u64).contains(&count) => Ok(()),
            _ => Err(Refusal(Errno::Inval, "the payload does not name selected metadata contexts")),
        }
    }

    async fn take_write(
        &self,
        header: &RequestHeader,
        whose: Whose,
        input: &mut Input,
    ) -> io::Result<Option<Ended>> {
        let length = header.length as usize;
        if length == 0 {
            self.reply(|encoder, bytes| encoder.done(bytes, whose));
            return Ok(None);
        }
        let Some(mut buffer) = self.buffer(length).await else { return Ok(None) };
        let here = input.bytes().len().min(length);
        buffer.fill(0, &input.bytes()[..here]);
        input.consume(here);
        let mut landing = Landing { buffer, at: here };
        while landing.at < length {
            let _turn = self.control.wait_for_client();
            let (received, back) = self.transport.read(landing).await;
            landing = back;
            match received? {
                0 => return Ok(Some(Ended::Client)),
                count => landing.at += count,
            }
        }
        let buffer = landing.buffer;
        let op = Op::Write {
            offset: header.offset,
            from: buffer.io(),
            origin: NO_ORIGIN,
            fua: header.has(command_flag::FUA),
        };
        self.submit(op, Pending::new(whose, Kind::Write, Some(buffer)));
        Ok(None)
    }

    async fn take_query(
        &self,
        header: &RequestHeader,
        whose: Whose,
        input: &mut Input,
    ) -> io::Result<Option<Ended>> {
        let mut length = header.length;
        let mut ids: Vec<u32> = (0..self.view.contexts.len() as u32).collect();
        if header.has(command_flag::PAYLOAD_LEN) {
            let payload = header.length as usize;
            if !input.want(self.transport, payload).await? {
                return Ok(Some(Ended::Client));
            }
            let parsed = parse_filter(&input.bytes()[..payload], ids.len() as u32);
            input.consume(payload);
            let offset = header.offset;
            let is_there = |(effect, _): &(u64, Vec<u32>)| {
                *effect > 0 && self.is_inside(offset, *effect) && self.is_whole(offset, *effect)
            };
            let Some(asked) = parsed.filter(is_there) else {
                let why = "the payload does not name whole blocks of the export and selected contexts";
                self.refuse(whose, Errno::Inval, why);
                return Ok(None);
            };
            (length, ids) = asked;
        }
        let one = header.has(command_flag::REQ_ONE);
        let ask = Ask { range: ByteRange::new(header.offset, length), one, headers: self.view.headers };
        self.open_requests.set(self.open_requests.get() + 1);
        self.queries.borrow_mut().push_back(Query { whose, ids, ask });
        self.queried.raise();
        Ok(None)
    }

    /// Memory for a payload, when there is some. None only if the server falls apart.
    async fn buffer(&self, len: usize) -> Option<Buffer> {
        let buffer = self.pool.take(len, &self.held).await;
        self.note_held();
        buffer
    }

    fn submit(&self, op: Op, pending: Pending) {
        self.open_requests.set(self.open_requests.get() + 1);
        self.lane.borrow_mut().submit(op, pending);
        self.submitted.raise();
    }
}

/// Reads the payload of a block status request: effect length, and ids of which none comes twice.
fn parse_filter(payload: &[u8], contexts: u32) -> Option<(u64, Vec<u32>)> {
    let (effect, ids) = payload.split_first_chunk()?;
    let mut wanted = Vec::new();
    for raw in ids.as_chunks().0 {
        let id = u32::from_be_bytes(*raw);
        if id >= contexts || wanted.contains(&id) {
            return None;
        }
        wanted.push(id);
    }
    Some((u64::from_be_bytes(*effect), wanted))
}

/// A payload that is being received: the part of a buffer that has not come yet.
struct Landing {
    buffer: Buffer,
    at: usize,
}

// SAFETY: the buffer's memory stays where it is when the buffer is moved, and is all initialised; nobody else has it
// before the request is submitted, and the buffer is dropped only when the kernel is through with the operation.
unsafe impl IoBuf for Landing {
    fn stable_ptr(&self) -> *const u8 {
        self.buffer.base().wrapping_add(self.at)
    }

    fn bytes_init(&self) -> usize {
        self.buffer.len() - self.at
    }

    fn bytes_total(&self) -> usize {
        self.buffer.len() - self.at
    }
}

// SAFETY: as above; the memory is writable, by `cdp_types::IoBuf`'s contract.
unsafe impl IoBufMut for Landing {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.buffer.base().wrapping_add(self.at)
    }

    unsafe fn set_init(&mut self, _bytes: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_names_each_context_once() {
        let payload = |ids: &[u32]| {
            let mut bytes = 4096_u64.to_be_bytes().to_vec();
            ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
            bytes
        };
        assert_eq!(parse_filter(&payload(&[1, 0]), 2), Some((4096, vec![1, 0])));
        assert_eq!(parse_filter(&payload(&[1, 1]), 2), None);
        assert_eq!(parse_filter(&payload(&[2]), 2), None);
        assert_eq!(parse_filter(&[0; 7], 2), None);
    }
}
