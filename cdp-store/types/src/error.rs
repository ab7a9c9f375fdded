//! What a front end is told when an operation fails.

use std::fmt;

/// What a caller can do about a failed operation; each kind maps to one errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoErrorKind {
    /// The request itself is wrong: unaligned, out of range, too long (`EINVAL`).
    Invalid,
    /// The device does not do this (`EOPNOTSUPP`).
    Unsupported,
    /// The device takes no writes: a past instant, or a volume that corruption made read-only (`EROFS`).
    ReadOnly,
    /// The store is full and stayed full for as long as it was told to wait (`ENOSPC`).
    NoSpace,
    /// Stored data failed its checksum, or the log is damaged (`EIO`).
    Corrupt,
    /// The operating system failed to read, write or sync (`EIO`).
    Device,
    /// The device is being taken away: shutdown, destroy, forced revert (`ESHUTDOWN`).
    Gone,
}

impl IoErrorKind {
    /// The errno that a client of an operating system or of NBD expects.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::Invalid => libc::EINVAL,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::Corrupt | Self::Device => libc::EIO,
            Self::Gone => libc::ESHUTDOWN,
        }
    }
}

impl fmt::Display for IoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Invalid => "invalid request",
            Self::Unsupported => "not supported",
            Self::ReadOnly => "read-only",
            Self::NoSpace => "no space left in the store",
            Self::Corrupt => "stored data is corrupt",
            Self::Device => "input/output error",
            Self::Gone => "device is gone",
        })
    }
}

/// A failed operation: its kind for the client, its detail for the operator's log.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{kind}: {detail}")]
pub struct IoError {
    kind: IoErrorKind,
    detail: String,
}

impl IoError {
    /// An error of this kind; `detail` names file and offset, or the offending range.
    pub fn new(kind: IoErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> IoErrorKind {
        self.kind
    }
}

impl From<crate::RangeError> for IoError {
    fn from(error: crate::RangeError) -> Self {
        Self::new(IoErrorKind::Invalid, error.to_string())
    }
}

/// An error and what caused it, in one line.
#[must_use]
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
