//! Requests that change whole blocks: into a draft, into the log, back as acknowledgements.

use std::io;
use std::sync::atomic::Ordering as Memory;

use cdp_types::{BLOCK_SIZE, ByteRange, IoError, IoErrorKind, Op, Ordinal, Wait};

use super::head::{HeadQueue, Job};
use crate::format::RecordKind;
use crate::log::{Append, Draft, Pending, Placement};
use crate::storage::{AlignedBuf, Token};

/// Write buffers that a queue keeps for its next batches.
const SPARE_BUFFERS: usize = 3;

impl HeadQueue {
    /// Puts waiting requests into batches, as many as may be in flight.
    ///
    /// # Errors
    /// Only when the ring itself is broken.
    pub(super) fn pump_writes(&mut self) -> io::Result<()> {
        let limit = self.volume.shared().tuning.batches_in_flight;
        while self.batches_in_flight < limit {
            let draft = match self.blocked.take() {
                Some(draft) => draft,
                None if self.waiting.is_empty() => return Ok(()),
                None => match self.fill_draft() {
                    Some(draft) => draft,
                    None => return Ok(()),
                },
            };
            if draft.is_empty() {
                self.recycle(draft.into_parts().0);
                continue;
            }
            if !self.place(draft) {
                return Ok(());
            }
            if !self.waiting.is_empty() {
                // The disk writes this batch while the next one is filled. Handed over together, two batches that lie
                // side by side would become one write, and their requests would wait for each other.
                self.lane.poll(Wait::No, &mut self.done)?;
            }
        }
        Ok(())
    }

    /// Places a draft and starts its write; keeps it and says no if the log has no place for it.
    fn place(&mut self, draft: Draft) -> bool {
        match self.volume.append(draft, &self.inbox) {
            Append::Placed(placement, buffer) => {
                self.blocked_since_ns = None;
                self.start_batch(&placement, buffer);
                true
            }
            Append::Blocked(draft) => {
                self.hold_back(draft);
                false
            }
        }
    }

    pub(super) fn start_batch(&mut self, placement: &Placement, buffer: AlignedBuf) {
        let token = self.jobs.insert(Job::Batch(placement.ordinal)) as Token;
        self.batches_in_flight += 1;
        self.lane.write(token, &placement.file, placement.offset, buffer, placement.range.clone());
    }

    /// A draft has no place: its requests wait, unless the store has been full for too long.
    fn hold_back(&mut self, draft: Draft) {
        if let Some((kind, why)) = self.refusal() {
            let (buffer, requests) = draft.into_parts();
            self.recycle(buffer);
            self.fail_all(requests, kind, &why);
            let waiting: Vec<Pending> = self.waiting.drain(..).collect();
            self.fail_all(waiting, kind, &why);
            return;
        }
        let since_ns = *self.blocked_since_ns.get_or_insert_with(|| self.volume.shared().clock.boot_ns());
        if let Some((kind, why)) = self.volume.starved(since_ns) {
            self.blocked_since_ns = None;
            let (buffer, requests) = draft.into_parts();
            self.recycle(buffer);
            self.fail_all(requests, kind, &why);
        } else {
            self.blocked = Some(draft);
        }
    }

    fn fail_all(&mut self, requests: Vec<Pending>, kind: IoErrorKind, why: &str) {
        for pending in requests {
            self.finish(pending.id, Err(IoError::new(kind, why)));
        }
    }

    /// A draft with as many waiting requests as fit into one batch.
    fn fill_draft(&mut self) -> Option<Draft> {
        let shared = self.volume.shared();
        let alignment = shared.log.segments.alignment();
        let first_blocks = self.waiting.front().map_or(0, |p| payload_blocks(&p.op));
        let room = shared.tuning.batch_bytes;
        let needed = (first_blocks * BLOCK_SIZE) as usize;
        let mut draft = if needed > room {
            Draft::new(needed, alignment)
        } else {
            match self.spare.pop() {
                Some(buffer) => Draft::over(buffer, alignment),
                None => Draft::new(room, alignment),
            }
        };
        // Half of what waits, if nothing is under way: the other half is copied while this one is written.
        let mut quota = if self.batches_in_flight == 0 && self.waiting.len() >= 16 {
            self.waiting.len().div_ceil(2)
        } else {
            usize::MAX
        };
        let before = self.waiting.len();
        while let Some(pending) = self.waiting.front() {
            if quota == 0 {
                break;
            }
            quota -= 1;
            let records = record_count(&pending.op);
            if !draft.has_room(payload_blocks(&pending.op), records) {
                break;
            }
            let pending = self.waiting.pop_front()?;
            if !add(&mut draft, &pending.op) {
                // A discard of less than a block: nothing to log.
                self.finish(pending.id, Ok(()));
                continue;
            }
            self.count(&pending.op);
            draft.end_request(pending);
        }
        if draft.is_empty() && self.waiting.len() == before {
            // The first does not fit into an empty draft that was made for it: more ranges than a header can hold. If there
            // were only requests with nothing to log, whatever comes behind them gets a draft of its own.
            let pending = self.waiting.pop_front()?;
            let error = IoError::new(IoErrorKind::Invalid, "the request has too many ranges");
            self.finish(pending.id, Err(error));
        }
        Some(draft)
    }

    pub(super) fn count(&self, op: &Op) {
        let counters = self.volume.counters();
        match op {
            Op::Write { from, .. } => {
                counters.writes.fetch_add(1, Memory::Relaxed);
                counters.written_bytes.fetch_add(from.len() as u64, Memory::Relaxed);
            }
            _ => {
                counters.clears.fetch_add(1, Memory::Relaxed);
            }
        }
    }

    /// A batch's write has ended.
    pub(super) fn batch_written(
        &mut self,
        ordinal: Ordinal,
        result: io::Result<()>,
        buffer: Option<AlignedBuf>,
    ) {
        self.batches_in_flight -= 1;
        if let Some(buffer) = buffer {
            self.recycle(buffer);
        }
        let result = result.map_err(|error| {
            tracing::error!(volume = %self.volume.id(), "writing batch {ordinal} of the log: {error}");
            match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IoErrorKind::NoSpace,
                _ => IoErrorKind::Device,
            }
        });
        self.volume.complete(ordinal, result, &self.inbox);
    }

    pub(super) fn recycle(&mut self, buffer: AlignedBuf) {
        let shared = self.volume.shared();
        let usual = Draft::buffer_len(shared.tuning.batch_bytes, shared.log.segments.alignment());
        if buffer.len() == usual && self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }

    /// A batch is acknowledged: its requests end now, or with the sync that makes them durable if one of them asked.
    pub(super) fn acknowledged(&mut self, ordinal: Ordinal, requests: Vec<Pending>) {
        if requests.iter().any(|p| wants_durability(&p.op)) {
            self.flushes.add_batch(ordinal, requests.into_iter().map(|p| p.id).collect());
            return;
        }
        for pending in requests {
            self.finish(pending.id, Ok(()));
        }
        self.flushes.finished.push(ordinal);
    }

    /// A batch was cut off. The requests of the one that failed get an error, unless it was for want of space;
    /// the others, which only came after it, run again.
    pub(super) fn batch_failed(&mut self, error: Option<IoErrorKind>, requests: Vec<Pending>) {
        let now_ns = self.volume.shared().clock.boot_ns();
        match (error, error.and_then(|_| self.volume.starved(now_ns))) {
            (Some(kind), _) if kind != IoErrorKind::NoSpace => {
                self.fail_all(requests, kind, "writing to the log failed");
            }
            (_, Some((kind, why))) => self.fail_all(requests, kind, &why),
            (_, None) => {
                for pending in requests.into_iter().rev() {
                    if is_partial(&pending.op) {
                        self.partial_waiting.push_front(pending);
                    } else {
                        self.waiting.push_front(pending);
                    }
                }
            }
        }
    }

    /// The front end has seen what the last `poll` returned.
    pub(super) fn deliver(&mut self) {
        let mut log = self.volume.log();
        for ordinal in self.handed_over.drain(..) {
            log.deliver(ordinal);
        }
    }

    /// What this `poll` returns is delivered at the next one.
    pub(super) fn note_handed_over(&mut self) {
        self.handed_over.append(&mut self.flushes.finished);
    }
}

/// Whether a request changes parts of blocks.
pub(super) fn is_partial(op: &Op) -> bool {
    match op {
        Op::Write { offset, from, .. } => is_partial_range(&ByteRange::new(*offset, from.len() as u64)),
        Op::WriteZeroes { ranges, .. } => ranges.iter().any(is_partial_range),
        Op::Read { .. } | Op::Discard { .. } | Op::Flush => false,
    }
}

fn is_partial_range(range: &ByteRange) -> bool {
    range.check(u64::MAX, BLOCK_SIZE).is_err()
}

fn wants_durability(op: &Op) -> bool {
    matches!(op, Op::Write { fua: true, .. } | Op::WriteZeroes { fua: true, .. })
}

fn payload_blocks(op: &Op) -> u64 {
    match op {
        Op::Write { from, .. } => from.len() as u64 / BLOCK_SIZE,
        _ => 0,
    }
}

fn record_count(op: &Op) -> usize {
    match op {
        Op::WriteZeroes { ranges, .. } | Op::Discard { ranges, .. } => ranges.len(),
        _ => 1,
    }
}

/// Adds a request of whole blocks to a draft; says no if it changes nothing.
fn add(draft: &mut Draft, op: &Op) -> bool {
    let mut added = false;
    match op {
        Op::Write { offset, from, origin, .. } => {
            let blocks = ByteRange::new(*offset, from.len() as u64).whole_blocks();
            if !blocks.is_empty() {
                draft.write(blocks, from, 0, *origin);
                added = true;
            }
        }
        Op::WriteZeroes { ranges, origin, unmap, .. } => {
            let kind = if *unmap { RecordKind::Discard } else { RecordKind::Zero };
            for blocks in ranges.iter().map(|r| r.whole_blocks()).filter(|b| !b.is_empty()) {
                draft.clear(kind, blocks, *origin);
                added = true;
            }
        }
        Op::Discard { ranges, origin } => {
            for blocks in ranges.iter().map(|r| r.whole_blocks()).filter(|b| !b.is_empty()) {
                draft.clear(RecordKind::Discard, blocks, *origin);
                added = true;
            }
        }
        Op::Read { .. } | Op::Flush => {}
    }
    added
}
