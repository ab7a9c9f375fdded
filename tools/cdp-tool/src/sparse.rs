//! Files with holes, read and written so that the holes stay.

use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cdpd::api::{ApiError, ErrorKind};
use cdpd::frames::{ContentStart, Frame};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The unit in which zeroes are looked for: a block of a volume.
const BLOCK: u64 = cdp_types::BLOCK_SIZE;
/// Bytes that are read at once.
const CHUNK: u64 = 512 << 10;

/// Whether all these bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    // In pieces whose test has no branch, so that it becomes vector code.
    bytes.chunks(128).all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}

/// The runs of blocks that are not zero, as ranges of `bytes`, which begin on a block.
fn runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, block) in (0..).step_by(BLOCK as usize).zip(bytes.chunks(BLOCK as usize)) {
        if is_zero(block) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += block.len(),
            _ => runs.push(at..at + block.len()),
        }
    }
    runs
}

/// A raw image that is read as a content stream.
pub(crate) struct Source {
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    len: u64,
    /// Bytes of the volume that it becomes.
    size_bytes: u64,
    block_size: u64,
    begun: bool,
    /// Up to here the file has been read.
    position: u64,
    /// Up to here it is known to have no hole.
    data_end: u64,
    chunk: Vec<u8>,
    chunk_at: u64,
    /// What of the chunk is still to be sent, last first.
    rest: Vec<Range<usize>>,
}

impl Source {
    /// A source over `file`, for a volume of `size_bytes` with blocks of `block_size`; both must be at least
    /// the file's.
    pub(crate) fn new(path: &Path, mut file: File, size_bytes: u64, block_size: u32) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            len: file.seek(io::SeekFrom::End(0))?,
            file,
            size_bytes,
            block_size: u64::from(block_size),
            begun: false,
            position: 0,
            data_end: 0,
            chunk: Vec::new(),
            chunk_at: 0,
            rest: Vec::new(),
        })
    }

    /// The next frame.
    pub(crate) fn next(&mut self) -> Result<Frame, ApiError> {
        self.next_frame().map_err(|error| {
            ApiError::new(ErrorKind::Io, format!("cannot read {}: {error}", self.path.display()))
        })
    }

    fn next_frame(&mut self) -> io::Result<Frame> {
        if !self.begun {
            self.begun = true;
            return Ok(Frame::Start(ContentStart { size_bytes: self.size_bytes, at: None }));
        }
        loop {
            if let Some(run) = self.rest.pop() {
                let offset = self.chunk_at + run.start as u64;
                let mut bytes = self.chunk[run].to_vec();
                // The file may end within a block of the volume.
                let whole = (bytes.len() as u64).next_multiple_of(self.block_size);
                bytes.resize(whole as usize, 0);
                return Ok(Frame::Data { offset, bytes });
            }
            if self.position >= self.data_end && !self.find_data()? {
                return Ok(Frame::End);
            }
            self.read_chunk()?;
        }
    }

    /// Skips a hole; false if nothing comes after it.
    fn find_data(&mut self) -> io::Result<bool> {
        if self.position >= self.len {
            return Ok(false);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(self.position)) {
            Ok(data) => {
                let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data))?;
                self.position = self.position.max(data / BLOCK * BLOCK);
                self.data_end = hole.next_multiple_of(BLOCK).min(self.len);
                Ok(self.position < self.len)
            }
            Err(Errno::NXIO) => Ok(false),
            // Block devices, and file systems that do not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.data_end = self.len;
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn read_chunk(&mut self) -> io::Result<()> {
        let len = (self.data_end - self.position).min(CHUNK);
        self.chunk.resize(len as usize, 0);
        self.file.read_exact_at(&mut self.chunk, self.position).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("it has become shorter"),
            _ => error,
        })?;
        self.chunk_at = self.position;
        self.position += len;
        self.rest = runs(&self.chunk);
        self.rest.reverse();
        Ok(())
    }
}

/// A new file that a content stream is written to.
pub(crate) struct Target<'a> {
    file: &'a File,
    /// Bytes written; the rest is holes.
    pub(crate) data_bytes: u64,
}

impl<'a> Target<'a> {
    /// A target over an empty file, which gets its whole size at once.
    pub(crate) fn new(file: &'a File, size_bytes: u64) -> io::Result<Self> {
        file.set_len(size_bytes)?;
        Ok(Self { file, data_bytes: 0 })
    }

    /// Writes what is not zero of `bytes` at `offset`.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for run in runs(bytes) {
            self.data_bytes += run.len() as u64;
            self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn frames(file: File, block_size: u32) -> Vec<Frame> {
        let len = file.metadata().unwrap().len();
        let size = len.next_multiple_of(u64::from(block_size));
        let mut source = Source::new(Path::new("x"), file, size, block_size).unwrap();
        let mut frames = Vec::new();
        while frames.last() != Some(&Frame::End) {
            frames.push(source.next().unwrap());
        }
        frames
    }

    fn content(frames: &[Frame]) -> Vec<u8> {
        let mut content = Vec::new();
        for frame in frames {
            match frame {
                Frame::Start(start) => content.resize(start.size_bytes as usize, 0),
                Frame::Data { offset, bytes } => {
                    content[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
                }
                Frame::End | Frame::Error(_) => {}
            }
        }
        content
    }

    #[test]
    fn holes_and_zeroes_are_left_out_and_the_rest_is_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(&[1; 100], 5000).unwrap();
        file.write_all_at(&[0; 8192], 1 << 20).unwrap();
        file.write_all_at(&[2; 4096], (1 << 20) + 8192).unwrap();
        file.write_all_at(&[3; 600], (10 << 20) - 600).unwrap();
        let mut expected = vec![0; 10 << 20];
        file.read_exact_at(&mut expected, 0).unwrap();
        let frames = frames(file, 512);
        assert_eq!(content(&frames), expected);
        let sent: usize =
            frames.iter().map(|f| if let Frame::Data { bytes, .. } = f { bytes.len() } else { 0 }).sum();
        assert_eq!(sent, 3 * 4096);
    }

    #[test]
    fn a_file_that_ends_within_a_block_is_filled_up_with_zeroes() {
        for (len, block) in [(1, 512), (511, 512), (4097, 512), (4097, 4096), (0, 512)] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![7; len], 0).unwrap();
            let mut expected = vec![7; len];
            expected.resize(len.next_multiple_of(block as usize), 0);
            assert_eq!(content(&frames(file, block)), expected, "{len} bytes");
        }
    }

    #[test]
    fn long_data_comes_in_several_frames() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 * CHUNK + 12_288).map(|n| (n % 251) as u8 + 1).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let frames = frames(file, 512);
        assert_eq!(frames.len(), 2 + 4);
        assert_eq!(content(&frames), bytes);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 2 << 20], 0).unwrap();
        let mut source =
            Source::new(Path::new("shrinking"), file.try_clone().unwrap(), 2 << 20, 512).unwrap();
        source.next().unwrap();
        source.next().unwrap();
        file.set_len(CHUNK + 1).unwrap();
        let refusal = std::iter::repeat_with(|| source.next()).take(4).find_map(Result::err);
        let refusal = refusal.unwrap().to_string();
        assert!(refusal.contains("shrinking") && refusal.contains("shorter"), "{refusal}");
    }

    #[test]
    fn zeroes_make_no_blocks_on_the_disk() {
        let file = tempfile::tempfile().unwrap();
        let mut target = Target::new(&file, 64 << 20).unwrap();
        target.write(0, &vec![0; 1 << 20]).unwrap();
        let mut mixed = vec![0; 1 << 20];
        mixed[70_000] = 1;
        target.write(32 << 20, &mixed).unwrap();
        target.write((64 << 20) - 512, &[9; 512]).unwrap();
        assert_eq!(target.data_bytes, 4096 + 512);
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 64 << 20);
        assert!(metadata.blocks() * 512 <= 1 << 20, "{} blocks", metadata.blocks());
    }
}
