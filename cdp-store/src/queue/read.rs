//! Reading blocks whose places are known: from the log into the request's memory, each block checked.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use cdp_types::{BLOCK_SIZE, Event, IoBuf, IoError, IoErrorKind, RequestId};
use slab::Slab;
use smallvec::SmallVec;

use super::landing::{Landings, WORTH_BYTES};
use crate::format::block_crc;
use crate::index::BlockState;
use crate::segments::{Segment, Segments};
use crate::shared::Shared;
use crate::storage::{Alignment, Lane, Token};

const BLOCK: usize = BLOCK_SIZE as usize;

/// Marks a lane token as one of a [`Reader`].
pub(super) const READ_TOKEN: Token = 1 << 63;

/// After so many bytes what was checked is reported. A disk may end all that it had at once: whoever waits for the first
/// of it goes on, and asks for more, while the rest is being checked.
const CHECKED_AT_ONCE: usize = 32 << 10;
/// The same for the first of what has ended together, since its reader may be asleep; it doubles from there.
const CHECKED_AT_FIRST: usize = BLOCK;

/// Reads that are under way on one lane.
#[derive(Debug)]
pub struct Reader {
    alignment: Alignment,
    landings: Arc<Landings>,
    requests: Slab<Request>,
    parts: Slab<Part>,
    /// Lane operations that have ended, to be checked.
    ended: VecDeque<(Token, io::Result<()>)>,
    /// Bytes of the next portion.
    portion: usize,
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

impl Copy {
    /// Takes over what is wanted of a block, which lies at `at` in the landing.
    fn take(&self, at: usize, block: &[u8]) {
        let from = self.skip.max(at);
        let until = (self.skip + self.to.len()).min(at + block.len());
        if from < until {
            self.to.copy_in(from - self.skip, &block[from - at..until - at]);
        }
    }
}

impl Part {
    /// Where it lies, for people.
    fn at(&self) -> String {
        format!("{}, byte {}", self.segment.file.name(), self.offset)
    }
}

impl Reader {
    /// A reader for lanes of a store.
    #[must_use]
    pub fn new(shared: &Shared) -> Self {
        Self {
            alignment: shared.log.segments.alignment(),
            landings: Arc::clone(&shared.landings),
            requests: Slab::new(),
            parts: Slab::new(),
            ended: VecDeque::new(),
            portion: CHECKED_AT_FIRST,
            scratch: Box::new([0; BLOCK]),
        }
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
        let len = crcs.len() * BLOCK;
        let own = match direct {
            true if len >= WORTH_BYTES && part.is_foreign() => self.landings.lend(len),
            true => None,
            false => Some(IoBuf::zeroed(len)),
        };
        let (landing, copy) = match own {
            Some(own) => (own, Some(Copy { to: part, skip })),
            None => (part, None),
        };
        let target = landing.share();
        let file = Arc::clone(&segment.file);
        let token = self.parts.insert(Part { request, segment, offset, crcs, landing, copy });
        self.requests[request].parts_left += 1;
        lane.read(READ_TOKEN | token as Token, &file, offset, target);
    }

    /// Takes note that one of its lane operations has ended.
    pub fn ended(&mut self, token: Token, result: io::Result<()>) {
        self.ended.push_back((token, result));
    }

    /// Whether there is something to be checked.
    #[must_use]
    pub fn has_unchecked(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Checks a portion of what has ended, and reports the requests that are complete with it.
    pub fn check_some(&mut self, lane: &mut dyn Lane, events: &mut Vec<Event>) {
        let mut checked = 0;
        while checked < self.portion
            && let Some((token, result)) = self.ended.pop_front()
        {
            let token = (token & !READ_TOKEN) as usize;
            let Some(part) = self.parts.try_remove(token) else { continue };
            checked += part.landing.len();
            self.check(lane, part, result, events);
        }
        let done = self.ended.is_empty();
        self.portion = if done { CHECKED_AT_FIRST } else { CHECKED_AT_ONCE.min(2 * self.portion) };
    }

    fn check(&mut self, lane: &mut dyn Lane, part: Part, result: io::Result<()>, events: &mut Vec<Event>) {
        let error = match result {
            Ok(()) if self.pass_on(&part) => None,
            // The guest may have written to its buffer while we checked it: look again in memory of our own.
            Ok(()) if part.copy.is_none() => return self.read_again(lane, part),
            Ok(()) => {
                let at = part.at();
                tracing::error!("{at}: a block does not match its checksum; its reader gets an error");
                Some(IoError::new(IoErrorKind::Corrupt, format!("checksum mismatch at {at}")))
            }
            Err(error) => Some(IoError::new(IoErrorKind::Device, format!("reading {}: {error}", part.at()))),
        };
        if let Some(error) = error {
            self.fail(part.request, error);
        }
        self.end_part(part.request, events);
    }

    fn read_again(&mut self, lane: &mut dyn Lane, part: Part) {
        let landing = IoBuf::zeroed(part.landing.len());
        let copy = Some(Copy { to: part.landing, skip: 0 });
        let (file, offset, target) = (Arc::clone(&part.segment.file), part.offset, landing.share());
        let token = self.parts.insert(Part { landing, copy, ..part });
        lane.read(READ_TOKEN | token as Token, &file, offset, target);
    }

    /// Checks block after block, and passes on what is good; says whether all are.
    fn pass_on(&mut self, part: &Part) -> bool {
        part.crcs.iter().zip((0..).step_by(BLOCK)).all(|(&crc, at)| {
            part.landing.copy_out(at, &mut self.scratch[..]);
            let good = block_crc(&self.scratch[..]) == crc;
            if let Some(copy) = part.copy.as_ref().filter(|_| good) {
                copy.take(at, &self.scratch[..]);
            }
            good
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

fn missing(incarnation: u64) -> IoError {
    IoError::new(IoErrorKind::Corrupt, format!("segment {incarnation} is not in the store"))
}
