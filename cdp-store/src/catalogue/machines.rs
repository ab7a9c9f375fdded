//! Virtual machines and checkpoints: their rows, and what changes of them do to the catalogue.

use cdp_types::{BranchId, CheckpointId, EpochId, Generation, Label, Ordinal, Seq, VmId, VmName, VolumeId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Catalogue, Change, put};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Family, WriteBatch};

/// Aborted checkpoints of a machine that are remembered, so that one can see what went wrong.
const ABORTED_KEPT: usize = 16;

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRow {
    /// Its number.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// Its disks, in its own order.
    pub volumes: Vec<VolumeId>,
    /// Path of its QMP socket.
    pub qmp: Option<String>,
    /// What the store does not look into.
    pub settings: Value,
    /// The hidden volume with the images of its memory, once there is one.
    pub memory: Option<VolumeId>,
    /// The checkpoint from which it goes on: the parent of the next.
    pub current: Option<CheckpointId>,
    /// When it was registered, in nanoseconds since 1970.
    pub created_ns: u64,
}

/// How a guest's memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointMode {
    /// While the guest runs, behind write protection.
    Hot,
    /// While the guest runs, until little is left; then it stops.
    Live,
    /// While the guest is stopped.
    Pause,
}

/// A checkpoint, or an attempt to take one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRow {
    /// Its number.
    pub id: CheckpointId,
    /// Of which machine.
    pub vm: VmId,
    /// Its name, unique in the machine.
    pub label: Option<Label>,
    /// Whether nobody may delete it.
    pub pinned: bool,
    /// How it is taken.
    pub mode: CheckpointMode,
    /// The checkpoint from which the machine had gone on. It may have been deleted since.
    pub parent: Option<CheckpointId>,
    /// When it was begun, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The opening of the store that began it.
    pub generation: Generation,
    /// The newest epoch that was armed for it.
    pub epoch: Option<EpochId>,
    /// Where the machine's memory volume stood when it was begun.
    pub base: Option<(BranchId, Seq)>,
    /// What has to be undone outside the store if it is never complete; the store does not look into it.
    pub restore: Value,
    /// What became of it.
    pub state: CheckpointState,
}

/// What became of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointState {
    /// It is being taken, or whoever took it has died.
    Begun,
    /// It is complete.
    Committed(Saved),
    /// It will never be complete.
    Aborted {
        /// Why.
        reason: String,
    },
}

/// What a complete checkpoint consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The instant, for all its disks.
    pub seq: Seq,
    /// Its time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The disks, in the machine's order.
    pub members: Vec<SavedMember>,
    /// The memory.
    pub memory: SavedMemory,
    /// What it has cost; the store does not look into it.
    pub figures: Value,
}

/// A disk at a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMember {
    /// Which volume.
    pub volume: VolumeId,
    /// On which of its branches.
    pub branch: BranchId,
    /// The last `Seq` of the batch with its epoch record.
    pub seq: Seq,
    /// That batch.
    pub ordinal: Ordinal,
    /// Whether its guest relies on each write that is answered: it had turned the disk's write cache off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_cache_off: bool,
}

/// An image of a machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMemory {
    /// The memory volume.
    pub volume: VolumeId,
    /// On which of its branches.
    pub branch: BranchId,
    /// Up to which request.
    pub seq: Seq,
    /// How much of the volume the image takes, in bytes.
    pub image_bytes: u64,
}

impl CheckpointRow {
    /// What it consists of, if it is complete.
    #[must_use]
    pub fn saved(&self) -> Option<&Saved> {
        match &self.state {
            CheckpointState::Committed(saved) => Some(saved),
            CheckpointState::Begun | CheckpointState::Aborted { .. } => None,
        }
    }

    /// Whether it was begun, and nobody has said yet what became of it.
    #[must_use]
    pub fn is_begun(&self) -> bool {
        self.state == CheckpointState::Begun
    }

    /// Whether there will never be anything of it.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        matches!(self.state, CheckpointState::Aborted { .. })
    }

    /// The instants that it names, each with the branch on which it lies.
    pub fn instants(&self) -> impl Iterator<Item = (BranchId, Seq)> {
        let members = self.saved().into_iter().flat_map(|s| &s.members).map(|m| (m.branch, m.seq));
        members.chain(self.saved().map(|s| (s.memory.branch, s.memory.seq)))
    }
}

fn vm_key(vm: VmId) -> Vec<u8> {
    format!("vm/{:020}", vm.0).into_bytes()
}

fn checkpoint_key(checkpoint: CheckpointId) -> Vec<u8> {
    format!("checkpoint/{:020}", checkpoint.0).into_bytes()
}

fn unknown(what: &str, number: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the store log speaks of {what} {number}, which it never made"))
}

impl Catalogue {
    /// The next unused machine number.
    #[must_use]
    pub fn next_vm(&self) -> VmId {
        VmId(self.last.vm + 1)
    }

    /// The next unused checkpoint number.
    #[must_use]
    pub fn next_checkpoint(&self) -> CheckpointId {
        CheckpointId(self.last.checkpoint + 1)
    }

    /// The next unused epoch number.
    #[must_use]
    pub fn next_epoch(&self) -> EpochId {
        EpochId(self.last.epoch + 1)
    }

    /// A machine's checkpoints in every state, oldest first.
    pub fn checkpoints_of(&self, vm: VmId) -> impl DoubleEndedIterator<Item = &CheckpointRow> {
        self.checkpoints.values().filter(move |row| row.vm == vm)
    }

    /// The complete checkpoints that name an instant of a branch, oldest first, each with the last one that it names.
    pub fn pins_of(&self, branch: BranchId) -> impl Iterator<Item = (&CheckpointRow, Seq)> {
        self.checkpoints.values().filter_map(move |row| {
            let here = row.instants().filter(|(on, _)| *on == branch).map(|(_, seq)| seq);
            here.max().map(|seq| (row, seq))
        })
    }

    /// The machine that has a disk, or whose memory lies in it.
    #[must_use]
    pub fn vm_of(&self, volume: VolumeId) -> Option<&VmRow> {
        self.vms.values().find(|vm| vm.volumes.contains(&volume) || vm.memory == Some(volume))
    }

    /// Takes in one change of machines or checkpoints; [`Catalogue::apply`] has the rest.
    pub(super) fn apply_to_machines(&mut self, change: &Change, rows: &mut WriteBatch) -> Result<()> {
        match change {
            Change::Vm { vm } => {
                self.last.vm = self.last.vm.max(vm.id.0);
                put(rows, &vm_key(vm.id), vm);
                self.vms.insert(vm.id, vm.clone());
            }
            Change::RemoveVm { vm } => {
                self.vms.remove(vm).ok_or_else(|| unknown("machine", vm.0))?;
                rows.delete(Family::Rows, &vm_key(*vm));
                let gone: Vec<CheckpointId> = self.checkpoints_of(*vm).map(|row| row.id).collect();
                gone.into_iter().for_each(|id| self.drop_checkpoint(id, rows));
            }
            Change::VmCurrent { vm, checkpoint } => self.set_current(*vm, *checkpoint, rows)?,
            Change::BeginCheckpoint { checkpoint } => {
                self.last.checkpoint = self.last.checkpoint.max(checkpoint.id.0);
                self.put_checkpoint(checkpoint.clone(), rows);
            }
            Change::ArmEpoch { checkpoint, epoch } => {
                self.last.epoch = self.last.epoch.max(epoch.0);
                self.edit_checkpoint(*checkpoint, rows, |row| row.epoch = Some(*epoch))?;
            }
            Change::Checkpoint { checkpoint } => {
                self.put_checkpoint(checkpoint.clone(), rows);
                self.set_current(checkpoint.vm, Some(checkpoint.id), rows)?;
            }
            Change::AbortCheckpoint { checkpoint, reason } => {
                let vm = self.edit_checkpoint(*checkpoint, rows, |row| {
                    row.state = CheckpointState::Aborted { reason: reason.clone() };
                    row.restore = Value::Null;
                })?;
                self.forget_old_failures(vm, rows);
            }
            Change::EditCheckpoint { checkpoint, label, pinned } => {
                self.edit_checkpoint(*checkpoint, rows, |row| {
                    row.label.clone_from(label);
                    row.pinned = *pinned;
                })?;
            }
            Change::DeleteCheckpoint { checkpoint } => {
                let vm = self.checkpoints.get(checkpoint).map(|row| row.vm);
                let vm = vm.ok_or_else(|| unknown("checkpoint", checkpoint.0))?;
                self.drop_checkpoint(*checkpoint, rows);
                if self.vms.get(&vm).is_some_and(|vm| vm.current == Some(*checkpoint)) {
                    self.set_current(vm, None, rows)?;
                }
            }
            other => unreachable!("{other:?} is no change of machines"),
        }
        Ok(())
    }

    fn set_current(
        &mut self,
        vm: VmId,
        checkpoint: Option<CheckpointId>,
        rows: &mut WriteBatch,
    ) -> Result<()> {
        let row = self.vms.get_mut(&vm).ok_or_else(|| unknown("machine", vm.0))?;
        row.current = checkpoint;
        put(rows, &vm_key(vm), row);
        Ok(())
    }

    fn put_checkpoint(&mut self, row: CheckpointRow, rows: &mut WriteBatch) {
        put(rows, &checkpoint_key(row.id), &row);
        self.checkpoints.insert(row.id, row);
    }

    fn drop_checkpoint(&mut self, id: CheckpointId, rows: &mut WriteBatch) {
        rows.delete(Family::Rows, &checkpoint_key(id));
        self.checkpoints.remove(&id);
    }

    /// Changes a checkpoint; returns whose it is.
    fn edit_checkpoint(
        &mut self,
        id: CheckpointId,
        rows: &mut WriteBatch,
        edit: impl FnOnce(&mut CheckpointRow),
    ) -> Result<VmId> {
        let row = self.checkpoints.get_mut(&id).ok_or_else(|| unknown("checkpoint", id.0))?;
        edit(row);
        put(rows, &checkpoint_key(id), row);
        Ok(row.vm)
    }

    /// A schedule that fails every time must not fill the catalogue.
    fn forget_old_failures(&mut self, vm: VmId, rows: &mut WriteBatch) {
        let aborted = self.checkpoints_of(vm).rev().filter(|row| row.is_aborted());
        let old: Vec<CheckpointId> = aborted.skip(ABORTED_KEPT).map(|row| row.id).collect();
        old.into_iter().for_each(|id| self.drop_checkpoint(id, rows));
    }
}
