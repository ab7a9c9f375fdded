//! What the store consists of: volumes, branches, marks, virtual machines, checkpoints. The store log is the truth;
//! rows in RocksDB are derived from it, and so is the copy in memory that everything here is read from.

mod ledger;
mod machines;
mod rows;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use cdp_types::{BranchId, CheckpointId, Label, Ordinal, Seq, VmId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::index::{Family, IndexErrorKind, Kv, WriteBatch};
use crate::log::Fence;

pub use ledger::Ledger;
pub use machines::{CheckpointMode, CheckpointRow, CheckpointState, Saved, SavedMember, SavedMemory, VmRow};
pub use rows::{BranchRow, BranchState, Change, MarkRow, Stage, VolumeRow};

/// The store log's own volume number.
pub const STORE_LOG: VolumeId = VolumeId(0);
/// The row that says what the others reflect.
const POSITION_KEY: &[u8] = b"position";

/// Up to where the rows in the database reflect the store log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The last batch whose changes are in the rows.
    pub ordinal: Ordinal,
    /// Its header's checksum.
    pub crc: u32,
    /// Its segment.
    pub incarnation: u64,
    /// Its place in the segment, in bytes.
    pub offset: u64,
    /// Its time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The last `Seq` in it.
    pub seq: Seq,
}

/// The catalogue in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    /// By number; those being imported too.
    pub volumes: BTreeMap<VolumeId, VolumeRow>,
    /// By number.
    pub branches: BTreeMap<BranchId, BranchRow>,
    /// By volume and name.
    pub marks: BTreeMap<(VolumeId, Label), MarkRow>,
    /// Where volumes' logs had ended when the store was last opened.
    pub fences: BTreeMap<VolumeId, Fence>,
    /// Volumes whose space is being given back.
    pub retiring: BTreeMap<VolumeId, Vec<BranchId>>,
    /// Virtual machines, by number.
    pub vms: BTreeMap<VmId, VmRow>,
    /// Checkpoints in every state, by number.
    pub checkpoints: BTreeMap<CheckpointId, CheckpointRow>,
    last: LastNumbers,
}

/// The highest numbers that were ever given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct LastNumbers {
    volume: u64,
    branch: u64,
    vm: u64,
    checkpoint: u64,
    epoch: u64,
}

fn gone(volume: VolumeId) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the store log speaks of volume {volume}, which it never made"))
}

impl Catalogue {
    /// The next unused volume number.
    #[must_use]
    pub fn next_volume(&self) -> VolumeId {
        VolumeId(self.last.volume + 1)
    }

    /// The next unused branch number.
    #[must_use]
    pub fn next_branch(&self) -> BranchId {
        BranchId(self.last.branch + 1)
    }

    fn volume_mut(&mut self, volume: VolumeId) -> Result<&mut VolumeRow> {
        self.volumes.get_mut(&volume).ok_or_else(|| gone(volume))
    }

    /// Refuses changes that [`Catalogue::apply`] could not take in, one after the other.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with what is not there.
    pub fn check(&self, changes: &[Change]) -> Result<()> {
        let made = |made: &dyn Fn(&Change) -> bool| changes.iter().any(made);
        let volume = |id: VolumeId| {
            self.volumes.contains_key(&id)
                || made(&|change| matches!(change, Change::Create { volume, .. } if volume.id == id))
        };
        let vm = |id: VmId| {
            self.vms.contains_key(&id) || made(&|change| matches!(change, Change::Vm { vm } if vm.id == id))
        };
        for change in changes {
            let (is_there, what) = match change {
                Change::Import { volume: id }
                | Change::Rename { volume: id, .. }
                | Change::Serve { volume: id, .. }
                | Change::Resize { volume: id, .. }
                | Change::Destroy { volume: id } => (volume(*id), format!("volume {id}")),
                Change::Reclaim { volume } => (self.volumes.contains_key(volume), format!("volume {volume}")),
                Change::Revert { branch } => (volume(branch.volume), format!("volume {}", branch.volume)),
                Change::DeleteBranch { branch } | Change::ForgetBranch { branch } => {
                    (self.branches.contains_key(branch), format!("branch {branch}"))
                }
                Change::RemoveVm { vm } => (self.vms.contains_key(vm), format!("machine {vm}")),
                Change::VmCurrent { vm: id, .. } => (vm(*id), format!("machine {id}")),
                Change::Checkpoint { checkpoint } => {
                    (vm(checkpoint.vm), format!("machine {}", checkpoint.vm))
                }
                Change::ArmEpoch { checkpoint, .. }
                | Change::AbortCheckpoint { checkpoint, .. }
                | Change::EditCheckpoint { checkpoint, .. }
                | Change::DeleteCheckpoint { checkpoint } => {
                    (self.checkpoints.contains_key(checkpoint), format!("checkpoint {checkpoint}"))
                }
                Change::Generation { .. }
                | Change::Fence { .. }
                | Change::Create { .. }
                | Change::Mark { .. }
                | Change::Unmark { .. }
                | Change::Retire { .. }
                | Change::Vm { .. }
                | Change::BeginCheckpoint { .. } => continue,
            };
            if !is_there {
                return Err(Error::new(ErrorKind::NotFound, format!("there is no {what} any more")));
            }
        }
        Ok(())
    }

    /// Whether a log that is whole may give back, forget or destroy something once more that is gone: two threads of one
    /// opening could once say so of the same volume or branch.
    fn is_said_again(&self, change: &Change) -> bool {
        match change {
            Change::Destroy { volume } | Change::Reclaim { volume } => {
                !self.volumes.contains_key(volume) && volume.0 <= self.last.volume
            }
            Change::ForgetBranch { branch } => {
                !self.branches.contains_key(branch) && branch.0 <= self.last.branch
            }
            _ => false,
        }
    }

    /// Takes in one change, and adds the rows that it touches to `rows`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it speaks of something that does not exist: the log is not whole.
    pub fn apply(&mut self, change: &Change, rows: &mut WriteBatch) -> Result<()> {
        if self.is_said_again(change) {
            return Ok(());
        }
        let touched = match change {
            Change::Generation { .. } => return Ok(()),
            Change::Fence { fences } => {
                for (volume, fence) in fences {
                    put(rows, &fence_key(*volume), fence);
                    self.fences.insert(*volume, *fence);
                }
                return Ok(());
            }
            Change::Create { volume, branch } => {
                self.last.volume = self.last.volume.max(volume.id.0);
                self.last.branch = self.last.branch.max(branch.id.0);
                put(rows, &branch_key(branch.id), branch);
                self.branches.insert(branch.id, *branch);
                self.volumes.insert(volume.id, volume.clone());
                volume.id
            }
            Change::Import { volume } => {
                self.volume_mut(*volume)?.stage = Stage::Visible;
                *volume
            }
            Change::Rename { volume, name } => {
                self.volume_mut(*volume)?.name = name.clone();
                *volume
            }
            Change::Serve { volume, serving } => {
                self.volume_mut(*volume)?.serving.clone_from(serving);
                *volume
            }
            Change::Resize { volume, size_bytes } => {
                self.volume_mut(*volume)?.size_bytes = *size_bytes;
                *volume
            }
            Change::Mark { mark } => {
                put(rows, &mark_key(mark.volume, &mark.label), mark);
                self.marks.insert((mark.volume, mark.label.clone()), mark.clone());
                return Ok(());
            }
            Change::Unmark { volume, label } => {
                self.remove_marks(rows, |mark| mark.volume == *volume && mark.label == *label);
                return Ok(());
            }
            Change::Revert { branch } => {
                self.last.branch = self.last.branch.max(branch.id.0);
                put(rows, &branch_key(branch.id), branch);
                self.branches.insert(branch.id, *branch);
                self.volume_mut(branch.volume)?.branch = branch.id;
                branch.volume
            }
            Change::DeleteBranch { branch } => {
                let kept = self.inherited_upto(*branch);
                self.remove_marks(rows, |mark| {
                    mark.branch == *branch && kept.is_none_or(|kept| mark.seq > kept)
                });
                return self.set_branch_state(*branch, BranchState::Deleted, rows);
            }
            Change::ForgetBranch { branch } => {
                return self.set_branch_state(*branch, BranchState::Gone, rows);
            }
            Change::Destroy { volume } => {
                let row = self.volume_mut(*volume)?;
                row.stage = Stage::Destroyed;
                row.serving = None;
                self.remove_marks(rows, |mark| mark.volume == *volume);
                // Of those that are gone nothing is left that would have to be given back once more.
                let of_it = self.branches.values().filter(|b| b.volume == *volume);
                let kept = of_it.filter(|b| b.state == BranchState::Kept).map(|b| b.id);
                for branch in kept.collect::<Vec<_>>() {
                    self.set_branch_state(branch, BranchState::Deleted, rows)?;
                }
                *volume
            }
            Change::Reclaim { volume } => return self.reclaim(*volume, rows),
            Change::Retire { volume } => {
                for branch in self.retiring.remove(volume).unwrap_or_default() {
                    rows.delete(Family::Rows, &branch_key(branch));
                    self.branches.remove(&branch);
                }
                rows.delete(Family::Rows, &retiring_key(*volume));
                return Ok(());
            }
            machines => return self.apply_to_machines(machines, rows),
        };
        put(rows, &volume_key(touched), self.volume_mut(touched)?);
        Ok(())
    }

    fn remove_marks(&mut self, rows: &mut WriteBatch, which: impl Fn(&MarkRow) -> bool) {
        self.marks.retain(|(volume, label), mark| {
            let goes = which(mark);
            if goes {
                rows.delete(Family::Rows, &mark_key(*volume, label));
            }
            !goes
        });
    }

    fn set_branch_state(
        &mut self,
        branch: BranchId,
        state: BranchState,
        rows: &mut WriteBatch,
    ) -> Result<()> {
        let row = self.branches.get_mut(&branch).ok_or_else(|| {
            let text = format!("the store log speaks of branch {branch}, which it never made");
            Error::new(ErrorKind::Corrupt, text)
        })?;
        row.state = state;
        put(rows, &branch_key(branch), row);
        Ok(())
    }

    /// The branches of a volume, oldest first.
    #[must_use]
    pub fn branches_of(&self, volume: VolumeId) -> Vec<BranchId> {
        self.branches.values().filter(|b| b.volume == volume).map(|b| b.id).collect()
    }

    /// The last instant of a branch that another inherits.
    #[must_use]
    pub fn inherited_upto(&self, branch: BranchId) -> Option<Seq> {
        let children = self.branches.values().filter(|b| b.state != BranchState::Gone);
        children.filter_map(|b| b.parent.filter(|(parent, _)| *parent == branch)).map(|(_, fork)| fork).max()
    }

    /// Whether anything of a deleted branch is still needed: another inherits from it, or a mark or a checkpoint names
    /// an instant of it.
    #[must_use]
    pub fn is_needed(&self, branch: BranchId) -> bool {
        self.inherited_upto(branch).is_some()
            || self.marks.values().any(|mark| mark.branch == branch)
            || self.pins_of(branch).next().is_some()
    }

    /// Whether anybody outside a volume inherits from its branches, or has a mark on one of them.
    #[must_use]
    pub fn is_shared(&self, volume: VolumeId) -> bool {
        let is_of = |branch: BranchId| self.branches.get(&branch).is_some_and(|b| b.volume == volume);
        let others = self.branches.values().filter(|b| b.volume != volume && b.state != BranchState::Gone);
        let mut parents = others.filter_map(|b| b.parent);
        let mut marks = self.marks.values().filter(|mark| mark.volume != volume);
        parents.any(|(parent, _)| is_of(parent)) || marks.any(|mark| is_of(mark.branch))
    }

    fn reclaim(&mut self, volume: VolumeId, rows: &mut WriteBatch) -> Result<()> {
        self.volumes.remove(&volume).ok_or_else(|| gone(volume))?;
        rows.delete(Family::Rows, &volume_key(volume));
        rows.delete(Family::Rows, &fence_key(volume));
        self.fences.remove(&volume);
        let branches = self.branches_of(volume);
        put(rows, &retiring_key(volume), &branches);
        self.retiring.insert(volume, branches);
        Ok(())
    }

    /// Reads the catalogue back from its rows, with the position in the log that they reflect; `None` if there are
    /// none, or none that can be used: the log will say everything again.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn load(kv: &dyn Kv) -> Result<Option<(Self, Position)>> {
        let mut catalogue = Self::default();
        let mut position = None;
        let mut sound = true;
        let scanned = kv.scan(Family::Rows, &[0], &[0xff], &mut |key, value| {
            sound = catalogue.load_row(key, value, &mut position).is_ok();
            sound
        });
        match scanned {
            Err(error) if error.kind() == IndexErrorKind::Corrupt => {
                tracing::warn!("{error}; the catalogue is rebuilt from the store log");
                return Ok(None);
            }
            scanned => scanned.map_err(|e| Error::new(ErrorKind::Io, "reading the catalogue").with(e))?,
        }
        Ok(position.filter(|_| sound).map(|position| (catalogue, position)))
    }

    fn load_row(
        &mut self,
        key: &[u8],
        value: &[u8],
        position: &mut Option<Position>,
    ) -> serde_json::Result<()> {
        match key.split(|&b| b == b'/').next() {
            Some(b"volume") => {
                let row: VolumeRow = serde_json::from_slice(value)?;
                self.volumes.insert(row.id, row);
            }
            Some(b"branch") => {
                let row: BranchRow = serde_json::from_slice(value)?;
                self.branches.insert(row.id, row);
            }
            Some(b"mark") => {
                let row: MarkRow = serde_json::from_slice(value)?;
                self.marks.insert((row.volume, row.label.clone()), row);
            }
            Some(b"vm") => {
                let row: VmRow = serde_json::from_slice(value)?;
                self.vms.insert(row.id, row);
            }
            Some(b"checkpoint") => {
                let row: CheckpointRow = serde_json::from_slice(value)?;
                self.checkpoints.insert(row.id, row);
            }
            Some(b"retiring") => drop(self.retiring.insert(volume_in(key), serde_json::from_slice(value)?)),
            Some(b"fence") => drop(self.fences.insert(volume_in(key), serde_json::from_slice(value)?)),
            Some(b"position") => {
                let (at, last) = serde_json::from_slice(value)?;
                *position = Some(at);
                self.last = last;
            }
            // Of a newer version: the log has records of that kind, and nothing behind the position would show it.
            _ => return Err(serde::de::Error::custom("a row of an unknown kind")),
        }
        Ok(())
    }
}

fn volume_key(volume: VolumeId) -> Vec<u8> {
    format!("volume/{:020}", volume.0).into_bytes()
}

fn branch_key(branch: BranchId) -> Vec<u8> {
    format!("branch/{:020}", branch.0).into_bytes()
}

fn retiring_key(volume: VolumeId) -> Vec<u8> {
    format!("retiring/{:020}", volume.0).into_bytes()
}

fn fence_key(volume: VolumeId) -> Vec<u8> {
    format!("fence/{:020}", volume.0).into_bytes()
}

/// The volume in a key that ends with one.
fn volume_in(key: &[u8]) -> VolumeId {
    let number = key.rsplit(|&b| b == b'/').next().and_then(|digits| std::str::from_utf8(digits).ok());
    VolumeId(number.and_then(|digits| digits.parse().ok()).unwrap_or(0))
}

fn mark_key(volume: VolumeId, label: &Label) -> Vec<u8> {
    format!("mark/{:020}/{label}", volume.0).into_bytes()
}

fn put<T: Serialize + ?Sized>(rows: &mut WriteBatch, key: &[u8], value: &T) {
    // Rows are plain structures with string keys: there is nothing in them that JSON cannot say.
    let value = serde_json::to_vec(value).unwrap_or_default();
    rows.put(Family::Rows, key, &value);
}
