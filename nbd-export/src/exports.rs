//! What is served: the seam to whoever knows what a name means.

use std::fmt;
use std::sync::Arc;

use cdp_types::{BlockDevice, ByteRange, IoError};

/// `base:allocation`: not allocated (NBD_STATE_HOLE).
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: reads as zeroes (NBD_STATE_ZERO).
pub const STATE_ZERO: u64 = 2;
/// `qemu:dirty-bitmap:…`: changed.
pub const STATE_DIRTY: u64 = 1;

/// One line of what NBD_OPT_LIST answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportEntry {
    /// A name that [`Exports::open`] takes; at most 4096 bytes.
    pub name: String,
    /// For a person to read; may be empty.
    pub description: String,
}

/// Why an export cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportErrorKind {
    /// There is nothing of that name, or nothing any more.
    Unknown,
    /// The name is wrong in itself: it cannot be read, or means two things.
    Invalid,
    /// There is, but this client may not have it.
    Policy,
    /// There is, but not now: somebody else has it.
    Busy,
    /// The server is being stopped.
    Shutdown,
    /// Something failed that should not have.
    Failed,
}

impl fmt::Display for ExportErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "no such export",
            Self::Invalid => "invalid name",
            Self::Policy => "not allowed",
            Self::Busy => "busy",
            Self::Shutdown => "shutting down",
            Self::Failed => "failed",
        })
    }
}

/// Why an export cannot be had, with a message that the client is shown.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct ExportError {
    kind: ExportErrorKind,
    message: String,
}

impl ExportError {
    /// An error of this kind. The message goes to the client as it is, cut to 4096 bytes.
    pub fn new(kind: ExportErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What the client can do about it.
    #[must_use]
    pub fn kind(&self) -> ExportErrorKind {
        self.kind
    }

    /// What the client is told.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// All that a server serves.
///
/// Every call may block, for as long as the handshake may take; each is made on a thread of its own.
pub trait Exports: Send + Sync + 'static {
    /// What NBD_OPT_LIST answers. Names that are not in it may be opened all the same.
    ///
    /// # Errors
    /// The client is told.
    fn list(&self) -> Result<Vec<ExportEntry>, ExportError>;

    /// Opens what has this name, as it is now: a name that is an instant is resolved here, once per connection. The
    /// empty name is the default export. The name comes from the network: at most 4096 bytes of UTF-8 without NUL.
    ///
    /// # Errors
    /// The client is told.
    fn open(&self, name: &str) -> Result<Arc<dyn Export>, ExportError>;
}

/// One thing that is served, to as many connections as have opened it.
///
/// Each connection holds it from its first question about it until nothing of that connection is in flight and its
/// device queue is closed; then it is dropped, on a thread that may block.
pub trait Export: Send + Sync + 'static {
    /// Its canonical name.
    fn name(&self) -> &str;

    /// For a person to read; may be empty.
    fn description(&self) -> &str;

    /// Whose blocks are served. Its size is what it is when the connection asks; growth is seen by later ones.
    fn device(&self) -> &Arc<dyn BlockDevice>;

    /// Whether the client may write; a device that is read-only is never written to.
    fn writable(&self) -> bool;

    /// Whether a client may use several connections as one: a completed flush on one then covers what had completed
    /// on all (NBD_FLAG_CAN_MULTI_CONN).
    fn multi_conn(&self) -> bool;

    /// The names of the metadata contexts that a client is shown when it asks for all of them.
    fn contexts(&self) -> Vec<String>;

    /// The context that this query selects, or none. It is no wildcard: those are answered out of
    /// [`Export::contexts`]. May block.
    ///
    /// # Errors
    /// The client is told, and has then selected nothing.
    fn context(&self, query: &str) -> Result<Option<Arc<dyn StatusContext>>, ExportError>;
}

/// A run of bytes of the same status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Its length, in bytes.
    pub len_bytes: u64,
    /// What the context says of it, for instance [`STATE_HOLE`] and [`STATE_ZERO`].
    pub flags: u64,
}

/// Something that is known of every byte of an export, such as whether it is allocated (NBD, "Metadata querying").
pub trait StatusContext: Send + Sync + 'static {
    /// Its name: namespace, colon, leaf.
    fn name(&self) -> &str;

    /// Appends consecutive extents from the start of `range`, at most `max`, each as long as its status goes; they may
    /// end before the range does, but there must be one. May block; called from several threads.
    ///
    /// # Errors
    /// The request fails with the error's kind.
    fn extents(&self, range: ByteRange, max: usize, out: &mut Vec<StatusExtent>) -> Result<(), IoError>;
}
