//! What a server is told, and the bounds that follow from it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Error, ErrorKind};

/// Where a server listens.
#[derive(Debug)]
pub enum Listen {
    /// A Unix socket, created there; a stale one is replaced, and it is removed in the end.
    Unix {
        /// Where.
        path: PathBuf,
        /// Its permission bits; who may connect may have whatever is exported.
        mode: u32,
    },
    /// A TCP socket. Port 0 lets the operating system choose.
    Tcp(SocketAddr),
    /// A listening stream socket that somebody else has made, as systemd does for socket activation.
    Inherited(OwnedFd),
}

/// Whether clients may, or must, use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// A client that asks for TLS gets it (the protocol's SELECTIVETLS).
    Allowed,
    /// A client gets nothing before it has TLS (FORCEDTLS).
    Required,
}

/// TLS, version 1.2 or 1.3.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Whether clients may or must.
    pub mode: TlsMode,
    /// By what the two sides know each other.
    pub credentials: TlsCredentials,
}

/// By what server and clients know each other. The files are read when the server starts, and never again.
#[derive(Clone, Debug)]
pub enum TlsCredentials {
    /// X.509 certificates.
    Certificates {
        /// A PEM file with the server's certificate, and those that it was signed with, in order.
        certificates: PathBuf,
        /// A PEM file with its key.
        key: PathBuf,
        /// A PEM file with the authorities of which every client must show a certificate; none is asked for without.
        client_authorities: Option<PathBuf>,
    },
    /// Keys that the server shares with its clients. Each side has to know the key of the user that the client names.
    PreSharedKeys {
        /// Lines `USER:HEXKEY`, as GnuTLS's `psktool` writes them. Nobody but its owner may have any right to it.
        /// Keys have 16 to 64 bytes.
        file: PathBuf,
    },
}

/// What clients can use up, alone and together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time; others are closed at once.
    pub connections: usize,
    /// How long a client may take from its connection to the end of its handshake.
    pub handshake: Duration,
    /// Requests that one connection may have in flight; further ones are not read.
    pub requests: usize,
    /// Memory for the payloads of one connection, in bytes; the same, though one request is always taken. A few
    /// megabytes keep any disk busy, and payloads in the processor's caches on their way from the disk to the socket:
    /// with 64 MiB, `nbdcopy` takes a fifth more processor time.
    pub connection_bytes: usize,
    /// Memory for the payloads of all connections, in bytes. Whoever waits for it gets it in turn.
    pub total_bytes: usize,
    /// The longest read or write, in bytes; a power of two up to 32 MiB.
    pub max_request: usize,
    /// While somebody waits for memory, a client that holds some and moves next to no data for this long, though it
    /// is its turn to send or to receive, is disconnected.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake: Duration::from_secs(10),
            requests: 128,
            connection_bytes: 4 << 20,
            total_bytes: 256 << 20,
            max_request: 32 << 20,
            stall: Duration::from_secs(10),
        }
    }
}

/// How a server serves.
#[derive(Debug)]
pub struct ServerConfig {
    /// Where it listens.
    pub listen: Vec<Listen>,
    /// Without it, clients that ask for TLS are refused it.
    pub tls: Option<Tls>,
    /// Threads that serve connections; a connection stays on one.
    pub workers: usize,
    /// What clients can use up.
    pub limits: Limits,
}

impl ServerConfig {
    /// Listening there, without TLS, with two workers and the default limits.
    #[must_use]
    pub fn new(listen: Vec<Listen>) -> Self {
        Self { listen, tls: None, workers: 2, limits: Limits::default() }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |what: &str| Err(Error::because(ErrorKind::Config, "nbd", what));
        let limits = &self.limits;
        if self.listen.is_empty() {
            return wrong("there is nowhere to listen");
        }
        if !(1..=256).contains(&self.workers) {
            return wrong("the number of workers must be 1 to 256");
        }
        if limits.connections == 0 || limits.requests == 0 {
            return wrong("some connections and requests must be allowed");
        }
        if !limits.max_request.is_power_of_two() || !(1 << 16..=32 << 20).contains(&limits.max_request) {
            return wrong("the longest request must be a power of two from 64 KiB to 32 MiB");
        }
        if limits.total_bytes < limits.connection_bytes.max(limits.max_request) {
            return wrong("all memory must hold that of a connection, and the longest request");
        }
        if u32::try_from(limits.total_bytes / 4096).is_err() {
            return wrong("no more than 16 TiB of memory can be counted");
        }
        Ok(())
    }
}
