//! The control socket: `cdpd.sock` in the store's directory.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The socket's name in the store's directory.
pub const NAME: &str = "cdpd.sock";

/// The longest path that fits into a socket address (unix(7)), its closing zero not counted.
const MAX_PATH: usize = 107;

/// A path to a name in a directory that fits into a socket address, and what keeps it valid.
struct Place {
    path: PathBuf,
    _directory: Option<File>,
}

impl Place {
    fn new(directory: &Path, name: &str) -> io::Result<Self> {
        let path = directory.join(name);
        if path.as_os_str().len() <= MAX_PATH {
            return Ok(Self { path, _directory: None });
        }
        let directory = File::open(directory)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
        Ok(Self { path, _directory: Some(directory) })
    }
}

/// Makes the socket in `directory`, in place of one that an earlier daemon left behind. The caller owns the
/// store's lock, so no other daemon can be using it.
///
/// # Errors
/// What the operating system says.
pub fn bind(directory: &Path, mode: u32) -> io::Result<UnixListener> {
    // It takes its name only once its mode is right, and takes it from a stale one in the same step.
    let fresh = Place::new(directory, ".cdpd.sock.new")?;
    match fs::remove_file(&fresh.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh.path)?;
    fs::set_permissions(&fresh.path, Permissions::from_mode(mode))?;
    fs::rename(&fresh.path, directory.join(NAME))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to the daemon that serves the store in `directory`; `None` if there is none.
///
/// # Errors
/// There may be one, but it cannot be reached: no permission, for instance.
pub fn connect(directory: &Path) -> io::Result<Option<UnixStream>> {
    let attempt = Place::new(directory, NAME).and_then(|place| UnixStream::connect(&place.path));
    match attempt {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_deep_directory_works_and_a_stale_socket_is_no_daemon() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("d".repeat(150));
        fs::create_dir(&deep).unwrap();
        assert!(connect(&deep).unwrap().is_none());
        let listener = bind(&deep, 0o600).unwrap();
        assert!(connect(&deep).unwrap().is_some());
        let mode = fs::metadata(deep.join(NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(connect(&deep).unwrap().is_none());
        let _again = bind(&deep, 0o660).unwrap();
        assert!(connect(&deep).unwrap().is_some());
        assert_eq!(fs::read_dir(&deep).unwrap().count(), 1);
    }
}
