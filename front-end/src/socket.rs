//! A listening Unix socket's place in the file system.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind as bind_to, connect, listen, socket_with,
};

/// How long the lock of a directory is waited for. Whoever is one of us has it for a moment.
const PATIENCE: Duration = Duration::from_millis(500);

/// The file of a socket; dropping it removes it, but never another's of the same name. To be dropped before the socket is
/// closed: what nobody listens on any more, a successor may replace at any moment.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

/// Creates a socket with these permission bits, in place of one that nobody listens on, and listens: up to `backlog`
/// clients wait. It does not block. Of several that come at once, in any processes, one gets the place.
///
/// # Errors
/// `AddrInUse` if somebody listens there already; else what the operating system says. Of a file that is no socket, too.
pub fn bind(path: &Path, mode: u32, backlog: i32) -> io::Result<(UnixListener, SocketFile)> {
    // Another one, which has found the same stale socket, or this one before it listens, would take this one for stale.
    let _alone = alone_beside(path);
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

/// Keeps others that call it from the directory of `path`, until what it returns is dropped; it locks the directory itself,
/// so that nothing is left lying about. None where that is not possible: we may not read it, or its file system has no
/// such locks. Nor if somebody keeps it locked, who is none of us: a server must start all the same.
fn alone_beside(path: &Path) -> Option<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let begun = Instant::now();
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return None,
        }
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    let fd = stream_socket()?;
    bind_to(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// Removes what a server that was killed has left. Anything but a socket, and a socket that somebody listens on,
/// stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::other("there is a file of that name that is no socket"));
        }
        Ok(_) => match connect(&stream_socket()?, &SocketAddrUnix::new(path)?) {
            Err(Errno::CONNREFUSED) => fs::remove_file(path),
            // So many clients wait there that there is no room for another.
            Ok(()) | Err(Errno::AGAIN) => Err(io::ErrorKind::AddrInUse.into()),
            Err(error) => Err(error.into()),
        },
        Err(error) => Err(error),
    };
    match removed {
        // A server that has just ended has taken it along.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn somebody_who_listens_and_lets_clients_wait_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let _first = bind(&path, 0o660, 0).unwrap();
        // The only one who may wait.
        let _waits = UnixStream::connect(&path).unwrap();
        let (said, heard) = channel();
        std::thread::spawn(move || said.send(bind(&path, 0o660, 0).unwrap_err().kind()));
        let kind = heard.recv_timeout(Duration::from_secs(20)).expect("an answer");
        assert_eq!(kind, io::ErrorKind::AddrInUse);
    }

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

    #[test]
    fn of_several_that_find_the_same_stale_socket_one_gets_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        for round in 0..200 {
            drop(UnixListener::bind(&path).unwrap()); // leaves its file
            let barrier = Barrier::new(4);
            let take = || {
                barrier.wait();
                bind(&path, 0o660, 1)
            };
            let results = std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(take));
                threads.map(|thread| thread.join().unwrap())
            });
            let (mut winners, mut others) = (Vec::new(), Vec::new());
            for result in results {
                match result {
                    Ok(bound) => winners.push(bound),
                    Err(error) => others.push(error.kind()),
                }
            }
            assert_eq!((winners.len(), others), (1, vec![io::ErrorKind::AddrInUse; 3]), "round {round}");
            let there = fs::metadata(&path).unwrap();
            assert_eq!((there.dev(), there.ino()), winners[0].1.identity, "round {round}");
            drop(winners);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_directory_that_somebody_keeps_locked_delays_a_socket_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let somebody = alone_beside(&path).unwrap();
        let begun = Instant::now();
        let (_listener, _file) = bind(&path, 0o660, 1).unwrap();
        assert!(begun.elapsed() >= PATIENCE);
        drop(somebody);
    }
}
