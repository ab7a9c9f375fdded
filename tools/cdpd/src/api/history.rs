//! What the API says of a volume's history: marks, branches, reverts, clones.

use std::collections::BTreeMap;

use cdp_store::{MarkInfo, Resolved, Reverted as StoreReverted};
use cdp_types::{BranchId, Instant, Label, Seq, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use super::rfc3339;

/// An instant, resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct At {
    /// Every change up to and including this one.
    pub seq: Seq,
    /// When that was, in RFC 3339.
    pub time: String,
    /// The same, in nanoseconds since 1970.
    pub time_ns: u64,
    /// In which line of history.
    pub branch: BranchId,
}

impl From<Resolved> for At {
    fn from(at: Resolved) -> Self {
        Self { seq: at.seq, time: rfc3339(at.time_ns), time_ns: at.time_ns, branch: at.branch }
    }
}

/// A named instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its name.
    pub label: Label,
    /// The instant.
    #[serde(flatten)]
    pub at: At,
    /// What its maker has to say of it.
    pub metadata: BTreeMap<String, String>,
}

impl From<MarkInfo> for Mark {
    fn from(info: MarkInfo) -> Self {
        let MarkInfo { label, seq, time_ns, branch, metadata } = info;
        Self { label, at: Resolved { branch, seq, time_ns }.into(), metadata }
    }
}

/// A mark to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewMark {
    /// Its name.
    pub label: Label,
    /// The instant to be named, as [`Instant::parse`] takes it.
    #[serde(default = "head")]
    pub at: String,
    /// Anything worth keeping with it: keys that are not empty, 16 KiB in all.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

pub(crate) fn head() -> String {
    Instant::Head.to_string()
}

/// A branch of a volume's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its number.
    pub id: BranchId,
    /// Whether guests write it.
    pub head: bool,
    /// What it inherits; none if it began empty.
    pub from: Option<Inherited>,
    /// Its first instant.
    pub start: Seq,
    /// When it was made, in RFC 3339.
    pub created: String,
    /// The same, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Its last instant: the head's present, or the last before the volume was reverted.
    pub end: At,
    /// Whether it was deleted: only what others inherit from it can still be opened.
    pub deleted: bool,
}

/// What a branch inherits: the disk at this instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inherited {
    /// The volume in whose history the instant lies: another one where a clone begins.
    pub volume: VolumeId,
    /// Its name; none if it was destroyed.
    pub name: Option<VolumeName>,
    /// The instant.
    #[serde(flatten)]
    pub at: At,
}

/// Volumes to be reverted: all of them or none.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevertRequest {
    /// Which, and to what. Relative times count from one moment for all of them.
    pub volumes: Vec<RevertTarget>,
    /// Disconnect guests that use them.
    #[serde(default)]
    pub force: bool,
}

/// A volume to be reverted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevertTarget {
    /// Its name.
    pub name: VolumeName,
    /// The instant, as [`Instant::parse`] takes it.
    pub at: String,
}

/// What a revert has done to one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverted {
    /// The volume.
    pub volume: VolumeName,
    /// The instant at which it is again.
    pub at: At,
    /// Its new head branch.
    pub branch: BranchId,
    /// The new head's first instant.
    pub seq: Seq,
    /// Where it was before: reverting to this `seq` undoes the revert.
    pub undo: At,
}

impl From<StoreReverted> for Reverted {
    fn from(reverted: StoreReverted) -> Self {
        let StoreReverted { volume, at, branch, seq, undo } = reverted;
        Self { volume, at: at.into(), branch, seq, undo: undo.into() }
    }
}

/// Clones to be made: all of them or none.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// Which. Relative times count from one moment for all of them.
    pub clones: Vec<NewClone>,
}

/// A clone to be made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewClone {
    /// Whose history it shares.
    pub source: VolumeName,
    /// Up to which instant, as [`Instant::parse`] takes it.
    #[serde(default = "head")]
    pub at: String,
    /// Its name.
    pub name: VolumeName,
}
