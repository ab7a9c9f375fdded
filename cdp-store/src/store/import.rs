//! Volumes that only their maker sees: one that is being filled, and a writable view of a past instant.

use std::sync::Arc;

use cdp_types::{Instant, VolumeName};

use super::{Store, VolumeSpec};
use crate::catalogue::{Change, Stage};
use crate::error::Result;
use crate::volume::Volume;

/// A volume that is being filled. Nobody can open it before [`Import::commit`]; dropping it leaves nothing behind, and
/// neither does a crash.
#[derive(Debug)]
pub struct Import {
    store: Store,
    volume: Option<Arc<Volume>>,
}

impl Store {
    /// Begins a volume that becomes visible whole or not at all.
    ///
    /// # Errors
    /// As [`Store::create_volume`].
    pub fn begin_import(&self, name: &VolumeName, spec: VolumeSpec) -> Result<Import> {
        let volume = self.add_volume(name, spec, Stage::Importing)?;
        Ok(Import { store: self.clone(), volume: Some(volume) })
    }
}

impl Import {
    /// The volume, to be written through its queues.
    ///
    /// # Panics
    /// Never: the volume is there until `commit` or `drop` takes the import itself.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        match &self.volume {
            Some(volume) => volume,
            None => unreachable!("an import is consumed by what takes its volume"),
        }
    }

    /// Makes the volume visible.
    ///
    /// 1. Sync its log. Crash: the import is cut short, the next opening removes it.
    /// 2. Record it as complete. Crash: it is there, whole.
    ///
    /// # Durability
    /// All its content, once this returns.
    ///
    /// # Errors
    /// If its log cannot be synced or the record not written; nothing is left behind then.
    pub fn commit(mut self) -> Result<()> {
        let Some(volume) = self.volume.take() else { return Ok(()) };
        let result = volume.make_durable(volume.head().ordinal).and_then(|()| {
            let mut ledger = self.store.ledger();
            self.store.change_volume(&mut ledger, &volume, Change::Import { volume: volume.id() })
        });
        if result.is_err() {
            self.volume = Some(volume);
        }
        result
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        if let Some(volume) = self.volume.take()
            && let Err(error) = self.store.remove(volume)
        {
            tracing::warn!("removing an unfinished import: {error}; the next opening will do it");
        }
    }
}

/// A writable view of a past instant, which nobody else sees. Dropping it discards what was written; so does a crash.
#[derive(Debug)]
pub struct Scratch {
    store: Store,
    volume: Option<Arc<Volume>>,
}

impl Store {
    /// Makes a writable view of an instant of a volume: a clone without a name.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn scratch(&self, source: &Arc<Volume>, instant: &Instant) -> Result<Scratch> {
        let origin = self.resolve_durably(source, instant)?;
        let mut ledger = self.ledger();
        let made = self.commit_clones(&mut ledger, &[Arc::clone(source)], &[origin], [None].into_iter())?;
        Ok(Scratch { store: self.clone(), volume: made.into_iter().next() })
    }
}

impl Scratch {
    /// The volume.
    ///
    /// # Panics
    /// Never: the volume is there until `drop`.
    #[must_use]
    pub fn volume(&self) -> &Arc<Volume> {
        match &self.volume {
            Some(volume) => volume,
            None => unreachable!("a scratch volume is there until it is dropped"),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(volume) = self.volume.take()
            && let Err(error) = self.store.remove(volume)
        {
            tracing::warn!("removing a scratch volume: {error}; the next opening will do it");
        }
    }
}
