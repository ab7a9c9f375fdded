//! Requests that change parts of blocks: the rest of such a block is read first, and the whole is appended.
//!
//! A block's old content may lie in the log (the map knows where), in the overlay of merged blocks that are not
//! acknowledged yet, or in a batch that is still being written; then this request waits for that batch. Whether what
//! was read is still the old content is decided under the log's lock, at the moment of appending: that orders
//! these writes against every other write to the block, without locking any.

use std::io;
use std::sync::Arc;

use cdp_types::{BLOCK_SIZE, BlockRange, ByteRange, IoBuf, IoError, IoErrorKind, Op, Origin, Seq};

use super::head::{HeadQueue, Job};
use crate::format::{RecordKind, block_crc};
use crate::index::BlockState;
use crate::log::{Append, Draft, Pending};
use crate::storage::Token;
use crate::volume::Volume;

/// One request of this kind, while the old contents of its edges are being gathered.
#[derive(Debug)]
pub struct PartialWrite {
    pending: Pending,
    /// Whether it is in the counters already.
    counted: bool,
    /// Since when the log has had no place for it, on the boot clock.
    blocked_since_ns: Option<u64>,
    edges: Vec<Edge>,
    reads: usize,
    error: Option<IoError>,
}

/// A block of which only a part is written.
#[derive(Debug)]
struct Edge {
    block: u64,
    /// Up to which request, at least, its state was looked up.
    as_of: Seq,
    /// The old content, and the state of the block in the map that it was read from.
    base: Option<(BlockState, IoBuf)>,
    reading: Option<(BlockState, IoBuf)>,
}

enum Readiness {
    Ready,
    Wait,
}

impl HeadQueue {
    /// Moves the requests of this kind on, one after the other.
    pub(super) fn pump_partial(&mut self) {
        loop {
            if self.partial.is_none() {
                let Some(pending) = self.partial_waiting.pop_front() else { return };
                self.partial = Some(PartialWrite::new(pending));
            }
            if !self.step_partial() {
                return;
            }
        }
    }

    /// Whether there is more to do: for the next request, or once more for the present one.
    fn step_partial(&mut self) -> bool {
        let limit = self.volume.shared().tuning.batches_in_flight;
        let Some(mut work) = self.partial.take() else { return false };
        if work.reads > 0 || self.batches_in_flight >= limit {
            self.partial = Some(work);
            return false;
        }
        if let Some(error) = work.error.take() {
            self.finish(work.pending.id, Err(error));
            return true;
        }
        if let Some((kind, why)) = self.refusal() {
            self.finish(work.pending.id, Err(IoError::new(kind, why)));
            return true;
        }
        for edge in 0..work.edges.len() {
            if work.edges[edge].base.is_none()
                && let Err(error) = self.start_base(&mut work, edge)
            {
                work.error = Some(error);
                break;
            }
        }
        if work.reads > 0 {
            // One that cannot go on stays until its reads have ended: their completions know it only by its place.
            self.partial = Some(work);
            return false;
        }
        if let Some(error) = work.error.take() {
            self.finish(work.pending.id, Err(error));
            return true;
        }
        self.append_partial(work)
    }

    /// Finds out what a block held, reading it from the log if it lies there.
    fn start_base(&mut self, work: &mut PartialWrite, edge: usize) -> Result<(), IoError> {
        let block = work.edges[edge].block;
        // Before the look: what comes in between is taken for a change, and the look is repeated.
        work.edges[edge].as_of = self.volume.map().applied();
        let states = self.volume.states(BlockRange::new(block, 1)).map_err(|e| e.to_io())?;
        let landing = IoBuf::zeroed(BLOCK_SIZE as usize);
        let BlockState::Mapped(place) = states[0] else {
            work.edges[edge].base = Some((states[0], landing));
            return Ok(());
        };
        let segment = self.volume.shared().log.segments.get(place.pos.incarnation()).ok_or_else(|| {
            let text = format!("segment {} is not in the store", place.pos.incarnation());
            IoError::new(IoErrorKind::Corrupt, text)
        })?;
        let token = self.jobs.insert(Job::Base(edge)) as Token;
        self.lane.read(token, &segment.file, place.pos.offset_bytes(), landing.share());
        work.edges[edge].reading = Some((states[0], landing));
        work.reads += 1;
        Ok(())
    }

    /// A block's old content has been read.
    pub(super) fn base_read(&mut self, edge: usize, result: io::Result<()>) {
        let Some(work) = &mut self.partial else { return };
        work.reads -= 1;
        let Some((state, bytes)) = work.edges[edge].reading.take() else { return };
        let BlockState::Mapped(place) = state else { return };
        let block = work.edges[edge].block;
        if let Err(error) = result {
            work.error = Some(IoError::new(IoErrorKind::Device, format!("reading block {block}: {error}")));
        } else if block_crc(&bytes.to_vec()) != place.crc {
            let text = format!("block {block} at {} does not match its checksum", place.pos);
            tracing::error!(volume = %self.volume.id(), "{text}");
            work.error = Some(IoError::new(IoErrorKind::Corrupt, text));
        } else {
            work.edges[edge].base = Some((state, bytes));
        }
    }

    /// Appends the request, if its bases are still what the blocks hold.
    fn append_partial(&mut self, mut work: PartialWrite) -> bool {
        let volume = Arc::clone(&self.volume);
        let shared = volume.shared();
        let mut log = volume.log();
        let mut bases: Vec<Vec<u8>> = Vec::with_capacity(work.edges.len());
        for edge in &mut work.edges {
            match log.unacknowledged(edge.block) {
                Ok(Some(bytes)) => bases.push(bytes.to_vec()),
                Err(()) => {
                    volume.wait_for_change(&self.inbox);
                    self.partial = Some(work);
                    return false;
                }
                Ok(None) => match current(&volume, edge) {
                    Readiness::Ready => {
                        bases.push(edge.base.as_ref().map(|(_, b)| b.to_vec()).unwrap_or_default())
                    }
                    Readiness::Wait => {
                        // Somebody wrote the block meanwhile: it is read again, in the caller's next step.
                        edge.base = None;
                        drop(log);
                        self.partial = Some(work);
                        return true;
                    }
                },
            }
        }
        let payload = work.payload_blocks() * BLOCK_SIZE;
        let mut draft = Draft::new(payload as usize, shared.log.segments.alignment());
        let edges: Vec<u64> = work.edges.iter().map(|e| e.block).collect();
        fill(&mut draft, &work.pending.op, &edges, &bases);
        if !work.counted {
            self.count(&work.pending.op);
        }
        draft.end_request(work.pending);
        match volume.append_locked(&mut log, draft, &self.inbox) {
            Append::Placed(placement, buffer) => {
                drop(log);
                self.start_batch(&placement, buffer);
                true
            }
            Append::Blocked(draft) => {
                drop(log);
                let since_ns = work.blocked_since_ns.unwrap_or_else(|| shared.clock.boot_ns());
                let starved = volume.starved(since_ns);
                for pending in draft.into_parts().1 {
                    if let Some((kind, why)) = &starved {
                        self.finish(pending.id, Err(IoError::new(*kind, why)));
                    } else {
                        self.partial = Some(PartialWrite {
                            counted: true,
                            blocked_since_ns: Some(since_ns),
                            ..PartialWrite::new(pending)
                        });
                    }
                }
                false
            }
        }
    }
}

/// Whether a block is still in the state from which its base was read. Called under the log's lock.
fn current(volume: &Volume, edge: &Edge) -> Readiness {
    let Some((state, _)) = &edge.base else { return Readiness::Wait };
    let map = volume.map();
    let unchanged = match map.cached(edge.block) {
        Some(now) => now == *state,
        // A request may have more edges than leaves can be cached.
        None => map.is_unchanged_since(edge.block, edge.as_of),
    };
    if unchanged { Readiness::Ready } else { Readiness::Wait }
}

impl PartialWrite {
    fn new(pending: Pending) -> Self {
        let mut edges: Vec<u64> = ranges(&pending.op).iter().flat_map(edge_blocks).collect::<Vec<u64>>();
        edges.sort_unstable();
        edges.dedup();
        let edge = |block| Edge { block, as_of: Seq::ZERO, base: None, reading: None };
        let edges = edges.into_iter().map(edge).collect();
        Self { pending, counted: false, blocked_since_ns: None, edges, reads: 0, error: None }
    }

    fn payload_blocks(&self) -> u64 {
        let whole = match &self.pending.op {
            Op::Write { .. } => ranges(&self.pending.op).iter().map(|r| r.whole_blocks().count).sum(),
            _ => 0,
        };
        whole + self.edges.len() as u64
    }
}

/// The ranges of a request, sorted, and joined where they overlap or touch: each block then has one last word.
fn ranges(op: &Op) -> Vec<ByteRange> {
    let mut sorted: Vec<ByteRange> = match op {
        Op::Write { offset, from, .. } => vec![ByteRange::new(*offset, from.len() as u64)],
        Op::WriteZeroes { ranges, .. } | Op::Discard { ranges, .. } => ranges.to_vec(),
        Op::Read { .. } | Op::Flush => Vec::new(),
    };
    sorted.retain(|r| r.len > 0);
    sorted.sort_by_key(|r| r.offset);
    let mut joined: Vec<ByteRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.offset <= last.end() => last.len = last.end().max(range.end()) - last.offset,
            _ => joined.push(range),
        }
    }
    joined
}

/// The blocks that a range touches and does not cover: its first, its last, both, one or none.
fn edge_blocks(range: &ByteRange) -> impl Iterator<Item = u64> + use<> {
    let (touched, whole) = (range.touched_blocks(), range.whole_blocks());
    [touched.first, touched.end() - 1].into_iter().filter(move |&block| !whole.contains(block))
}

/// Adds the whole blocks and the merged edges of a request to an empty draft.
fn fill(draft: &mut Draft, op: &Op, edges: &[u64], bases: &[Vec<u8>]) {
    let all = ranges(op);
    let (origin, data): (Origin, Option<(u64, &IoBuf)>) = match op {
        Op::Write { offset, from, origin, .. } => (*origin, Some((*offset, from))),
        Op::WriteZeroes { origin, .. } | Op::Discard { origin, .. } => (*origin, None),
        Op::Read { .. } | Op::Flush => return,
    };
    for range in &all {
        let whole = range.whole_blocks();
        if whole.is_empty() {
            continue;
        }
        match data {
            Some((start, from)) => {
                draft.write(whole, from, (whole.bytes().offset - start) as usize, origin);
            }
            None => draft.clear(RecordKind::Zero, whole, origin),
        }
    }
    for (&block, base) in edges.iter().zip(bases) {
        draft.merge(block, base, origin, |bytes| {
            let here = BlockRange::new(block, 1).bytes();
            for range in &all {
                let (from, to) = (range.offset.max(here.offset), range.end().min(here.end()));
                if from >= to {
                    continue;
                }
                let target = &mut bytes[(from - here.offset) as usize..(to - here.offset) as usize];
                match data {
                    Some((start, memory)) => memory.copy_out((from - start) as usize, target),
                    None => target.fill(0),
                }
            }
        });
    }
}
