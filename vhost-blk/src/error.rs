//! Why a server could not be started.

use std::fmt;
use std::path::{Path, PathBuf};

/// What a caller can do about a server that did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Another server listens on the socket: choose another path, or stop it.
    InUse,
    /// The path is taken by something that is no socket, or cannot be created there.
    Socket,
    /// A number in the configuration is out of range.
    Config,
    /// The operating system gave no thread or no descriptor.
    Resources,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InUse => "another server listens on the socket",
            Self::Socket => "the socket cannot be created",
            Self::Config => "the configuration is not usable",
            Self::Resources => "the operating system refused a thread or a descriptor",
        })
    }
}

/// A server that did not start: what is wrong, with which socket, and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", socket.display())]
pub struct Error {
    kind: ErrorKind,
    socket: PathBuf,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, socket: &Path) -> Self {
        Self { kind, socket: socket.to_owned(), source: None }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        socket: &Path,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::new(kind, socket) }
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}
