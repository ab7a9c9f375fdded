//! Sockets that are listened on, and those that come out of them.

use std::fmt;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, listen, socket_with,
    sockopt,
};

use crate::{Error, ErrorKind, Listen};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;
/// What a Unix socket may hold of replies, in bytes: the default is less than what clients commonly read at once.
const UNIX_SEND_BUFFER: usize = 1 << 20;
/// When a peer that says nothing is asked whether it is still there, and how often until it is given up.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Where a server listens, as clients find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket; no path if it has none.
    Unix(Option<PathBuf>),
    /// A TCP address, its port filled in.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(Some(path)) => write!(f, "unix:{}", path.display()),
            Self::Unix(None) => f.write_str("unix"),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A listening socket. One that it has created in the file system goes with it.
pub(crate) struct Listener {
    fd: OwnedFd,
    address: Address,
    /// Path, device and inode of a file of ours, so that another's is never removed.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Listener {
    pub(crate) fn open(listen: Listen) -> Result<Self, Error> {
        match listen {
            Listen::Unix { path, mode } => Self::unix(&path, mode),
            Listen::Tcp(address) => Self::tcp(address),
            Listen::Inherited(fd) => Self::inherited(fd),
        }
    }

    fn unix(path: &Path, mode: u32) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::because(ErrorKind::Socket, path.display(), error);
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
        let file = Some((path.to_owned(), (metadata.dev(), metadata.ino())));
        Ok(Self { fd, address: Address::Unix(Some(path.to_owned())), file })
    }

    fn tcp(address: SocketAddr) -> Result<Self, Error> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::because(ErrorKind::InUse, address, error),
            _ => Error::because(ErrorKind::Socket, address, error),
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = Address::Tcp(listener.local_addr().map_err(failed)?);
        Ok(Self { fd: listener.into(), address, file: None })
    }

    fn inherited(fd: OwnedFd) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::because(ErrorKind::Socket, "an inherited socket", error);
        let wrong = |what: &str| Err(failed(io::Error::other(what)));
        let kind = sockopt::socket_type(&fd).map_err(|e| failed(e.into()))?;
        let listening = sockopt::socket_acceptconn(&fd).map_err(|e| failed(e.into()))?;
        if kind != SocketType::STREAM || !listening {
            return wrong("it is no listening stream socket");
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| failed(e.into()))?;
        let address = match sockopt::socket_domain(&fd).map_err(|e| failed(e.into()))? {
            AddressFamily::UNIX => {
                let listener = UnixListener::from(fd.try_clone().map_err(failed)?);
                let local = listener.local_addr().map_err(failed)?;
                Address::Unix(local.as_pathname().map(Path::to_owned))
            }
            AddressFamily::INET | AddressFamily::INET6 => {
                let listener = TcpListener::from(fd.try_clone().map_err(failed)?);
                Address::Tcp(listener.local_addr().map_err(failed)?)
            }
            _ => return wrong("it is neither a Unix nor a TCP socket"),
        };
        Ok(Self { fd, address, file: None })
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next client, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<(Socket, String)>> {
        // The stream itself blocks: io_uring waits for it in the kernel, instead of coming back at once.
        let accepted = acceptfrom_with(&self.fd, SocketFlags::CLOEXEC);
        let fd = match accepted {
            Ok((fd, _)) => fd,
            // The client has gone again, or somebody else was faster.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        match &self.address {
            Address::Unix(_) => {
                let stream = UnixStream::from(fd);
                let peer = peer_name(&stream);
                // As far as `net.core.wmem_max` lets us; it works with less, too.
                let _ = sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER);
                Ok(Some((Socket::Unix(stream), peer)))
            }
            Address::Tcp(_) => {
                let stream = TcpStream::from(fd);
                // It has gone already.
                let Ok(peer) = stream.peer_addr() else { return Ok(None) };
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(&stream, true)?;
                sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
                sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
                sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
                Ok(Some((Socket::Tcp(stream), peer.to_string())))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, identity)) = &self.file else { return };
        let ours = |file: &fs::Metadata| (file.dev(), file.ino()) == *identity;
        if fs::symlink_metadata(path).is_ok_and(|file| ours(&file)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// A client's stream.
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// A second descriptor, with which another thread can end the connection.
    pub(crate) fn handle(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(stream) => stream.as_fd().try_clone_to_owned(),
            Self::Tcp(stream) => stream.as_fd().try_clone_to_owned(),
        }
    }
}

/// Process and user of a peer, as it was when it connected.
fn peer_name(stream: &UnixStream) -> String {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // Not by `rustix`, whose process ids are never 0: a peer's is, if it lives in a namespace that we do not see.
    // SAFETY: the descriptor is the stream's, which is borrowed; the kernel writes at most `len` bytes to `peer`, of
    // which every bit pattern is valid.
    let result = unsafe {
        let value = (&raw mut peer).cast();
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len)
    };
    match result {
        0 => format!("pid {}, uid {}", peer.pid, peer.uid),
        _ => "unix".to_owned(),
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
    let failed = |error: io::Error| Error::because(ErrorKind::Socket, path.display(), error);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(failed(io::Error::other("there is a file of that name that is no socket")));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(Error::new(ErrorKind::InUse, path.display())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn unix(path: &Path) -> Result<Listener, Error> {
        Listener::open(Listen::Unix { path: path.to_owned(), mode: 0o640 })
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        drop(UnixListener::bind(&path).unwrap()); // leaves its file
        let first = unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(unix(&path).err().unwrap().kind(), ErrorKind::InUse);

        // A successor took the name: the first must not take it away.
        fs::remove_file(&path).unwrap();
        let second = unix(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());

        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(unix(&file).err().unwrap().kind(), ErrorKind::Socket);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn inherited_sockets_are_looked_at() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let inherited = Listener::open(Listen::Inherited(listener.into())).unwrap();
        assert_eq!(*inherited.address(), Address::Tcp(address));
        let (one, _other) = UnixStream::pair().unwrap();
        let refused = Listener::open(Listen::Inherited(one.into())).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Socket);
    }

    #[test]
    fn a_port_in_use_is_said_to_be() {
        let first = Listener::open(Listen::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let Address::Tcp(address) = *first.address() else { panic!("no TCP address") };
        assert_eq!(Listener::open(Listen::Tcp(address)).err().unwrap().kind(), ErrorKind::InUse);
    }
}
