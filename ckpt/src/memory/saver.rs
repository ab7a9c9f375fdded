//! Putting a machine's memory on a volume.

use std::io::Read;

use cdp_types::{ByteRange, IoBuf, crc32c};

use super::format::{DATA_START, Image, MachineFacts};
use super::layout::{Layout, SlotKind};
use super::pipeline::{Pipeline, pieces};
use super::store::carry_out;
use super::{Control, PageStore, Progress, Request};
use crate::coverage::Coverage;
use crate::stream::{Content, Opaque, Page, RamBlock, StreamReader};
use crate::{Error, ErrorKind, PAGE_SIZE, Place, ZERO_PAGE};

/// Writes a memory image over the one that the volume holds, or onto a blank volume: only what differs.
///
/// After an error the volume holds an unfinished image, and requests may still be in flight: drop the saver, which
/// drops the store.
#[derive(Debug)]
pub struct Saver<S> {
    pipeline: Pipeline<S>,
    image: Image,
    blocks: Vec<RamBlock>,
    /// Where each block begins on the volume.
    places: Vec<u64>,
    came: Coverage,
    progress: Progress,
}

impl<S: PageStore> Saver<S> {
    /// Begins an image of a machine with these RAM blocks: steps 1 and 2 of the [module's](super) order.
    ///
    /// # Errors
    /// `NoSpace` if the volume is too small (nothing has been written then), `NoImage` if it holds something else,
    /// `Damaged` or `Newer` if it holds an image that cannot be built upon.
    pub fn begin(
        mut store: S,
        blocks: &[RamBlock],
        facts: MachineFacts,
        control: &mut Control<'_>,
    ) -> Result<Self, Error> {
        let previous = Image::read(&mut store, control)?;
        let finished = previous.as_ref().is_none_or(|image| image.complete);
        let before = previous.map_or_else(Layout::default, |image| image.layout);
        let mut layout = before.clone();
        let mut stale = layout.place_ram(blocks)?;
        if layout.end() > store.capacity() {
            // What has gone keeps its slot for when it comes back only where there is room for all.
            layout = before;
            stale = layout.give_up_others(blocks);
            stale.extend(layout.place_ram(blocks)?);
        }
        if !finished {
            stale.extend(layout.unused());
        }
        check_capacity(&store, &layout)?;
        let ram_bytes = blocks.iter().map(|block| block.length).sum();
        let places = layout.ram().iter().map(|slot| slot.offset).collect();
        let image = Image { complete: false, facts, ram_bytes, ram_section: 0, layout };
        write_header(&mut store, &image, control)?;
        carry_out(&mut store, stale.into_iter().map(Request::Zero).collect(), control)?;
        let progress = Progress { total: ram_bytes / PAGE_SIZE as u64, ..Progress::default() };
        let (blocks, came) = (blocks.to_vec(), Coverage::new(blocks));
        Ok(Self { pipeline: Pipeline::new(store), image, blocks, places, came, progress })
    }

    /// Takes one page, in any order; one that comes again replaces the one before.
    ///
    /// # Errors
    /// `Incomplete` for a page that does not exist; `Store`, `NoSpace`, `Cancelled`.
    pub fn page(&mut self, page: &Page<'_>, control: &mut Control<'_>) -> Result<(), Error> {
        let Some(repeated) = self.came.note(page.block, page.offset) else {
            let what = format!("no page {:#x} in RAM block {}", page.offset, page.block);
            return Err(Error::new(ErrorKind::Incomplete, Place::Nowhere, what));
        };
        let content = match page.content {
            Content::Bytes(bytes) if *bytes == ZERO_PAGE => Content::Zero,
            content => content,
        };
        self.progress.received += 1;
        self.progress.zero += u64::from(content == Content::Zero);
        let offset = self.places[page.block] + page.offset;
        if self.pipeline.put(offset, content, repeated, &mut self.progress, control)? {
            (control.progress)(&self.progress);
        }
        Ok(())
    }

    /// Ends the image, once all pages have come, and gives the volume back: steps 3 and 4.
    ///
    /// # Errors
    /// `Incomplete` if pages are missing; `NoSpace`, `Store`, `Cancelled`.
    ///
    /// # Durability
    /// The image survives a power cut once this returns.
    pub fn finish(mut self, opaque: &Opaque, control: &mut Control<'_>) -> Result<(S, Progress), Error> {
        let saved = self.came.finish(&self.blocks)?;
        self.pipeline.drain(&mut self.progress, control)?;
        let mut stale = Vec::new();
        for ((saved, block), order) in saved.iter().zip(&self.blocks).zip(0..) {
            self.image.layout.set_saved(order, *saved);
            if !saved {
                stale.push(ByteRange::new(self.places[order as usize], block.length));
            }
        }
        let parts = [
            (SlotKind::Head, &opaque.head),
            (SlotKind::Commands, &opaque.commands),
            (SlotKind::Tail, &opaque.tail),
        ];
        for (kind, bytes) in parts {
            let slot = self.image.layout.place(kind, "", bytes.len() as u64, &mut stale)?;
            (slot.saved, slot.checksum) = (true, crc32c([bytes]));
        }
        check_capacity(&self.pipeline.store, &self.image.layout)?;
        stale.retain(|range| range.len > 0);
        carry_out(&mut self.pipeline.store, stale.into_iter().map(Request::Zero).collect(), control)?;
        for (kind, bytes) in parts {
            self.put_opaque(kind, bytes, control)?;
        }
        self.pipeline.drain(&mut self.progress, control)?;
        carry_out(&mut self.pipeline.store, vec![Request::Flush], control)?;
        (self.image.complete, self.image.ram_section) = (true, opaque.ram_section);
        write_header(&mut self.pipeline.store, &self.image, control)?;
        (control.progress)(&self.progress);
        Ok((self.pipeline.store, self.progress))
    }

    fn put_opaque(&mut self, kind: SlotKind, bytes: &[u8], control: &Control<'_>) -> Result<(), Error> {
        let place = self.image.layout.find(kind).map_or(0, |slot| slot.offset);
        // They are not pages of the machine, and not counted as such.
        let mut counted = Progress::default();
        for (chunk, at) in bytes.chunks(PAGE_SIZE).zip((0..).step_by(PAGE_SIZE)) {
            let mut page = ZERO_PAGE;
            page[..chunk.len()].copy_from_slice(chunk);
            self.pipeline.put(place + at, Content::Bytes(&page), false, &mut counted, control)?;
        }
        self.pipeline.drain(&mut counted, control)?;
        self.progress.stored_bytes += counted.stored_bytes;
        Ok(())
    }
}

/// Saves a whole stream whose list of blocks has been read, and gives the volume back.
///
/// # Errors
/// Those of [`StreamReader`] and [`Saver`].
///
/// # Durability
/// The image survives a power cut once this returns.
pub fn save_stream<R: Read, S: PageStore>(
    mut reader: StreamReader<R>,
    store: S,
    facts: MachineFacts,
    control: &mut Control<'_>,
) -> Result<(S, Progress), Error> {
    let mut saver = Saver::begin(store, reader.blocks(), facts, control)?;
    while let Some(page) = reader.next_page()? {
        saver.page(&page, control)?;
    }
    saver.finish(&reader.into_opaque()?, control)
}

fn check_capacity<S: PageStore>(store: &S, layout: &Layout) -> Result<(), Error> {
    let (needed, capacity) = (layout.end(), store.capacity());
    if needed <= capacity {
        return Ok(());
    }
    let what = format!("the image needs a volume of {needed} bytes, this one has {capacity}");
    Err(Error::new(ErrorKind::NoSpace, Place::Volume(capacity), what))
}

/// Writes the header; it and all that was written before is durable afterwards.
fn write_header<S: PageStore>(store: &mut S, image: &Image, control: &Control<'_>) -> Result<(), Error> {
    let header = IoBuf::from_bytes(&image.encode()?);
    let write = |(offset, at, len)| Request::Write { offset, from: header.slice(at, len) };
    carry_out(store, pieces(0, 0, header.len()).map(write).collect(), control)?;
    carry_out(store, vec![Request::Flush], control)
}

impl Image {
    /// Reads the header of a volume's image; nothing if the volume begins with zeroes.
    pub(super) fn read<S: PageStore>(store: &mut S, control: &Control<'_>) -> Result<Option<Self>, Error> {
        let capacity = store.capacity();
        if capacity < DATA_START {
            let what = format!("a volume of {capacity} bytes holds no image");
            return Err(Error::new(ErrorKind::NoSpace, Place::Volume(0), what));
        }
        let mut read = |len: usize| {
            let into = IoBuf::zeroed(len);
            carry_out(store, vec![Request::Read { offset: 0, into: into.share() }], control)?;
            Ok::<_, Error>(into.to_vec())
        };
        let first = read(PAGE_SIZE)?;
        if first == ZERO_PAGE {
            return Ok(None);
        }
        let rest = Self::header_bytes(&first)?;
        let image = Self::decode(&read(rest.next_multiple_of(PAGE_SIZE))?)?;
        let end = image.layout.end();
        if end > capacity {
            let what = format!("it reaches to byte {end}, behind the volume's end");
            return Err(Error::new(ErrorKind::Damaged, Place::Volume(capacity), what));
        }
        Ok(Some(image))
    }
}
