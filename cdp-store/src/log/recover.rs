//! Finding the end of a log, and replaying what the index does not have.

use std::collections::VecDeque;
use std::sync::Arc;

use cdp_types::{Ordinal, Seq};

use super::ahead::Ahead;
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
    /// What is wrong with the log, if it is damaged: it goes on behind `end`, or may, and cannot be read.
    pub damage: Option<Damage>,
    /// Where `end` ends, if nothing but what is fenced off was ever placed behind it.
    pub reached: Option<End>,
}

/// Why a log cannot be read to its end.
#[derive(Debug)]
pub struct Damage {
    /// [`ErrorKind::Corrupt`] if something is not what it was, [`ErrorKind::Io`] if the disk does not say what it is.
    pub kind: ErrorKind,
    /// Where, and what.
    pub text: String,
    /// Everything up to here is known to have been durable.
    pub claimed: Ordinal,
}

/// Walks a log from the batch that `watermark` names, or from its start, to its end, and calls `visit` with every
/// batch *after* the watermark that is part of it, in order, and whether it is known to be durable. Reads only headers up to the last ordinal that is known to
/// be durable, and payloads beyond it: there, a batch may be torn.
///
/// What the disk does not read, it may read another time, or never: the log ends before it, as before what has rotted.
///
/// If the walk ends exactly where `reached` says that the last batch ends which was ever placed ([`crate::reach`]), nothing
/// is looked for behind that.
///
/// Writes nothing: where the log ends is recorded in the store log, as its `fence` for later openings, and by a cut
/// before the first append ([`super::LogState::cut`]).
///
/// # Errors
/// If a file is of a newer format; [`ErrorKind::Corrupt`] if the watermark does not match the log (the caller then replays
/// from the start); those of `visit`.
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
    let reader = match watermark.filter(|w| w.ordinal > Ordinal(0)) {
        None => ChainReader::new(chain),
        Some(watermark) => match walk.start_at(chain, watermark) {
            Err(error) if error.kind() == ErrorKind::Io => {
                return Ok(at_index_only(watermark, known_durable, &error));
            }
            started => started?,
        },
    }
    .fenced(fence);
    let Some(ahead) = Ahead::worthwhile(chain, reader.segment()) else {
        return walk.go_on(reader, known_durable, reached, visit);
    };
    std::thread::scope(|scope| {
        let _walking = ahead.start(scope);
        walk.go_on(reader.behind(&ahead), known_durable, reached, visit)
    })
}

/// What a log has to do without because the disk does not read it is noted, the first of it; other errors are the caller's.
fn or_unreadable<T>(result: Result<T>, unreadable: &mut Option<Error>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::Io => {
            unreadable.get_or_insert(error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What is left of a log whose batch cannot be read with which the index ends: what the index has, which was durable.
fn at_index_only(watermark: &Watermark, known_durable: Ordinal, error: &Error) -> Recovery {
    let place = BatchPlace { incarnation: watermark.pos.incarnation(), offset: watermark.pos.offset_bytes() };
    let &Watermark { ordinal, seq, header_crc: crc, time_ns, .. } = watermark;
    let end = LogEnd { ordinal, crc, place, seq, time_ns, term: 0 };
    let damage = Some(Damage::unreadable(error, ordinal.max(known_durable)));
    Recovery { end, durable: ordinal, at_watermark: None, damage, reached: None }
}

impl Damage {
    fn unreadable(error: &Error, claimed: Ordinal) -> Self {
        let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
        let text = format!("{error}{cause}; what the log has from there on is not known");
        Self { kind: ErrorKind::Io, text, claimed }
    }
}

fn describe(reader: &ChainReader<'_>, missing: Ordinal, claimed: Ordinal) -> Damage {
    let (name, offset) =
        reader.position().map_or(("the log", 0), |(segment, offset)| (segment.file.name(), offset));
    let text = format!(
        "{name}, byte {offset}: batch {missing} is damaged; it had been made durable (batches up to {claimed} were), \
         so this is no torn tail"
    );
    Damage { kind: ErrorKind::Corrupt, text, claimed }
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

    /// From where the reader is to the end of the log.
    fn go_on(
        mut self,
        mut reader: ChainReader<'_>,
        known_durable: Ordinal,
        reached: Option<End>,
        visit: &mut dyn FnMut(BatchAt, bool) -> Result<()>,
    ) -> Result<Recovery> {
        let mut unreadable = None;
        while let Some(batch) = or_unreadable(reader.next(), &mut unreadable)?.flatten() {
            self.claim(&batch);
            self.undecided.push_back(batch);
            self.release(visit)?;
        }
        let ends_at = reader.position().and_then(|(segment, offset)| {
            let place = LogPos::new(segment.header.incarnation, offset)?;
            Some(End { place, secret: segment.header.secret })
        });
        let claimed = match reached {
            _ if unreadable.is_some() => known_durable,
            Some(_) if ends_at == reached => known_durable,
            _ => {
                let claimed = or_unreadable(reader.claims_beyond(), &mut unreadable)?;
                claimed.map_or(known_durable, |claimed| claimed.max(known_durable))
            }
        };
        let next = self.undecided.back().map_or(self.end.ordinal, |b| b.header.ordinal).next();
        let rot = (claimed >= next).then(|| describe(&reader, next, claimed));
        self.durable = self.durable.max(Ordinal(claimed.0.min(next.0 - 1)));
        self.release(visit)?;
        while let Some(batch) = self.undecided.pop_front() {
            if or_unreadable(batch.payload_is_whole(), &mut unreadable)? != Some(true) {
                break;
            }
            self.end = self.end.after(&batch);
            visit(batch, false)?;
        }
        let Self { end, durable, at_watermark, .. } = self;
        let damage = unreadable.map(|error| Damage::unreadable(&error, claimed.max(durable))).or(rot);
        let is_whole = damage.is_none() && end.ordinal.next() == next;
        Ok(Recovery { end, durable, at_watermark, damage, reached: ends_at.filter(|_| is_whole) })
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
