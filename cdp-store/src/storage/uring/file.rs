//! The blocking calls on a file.

use std::any::Any;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::directory::Directory;
use crate::storage::{AlignedBuf, File};

/// A file of the store. It holds the directory, so the store stays locked while it is open.
#[derive(Debug)]
pub(super) struct StoreFile {
    name: String,
    file: fs::File,
    directory: Arc<Directory>,
}

impl StoreFile {
    pub(super) fn new(name: &str, file: fs::File, directory: Arc<Directory>) -> Self {
        Self { name: name.to_owned(), file, directory }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether it lies in that very directory, and so obeys the same rules.
    pub(super) fn is_in(&self, directory: &Arc<Directory>) -> bool {
        Arc::ptr_eq(&self.directory, directory)
    }
}

impl File for StoreFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut AlignedBuf) -> io::Result<()> {
        self.directory.check_place(offset, into.len())?;
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // Only the end of the file stops direct I/O between two sectors, and it must not be asked again there.
            if !self.directory.is_aligned(done as u64) {
                break;
            }
        }
        into[done..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &AlignedBuf) -> io::Result<()> {
        self.directory.check_place(offset, from.len())?;
        let mut done = 0;
        while done < from.len() {
            let written = match self.file.write_at(&from[done..], offset + done as u64) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            // What was written of an incomplete sector is written once more, with the same bytes.
            let next = self.directory.align_down(done + written);
            if next == done {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done = next;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, len)?)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
