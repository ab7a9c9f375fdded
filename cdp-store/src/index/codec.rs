//! Values of the time index's rows. Their layout is in `docs/format.md`, "Time index".
//!
//! Every value is a version byte, a body and a CRC-32C of key, version and body. Decoding checks everything:
//! any bytes give a value or a [`DecodeError`], in memory that does not depend on what they claim.

use cdp_types::{Ordinal, Seq, crc32c};

use super::batch::TimeEntry;
use super::leaf::{Change, ChangeState, FANOUT};
use super::place::{BlockState, LogPos, Place};
use super::present::Bits;

/// What is wrong with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct DecodeError(pub(super) &'static str);

pub(super) type Decoded<T> = Result<T, DecodeError>;

const VERSION: u8 = 1;
/// The version of time rows that stand for several batches: to a reader that knows the first one only they would say less.
const VERSION_SHARED: u8 = 2;
const CRC_LEN: usize = 4;
/// From one block's place to the next one's in a batch, in units of `LogPos`.
const BLOCK_UNITS: u64 = cdp_types::BLOCK_SIZE / LogPos::UNIT_BYTES;

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Positions are written as distances from the one before, forwards or backwards, in few bytes.
fn put_pos(out: &mut Vec<u8>, previous: u64, pos: u64) {
    let distance = pos.wrapping_sub(previous) as i64;
    put_varint(out, (distance << 1 ^ distance >> 63) as u64);
}

/// Appends version, body and checksum; the value begins where `out` ends now.
fn seal(key: &[u8], out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    seal_as(VERSION, key, out, body);
}

fn seal_as(version: u8, key: &[u8], out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.push(version);
    body(out);
    let crc = crc32c([key, &out[start..]]);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// Takes a value's version and checksum off.
fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Decoded<Reader<'a>> {
    unseal_as(VERSION, key, value)
}

/// The same of a value that may have any version up to this one.
fn unseal_as<'a>(newest: u8, key: &[u8], value: &'a [u8]) -> Decoded<Reader<'a>> {
    let (covered, crc) = value.split_last_chunk::<CRC_LEN>().ok_or(DecodeError("value is too short"))?;
    let (version, body) = covered.split_first().ok_or(DecodeError("value is too short"))?;
    if crc32c([key, covered]) != u32::from_le_bytes(*crc) {
        return Err(DecodeError("checksum does not match"));
    }
    if !(VERSION..=newest).contains(version) {
        return Err(DecodeError("value has an unknown version"));
    }
    Ok(Reader { rest: body })
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn varint(&mut self) -> Decoded<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or(DecodeError("value ends inside a number"))?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(DecodeError("number exceeds 64 bits"));
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(DecodeError("number exceeds 64 bits"))
    }

    fn crc(&mut self) -> Decoded<u32> {
        let (crc, rest) =
            self.rest.split_first_chunk().ok_or(DecodeError("value ends inside a block's checksum"))?;
        self.rest = rest;
        Ok(u32::from_le_bytes(*crc))
    }

    fn pos(&mut self, previous: u64) -> Decoded<u64> {
        let coded = self.varint()?;
        let distance = (coded >> 1) ^ (coded & 1).wrapping_neg();
        Ok(previous.wrapping_add(distance))
    }

    /// All that is left: runs of states that cover a leaf.
    fn states(mut self) -> Decoded<Box<States>> {
        let mut states = super::leaf::unsaid();
        let mut rest = &mut states[..];
        let mut pos = 0;
        while !self.is_empty() {
            let head = self.varint()?;
            let length = usize::try_from(head >> 2).unwrap_or(usize::MAX);
            if length == 0 || length > rest.len() {
                return Err(DecodeError("image does not cover its leaf exactly"));
            }
            let (blocks, behind) = rest.split_at_mut(length);
            rest = behind;
            match head & 3 {
                run::UNSAID => {}
                run::ZERO => blocks.fill(BlockState::Zero),
                kind => {
                    for (index, block) in blocks.iter_mut().enumerate() {
                        pos = if kind == run::SCATTERED || index == 0 {
                            self.pos(pos)?
                        } else {
                            pos.wrapping_add(BLOCK_UNITS)
                        };
                        *block = BlockState::Mapped(Place { pos: LogPos::from_bits(pos), crc: self.crc()? });
                    }
                }
            }
        }
        if rest.is_empty() { Ok(states) } else { Err(DecodeError("image does not cover its leaf exactly")) }
    }

    fn finish(self) -> Decoded<()> {
        if self.is_empty() { Ok(()) } else { Err(DecodeError("value has bytes behind its end")) }
    }
}

/// How a change in a delta says what became of its children; in the lower two bits of the number that also
/// has the first child.
mod tag {
    pub(super) const MAPPED: u64 = 0;
    pub(super) const ZERO_ONE: u64 = 1;
    pub(super) const ZERO_RUN: u64 = 2;
}

/// Appends a delta. `changes` are not empty, ascend in `Seq`, and are valid for their node's level.
pub(super) fn encode_delta(key: &[u8], changes: &[Change], out: &mut Vec<u8>) {
    seal(key, out, |out| {
        let mut previous_seq = None;
        let mut previous_pos = 0;
        for change in changes {
            // The first `Seq` is in the key.
            if let Some(previous) = previous_seq {
                put_varint(out, change.seq.0 - previous);
            }
            previous_seq = Some(change.seq.0);
            let first = u64::from(change.first) << 2;
            match change.state {
                ChangeState::Mapped(place) => {
                    put_varint(out, first | tag::MAPPED);
                    let pos = place.pos.to_bits();
                    put_pos(out, previous_pos, pos);
                    previous_pos = pos;
                    out.extend_from_slice(&place.crc.to_le_bytes());
                }
                ChangeState::Zero if change.count == 1 => put_varint(out, first | tag::ZERO_ONE),
                ChangeState::Zero => {
                    put_varint(out, first | tag::ZERO_RUN);
                    put_varint(out, u64::from(change.count));
                }
            }
        }
    });
}

/// The changes of one delta, in the order in which they were written.
pub(super) struct DeltaReader<'a> {
    reader: Reader<'a>,
    level: u8,
    seq: Seq,
    pos: u64,
    begun: bool,
}

/// Checks a delta's seal; `first` is the `Seq` in its key.
pub(super) fn decode_delta<'a>(
    key: &[u8],
    level: u8,
    first: Seq,
    value: &'a [u8],
) -> Decoded<DeltaReader<'a>> {
    let reader = unseal(key, value)?;
    if reader.is_empty() {
        return Err(DecodeError("delta is empty"));
    }
    Ok(DeltaReader { reader, level, seq: first, pos: 0, begun: false })
}

impl DeltaReader<'_> {
    fn read(&mut self) -> Decoded<Change> {
        if self.begun {
            let step = self.reader.varint()?;
            self.seq = Seq(self.seq.0.checked_add(step).ok_or(DecodeError("Seq exceeds 64 bits"))?);
        }
        self.begun = true;
        let head = self.reader.varint()?;
        let first = head >> 2;
        let (count, state) = match head & 3 {
            tag::MAPPED if self.level == 0 => {
                self.pos = self.reader.pos(self.pos)?;
                let crc = self.reader.crc()?;
                (1, ChangeState::Mapped(Place { pos: LogPos::from_bits(self.pos), crc }))
            }
            tag::MAPPED => return Err(DecodeError("a place above level 0")),
            tag::ZERO_ONE => (1, ChangeState::Zero),
            tag::ZERO_RUN => (self.reader.varint()?, ChangeState::Zero),
            _ => return Err(DecodeError("unknown kind of change")),
        };
        let fanout = FANOUT as u64;
        if first >= fanout || count == 0 || count > fanout - first {
            return Err(DecodeError("change lies outside its node"));
        }
        Ok(Change { seq: self.seq, first: first as u16, count: count as u16, state })
    }
}

impl Iterator for DeltaReader<'_> {
    type Item = Decoded<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.reader.is_empty() {
            return None;
        }
        let change = self.read();
        if change.is_err() {
            // Nothing behind the damage means anything.
            self.reader.rest = &[];
        }
        Some(change)
    }
}

/// What the blocks of one run in an image are; in the lower two bits of the number that also has its length.
mod run {
    pub(super) const UNSAID: u64 = 0;
    pub(super) const ZERO: u64 = 1;
    /// Places that follow each other block by block: one position for all.
    pub(super) const CONTIGUOUS: u64 = 2;
    /// Places anywhere: a position for each.
    pub(super) const SCATTERED: u64 = 3;
}

/// A whole leaf.
pub(super) type States = [BlockState; FANOUT];

/// Shorter contiguous runs than this are cheaper as part of a scattered one.
const MIN_CONTIGUOUS: usize = 3;

fn same_length(states: &[BlockState], same: impl Fn(&BlockState) -> bool) -> usize {
    states.iter().take_while(|state| same(state)).count()
}

/// How many of the first states are places that follow each other block by block.
fn contiguous_length(states: &[BlockState]) -> usize {
    let mut expected = None;
    let follows = |state: &&BlockState| {
        let BlockState::Mapped(place) = state else { return false };
        let pos = place.pos.to_bits();
        let follows = expected.is_none_or(|expected| expected == pos);
        expected = Some(pos.wrapping_add(BLOCK_UNITS));
        follows
    };
    states.iter().take_while(follows).count()
}

/// Kind and length of the run that the states begin with.
fn next_run(states: &[BlockState]) -> (u64, usize) {
    match states[0] {
        BlockState::Unsaid => (run::UNSAID, same_length(states, |s| *s == BlockState::Unsaid)),
        BlockState::Zero => (run::ZERO, same_length(states, |s| *s == BlockState::Zero)),
        BlockState::Mapped(_) => {
            let mut scattered = 0;
            loop {
                let contiguous = contiguous_length(&states[scattered..]);
                match (scattered, contiguous) {
                    (0, MIN_CONTIGUOUS..) => return (run::CONTIGUOUS, contiguous),
                    (_, 0 | MIN_CONTIGUOUS..) => return (run::SCATTERED, scattered),
                    _ => scattered += contiguous,
                }
            }
        }
    }
}

/// Appends an image.
pub(super) fn encode_image(key: &[u8], states: &States, out: &mut Vec<u8>) {
    seal(key, out, |out| put_states(states, out));
}

/// Reads an image.
pub(super) fn decode_image(key: &[u8], value: &[u8]) -> Decoded<Box<States>> {
    unseal(key, value)?.states()
}

/// Appends what a leaf looks like since a `Seq`.
pub(super) fn encode_present(key: &[u8], since: Seq, states: &States, out: &mut Vec<u8>) {
    seal(key, out, |out| {
        put_varint(out, since.0);
        put_states(states, out);
    });
}

/// Reads the same.
pub(super) fn decode_present(key: &[u8], value: &[u8]) -> Decoded<(Seq, Box<States>)> {
    let mut reader = unseal(key, value)?;
    Ok((Seq(reader.varint()?), reader.states()?))
}

/// Appends a bit for each of some leaves.
pub(super) fn encode_bits(key: &[u8], bits: &Bits, out: &mut Vec<u8>) {
    seal(key, out, |out| bits.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes())));
}

/// Reads the same.
pub(super) fn decode_bits(key: &[u8], value: &[u8]) -> Decoded<Bits> {
    let reader = unseal(key, value)?;
    let (words, rest) = reader.rest.as_chunks::<8>();
    let words: [[u8; 8]; size_of::<Bits>() / 8] =
        words.try_into().ok().filter(|_| rest.is_empty()).ok_or(DecodeError("not a bit for each leaf"))?;
    Ok(words.map(u64::from_le_bytes))
}

fn put_states(states: &States, out: &mut Vec<u8>) {
    let mut rest = &states[..];
    let mut previous = 0;
    while !rest.is_empty() {
        let (kind, length) = next_run(rest);
        let (blocks, behind) = rest.split_at(length);
        rest = behind;
        put_varint(out, (length as u64) << 2 | kind);
        for (index, state) in blocks.iter().enumerate() {
            let BlockState::Mapped(place) = state else { break };
            let pos = place.pos.to_bits();
            if kind == run::SCATTERED || index == 0 {
                put_pos(out, previous, pos);
            }
            previous = pos;
            out.extend_from_slice(&place.crc.to_le_bytes());
        }
    }
}

/// How far a volume's log has been indexed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// The last batch whose changes are all in the index.
    pub ordinal: Ordinal,
    /// The last `Seq` of that batch, or of an earlier one if it has none.
    pub seq: Seq,
    /// Where that batch begins: recovery reads it again, to see that the index and the log belong together.
    pub pos: LogPos,
    /// CRC-32C of that batch's header, which the next header repeats.
    pub header_crc: u32,
    /// The store clock's time of that batch, in nanoseconds since 1970.
    pub time_ns: u64,
}

/// Appends a watermark.
pub(super) fn encode_watermark(key: &[u8], mark: &Watermark, out: &mut Vec<u8>) {
    seal(key, out, |out| {
        put_varint(out, mark.ordinal.0);
        put_varint(out, mark.seq.0);
        put_varint(out, mark.pos.to_bits());
        put_varint(out, mark.time_ns);
        out.extend_from_slice(&mark.header_crc.to_le_bytes());
    });
}

/// Reads a watermark.
pub(super) fn decode_watermark(key: &[u8], value: &[u8]) -> Decoded<Watermark> {
    let mut reader = unseal(key, value)?;
    let ordinal = Ordinal(reader.varint()?);
    let seq = Seq(reader.varint()?);
    let pos = LogPos::from_bits(reader.varint()?);
    let time_ns = reader.varint()?;
    let header_crc = reader.crc()?;
    reader.finish()?;
    Ok(Watermark { ordinal, seq, pos, header_crc, time_ns })
}

/// The version of the rows under which so many entries are found.
fn time_version(entries: &[TimeEntry]) -> u8 {
    if entries.len() > 1 { VERSION_SHARED } else { VERSION }
}

/// Appends the row by which a row of times is found by `Seq`: the first one's time, and its ordinal, which is all that there
/// is to know if it is the only one.
pub(super) fn encode_times_by_seq(key: &[u8], entries: &[TimeEntry], out: &mut Vec<u8>) {
    let Some(TimeEntry { time_ns, ordinal, .. }) = entries.first() else { return };
    seal_as(time_version(entries), key, out, |out| {
        put_varint(out, *time_ns);
        put_varint(out, ordinal.0);
    });
}

/// Appends a row of times in the order of the log, at least one: time and `Seq` of the first are in the key.
pub(super) fn encode_times(key: &[u8], entries: &[TimeEntry], out: &mut Vec<u8>) {
    seal_as(time_version(entries), key, out, |out| {
        let mut entries = entries.iter();
        let Some(mut before) = entries.next() else { return };
        put_varint(out, before.ordinal.0);
        for entry in entries {
            put_varint(out, entry.time_ns.wrapping_sub(before.time_ns));
            put_varint(out, entry.seq.0.wrapping_sub(before.seq.0));
            put_varint(out, entry.ordinal.0.wrapping_sub(before.ordinal.0));
            before = entry;
        }
    });
}

/// Reads a row of times; `first` is the time and the `Seq` in its key. Returns the last one for which `wanted` is true of it
/// and of all before it.
pub(super) fn last_time(
    key: &[u8],
    (time_ns, seq): (u64, Seq),
    value: &[u8],
    wanted: impl Fn(&TimeEntry) -> bool,
) -> Decoded<Option<TimeEntry>> {
    let mut reader = unseal_as(VERSION_SHARED, key, value)?;
    let mut entry = TimeEntry { time_ns, seq, ordinal: Ordinal(reader.varint()?) };
    let mut last = None;
    while wanted(&entry) {
        last = Some(entry);
        if reader.is_empty() {
            break;
        }
        for number in [&mut entry.time_ns, &mut entry.seq.0, &mut entry.ordinal.0] {
            let step = reader.varint()?;
            *number = number.checked_add(step).ok_or(DecodeError("time, Seq or ordinal exceeds 64 bits"))?;
        }
    }
    Ok(last)
}

/// Appends a row that is so many numbers.
pub(super) fn encode_numbers(key: &[u8], numbers: &[u64], out: &mut Vec<u8>) {
    seal(key, out, |out| numbers.iter().for_each(|number| put_varint(out, *number)));
}

/// Reads a row that is so many numbers.
pub(super) fn decode_numbers<const N: usize>(key: &[u8], value: &[u8]) -> Decoded<[u64; N]> {
    let mut reader = unseal_as(VERSION_SHARED, key, value)?;
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = reader.varint()?;
    }
    reader.finish()?;
    Ok(numbers)
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
