//! Sockets that are listened on, and those that come out of them.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use front_end::{SocketFile, peer_of};
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, sockopt};

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
    /// Of a socket that it has created. It goes first, while nobody can take it for stale.
    _file: Option<SocketFile>,
    fd: OwnedFd,
    address: Address,
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
        let (listener, file) = front_end::bind(path, mode, BACKLOG).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::new(ErrorKind::InUse, path.display()),
            _ => Error::because(ErrorKind::Socket, path.display(), error),
        })?;
        let address = Address::Unix(Some(path.to_owned()));
        Ok(Self { fd: listener.into(), address, _file: Some(file) })
    }

    fn tcp(address: SocketAddr) -> Result<Self, Error> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::because(ErrorKind::InUse, address, error),
            _ => Error::because(ErrorKind::Socket, address, error),
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = Address::Tcp(listener.local_addr().map_err(failed)?);
        Ok(Self { fd: listener.into(), address, _file: None })
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
        Ok(Self { fd, address, _file: None })
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
    peer_of(stream).map_or_else(|| "unix".to_owned(), |peer| format!("pid {}, uid {}", peer.pid, peer.uid))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_path_in_use_is_told_from_one_that_cannot_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nbd.sock");
        let open = || Listener::open(Listen::Unix { path: path.clone(), mode: 0o640 });
        let first = open().unwrap();
        assert_eq!(open().err().unwrap().kind(), ErrorKind::InUse);
        drop(first);
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(open().err().unwrap().kind(), ErrorKind::Socket);
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
