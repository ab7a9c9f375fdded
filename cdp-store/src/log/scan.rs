//! Reading a log back: batch by batch along the chain, across segments.

use std::collections::VecDeque;
use std::sync::Arc;

use cdp_types::{Generation, Ordinal};
use serde::{Deserialize, Serialize};

use super::ahead::Ahead;
use crate::error::{Error, Result};
use crate::format::{BatchHeader, BatchPlace, Cut, FormatError, RecordKind, data_start};
use crate::segments::Segment;
use crate::storage::{AlignedBuf, File};

/// Bytes read at a time while headers are walked: many small batches come with one read.
const WINDOW: usize = 256 << 10;
/// What is read first, in bytes; each further read is four times as long, up to a whole window. Of a thousand volumes most logs
/// end right behind what the index has of them.
const FIRST_WINDOW: usize = 16 << 10;
/// Behind a batch of so many bytes or more, the next one's header is read alone: nearly all of a window would be payload.
const LONG_BATCH: u64 = 32 << 10;
/// What is read of it then, in bytes, which is all of it for up to some hundred blocks.
const SHORT_WINDOW: usize = 4096;

/// A batch found in a segment.
#[derive(Debug)]
pub struct BatchAt {
    /// Its header.
    pub header: BatchHeader,
    /// The header's checksum.
    pub crc: u32,
    /// Where its payload starts, in bytes from the start of the file.
    pub payload_at: u64,
    /// The segment.
    pub segment: Arc<Segment>,
}

impl BatchAt {
    /// How much memory it takes, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        let BatchHeader { records, block_crcs, body, .. } = &self.header;
        size_of::<Self>() + size_of_val(&records[..]) + size_of_val(&block_crcs[..]) + body.len()
    }

    /// Where the next batch of this segment starts.
    #[must_use]
    pub fn end(&self) -> u64 {
        let unit = u64::from(self.segment.header.physical_block);
        (self.payload_at + self.header.payload_len()).next_multiple_of(unit)
    }

    /// Whether every block of the payload is there and matches its checksum. What lies past the end of the file would
    /// read as zeroes here, which may be just what the block held, but its readers would get an error.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn payload_is_whole(&self) -> Result<bool> {
        let file = &self.segment.file;
        let len = file.len().map_err(|e| Error::io(format!("asking the length of {}", file.name()), e))?;
        Ok(len >= self.payload_at + self.header.payload_len() && self.first_bad_block()?.is_none())
    }

    /// The first block of the payload that does not match its checksum.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn first_bad_block(&self) -> Result<Option<usize>> {
        const CHUNK_BLOCKS: usize = 256;
        let block = cdp_types::BLOCK_SIZE as usize;
        for (index, crcs) in self.header.block_crcs.chunks(CHUNK_BLOCKS).enumerate() {
            let mut bytes = AlignedBuf::zeroed(crcs.len() * block);
            let at = self.payload_at + (index * CHUNK_BLOCKS * block) as u64;
            read(&self.segment.file, at, &mut bytes)?;
            let bad = |(b, &crc): (&[u8], &u32)| crate::format::block_crc(b) != crc;
            if let Some(found) = bytes.chunks_exact(block).zip(crcs).position(bad) {
                return Ok(Some(index * CHUNK_BLOCKS + found));
            }
        }
        Ok(None)
    }
}

fn read(file: &Arc<dyn File>, offset: u64, into: &mut AlignedBuf) -> Result<()> {
    file.read_at(offset, into).map_err(|e| Error::io(format!("reading {}, byte {offset}", file.name()), e))
}

/// Which of a volume's segments make up its log, in order. They come sorted by incarnation; one that was opened later
/// at the same or an earlier ordinal supersedes the ones before it, because only a cut goes back.
#[must_use]
pub fn live_chain(segments: impl IntoIterator<Item = Arc<Segment>>) -> Vec<Arc<Segment>> {
    let mut chain: Vec<Arc<Segment>> = Vec::new();
    for segment in segments {
        let first = segment.header.first_ordinal;
        while chain.last().is_some_and(|s| s.header.first_ordinal >= first) {
            chain.pop();
        }
        chain.push(segment);
    }
    chain
}

/// Where a log had ended when an opening took it over: what earlier generations have placed behind that is not part
/// of it, whenever it reaches the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fence {
    /// The last batch that counted then.
    pub last: Ordinal,
    /// The opening.
    pub generation: Generation,
}

impl Fence {
    /// Whether a batch, or the first one of a segment, lies behind it.
    #[must_use]
    pub fn excludes(&self, ordinal: Ordinal, generation: Generation) -> bool {
        ordinal > self.last && generation < self.generation
    }
}

/// Walks the batches of a log.
#[derive(Debug)]
pub struct ChainReader<'a> {
    chain: &'a [Arc<Segment>],
    fence: Fence,
    at: usize,
    offset: u64,
    last: Option<(Ordinal, u32)>,
    window: AlignedBuf,
    window_at: Option<(usize, u64)>,
    /// How much is read of it next where many batches may come with one read, in bytes.
    next_window: usize,
    /// In this segment, up to here, the disk does not read everything: no more is asked for than is needed.
    sparing_until: Option<(usize, u64)>,
    /// How long the last batch was, in bytes.
    batch_len: u64,
    /// Those that walk the segments that come next.
    ahead: Option<&'a Ahead<'a>>,
    /// What they have found in this one, from here on.
    found: VecDeque<BatchAt>,
}

impl<'a> ChainReader<'a> {
    /// A reader that starts with the chain's first batch.
    #[must_use]
    pub fn new(chain: &'a [Arc<Segment>]) -> Self {
        let offset = chain.first().map_or(0, |s| data_start(s.header.physical_block));
        Self {
            chain,
            fence: Fence::default(),
            at: 0,
            offset,
            last: None,
            window: AlignedBuf::zeroed(0),
            window_at: None,
            next_window: FIRST_WINDOW,
            sparing_until: None,
            batch_len: 0,
            ahead: None,
            found: VecDeque::new(),
        }
    }

    /// A reader that starts with the batch at `place`, if that segment is on the chain.
    #[must_use]
    pub fn starting_at(chain: &'a [Arc<Segment>], place: BatchPlace) -> Option<Self> {
        let at = chain.iter().position(|s| s.header.incarnation == place.incarnation)?;
        Some(Self { at, offset: place.offset, ..Self::new(chain) })
    }

    /// A reader that starts with the first batch of the segment in which `ordinal` lies, or with the chain's first.
    #[must_use]
    pub fn near(chain: &'a [Arc<Segment>], ordinal: Ordinal) -> Self {
        let at = chain.partition_point(|s| s.header.first_ordinal <= ordinal).saturating_sub(1);
        let offset = chain.get(at).map_or(0, |s| data_start(s.header.physical_block));
        Self { at, offset, ..Self::new(chain) }
    }

    /// The same reader, which ends at a fence.
    #[must_use]
    pub fn fenced(self, fence: Fence) -> Self {
        Self { fence, ..self }
    }

    /// The same reader, which takes what others have found in the segments that it comes to.
    #[must_use]
    pub(super) fn behind(self, ahead: &'a Ahead<'a>) -> Self {
        Self { ahead: Some(ahead), ..self }
    }

    /// Which segment of the chain it is in.
    #[must_use]
    pub(super) fn segment(&self) -> usize {
        self.at
    }

    /// Where the batch that `next` looked for last would be: segment and byte.
    #[must_use]
    pub fn position(&self) -> Option<(&Arc<Segment>, u64)> {
        self.chain.get(self.at).map(|segment| (segment, self.offset))
    }

    /// The next batch of the chain; `None` where none follows that is whole and fits the chain.
    ///
    /// # Errors
    /// If a file cannot be read, or a batch is of a newer format.
    pub fn next(&mut self) -> Result<Option<BatchAt>> {
        // Where the next segment takes over, whatever else lies in this one was cut off: a write of a dead process
        // may have landed there, whole and well chained, long after the cut was made.
        if let (Some(next), Some((last, _))) = (self.chain.get(self.at + 1), self.last)
            && next.header.first_ordinal == last.next()
        {
            (self.at, self.offset) = (self.at + 1, data_start(next.header.physical_block));
            self.found = self.ahead.map(|ahead| ahead.take(self.at)).unwrap_or_default();
        }
        let batch = self.read_here()?;
        if let Some(batch) = &batch {
            self.last = Some((batch.header.ordinal, batch.crc));
            self.batch_len = batch.end() - self.offset;
            self.offset = batch.end();
        }
        Ok(batch)
    }

    fn read_here(&mut self) -> Result<Option<BatchAt>> {
        let Some(segment) = self.chain.get(self.at) else { return Ok(None) };
        let segment = Arc::clone(segment);
        let batch = match self.found.pop_front().filter(|found| found.header.place.offset == self.offset) {
            None => self.read_batch(&segment, self.offset)?,
            found => found,
        };
        let Some(batch) = batch else { return Ok(None) };
        let found = (batch.header.ordinal, batch.header.previous_crc);
        let opening = (segment.header.first_ordinal, segment.header.previous_crc);
        let is_first = self.offset == data_start(segment.header.physical_block);
        let fits = batch.header.volume == segment.header.volume
            && (!is_first || found == opening)
            // The first batch of a walk is taken at its word.
            && self.last.is_none_or(|(last, crc)| found == (last.next(), crc))
            && cut_agrees(&batch.header)
            && !self.fence.excludes(batch.header.ordinal, batch.header.generation);
        Ok(fits.then_some(batch))
    }

    /// The batch at this byte of a segment, if there is a valid one.
    fn read_batch(&mut self, segment: &Arc<Segment>, offset: u64) -> Result<Option<BatchAt>> {
        let unit = u64::from(segment.header.physical_block);
        if offset + unit > segment.header.capacity {
            return Ok(None);
        }
        if !self.is_in_window(offset, unit as usize) {
            self.fill_window(segment, offset, unit as usize)?;
        }
        let mut from = (offset - self.window_at.map_or(offset, |(_, at)| at)) as usize;
        let Ok(len) = BatchHeader::peek_len(&self.window[from..]) else { return Ok(None) };
        let decoded = if len > WINDOW {
            let mut bytes = AlignedBuf::zeroed(len.next_multiple_of(unit as usize));
            read(&segment.file, offset, &mut bytes)?;
            decode(&bytes[..len], segment, offset)?
        } else {
            if !self.is_in_window(offset, len) {
                self.fill_window(segment, offset, len.next_multiple_of(unit as usize))?;
                from = 0;
            }
            decode(&self.window[from..from + len], segment, offset)?
        };
        Ok(decoded.map(|(header, crc)| BatchAt {
            header,
            crc,
            payload_at: offset + len as u64,
            segment: Arc::clone(segment),
        }))
    }

    fn is_in_window(&self, offset: u64, len: usize) -> bool {
        let fits = |from| from <= offset && offset - from + len as u64 <= self.window.len() as u64;
        self.window_at.is_some_and(|(at, from)| at == self.at && fits(from))
    }

    /// Reads on from here, at least so many bytes: what lies behind them may be a block that the disk does not read any more,
    /// which only whoever wants that block is to hear of.
    fn fill_window(&mut self, segment: &Arc<Segment>, offset: u64, needed: usize) -> Result<()> {
        self.window_at = None;
        let needed = needed.min(WINDOW);
        let spares = self.sparing_until.is_some_and(|(at, until)| at == self.at && offset < until);
        let wanted = match self.batch_len {
            _ if spares => needed,
            LONG_BATCH.. => needed.max(SHORT_WINDOW),
            _ => {
                let next = self.next_window;
                self.next_window = WINDOW.min(4 * next);
                needed.max(next)
            }
        };
        let mut outcome = self.read_window(segment, offset, wanted);
        if outcome.is_err() && wanted > needed {
            // A disk may try for seconds before it gives a block up: not once more for each batch before that.
            self.sparing_until = Some((self.at, offset + wanted as u64));
            outcome = self.read_window(segment, offset, needed);
        }
        outcome?;
        self.window_at = Some((self.at, offset));
        Ok(())
    }

    fn read_window(&mut self, segment: &Segment, offset: u64, len: usize) -> Result<()> {
        if self.window.len() != len {
            self.window = AlignedBuf::zeroed(len);
        }
        read(&segment.file, offset, &mut self.window)
    }

    /// The highest "durable" claim of any batch behind the place where the chain ended: in the rest of that segment,
    /// and in the segments after it. Only headers count whose checksum is seeded with their segment's secret.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn claims_beyond(&mut self) -> Result<Ordinal> {
        let mut highest = Ordinal(0);
        if let Some(segment) = self.chain.get(self.at) {
            let held = self.window_at.take().filter(|&(at, from)| {
                at == self.at && (from..from + self.window.len() as u64).contains(&self.offset)
            });
            let held = held.map(|(_, from)| (self.offset - from) as usize);
            highest = highest.max(claims_in(segment, self.offset, &mut self.window, held)?);
        }
        for index in self.at + 1..self.chain.len() {
            let mut reader = ChainReader::new(&self.chain[index..=index]);
            while let Some(batch) = reader.next()? {
                highest = highest.max(batch.header.claimed());
            }
        }
        Ok(highest)
    }
}

/// Whether a batch that is a cut names the batch before it as the last that counts; others say nothing of this.
fn cut_agrees(header: &BatchHeader) -> bool {
    if header.records.first().is_none_or(|r| r.kind != RecordKind::Cut) {
        return true;
    }
    Cut::decode(&header.body)
        .is_ok_and(|cut| cut.last.next() == header.ordinal && cut.last_crc == header.previous_crc)
}

fn decode(bytes: &[u8], segment: &Segment, offset: u64) -> Result<Option<(BatchHeader, u32)>> {
    let place = BatchPlace { incarnation: segment.header.incarnation, offset };
    match BatchHeader::decode(bytes, segment.header.secret, place) {
        Ok((header, _)) if header.store != segment.header.store => Ok(None),
        Ok(decoded) => Ok(Some(decoded)),
        Err(error @ FormatError::Newer { .. }) => {
            Err(Error::format(format!("{}, byte {offset}", segment.file.name()), error))
        }
        Err(_) => Ok(None),
    }
}

/// How far behind a damaged header the next one is looked for: the largest batch, and then some.
const SEARCH_BYTES: u64 = 40 << 20;
/// The search ends early after so many zero bytes: nothing was ever written there. It is more than a batch of several requests
/// takes, and than the 1280 KiB that Linux asks for at once: a batch that never reached the disk leaves as long a gap.
const SEARCH_ZERO_BYTES: usize = 8 * WINDOW;
const _: () = assert!(SEARCH_ZERO_BYTES > (1280 << 10) + WINDOW);

/// The highest claim of any batch from byte `from` of a segment on. If `held`, the window has what lies there already, from
/// its own byte of that number on.
fn claims_in(
    segment: &Arc<Segment>,
    from: u64,
    window: &mut AlignedBuf,
    mut held: Option<usize>,
) -> Result<Ordinal> {
    let unit = segment.header.physical_block as usize;
    let name = segment.file.name();
    let len = segment.file.len().map_err(|e| Error::io(format!("asking the length of {name}"), e))?;
    let end = len.min(segment.header.capacity).min(from.saturating_add(SEARCH_BYTES));
    let mut highest = Ordinal(0);
    let (mut at, mut zeroes) = (from, 0);
    while at < end && zeroes < SEARCH_ZERO_BYTES {
        if held.is_none() {
            if window.len() < WINDOW {
                *window = AlignedBuf::zeroed(WINDOW);
            }
            read(&segment.file, at, window)?;
        }
        let piece = &window[held.take().unwrap_or(0)..];
        if is_zero(piece) {
            zeroes += piece.len();
        } else {
            zeroes = 0;
            for start in (0..piece.len()).step_by(unit) {
                let Ok(len) = BatchHeader::peek_len(&piece[start..]) else { continue };
                let offset = at + start as u64;
                let place = BatchPlace { incarnation: segment.header.incarnation, offset };
                if !BatchHeader::says_it_is_of(&piece[start..], segment.header.store, place) {
                    continue;
                }
                let mut bytes = AlignedBuf::zeroed(len.next_multiple_of(unit));
                read(&segment.file, offset, &mut bytes)?;
                if let Some((header, _)) = decode(&bytes[..len], segment, offset)? {
                    highest = highest.max(header.claimed());
                }
            }
        }
        at += piece.len() as u64;
    }
    Ok(highest)
}

/// Whether there are only zeroes. In pieces without an early end, which the compiler turns into wide instructions: it is what an
/// opening of many volumes does most.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(1024).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
