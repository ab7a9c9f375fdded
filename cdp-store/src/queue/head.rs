//! A queue of a volume's head.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering as Memory;
use std::time::Duration;

use cdp_types::{
    BlockRange, ByteRange, DeviceQueue, Event, IoBuf, IoError, IoErrorKind, Op, Ordinal, Ranges, RequestId,
    Wait,
};
use slab::Slab;

use super::flush::Flushes;
use super::inbox::{Inbox, Mail};
use super::partial::PartialWrite;
use super::read::{READ_TOKEN, Reader};
use super::seeking::{Seeking, Sought};
use super::write::is_partial;
use crate::index::BlockState;
use crate::leaves::States;
use crate::log::{Draft, Pending};
use crate::storage::{AlignedBuf, Done, Lane, Token};
use crate::volume::Volume;

/// How long a queue that is being dropped sleeps at a time, while the kernel works on what it has begun.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// What the queues are told that were open when their volume was reverted.
const SUPERSEDED: &str = "the volume was reverted to another instant: connect again";

/// What one lane operation of a queue, other than a request's read, was for.
#[derive(Debug)]
pub(super) enum Job {
    /// A batch's write.
    Batch(Ordinal),
    /// One file of a sync.
    Sync,
    /// The old content of a block that is written in part.
    Base(usize),
}

/// One queue of a volume's head. Passive between calls; everything happens on the caller's thread.
pub struct HeadQueue {
    pub(super) volume: Arc<Volume>,
    /// Which of the volume's heads it was opened on.
    tenure: u64,
    pub(super) lane: Box<dyn Lane>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) jobs: Slab<Job>,
    pub(super) events: Vec<Event>,
    /// Requests that change whole blocks, in order of arrival, not in a draft yet.
    pub(super) waiting: VecDeque<Pending>,
    /// A draft for which the log had no place.
    pub(super) blocked: Option<Draft>,
    /// Since when, on the boot clock.
    pub(super) blocked_since_ns: Option<u64>,
    /// Requests that change parts of blocks, in order of arrival; one is worked on at a time.
    pub(super) partial_waiting: VecDeque<Pending>,
    pub(super) partial: Option<PartialWrite>,
    pub(super) batches_in_flight: usize,
    pub(super) spare: Vec<AlignedBuf>,
    pub(super) flushes: Flushes,
    reader: Reader,
    seeking: Seeking,
    /// Batches whose completions were returned by the last `poll`.
    pub(super) handed_over: Vec<Ordinal>,
    mail: Vec<Mail>,
    /// Mail has come since `pump` last acted on any: nothing would wake this queue for it once more.
    stirred: bool,
    pub(super) done: Vec<Done>,
    in_flight: usize,
}

impl HeadQueue {
    /// A new queue of this volume.
    ///
    /// # Errors
    /// If the operating system gives no lane.
    pub fn new(volume: Arc<Volume>) -> io::Result<Self> {
        let lane = volume.shared().storage.lane()?;
        let tenure = volume.enter()?;
        let inbox = Inbox::new(lane.waker(), tenure);
        let reader = Reader::new(volume.shared());
        Ok(Self {
            volume,
            tenure,
            lane,
            inbox,
            jobs: Slab::new(),
            events: Vec::new(),
            waiting: VecDeque::new(),
            blocked: None,
            blocked_since_ns: None,
            partial_waiting: VecDeque::new(),
            partial: None,
            batches_in_flight: 0,
            spare: Vec::new(),
            flushes: Flushes::default(),
            reader,
            seeking: Seeking::default(),
            handed_over: Vec::new(),
            mail: Vec::new(),
            stirred: false,
            done: Vec::new(),
            in_flight: 0,
        })
    }

    /// Ends a request.
    pub(super) fn finish(&mut self, id: RequestId, result: Result<(), IoError>) {
        if let Err(error) = &result {
            self.volume.counters().errors.fetch_add(1, Memory::Relaxed);
            tracing::debug!(volume = %self.volume.id(), "request failed: {error}");
        }
        self.events.push(Event::Completed { id, result });
    }

    fn check(&self, range: ByteRange) -> Result<(), IoError> {
        let (size_bytes, block_size) = self.volume.geometry();
        range.check(size_bytes, u64::from(block_size)).map_err(IoError::from)
    }

    fn check_change(&self, ranges: &[ByteRange], has_data: bool) -> Result<(), IoError> {
        for range in ranges {
            self.check(*range)?;
            let limit = self.volume.shared().tuning.max_request_bytes;
            if has_data && range.len > limit {
                let text = format!("{range} is longer than the {limit} bytes that one request may have");
                return Err(IoError::new(IoErrorKind::Invalid, text));
            }
        }
        self.may_change()
    }

    fn may_change(&self) -> Result<(), IoError> {
        if self.volume.shared().is_closing() {
            return Err(IoError::new(IoErrorKind::Gone, "the store is being closed"));
        }
        match self.refusal() {
            Some((kind, why)) => Err(IoError::new(kind, why)),
            None => Ok(()),
        }
    }

    /// Why nothing can be changed through this queue, if that is so.
    pub(super) fn refusal(&self) -> Option<(IoErrorKind, String)> {
        if self.is_superseded() {
            return Some((IoErrorKind::Gone, SUPERSEDED.to_owned()));
        }
        self.volume.refusal()
    }

    fn is_superseded(&self) -> bool {
        self.tenure != self.volume.tenure()
    }

    fn start_read(&mut self, id: RequestId, offset: u64, into: &IoBuf) -> Result<(), IoError> {
        let range = ByteRange::new(offset, into.len() as u64);
        self.check(range)?;
        let blocks = range.touched_blocks();
        let states = match self.volume.cached_states(blocks) {
            Some(states) => states,
            // Without anything else to do this thread is the quickest.
            None if self.in_flight > 1 && self.send_for(id, offset, into, blocks) => return Ok(()),
            None => self.volume.states(blocks).map_err(|e| self.unknown(&e))?,
        };
        // Not before: what was found may be the next head's by now.
        if self.is_superseded() {
            return Err(IoError::new(IoErrorKind::Gone, SUPERSEDED));
        }
        self.read_from(id, offset, into, &states);
        Ok(())
    }

    /// Has somebody else find out where a read's blocks lie; says whether there is somebody.
    fn send_for(&mut self, id: RequestId, offset: u64, into: &IoBuf, blocks: BlockRange) -> bool {
        let sought = Sought { id, offset, into: into.share() };
        let places = Arc::downgrade(&self.volume);
        let loaders = &self.volume.shared().loaders;
        self.seeking.send(sought, blocks, places, &self.inbox, loaders)
    }

    /// Somebody has found out where a read's blocks lie.
    fn located(&mut self, ticket: usize, states: crate::error::Result<Box<States>>) {
        let Some(Sought { id, offset, into }) = self.seeking.found(ticket) else { return };
        match states {
            // What its blocks held before the revert is not what its reader wants to know.
            _ if self.is_superseded() => self.finish(id, Err(IoError::new(IoErrorKind::Gone, SUPERSEDED))),
            Ok(states) => self.read_from(id, offset, &into, &states),
            Err(error) => {
                let error = self.unknown(&error);
                self.finish(id, Err(error));
            }
        }
    }

    fn unknown(&self, error: &crate::error::Error) -> IoError {
        tracing::error!(volume = %self.volume.id(), "{error}");
        error.to_io()
    }

    fn read_from(&mut self, id: RequestId, offset: u64, into: &IoBuf, states: &[BlockState]) {
        let counters = self.volume.counters();
        counters.reads.fetch_add(1, Memory::Relaxed);
        counters.read_bytes.fetch_add(into.len() as u64, Memory::Relaxed);
        let segments = &self.volume.shared().log.segments;
        self.reader.start(&mut *self.lane, segments, id, offset, into, states, &mut self.events);
    }

    fn start_change(&mut self, id: RequestId, op: Op) -> Result<(), IoError> {
        let (ranges, has_data) = changed_ranges(&op);
        self.check_change(&ranges, has_data)?;
        let partial = is_partial(&op);
        let pending = Pending { id, op };
        if partial {
            self.partial_waiting.push_back(pending);
        } else {
            self.waiting.push_back(pending);
        }
        Ok(())
    }

    fn take_mail(&mut self) {
        let mut mail = std::mem::take(&mut self.mail);
        self.inbox.take(&mut mail);
        self.stirred |= !mail.is_empty();
        for message in mail.drain(..) {
            match message {
                Mail::Acked { ordinal, requests } => self.acknowledged(ordinal, requests),
                Mail::Failed { error, requests } => self.batch_failed(error, requests),
                Mail::Located { ticket, states } => self.located(ticket, states),
                Mail::Retry => {}
            }
        }
        self.mail = mail;
    }

    /// Takes in what the lane's operations have brought. Reads are only noted.
    fn take_done(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        for one in done.drain(..) {
            match one {
                Done::Ready { tag } => self.events.push(Event::Ready { tag }),
                Done::Io { token, result, buffer: _ } if token & READ_TOKEN != 0 => {
                    self.reader.ended(token, result);
                }
                Done::Io { token, result, buffer } => self.job_done(token, result, buffer),
            }
        }
        self.done = done;
    }

    fn job_done(&mut self, token: Token, result: io::Result<()>, buffer: Option<AlignedBuf>) {
        match self.jobs.try_remove(token as usize) {
            Some(Job::Batch(ordinal)) => self.batch_written(ordinal, result, buffer),
            Some(Job::Sync) => self.file_synced(result),
            Some(Job::Base(edge)) => self.base_read(edge, result),
            None => {}
        }
    }

    /// Does everything that can be done without waiting.
    fn pump(&mut self) -> io::Result<()> {
        self.take_mail();
        self.stirred = false;
        self.pump_partial();
        self.pump_writes()?;
        self.pump_flushes();
        self.take_mail();
        Ok(())
    }

    /// Whether there is nothing to be reported, nor to be looked at before that.
    fn has_nothing(&self) -> bool {
        self.events.is_empty() && self.done.is_empty() && !self.reader.has_unchecked() && !self.stirred
    }

    /// How long this queue may sleep: requests that wait for space have a deadline.
    fn limit(&self, wait: Wait) -> Wait {
        let stalled = self.blocked.is_some() || (self.partial.is_some() && self.batches_in_flight == 0);
        let step = Duration::from_millis(100);
        match wait {
            Wait::Forever if stalled => Wait::For(step),
            Wait::For(limit) if stalled => Wait::For(limit.min(step)),
            other => other,
        }
    }
}

/// The ranges that a request changes, and whether it brings data for them.
fn changed_ranges(op: &Op) -> (Ranges, bool) {
    match op {
        Op::Write { offset, from, .. } => {
            (Ranges::from_slice(&[ByteRange::new(*offset, from.len() as u64)]), true)
        }
        Op::WriteZeroes { ranges, .. } | Op::Discard { ranges, .. } => (ranges.clone(), false),
        Op::Read { .. } | Op::Flush => (Ranges::new(), false),
    }
}

impl Drop for HeadQueue {
    /// The volume's log cannot go on before it knows how the writes and syncs ended that this queue has begun. Requests
    /// that were not begun are forgotten, and completions that nobody has fetched count as delivered: who needs
    /// them polls until nothing is in flight.
    fn drop(&mut self) {
        let mut unfetched = self.flushes.abandon();
        unfetched.append(&mut self.handed_over);
        for mail in self.inbox.close() {
            if let Mail::Acked { ordinal, .. } = mail {
                unfetched.push(ordinal);
            }
        }
        let mut log = self.volume.log();
        unfetched.into_iter().for_each(|ordinal| log.deliver(ordinal));
        drop(log);
        self.partial = None;
        let mut broken = false;
        while !self.jobs.is_empty() && !broken {
            broken = self.lane.poll(Wait::For(DROP_PATIENCE), &mut self.done).is_err();
            self.take_done();
        }
        for job in std::mem::take(&mut self.jobs) {
            let lost = Err(io::Error::other("the queue's ring is broken"));
            match job {
                (_, Job::Batch(ordinal)) => self.batch_written(ordinal, lost, None),
                (_, Job::Sync) => self.file_synced(lost),
                (_, Job::Base(_)) => {}
            }
        }
        self.volume.leave(self.tenure);
    }
}

impl DeviceQueue for HeadQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        self.in_flight += 1;
        let result = match op {
            Op::Read { offset, into } => self.start_read(id, offset, &into),
            Op::Flush => {
                self.start_flush(id);
                Ok(())
            }
            change => self.start_change(id, change),
        };
        if let Err(error) = result {
            self.finish(id, Err(error));
        }
    }

    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        self.lane.watch(eventfd, tag)
    }

    fn unwatch(&mut self, tag: u64) {
        self.lane.unwatch(tag);
        self.events.retain(|e| !matches!(e, Event::Ready { tag: t } if *t == tag));
        self.done.retain(|d| !matches!(d, Done::Ready { tag: t } if *t == tag));
    }

    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        if !self.handed_over.is_empty() {
            self.deliver();
        }
        // The last `poll` ended by asking the kernel once more: what that brought must not be slept over.
        self.take_done();
        if self.reader.has_unchecked() {
            // The disk first: it has something to do while this is being checked.
            self.lane.poll(Wait::No, &mut self.done)?;
            self.take_done();
            self.reader.check_some(&mut *self.lane, &mut self.events);
        }
        self.pump()?;
        // What is ready goes out at once, but the kernel is asked all the same: that starts what was pumped.
        let wait = if self.has_nothing() { self.limit(wait) } else { Wait::No };
        self.lane.poll(wait, &mut self.done)?;
        self.take_done();
        // One portion a poll, unless it had nothing before.
        if self.events.is_empty() {
            self.reader.check_some(&mut *self.lane, &mut self.events);
        }
        self.pump()?;
        self.lane.poll(Wait::No, &mut self.done)?;
        let completed = self.events.iter().filter(|e| matches!(e, Event::Completed { .. })).count();
        self.in_flight -= completed;
        events.append(&mut self.events);
        self.note_handed_over();
        Ok(())
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.lane.descriptor()
    }

    fn arm(&mut self) -> io::Result<Wait> {
        // `poll` may have taken the wake-up of a message that came after its last look. What comes after this look wakes
        // the lane, which has said by then that it sleeps.
        let idle = self.has_nothing() && self.lane.arm()? && !self.inbox.has_mail();
        Ok(if idle { self.limit(Wait::Forever) } else { Wait::No })
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
