//! Reading blocks whose places are known: from the log straight into the request's memory, each block checked.

use std::sync::Arc;

use cdp_types::{BLOCK_SIZE, Event, IoBuf, IoError, IoErrorKind, RequestId};
use slab::Slab;
use smallvec::SmallVec;

use crate::format::block_crc;
use crate::index::BlockState;
use crate::segments::{Segment, Segments};
use crate::storage::{Alignment, Lane, Token};

const BLOCK: usize = BLOCK_SIZE as usize;

/// Marks a lane token as one of a [`Reader`].
pub(super) const READ_TOKEN: Token = 1 << 63;

/// Reads that are under way on one lane.
#[derive(Debug)]
pub struct Reader {
    alignment: Alignment,
    requests: Slab<Request>,
    parts: Slab<Part>,
    scratch: Box<[u8; BLOCK]>,
}

#[derive(Debug)]
struct Request {
    id: RequestId,
    parts_left: usize,
    error: Option<IoError>,
}

/// One contiguous run of blocks in the log.
#[derive(Debug)]
struct Part {
    request: usize,
    segment: Arc<Segment>,
    offset: u64,
    crcs: SmallVec<[u32; 8]>,
    /// Where whole blocks land: the request's memory itself, or memory of our own.
    landing: IoBuf,
    /// Which bytes of `landing` go where, if it is our own.
    copy: Option<Copy>,
}

#[derive(Debug)]
struct Copy {
    to: IoBuf,
    skip: usize,
}

impl Part {
    /// Where it lies, for people.
    fn at(&self) -> String {
        format!("{}, byte {}", self.segment.file.name(), self.offset)
    }
}

impl Reader {
    /// A reader for lanes whose I/O keeps to `alignment`.
    #[must_use]
    pub fn new(alignment: Alignment) -> Self {
        Self { alignment, requests: Slab::new(), parts: Slab::new(), scratch: Box::new([0; BLOCK]) }
    }

    /// Starts a read of `into.len()` bytes from `offset`; `states` are those of the blocks that it touches.
    #[expect(clippy::too_many_arguments, reason = "what a request is, and where it goes")]
    pub fn start(
        &mut self,
        lane: &mut dyn Lane,
        segments: &Segments,
        id: RequestId,
        offset: u64,
        into: &IoBuf,
        states: &[BlockState],
        events: &mut Vec<Event>,
    ) {
        let request = self.requests.insert(Request { id, parts_left: 1, error: None });
        let first_block = offset / BLOCK_SIZE;
        let mut index = 0;
        while index < states.len() {
            let run = run_length(&states[index..]);
            let start = (first_block + index as u64) * BLOCK_SIZE;
            let end = start + run as u64 * BLOCK_SIZE;
            let from = start.max(offset);
            let until = end.min(offset + into.len() as u64);
            let target = (from - offset) as usize..(until - offset) as usize;
            match states[index] {
                BlockState::Unsaid | BlockState::Zero => into.fill_zero(target.start, target.len()),
                BlockState::Mapped(place) => {
                    let crcs = states[index..index + run].iter().filter_map(|s| match s {
                        BlockState::Mapped(place) => Some(place.crc),
                        BlockState::Unsaid | BlockState::Zero => None,
                    });
                    let crcs: SmallVec<[u32; 8]> = crcs.collect();
                    let whole = from == start && until == end;
                    let part = into.slice(target.start, target.len());
                    let skip = (from - start) as usize;
                    match segments.get(place.pos.incarnation()) {
                        Some(segment) => {
                            let offset = place.pos.offset_bytes();
                            self.start_part(lane, request, segment, offset, crcs, part, whole, skip);
                        }
                        None => self.fail(request, missing(place.pos.incarnation())),
                    }
                }
            }
            index += run;
        }
        self.end_part(request, events);
    }

    #[expect(clippy::too_many_arguments, reason = "one call site, which has just worked all of it out")]
    fn start_part(
        &mut self,
        lane: &mut dyn Lane,
        request: usize,
        segment: Arc<Segment>,
        offset: u64,
        crcs: SmallVec<[u32; 8]>,
        part: IoBuf,
        whole: bool,
        skip: usize,
    ) {
        let unit = self.alignment.memory as usize;
        let direct = whole
            && part.segments().iter().all(|s| (s.base as usize).is_multiple_of(unit) && s.len % 512 == 0);
        let (landing, copy) = if direct {
            (part, None)
        } else {
            (IoBuf::zeroed(crcs.len() * BLOCK), Some(Copy { to: part, skip }))
        };
        let target = landing.share();
        let file = Arc::clone(&segment.file);
        let token = self.parts.insert(Part { request, segment, offset, crcs, landing, copy });
        self.requests[request].parts_left += 1;
        lane.read(READ_TOKEN | token as Token, &file, offset, target);
    }

    /// Takes in the end of one of its lane operations.
    pub fn done(
        &mut self,
        lane: &mut dyn Lane,
        token: Token,
        result: std::io::Result<()>,
        events: &mut Vec<Event>,
    ) {
        let token = (token & !READ_TOKEN) as usize;
        let Some(part) = self.parts.try_remove(token) else { return };
        if let Err(error) = result {
            let why = format!("reading {}: {error}", part.at());
            self.fail(part.request, IoError::new(IoErrorKind::Device, why));
        } else if self.is_whole(&part) {
            if let Some(copy) = &part.copy {
                copy_across(&part.landing, copy, &mut self.scratch);
            }
        } else if part.copy.is_none() {
            // The guest may have written to its buffer while we checked it: look again in memory of our own.
            let landing = IoBuf::zeroed(part.landing.len());
            let copy = Some(Copy { to: part.landing, skip: 0 });
            let (file, offset, target) = (Arc::clone(&part.segment.file), part.offset, landing.share());
            let token = self.parts.insert(Part { landing, copy, ..part });
            lane.read(READ_TOKEN | token as Token, &file, offset, target);
            return;
        } else {
            let at = part.at();
            tracing::error!("{at}: a block does not match its checksum; its reader gets an error");
            self.fail(part.request, IoError::new(IoErrorKind::Corrupt, format!("checksum mismatch at {at}")));
        }
        self.end_part(part.request, events);
    }

    fn is_whole(&mut self, part: &Part) -> bool {
        part.crcs.iter().enumerate().all(|(index, &crc)| {
            part.landing.copy_out(index * BLOCK, &mut self.scratch[..]);
            block_crc(&self.scratch[..]) == crc
        })
    }

    fn fail(&mut self, request: usize, error: IoError) {
        self.requests[request].error.get_or_insert(error);
    }

    fn end_part(&mut self, request: usize, events: &mut Vec<Event>) {
        self.requests[request].parts_left -= 1;
        if self.requests[request].parts_left == 0 {
            let request = self.requests.remove(request);
            events.push(Event::Completed { id: request.id, result: request.error.map_or(Ok(()), Err) });
        }
    }
}

/// How many blocks from the start lie contiguously in the log, or are alike in having no place.
fn run_length(states: &[BlockState]) -> usize {
    match states[0] {
        BlockState::Mapped(first) => {
            let follows = |(index, state): (usize, &BlockState)| match state {
                BlockState::Mapped(place) => {
                    place.pos.incarnation() == first.pos.incarnation()
                        && place.pos.offset_bytes() == first.pos.offset_bytes() + index as u64 * BLOCK_SIZE
                }
                BlockState::Unsaid | BlockState::Zero => false,
            };
            states.iter().enumerate().take_while(|&s| follows(s)).count()
        }
        BlockState::Unsaid | BlockState::Zero => {
            states.iter().take_while(|s| !matches!(s, BlockState::Mapped(_))).count()
        }
    }
}

fn copy_across(landing: &IoBuf, copy: &Copy, scratch: &mut [u8; BLOCK]) {
    let mut done = 0;
    while done < copy.to.len() {
        let step = BLOCK.min(copy.to.len() - done);
        landing.copy_out(copy.skip + done, &mut scratch[..step]);
        copy.to.copy_in(done, &scratch[..step]);
        done += step;
    }
}

fn missing(incarnation: u64) -> IoError {
    IoError::new(IoErrorKind::Corrupt, format!("segment {incarnation} is not in the store"))
}
