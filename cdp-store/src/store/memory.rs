//! Memory volumes: the hidden volumes of a machine that hold the images of its memory.
//!
//! One of them is in use. Its log only grows, whatever is deleted, so once it has grown to several times the volume's size
//! the next save begins in a new one, with a whole image; the old one stays as long as a checkpoint names it. So
//! a machine of which so many checkpoints are kept takes so much space, however many were ever taken.
//!
//! A save writes only what differs from the image that the volume's head holds when it begins. So the head must always
//! hold the image from which the machine goes on: it is put back to that when a save is aborted, and when the
//! machine is reverted, by a new branch as a user's revert makes one.

use std::sync::Arc;

use cdp_types::{BlockDevice, BranchId, CheckpointId, Seq, VmName, VolumeId, VolumeName};

use super::branches::Turn;
use super::vms::{check_no_attempt, vm_row};
use super::{Store, VolumeSpec};
use crate::catalogue::{BranchState, Catalogue, Change, CheckpointRow, Ledger, Saved, Stage, VmRow};
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{Resolved, Volume};

/// A memory volume is worn, and the next image begins in a new one, once its log is so many times as large as the volume.
/// Volumes are made with room for two images, so that is after some six whole ones, or more that are not whole.
const WORN: u64 = 3;

impl Store {
    /// A machine's memory volume, made if there is none yet, and at least so large; sizes are rounded up to whole
    /// blocks. Nobody else sees it, and it goes with its machine.
    ///
    /// # Durability
    /// It is there, as large, once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] for a size that cannot be.
    pub fn memory_volume(&self, vm: &VmName, at_least_bytes: u64) -> Result<Arc<Volume>> {
        let size_bytes = at_least_bytes.max(1).next_multiple_of(cdp_types::BLOCK_SIZE);
        let mut ledger = self.ledger();
        let vm = vm_row(ledger.catalogue(), vm)?.clone();
        let Some(id) = vm.memory else {
            return self.new_memory(&mut ledger, vm, size_bytes);
        };
        let volume = self.volume_by_id(id)?;
        let row = volume.row();
        if row.size_bytes < size_bytes {
            VolumeSpec { size_bytes, logical_block_size: row.logical_block_size }.check()?;
            self.change_volume(&mut ledger, &volume, Change::Resize { volume: id, size_bytes })?;
        }
        Ok(volume)
    }

    /// Gives a machine a memory volume that holds nothing. One that it had before, and that nothing names, goes.
    fn new_memory(&self, ledger: &mut Ledger, vm: VmRow, size_bytes: u64) -> Result<Arc<Volume>> {
        let name = format!("memory-{}", vm.id).parse::<VolumeName>();
        let name = name.map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()))?;
        let spec = VolumeSpec { size_bytes, logical_block_size: cdp_types::BLOCK_SIZE as u32 };
        let old = vm.memory;
        let unnamed = old.filter(|old| !is_named(ledger.catalogue(), *old, None));
        let made = self.add_volume_with(ledger, &name, spec, Stage::Memory, |volume| {
            let vm = VmRow { memory: Some(volume), ..vm };
            let gone = unnamed.into_iter().map(|volume| Change::Destroy { volume });
            std::iter::once(Change::Vm { vm }).chain(gone).collect()
        })?;
        self.end_memory(ledger, unnamed);
        Ok(made)
    }

    /// Gives a machine a new memory volume if the log of the one that it has is much larger than an image.
    pub(super) fn replace_worn_memory(&self, ledger: &mut Ledger, vm: &VmRow) -> Result<()> {
        let Some(memory) = vm.memory.map(|id| self.volume_by_id(id)).transpose()? else { return Ok(()) };
        let size_bytes = memory.row().size_bytes;
        if memory.logged_bytes() < WORN * size_bytes {
            return Ok(());
        }
        tracing::debug!(vm = %vm.name, "the next image of its memory is a whole one, in a volume of its own");
        self.new_memory(ledger, vm.clone(), size_bytes).map(drop)
    }

    /// Ends the work of memory volumes that the catalogue has as destroyed.
    pub(super) fn end_memory(&self, ledger: &Ledger, volumes: impl IntoIterator<Item = VolumeId>) {
        for memory in volumes.into_iter().filter_map(|id| self.volume_by_id(id).ok()) {
            if let Some(row) = ledger.catalogue().volumes.get(&memory.id()) {
                memory.update_row(row.clone());
            }
            memory.end_tenure(true);
            memory.retire("nothing needs this memory any more");
        }
    }

    /// The memory of a complete checkpoint, for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such checkpoint, or it is not complete.
    pub fn checkpoint_memory(&self, checkpoint: CheckpointId) -> Result<Arc<dyn BlockDevice>> {
        let (memory, time_ns) = {
            let ledger = self.ledger();
            let row = ledger.catalogue().checkpoints.get(&checkpoint);
            let saved = row.and_then(CheckpointRow::saved);
            let saved = saved.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no complete checkpoint {checkpoint}"))
            })?;
            (saved.memory, saved.time_ns)
        };
        let at = Resolved { branch: memory.branch, seq: memory.seq, time_ns };
        self.volume_by_id(memory.volume)?.open_resolved(at)
    }

    /// Has a machine go on from another of its checkpoints, or from none: its memory volume holds that image again, or
    /// nothing, so that the next save writes what differs from it. Its disks stay as they are.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it has no such complete checkpoint; [`ErrorKind::Busy`] while a checkpoint of it is
    /// being taken, or its memory volume is in use.
    pub fn rewind_memory(&self, vm: &VmName, to: Option<CheckpointId>) -> Result<()> {
        let (turn, previous) = {
            let ledger = self.ledger();
            let row = vm_row(ledger.catalogue(), vm)?;
            let saved = to.map(|id| complete(ledger.catalogue(), row, id)).transpose()?;
            let memory = saved.map(|(_, saved)| saved.memory.volume).or(row.memory);
            let base = saved.map(memory_of);
            let turn = memory.map(|memory| self.memory_turn(ledger.catalogue(), memory, base));
            (turn.transpose()?.flatten(), row.memory)
        };
        let moved = turn.is_some();
        self.go_back(turn.as_slice(), false, &|catalogue| {
            let row = vm_row(catalogue, vm)?;
            check_no_attempt(catalogue, row)?;
            let found = to.map(|id| complete(catalogue, row, id)).transpose()?;
            let memory = found.map(|(_, saved)| saved.memory.volume).or(row.memory);
            Ok(goes_on_from(catalogue, row, found.map(|(found, _)| found.id), memory, moved))
        })?;
        self.end_destroyed_memory(previous);
        self.reclaim_now_or_later();
        Ok(())
    }

    /// Ends the work of a memory volume if it has been destroyed.
    pub(super) fn end_destroyed_memory(&self, volume: Option<VolumeId>) {
        let ledger = self.ledger();
        let destroyed = |id: &VolumeId| {
            ledger.catalogue().volumes.get(id).is_some_and(|row| row.stage == Stage::Destroyed)
        };
        self.end_memory(&ledger, volume.filter(destroyed));
    }

    /// What puts a memory volume back to where it stood, or to nothing; none if it holds just that.
    pub(super) fn memory_turn(
        &self,
        catalogue: &Catalogue,
        memory: VolumeId,
        base: Option<(BranchId, Seq)>,
    ) -> Result<Option<Turn>> {
        let volume = self.volume_by_id(memory)?;
        let first = catalogue.branches_of(memory).first().copied().unwrap_or_default();
        let (branch, seq) = base.unwrap_or((first, Seq::ZERO));
        if volume.row().branch == branch && volume.head().seq <= seq {
            return Ok(None);
        }
        let time_ns = catalogue.branches.get(&branch).map_or(0, |row| row.created_ns);
        Ok(Some(Turn { volume, to: Resolved { branch, seq, time_ns } }))
    }
}

/// What has a machine go on from a checkpoint, or from none, with that memory volume; `moved` if that gets a new branch.
/// A memory volume that it had before, and that nothing names, goes.
pub(super) fn goes_on_from(
    catalogue: &Catalogue,
    vm: &VmRow,
    checkpoint: Option<CheckpointId>,
    memory: Option<VolumeId>,
    moved: bool,
) -> Vec<Change> {
    let mut changes = Vec::new();
    if vm.memory == memory {
        changes.push(Change::VmCurrent { vm: vm.id, checkpoint });
    } else {
        let left = vm.memory.filter(|left| !is_named(catalogue, *left, None));
        changes.push(Change::Vm { vm: VmRow { memory, current: checkpoint, ..vm.clone() } });
        changes.extend(left.map(|volume| Change::Destroy { volume }));
    }
    if moved {
        changes.extend(memory.into_iter().flat_map(|memory| stale_memory(catalogue, memory, None, None)));
    }
    changes
}

/// Whether the memory of a complete checkpoint, other than one that is going, lies in a volume.
pub(super) fn is_named(catalogue: &Catalogue, memory: VolumeId, going: Option<CheckpointId>) -> bool {
    let mut others = catalogue.checkpoints.values().filter(|row| Some(row.id) != going);
    others.any(|row| row.saved().is_some_and(|saved| saved.memory.volume == memory))
}

/// Where a complete checkpoint's memory lies.
pub(super) fn memory_of((_, saved): (&CheckpointRow, &Saved)) -> (BranchId, Seq) {
    (saved.memory.branch, saved.memory.seq)
}

/// A machine's checkpoint, which must be complete.
pub(super) fn complete<'a>(
    catalogue: &'a Catalogue,
    vm: &VmRow,
    id: CheckpointId,
) -> Result<(&'a CheckpointRow, &'a Saved)> {
    let row = catalogue.checkpoints.get(&id).filter(|row| row.vm == vm.id);
    row.and_then(|row| row.saved().map(|saved| (row, saved))).ok_or_else(|| {
        let text = format!("machine '{}' has no complete checkpoint {id}", vm.name);
        Error::new(ErrorKind::NotFound, text)
    })
}

/// Which of a memory volume's branches nobody needs once a checkpoint has gone, or the head is another than now: those
/// that no other checkpoint names. What later branches inherit of them stays.
pub(super) fn stale_memory(
    catalogue: &Catalogue,
    memory: VolumeId,
    head: Option<BranchId>,
    going: Option<CheckpointId>,
) -> Vec<Change> {
    let named = |branch: BranchId| catalogue.pins_of(branch).any(|(row, _)| Some(row.id) != going);
    let stale = |branch: &BranchId| {
        let kept = catalogue.branches.get(branch).is_some_and(|row| row.state == BranchState::Kept);
        kept && Some(*branch) != head && !named(*branch)
    };
    let branches = catalogue.branches_of(memory).into_iter().filter(stale);
    branches.map(|branch| Change::DeleteBranch { branch }).collect()
}
