//! Virtual machines that are registered with a store: which disks belong together, and how to reach QEMU.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use cdp_types::{CheckpointId, VmId, VmName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Store;
use crate::catalogue::{Catalogue, Change, Ledger, Stage, VmRow};
use crate::error::{Error, ErrorKind, Result};
use crate::format::MAX_MEMBERS;
use crate::volume::Volume;

/// Longest path of a QMP socket, in bytes.
const MAX_PATH_BYTES: usize = 4096;
/// How deep JSON that the store keeps for others may be nested: less than what its reader takes.
const MAX_DEPTH: usize = 32;
/// The most that one piece of such JSON may have, in bytes.
pub(super) const MAX_JSON_BYTES: usize = 64 << 10;

/// What a machine consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmSpec {
    /// Its disks, in its own order.
    pub volumes: Vec<VolumeName>,
    /// Path of its QMP socket.
    pub qmp: Option<String>,
    /// Up to 64 KiB that the store keeps and does not look into.
    pub settings: Value,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its number.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// Its disks, in its own order.
    pub volumes: Vec<VolumeName>,
    /// Path of its QMP socket.
    pub qmp: Option<String>,
    /// As given.
    pub settings: Value,
    /// The hidden volume with the images of its memory, once there is one.
    pub memory: Option<VolumeId>,
    /// The checkpoint from which it goes on: the parent of the next.
    pub current: Option<CheckpointId>,
    /// Its complete checkpoints.
    pub checkpoints: u64,
    /// When it was registered, in nanoseconds since 1970.
    pub created_ns: u64,
}

/// Refuses JSON that is too much to keep.
pub(super) fn check_json(what: &str, value: &Value) -> Result<()> {
    fn depth(value: &Value) -> usize {
        match value {
            Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
            Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }
    let bytes = serde_json::to_vec(value).map_or(usize::MAX, |text| text.len());
    if bytes > MAX_JSON_BYTES || depth(value) > MAX_DEPTH {
        let text = format!("{what}: at most {MAX_JSON_BYTES} bytes of JSON, nested at most {MAX_DEPTH} deep");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(())
}

pub(super) fn vm_row<'a>(catalogue: &'a Catalogue, name: &VmName) -> Result<&'a VmRow> {
    let found = catalogue.vms.values().find(|vm| vm.name == *name);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no machine '{name}'")))
}

impl Store {
    /// Registers a machine.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is one of that name; [`ErrorKind::NotFound`] for a volume that is not there;
    /// [`ErrorKind::Busy`] for one that belongs to another machine; [`ErrorKind::Invalid`] for too much of anything.
    pub fn create_vm(&self, name: &VmName, spec: &VmSpec) -> Result<VmInfo> {
        let mut ledger = self.ledger();
        check_vm_free(ledger.catalogue(), name)?;
        let id = ledger.catalogue().next_vm();
        let volumes = self.check_spec(&ledger, id, spec)?;
        let vm = VmRow {
            id,
            name: name.clone(),
            volumes,
            qmp: spec.qmp.clone(),
            settings: spec.settings.clone(),
            memory: None,
            current: None,
            created_ns: self.inner.shared.log.clock.stamp().time_ns,
        };
        self.commit_vm(&mut ledger, vm)
    }

    /// Gives a machine other disks, another socket, other settings: all that is in `spec`.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// As [`Store::create_vm`]; [`ErrorKind::Busy`] while a checkpoint of it is being taken, if its disks change.
    pub fn update_vm(&self, name: &VmName, spec: &VmSpec) -> Result<VmInfo> {
        let mut ledger = self.ledger();
        let old = vm_row(ledger.catalogue(), name)?.clone();
        let volumes = self.check_spec(&ledger, old.id, spec)?;
        if volumes != old.volumes {
            check_no_attempt(ledger.catalogue(), &old)?;
        }
        let vm = VmRow { volumes, qmp: spec.qmp.clone(), settings: spec.settings.clone(), ..old };
        self.commit_vm(&mut ledger, vm)
    }

    /// Gives a machine another name.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Exists`].
    pub fn rename_vm(&self, from: &VmName, to: &VmName) -> Result<VmInfo> {
        let mut ledger = self.ledger();
        let old = vm_row(ledger.catalogue(), from)?.clone();
        check_vm_free(ledger.catalogue(), to)?;
        self.commit_vm(&mut ledger, VmRow { name: to.clone(), ..old })
    }

    /// Forgets a machine, and gives the images of its memory back. Its disks stay.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] while a checkpoint of it is being taken, if it has checkpoints and
    /// they are not to be deleted, and if one of them is pinned.
    pub fn remove_vm(&self, name: &VmName, delete_checkpoints: bool) -> Result<()> {
        let mut ledger = self.ledger();
        let vm = vm_row(ledger.catalogue(), name)?.clone();
        check_no_attempt(ledger.catalogue(), &vm)?;
        let complete: Vec<_> =
            ledger.catalogue().checkpoints_of(vm.id).filter(|c| c.saved().is_some()).collect();
        if let Some(pinned) = complete.iter().find(|c| c.pinned) {
            let text = format!("checkpoint {} of machine '{name}' is pinned; unpin it first", pinned.id);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        if !complete.is_empty() && !delete_checkpoints {
            let text = format!(
                "machine '{name}' has {} checkpoints: use --delete-checkpoints, which deletes them with it, or keep it",
                complete.len()
            );
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let saved = complete.iter().filter_map(|c| c.saved()).map(|saved| saved.memory.volume);
        let memory: BTreeSet<VolumeId> = saved.chain(vm.memory).collect();
        let mut changes = vec![Change::RemoveVm { vm: vm.id }];
        changes.extend(memory.iter().map(|&volume| Change::Destroy { volume }));
        self.commit(&mut ledger, &changes)?;
        self.end_memory(&ledger, memory);
        drop(ledger);
        self.reclaim_now_or_later();
        Ok(())
    }

    /// All machines, by name.
    #[must_use]
    pub fn vms(&self) -> Vec<VmInfo> {
        let ledger = self.ledger();
        let mut infos: Vec<VmInfo> =
            ledger.catalogue().vms.values().map(|vm| describe(ledger.catalogue(), vm)).collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    /// The machine of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn vm(&self, name: &VmName) -> Result<VmInfo> {
        let ledger = self.ledger();
        vm_row(ledger.catalogue(), name).map(|vm| describe(ledger.catalogue(), vm))
    }

    fn commit_vm(&self, ledger: &mut Ledger, vm: VmRow) -> Result<VmInfo> {
        self.commit(ledger, &[Change::Vm { vm: vm.clone() }])?;
        Ok(describe(ledger.catalogue(), &vm))
    }

    /// The volumes that a machine is to have.
    fn check_spec(&self, ledger: &Ledger, vm: VmId, spec: &VmSpec) -> Result<Vec<VolumeId>> {
        check_json("a machine's settings", &spec.settings)?;
        if spec.qmp.as_ref().is_some_and(|path| path.len() > MAX_PATH_BYTES) {
            let text = format!("a socket's path has at most {MAX_PATH_BYTES} bytes");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if spec.volumes.is_empty() || spec.volumes.len() > MAX_MEMBERS {
            let text = format!("a machine has 1 to {MAX_MEMBERS} volumes, not {}", spec.volumes.len());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let mut ids = Vec::with_capacity(spec.volumes.len());
        for name in &spec.volumes {
            let visible = |row: &&crate::catalogue::VolumeRow| row.stage == Stage::Visible;
            let row = ledger.catalogue().volumes.values().filter(visible).find(|row| row.name == *name);
            let row =
                row.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no volume '{name}'")))?;
            if ids.contains(&row.id) {
                return Err(Error::new(ErrorKind::Invalid, format!("'{name}' is named twice")));
            }
            if let Some(other) = ledger.catalogue().vm_of(row.id).filter(|other| other.id != vm) {
                let text = format!("volume '{name}' belongs to machine '{}'", other.name);
                return Err(Error::new(ErrorKind::Busy, text));
            }
            ids.push(row.id);
        }
        Ok(ids)
    }

    /// A volume by its number, whoever may see it.
    pub(super) fn volume_by_id(&self, id: VolumeId) -> Result<Arc<Volume>> {
        let volumes = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
        let found = volumes.get(&id).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no volume {id}")))
    }
}

fn describe(catalogue: &Catalogue, vm: &VmRow) -> VmInfo {
    VmInfo {
        id: vm.id,
        name: vm.name.clone(),
        volumes: names(catalogue, vm.volumes.iter().copied()),
        qmp: vm.qmp.clone(),
        settings: vm.settings.clone(),
        memory: vm.memory,
        current: vm.current,
        checkpoints: catalogue.checkpoints_of(vm.id).filter(|c| c.saved().is_some()).count() as u64,
        created_ns: vm.created_ns,
    }
}

/// What volumes are called now. Those that belong to a machine, or to a checkpoint, are there.
pub(super) fn names(catalogue: &Catalogue, ids: impl Iterator<Item = VolumeId>) -> Vec<VolumeName> {
    ids.filter_map(|id| catalogue.volumes.get(&id)).map(|row| row.name.clone()).collect()
}

fn check_vm_free(catalogue: &Catalogue, name: &VmName) -> Result<()> {
    match vm_row(catalogue, name) {
        Ok(_) => Err(Error::new(ErrorKind::Exists, format!("there is a machine '{name}' already"))),
        Err(_) => Ok(()),
    }
}

/// Refuses while a checkpoint of a machine is being taken.
pub(super) fn check_no_attempt(catalogue: &Catalogue, vm: &VmRow) -> Result<()> {
    match catalogue.checkpoints_of(vm.id).find(|row| row.is_begun()) {
        Some(row) => {
            let text =
                format!("checkpoint {} of machine '{}' is being taken; abort it first", row.id, vm.name);
            Err(Error::new(ErrorKind::Busy, text))
        }
        None => Ok(()),
    }
}

/// Refuses to give up a disk that a machine or a checkpoint needs.
pub(super) fn check_not_a_member(catalogue: &Catalogue, volume: VolumeId, name: &VolumeName) -> Result<()> {
    if let Some(vm) = catalogue.vm_of(volume) {
        let text = format!("volume '{name}' belongs to machine '{}'; take it out of that first", vm.name);
        return Err(Error::new(ErrorKind::Busy, text));
    }
    let branches = catalogue.branches_of(volume);
    if let Some((row, _)) = branches.iter().find_map(|branch| catalogue.pins_of(*branch).next()) {
        let vm =
            catalogue.vms.get(&row.vm).map_or_else(String::new, |vm| format!(" of machine '{}'", vm.name));
        let text = format!("checkpoint {}{vm} needs volume '{name}'; delete it first", row.id);
        return Err(Error::new(ErrorKind::Busy, text));
    }
    Ok(())
}
