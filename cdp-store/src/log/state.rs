//! Where a volume's log stands: what was placed, what has reached the kernel, what is durable.

mod room;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cdp_types::{BranchId, Generation, IoErrorKind, Ordinal, Seq, VolumeId};

use super::draft::{Draft, Pending};
use super::open::Open;
use super::recover::LogEnd;
use crate::clock::StoreClock;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BatchHeader, BatchPlace, Cut, Record, RecordKind, SegmentHeader, header_stride};
use crate::index::LogPos;
use crate::queue::Inbox;
use crate::reach::{End, Reach};
use crate::segments::{Blank, Segment, Segments};
use crate::storage::{AlignedBuf, File};

/// What all logs of a store share.
#[derive(Debug)]
pub struct LogContext {
    /// The store's id.
    pub store: [u8; 16],
    /// The generation that writes.
    pub generation: Generation,
    /// The segment files.
    pub segments: Arc<Segments>,
    /// The store's clock.
    pub clock: StoreClock,
    /// The next `Seq` to give out, store-wide.
    pub next_seq: AtomicU64,
    /// Where random segment secrets come from.
    pub secrets: fn() -> u64,
    /// Bytes of blocks that one batch takes, unless a single request is larger.
    pub batch_bytes: u64,
}

/// Where to write a draft that has been placed.
#[derive(Debug)]
pub struct Placement {
    /// The batch's place in the chain.
    pub ordinal: Ordinal,
    /// Into which file.
    pub file: Arc<dyn File>,
    /// At which byte of it.
    pub offset: u64,
    /// Which part of the draft's buffer.
    pub range: Range<usize>,
}

/// What became of a draft.
#[derive(Debug)]
pub enum Append {
    /// It has a place; its buffer must be written there, and the outcome told to [`LogState::complete`].
    Placed(Placement, AlignedBuf),
    /// It has to wait: for a segment, or for a cut.
    Blocked(Draft),
}

/// A batch that is acknowledged: every earlier one was too.
#[derive(Debug)]
pub struct Acked {
    /// The batch's header: its records and checksums.
    pub header: BatchHeader,
    /// The header's own checksum.
    pub crc: u32,
    /// Where its payload starts.
    pub payload_at: u64,
    /// Whose requests they are.
    pub owner: Arc<Inbox>,
    /// The requests.
    pub requests: Vec<Pending>,
}

/// A batch that a cut has removed from the log.
#[derive(Debug)]
pub struct Failed {
    /// Why, if it was this batch that failed; none if it only came after one that did.
    pub error: Option<IoErrorKind>,
    /// Whose requests they are.
    pub owner: Arc<Inbox>,
    /// The requests.
    pub requests: Vec<Pending>,
}

/// What one fdatasync round must cover.
#[derive(Debug)]
pub struct SyncPlan {
    /// Everything up to here is durable once all files are synced.
    pub target: Ordinal,
    /// The segments to sync.
    pub segments: Vec<Arc<Segment>>,
}

#[derive(Debug)]
enum Fate {
    Writing,
    Done,
    Failed(IoErrorKind),
}

#[derive(Debug)]
struct InFlight {
    header: BatchHeader,
    crc: u32,
    payload_at: u64,
    segment: Arc<Segment>,
    fate: Fate,
    owner: Arc<Inbox>,
    requests: Vec<Pending>,
}

/// The state of one volume's log. Always used under the volume's lock.
#[derive(Debug)]
pub struct LogState {
    volume: VolumeId,
    branch: BranchId,
    term: u64,
    /// Grows with each branch that becomes the head. Queues of earlier ones append nothing any more.
    tenure: u64,
    /// Queues that were opened during this tenure and are still open.
    users: usize,
    /// The same of the tenure that has ended, until the next one begins.
    users_before: usize,
    /// One tenure has ended, and the next has not begun.
    switching: bool,
    /// The last batch that was placed, and its header's checksum.
    placed: Ordinal,
    placed_crc: u32,
    /// The last batch that is acknowledged, with its place and checksum: what a cut would name.
    acked: Ordinal,
    acked_crc: u32,
    acked_at: BatchPlace,
    acked_seq: Seq,
    acked_time_ns: u64,
    durable: Ordinal,
    claimed: Ordinal,
    open: Option<Open>,
    blank: Option<Blank>,
    opened_since_cut: u32,
    needs_cut: bool,
    had_failures: bool,
    poisoned: Option<String>,
    in_flight: VecDeque<InFlight>,
    /// Acknowledged batches whose completions the front end may not have passed on yet.
    undelivered: BTreeSet<Ordinal>,
    dirty: Vec<Arc<Segment>>,
    syncing: bool,
    sync_waiters: Vec<Arc<Inbox>>,
    /// A guest's flush completed at this `Seq`; the next batch will say so.
    flushed_seq: Option<Seq>,
    /// The log had to wait for its last segment: the disk is not fast enough to zero-fill while guests write.
    waited: bool,
    /// A batch waits that the rest of the open segment is too short for.
    outgrown: bool,
    /// Blocks merged from partial writes and not yet acknowledged.
    overlay: HashMap<u64, (Ordinal, Box<[u8]>)>,
    /// Where it is noted how far the log was written, if it is.
    reach: Option<Reach>,
}

impl LogState {
    /// A log that goes on after `end`. Its first append will be a cut in a fresh segment, unless it is empty.
    #[must_use]
    pub fn new(volume: VolumeId, branch: BranchId, end: &LogEnd, reach: Option<Reach>) -> Self {
        Self {
            volume,
            branch,
            tenure: 0,
            users: 0,
            users_before: 0,
            switching: false,
            term: end.term + 1,
            placed: end.ordinal,
            placed_crc: end.crc,
            acked: end.ordinal,
            acked_crc: end.crc,
            acked_at: end.place,
            acked_seq: end.seq,
            acked_time_ns: end.time_ns,
            durable: end.ordinal,
            claimed: end.ordinal,
            open: None,
            blank: None,
            opened_since_cut: 0,
            needs_cut: end.ordinal > Ordinal(0),
            had_failures: false,
            poisoned: None,
            in_flight: VecDeque::new(),
            undelivered: BTreeSet::new(),
            dirty: Vec::new(),
            syncing: false,
            sync_waiters: Vec::new(),
            flushed_seq: None,
            waited: false,
            outgrown: false,
            overlay: HashMap::new(),
            reach,
        }
    }

    /// The last acknowledged batch.
    #[must_use]
    pub fn acked(&self) -> Ordinal {
        self.acked
    }

    /// `Seq` and store time of the last acknowledged request.
    #[must_use]
    pub fn head(&self) -> (Seq, u64) {
        (self.acked_seq, self.acked_time_ns)
    }

    /// Which of the branches that have been the head since the store was opened is it now, counted from 0.
    #[must_use]
    pub fn tenure(&self) -> u64 {
        self.tenure
    }

    /// Counts a queue that is being opened; none is while one tenure has ended and the next has not begun, unless none will.
    pub fn enter(&mut self) -> Option<u64> {
        if self.switching && self.poisoned.is_none() {
            return None;
        }
        self.users += 1;
        Some(self.tenure)
    }

    /// A queue that was opened during a tenure is closed.
    pub fn leave(&mut self, tenure: u64) {
        if tenure == self.tenure {
            self.users -= 1;
        } else if self.switching && tenure + 1 == self.tenure {
            self.users_before -= 1;
        }
    }

    /// Open queues of the head.
    #[must_use]
    pub fn users(&self) -> usize {
        self.users
    }

    /// Refuses every further append of the queues that are open, and lets none be opened until
    /// [`LogState::begin_tenure`] or [`LogState::resume_tenure`].
    pub fn end_tenure(&mut self) {
        self.tenure += 1;
        self.users_before = std::mem::take(&mut self.users);
        self.switching = true;
    }

    /// Whether one tenure has ended, and the next has not begun.
    #[must_use]
    pub fn is_switching(&self) -> bool {
        self.switching
    }

    /// Lets queues append again.
    pub fn begin_tenure(&mut self) {
        self.switching = false;
    }

    /// The same, also those that were open when the tenure was ended: it goes on. Of a log that is poisoned it does not.
    pub fn resume_tenure(&mut self) {
        if self.poisoned.is_none() {
            (self.tenure, self.users) = (self.tenure - 1, self.users_before);
        }
        self.begin_tenure();
    }

    /// `Seq` and time of the first request that is in the log and not acknowledged.
    #[must_use]
    pub fn first_unacknowledged(&self) -> Option<(Seq, u64)> {
        self.in_flight.front().map(|b| (b.header.first_seq, b.header.time_ns))
    }

    /// Why no epoch of a branch can be cut now, if that is so, to be said of the volume.
    #[must_use]
    pub fn epoch_obstacle(&self, branch: BranchId) -> Option<(ErrorKind, String)> {
        if self.switching || self.branch != branch {
            let why = format!("was reverted: its head is no longer branch {branch}");
            return Some((ErrorKind::Invalid, why));
        }
        if self.needs_cut {
            return Some((ErrorKind::Busy, "is sorting out writes that failed".to_owned()));
        }
        (!self.in_flight.is_empty()).then(|| (ErrorKind::Busy, "has writes in flight".to_owned()))
    }

    /// `Seq` and time of the last request that was placed and is not acknowledged yet.
    #[must_use]
    pub fn last_placed(&self) -> Option<(Seq, u64)> {
        self.in_flight.back().map(|batch| (batch.header.last_seq(), batch.header.time_ns))
    }

    /// Goes on with another branch, which begins at `start`. Nothing must be in flight.
    pub fn switch(&mut self, branch: BranchId, start: Seq, created_ns: u64) {
        debug_assert!(self.in_flight.is_empty(), "a branch was switched under a batch in flight");
        self.branch = branch;
        self.acked_seq = self.acked_seq.max(start);
        self.acked_time_ns = self.acked_time_ns.max(created_ns);
    }

    /// The header checksum of the last acknowledged batch, and where that batch lies.
    #[must_use]
    pub fn acked_at(&self) -> (u32, BatchPlace) {
        (self.acked_crc, self.acked_at)
    }

    /// Everything up to here survives a power cut.
    #[must_use]
    pub fn durable(&self) -> Ordinal {
        self.durable
    }

    /// Everything up to here is covered by a record that says it is durable.
    #[must_use]
    pub fn claimed(&self) -> Ordinal {
        self.claimed
    }

    /// Notes such a record; it covers itself, being synced.
    pub fn claim(&mut self, ordinal: Ordinal) {
        self.claimed = ordinal;
    }

    /// Everything up to here has been delivered to the front end, so no in-flight region still names it.
    #[must_use]
    pub fn delivered(&self) -> Ordinal {
        self.undelivered.first().map_or(self.acked, |first| Ordinal(first.0 - 1))
    }

    /// Why nothing can be appended any more, if that is so.
    #[must_use]
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }

    /// Whether a write to its segments has failed since it was opened.
    #[must_use]
    pub fn had_failures(&self) -> bool {
        self.had_failures
    }

    /// Refuses every further append and flush, because nobody needs them any more.
    pub fn retire(&mut self, why: &str) {
        self.poisoned.get_or_insert_with(|| why.to_owned());
    }

    /// Refuses every further append and flush, because what they would say could not be trusted.
    pub fn poison(&mut self, why: String) {
        if self.poisoned.is_none() {
            tracing::error!(volume = %self.volume, "{why}; the volume takes no writes until the store is opened again");
            self.poisoned = Some(why);
        }
    }

    /// Batches placed and not yet acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The merged content of a block whose partial write is not acknowledged yet, or word that some other write to
    /// it is under way (`Err`), or neither.
    pub fn unacknowledged(&self, block: u64) -> std::result::Result<Option<&[u8]>, ()> {
        if let Some((_, bytes)) = self.overlay.get(&block) {
            return Ok(Some(bytes));
        }
        let touched = |r: &Record| block >= r.first && block - r.first < r.count;
        if self.in_flight.iter().any(|b| b.header.records.iter().any(touched)) { Err(()) } else { Ok(None) }
    }

    /// Gives a draft its place, ordinal and `Seq`, and completes its header in the buffer.
    pub fn append(&mut self, context: &LogContext, mut draft: Draft, owner: &Arc<Inbox>) -> Append {
        if self.poisoned.is_some() || self.needs_cut || !owner.may_append(self.tenure, self.switching) {
            return Append::Blocked(draft);
        }
        if let Some(seq) = self.flushed_seq {
            draft.note(Record::event(RecordKind::Flush, seq.0));
        }
        let unit = context.segments.alignment().physical_block;
        let header_len =
            BatchHeader::encoded_len(draft.records.len(), draft.crcs.len(), draft.body.len(), unit);
        let total = (header_len + draft.payload_len()).next_multiple_of(unit as usize);
        // To leave a file whose blocks are only set aside, or that grows, costs the rest of it at most, which is not much.
        let better = self.blank.as_ref().is_some_and(|blank| blank.filled);
        let stays = |open: &Open| open.fits(total as u64) && !(open.grows && open.is_flushed() && better);
        if !self.open.as_ref().is_some_and(stays) && !self.open_next(context, total as u64) {
            if self.flushed_seq.is_some() {
                draft.records.pop();
            }
            return Append::Blocked(draft);
        }
        let Some(open) = &mut self.open else { return Append::Blocked(draft) };
        self.flushed_seq = None;
        let segment = Arc::clone(&open.segment);
        let place = BatchPlace { incarnation: segment.header.incarnation, offset: open.offset };
        open.offset += total as u64;
        open.batches += 1;
        if let Some(reach) = &self.reach {
            let end = LogPos::new(place.incarnation, open.offset);
            reach.note(end.map(|place| End { place, secret: segment.header.secret }));
        }

        let seqs = draft.records.iter().filter(|r| !r.flags.more()).count() as u64;
        let stamp = context.clock.stamp();
        let header = BatchHeader {
            store: context.store,
            volume: self.volume,
            branch: self.branch,
            place,
            generation: context.generation,
            term: self.term,
            ordinal: self.placed.next(),
            previous_crc: self.placed_crc,
            durable: self.durable,
            first_seq: Seq(context.next_seq.fetch_add(seqs, Ordering::Relaxed)),
            time_ns: stamp.time_ns,
            wall_ns: stamp.wall_ns,
            boot_ns: stamp.boot_ns,
            records: std::mem::take(&mut draft.records),
            block_crcs: std::mem::take(&mut draft.crcs),
            body: std::mem::take(&mut draft.body),
        };
        self.place(context, draft, header, segment, header_len, total, owner)
    }

    #[expect(clippy::too_many_arguments, reason = "the second half of append, which has decided all of it")]
    fn place(
        &mut self,
        context: &LogContext,
        mut draft: Draft,
        header: BatchHeader,
        segment: Arc<Segment>,
        header_len: usize,
        total: usize,
        owner: &Arc<Inbox>,
    ) -> Append {
        let payload_from = draft.head_room();
        let header_from = payload_from - header_len;
        let crc = header.encode(segment.header.secret, &mut draft.buffer[header_from..payload_from]);
        let payload_to = payload_from + draft.payload_len();
        draft.buffer[payload_to..header_from + total].fill(0);
        for &(block, at) in &draft.merged {
            let bytes = draft.buffer[at..at + cdp_types::BLOCK_SIZE as usize].into();
            self.overlay.insert(block, (header.ordinal, bytes));
        }
        if !self.overlay.is_empty() {
            self.forget_overwritten(&header);
        }

        let (mut from, mut offset) = (header_from, header.place.offset);
        let unit = context.segments.alignment().physical_block;
        if offset == crate::format::data_start(unit) {
            // The first batch carries the segment's own header with it: one write, so neither is there without it.
            from -= offset as usize;
            let stride = header_stride(unit) as usize;
            for copy in [from, from + stride] {
                draft.buffer[copy..copy + stride].fill(0);
                segment.header.encode(&mut draft.buffer[copy..copy + SegmentHeader::LEN]);
            }
            offset = 0;
        }
        let payload_at = header.place.offset + header_len as u64;
        let ordinal = header.ordinal;
        self.placed = ordinal;
        self.placed_crc = crc;
        let file = Arc::clone(&segment.file);
        let (buffer, requests) = draft.into_parts();
        let owner = Arc::clone(owner);
        self.in_flight.push_back(InFlight {
            header,
            crc,
            payload_at,
            segment,
            fate: Fate::Writing,
            owner,
            requests,
        });
        Append::Placed(Placement { ordinal, file, offset, range: from..header_from + total }, buffer)
    }

    /// A whole-block write or a clear supersedes what the overlay held of its blocks.
    fn forget_overwritten(&mut self, header: &BatchHeader) {
        let touches = |r: &Record, block: u64| block >= r.first && block - r.first < r.count;
        self.overlay.retain(|&block, (ordinal, _)| {
            *ordinal == header.ordinal || !header.records.iter().any(|r| touches(r, block))
        });
    }

    fn open_next(&mut self, context: &LogContext, total: u64) -> bool {
        let first_at = crate::format::data_start(context.segments.alignment().physical_block);
        if self.blank.as_ref().is_some_and(|b| b.capacity < first_at + total) {
            // A young log's small segment cannot take a large request: capacity is a promise about length only,
            // and files that are not zero-filled grow.
            if let Some(blank) = &mut self.blank {
                blank.capacity = (first_at + total).next_power_of_two();
                blank.filled = false;
            }
        }
        let Some(blank) = self.blank.take() else {
            self.waited = true;
            self.outgrown = true;
            return false;
        };
        self.outgrown = false;
        let header = SegmentHeader {
            store: context.store,
            incarnation: 0,
            volume: self.volume,
            branch: self.branch,
            generation: context.generation,
            term: self.term,
            first_ordinal: self.placed.next(),
            previous_crc: self.placed_crc,
            physical_block: context.segments.alignment().physical_block,
            secret: (context.secrets)(),
            capacity: blank.capacity,
            opened_ns: context.clock.stamp().wall_ns,
        };
        let grows = !blank.filled;
        // After one that grows, filling is tried again.
        self.waited &= !grows;
        let segment = context.segments.open_segment(blank, header);
        self.open = Some(Open::new(segment, first_at, grows, context.batch_bytes));
        self.opened_since_cut += 1;
        true
    }

    /// Notes how a batch's write went, and returns the batches that can be acknowledged now, in order.
    pub fn complete(&mut self, ordinal: Ordinal, result: std::result::Result<(), IoErrorKind>) -> Vec<Acked> {
        let first = self.in_flight.front().map_or(ordinal.0, |b| b.header.ordinal.0);
        let index = ordinal.0.checked_sub(first).unwrap_or(u64::MAX);
        if let Some(batch) = self.in_flight.get_mut(index as usize) {
            batch.fate = match result {
                Ok(()) => Fate::Done,
                Err(kind) => Fate::Failed(kind),
            };
            // Synced even if it failed: other batches of this segment may be acknowledged.
            let segment = Arc::clone(&batch.segment);
            if !self.dirty.iter().any(|s| Arc::ptr_eq(s, &segment)) {
                self.dirty.push(segment);
            }
        }
        if result.is_err() {
            self.needs_cut = true;
            self.had_failures = true;
        }
        let mut acked = Vec::new();
        while self.in_flight.front().is_some_and(|b| matches!(b.fate, Fate::Done)) {
            let Some(batch) = self.in_flight.pop_front() else { break };
            acked.push(self.acknowledge(batch));
        }
        acked
    }

    fn acknowledge(&mut self, batch: InFlight) -> Acked {
        let header = batch.header;
        self.acked = header.ordinal;
        self.acked_crc = batch.crc;
        self.acked_at = header.place;
        self.acked_seq = self.acked_seq.max(header.last_seq());
        self.acked_time_ns = header.time_ns;
        if !self.overlay.is_empty() {
            self.overlay.retain(|_, (ordinal, _)| *ordinal > header.ordinal);
        }
        if !batch.requests.is_empty() {
            self.undelivered.insert(header.ordinal);
        }
        Acked {
            header,
            crc: batch.crc,
            payload_at: batch.payload_at,
            owner: batch.owner,
            requests: batch.requests,
        }
    }

    /// The front end has passed on every completion of this batch.
    pub fn deliver(&mut self, ordinal: Ordinal) {
        self.undelivered.remove(&ordinal);
    }

    /// Whether a cut is due and possible: nothing of the old tail is under way any more, and no sync either, whose
    /// failure the cut would not hear of. Of a poisoned log only the requests are left to be ended.
    #[must_use]
    pub fn can_cut(&self) -> bool {
        if self.poisoned.is_some() {
            return self.tail_is_still() && !self.in_flight.is_empty();
        }
        self.tail_is_still() && !self.syncing && self.blank.is_some()
    }

    /// Whether requests wait for a cut that only lacks a segment.
    #[must_use]
    pub fn cut_wants_segment(&self) -> bool {
        let possible = self.poisoned.is_none() && self.tail_is_still() && !self.syncing;
        possible && self.blank.is_none() && !self.in_flight.is_empty()
    }

    fn tail_is_still(&self) -> bool {
        self.needs_cut && !self.in_flight.iter().any(|b| matches!(b.fate, Fate::Writing))
    }

    /// Whether a sync is under way.
    #[must_use]
    pub fn is_syncing(&self) -> bool {
        self.syncing
    }

    /// Whether appending waits for a cut.
    #[must_use]
    pub fn needs_cut(&self) -> bool {
        self.needs_cut
    }

    /// Ends the old tail: what was placed and not acknowledged is no longer part of the log, and never will be.
    /// Returns the batches that this removed; only now may their requests be failed or run again.
    ///
    /// 1. Sync the segments that hold acknowledged batches. Crash: as before the cut.
    /// 2. Write the cut, in a fresh segment. Crash: there is a valid cut or there is none; both end at the same batch.
    /// 3. Sync it. Crash: every later opening obeys it.
    ///
    /// Blocks for a few milliseconds; only openings and I/O errors need it. If it cannot be written and synced, the log
    /// is poisoned: nothing is appended any more, and what becomes of the tail is decided by the next opening.
    pub fn cut(&mut self, context: &LogContext) -> Vec<Failed> {
        let removed = std::mem::take(&mut self.in_flight);
        self.overlay.clear();
        if self.poisoned.is_none()
            && let Err(error) = self.try_cut(context)
        {
            self.poison(format!("cutting the log's tail failed: {error}"));
        }
        let failed = |b: InFlight| Failed {
            error: match b.fate {
                Fate::Failed(kind) => Some(kind),
                Fate::Done | Fate::Writing => None,
            },
            owner: b.owner,
            requests: b.requests,
        };
        removed.into_iter().map(failed).collect()
    }

    fn try_cut(&mut self, context: &LogContext) -> Result<()> {
        for segment in std::mem::take(&mut self.dirty) {
            segment.file.sync().map_err(|e| Error::io(format!("syncing {}", segment.file.name()), e))?;
        }
        (self.placed, self.placed_crc) = (self.acked, self.acked_crc);
        self.durable = self.acked;
        self.open = None;
        self.opened_since_cut = 0;
        self.term += 1;
        let cut = Cut { last_crc: self.acked_crc, last: self.acked, place: self.acked_at };
        self.needs_cut = false;
        let record = Record::event(RecordKind::Cut, 0);
        self.append_synced(context, record, cut.encode()).map(drop)
    }

    /// Appends one event, blocking, and makes the log durable up to it. Nothing else may be in flight, no sync either.
    ///
    /// # Durability
    /// The event, and everything before it, survives a power cut once this returns.
    ///
    /// # Errors
    /// If there is no segment for it ([`ErrorKind::NoSpace`]) or it cannot be written or synced: then the log is
    /// poisoned, because whether it counts is not known.
    pub fn append_synced(&mut self, context: &LogContext, record: Record, body: Vec<u8>) -> Result<Acked> {
        if let Some(why) = &self.poisoned {
            return Err(Error::new(ErrorKind::ReadOnly, why.clone()));
        }
        if self.syncing {
            return Err(Error::new(ErrorKind::Busy, "the log is being synced"));
        }
        let draft = Draft::event(record, body, context.segments.alignment());
        let (placement, buffer) = match self.append(context, draft, &Inbox::nobody()) {
            Append::Placed(placement, buffer) => (placement, buffer),
            Append::Blocked(_) => {
                return Err(Error::new(ErrorKind::NoSpace, "no segment for the log's next record"));
            }
        };
        let result = self.write_and_sync(&placement, buffer);
        if let Err(error) = &result {
            self.poison(format!("{}: {error}", placement.file.name()));
            // It may land yet, like any write that has failed.
            self.had_failures = true;
            // It is nobody's request. As long as it were in flight, whoever asks for an instant would wait for its end.
            self.in_flight.clear();
        }
        result
    }

    fn write_and_sync(&mut self, placement: &Placement, mut buffer: AlignedBuf) -> Result<Acked> {
        let name = placement.file.name();
        let bytes = &mut AlignedBuf::zeroed(placement.range.len());
        bytes.copy_from_slice(&buffer[placement.range.clone()]);
        std::mem::swap(&mut buffer, bytes);
        placement
            .file
            .write_at(placement.offset, &buffer)
            .map_err(|e| Error::io(format!("writing {name}, byte {}", placement.offset), e))?;
        let mut acked = self.complete(placement.ordinal, Ok(()));
        for segment in std::mem::take(&mut self.dirty) {
            segment.file.sync().map_err(|e| Error::io(format!("syncing {}", segment.file.name()), e))?;
        }
        self.durable = self.acked;
        acked.pop().ok_or_else(|| Error::new(ErrorKind::Busy, "the log has requests in flight"))
    }

    /// Starts making everything acknowledged durable; `None` if a sync is under way already, which may have begun too
    /// early for the caller: `waiter` is called when it has ended. `None` too if the log is poisoned: another sync would
    /// succeed, and say nothing of what the failed one has lost.
    pub fn begin_sync(&mut self, waiter: &Arc<Inbox>) -> Option<SyncPlan> {
        if self.poisoned.is_some() {
            return None;
        }
        if self.syncing {
            if !self.sync_waiters.iter().any(|w| Arc::ptr_eq(w, waiter)) {
                self.sync_waiters.push(Arc::clone(waiter));
            }
            return None;
        }
        self.syncing = true;
        Some(SyncPlan { target: self.acked, segments: std::mem::take(&mut self.dirty) })
    }

    /// Ends what [`LogState::begin_sync`] began, and returns who waits for another one. A failed sync poisons the log:
    /// what it was to write may be gone although the next sync would succeed.
    pub fn end_sync(&mut self, plan: &SyncPlan, result: std::result::Result<(), String>) -> Vec<Arc<Inbox>> {
        self.syncing = false;
        match result {
            Ok(()) if self.poisoned.is_none() => self.durable = self.durable.max(plan.target),
            Ok(()) => {}
            Err(why) => self.poison(why),
        }
        std::mem::take(&mut self.sync_waiters)
    }

    /// Has the next batch say that a guest's flush completed which covered everything up to `seq`.
    pub fn note_flush(&mut self, seq: Seq) {
        self.flushed_seq = Some(self.flushed_seq.map_or(seq, |s| s.max(seq)));
        if let Some(open) = &mut self.open {
            open.flushes += 1;
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
