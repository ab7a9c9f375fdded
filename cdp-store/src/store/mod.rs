//! A store: its volumes and what can be done with them.

mod background;
mod branches;
mod checkpoints;
mod compare;
mod epochs;
mod import;
mod inspect;
mod instants;
mod marks;
#[cfg(test)]
mod meanwhile_tests;
mod memory;
mod open;
mod opening;
mod presents;
mod reclaim;
mod replay;
mod vms;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cdp_types::{Seq, VolumeId, VolumeName};

use crate::catalogue::{BranchRow, BranchState, Change, Ledger, MarkRow, Stage, VolumeRow};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Superblock;
use crate::log::LogEnd;
use crate::map::HeadMap;
use crate::options::StoreOptions;
use crate::shared::Shared;
use crate::volume::{Recovered, Serving, Volume, VolumeInfo};

pub use branches::{CloneSpec, Reverted};
pub use checkpoints::{CheckpointInfo, CheckpointSpec, VmReverted};
pub use epochs::{Epoch, EpochCut};
pub use import::{Import, Scratch};
pub use inspect::{
    Finding, RebuildReport, SegmentInfo, SegmentState, StoreInfo, VerifyProgress, VerifyReport,
};
pub use open::Seams;
pub use replay::OpeningProgress;
pub use vms::{VmInfo, VmSpec};

use background::{Background, IndexHealth};
use presents::Pass;

/// An open store. Clones are handles on the same one.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    /// Locked before `volumes`, never after it.
    ledger: Mutex<Ledger>,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Volume>>>,
    superblock: Superblock,
    options: StoreOptions,
    background: Mutex<Background>,
    /// Held while what nobody shares is given back; locked before the ledger.
    reclaiming: Mutex<()>,
    index_health: Mutex<IndexHealth>,
    pass: Mutex<Pass>,
    /// Syncs that guests' flushes had needed when zero-filling last looked.
    syncs_seen: AtomicU64,
    writable: bool,
}

/// What a new volume is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its size, in bytes: a multiple of 4096, at most 256 TiB.
    pub size_bytes: u64,
    /// What its guests address, in bytes: 512 or 4096.
    pub logical_block_size: u32,
}

/// The largest volume, in bytes: what the map's topmost nodes reach.
const MAX_VOLUME_BYTES: u64 = 256 << 40;

impl VolumeSpec {
    fn check(&self) -> Result<()> {
        let Self { size_bytes, logical_block_size } = *self;
        let text = if size_bytes == 0 || size_bytes % 4096 != 0 || size_bytes > MAX_VOLUME_BYTES {
            format!(
                "a size of {size_bytes} bytes: must be a multiple of 4096, from 4096 to {MAX_VOLUME_BYTES}"
            )
        } else if logical_block_size != 512 && logical_block_size != 4096 {
            format!("a block size of {logical_block_size} bytes: must be 512 or 4096")
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

impl Store {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.inner.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self) -> Result<()> {
        if !self.inner.writable {
            return Err(Error::new(ErrorKind::ReadOnly, "the store was opened for inspection"));
        }
        if self.inner.shared.is_closing() {
            return Err(Error::new(ErrorKind::Closed, "the store is being closed"));
        }
        Ok(())
    }

    fn commit(&self, ledger: &mut Ledger, changes: &[Change]) -> Result<()> {
        self.writable()?;
        let committed = ledger.commit(&self.inner.shared.log, changes);
        self.inner.shared.note_work();
        committed
    }

    /// Commits what takes something away from volumes: their head, or their life. If it cannot be written, only the next
    /// opening can say whether it has happened, so nothing more is acknowledged that it might take away.
    fn commit_over<'a>(
        &self,
        ledger: &mut Ledger,
        changes: &[Change],
        volumes: impl IntoIterator<Item = &'a Arc<Volume>>,
    ) -> Result<()> {
        let was_undecided = ledger.is_undecided();
        let committed = self.commit(ledger, changes);
        // A log that takes nothing any more refuses a record before it is written.
        let written = committed.as_ref().is_err_and(|error| error.kind() != ErrorKind::ReadOnly);
        if written && ledger.is_undecided() && !was_undecided {
            for volume in volumes {
                volume.stop_writes("whether it was reverted or destroyed could not be written down");
            }
        }
        committed
    }

    fn all_volumes(&self) -> Vec<Arc<Volume>> {
        let volumes = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.values().cloned().collect()
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn volume(&self, name: &VolumeName) -> Result<Arc<Volume>> {
        let found = self.all_volumes().into_iter().find(|v| {
            let row = v.row();
            row.name == *name && row.stage == Stage::Visible
        });
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no volume '{name}'")))
    }

    /// All volumes, by name. One that is being imported is not there yet.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let volumes = self.all_volumes();
        let visible = volumes.iter().filter(|v| v.row().stage == Stage::Visible);
        let mut infos: Vec<VolumeInfo> = visible.map(|v| v.describe(self.marks_of(v.id()))).collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    /// Everything there is to tell of a volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn volume_info(&self, name: &VolumeName) -> Result<VolumeInfo> {
        let volume = self.volume(name)?;
        Ok(volume.describe(self.marks_of(volume.id())))
    }

    fn marks_of(&self, volume: VolumeId) -> Vec<MarkRow> {
        self.ledger().catalogue().marks.values().filter(|m| m.volume == volume).cloned().collect()
    }

    /// Makes an empty volume; it takes no space until it is written.
    ///
    /// # Durability
    /// It is there after a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`], or [`ErrorKind::Invalid`] for a size or block size that cannot be.
    pub fn create_volume(&self, name: &VolumeName, spec: VolumeSpec) -> Result<Arc<Volume>> {
        self.add_volume(name, spec, Stage::Visible)
    }

    fn add_volume(&self, name: &VolumeName, spec: VolumeSpec, stage: Stage) -> Result<Arc<Volume>> {
        let mut ledger = self.ledger();
        self.check_free(&ledger, name)?;
        self.add_volume_with(&mut ledger, name, spec, stage, |_| Vec::new())
    }

    /// Makes a volume, and commits what else `further` wants of it in the same record.
    fn add_volume_with(
        &self,
        ledger: &mut Ledger,
        name: &VolumeName,
        spec: VolumeSpec,
        stage: Stage,
        further: impl FnOnce(VolumeId) -> Vec<Change>,
    ) -> Result<Arc<Volume>> {
        spec.check()?;
        let created_ns = self.inner.shared.log.clock.stamp().time_ns;
        let (id, branch) = (ledger.catalogue().next_volume(), ledger.catalogue().next_branch());
        let volume = VolumeRow {
            id,
            name: name.clone(),
            size_bytes: spec.size_bytes,
            logical_block_size: spec.logical_block_size,
            branch,
            created_ns,
            serving: None,
            stage,
        };
        let branch = BranchRow {
            id: branch,
            volume: id,
            parent: None,
            start: Seq::ZERO,
            created_ns,
            state: BranchState::Kept,
        };
        let mut changes = vec![Change::Create { volume: volume.clone(), branch }];
        changes.extend(further(id));
        self.commit(ledger, &changes)?;
        Ok(self.show(volume, branch))
    }

    /// Brings a volume that the catalogue has, and whose log is empty, to life.
    fn show(&self, row: VolumeRow, branch: BranchRow) -> Arc<Volume> {
        let shared = &self.inner.shared;
        shared.branches.insert(branch);
        let mut map = HeadMap::new(Seq::ZERO, branch.id, &shared.leaf_budget);
        map.switch(branch.id, branch.start);
        let end = LogEnd::EMPTY.on_branch(branch.start, branch.created_ns);
        let recovered = Recovered {
            end,
            map,
            survived: Vec::new(),
            read_only: None,
            whole_upto: None,
            claimed: None,
            reached: None,
        };
        let volume = Volume::new(Arc::clone(shared), row, recovered);
        shared.branches.own(&volume);
        let mut volumes = self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.insert(volume.id(), Arc::clone(&volume));
        volume
    }

    /// A name is taken as long as a volume has it, one that is being imported included.
    fn check_free(&self, ledger: &Ledger, name: &VolumeName) -> Result<()> {
        let has_name = |row: &&VolumeRow| matches!(row.stage, Stage::Visible | Stage::Importing);
        match ledger.catalogue().volumes.values().filter(has_name).find(|row| row.name == *name) {
            Some(row) if row.stage == Stage::Importing => {
                Err(Error::new(ErrorKind::Busy, format!("volume '{name}' is being imported")))
            }
            Some(_) => Err(Error::new(ErrorKind::Exists, format!("there is a volume '{name}' already"))),
            None => Ok(()),
        }
    }

    /// Commits a change of one volume, and shows it to the volume.
    fn change_volume(&self, ledger: &mut Ledger, volume: &Volume, change: Change) -> Result<()> {
        self.commit(ledger, &[change])?;
        if let Some(row) = ledger.catalogue().volumes.get(&volume.id()) {
            volume.update_row(row.clone());
        }
        Ok(())
    }

    /// Gives a volume another name.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Exists`].
    pub fn rename_volume(&self, from: &VolumeName, to: &VolumeName) -> Result<()> {
        let volume = self.volume(from)?;
        let mut ledger = self.ledger();
        self.check_free(&ledger, to)?;
        let change = Change::Rename { volume: volume.id(), name: to.clone() };
        self.change_volume(&mut ledger, &volume, change)
    }

    /// Makes a volume larger. A guest that has it is told.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] if it would shrink, or cannot be so large.
    pub fn resize_volume(&self, name: &VolumeName, size_bytes: u64) -> Result<()> {
        let volume = self.volume(name)?;
        let mut ledger = self.ledger();
        let row = volume.row();
        VolumeSpec { size_bytes, logical_block_size: row.logical_block_size }.check()?;
        if size_bytes < row.size_bytes {
            let text = format!("volumes do not shrink: '{name}' has {} bytes", row.size_bytes);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        self.change_volume(&mut ledger, &volume, Change::Resize { volume: volume.id(), size_bytes })
    }

    /// Remembers where a volume is served, across restarts; `None` forgets it.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn set_serving(&self, name: &VolumeName, serving: Option<Serving>) -> Result<()> {
        let volume = self.volume(name)?;
        let mut ledger = self.ledger();
        self.change_volume(&mut ledger, &volume, Change::Serve { volume: volume.id(), serving })
    }
}
