//! Walking a long log's segments ahead of whoever reads it.
//!
//! Each batch says where the next one lies, so that a log is read one look after the other, and the disk has one request at
//! a time. But where a segment's first batch lies is known: the segments that come next are walked by threads of their own,
//! side by side. What these find is taken by the reader where it would have looked for it, and that is all: what they did
//! not find, or could not read, it looks for itself (so a disk is asked twice for what it does not read).
//!
//! What was found and not taken yet is in memory. How much that may be in all is bounded: of a segment no more than
//! [`WALK_BYTES`], of some segments ahead, for one log of this process at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};

use super::scan::{BatchAt, ChainReader};
use crate::segments::Segment;

/// How much of a log must lie behind the segment that its reader begins in, in bytes and in two segments at least: for less
/// it gains nothing, and what a simulated disk does follows from the order of what is asked of it.
const FROM_BYTES: u64 = 64 << 20;
/// Threads that walk: each waits for the disk most of the time.
const THREADS: usize = 4;
/// How far ahead of the reader, in segments.
const AHEAD: usize = 6;
/// How much memory the batches that were found in one segment may take, in bytes. The rest of it is its reader's.
const WALK_BYTES: usize = 8 << 20;
/// Whether a log is being walked ahead in this process.
static IS_WALKED: AtomicBool = AtomicBool::new(false);

/// What was found in the segments of a chain that its reader has not come to.
#[derive(Debug)]
pub(super) struct Ahead<'a> {
    chain: &'a [Arc<Segment>],
    walked: Mutex<Walked>,
    /// Told when the reader has gone on, and when a segment has been walked.
    changed: Condvar,
    is_over: AtomicBool,
    _permit: Option<Permit>,
}

/// To walk ahead, for one log at a time.
#[derive(Debug)]
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        (!IS_WALKED.swap(true, Ordering::Acquire)).then_some(Self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        IS_WALKED.store(false, Ordering::Release);
    }
}

#[derive(Debug)]
struct Walked {
    /// Where the reader is.
    reader: usize,
    /// The next segment to be walked.
    next: usize,
    under_way: BTreeSet<usize>,
    found: BTreeMap<usize, VecDeque<BatchAt>>,
}

impl<'a> Ahead<'a> {
    /// For a reader that is in this segment of the chain; `None` if it would gain nothing, or another log is being walked.
    pub(super) fn worthwhile(chain: &'a [Arc<Segment>], reader: usize) -> Option<Self> {
        let rest = chain.get(reader + 1..).unwrap_or_default();
        let bytes: u64 = rest.iter().map(|segment| segment.header.capacity).sum();
        let permit = if rest.len() > 1 && bytes >= FROM_BYTES { Permit::take()? } else { return None };
        Some(Self::new(chain, reader, Some(permit)))
    }

    fn new(chain: &'a [Arc<Segment>], reader: usize, _permit: Option<Permit>) -> Self {
        let walked = Walked { reader, next: reader + 1, under_way: BTreeSet::new(), found: BTreeMap::new() };
        Self {
            chain,
            walked: Mutex::new(walked),
            changed: Condvar::new(),
            is_over: AtomicBool::new(false),
            _permit,
        }
    }

    /// Begins; it is over when what this returns is dropped, whatever has been walked.
    pub(super) fn start<'scope, 'env>(&'env self, scope: &'scope Scope<'scope, 'env>) -> Walking<'env, 'a> {
        for number in 0..THREADS {
            let walker = Builder::new().name(format!("cdp-ahead-{number}"));
            if let Err(error) = walker.spawn_scoped(scope, || self.walk()) {
                tracing::debug!("the log is walked by fewer threads: {error}");
            }
        }
        Walking { ahead: self }
    }

    /// What was found in a segment that its reader has come to, in order; nothing if nobody has been there.
    pub(super) fn take(&self, reader: usize) -> VecDeque<BatchAt> {
        let mut walked = self.walked();
        walked.reader = reader;
        walked.next = walked.next.max(reader + 1);
        self.changed.notify_all();
        while walked.under_way.contains(&reader) {
            walked = self.changed.wait(walked).unwrap_or_else(PoisonError::into_inner);
        }
        walked.found = walked.found.split_off(&reader);
        walked.found.remove(&reader).unwrap_or_default()
    }

    fn walk(&self) {
        while let Some(mut walk) = self.next_walk() {
            let mut reader = ChainReader::new(&self.chain[walk.segment..=walk.segment]);
            // An error is for the reader to find, who knows what to make of it.
            let mut bytes = 0;
            while bytes < WALK_BYTES
                && !self.is_over.load(Ordering::Relaxed)
                && let Ok(Some(batch)) = reader.next()
            {
                bytes += batch.memory_bytes();
                walk.found.push_back(batch);
            }
        }
    }

    /// The next segment to be walked, when the reader is near enough; `None` when all is over.
    fn next_walk(&self) -> Option<Walk<'_, 'a>> {
        let mut walked = self.walked();
        while walked.next < self.chain.len() && !self.is_over.load(Ordering::Relaxed) {
            if walked.next <= walked.reader + AHEAD {
                let segment = walked.next;
                walked.next += 1;
                walked.under_way.insert(segment);
                return Some(Walk { ahead: self, segment, found: VecDeque::new() });
            }
            walked = self.changed.wait(walked).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn walked(&self) -> MutexGuard<'_, Walked> {
        self.walked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While this lives, segments are walked.
#[derive(Debug)]
pub(super) struct Walking<'e, 'a> {
    ahead: &'e Ahead<'a>,
}

impl Drop for Walking<'_, '_> {
    fn drop(&mut self) {
        // Under the lock: whoever has looked at this waits by then, or looks again.
        let _walked = self.ahead.walked();
        self.ahead.is_over.store(true, Ordering::Relaxed);
        self.ahead.changed.notify_all();
    }
}

/// One segment's walk. However it ends, nobody waits for it any longer.
struct Walk<'w, 'a> {
    ahead: &'w Ahead<'a>,
    segment: usize,
    found: VecDeque<BatchAt>,
}

impl Drop for Walk<'_, '_> {
    fn drop(&mut self) {
        let mut walked = self.ahead.walked();
        walked.under_way.remove(&self.segment);
        if self.segment >= walked.reader {
            walked.found.insert(self.segment, std::mem::take(&mut self.found));
        }
        self.ahead.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cdp_types::{BranchId, Ordinal, VolumeId};

    use super::super::testing::context;
    use super::super::{LogEnd, LogState};
    use super::*;
    use crate::ErrorKind;
    use crate::format::{Record, RecordKind};
    use crate::storage::sim::{Fault, OpKind, SimDisk, When};

    const BATCHES: u64 = 200;
    const CAPACITY: u64 = 256 << 10;

    /// A log of more segments than are walked ahead, with batches of a block or two and some much longer ones.
    fn log() -> (SimDisk, Vec<Arc<Segment>>) {
        let disk = SimDisk::new(1);
        let context = context(&disk, CAPACITY);
        let mut log = LogState::new(VolumeId(1), BranchId(1), &LogEnd::EMPTY, None);
        for number in 0..BATCHES {
            let body = vec![number as u8; if number % 7 < 3 { 40_000 } else { 100 }];
            let mut append =
                || log.append_synced(&context, Record::event(RecordKind::Store, 0), body.clone());
            if append().is_err_and(|error| error.kind() == ErrorKind::NoSpace) {
                assert!(log.supply(context.segments.create(CAPACITY).unwrap()).is_none());
                log.append_synced(&context, Record::event(RecordKind::Store, 0), body).unwrap();
            }
        }
        let chain: Vec<Arc<Segment>> =
            context.segments.all().into_iter().map(|(_, segment)| segment).collect();
        assert!(chain.len() > AHEAD + 2, "{} segments", chain.len());
        (disk, chain)
    }

    fn make_unreadable(disk: &SimDisk, segment: &Segment) {
        let file = Some(segment.file.name().to_owned());
        disk.fail(Fault { kind: OpKind::Read, file, when: When::From(0), errno: libc::EIO });
    }

    /// The batches that a reader finds, and where it ends, or with which error.
    type Read = (Vec<(Ordinal, u32, u64)>, std::result::Result<Option<(String, u64)>, ErrorKind>);

    fn read(mut reader: ChainReader<'_>) -> Read {
        let mut batches = Vec::new();
        loop {
            match reader.next() {
                Ok(Some(batch)) => batches.push((batch.header.ordinal, batch.crc, batch.payload_at)),
                Ok(None) => {
                    let at = reader.position().map(|(segment, at)| (segment.file.name().to_owned(), at));
                    return (batches, Ok(at));
                }
                Err(error) => return (batches, Err(error.kind())),
            }
        }
    }

    fn read_behind(chain: &[Arc<Segment>]) -> Read {
        let ahead = Ahead::new(chain, 0, None);
        std::thread::scope(|scope| {
            let _walking = ahead.start(scope);
            read(ChainReader::new(chain).behind(&ahead))
        })
    }

    #[test]
    fn a_reader_behind_others_finds_what_it_would_have_found_alone() {
        let (_disk, chain) = log();
        let alone = read(ChainReader::new(&chain));
        assert_eq!(alone.0.len() as u64, BATCHES);
        assert_eq!(read_behind(&chain), alone);
    }

    #[test]
    fn damage_and_what_the_disk_does_not_read_end_it_where_they_would_have() {
        for segment in [0, 1, 3] {
            let (disk, chain) = log();
            let name = chain[segment].file.name();
            make_unreadable(&disk, &chain[segment]);
            let alone = read(ChainReader::new(&chain));
            assert_eq!(alone.1, Err(ErrorKind::Io));
            assert_eq!(read_behind(&chain), alone);
            disk.clear_faults();

            // Its third batch first, then its first.
            let mut reader = ChainReader::new(&chain[segment..=segment]);
            let places = [(); 3].map(|()| reader.next().unwrap().unwrap().header.place.offset);
            for place in [places[2], places[0]] {
                disk.flip_bit(name, place + 96, 3);
                let alone = read(ChainReader::new(&chain));
                assert_eq!(alone.1, Ok(Some((name.to_owned(), place))));
                assert_eq!(read_behind(&chain), alone);
            }
        }
    }

    #[test]
    fn what_was_found_is_there_when_its_reader_comes_and_no_more_than_it_may_be() {
        let (_disk, chain) = log();
        let ahead = Ahead::new(&chain, 0, None);
        std::thread::scope(|scope| {
            let _walking = ahead.start(scope);
            let alone = read(ChainReader::new(&chain[1..=1])).0;
            // What is not under way was not begun, or is there.
            while ahead.walked().next <= AHEAD {
                std::thread::yield_now();
            }
            let found = ahead.take(1);
            assert_eq!(
                found.iter().map(|b| (b.header.ordinal, b.crc, b.payload_at)).collect::<Vec<_>>(),
                alone
            );
            ahead.take(5);
            assert!(ahead.walked().found.keys().all(|&segment| (5..=5 + AHEAD).contains(&segment)));
        });
        // Nobody goes on behind it, nor waits.
        assert!(ahead.next_walk().is_none());
    }

    #[test]
    fn what_others_have_found_is_not_read_again() {
        let (disk, chain) = log();
        let ahead = Ahead::new(&chain, 0, None);
        std::thread::scope(|scope| {
            let _walking = ahead.start(scope);
            while ahead.walked().next <= AHEAD || !ahead.walked().under_way.is_empty() {
                std::thread::yield_now();
            }
            make_unreadable(&disk, &chain[1]);
            let (batches, end) = read(ChainReader::new(&chain).behind(&ahead));
            assert_eq!((batches.len() as u64, end.is_ok()), (BATCHES, true));
        });
    }

    #[test]
    fn one_log_is_walked_at_a_time() {
        let permit = Permit::take().unwrap();
        assert!(Permit::take().is_none());
        drop(permit);
        assert!(Permit::take().is_some());
    }

    #[test]
    fn short_logs_are_read_alone() {
        let (_disk, chain) = log();
        assert!(Ahead::worthwhile(&chain, 0).is_none());
    }
}
