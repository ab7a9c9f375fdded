//! Checkpoints: a machine's memory and the epoch of its disks that matches, all or nothing.
//!
//! What the store must know across a crash is that one was begun, that it is complete, or that it never will be. The
//! record that says that it is complete is written when everything that it names is durable: that is the commit point.

use cdp_types::{CheckpointId, EpochId, Instant, Label, Seq, VmId, VmName, VolumeName};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::branches::Turn;
use super::memory::{complete, goes_on_from, is_named, memory_of, stale_memory};
use super::vms::{MAX_JSON_BYTES, check_json, check_no_attempt, names, vm_row};
use super::{EpochCut, Reverted, Store};
use crate::catalogue::{
    BranchState, Catalogue, Change, CheckpointMode, CheckpointRow, CheckpointState, Ledger, Saved,
    SavedMemory,
};
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{Resolved, Volume};

/// How a checkpoint is to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSpec {
    /// How the memory is saved.
    pub mode: CheckpointMode,
    /// Its name; not a number, since numbers are ids.
    pub label: Option<Label>,
    /// Up to 64 KiB that the store keeps until it is known what becomes of the checkpoint: what has to be undone outside
    /// the store if that is nothing.
    pub restore: Value,
}

/// A checkpoint, in whatever state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its number.
    pub id: CheckpointId,
    /// Of which machine.
    pub vm: VmId,
    /// Its name.
    pub label: Option<Label>,
    /// Whether nobody may delete it.
    pub pinned: bool,
    /// How it is taken, or was.
    pub mode: CheckpointMode,
    /// The checkpoint from which the machine had gone on. It may have been deleted since.
    pub parent: Option<CheckpointId>,
    /// When it was begun, in nanoseconds since 1970.
    pub created_ns: u64,
    /// The newest epoch that was armed for it.
    pub epoch: Option<EpochId>,
    /// As given when it was begun, while it is not known what becomes of it.
    pub restore: Value,
    /// What became of it.
    pub state: CheckpointState,
    /// What its disks are called now, in the machine's order; empty if it is not complete.
    pub volumes: Vec<VolumeName>,
}

/// What a machine's revert has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReverted {
    /// Its disks.
    pub volumes: Vec<Reverted>,
    /// The checkpoint from which it had gone on before.
    pub previous: Option<CheckpointId>,
}

impl Store {
    /// Begins to take a checkpoint; a machine takes one at a time.
    ///
    /// # Durability
    /// That it was begun, and its `restore`: after a crash [`Store::unfinished_checkpoints`] has it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for the machine; [`ErrorKind::Busy`] while another one is being taken;
    /// [`ErrorKind::Exists`] if the label is taken; [`ErrorKind::Invalid`] for a label that is a number, or for too much JSON.
    pub fn begin_checkpoint(&self, vm: &VmName, spec: CheckpointSpec) -> Result<CheckpointInfo> {
        check_json("what is to be restored", &spec.restore)?;
        let mut ledger = self.ledger();
        let row = vm_row(ledger.catalogue(), vm)?.clone();
        check_no_attempt(ledger.catalogue(), &row)?;
        check_label(ledger.catalogue(), row.id, spec.label.as_ref())?;
        // 1. Crash after this: the machine's next image is a whole one, which is always right.
        self.replace_worn_memory(&mut ledger, &row)?;
        // 2. Crash after this: it was begun.
        let catalogue = ledger.catalogue();
        let vm = vm_row(catalogue, vm)?;
        let memory = vm.memory.map(|id| self.volume_by_id(id)).transpose()?;
        let checkpoint = CheckpointRow {
            id: catalogue.next_checkpoint(),
            vm: vm.id,
            label: spec.label,
            pinned: false,
            mode: spec.mode,
            parent: vm.current,
            created_ns: self.inner.shared.log.clock.stamp().time_ns,
            generation: self.inner.shared.log.generation,
            epoch: None,
            base: memory.map(|memory| (memory.row().branch, memory.head().seq)),
            restore: spec.restore,
            state: CheckpointState::Begun,
        };
        let info = describe(catalogue, &checkpoint);
        self.commit(&mut ledger, &[Change::BeginCheckpoint { checkpoint }])?;
        Ok(info)
    }

    /// The row of a checkpoint that is being taken by this opening of the store.
    pub(super) fn begun<'a>(&self, ledger: &'a Ledger, id: CheckpointId) -> Result<&'a CheckpointRow> {
        let row = row_of(ledger.catalogue(), id)?;
        if !row.is_begun() || row.generation != self.inner.shared.log.generation {
            let text = format!("checkpoint {id} is not being taken");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        Ok(row)
    }

    /// Makes a checkpoint complete. Everything of its image has been written to the memory volume, whose first
    /// `image_bytes` it is; nothing is in flight there. `figures` is up to 64 KiB that the store keeps and does not look into.
    ///
    /// 1. Sync the disks' logs up to the epoch records. Crash: it was begun, and is not complete.
    /// 2. Sync the memory volume's log. Crash: the same.
    /// 3. Commit one record that names all of it: the commit point. Crash: it is complete.
    ///
    /// # Durability
    /// The checkpoint with all that it names, once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not being taken, or the epoch was not cut for it; [`ErrorKind::Busy`] if the memory
    /// volume has writes in flight that do not end; if a log cannot be synced or the record not written. It is not
    /// complete then, and can be aborted.
    pub fn commit_checkpoint(
        &self,
        id: CheckpointId,
        cut: &EpochCut,
        image_bytes: u64,
        figures: Value,
    ) -> Result<CheckpointInfo> {
        check_json("figures", &figures)?;
        let vm = {
            let ledger = self.ledger();
            let row = self.begun(&ledger, id)?;
            if cut.checkpoint != id || row.epoch != Some(cut.epoch) {
                let text = format!("epoch {} was not cut for checkpoint {id}", cut.epoch);
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            ledger.catalogue().vms.get(&row.vm).cloned()
        };
        let memory = vm.as_ref().and_then(|vm| vm.memory).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("checkpoint {id} has no image of the memory"))
        })?;
        for member in &cut.members {
            self.volume_by_id(member.volume)?.make_durable(member.ordinal)?;
        }
        let memory = self.volume_by_id(memory)?;
        self.wait_for_acks(&memory, Seq::MAX)?;
        let (row, head) = (memory.row(), memory.head());
        if image_bytes > row.size_bytes {
            let text = format!("an image of {image_bytes} bytes in a volume of {}", row.size_bytes);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        memory.make_durable(head.ordinal)?;

        let saved = SavedMemory { volume: row.id, branch: row.branch, seq: head.seq, image_bytes };
        let (seq, time_ns, members) = (cut.seq, cut.time_ns, cut.members.clone());
        let saved = Saved { seq, time_ns, members, memory: saved, figures };
        let mut ledger = self.ledger();
        let begun = self.begun(&ledger, id)?;
        let state = CheckpointState::Committed(saved);
        let checkpoint = CheckpointRow { state, restore: Value::Null, ..begun.clone() };
        check_branches(ledger.catalogue(), &checkpoint)?;
        let info = describe(ledger.catalogue(), &checkpoint);
        self.commit(&mut ledger, &[Change::Checkpoint { checkpoint }])?;
        Ok(info)
    }

    /// Ends a checkpoint that will not be complete, one of an earlier opening too: the memory volume holds again what it
    /// held when it was begun. Whoever still writes to that gets errors.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] if it is complete or was aborted before; [`ErrorKind::Busy`] if
    /// writes to the memory volume do not end.
    pub fn abort_checkpoint(&self, id: CheckpointId, reason: &str) -> Result<()> {
        let begun = |catalogue: &Catalogue| {
            let row = row_of(catalogue, id)?;
            let text = || format!("checkpoint {id} is complete, or was aborted before");
            row.is_begun().then(|| row.clone()).ok_or_else(|| Error::new(ErrorKind::Invalid, text()))
        };
        let (memory, turn) = {
            let ledger = self.ledger();
            let row = begun(ledger.catalogue())?;
            let memory = ledger.catalogue().vms.get(&row.vm).and_then(|vm| vm.memory);
            let turn = memory.map(|memory| self.memory_turn(ledger.catalogue(), memory, row.base));
            (memory, turn.transpose()?.flatten())
        };
        let moved = turn.is_some();
        let reason: String = reason.chars().take(MAX_JSON_BYTES / 16).collect();
        self.go_back(turn.as_slice(), true, &|catalogue| {
            begun(catalogue)?;
            let mut changes = vec![Change::AbortCheckpoint { checkpoint: id, reason: reason.clone() }];
            if moved {
                changes.extend(memory.into_iter().flat_map(|m| stale_memory(catalogue, m, None, None)));
            }
            Ok(changes)
        })?;
        self.reclaim_now_or_later();
        Ok(())
    }

    /// Checkpoints that earlier openings of the store had begun, and of which nobody has said what became of them: their
    /// `restore` says what has to be undone before they are aborted.
    #[must_use]
    pub fn unfinished_checkpoints(&self) -> Vec<CheckpointInfo> {
        let ledger = self.ledger();
        let generation = self.inner.shared.log.generation;
        let orphaned = |row: &&CheckpointRow| row.is_begun() && row.generation < generation;
        let rows = ledger.catalogue().checkpoints.values().filter(orphaned);
        rows.map(|row| describe(ledger.catalogue(), row)).collect()
    }

    /// A machine's checkpoints in every state, oldest first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn checkpoints(&self, vm: &VmName) -> Result<Vec<CheckpointInfo>> {
        let ledger = self.ledger();
        let catalogue = ledger.catalogue();
        let vm = vm_row(catalogue, vm)?.id;
        Ok(catalogue.checkpoints_of(vm).map(|row| describe(catalogue, row)).collect())
    }

    /// A checkpoint, in whatever state.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn checkpoint(&self, id: CheckpointId) -> Result<CheckpointInfo> {
        let ledger = self.ledger();
        row_of(ledger.catalogue(), id).map(|row| describe(ledger.catalogue(), row))
    }

    /// A machine's checkpoint by its number or its label. The label of one that was aborted is that of another one if that
    /// has it as well.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn find_checkpoint(&self, vm: &VmName, text: &str) -> Result<CheckpointInfo> {
        let ledger = self.ledger();
        let catalogue = ledger.catalogue();
        let of = vm_row(catalogue, vm)?.id;
        let number = text.parse().ok().map(CheckpointId);
        let named = |row: &&CheckpointRow| {
            Some(row.id) == number || row.label.as_ref().is_some_and(|label| label.as_str() == text)
        };
        let found = catalogue.checkpoints_of(of).filter(named).max_by_key(|row| (!row.is_aborted(), row.id));
        found.map(|row| describe(catalogue, row)).ok_or_else(|| {
            let text: String = text.escape_debug().take(80).collect();
            Error::new(ErrorKind::NotFound, format!("machine '{vm}' has no checkpoint '{text}'"))
        })
    }

    /// Gives a checkpoint another label, or none, and pins it or no longer.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Exists`] and [`ErrorKind::Invalid`] for the label; [`ErrorKind::Invalid`] if it was
    /// aborted, and is to be pinned or to have another label: there is nothing to keep or to go back to.
    pub fn edit_checkpoint(&self, id: CheckpointId, label: Option<Label>, pinned: bool) -> Result<()> {
        let mut ledger = self.ledger();
        let row = row_of(ledger.catalogue(), id)?;
        let names = label.is_some() && row.label != label;
        if row.is_aborted() && (names || pinned && !row.pinned) {
            let text = format!("checkpoint {id} was aborted: there is nothing to keep or to go back to");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if row.label != label {
            check_label(ledger.catalogue(), row.vm, label.as_ref())?;
        }
        self.commit(&mut ledger, &[Change::EditCheckpoint { checkpoint: id, label, pinned }])
    }

    /// Deletes a checkpoint. What nothing else needs of its memory is given back.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if it is pinned or being taken.
    pub fn delete_checkpoint(&self, id: CheckpointId) -> Result<()> {
        let mut ledger = self.ledger();
        let row = row_of(ledger.catalogue(), id)?;
        if row.pinned || row.is_begun() {
            let why = if row.pinned { "is pinned; unpin it first" } else { "is being taken; abort it first" };
            return Err(Error::new(ErrorKind::Busy, format!("checkpoint {id} {why}")));
        }
        let catalogue = ledger.catalogue();
        let in_use = catalogue.vms.get(&row.vm).and_then(|vm| vm.memory);
        let memory = row.saved().map(|saved| saved.memory.volume);
        let unnamed = memory.filter(|m| Some(*m) != in_use && !is_named(catalogue, *m, Some(id)));
        let mut changes = vec![Change::DeleteCheckpoint { checkpoint: id }];
        if let Some(volume) = unnamed {
            changes.push(Change::Destroy { volume });
        } else if let Some(memory) = memory {
            let head = self.volume_by_id(memory)?.row().branch;
            changes.extend(stale_memory(catalogue, memory, Some(head), Some(id)));
        }
        self.commit(&mut ledger, &changes)?;
        self.end_memory(&ledger, unnamed);
        drop(ledger);
        self.reclaim_now_or_later();
        Ok(())
    }

    /// Puts all disks of a machine back to a checkpoint, and its memory volume to the image: the machine goes on from
    /// there, and its next checkpoint has this one as its parent. All of it happens, or nothing.
    ///
    /// # Durability
    /// As [`Store::revert`].
    ///
    /// # Errors
    /// As [`Store::revert`]; [`ErrorKind::NotFound`] if the machine has no such complete checkpoint; [`ErrorKind::Busy`]
    /// while one is being taken; [`ErrorKind::Invalid`] if the machine has other disks now.
    pub fn revert_vm(&self, vm: &VmName, to: CheckpointId, force: bool) -> Result<VmReverted> {
        self.writable()?;
        let check = |catalogue: &Catalogue| {
            let row = vm_row(catalogue, vm)?.clone();
            let (checkpoint, saved) = complete(catalogue, &row, to)?;
            check_no_attempt(catalogue, &row)?;
            let members = saved.members.iter().map(|m| m.volume);
            if !members.clone().eq(row.volumes.iter().copied()) {
                let had = names(catalogue, members);
                let had: Vec<&str> = had.iter().map(VolumeName::as_str).collect();
                let text =
                    format!("machine '{vm}' has other disks than at checkpoint {to}: {}", had.join(", "));
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            Ok((row, saved.clone(), memory_of((checkpoint, saved))))
        };
        let (row, saved, memory) = check(self.ledger().catalogue())?;
        let mut turns = Vec::with_capacity(saved.members.len() + 1);
        for member in &saved.members {
            let volume = self.volume_by_id(member.volume)?;
            if let Some((_, why)) = volume.refusal() {
                let text = format!("volume '{}': {why}", volume.row().name);
                return Err(Error::new(ErrorKind::ReadOnly, text));
            }
            let to = Resolved { branch: member.branch, seq: member.seq, time_ns: saved.time_ns };
            turns.push(Turn { volume, to });
        }
        let memory = self.memory_turn(self.ledger().catalogue(), saved.memory.volume, Some(memory))?;
        let moved = memory.is_some();
        turns.extend(memory);
        let mut volumes = self.go_back(&turns, force, &|catalogue| {
            let (row, saved, _) = check(catalogue)?;
            Ok(goes_on_from(catalogue, &row, Some(to), Some(saved.memory.volume), moved))
        })?;
        volumes.truncate(saved.members.len());
        self.end_destroyed_memory(row.memory);
        self.reclaim_now_or_later();
        Ok(VmReverted { volumes, previous: row.current })
    }
}

fn row_of(catalogue: &Catalogue, id: CheckpointId) -> Result<&CheckpointRow> {
    let row = catalogue.checkpoints.get(&id);
    row.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no checkpoint {id}")))
}

/// A label is nobody else's, and no number. That of an aborted checkpoint is free.
fn check_label(catalogue: &Catalogue, vm: VmId, label: Option<&Label>) -> Result<()> {
    let Some(label) = label else { return Ok(()) };
    if label.as_str().bytes().all(|b| b.is_ascii_digit()) {
        let text = format!("'{label}' would be taken for a checkpoint's number");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    match catalogue
        .checkpoints_of(vm)
        .filter(|row| !row.is_aborted())
        .find(|row| row.label.as_ref() == Some(label))
    {
        Some(row) => {
            let text = format!("checkpoint {} has the label '{label}' already", row.id);
            Err(Error::new(ErrorKind::Exists, text))
        }
        None => Ok(()),
    }
}

/// Nothing that a checkpoint is to name was deleted while it was taken.
fn check_branches(catalogue: &Catalogue, row: &CheckpointRow) -> Result<()> {
    let lost = |branch| catalogue.branches.get(&branch).is_none_or(|b| b.state != BranchState::Kept);
    match row.instants().find(|(branch, _)| lost(*branch)) {
        Some((branch, _)) => {
            let text = format!("branch {branch} was deleted while checkpoint {} was taken", row.id);
            Err(Error::new(ErrorKind::Invalid, text))
        }
        None => Ok(()),
    }
}

fn describe(catalogue: &Catalogue, row: &CheckpointRow) -> CheckpointInfo {
    let members = row.saved().into_iter().flat_map(|saved| &saved.members).map(|m| m.volume);
    CheckpointInfo {
        id: row.id,
        vm: row.vm,
        label: row.label.clone(),
        pinned: row.pinned,
        mode: row.mode,
        parent: row.parent,
        created_ns: row.created_ns,
        epoch: row.epoch,
        restore: row.restore.clone(),
        state: row.state.clone(),
        volumes: names(catalogue, members),
    }
}

/// Where an epoch lies in a volume's history.
///
/// # Errors
/// [`ErrorKind::NotFound`] if no complete checkpoint of the volume's machine has it, with what is nearest.
pub(super) fn find_epoch(catalogue: &Catalogue, volume: &Volume, epoch: EpochId) -> Result<Resolved> {
    let member = |row: &CheckpointRow| {
        let saved = row.saved()?;
        let member = saved.members.iter().find(|m| m.volume == volume.id())?;
        Some(Resolved { branch: member.branch, seq: member.seq, time_ns: saved.time_ns })
    };
    let row = catalogue.checkpoints.values().find(|row| row.epoch == Some(epoch));
    if let Some(found) = row.and_then(member) {
        return Ok(found);
    }
    let name = volume.row().name;
    let why = match row.map(|row| &row.state) {
        Some(CheckpointState::Begun) => format!("epoch {epoch} belongs to a checkpoint that is not complete"),
        Some(CheckpointState::Aborted { reason }) => format!("epoch {epoch} was aborted ({reason})"),
        Some(CheckpointState::Committed(_)) | None => format!("volume '{name}' has no epoch {epoch}"),
    };
    let valid =
        catalogue.checkpoints.values().filter(|row| member(row).is_some()).filter_map(|row| row.epoch);
    let near = valid.min_by_key(|valid| (valid.0.abs_diff(epoch.0), valid.0));
    let near =
        near.map_or("it has none".to_owned(), |near| format!("the nearest is {}", Instant::Epoch(near)));
    Err(Error::new(ErrorKind::NotFound, format!("{why}; {near}")))
}
