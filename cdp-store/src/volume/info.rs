//! What can be told of a volume, as plain data.

use std::collections::BTreeMap;

use cdp_types::{BranchId, Generation, Label, Ordinal, Origin, Seq, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use crate::catalogue::MarkRow;
use crate::format::EpochRecord;

/// Where a volume is served to guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serving {
    /// The vhost-user socket's path.
    pub socket: String,
    /// How many queues guests may use.
    pub queues: u16,
}

/// The acknowledged present of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// `Seq` of the last acknowledged request.
    pub seq: Seq,
    /// Ordinal of the last acknowledged batch.
    pub ordinal: Ordinal,
    /// That batch's time on the store's clock, in nanoseconds since 1970; 0 before the first write.
    pub time_ns: u64,
    /// Up to which ordinal a power cut takes nothing away.
    pub durable_ordinal: Ordinal,
}

/// A named instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkInfo {
    /// Its name.
    pub label: Label,
    /// The last request in it.
    pub seq: Seq,
    /// Its time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// On which branch it lies.
    pub branch: BranchId,
    /// What its maker has to say of it.
    pub metadata: BTreeMap<String, String>,
}

impl From<MarkRow> for MarkInfo {
    fn from(row: MarkRow) -> Self {
        let MarkRow { label, seq, time_ns, branch, metadata, volume: _ } = row;
        Self { label, seq, time_ns, branch, metadata }
    }
}

/// A branch of a volume's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchInfo {
    /// Its number.
    pub id: BranchId,
    /// Whether guests write it.
    pub head: bool,
    /// From which instant it inherits; none if it began empty.
    pub from: Option<Resolved>,
    /// The volume whose instant that is.
    pub from_volume: Option<VolumeId>,
    /// Its first instant.
    pub start: Seq,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Its last instant: the head's present, or the last before the volume was reverted.
    pub end: Resolved,
    /// Whether it was deleted: only what others inherit from it can still be opened.
    pub deleted: bool,
}

/// Whether a volume takes writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum VolumeState {
    /// It does.
    Healthy,
    /// It does not.
    ReadOnly {
        /// Why, with file and offset where something is damaged.
        reason: String,
    },
}

/// Counters since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStats {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Discards and write-zeroes.
    pub clears: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Rounds of fdatasync that served them.
    pub syncs: u64,
    /// Batches appended.
    pub batches: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Leaves of the map that were loaded from the index.
    pub leaf_loads: u64,
    /// Leaves of the map in memory now.
    pub cached_leaves: u64,
    /// Changes not yet in the time index.
    pub pending_changes: u64,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its number.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What its guests address, in bytes.
    pub logical_block_size: u32,
    /// Its head branch.
    pub branch: BranchId,
    /// Its present.
    pub head: Head,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Where it is served, if it is.
    pub serving: Option<Serving>,
    /// Its marks, oldest first.
    pub marks: Vec<MarkInfo>,
    /// Whether it takes writes.
    pub state: VolumeState,
    /// Counters.
    pub stats: VolumeStats,
}

/// An instant, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// On which branch.
    pub branch: BranchId,
    /// Everything up to and including this request.
    pub seq: Seq,
    /// Time of the last batch that lies before it as a whole, or of the branch's beginning, in nanoseconds since 1970.
    pub time_ns: u64,
}

/// One record of a volume's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordInfo {
    /// The batch's time on the store's clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The raw wall clock's time, in nanoseconds since 1970.
    pub wall_ns: u64,
    /// The request's place in the order of the store.
    pub seq: Seq,
    /// The batch.
    pub ordinal: Ordinal,
    /// What it says: `write`, `zero`, `discard`, `flush`, `cut` and so on.
    pub kind: String,
    /// Whether the guest wrote only part of the block.
    pub partial: bool,
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub block_count: u64,
    /// The request's number in the guest's in-flight region, or 0.
    pub origin: Origin,
    /// The opening of the store that wrote it.
    pub generation: Generation,
    /// The volume's term.
    pub term: u64,
    /// Incarnation of the segment.
    pub segment: u64,
    /// The batch's place in the segment, in bytes.
    pub offset: u64,
    /// What an epoch record says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<EpochRecord>,
}

/// What is known of a run of blocks at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum ExtentState {
    /// Its data lies contiguously in the log.
    Mapped {
        /// Incarnation of the segment.
        segment: u64,
        /// Where in the segment, in bytes.
        offset: u64,
    },
    /// It was zeroed or discarded.
    Zero,
    /// Nothing was ever said of it; it reads as zeroes.
    Unsaid,
}

/// A run of blocks at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentInfo {
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub block_count: u64,
    /// What is known of it.
    #[serde(flatten)]
    pub state: ExtentState,
}
