//! The socket's place in the file system.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::{Error, ErrorKind};

/// Clients that may wait to be accepted, or turned away.
const BACKLOG: i32 = 16;

/// A listening socket, whose file goes with it.
pub(crate) struct Socket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of its file, so that another's is never removed.
    identity: (u64, u64),
}

impl Socket {
    /// Creates the socket with these permission bits, in place of one that nobody listens on.
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::because(ErrorKind::Socket, path, error);
        let fd = match bind_at(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind_at(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        // Nobody can connect before the socket listens, so nobody gets in before its mode is set.
        let made = fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .and_then(|()| Ok(listen(&fd, BACKLOG)?))
            .and_then(|()| fs::metadata(path));
        let metadata = match made {
            Ok(metadata) => metadata,
            Err(error) => {
                let _ = fs::remove_file(path);
                return Err(failed(error));
            }
        };
        let listener = UnixListener::from(fd);
        Ok(Self { listener, path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = |file: &fs::Metadata| (file.dev(), file.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(|file| ours(&file)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// Removes what a server that was killed has left. Anything but a socket, and a socket that somebody listens on,
/// stays.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let failed = |error: io::Error| Error::because(ErrorKind::Socket, path, error);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::because(
            ErrorKind::Socket,
            path,
            "there is a file of that name that is no socket",
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(Error::new(ErrorKind::InUse, path)),
    }
}

/// The process that had the other end when it was connected; 0 if it is not to be seen from here.
pub(crate) fn peer_of(stream: &UnixStream) -> i32 {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open while `stream` is borrowed, and the kernel writes at most `len` bytes to `peer`.
    let got = unsafe {
        let to = (&raw mut peer).cast();
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &raw mut len)
    };
    if got == 0 { peer.pid } else { 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_file_has_its_mode_and_goes_with_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let socket = Socket::bind(&path, 0o640).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        drop(UnixListener::bind(&path).unwrap()); // leaves its file
        let first = Socket::bind(&path, 0o660).unwrap();
        assert_eq!(Socket::bind(&path, 0o660).err().unwrap().kind(), ErrorKind::InUse);

        // A successor took the name: the first must not take it away.
        fs::remove_file(&path).unwrap();
        let _second = Socket::bind(&path, 0o660).unwrap();
        drop(first);
        assert!(path.exists());

        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(Socket::bind(&file, 0o660).err().unwrap().kind(), ErrorKind::Socket);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
