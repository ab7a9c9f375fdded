//! What the store log says: rows, and the changes that make and unmake them.

use std::collections::BTreeMap;

use cdp_types::{BranchId, CheckpointId, EpochId, Generation, Label, Seq, VmId, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use super::{CheckpointRow, VmRow};
use crate::log::Fence;
use crate::volume::Serving;

/// A volume, as the catalogue knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRow {
    /// Its number.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What its guests address, in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// Its head branch.
    pub branch: BranchId,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Where it is served to guests, if it is.
    pub serving: Option<Serving>,
    /// Who may see it.
    pub stage: Stage,
}

/// Who may see a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Everyone.
    Visible,
    /// Whoever fills it: its name is taken, and nobody else can open it yet.
    Importing,
    /// Whoever made it, for as long as that one lives: a writable view of a past instant.
    Scratch,
    /// The store itself: it holds the images of a virtual machine's memory.
    Memory,
    /// Nobody: it was destroyed, and others still share its history.
    Destroyed,
}

/// A branch. Its row is kept when its history is gone, so that no instant is mistaken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BranchRow {
    /// Its number.
    pub id: BranchId,
    /// Whose it is.
    pub volume: VolumeId,
    /// From which branch it inherits, and up to which `Seq`.
    pub parent: Option<(BranchId, Seq)>,
    /// The volume's instants from here on lie on it, until its next branch starts. After every change of the volume
    /// before; zero for the first branch of a volume that began empty.
    pub start: Seq,
    /// When it was made, on the store's clock, in nanoseconds since 1970.
    pub created_ns: u64,
    /// How much of it there is.
    pub state: BranchState,
}

/// How much of a branch there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BranchState {
    /// All of it.
    Kept,
    /// Only what other branches inherit from it: it was deleted.
    Deleted,
    /// Nothing.
    Gone,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarkRow {
    /// Whose history.
    pub volume: VolumeId,
    /// Its name.
    pub label: Label,
    /// On which branch it lies.
    pub branch: BranchId,
    /// The instant.
    pub seq: Seq,
    /// The instant's time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// What its maker has to say of it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

/// One record of the store log: a change that is not a block write. `docs/format.md`, "Store records".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// The store was opened for writing.
    Generation {
        /// The generation that the opening claimed.
        generation: Generation,
    },
    /// Where volumes' logs had ended when the store was opened. Without it, what a dead process has written
    /// would come back when it lands late and nothing has been appended meanwhile.
    Fence {
        /// Each volume's log end.
        fences: Vec<(VolumeId, Fence)>,
    },
    /// A volume and its first branch begin.
    Create {
        /// The volume.
        volume: VolumeRow,
        /// Its branch.
        branch: BranchRow,
    },
    /// An import is complete: the volume can be seen.
    Import {
        /// The volume.
        volume: VolumeId,
    },
    /// A volume has another name.
    Rename {
        /// The volume.
        volume: VolumeId,
        /// Its new name.
        name: VolumeName,
    },
    /// A volume is served somewhere, or no longer.
    Serve {
        /// The volume.
        volume: VolumeId,
        /// Where.
        serving: Option<Serving>,
    },
    /// A volume has grown.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Its new size, in bytes.
        size_bytes: u64,
    },
    /// An instant has a name.
    Mark {
        /// The mark.
        mark: MarkRow,
    },
    /// An instant has a name no longer.
    Unmark {
        /// Whose history.
        volume: VolumeId,
        /// The name.
        label: Label,
    },
    /// A volume's head is on a new branch, which begins at an earlier instant.
    Revert {
        /// The branch.
        branch: BranchRow,
    },
    /// A branch is deleted, but for what others inherit from it. Marks on what is lost go with it.
    DeleteBranch {
        /// The branch.
        branch: BranchId,
    },
    /// Nothing is left of a deleted branch.
    ForgetBranch {
        /// The branch.
        branch: BranchId,
    },
    /// A volume is gone for its users. Others may share its history.
    Destroy {
        /// The volume.
        volume: VolumeId,
    },
    /// Nobody shares a destroyed volume's history; what it held is being given back.
    Reclaim {
        /// The volume.
        volume: VolumeId,
    },
    /// What a destroyed volume held has been given back.
    Retire {
        /// The volume.
        volume: VolumeId,
    },
    /// A virtual machine is registered, or is otherwise than it was.
    Vm {
        /// The machine.
        vm: VmRow,
    },
    /// A virtual machine is known no longer; its checkpoints go with it.
    RemoveVm {
        /// The machine.
        vm: VmId,
    },
    /// A virtual machine goes on from another checkpoint, or from none that is known.
    VmCurrent {
        /// The machine.
        vm: VmId,
        /// The parent of its next checkpoint.
        checkpoint: Option<CheckpointId>,
    },
    /// Somebody begins to take a checkpoint.
    BeginCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointRow,
    },
    /// An epoch is about to be cut for a checkpoint; one that was armed before is void.
    ArmEpoch {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The epoch.
        epoch: EpochId,
    },
    /// A checkpoint is complete: everything that it names is durable.
    Checkpoint {
        /// The checkpoint.
        checkpoint: CheckpointRow,
    },
    /// A checkpoint that was begun will never be complete.
    AbortCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Why.
        reason: String,
    },
    /// A checkpoint has another label, or is pinned or no longer.
    EditCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Its label.
        label: Option<Label>,
        /// Whether it is pinned.
        pinned: bool,
    },
    /// A checkpoint is gone.
    DeleteCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointId,
    },
}
