//! Taking a machine's memory from a volume.

use std::collections::VecDeque;
use std::io::Write;

use cdp_types::{IoBuf, crc32c};

use super::format::Image;
use super::layout::SlotKind;
use super::store::carry_out;
use super::{Completion, Control, PATIENCE, PageStore, Progress, Request};
use crate::stream::{Content, Opaque, StreamWriter};
use crate::{Error, ErrorKind, PAGE_SIZE, Place, ZERO_PAGE};

/// What is read in one piece.
const CHUNK_BYTES: usize = 1 << 20;
/// Pieces that are read ahead.
const CHUNKS: usize = 16;

/// Reads a memory image and makes a migration stream of it.
#[derive(Debug)]
pub struct Restorer<S> {
    store: S,
    image: Image,
}

impl<S: PageStore> Restorer<S> {
    /// Opens the image that the volume holds; nothing of the memory is read yet.
    ///
    /// # Errors
    /// `NoImage`, `Unfinished`, `Damaged`, `Newer`; `Store`, `Cancelled`.
    pub fn open(mut store: S, control: &mut Control<'_>) -> Result<Self, Error> {
        let error = |kind, what: &str| Err(Error::new(kind, Place::Volume(0), what));
        match Image::read(&mut store, control)? {
            None => error(ErrorKind::NoImage, "it is blank"),
            Some(image) if !image.complete => error(ErrorKind::Unfinished, "saving it did not end"),
            Some(image) => Ok(Self { store, image }),
        }
    }

    /// What the image holds.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Writes the machine as a migration stream, each page once, and gives the volume back. `out` is the socket of a
    /// QEMU that was started with `-incoming`.
    ///
    /// # Errors
    /// `Damaged`, `Store`, `Stream`, `Cancelled`. QEMU must not be continued then.
    pub fn stream_to<W: Write>(mut self, out: W, control: &mut Control<'_>) -> Result<(S, Progress), Error> {
        let opaque = Opaque {
            head: self.read_opaque(SlotKind::Head, control)?,
            ram_section: self.image.ram_section,
            commands: self.read_opaque(SlotKind::Commands, control)?,
            tail: self.read_opaque(SlotKind::Tail, control)?,
        };
        let blocks = self.image.blocks();
        let total = self.image.ram_bytes / PAGE_SIZE as u64;
        let mut progress = Progress { total, ..Progress::default() };
        let mut writer = StreamWriter::new(out, &opaque, &blocks)?;
        let mut memory = ReadAhead::new(self.store, &self.image);
        let mut page = ZERO_PAGE;
        while let Some(chunk) = memory.next(control)? {
            for at in (0..chunk.buffer.len()).step_by(PAGE_SIZE) {
                chunk.buffer.copy_out(at, &mut page);
                let content = if page == ZERO_PAGE { Content::Zero } else { Content::Bytes(&page) };
                writer.page(chunk.block, chunk.offset + at as u64, content)?;
                progress.received += 1;
                progress.zero += u64::from(content == Content::Zero);
            }
            (control.progress)(&progress);
            memory.recycle(chunk.buffer);
        }
        writer.finish()?;
        Ok((memory.store, progress))
    }

    fn read_opaque(&mut self, kind: SlotKind, control: &Control<'_>) -> Result<Vec<u8>, Error> {
        let damaged = |place, what: &str| Error::new(ErrorKind::Damaged, Place::Volume(place), what);
        let slot = self.image.layout.find(kind).ok_or_else(|| damaged(0, "a part of it has no slot"))?;
        let (place, length, checksum) = (slot.offset, slot.length as usize, slot.checksum);
        let into = IoBuf::zeroed(length.next_multiple_of(PAGE_SIZE));
        if length > 0 {
            carry_out(&mut self.store, vec![Request::Read { offset: place, into: into.share() }], control)?;
        }
        let mut bytes = into.to_vec();
        bytes.truncate(length);
        if crc32c([&bytes]) == checksum {
            Ok(bytes)
        } else {
            Err(damaged(place, "the checksum of the state of devices"))
        }
    }
}

/// A piece of a RAM block that is to be read, is being read, or waits for its turn.
#[derive(Debug)]
struct Chunk {
    block: usize,
    offset: u64,
    place: u64,
    buffer: IoBuf,
    ready: bool,
}

/// The saved memory of an image, in order, read ahead.
struct ReadAhead<S> {
    store: S,
    /// Block, offset in it, place on the volume, length.
    waiting: std::vec::IntoIter<(usize, u64, u64, usize)>,
    reading: VecDeque<Chunk>,
    /// The number of the first in `reading`; numbers are the requests' tokens.
    oldest: u64,
    spare: Vec<IoBuf>,
    done: Vec<Completion>,
}

impl<S: PageStore> ReadAhead<S> {
    fn new(store: S, image: &Image) -> Self {
        let mut pieces = Vec::new();
        for (slot, block) in image.layout.ram().into_iter().zip(0..).filter(|(slot, _)| slot.saved) {
            for offset in (0..slot.length).step_by(CHUNK_BYTES) {
                let len = (slot.length - offset).min(CHUNK_BYTES as u64) as usize;
                pieces.push((block, offset, slot.offset + offset, len));
            }
        }
        let (reading, spare, done) = (VecDeque::new(), Vec::new(), Vec::new());
        Self { store, waiting: pieces.into_iter(), reading, oldest: 0, spare, done }
    }

    /// The next piece, read; nothing at the end.
    fn next(&mut self, control: &Control<'_>) -> Result<Option<Chunk>, Error> {
        control.check()?;
        self.submit();
        while self.reading.front().is_some_and(|chunk| !chunk.ready) {
            control.check()?;
            self.store.completed(PATIENCE, &mut self.done)?;
            for Completion { token, result } in self.done.drain(..) {
                if let Some(chunk) = self.reading.get_mut((token - self.oldest) as usize) {
                    result.map_err(|error| Error::store(chunk.place, "reading memory", error))?;
                    chunk.ready = true;
                }
            }
        }
        self.oldest += 1;
        Ok(self.reading.pop_front())
    }

    fn submit(&mut self) {
        while self.reading.len() < CHUNKS
            && let Some((block, offset, place, len)) = self.waiting.next()
        {
            let buffer = match self.spare.pop() {
                Some(buffer) if buffer.len() == len => buffer,
                _ => IoBuf::zeroed(len),
            };
            let token = self.oldest + self.reading.len() as u64;
            self.store.submit(token, Request::Read { offset: place, into: buffer.share() });
            self.reading.push_back(Chunk { block, offset, place, buffer, ready: false });
        }
    }

    fn recycle(&mut self, buffer: IoBuf) {
        if buffer.len() == CHUNK_BYTES {
            self.spare.push(buffer);
        }
    }
}
