//! Eventfds: kicks from the guest, interrupts to it, and wake-ups between our threads.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// A shared eventfd, which is never waited for when it is written to.
#[derive(Clone, Debug)]
pub(crate) struct EventFd(Arc<OwnedFd>);

impl EventFd {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Takes a descriptor that a front end has sent. Anything but an eventfd is refused: a pipe could block our
    /// threads, and a file would look like an endless stream of kicks.
    pub(crate) fn from_front_end(file: File) -> io::Result<Self> {
        let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if target.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no eventfd"));
        }
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(file.into())))
    }

    /// Wakes whoever waits for it. If the counter is full, they have been woken and have not looked yet.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Takes the counter back to zero.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }

    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_eventfds_are_taken() {
        assert!(EventFd::from_front_end(File::open("/dev/null").unwrap()).is_err());
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(EventFd::from_front_end(std::os::fd::OwnedFd::from(pipe).into()).is_err());
        let ours = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let taken = EventFd::from_front_end(ours.into()).unwrap();
        taken.signal();
        taken.clear();
        taken.clear(); // does not block on an empty counter
    }
}
