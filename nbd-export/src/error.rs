//! Why a server could not be started.

use std::fmt;

/// What a caller can do about a server that did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Another server listens there: choose another address, or stop it.
    InUse,
    /// The address cannot be listened on.
    Socket,
    /// A number in the configuration is out of range.
    Config,
    /// A certificate, a key or a file of keys cannot be used.
    Tls,
    /// The operating system gave no thread, no descriptor or no io_uring.
    Resources,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InUse => "another server listens there",
            Self::Socket => "it cannot be listened on",
            Self::Config => "the configuration is not usable",
            Self::Tls => "certificate or key cannot be used",
            Self::Resources => "the operating system refused a thread, a descriptor or an io_uring",
        })
    }
}

/// A server that did not start: what is wrong, with what, and why.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {kind}")]
pub struct Error {
    kind: ErrorKind,
    subject: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, subject: impl fmt::Display) -> Self {
        Self { kind, subject: subject.to_string(), source: None }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        subject: impl fmt::Display,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { source: Some(source.into()), ..Self::new(kind, subject) }
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}
