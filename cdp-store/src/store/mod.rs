//! A store: its volumes and what can be done with them.

mod background;
mod compare;
mod import;
mod inspect;
mod open;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cdp_types::{BlockDevice, Instant, Label, VolumeId, VolumeName};

use crate::catalogue::{BranchRow, Change, Ledger, MarkRow, VolumeRow};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Superblock;
use crate::index::IndexBatch;
use crate::log::LogEnd;
use crate::map::HeadMap;
use crate::options::StoreOptions;
use crate::shared::Shared;
use crate::volume::{MarkInfo, Recovered, Resolved, Serving, Volume, VolumeInfo};

pub use import::Import;
pub use inspect::{
    Finding, RebuildReport, SegmentInfo, SegmentState, StoreInfo, VerifyProgress, VerifyReport,
};
pub use open::Seams;

use background::{Background, IndexHealth};

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
    index_health: Mutex<IndexHealth>,
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
        ledger.commit(&self.inner.shared.log, changes)
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
            row.name == *name && !row.importing
        });
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no volume '{name}'")))
    }

    /// All volumes, by name. One that is being imported is not there yet.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let volumes = self.all_volumes();
        let visible = volumes.iter().filter(|v| !v.row().importing);
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
        self.add_volume(name, spec, false)
    }

    fn add_volume(&self, name: &VolumeName, spec: VolumeSpec, importing: bool) -> Result<Arc<Volume>> {
        spec.check()?;
        let mut ledger = self.ledger();
        self.check_free(&ledger, name)?;
        let shared = &self.inner.shared;
        let created_ns = shared.log.clock.stamp().wall_ns;
        let (id, branch) = (ledger.catalogue().next_volume(), ledger.catalogue().next_branch());
        let row = VolumeRow {
            id,
            name: name.clone(),
            size_bytes: spec.size_bytes,
            logical_block_size: spec.logical_block_size,
            branch,
            created_ns,
            serving: None,
            importing,
        };
        let branch = BranchRow { id: branch, volume: id, parent: None, created_ns };
        self.commit(&mut ledger, &[Change::Create { volume: row.clone(), branch }])?;
        shared.branches.write().unwrap_or_else(PoisonError::into_inner).insert(branch.id, branch);
        let map = HeadMap::new(cdp_types::Seq::ZERO, Arc::clone(&shared.leaf_budget));
        let recovered =
            Recovered { end: LogEnd::EMPTY, map, survived: Vec::new(), read_only: None, damaged: false };
        let volume = Volume::new(Arc::clone(shared), row, recovered);
        let mut volumes = self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.insert(id, Arc::clone(&volume));
        Ok(volume)
    }

    /// A name is taken as long as a volume has it, one that is being imported included.
    fn check_free(&self, ledger: &Ledger, name: &VolumeName) -> Result<()> {
        match ledger.catalogue().volumes.values().find(|row| row.name == *name) {
            Some(row) if row.importing => {
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

    /// Names the acknowledged present of a volume.
    ///
    /// # Durability
    /// The mark, and everything that it refers to, survives a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or [`ErrorKind::Exists`] if the volume has a mark of that name.
    pub fn mark(&self, name: &VolumeName, label: &Label) -> Result<MarkInfo> {
        let volume = self.volume(name)?;
        let at = volume.find(&Instant::Head, |_| None)?;
        volume.make_durable(at.seq)?;
        let mut ledger = self.ledger();
        if ledger.catalogue().marks.contains_key(&(volume.id(), label.clone())) {
            let text = format!("volume '{name}' has a mark '{label}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let Resolved { branch, seq, time_ns } = at;
        let mark = MarkRow { volume: volume.id(), label: label.clone(), branch, seq, time_ns };
        self.commit(&mut ledger, &[Change::Mark { mark }])?;
        Ok(MarkInfo { label: label.clone(), seq, time_ns })
    }

    /// Removes a volume and its history, and gives its segments back. Reads that are under way can finish.
    ///
    /// # Durability
    /// It is gone after a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if it is served and `force` is not set.
    pub fn destroy_volume(&self, name: &VolumeName, force: bool) -> Result<()> {
        let volume = self.volume(name)?;
        if volume.row().serving.is_some() && !force {
            let text = format!("volume '{name}' is served to guests; stop serving it, or use force");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.remove(&volume)
    }

    fn remove(&self, volume: &Arc<Volume>) -> Result<()> {
        let mut ledger = self.ledger();
        self.commit(&mut ledger, &[Change::Destroy { volume: volume.id() }])?;
        drop(ledger);
        volume.log().retire("the volume was destroyed");
        self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner).remove(&volume.id());
        // A write that was reported as failed may land late; a file with such a one is not used again.
        let recycle = !volume.log().had_failures();
        self.finish_reclaiming(recycle)
    }

    /// Gives back what destroyed volumes held. After a crash the next opening goes on with it.
    fn finish_reclaiming(&self, recycle: bool) -> Result<()> {
        let unfinished: Vec<VolumeId> = {
            let ledger = self.ledger();
            let importing = ledger.catalogue().volumes.values().filter(|r| r.importing).map(|r| r.id);
            let live = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
            importing.filter(|id| live.get(id).is_none_or(|v| Arc::strong_count(v) == 1)).collect()
        };
        for id in unfinished {
            // An import that nobody works on any more: it was cut short.
            self.commit(&mut self.ledger(), &[Change::Destroy { volume: id }])?;
            self.inner.volumes.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        let retiring = self.ledger().catalogue().retiring.clone();
        let shared = &self.inner.shared;
        let failed = |e| Error::new(ErrorKind::Io, "removing a destroyed volume from the index").with(e);
        for (volume, branches) in retiring {
            shared.log.segments.release(recycle, |header| header.volume == volume)?;
            let mut batch = IndexBatch::new();
            batch.forget_watermark(volume);
            shared.index.write(&batch).map_err(failed)?;
            for branch in branches {
                shared.index.drop_branch(branch).map_err(failed)?;
            }
            self.commit(&mut self.ledger(), &[Change::Retire { volume }])?;
        }
        Ok(())
    }

    /// Finds an instant of a volume's history.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such volume, mark or flush; [`ErrorKind::Invalid`] for a `Seq` in the future.
    pub fn resolve(&self, name: &VolumeName, instant: &Instant) -> Result<Resolved> {
        let volume = self.volume(name)?;
        let ledger = self.ledger();
        let marks = &ledger.catalogue().marks;
        volume.find(instant, |label| marks.get(&(volume.id(), label.clone())).cloned())
    }

    /// Opens a volume at an instant, for reading. What is read never changes, whatever is written meanwhile.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn open_at(&self, name: &VolumeName, instant: &Instant) -> Result<Arc<dyn BlockDevice>> {
        let at = self.resolve(name, instant)?;
        Ok(self.volume(name)?.open_resolved(at))
    }
}
