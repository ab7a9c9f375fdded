//! Epochs: one cut across all disks of a machine.
//!
//! An epoch is *armed* while the machine runs, which makes its number durable and gets the logs ready, and *cut* when
//! nothing is in flight on any of its disks: by the front end, inside the stop of the last ring, while QEMU waits. So
//! cutting neither syncs nor waits for any background work. What was cut counts only once a checkpoint is committed
//! that names it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use cdp_types::{BranchId, CheckpointId, EpochId, Ordinal, Seq, VmId, VolumeId};

use super::Store;
use super::inspect::{Finding, VerifyReport};
use crate::catalogue::{Catalogue, Change, SavedMember};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{EpochMember, EpochRecord};
use crate::log::{BatchAt, LogState};
use crate::volume::{PlacedEpoch, Volume};

/// A volume that is ready for an epoch record, for as long as this lives.
struct Armed {
    volume: Arc<Volume>,
    branch: BranchId,
}

impl Drop for Armed {
    fn drop(&mut self) {
        self.volume.disarm();
    }
}

/// An epoch that is armed. It can be cut once; dropping it ends that.
pub struct Epoch {
    record: EpochRecord,
    members: Vec<Armed>,
    used: AtomicBool,
}

impl Epoch {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> EpochId {
        self.record.epoch
    }

    /// The checkpoint that it is cut for.
    #[must_use]
    pub fn checkpoint(&self) -> CheckpointId {
        self.record.checkpoint
    }

    /// The disks that will be cut, in the machine's order.
    #[must_use]
    pub fn members(&self) -> &[EpochMember] {
        &self.record.members
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({:?})", self.record)
    }
}

/// An epoch that was cut: every member's log has its record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EpochCut {
    /// Its number.
    pub epoch: EpochId,
    /// Whose disks.
    pub vm: VmId,
    /// The checkpoint that it was cut for.
    pub checkpoint: CheckpointId,
    /// The instant, for all members: none has anything between its own record and this.
    pub seq: Seq,
    /// Its time on the store's clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Where it lies in the disks' logs, in the machine's order. How a guest has its write cache is not known here: it is
    /// for whoever cuts to add.
    pub members: Vec<SavedMember>,
}

impl Store {
    /// Arms an epoch over all disks of the machine of which a checkpoint was begun. Whatever was armed for that
    /// checkpoint before is void. Blocks for a few syncs.
    ///
    /// # Durability
    /// Its number: none is given out twice, whatever happens.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the checkpoint is not being taken; [`ErrorKind::ReadOnly`], [`ErrorKind::NoSpace`] or
    /// [`ErrorKind::Busy`] if one of the disks takes no writes now.
    pub fn new_epoch(&self, checkpoint: CheckpointId) -> Result<Epoch> {
        let (vm, ids) = {
            let ledger = self.ledger();
            let row = self.begun(&ledger, checkpoint)?;
            let vm = ledger.catalogue().vms.get(&row.vm);
            (row.vm, vm.map(|vm| vm.volumes.clone()).unwrap_or_default())
        };
        let mut members = Vec::with_capacity(ids.len());
        for id in ids {
            let volume = self.volume_by_id(id)?;
            let branch = volume.arm()?;
            members.push(Armed { volume, branch });
        }
        let named = members.iter().map(|m| EpochMember { volume: m.volume.id(), branch: m.branch }).collect();
        let mut ledger = self.ledger();
        self.begun(&ledger, checkpoint)?;
        let epoch = ledger.catalogue().next_epoch();
        self.commit(&mut ledger, &[Change::ArmEpoch { checkpoint, epoch }])?;
        drop(ledger);
        let record = EpochRecord { epoch, vm, checkpoint, members: named };
        Ok(Epoch { record, members, used: AtomicBool::new(false) })
    }

    /// Cuts an epoch: appends its record to the log of each member. No request may be in flight on any of them. Takes
    /// as long as one small write for each member; syncs nothing, and waits neither for RocksDB nor for background
    /// work (unless a write fails: then that log's tail is cut).
    ///
    /// 1. Lock the members' logs, in the order of their volumes. Nothing is appended to any of them until all records
    ///    have their places.
    /// 2. Place all records. Crash: none is there, or some: an epoch counts only through its checkpoint.
    /// 3. Unlock, and write them.
    ///
    /// # Durability
    /// None, until [`Store::commit_checkpoint`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it was cut before, or a member was reverted since it was armed; [`ErrorKind::Busy`] if
    /// a member has writes in flight or no segment at hand; [`ErrorKind::ReadOnly`] if one takes no writes; what the
    /// operating system says of a write. The epoch is void then, and another can be armed.
    pub fn cut_epoch(&self, epoch: &Epoch) -> Result<EpochCut> {
        self.writable()?;
        if epoch.used.swap(true, Ordering::AcqRel) {
            return Err(Error::new(ErrorKind::Invalid, format!("epoch {} was cut before", epoch.id())));
        }
        let void = |e: Error| {
            let text = format!("epoch {} is void: {e}", epoch.id());
            Error::new(e.kind(), text)
        };
        let (placed, members, time_ns) = place_all(epoch).map_err(void)?;
        let mut result = Ok(());
        for (member, placed) in epoch.members.iter().zip(&placed) {
            // Those behind one that failed are written all the same: their logs have given them a place.
            let written = placed.as_ref().map(|placed| member.volume.write_epoch(placed));
            result = result.and(written.unwrap_or(Ok(())));
        }
        result.map_err(void)?;
        let members = members.map_err(void)?;
        let seq = members.iter().map(|m| m.seq).max().unwrap_or(Seq::ZERO);
        let EpochRecord { epoch, vm, checkpoint, .. } = epoch.record;
        Ok(EpochCut { epoch, vm, checkpoint, seq, time_ns, members })
    }
}

/// Records that have a place, by member, with what the cut is to be or why it is none; and its time.
type Placed = (Vec<Option<PlacedEpoch>>, Result<Vec<SavedMember>>, u64);

/// Gives all records their places. Those that have one must be written, even if another has none.
fn place_all(epoch: &Epoch) -> Result<Placed> {
    let mut order: Vec<usize> = (0..epoch.members.len()).collect();
    order.sort_by_key(|&index| epoch.members[index].volume.id());
    let mut logs: Vec<(usize, MutexGuard<'_, LogState>)> =
        order.into_iter().map(|index| (index, epoch.members[index].volume.log())).collect();
    for (index, log) in &logs {
        let Armed { volume, branch } = &epoch.members[*index];
        if let Some(obstacle) = volume.epoch_obstacle(log, *branch) {
            return Err(obstacle);
        }
    }
    let mut placed: Vec<Option<PlacedEpoch>> = epoch.members.iter().map(|_| None).collect();
    let mut members: Vec<(usize, SavedMember)> = Vec::with_capacity(logs.len());
    let (mut outcome, mut time_ns) = (Ok(()), 0);
    for (index, log) in &mut logs {
        let Armed { volume, branch } = &epoch.members[*index];
        match volume.place_epoch(log, &epoch.record) {
            Ok(record) => {
                let (seq, placed_ns) = log.last_placed().unwrap_or_default();
                let (volume, branch, ordinal) = (volume.id(), *branch, record.ordinal());
                let member = SavedMember { volume, branch, seq, ordinal, write_cache_off: false };
                members.push((*index, member));
                time_ns = time_ns.max(placed_ns);
                placed[*index] = Some(record);
            }
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    members.sort_by_key(|(index, _)| *index);
    let members = outcome.map(|()| members.into_iter().map(|(_, member)| member).collect());
    Ok((placed, members, time_ns))
}

/// The epoch records that a verification has come across.
#[derive(Debug, Default)]
pub(super) struct FoundEpochs(BTreeSet<(VolumeId, Ordinal, EpochId)>);

impl FoundEpochs {
    /// Notes what a batch says of epochs.
    pub(super) fn note(&mut self, volume: VolumeId, batch: &BatchAt, report: &mut VerifyReport) {
        match batch.header.epoch() {
            Ok(epoch) => self.0.extend(epoch.map(|e| (volume, batch.header.ordinal, e.epoch))),
            Err(error) => {
                let (file, offset) = (batch.segment.file.name().to_owned(), batch.header.place.offset);
                let what =
                    format!("batch {}: its epoch record cannot be read: {error}", batch.header.ordinal);
                report.findings.push(Finding { volume, file, offset, what });
            }
        }
    }

    /// Whether every complete checkpoint has its records, in the logs of all its disks.
    pub(super) fn check(&self, catalogue: &Catalogue, report: &mut VerifyReport) {
        for row in catalogue.checkpoints.values() {
            let (Some(epoch), Some(saved)) = (row.epoch, row.saved()) else { continue };
            for member in &saved.members {
                if !self.0.contains(&(member.volume, member.ordinal, epoch)) {
                    let what = format!(
                        "checkpoint {}: batch {} of the log has no record of epoch {epoch}",
                        row.id, member.ordinal
                    );
                    let volume = member.volume;
                    report.findings.push(Finding { volume, file: String::new(), offset: 0, what });
                }
            }
        }
    }
}
