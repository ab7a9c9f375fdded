//! The write protection that a QEMU has put on its memory for a hot checkpoint, taken back from outside.
//!
//! QEMU before 8.1 takes it back only at the end of a background snapshot that has succeeded: its
//! `bg_migration_iteration_finish` does not call `ram_write_tracking_stop`, `bg_migration_completion` does
//! (migration/migration.c). If the stream is closed before, whoever writes to a page that is still protected waits for
//! ever, mostly with QEMU's lock. So its userfaultfd is duplicated (pidfd_getfd(2), which needs the rights that the
//! guest-memory guard needs anyway), and the memory is unregistered from it (ioctl_userfaultfd(2)).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

/// `UFFDIO_WRITEPROTECT` and `UFFDIO_UNREGISTER` of linux/userfaultfd.h.
const WRITE_PROTECT: libc::c_ulong = 0xC018_AA06;
const UNREGISTER: libc::c_ulong = 0x8010_AA01;

/// `struct uffdio_writeprotect`; its first two fields are a `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    mode: u64,
}

const _: () = assert!(size_of::<Range>() == 24);

/// A process that no later one is taken for, in whatever process that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pid: i32,
    /// When it was started, in clock ticks since the boot.
    started: u64,
}

impl Process {
    /// The process that has this number now.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Its name, in parentheses, may be anything; of what is behind it, the start is the 20th (proc(5)).
        let started = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Takes back the write protection of all its memory, if it has any. Who waits for a page goes on.
    ///
    /// # Errors
    /// It may not be touched. That it has ended is none.
    pub(crate) fn unprotect(self) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(()) };
        // First the descriptor, then the look: what is seen belongs to the process that is held.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        if Self::of(self.pid) != Some(self) {
            return Ok(());
        }
        for number in userfaultfds(self.pid)? {
            let faults = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?;
            for (start, end) in mappings(self.pid)? {
                release(&faults, start, end - start);
            }
        }
        Ok(())
    }
}

fn userfaultfds(pid: i32) -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_one = fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]");
        found.extend(
            entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()).filter(|_| is_one),
        );
    }
    Ok(found)
}

/// Where it has memory that it may write.
fn mappings(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    // A file's name, at the end of its line, may be any bytes.
    let maps = fs::read(format!("/proc/{pid}/maps"))?;
    let mapping = |line: &str| {
        let (place, rights) = line.split_once(' ')?;
        let (start, end) = place.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some((number(start)?, number(end)?)).filter(|_| rights.starts_with("rw"))
    };
    Ok(String::from_utf8_lossy(&maps).lines().filter_map(mapping).collect())
}

/// Memory that is not registered with this descriptor stays as it is.
fn release(faults: &OwnedFd, start: u64, len: u64) {
    let mut range = Range { start, len, mode: 0 };
    for request in [WRITE_PROTECT, UNREGISTER] {
        // SAFETY: the descriptor is a userfaultfd and is borrowed; the kernel reads a `struct uffdio_writeprotect`, or the
        // `struct uffdio_range` at its beginning, from `range`, which outlives the call. The addresses are another process's,
        // whose pages keep what is in them.
        unsafe { libc::ioctl(faults.as_raw_fd(), request, &raw mut range) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::FromRawFd;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const PAGE: usize = 4096;
    // <linux/userfaultfd.h>: the version, write protection as a feature and as a mode, and two requests.
    const API: u64 = 0xaa;
    const FEATURE_WP: u64 = 1;
    const MODE_WP: u64 = 2;
    const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
    const REGISTER: libc::c_ulong = 0xC020_AA00;

    /// A page of this process that is write-protected, and what it is protected with.
    fn protected_page() -> (OwnedFd, usize) {
        // SAFETY: the call takes flags and returns a new descriptor, which nobody else owns.
        let faults = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            let hint =
                "userfaultfd is needed: run as root, or set /proc/sys/vm/unprivileged_userfaultfd to 1";
            assert!(fd >= 0, "{hint}: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        // SAFETY: new memory, which is not unmapped before this process ends; the page is there once it was written to.
        let page = unsafe {
            let (rights, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let page = libc::mmap(std::ptr::null_mut(), PAGE, rights, kind, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            page.cast::<u8>().write_volatile(1);
            page as usize
        };
        let ask = |request, argument: &mut [u64; 4]| {
            // SAFETY: no request's structure is longer than four `u64`.
            let done = unsafe { libc::ioctl(faults.as_raw_fd(), request, argument.as_mut_ptr()) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
        };
        ask(UFFDIO_API, &mut [API, FEATURE_WP, 0, 0]);
        ask(REGISTER, &mut [page as u64, PAGE as u64, MODE_WP, 0]);
        ask(WRITE_PROTECT, &mut [page as u64, PAGE as u64, 1, 0]);
        (faults, page)
    }

    #[test]
    fn whoever_waits_for_a_protected_page_goes_on_and_only_in_that_process() {
        let (_faults, page) = protected_page();
        let (wrote, has_written) = channel();
        std::thread::spawn(move || {
            // SAFETY: mapped and writable, and nobody else uses it.
            unsafe { (page as *mut u8).write_volatile(2) };
            let _ = wrote.send(());
        });
        let own = Process::of(std::process::id() as i32).unwrap();
        Process { started: own.started + 1, ..own }.unprotect().unwrap();
        let moment = Duration::from_millis(200);
        assert!(has_written.recv_timeout(moment).is_err(), "memory of another process was unprotected");
        own.unprotect().unwrap();
        has_written.recv_timeout(Duration::from_secs(20)).expect("the write goes on");
    }

    #[test]
    fn a_process_that_has_ended_is_left_alone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = Process::of(child.id() as i32).unwrap();
        child.wait().unwrap();
        gone.unprotect().unwrap();
        assert_eq!(Process::of(gone.pid), None);
    }
}
