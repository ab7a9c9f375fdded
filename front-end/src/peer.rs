//! Who is at the other end of a Unix socket.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// A process and its user, as they were when they connected (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// 0 if it lives in a namespace that is not to be seen from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// Who had the other end when it was connected; none if the kernel does not say.
#[must_use]
pub fn peer_of(stream: &UnixStream) -> Option<Peer> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // Not by `rustix`, whose process ids are never 0.
    // SAFETY: the descriptor is the stream's, which is borrowed; the kernel writes at most `len` bytes to `peer`, of
    // which every bit pattern is valid.
    let got = unsafe {
        let to = (&raw mut peer).cast();
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &raw mut len)
    };
    (got == 0).then_some(Peer { pid: peer.pid, uid: peer.uid })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pair_s_other_end_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = peer_of(&one).unwrap();
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    }
}
