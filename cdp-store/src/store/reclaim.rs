//! Giving back what nobody shares any more: of destroyed volumes, abandoned imports and scratch volumes, deleted
//! branches. Each step is a record of the store log or can be repeated, so that a crash at any point leaves only
//! work for the next opening.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use cdp_types::{BranchId, VolumeId, VolumeName};

use super::Store;
use super::vms::check_not_a_member;
use crate::catalogue::{BranchState, Change, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexBatch, IndexError};
use crate::lineage::flattened;
use crate::volume::Volume;

impl Store {
    /// Removes a volume. Its history stays as long as clones share it or someone reads it; then its segments are given
    /// back.
    ///
    /// # Durability
    /// It is gone after a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if it is served and `force` is not set, and if a machine has it or a
    /// checkpoint needs it.
    pub fn destroy_volume(&self, name: &VolumeName, force: bool) -> Result<()> {
        let volume = self.volume(name)?;
        if volume.row().serving.is_some() && !force {
            let text = format!("volume '{name}' is served to guests; stop serving it, or use force");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.remove(volume)
    }

    /// Ends a volume for its users.
    pub(super) fn remove(&self, volume: Arc<Volume>) -> Result<()> {
        let mut ledger = self.ledger();
        check_not_a_member(ledger.catalogue(), volume.id(), &volume.row().name)?;
        self.commit_over(&mut ledger, &[Change::Destroy { volume: volume.id() }], [&volume])?;
        if let Some(row) = ledger.catalogue().volumes.get(&volume.id()) {
            volume.update_row(row.clone());
        }
        drop(ledger);
        // What clones share of it was made durable when they were made.
        volume.end_tenure(true);
        volume.retire("the volume was destroyed");
        drop(volume);
        self.reclaim_now_or_later();
        Ok(())
    }

    /// What is deleted is deleted, whether or not its space can be given back at once.
    pub(super) fn reclaim_now_or_later(&self) {
        if let Err(error) = self.reclaim() {
            tracing::warn!("giving back what was deleted: {error}; it is tried again");
        }
    }

    /// Gives back what can be. The rest waits for its readers: the background tries again. One at a time does this: two would
    /// find the same work.
    pub(super) fn reclaim(&self) -> Result<()> {
        let _alone = self.inner.reclaiming.lock().unwrap_or_else(PoisonError::into_inner);
        self.destroy_abandoned()?;
        let mut clean = BTreeSet::new();
        // One that is gone may have been the last to share another.
        loop {
            let any = self.reclaim_volumes(&mut clean)?;
            self.retire_reclaimed(&clean)?;
            if !any {
                break;
            }
        }
        self.forget_branches()
    }

    /// Whether there is anything that waits to be given back.
    pub(super) fn has_unreclaimed(&self) -> bool {
        let ledger = self.ledger();
        let catalogue = ledger.catalogue();
        !catalogue.retiring.is_empty()
            || catalogue.volumes.values().any(|row| !matches!(row.stage, Stage::Visible | Stage::Memory))
            || catalogue.branches.values().any(|row| row.state == BranchState::Deleted)
    }

    fn live(&self, id: VolumeId) -> Option<Arc<Volume>> {
        self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Whether anybody but the store itself has a volume in hand.
    fn is_held(&self, id: VolumeId) -> bool {
        let volumes = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.get(&id).is_some_and(|volume| Arc::strong_count(volume) > 1)
    }

    /// Takes a volume out of the store, if it is there; not one that somebody else has in hand.
    fn take_unheld(&self, id: VolumeId) -> std::result::Result<Option<Arc<Volume>>, ()> {
        let mut volumes = self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner);
        match volumes.get(&id) {
            Some(volume) if Arc::strong_count(volume) > 1 => Err(()),
            _ => Ok(volumes.remove(&id)),
        }
    }

    fn in_stage(&self, stages: &[Stage]) -> Vec<VolumeId> {
        let ledger = self.ledger();
        let rows = ledger.catalogue().volumes.values();
        rows.filter(|row| stages.contains(&row.stage)).map(|row| row.id).collect()
    }

    /// Imports and scratch volumes that nobody works on any more: they were cut short.
    fn destroy_abandoned(&self) -> Result<()> {
        self.in_stage(&[Stage::Importing, Stage::Scratch])
            .into_iter()
            .try_for_each(|id| self.destroy_if_abandoned(id))
    }

    pub(super) fn destroy_if_abandoned(&self, id: VolumeId) -> Result<()> {
        let mut ledger = self.ledger();
        // Under the lock: whoever made it may have completed or removed it, and let go of it, since it was looked for.
        let row = ledger.catalogue().volumes.get(&id);
        let unfinished = row.is_some_and(|row| matches!(row.stage, Stage::Importing | Stage::Scratch));
        if !unfinished || self.is_held(id) {
            return Ok(());
        }
        let Some(volume) = self.live(id) else {
            return self.commit(&mut ledger, &[Change::Destroy { volume: id }]);
        };
        self.change_volume(&mut ledger, &volume, Change::Destroy { volume: id })?;
        volume.retire("nobody uses it any more");
        Ok(())
    }

    /// Takes destroyed volumes that nobody shares or reads out of the catalogue, and notes those whose files can be used
    /// again; says whether there was one.
    fn reclaim_volumes(&self, clean: &mut BTreeSet<VolumeId>) -> Result<bool> {
        let mut any = false;
        for id in self.in_stage(&[Stage::Destroyed]) {
            let mut ledger = self.ledger();
            let branches = ledger.catalogue().branches_of(id);
            let is_read = branches.iter().any(|branch| self.inner.shared.branches.is_held(*branch));
            if ledger.catalogue().is_shared(id) || is_read {
                continue;
            }
            // Out of the store's hands first, so that nothing of it is indexed any more.
            let Ok(gone) = self.take_unheld(id) else { continue };
            if let Err(error) = self.commit(&mut ledger, &[Change::Reclaim { volume: id }]) {
                let mut volumes = self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner);
                volumes.extend(gone.map(|volume| (id, volume)));
                return Err(error);
            }
            drop(ledger);
            self.inner.shared.branches.disown(id);
            if let Some(volume) = gone {
                volume.give_up_blank();
                // A write that was reported as failed may land late; a file with such a one is not used again.
                if !volume.log().had_failures() {
                    clean.insert(id);
                }
            }
            any = true;
        }
        Ok(any)
    }

    /// Gives back the segments and the index rows of volumes that are out of the catalogue.
    fn retire_reclaimed(&self, clean: &BTreeSet<VolumeId>) -> Result<()> {
        let retiring = self.ledger().catalogue().retiring.clone();
        let shared = &self.inner.shared;
        for (volume, branches) in retiring {
            shared.log.segments.release(volume, clean.contains(&volume), shared.log.generation)?;
            let mut batch = IndexBatch::new();
            batch.forget_watermark(volume);
            shared.index.write(&batch).map_err(failed)?;
            for branch in branches {
                shared.branches.remove(branch);
                self.drop_branch(branch)?;
            }
            self.commit(&mut self.ledger(), &[Change::Retire { volume }])?;
        }
        Ok(())
    }

    /// Drops deleted branches that nobody inherits from or reads.
    fn forget_branches(&self) -> Result<()> {
        loop {
            let ledger = self.ledger();
            let catalogue = ledger.catalogue();
            let branches = &self.inner.shared.branches;
            // What is not in the index yet of a branch would come into it when its rows have gone.
            let pends = |id: BranchId| branches.owner_of(id).is_some_and(|owner| owner.is_to_index(id));
            let free = |id: BranchId| !catalogue.is_needed(id) && !pends(id) && branches.remove(id);
            let lives =
                |id: &VolumeId| catalogue.volumes.get(id).is_some_and(|v| v.stage != Stage::Destroyed);
            let mut deleted = catalogue
                .branches
                .values()
                .filter(|row| row.state == BranchState::Deleted && lives(&row.volume) && free(row.id));
            let Some(branch) = deleted.next().map(|row| row.id) else { return Ok(()) };
            drop(ledger);
            // Its rows first: a crash in between leaves a branch that is deleted and empty, and this is done again.
            self.drop_branch(branch)?;
            self.commit(&mut self.ledger(), &[Change::ForgetBranch { branch }])?;
        }
    }

    fn drop_branch(&self, branch: BranchId) -> Result<()> {
        let shared = &self.inner.shared;
        shared.index.drop_branch(flattened(branch)).map_err(failed)?;
        shared.index.drop_branch(branch).map_err(failed)
    }
}

fn failed(error: IndexError) -> Error {
    Error::new(ErrorKind::Io, "removing what was deleted from the index").with(error)
}
