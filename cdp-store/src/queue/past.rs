//! A queue of a past instant: reads only, and always the same answers.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cdp_types::{
    BlockRange, ByteRange, DeviceQueue, Event, IoBuf, IoError, IoErrorKind, Op, RequestId, Seq, Wait,
};

use super::inbox::{Inbox, Mail};
use super::read::Reader;
use super::seeking::{Seeking, Sought};
use crate::error::Result;
use crate::index::{BlockState, FANOUT};
use crate::leaves::{SharedLeaves, States, lock_leaves};
use crate::lineage::{At, Branch};
use crate::loaders::Places;
use crate::storage::{Done, Lane};
use crate::volume::Volume;

/// Leaves that a past instant which is open may cache, whatever the budget says.
const LEAVES_ALWAYS: usize = 64;

/// An instant of a branch, read as a volume, whose branch it need not be.
pub struct Past {
    volume: Arc<Volume>,
    /// Held, so that its history stays.
    _branch: Arc<Branch>,
    at: At,
    /// What all queues of this instant have found out.
    leaves: SharedLeaves,
}

impl Past {
    /// What `volume` held when its log ended at `seq` of `branch`.
    #[must_use]
    pub fn new(volume: Arc<Volume>, branch: Arc<Branch>, seq: Seq) -> Arc<Self> {
        let leaves = volume.shared().leaf_budget.cache(LEAVES_ALWAYS);
        let at = At { branch: branch.row.id, seq };
        Arc::new(Self { volume, _branch: branch, at, leaves })
    }

    /// The volume that it is read as.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Which instant it is.
    pub fn at(&self) -> At {
        self.at
    }

    /// The states of these blocks, if they are all known.
    fn cached_states(&self, blocks: BlockRange) -> Option<States> {
        let mut states = States::new();
        (lock_leaves(&self.leaves).run(blocks, &mut states) == blocks.count).then_some(states)
    }
}

impl Places for Past {
    fn states(&self, blocks: BlockRange) -> Result<States> {
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
}

/// One queue of a past instant of a volume.
pub struct PastQueue {
    past: Arc<Past>,
    capacity: u64,
    lane: Box<dyn Lane>,
    inbox: Arc<Inbox>,
    reader: Reader,
    seeking: Seeking,
    events: Vec<Event>,
    mail: Vec<Mail>,
    done: Vec<Done>,
    in_flight: usize,
}

impl PastQueue {
    /// A queue that reads this instant.
    ///
    /// # Errors
    /// If the operating system gives no lane.
    pub fn new(past: Arc<Past>) -> io::Result<Self> {
        let shared = past.volume.shared();
        let lane = shared.storage.lane()?;
        Ok(Self {
            capacity: past.volume.geometry().0,
            inbox: Inbox::of_reader(lane.waker()),
            lane,
            reader: Reader::new(shared),
            seeking: Seeking::default(),
            past,
            events: Vec::new(),
            mail: Vec::new(),
            done: Vec::new(),
            in_flight: 0,
        })
    }

    /// Whether there is nothing to be reported, nor to be looked at before that.
    fn has_nothing(&self) -> bool {
        self.events.is_empty() && self.done.is_empty() && !self.reader.has_unchecked()
    }

    fn start(&mut self, id: RequestId, op: &Op) -> std::result::Result<(), IoError> {
        match op {
            Op::Read { offset, into } => {
                let range = ByteRange::new(*offset, into.len() as u64);
                range.check(self.capacity, cdp_types::SECTOR_SIZE)?;
                self.start_read(id, *offset, into, range.touched_blocks()).map_err(|e| e.to_io())
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

    fn start_read(&mut self, id: RequestId, offset: u64, into: &IoBuf, blocks: BlockRange) -> Result<()> {
        match self.past.cached_states(blocks) {
            Some(states) => self.read_from(id, offset, into, &states),
            // Without anything else to do this thread is the quickest.
            None if self.in_flight > 1 && self.send_for(id, offset, into, blocks) => {}
            None => {
                let states = self.past.states(blocks)?;
                self.read_from(id, offset, into, &states);
            }
        }
        Ok(())
    }

    /// Has somebody else find out where a read's blocks lie; says whether there is somebody.
    fn send_for(&mut self, id: RequestId, offset: u64, into: &IoBuf, blocks: BlockRange) -> bool {
        let sought = Sought { id, offset, into: into.share() };
        let places = Arc::downgrade(&self.past);
        let loaders = &self.past.volume.shared().loaders;
        self.seeking.send(sought, blocks, places, &self.inbox, loaders)
    }

    fn read_from(&mut self, id: RequestId, offset: u64, into: &IoBuf, states: &[BlockState]) {
        let segments = &self.past.volume.shared().log.segments;
        self.reader.start(&mut *self.lane, segments, id, offset, into, states, &mut self.events);
    }

    /// Goes on with the reads whose blocks' places have been found; says whether there were any.
    fn take_mail(&mut self) -> bool {
        let mut mail = std::mem::take(&mut self.mail);
        self.inbox.take(&mut mail);
        let any = !mail.is_empty();
        for message in mail.drain(..) {
            // Nothing else is ever sent to a queue that appends nothing.
            let Mail::Located { ticket, states } = message else { continue };
            let Some(Sought { id, offset, into }) = self.seeking.found(ticket) else { continue };
            match states {
                Ok(states) => self.read_from(id, offset, &into, &states),
                Err(error) => self.events.push(Event::Completed { id, result: Err(error.to_io()) }),
            }
        }
        self.mail = mail;
        any
    }

    /// Takes in what the lane's operations have brought. Reads are only noted.
    fn take_done(&mut self) {
        for one in self.done.drain(..) {
            match one {
                Done::Ready { tag } => self.events.push(Event::Ready { tag }),
                Done::Io { token, result, .. } => self.reader.ended(token, result),
            }
        }
    }
}

impl Drop for PastQueue {
    /// Nobody reads answers any more that are still on their way.
    fn drop(&mut self) {
        self.inbox.close();
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
        self.done.retain(|d| !matches!(d, Done::Ready { tag: t } if *t == tag));
    }

    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        self.take_mail();
        self.take_done();
        let wait = if self.has_nothing() { wait } else { Wait::No };
        self.lane.poll(wait, &mut self.done)?;
        self.take_done();
        self.reader.check_some(&mut *self.lane, &mut self.events);
        // Those that were found while this thread slept: the disk is to have them at once.
        if self.take_mail() {
            self.lane.poll(Wait::No, &mut self.done)?;
        }
        let completed = self.events.iter().filter(|e| matches!(e, Event::Completed { .. })).count();
        self.in_flight -= completed;
        events.append(&mut self.events);
        Ok(())
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.lane.descriptor()
    }

    fn arm(&mut self) -> io::Result<Wait> {
        // What comes after this look wakes the lane, which has said by then that it sleeps.
        let idle = self.has_nothing() && self.lane.arm()? && !self.inbox.has_mail();
        Ok(if idle { Wait::Forever } else { Wait::No })
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

#[cfg(test)]
#[path = "past_tests.rs"]
mod tests;
