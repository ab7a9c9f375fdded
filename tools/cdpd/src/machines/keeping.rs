//! Which checkpoints stay, and which may go.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use cdp_store::{CheckpointState, VmInfo};
use cdp_types::{CheckpointId, VmName};

use super::{Machines, Work, busy, copies};
use crate::api::{ApiError, ErrorKind};

impl Machines {
    /// Deletes a checkpoint of a machine, unless that is being put back to one: it may be this one, without which the machine
    /// would have its old disks and no memory. So may a clone's that has not run yet.
    ///
    /// # Errors
    /// `Busy`: it is being put back, or a clone starts from it; the store's.
    pub(crate) fn delete_checkpoint(&self, vm: &VmName, id: CheckpointId) -> Result<(), ApiError> {
        let _deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_returning(vm) {
            return Err(busy(vm, &Work::Returning));
        }
        self.check_no_origin(id)?;
        Ok(self.store.delete_checkpoint(id)?)
    }

    /// Forgets a machine, and deletes its checkpoints if that is wanted.
    ///
    /// # Errors
    /// `Busy`: a clone starts from one of them; the store's.
    pub(crate) fn remove(&self, vm: &VmName, delete_checkpoints: bool) -> Result<(), ApiError> {
        let _deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        for one in self.store.checkpoints(vm)?.iter().filter(|_| delete_checkpoints) {
            self.check_no_origin(one.id)?;
        }
        self.store.remove_vm(vm, delete_checkpoints)?;
        self.firsts.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        Ok(())
    }

    /// The checkpoints from which clones start that have not run yet, each with such a clone.
    pub(crate) fn origins(&self) -> BTreeMap<CheckpointId, VmName> {
        // One that was started by other means has written to its disks since: the memory does not fit it any more.
        let origin = |info: VmInfo| Some((copies::origin(&self.store, &info).ok()?.checkpoint, info.name));
        self.store.vms().into_iter().filter_map(origin).collect()
    }

    fn check_no_origin(&self, id: CheckpointId) -> Result<(), ApiError> {
        let Some(clone) = self.origins().remove(&id) else { return Ok(()) };
        let text = format!(
            "checkpoint {id} is where machine '{clone}' starts from, a clone that has not run yet: run it (vm run {clone}; \
             without this memory with --boot), or remove it first"
        );
        Err(ApiError::new(ErrorKind::Busy, text))
    }

    /// Ends checkpoints that this daemon has begun and then could not end, for want of space perhaps. Nobody takes one, since
    /// the caller works on the machine.
    ///
    /// # Errors
    /// The store's.
    pub(crate) fn end_left(&self, vm: &VmName) -> Result<(), ApiError> {
        let unfinished: Vec<CheckpointId> =
            self.store.unfinished_checkpoints().iter().map(|one| one.id).collect();
        for one in self.store.checkpoints(vm)? {
            if one.state == CheckpointState::Begun && !unfinished.contains(&one.id) {
                self.store.abort_checkpoint(one.id, "it failed, and could not be marked as aborted then")?;
                tracing::info!(%vm, checkpoint = %one.id, "aborted: it had failed before");
            }
        }
        Ok(())
    }

    /// Looks for the checkpoint to which a machine that has been taken for it is to be put back, or makes a clone of one: a
    /// deletion that was under way has ended by then, and another one is refused.
    pub(crate) fn between_deletions<T>(&self, look: impl FnOnce() -> T) -> T {
        let _deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        look()
    }
}
