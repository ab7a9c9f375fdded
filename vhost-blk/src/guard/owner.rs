//! Whose memory it is: finding the process that maps it, and touching a page in that mapping.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vm_memory::mmap::MmapRegion;

use super::touched::Touched;
use super::{GuardRefusal, locked};

/// Bytes in a page, the smallest that any protection has. Touching more often than the memory's real page size asks
/// for does no harm.
pub(crate) const PAGE: u64 = 4096;

/// A region of guest memory as the guard sees it. It belongs to one mapping of ours, and a region that is shared
/// again begins untouched.
pub(crate) struct RegionGuard {
    /// Where the front end has mapped it.
    user: u64,
    len: u64,
    /// Where it begins in its file.
    offset: u64,
    /// Device and inode of its file; none if that is no regular file.
    file: Option<(u64, u64)>,
    touched: Touched,
    owner: Mutex<Option<Arc<Owner>>>,
}

impl RegionGuard {
    /// A region of `len` bytes, of which `file` is the identity of the file if that is a regular one.
    pub(crate) fn new(user: u64, len: u64, offset: u64, file: Option<(u64, u64)>) -> Self {
        // One more than fits, because nothing says that the address is a page's.
        let touched = Touched::new(len / PAGE + 2);
        Self { user, len, offset, file, touched, owner: Mutex::default() }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn user(&self) -> u64 {
        self.user
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    pub(crate) fn touched(&self) -> &Touched {
        &self.touched
    }

    pub(crate) fn owner(&self) -> Option<Arc<Owner>> {
        locked(&self.owner).clone()
    }

    pub(crate) fn set_owner(&self, owner: &Arc<Owner>) {
        *locked(&self.owner) = Some(Arc::clone(owner));
    }

    /// The pages of `len` bytes from `inside` that are not touched yet, by any of these bytes: the page, and which of
    /// the bytes is the first in it. All bytes must be in the region.
    pub(crate) fn untouched(&self, inside: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.user + inside;
        let end = if len == 0 { first / PAGE } else { (first + len).div_ceil(PAGE) };
        let pages = first / PAGE..end;
        pages
            .map(move |page| (page - self.user / PAGE, (page * PAGE).max(first) - self.user))
            .filter(|&(page, _)| !self.touched.has(page))
    }
}

/// A page to touch, by one byte that belongs to the device.
pub(crate) struct Page {
    pub(crate) region: Arc<RegionGuard>,
    /// Our mapping of the region.
    pub(crate) mapping: Arc<MmapRegion>,
    /// Its number in the region's bitmap.
    pub(crate) index: u64,
    /// The byte in the region.
    pub(crate) inside: u64,
}

/// How a touch ended.
pub(crate) enum Touch {
    /// The page is the device's to write, until the window closes.
    Done,
    /// The process has ended, and with it everything that could be damaged.
    Gone,
    Failed(io::Error),
}

/// The process whose mapping the guest runs in.
pub(crate) struct Owner {
    pid: Pid,
    /// Readable once the process has ended: its number may be somebody else's then.
    pidfd: OwnedFd,
}

impl Owner {
    /// Finds a process that maps all these regions where they are said to be: first the one whose they were last and the
    /// socket's peer, then whoever runs on this machine.
    pub(crate) fn find(
        regions: &[Arc<RegionGuard>],
        last_owner: i32,
        peer: i32,
    ) -> Result<Arc<Self>, GuardRefusal> {
        let likely = [last_owner, peer];
        if regions.iter().any(|region| region.file.is_none()) {
            return Err(GuardRefusal::NoFile);
        }
        let mut refusal = None;
        for pid in likely.into_iter().chain(all_processes()) {
            let Some(pid) = Pid::from_raw(pid) else { continue };
            let is_likely = likely.contains(&pid.as_raw_nonzero().get());
            match Self::open(pid, regions, is_likely) {
                Ok(Some(owner)) => return Ok(Arc::new(owner)),
                Ok(None) => {}
                Err(error) => {
                    refusal.get_or_insert(error);
                }
            }
        }
        Err(refusal.unwrap_or(GuardRefusal::NoOwner { peer }))
    }

    /// The process, if it maps all the regions. One that may not be looked at is somebody else's, unless it is likely.
    fn open(pid: Pid, regions: &[Arc<RegionGuard>], is_likely: bool) -> Result<Option<Self>, GuardRefusal> {
        let raw = pid.as_raw_nonzero().get();
        // First the descriptor, then the look: what is seen belongs to the process that is held.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(None) };
        let maps = match std::fs::read(format!("/proc/{raw}/maps")) {
            Ok(maps) => maps,
            Err(error) if is_likely && error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(GuardRefusal::NoAccess { pid: raw });
            }
            Err(_) => return Ok(None),
        };
        // A file's name, at the end of its line, may be any bytes.
        let maps = String::from_utf8_lossy(&maps);
        let lines: Vec<Line> = maps.lines().filter_map(Line::parse).collect();
        for region in regions {
            match maps_region(&lines, region) {
                Mapped::Shared => {}
                Mapped::Private => return Err(GuardRefusal::Private { pid: raw }),
                Mapped::No => return Ok(None),
            }
        }
        let owner = Self { pid, pidfd };
        let probe = regions.first().map_or(Ok(()), |region| owner.probe(region.user));
        match probe {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                Err(GuardRefusal::NoAccess { pid: raw })
            }
            Err(_) if owner.gone() => Ok(None),
            // Anything else is a page that cannot be read; that the process can be is known.
            _ => Ok(Some(owner)),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether the process has ended.
    pub(crate) fn gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// Reads one byte: the check is the same as for a write.
    fn probe(&self, address: u64) -> io::Result<()> {
        let mut byte = 0u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 };
        // SAFETY: `local` is one byte of ours that outlives the call; `remote` is not ours, and the kernel checks it.
        let read = unsafe { libc::process_vm_readv(self.pid(), &local, 1, &remote, 1, 0) };
        if read == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Writes the page's byte over itself through the owner's mapping, so that a write protection of that mapping is
    /// met and lifted. Blocks until it is, for as long as that takes; only the end of this process interrupts it.
    ///
    /// The kernel takes the byte out of our mapping only after the owner's page may be written, so even a touch that
    /// comes back late does not bring an old value with it.
    pub(crate) fn touch(&self, page: &Page) -> Touch {
        let local = page.mapping.as_ptr().wrapping_add(page.inside as usize);
        let local = libc::iovec { iov_base: local.cast(), iov_len: 1 };
        let remote = page.region.user + page.inside;
        let remote = libc::iovec { iov_base: remote as *mut libc::c_void, iov_len: 1 };
        loop {
            // The number of a process that has ended may be another's by now.
            if self.gone() {
                return Touch::Gone;
            }
            // SAFETY: `local` is a byte of the mapping that the page holds (`MemoryMap` made it so); the kernel reads it. `remote`
            // is an address of another process, which the kernel checks.
            let written = unsafe { libc::process_vm_writev(self.pid(), &local, 1, &remote, 1, 0) };
            if written == 1 {
                return Touch::Done;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // A process gives its memory back some time before it counts as ended.
                Some(libc::ESRCH) => return Touch::Gone,
                _ if self.gone() => return Touch::Gone,
                _ => return Touch::Failed(error),
            }
        }
    }

    /// Has the kernel make a page of the owner writable, as a write to it would, and writes nothing. Blocks as
    /// [`Owner::touch`] does.
    ///
    /// The kernel gets hold of the owner's page before it looks at what is to be written there, which nobody may read: so
    /// the write fails, but not before it has met the protection.
    pub(super) fn meet_protection(&self, address: u64) {
        if self.gone() {
            return;
        }
        let Some(unreadable) = unreadable() else { return };
        let local = libc::iovec { iov_base: unreadable as *mut libc::c_void, iov_len: 1 };
        let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 };
        // SAFETY: `local` is one byte of a mapping that nobody may read and that stays for ever: the kernel refuses, and
        // writes nothing. `remote` is an address of another process, which the kernel checks.
        let written = unsafe { libc::process_vm_writev(self.pid(), &local, 1, &remote, 1, 0) };
        debug_assert!(written < 1);
    }

    /// What the kernel knows of each of its pages (proc(5), `pagemap`).
    pub(super) fn pagemap(&self) -> Option<File> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid())).ok()?;
        // The number may have been another's by then; once open, the file stays that process's.
        (!self.gone()).then_some(pagemap)
    }

    /// What the process calls itself.
    pub(crate) fn command(&self) -> String {
        let path = format!("/proc/{}/comm", self.pid());
        std::fs::read_to_string(path).map_or_else(|_| String::new(), |comm| comm.trim_end().to_owned())
    }
}

/// The address of a page of ours that nobody may read; none if there is no memory for it.
fn unreadable() -> Option<usize> {
    static PAGE_OF_OURS: OnceLock<Option<usize>> = OnceLock::new();
    *PAGE_OF_OURS.get_or_init(|| {
        // SAFETY: a new mapping at an address of the kernel's choice; it is never given back, and no reference is made to it.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), PAGE as usize, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        page.ok().map(|page| page as usize)
    })
}

fn all_processes() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A line of `/proc/PID/maps` (proc(5)).
struct Line {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    file: (u64, u64),
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?;
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = rustix::fs::makedev(hex(major)? as u32, hex(minor)? as u32);
        let inode = fields.next()?.parse().ok()?;
        let shared = permissions.contains('s');
        Some(Self { start: hex(start)?, end: hex(end)?, shared, offset, file: (device, inode) })
    }
}

enum Mapped {
    Shared,
    Private,
    No,
}

/// Whether the lines, which are in the order of addresses, have all of the region's file where it should be.
fn maps_region(lines: &[Line], region: &RegionGuard) -> Mapped {
    let (mut at, end) = (region.user, region.user.saturating_add(region.len));
    for line in lines {
        if line.end <= at {
            continue;
        }
        let expected = region.offset + (at - region.user);
        let fits = line.start <= at
            && Some(line.file) == region.file
            && line.offset.checked_add(at - line.start) == Some(expected);
        match fits {
            false => return Mapped::No,
            true if !line.shared => return Mapped::Private,
            true => at = line.end,
        }
        if at >= end {
            return Mapped::Shared;
        }
    }
    Mapped::No
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn region(user: u64, len: u64, offset: u64) -> RegionGuard {
        let (touched, owner) = (Touched::new(len / PAGE + 2), Mutex::default());
        RegionGuard { user, len, offset, file: Some((rustix::fs::makedev(0, 1), 77)), touched, owner }
    }

    #[test]
    fn a_mapping_counts_if_file_place_and_length_agree_however_the_kernel_has_split_it() {
        let maps = "\
7f0000000000-7f0000002000 rw-s 00001000 00:01 77    /memfd:guest (deleted)
7f0000002000-7f0000004000 r--s 00003000 00:01 77    /memfd:guest (deleted)
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
7f0000006000-7f0000007000 rw-p 00000000 00:01 77    /memfd:guest (deleted)";
        let lines: Vec<_> = maps.lines().filter_map(Line::parse).collect();
        let shared =
            |user, len, offset| matches!(maps_region(&lines, &region(user, len, offset)), Mapped::Shared);
        assert_eq!(lines.len(), 4);
        assert!(shared(0x7f00_0000_0000, 0x4000, 0x1000));
        assert!(shared(0x7f00_0000_1000, 0x2000, 0x2000));
        assert!(!shared(0x7f00_0000_0000, 0x4000, 0x0), "another place of the file");
        assert!(!shared(0x7f00_0000_0000, 0x5000, 0x1000), "longer than the mapping");
        assert!(!shared(0x7f00_0001_0000, 0x1000, 0x0), "nothing there");
        let private = region(0x7f00_0000_6000, 0x1000, 0);
        assert!(matches!(maps_region(&lines, &private), Mapped::Private));
    }

    #[test]
    fn the_pages_of_a_range_are_those_of_the_owners_addresses() {
        let region = region(0x10_0800, 0x3000, 0);
        let all: Vec<_> = region.untouched(0x7ff, 0x1002).collect();
        assert_eq!(all, [(0, 0x7ff), (1, 0x800), (2, 0x1800)]);
        region.touched.set(1);
        assert_eq!(region.untouched(0x7ff, 0x1002).count(), 2);
        assert_eq!(region.untouched(0x7ff, 0).count(), 0);
    }
}
