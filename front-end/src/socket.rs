//! A listening Unix socket's place in the file system.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind as bind_to, listen, socket_with,
};

/// The file of a socket; dropping it removes it, but never another's of the same name.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

/// Creates a socket with these permission bits, in place of one that nobody listens on, and listens: up to `backlog`
/// clients wait. It does not block.
///
/// # Errors
/// `AddrInUse` if somebody listens there already; else what the operating system says. Of a file that is no socket, too.
pub fn bind(path: &Path, mode: u32, backlog: i32) -> io::Result<(UnixListener, SocketFile)> {
    let fd = match bind_at(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            bind_at(path)?
        }
        result => result?,
    };
    // Nobody can connect before the socket listens, so nobody gets in before its mode is set.
    let made = fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .and_then(|()| Ok(listen(&fd, backlog)?))
        .and_then(|()| fs::metadata(path));
    let metadata = made.inspect_err(|_| {
        let _ = fs::remove_file(path);
    })?;
    let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
    Ok((UnixListener::from(fd), file))
}

impl Drop for SocketFile {
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
    bind_to(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// Removes what a server that was killed has left. Anything but a socket, and a socket that somebody listens on,
/// stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("there is a file of that name that is no socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_file_has_its_mode_and_goes_with_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let (_listener, file) = bind(&path, 0o640, 1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        drop(UnixListener::bind(&path).unwrap()); // leaves its file
        let first = bind(&path, 0o660, 1).unwrap();
        assert_eq!(bind(&path, 0o660, 1).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        // A successor took the name: the first must not take it away.
        fs::remove_file(&path).unwrap();
        let second = bind(&path, 0o660, 1).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());

        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(bind(&file, 0o660, 1).unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
