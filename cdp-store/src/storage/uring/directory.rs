//! A directory that holds one store.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstatvfs, fsync, mkdirat, openat, statat, unlinkat};
use rustix::io::Errno;

use super::alignment;
use super::file::StoreFile;
use super::lane::UringLane;
use super::lock::{self, StoreLock};
use crate::storage::{Alignment, File, Lane, Storage};

/// How long opening waits, unless told otherwise, for the last writes of an owner that was killed.
pub const OUTWAIT: Duration = Duration::from_secs(5);

/// [`Storage`] on a directory of a local file system.
///
/// It stays locked until the last file and lane of it is gone too. Where the file system has no direct I/O, files
/// go through the page cache, with a warning: the guarantees are the same, the speed is not.
#[derive(Clone)]
pub struct DirectoryStorage {
    directory: Arc<Directory>,
}

impl DirectoryStorage {
    /// Opens a directory that exists, as its only user, waiting at most [`OUTWAIT`] for what a killed owner has in
    /// flight.
    ///
    /// # Errors
    /// As [`DirectoryStorage::open_within`].
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_within(path, OUTWAIT)
    }

    /// Opens a directory that exists, as its only user. If the last owner was killed, this waits until none of its
    /// writes is in flight, at most for `outwait`.
    ///
    /// # Errors
    /// `WouldBlock`, with a message that names the store and its owner, if another process has it; `Unsupported` if
    /// direct I/O there demands more than 4096 bytes of alignment; what the operating system says.
    pub fn open_within(path: &Path, outwait: Duration) -> io::Result<Self> {
        let fd = lock::open_directory(path)?;
        let lock = StoreLock::exclusive(fd.as_fd(), path, outwait)?;
        Self::assemble(path, fd, Some(lock), true)
    }

    /// Opens a directory for inspection, beside other readers. It creates and changes nothing, so a copy on a
    /// read-only file system will do; without a lock file nobody is kept out.
    ///
    /// # Errors
    /// `WouldBlock` if a process has it open for writing, or, after [`OUTWAIT`], if one that was killed still has
    /// writes in flight; the others of [`DirectoryStorage::open_within`].
    pub fn open_read_only(path: &Path) -> io::Result<Self> {
        let fd = lock::open_directory(path)?;
        let lock = StoreLock::shared(fd.as_fd(), path, OUTWAIT)?;
        Self::assemble(path, fd, lock, false)
    }

    fn assemble(path: &Path, fd: OwnedFd, lock: Option<StoreLock>, writable: bool) -> io::Result<Self> {
        let probed = lock.as_ref().map_or(fd.as_fd(), StoreLock::as_fd);
        let alignment = alignment::probe(probed)?;
        let direct = lock.is_some() && has_direct_io(fd.as_fd())?;
        if writable && !direct {
            tracing::warn!(store = %path.display(), "no direct I/O on this file system: using the page cache");
        }
        let directory = Directory { path: path.to_owned(), fd, alignment, direct, writable, lock };
        Ok(Self { directory: Arc::new(directory) })
    }
}

/// Tried on a file that exists: with `O_CREAT`, some kernels would refuse only after creating it.
fn has_direct_io(directory: BorrowedFd<'_>) -> io::Result<bool> {
    match openat(directory, lock::NAME, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Debug for DirectoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirectoryStorage({})", self.directory.path.display())
    }
}

impl Storage for DirectoryStorage {
    fn alignment(&self) -> Alignment {
        self.directory.alignment
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.directory.check_writable()?;
        self.open_file(name, OFlags::CREATE | OFlags::EXCL)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.open_file(name, OFlags::empty())
    }

    fn create_directory(&self, name: &str) -> io::Result<()> {
        self.directory.check_writable()?;
        let fd = self.directory.fd.as_fd();
        match mkdirat(fd, checked(name)?, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let kind = FileType::from_raw_mode(statat(fd, name, AtFlags::empty())?.st_mode);
                if kind == FileType::Directory { Ok(()) } else { Err(Errno::EXIST.into()) }
            }
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let fd = match self.directory.open_sub(directory) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let facts = statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(facts.st_mode)
                }
                known => known,
            };
            // A name that is not UTF-8 is not one of ours.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if kind == FileType::RegularFile && !(directory.is_empty() && name == lock::NAME) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.directory.check_writable()?;
        Ok(unlinkat(&self.directory.fd, checked(name)?, AtFlags::empty())?)
    }

    fn sync_directory(&self, directory: &str) -> io::Result<()> {
        self.directory.check_writable()?;
        Ok(fsync(self.directory.open_sub(directory)?)?)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let facts = fstatvfs(&self.directory.fd)?;
        Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
    }

    fn lane(&self) -> io::Result<Box<dyn Lane>> {
        Ok(Box::new(UringLane::new(Arc::clone(&self.directory))?))
    }
}

impl DirectoryStorage {
    fn open_file(&self, name: &str, how: OFlags) -> io::Result<Arc<dyn File>> {
        let directory = &self.directory;
        let access = if directory.writable { OFlags::RDWR } else { OFlags::RDONLY };
        let cache = if directory.direct { OFlags::DIRECT } else { OFlags::empty() };
        let flags = how | access | cache | OFlags::CLOEXEC;
        let fd = openat(&directory.fd, checked(name)?, flags, Mode::from_raw_mode(0o644))?;
        Ok(Arc::new(StoreFile::new(name, fs::File::from(fd), Arc::clone(directory))))
    }
}

/// What files and lanes share with the storage that they came from.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    fd: OwnedFd,
    alignment: Alignment,
    direct: bool,
    writable: bool,
    lock: Option<StoreLock>,
}

impl Directory {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(StoreLock::as_fd)
    }

    /// Whether the kernel can read straight into a piece of memory.
    pub(super) fn takes_memory(&self, base: *const u8, len: usize) -> bool {
        let Alignment { memory, offset, .. } = self.alignment;
        !self.direct || (base.addr().is_multiple_of(memory as usize) && len.is_multiple_of(offset as usize))
    }

    pub(super) fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(u64::from(self.alignment.offset))
    }

    pub(super) fn align_down(&self, len: usize) -> usize {
        len - len % self.alignment.offset as usize
    }

    pub(super) fn check_place(&self, offset: u64, len: usize) -> io::Result<()> {
        self.alignment.check_place(offset, len)
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(Errno::ROFS.into()) }
    }

    fn open_sub(&self, name: &str) -> io::Result<OwnedFd> {
        let path = if name.is_empty() { "." } else { checked(name)? };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(&self.fd, path, flags, Mode::empty())?)
    }
}

/// A name that stays inside the directory.
fn checked(name: &str) -> io::Result<&str> {
    crate::storage::check_name(name).map(|()| name)
}
