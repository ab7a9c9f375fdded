//! What a caller is told when the time index or the catalogue fails.

use std::error::Error as StdError;
use std::fmt;

/// What a caller can do about a failed operation on a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IndexErrorKind {
    /// The database cannot be used as it is. It is derived: delete it and rebuild it from the logs.
    Corrupt,
    /// The file system is full. RocksDB resumes by itself once there is space; unflushed rows stay in memory.
    NoSpace,
    /// The operating system failed to read, write or sync.
    Io,
    /// Another process, or another handle of this one, has it open.
    Locked,
    /// There is no database at the path, and it was to be opened read-only.
    Missing,
    /// The call breaks a rule of this interface, or writes to a database that was opened read-only.
    Invalid,
}

impl fmt::Display for IndexErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corrupt => "database is corrupt",
            Self::NoSpace => "no space left for the database",
            Self::Io => "input/output error of the database",
            Self::Locked => "database is in use",
            Self::Missing => "no database",
            Self::Invalid => "invalid use of the database",
        })
    }
}

/// A failed operation on a database: what kind of failure, during what, where, and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: {operation}, {place}")]
pub struct IndexError {
    kind: IndexErrorKind,
    operation: &'static str,
    place: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl IndexError {
    /// An error of this kind; `operation` is a verb, `place` names path and row.
    pub fn new(kind: IndexErrorKind, operation: &'static str, place: impl Into<String>) -> Self {
        Self { kind, operation, place: place.into(), source: None }
    }

    /// The same with its cause, which `Display` leaves to whoever prints the chain.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> IndexErrorKind {
        self.kind
    }

    /// What was being done.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.operation
    }
}

/// The result of an operation on a database.
pub type IndexResult<T> = Result<T, IndexError>;
