//! A queue of a past instant: reads only, and always the same answers.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cdp_types::{BlockRange, ByteRange, DeviceQueue, Event, IoError, IoErrorKind, Op, RequestId, Wait};

use super::read::Reader;
use crate::error::Result;
use crate::index::FANOUT;
use crate::leaves::{SharedLeaves, States, lock_leaves};
use crate::lineage::{At, Branch};
use crate::storage::{Done, Lane};
use crate::volume::Volume;

/// One queue of a past instant of a volume.
pub struct PastQueue {
    volume: Arc<Volume>,
    /// Held, so that its history stays.
    _branch: Option<Arc<Branch>>,
    at: At,
    capacity: u64,
    lane: Box<dyn Lane>,
    reader: Reader,
    /// What all queues of this instant have found out.
    leaves: SharedLeaves,
    events: Vec<Event>,
    done: Vec<Done>,
    in_flight: usize,
}

impl PastQueue {
    /// A queue that reads `volume` as it was at an instant of a branch, which may be another volume's.
    ///
    /// # Errors
    /// If the operating system gives no lane.
    pub fn new(volume: Arc<Volume>, at: At, leaves: SharedLeaves, capacity: u64) -> io::Result<Self> {
        let lane = volume.shared().storage.lane()?;
        let reader = Reader::new(volume.shared());
        Ok(Self {
            _branch: volume.shared().branches.get(at.branch),
            volume,
            at,
            capacity,
            lane,
            reader,
            leaves,
            events: Vec::new(),
            done: Vec::new(),
            in_flight: 0,
        })
    }

    fn states(&mut self, blocks: BlockRange) -> Result<States> {
        let mut states = States::new();
        loop {
            let done = states.len() as u64;
            let rest = BlockRange::new(blocks.first + done, blocks.count - done);
            let found = lock_leaves(&self.leaves).run(rest, &mut states);
            if found == rest.count {
                return Ok(states);
            }
            let leaf = (rest.first + found) / FANOUT as u64;
            let loaded = self.volume.shared().lineage().leaf_at(self.at, leaf)?;
            lock_leaves(&self.leaves).insert(leaf, loaded);
        }
    }

    /// Notes so many reads that have ended as if they had done so at once.
    #[cfg(test)]
    pub(super) fn gather(&mut self, reads: usize) {
        let mut ended = Vec::new();
        while ended.len() < reads {
            self.lane.poll(Wait::Forever, &mut ended).expect("the ring works");
        }
        for one in ended {
            if let Done::Io { token, result, .. } = one {
                self.reader.ended(token, result);
            }
        }
    }

    fn has_nothing(&self) -> bool {
        self.events.is_empty() && !self.reader.has_unchecked()
    }

    fn start(&mut self, id: RequestId, op: &Op) -> std::result::Result<(), IoError> {
        match op {
            Op::Read { offset, into } => {
                let range = ByteRange::new(*offset, into.len() as u64);
                range.check(self.capacity, cdp_types::SECTOR_SIZE)?;
                let states = self.states(range.touched_blocks()).map_err(|e| e.to_io())?;
                let volume = Arc::clone(&self.volume);
                let segments = &volume.shared().log.segments;
                self.reader.start(&mut *self.lane, segments, id, *offset, into, &states, &mut self.events);
                Ok(())
            }
            Op::Flush => {
                self.events.push(Event::Completed { id, result: Ok(()) });
                Ok(())
            }
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } => {
                Err(IoError::new(IoErrorKind::ReadOnly, "a past instant cannot be changed; clone it"))
            }
        }
    }
}

impl DeviceQueue for PastQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        self.in_flight += 1;
        if let Err(error) = self.start(id, &op) {
            self.events.push(Event::Completed { id, result: Err(error) });
        }
    }

    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        self.lane.watch(eventfd, tag)
    }

    fn unwatch(&mut self, tag: u64) {
        self.lane.unwatch(tag);
        self.events.retain(|e| !matches!(e, Event::Ready { tag: t } if *t == tag));
    }

    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let wait = if self.has_nothing() { wait } else { Wait::No };
        self.lane.poll(wait, &mut self.done)?;
        for one in self.done.drain(..) {
            match one {
                Done::Ready { tag } => self.events.push(Event::Ready { tag }),
                Done::Io { token, result, .. } => self.reader.ended(token, result),
            }
        }
        self.reader.check_some(&mut *self.lane, &mut self.events);
        let completed = self.events.iter().filter(|e| matches!(e, Event::Completed { .. })).count();
        self.in_flight -= completed;
        events.append(&mut self.events);
        Ok(())
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.lane.descriptor()
    }

    fn arm(&mut self) -> io::Result<Wait> {
        let idle = self.has_nothing() && self.lane.arm()?;
        Ok(if idle { Wait::Forever } else { Wait::No })
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
