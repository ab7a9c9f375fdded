//! The log of written pages, which a front end reads while it migrates a guest (vhost-user, "Migration").

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering, fence};

use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

/// Bytes for which the log has one bit.
const LOG_PAGE: u64 = 4096;

/// A bit for each page from guest address 0, shared with the front end, which clears bits as it reads them.
pub(crate) struct DirtyLog {
    mapping: MmapRegion,
    /// Where the log begins in the mapping, in bytes.
    start: usize,
    /// Its length, in bytes.
    len: u64,
}

impl DirtyLog {
    /// Maps `len` bytes of log, `offset` bytes into its file.
    pub(crate) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let end = offset.checked_add(len).ok_or_else(|| invalid("the log's bounds overflow"))?;
        let metadata = file.metadata()?;
        if metadata.is_file() && metadata.len() < end {
            return Err(invalid("the log's file is shorter than the log"));
        }
        // A mapping begins on a page, a log anywhere.
        let start = offset % LOG_PAGE;
        let size = usize::try_from(start + len).map_err(|_| invalid("the log is too long"))?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, offset - start), size).map_err(io::Error::other)?;
        Ok(Self { mapping, start: start as usize, len })
    }

    /// Whether there is a bit for every page below this guest address.
    pub(crate) fn covers(&self, end: u64) -> bool {
        end.div_ceil(LOG_PAGE).div_ceil(8) <= self.len
    }

    /// Sets the bits of all pages of a range. The caller has checked that the log covers them; pages that it does
    /// not cover are passed over, so that nothing outside the log is ever written.
    pub(crate) fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        // The data is in place before the bits are looked at: if a bit is seen set, whoever clears it afterwards
        // copies the page after that, and so copies this data. Most are set already, and looking is cheap.
        fence(Ordering::SeqCst);
        for page in addr / LOG_PAGE..=addr.saturating_add(len - 1) / LOG_PAGE {
            if page / 8 >= self.len {
                return;
            }
            let byte = self.mapping.as_ptr().wrapping_add(self.start + (page / 8) as usize);
            // SAFETY: `start + page / 8 < start + len`, the size of the mapping, which lives as long as `self`; both
            // sides of the shared memory access it atomically.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            let bit = 1 << (page % 8);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    fn log(offset: u64, len: u64, file_len: u64) -> io::Result<(DirtyLog, File)> {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(file_len).unwrap();
        Ok((DirtyLog::map(file.try_clone().unwrap(), offset, len)?, file))
    }

    #[test]
    fn bits_are_set_for_every_page_of_a_range_and_for_no_other() {
        let (log, file) = log(100, 4, 4096).unwrap();
        log.mark(3 * 4096 + 4095, 2); // pages 3 and 4
        log.mark(31 * 4096, 4096 * 100); // page 31, and more than the log has
        log.mark(7 * 4096, 0);
        log.mark(u64::MAX - 1, 5);
        let mut bytes = [0; 6];
        file.read_exact_at(&mut bytes, 99).unwrap();
        assert_eq!(bytes, [0, 0b1_1000, 0, 0, 0x80, 0]);
        assert!(log.covers(32 * 4096) && !log.covers(32 * 4096 + 1));
    }

    #[test]
    fn a_log_that_its_file_cannot_hold_is_refused() {
        assert!(log(0, 4097, 4096).is_err());
        assert!(log(4000, 97, 4096).is_err());
        assert!(log(u64::MAX, 2, 4096).is_err());
    }
}
