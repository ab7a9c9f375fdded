//! The store's one error type.

use std::fmt;
use std::io;

use cdp_types::{IoError, IoErrorKind};

use crate::format::FormatError;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No volume, mark or instant of that name.
    NotFound,
    /// The name is taken.
    Exists,
    /// It is in use: a guest is attached, or an import is under way.
    Busy,
    /// The request makes no sense: a size that shrinks, an instant outside the history.
    Invalid,
    /// Stored bytes are damaged.
    Corrupt,
    /// The operating system failed.
    Io,
    /// The store is full.
    NoSpace,
    /// Another process has the store.
    Locked,
    /// The directory is no store, or holds parts of another one.
    Foreign,
    /// The store was written by a newer version.
    Newer,
    /// The store or the volume takes no changes.
    ReadOnly,
    /// The store was closed.
    Closed,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "not found",
            Self::Exists => "exists already",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::Corrupt => "damaged data",
            Self::Io => "input/output error",
            Self::NoSpace => "no space left",
            Self::Locked => "in use by another process",
            Self::Foreign => "not a store of this program",
            Self::Newer => "written by a newer version",
            Self::ReadOnly => "read-only",
            Self::Closed => "closed",
        })
    }
}

/// What failed, where, and why. The source is not part of the text; print the chain.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What the store's operations return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of this kind; `context` says what was attempted on what, and what to do if that is known.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// The same, with its cause.
    #[must_use]
    pub fn with(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// A failed operation on a file.
    pub(crate) fn io(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::WouldBlock => ErrorKind::Locked,
            _ => ErrorKind::Io,
        };
        Self::new(kind, context).with(source)
    }

    /// Bytes that are no valid structure.
    pub(crate) fn format(context: impl Into<String>, source: FormatError) -> Self {
        let kind = match source {
            FormatError::Absent => ErrorKind::Foreign,
            FormatError::Newer { .. } => ErrorKind::Newer,
            FormatError::Checksum | FormatError::Field(_) => ErrorKind::Corrupt,
        };
        Self::new(kind, context).with(source)
    }

    /// The same for a front end's client.
    #[must_use]
    pub fn to_io(&self) -> IoError {
        let kind = match self.kind {
            ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Exists => IoErrorKind::Invalid,
            ErrorKind::Corrupt | ErrorKind::Foreign | ErrorKind::Newer => IoErrorKind::Corrupt,
            ErrorKind::Io | ErrorKind::Busy | ErrorKind::Locked => IoErrorKind::Device,
            ErrorKind::NoSpace => IoErrorKind::NoSpace,
            ErrorKind::ReadOnly => IoErrorKind::ReadOnly,
            ErrorKind::Closed => IoErrorKind::Gone,
        };
        let source = self.source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
        IoError::new(kind, format!("{}{source}", self.context))
    }
}
