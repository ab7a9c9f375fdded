//! A queue of a past instant: reads only, and always the same answers.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cdp_types::{BlockRange, ByteRange, DeviceQueue, Event, IoError, IoErrorKind, Op, RequestId, Wait};

use super::read::Reader;
use crate::error::Result;
use crate::index::{BlockState, FANOUT};
use crate::lineage::{At, Branch};
use crate::map::Leaf;
use crate::storage::{Done, Lane};
use crate::volume::{States, Volume};

/// Leaves that a queue of a past instant keeps: 2 MiB of disk each.
const LEAVES_KEPT: usize = 64;

/// One queue of a past instant of a volume.
pub struct PastQueue {
    volume: Arc<Volume>,
    /// Held, so that its history stays.
    _branch: Option<Arc<Branch>>,
    at: At,
    capacity: u64,
    lane: Box<dyn Lane>,
    reader: Reader,
    /// Most recently used last.
    leaves: Vec<(u64, Leaf)>,
    events: Vec<Event>,
    done: Vec<Done>,
    in_flight: usize,
}

impl PastQueue {
    /// A queue that reads `volume` as it was at an instant of a branch, which may be another volume's.
    ///
    /// # Errors
    /// If the operating system gives no lane.
    pub fn new(volume: Arc<Volume>, at: At, capacity: u64) -> io::Result<Self> {
        let lane = volume.shared().storage.lane()?;
        let reader = Reader::new(volume.shared().log.segments.alignment());
        Ok(Self {
            _branch: volume.shared().branches.get(at.branch),
            volume,
            at,
            capacity,
            lane,
            reader,
            leaves: Vec::new(),
            events: Vec::new(),
            done: Vec::new(),
            in_flight: 0,
        })
    }

    fn leaf(&mut self, leaf: u64) -> Result<&Leaf> {
        let kept = match self.leaves.iter().position(|(number, _)| *number == leaf) {
            Some(index) => self.leaves.remove(index),
            None => (leaf, self.volume.shared().lineage().leaf_at(self.at, leaf)?),
        };
        if self.leaves.len() == LEAVES_KEPT {
            self.leaves.remove(0);
        }
        self.leaves.push(kept);
        let last = self.leaves.len() - 1;
        Ok(&self.leaves[last].1)
    }

    fn states(&mut self, blocks: BlockRange) -> Result<States> {
        let mut states = States::new();
        for block in blocks.first..blocks.end() {
            let state: BlockState = self.leaf(block / FANOUT as u64)?[(block % FANOUT as u64) as usize];
            states.push(state);
        }
        Ok(states)
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
        let wait = if self.events.is_empty() { wait } else { Wait::No };
        self.lane.poll(wait, &mut self.done)?;
        for one in std::mem::take(&mut self.done) {
            match one {
                Done::Ready { tag } => self.events.push(Event::Ready { tag }),
                Done::Io { token, result, .. } => {
                    self.reader.done(&mut *self.lane, token, result, &mut self.events);
                }
            }
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
        let idle = self.events.is_empty() && self.lane.arm()?;
        Ok(if idle { Wait::Forever } else { Wait::No })
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
