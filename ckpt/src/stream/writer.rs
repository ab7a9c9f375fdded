//! Writing a stream for `-incoming`.

use std::io::Write;

use super::{Content, Opaque, RAM, RAM_VERSION, RamBlock, flag, section};
use crate::coverage::Coverage;
use crate::{Error, ErrorKind, PAGE_SIZE, Place};

/// What is gathered before it is sent.
const BUFFER_BYTES: usize = 1 << 20;
/// The most that one page adds: entry, name, content.
const ENTRY_BYTES: usize = 8 + 256 + PAGE_SIZE;

/// Writes a stream in which every page comes once, in any order: the memory's list, the commands as they came, one END
/// section with all pages, and the devices as they came.
///
/// QEMU loads it as it would its own: `qemu_loadvm_state_main` (`savevm.c`) takes sections as they come, and
/// `ram_load_precopy` (`ram.c`) takes pages in any order, in sections of any length. Pages of zeroes must come, too:
/// firmware has filled the same places in the QEMU that waits.
#[derive(Debug)]
pub struct StreamWriter<'a, W> {
    out: W,
    opaque: &'a Opaque,
    blocks: &'a [RamBlock],
    came: Coverage,
    buffer: Vec<u8>,
    written: u64,
    block: Option<usize>,
}

impl<'a, W: Write> StreamWriter<'a, W> {
    /// Begins a stream of a machine with these blocks, of which each name has at most 255 bytes.
    ///
    /// # Errors
    /// `Stream` if the other end does not take it, `Malformed` for a name that is too long.
    pub fn new(out: W, opaque: &'a Opaque, blocks: &'a [RamBlock]) -> Result<Self, Error> {
        let came = Coverage::new(blocks);
        let buffer = Vec::with_capacity(BUFFER_BYTES + ENTRY_BYTES);
        let mut writer = Self { out, opaque, blocks, came, buffer, written: 0, block: None };
        writer.send(&opaque.head)?;
        writer.put_section(section::START);
        writer.put_name(RAM)?;
        writer.buffer.extend(0_u32.to_be_bytes());
        writer.buffer.extend(RAM_VERSION.to_be_bytes());
        let total: u64 = blocks.iter().map(|block| block.length).sum();
        writer.put_entry(total | flag::MEM_SIZE);
        for block in blocks {
            writer.put_name(&block.name)?;
            writer.put_entry(block.length);
            if let Some(address) = block.address {
                writer.put_entry(address);
            }
            writer.send_full_buffer()?;
        }
        writer.put_footer();
        writer.buffer.extend(&opaque.commands);
        writer.put_section(section::END);
        Ok(writer)
    }

    /// How many bytes have been sent.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Adds one page.
    ///
    /// # Errors
    /// `Stream` if the other end does not take it; `Incomplete` for a page that has come before, or is none.
    pub fn page(&mut self, block: usize, offset: u64, content: Content<'_>) -> Result<(), Error> {
        if self.came.note(block, offset) != Some(false) {
            let what = format!("page {offset:#x} of block {block} comes twice, or does not exist");
            return Err(Error::new(ErrorKind::Incomplete, Place::Stream(self.written), what));
        }
        let kind = if content == Content::Zero { flag::ZERO } else { flag::PAGE };
        if self.block == Some(block) {
            self.put_entry(offset | kind | flag::CONTINUE);
        } else {
            self.put_entry(offset | kind);
            let blocks = self.blocks;
            self.put_name(&blocks[block].name)?;
            self.block = Some(block);
        }
        match content {
            Content::Zero => self.buffer.push(0),
            Content::Bytes(bytes) => self.buffer.extend_from_slice(bytes),
        }
        self.send_full_buffer()
    }

    /// Ends the stream; says how long it is.
    ///
    /// # Errors
    /// `Incomplete` if pages are missing, `Stream` if the other end does not take it.
    pub fn finish(mut self) -> Result<u64, Error> {
        self.came.finish(self.blocks)?;
        self.put_footer();
        let opaque = self.opaque;
        self.send(&opaque.tail)?;
        self.out.flush().map_err(|error| self.failed(error))?;
        Ok(self.written)
    }

    fn put_section(&mut self, kind: u8) {
        self.buffer.push(kind);
        self.buffer.extend(self.opaque.ram_section.to_be_bytes());
    }

    fn put_footer(&mut self) {
        self.put_entry(flag::EOS);
        self.put_section(section::FOOTER);
    }

    fn put_entry(&mut self, entry: u64) {
        self.buffer.extend(entry.to_be_bytes());
    }

    fn put_name(&mut self, name: &str) -> Result<(), Error> {
        let Ok(length) = u8::try_from(name.len()) else {
            let what = format!("a RAM block's name of {} bytes", name.len());
            return Err(Error::new(ErrorKind::Malformed, Place::Stream(self.written), what));
        };
        self.buffer.push(length);
        self.buffer.extend(name.as_bytes());
        Ok(())
    }

    fn send_full_buffer(&mut self) -> Result<(), Error> {
        if self.buffer.len() < BUFFER_BYTES { Ok(()) } else { self.send(&[]) }
    }

    /// Sends what has been gathered, and then these bytes.
    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        for part in [&self.buffer[..], bytes] {
            self.out.write_all(part).map_err(|error| self.failed(error))?;
            self.written += part.len() as u64;
        }
        self.buffer.clear();
        Ok(())
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::new(ErrorKind::Stream, Place::Stream(self.written), "sending").because(error)
    }
}
