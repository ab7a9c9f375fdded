//! Why a checkpoint's memory could not be taken or put back.

use std::fmt;

use cdp_types::{IoError, IoErrorKind};

/// What a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The stream ends too early: QEMU died, or gave the migration up.
    Truncated,
    /// The bytes are not what QEMU sends.
    Malformed,
    /// QEMU was told to send something that checkpoints cannot take: switch it off.
    Unsupported,
    /// More than the caller's limits allow.
    Limit,
    /// Pages of memory are missing, or come twice where they must come once.
    Incomplete,
    /// There is no memory image on the volume.
    NoImage,
    /// The memory image was never finished.
    Unfinished,
    /// The memory image does not match its checksums.
    Damaged,
    /// A newer version of this program has written the memory image.
    Newer,
    /// The volume, or the store below it, is too small.
    NoSpace,
    /// The volume failed.
    Store,
    /// The other end of the stream failed.
    Stream,
    /// The caller wanted it to end.
    Cancelled,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the migration stream was cut short",
            Self::Malformed => "not a valid migration stream",
            Self::Unsupported => "not supported in a checkpoint",
            Self::Limit => "over the limit",
            Self::Incomplete => "the memory is not complete",
            Self::NoImage => "no memory image",
            Self::Unfinished => "an unfinished memory image",
            Self::Damaged => "a damaged memory image",
            Self::Newer => "a memory image of a newer version",
            Self::NoSpace => "no space for the memory image",
            Self::Store => "the memory's volume failed",
            Self::Stream => "the migration stream failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// Where something is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This many bytes into the stream.
    Stream(u64),
    /// This byte of the memory's volume.
    Volume(u64),
    /// Nowhere in particular.
    Nowhere,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(at) => write!(f, ", byte {at} of the stream"),
            Self::Volume(at) => write!(f, ", byte {at} of the volume"),
            Self::Nowhere => Ok(()),
        }
    }
}

/// What went wrong, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("{kind}{place}: {what}")]
pub struct Error {
    kind: ErrorKind,
    place: Place,
    what: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, place: Place, what: impl Into<String>) -> Self {
        Self { kind, place, what: what.into(), source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A request to the memory's volume that failed.
    pub(crate) fn store(at: u64, what: &str, error: IoError) -> Self {
        let kind = match error.kind() {
            IoErrorKind::NoSpace => ErrorKind::NoSpace,
            IoErrorKind::Corrupt => ErrorKind::Damaged,
            _ => ErrorKind::Store,
        };
        Self::new(kind, Place::Volume(at), what).because(error)
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, Place::Nowhere, "the caller gave it up")
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }
}
