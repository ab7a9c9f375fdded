//! What goes over the HTTP API's wire, as JSON.
//!
//! | resource | methods |
//! | --- | --- |
//! | `/v1/store` | GET: [`StoreStatus`] |
//! | `/v1/segments` | GET: lines of [`SegmentInfo`](cdp_store::SegmentInfo), then [`Count`] |
//! | `/v1/volumes` | GET: a list of [`Volume`]; POST [`NewVolume`]: [`Volume`] |
//! | `/v1/volumes/{name}` | GET: [`Volume`]; PATCH [`VolumeChange`]: [`Volume`]; DELETE `?force=true` |
//! | `/v1/volumes/{name}/import` | POST `?logical_block_size=`, a [content stream](crate::frames): lines, then [`Volume`] |
//! | `/v1/volumes/{name}/marks` | GET: a list of [`Mark`]; POST [`NewMark`]: [`Mark`] |
//! | `/v1/volumes/{name}/marks/{label}` | DELETE |
//! | `/v1/volumes/{name}/branches` | GET: a list of [`Branch`], oldest first |
//! | `/v1/volumes/{name}/branches/{id}` | DELETE `?force=true` |
//! | `/v1/volumes/{name}/serve` | PUT [`ServeRequest`]: [`Volume`]; DELETE: [`Volume`] |
//! | `/v1/volumes/{name}/records` | GET `?from=&to=&limit=`: lines of [`Record`], then [`RecordsEnd`] |
//! | `/v1/volumes/{name}/map` | GET `?at=`: lines of [`ExtentInfo`](cdp_store::ExtentInfo), then [`MapEnd`] |
//! | `/v1/volumes/{name}/data` | GET `?at=`: a [content stream](crate::frames) |
//! | `/v1/revert` | POST [`RevertRequest`]: a list of [`Reverted`], in the request's order |
//! | `/v1/clone` | POST [`CloneRequest`]: a list of [`Volume`], in the request's order |
//! | `/v1/vms` | GET: a list of [`Vm`]; POST [`NewVm`]: [`Vm`] |
//! | `/v1/vms/{name}` | GET: [`Vm`]; PUT [`NewVm`]: [`Vm`], new or changed; DELETE `?delete_checkpoints=true` |
//! | `/v1/vms/{name}/clone` | POST [`NewVmClone`]: the new [`Vm`], which has not been started |
//! | `/v1/vms/{name}/doctor` | GET: [`Diagnosis`] |
//! | `/v1/vms/{name}/start` | POST: gives a clone's memory to the QEMU that waits for it: [`VmStarted`]; DELETE: it boots instead, and has none |
//! | `/v1/vms/{name}/supervisor` | POST: lines with [`Order`]s, for as long as the supervisor looks after QEMU; PUT [`SupervisorReport`] |
//! | `/v1/vms/{name}/schedule` | PUT [`Schedule`]: [`Vm`]; DELETE: [`Vm`] |
//! | `/v1/vms/{name}/revert` | POST [`VmRevert`]: [`VmReverted`] |
//! | `/v1/vms/{name}/taking` | DELETE: gives up the checkpoint that is being taken |
//! | `/v1/vms/{name}/checkpoints` | GET: a list of [`Checkpoint`], oldest first; POST [`NewCheckpoint`]: [`Checkpoint`], once it is complete |
//! | `/v1/vms/{name}/checkpoints/{id or label}` | GET: [`Checkpoint`]; PATCH [`CheckpointChange`]: [`Checkpoint`]; DELETE |
//! | `/v1/verify` | POST: lines with progress, then [`VerifyReport`](cdp_store::VerifyReport) |
//! | `/v1/nbd/connections` | GET: a list of [`NbdConnection`] |
//! | `/v1/metrics` | GET: Prometheus text |
//!
//! `at`, `from` and `to` take instants as [`cdp_types::Instant::parse`] does; local times are UTC here.
//! An answer in *lines* is NDJSON: one [`Line`] each, the last of which is `done` or `error`; one that stops
//! without either is incomplete. Any other refusal is an [`ApiError`] with a matching status. Sizes are
//! integers of bytes, times are given twice: exactly in nanoseconds since 1970 and readably in RFC 3339.

use std::fmt;

use cdp_store::{RecordInfo, StoreInfo, VolumeStats};
use cdp_types::{BranchId, Instant, Ordinal, Seq, VolumeId, VolumeName, one_line};
use serde::{Deserialize, Serialize};

mod history;
mod machines;

pub(crate) use history::head;
pub use history::{
    At, Branch, CloneRequest, Inherited, Mark, NewClone, NewMark, RevertRequest, RevertTarget, Reverted,
};

pub use ckpt::doctor::{Check, Verdict};
pub use machines::{
    Checkpoint, CheckpointChange, Diagnosis, Launch, ModeVerdict, NewCheckpoint, NewVm, NewVmClone, Order,
    Origin, Schedule, Supervised, SupervisorReport, Vm, VmRevert, VmReverted, VmStarted,
};

/// What a client can do about a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// What was named does not exist.
    NotFound,
    /// What was to be made exists.
    Exists,
    /// It is in use.
    Busy,
    /// The request is wrong.
    Invalid,
    /// Stored data is damaged.
    Corrupt,
    /// The operating system failed.
    Io,
    /// The store is full.
    NoSpace,
    /// Another process has the store.
    Locked,
    /// What was found is not a store that this version can use.
    Foreign,
    /// It takes no changes.
    ReadOnly,
    /// Too much is asked at once, or the daemon is stopping: try again.
    Unavailable,
    /// The daemon is at fault.
    Internal,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What can be done about it.
    pub kind: ErrorKind,
    /// What is wrong, in one line.
    pub message: String,
}

impl ApiError {
    /// A refusal of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl From<cdp_store::Error> for ApiError {
    fn from(error: cdp_store::Error) -> Self {
        use cdp_store::ErrorKind as Store;
        let kind = match error.kind() {
            Store::NotFound => ErrorKind::NotFound,
            Store::Exists => ErrorKind::Exists,
            Store::Busy => ErrorKind::Busy,
            Store::Invalid => ErrorKind::Invalid,
            Store::Corrupt => ErrorKind::Corrupt,
            Store::Io => ErrorKind::Io,
            Store::NoSpace => ErrorKind::NoSpace,
            Store::Locked => ErrorKind::Locked,
            Store::Foreign | Store::Newer => ErrorKind::Foreign,
            Store::ReadOnly => ErrorKind::ReadOnly,
            Store::Closed => ErrorKind::Unavailable,
        };
        Self::new(kind, one_line(&error))
    }
}

/// One line of an answer that takes long or is long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<T, D> {
    /// One of many results.
    Item(T),
    /// How far it has come.
    Progress(Progress),
    /// It is complete.
    Done(D),
    /// It ends here, incomplete.
    Error(ApiError),
}

/// How far something has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do in all; 0 while unknown.
    pub total_bytes: u64,
}

/// A client of the NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdConnection {
    /// Counts from 1 since the daemon was started.
    pub id: u64,
    /// Address and port, or process and user.
    pub peer: String,
    /// What it has opened; none during its handshake.
    pub export: Option<String>,
    /// Bytes that it has read.
    pub read_bytes: u64,
    /// Bytes that it has written.
    pub written_bytes: u64,
    /// Requests that it has made.
    pub requests: u64,
    /// Whether it uses TLS.
    pub tls: bool,
}

/// How many items there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Items.
    pub count: u64,
}

/// The daemon and its store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreStatus {
    /// The daemon; none when a stopped store is inspected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<DaemonStatus>,
    /// The store.
    #[serde(flatten)]
    pub store: StoreInfo,
}

/// The daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it has been ready, in RFC 3339.
    pub started: String,
}

/// A time in RFC 3339, to the nanosecond, UTC.
#[must_use]
pub fn rfc3339(time_ns: u64) -> String {
    Instant::Time(time_ns).to_string()
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Its number, which a rename keeps.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What guests address, in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// Its head branch.
    pub branch: BranchId,
    /// Its newest acknowledged change.
    pub head: Head,
    /// Whether it takes writes: `state`, and if not, `reason`.
    #[serde(flatten)]
    pub state: cdp_store::VolumeState,
    /// How it is served; none if it is not.
    pub serving: Option<Serving>,
    /// Its marks, oldest first.
    pub marks: Vec<Mark>,
    /// When it was made, in RFC 3339.
    pub created: String,
    /// The same, in nanoseconds since 1970.
    pub created_ns: u64,
    /// What it has done since the store was opened.
    pub stats: VolumeStats,
}

/// A volume's newest acknowledged change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Its place in the order of the store.
    pub seq: Seq,
    /// Its batch.
    pub ordinal: Ordinal,
    /// Up to which batch a power cut takes nothing away.
    pub durable_ordinal: Ordinal,
    /// When it was, in RFC 3339.
    pub time: String,
    /// The same, in nanoseconds since 1970.
    pub time_ns: u64,
}

/// How a volume is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The vhost-user socket.
    pub socket: String,
    /// The most queues that a guest can use.
    pub queues: u16,
    /// Whether that works: `status`, and if not, `reason`.
    #[serde(flatten)]
    pub status: ServingStatus,
}

/// Whether serving works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "status", content = "reason")]
pub enum ServingStatus {
    /// No daemon runs.
    Stopped,
    /// The socket waits for a virtual machine monitor.
    Listening,
    /// One is connected.
    Connected,
    /// The socket could not be made; it is tried again and again.
    Failed(String),
}

impl fmt::Display for ServingStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Listening => f.write_str("listening"),
            Self::Connected => f.write_str("connected"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
        }
    }
}

/// One change of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// When it was, in RFC 3339.
    pub time: String,
    /// The rest.
    #[serde(flatten)]
    pub record: RecordInfo,
}

/// What a list of records ends with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordsEnd {
    /// The instant after which they were listed; none for the beginning.
    pub from: Option<At>,
    /// The instant up to which they were listed.
    pub to: At,
    /// How many there were.
    pub count: u64,
    /// Whether there are more, which the limit cut off.
    pub more: bool,
}

/// What a map ends with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapEnd {
    /// The instant that it shows.
    pub at: At,
    /// How many extents it has.
    pub count: u64,
}

/// A volume to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// Its name.
    pub name: VolumeName,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What guests address, in bytes: 512 or 4096.
    #[serde(default = "default_block_size")]
    pub logical_block_size: u32,
}

/// The logical block size of a volume for which none was asked, in bytes.
#[must_use]
pub fn default_block_size() -> u32 {
    512
}

/// One change of a volume's properties.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeChange {
    /// Another name.
    Name(VolumeName),
    /// Another size, in bytes.
    SizeBytes(u64),
}

/// How a volume is to be served from now on, restarts included.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeRequest {
    /// Where to put the vhost-user socket: an absolute path.
    pub socket: String,
    /// The most queues that a guest can use.
    #[serde(default = "default_queues")]
    pub queues: u16,
}

fn default_queues() -> u16 {
    crate::DEFAULT_QUEUES
}
