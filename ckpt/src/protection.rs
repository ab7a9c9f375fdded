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

    use super::*;

    #[test]
    fn a_process_that_has_ended_or_is_another_is_left_alone() {
        let own = Process::of(std::process::id() as i32).unwrap();
        own.unprotect().unwrap();
        Process { started: own.started + 1, ..own }.unprotect().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let gone = Process::of(child.id() as i32).unwrap();
        child.wait().unwrap();
        gone.unprotect().unwrap();
        assert_eq!(Process::of(gone.pid), None);
    }
}
