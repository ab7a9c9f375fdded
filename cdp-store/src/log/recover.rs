//! Finding the end of a log, and replaying what the index does not have.

use std::collections::VecDeque;
use std::sync::Arc;

use cdp_types::{Ordinal, Seq};

use super::scan::{BatchAt, ChainReader, Fence};
use crate::error::{Error, ErrorKind, Result};
use crate::format::BatchPlace;
use crate::index::{LogPos, Watermark};
use crate::reach::End;
use crate::segments::Segment;

/// The last batch of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// Its ordinal; 0 if the log is empty.
    pub ordinal: Ordinal,
    /// Its header's checksum.
    pub crc: u32,
    /// Where it lies.
    pub place: BatchPlace,
    /// `Seq` of the last request.
    pub seq: Seq,
    /// The batch's time on the store's clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The highest term in the log.
    pub term: u64,
}

impl LogEnd {
    /// The end of a log without batches.
    pub const EMPTY: Self = Self {
        ordinal: Ordinal(0),
        crc: 0,
        place: BatchPlace { incarnation: 0, offset: 0 },
        seq: Seq::ZERO,
        time_ns: 0,
        term: 0,
    };

    /// The same for a log that went on with a branch after its last batch.
    #[must_use]
    pub fn on_branch(self, start: Seq, created_ns: u64) -> Self {
        Self { seq: self.seq.max(start), time_ns: self.time_ns.max(created_ns), ..self }
    }

    fn after(&self, batch: &BatchAt) -> Self {
        Self {
            ordinal: batch.header.ordinal,
            crc: batch.crc,
            place: batch.header.place,
            seq: self.seq.max(batch.header.last_seq()),
            time_ns: batch.header.time_ns,
            term: self.term.max(batch.header.term),
        }
    }
}

/// What recovery found.
#[derive(Debug)]
pub struct Recovery {
    /// Where the log ends.
    pub end: LogEnd,
    /// Everything up to here was claimed durable before.
    pub durable: Ordinal,
    /// The batch that the watermark names.
    pub at_watermark: Option<BatchAt>,
    /// What is wrong with the log, if it is damaged: it goes on behind `end`, and cannot be read.
    pub damage: Option<String>,
    /// Where `end` ends, if nothing but what is fenced off was ever placed behind it.
    pub reached: Option<End>,
}

/// Walks a log from the batch that `watermark` names, or from its start, to its end, and calls `visit` with every
/// batch *after* the watermark that is part of it, in order, and whether it is known to be durable. Reads only headers up to the last ordinal that is known to
/// be durable, and payloads beyond it: there, a batch may be torn.
///
/// If the walk ends exactly where `reached` says that the last batch ends which was ever placed ([`crate::reach`]), nothing
/// is looked for behind that.
///
/// Writes nothing: where the log ends is recorded in the store log, as its `fence` for later openings, and by a cut
/// before the first append ([`super::LogState::cut`]).
///
/// # Errors
/// If a file cannot be read or is of a newer format; [`ErrorKind::Corrupt`] if the watermark does not match the log (the
/// caller then replays from the start).
pub fn recover(
    chain: &[Arc<Segment>],
    fence: Fence,
    watermark: Option<&Watermark>,
    known_durable: Ordinal,
    reached: Option<End>,
    visit: &mut dyn FnMut(BatchAt, bool) -> Result<()>,
) -> Result<Recovery> {
    let mut walk =
        Walk { end: LogEnd::EMPTY, durable: known_durable, undecided: VecDeque::new(), at_watermark: None };
    let mut reader = match watermark.filter(|w| w.ordinal > Ordinal(0)) {
        None => ChainReader::new(chain),
        Some(watermark) => walk.start_at(chain, watermark)?,
    }
    .fenced(fence);
    while let Some(batch) = reader.next()? {
        walk.claim(&batch);
        walk.undecided.push_back(batch);
        walk.release(visit)?;
    }
    let ends_at = reader.position().and_then(|(segment, offset)| {
        let place = LogPos::new(segment.header.incarnation, offset)?;
        Some(End { place, secret: segment.header.secret })
    });
    let claimed = match reached {
        Some(_) if ends_at == reached => known_durable,
        _ => reader.claims_beyond()?.max(known_durable),
    };
    let next = walk.undecided.back().map_or(walk.end.ordinal, |b| b.header.ordinal).next();
    let damage = (claimed >= next).then(|| describe(&reader, next, claimed));
    walk.durable = walk.durable.max(Ordinal(claimed.0.min(next.0 - 1)));
    walk.release(visit)?;
    while let Some(batch) = walk.undecided.pop_front() {
        if !batch.payload_is_whole()? {
            break;
        }
        walk.end = walk.end.after(&batch);
        visit(batch, false)?;
    }
    let Walk { end, durable, at_watermark, .. } = walk;
    let is_whole = damage.is_none() && end.ordinal.next() == next;
    Ok(Recovery { end, durable, at_watermark, damage, reached: ends_at.filter(|_| is_whole) })
}

fn describe(reader: &ChainReader<'_>, missing: Ordinal, claimed: Ordinal) -> String {
    let (name, offset) =
        reader.position().map_or(("the log", 0), |(segment, offset)| (segment.file.name(), offset));
    format!(
        "{name}, byte {offset}: batch {missing} is damaged; it had been made durable (batches up to {claimed} were), \
         so this is no torn tail"
    )
}

struct Walk {
    end: LogEnd,
    durable: Ordinal,
    /// Batches that no later one claims to be durable yet.
    undecided: VecDeque<BatchAt>,
    at_watermark: Option<BatchAt>,
}

impl Walk {
    fn start_at<'a>(&mut self, chain: &'a [Arc<Segment>], watermark: &Watermark) -> Result<ChainReader<'a>> {
        let place =
            BatchPlace { incarnation: watermark.pos.incarnation(), offset: watermark.pos.offset_bytes() };
        let mismatch = || {
            let text = format!("batch {}, up to which the index goes, is not in the log", watermark.ordinal);
            Error::new(ErrorKind::Corrupt, text)
        };
        let mut reader = ChainReader::starting_at(chain, place).ok_or_else(mismatch)?;
        let batch = reader.next()?.ok_or_else(mismatch)?;
        if batch.header.ordinal != watermark.ordinal || batch.crc != watermark.header_crc {
            return Err(mismatch());
        }
        self.end = self.end.after(&batch);
        self.end.seq = self.end.seq.max(watermark.seq);
        self.durable = self.durable.max(watermark.ordinal);
        self.at_watermark = Some(batch);
        Ok(reader)
    }

    fn claim(&mut self, batch: &BatchAt) {
        self.durable = self.durable.max(batch.header.claimed());
    }

    fn release(&mut self, visit: &mut dyn FnMut(BatchAt, bool) -> Result<()>) -> Result<()> {
        while self.undecided.front().is_some_and(|b| b.header.ordinal <= self.durable) {
            let Some(batch) = self.undecided.pop_front() else { break };
            self.end = self.end.after(&batch);
            visit(batch, true)?;
        }
        Ok(())
    }
}
