//! Making and opening a store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cdp_types::Generation;

use super::Store;
use super::opening::{Mode, Opening};
use super::replay::OpeningProgress;
use crate::clock::{Clock, SystemClock};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{FormatError, SUPERBLOCK_LEN, Superblock};
use crate::index::{Kv, RocksKv, RocksOptions};
use crate::options::StoreOptions;
use crate::reach;
use crate::segments;
use crate::storage::uring::DirectoryStorage;
use crate::storage::{AlignedBuf, File, Storage};

pub(super) const SUPERBLOCK: &str = "superblock";
/// Where the time index lies, relative to the store.
pub(super) const INDEX_DIRECTORY: &str = "index";
/// Where the catalogue's database lies, relative to the store.
pub(super) const CATALOGUE_DIRECTORY: &str = "catalogue";

/// What a store stands on: the real thing, or a simulation.
#[derive(Clone, Debug)]
pub struct Seams {
    /// Files.
    pub storage: Arc<dyn Storage>,
    /// The time index's database.
    pub index: Arc<dyn Kv>,
    /// The catalogue's database: its writes are durable when they return.
    pub catalogue: Arc<dyn Kv>,
    /// Clocks.
    pub clock: Arc<dyn Clock>,
    /// Random segment secrets.
    pub secrets: fn() -> u64,
    /// A directory in memory for notes of how far each log was written, which spare a killed store's next opening some
    /// reading. None is fine.
    pub reach: Option<PathBuf>,
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without entropy nothing on this machine is safe; a fixed secret only weakens the search for damage.
    if getrandom::fill(&mut bytes).is_err() {
        tracing::warn!("the operating system gives no random numbers; segment secrets are weak");
    }
    u64::from_le_bytes(bytes)
}

impl Store {
    /// Makes an empty store in a directory that is missing or empty.
    ///
    /// # Durability
    /// The store is there after a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is something in the directory already; otherwise what the operating system says.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<()> {
        let at = dir.display();
        std::fs::create_dir_all(dir).map_err(|e| Error::io(format!("making {at}"), e))?;
        let entries = std::fs::read_dir(dir).map_err(|e| Error::io(format!("reading {at}"), e))?;
        if entries.flatten().any(|entry| !Self::tolerates(&entry.file_name())) {
            return Err(Error::new(ErrorKind::Exists, format!("{at} is not empty")));
        }
        let storage = DirectoryStorage::open(dir).map_err(|e| Error::io(format!("opening {at}"), e))?;
        Self::create_on(&storage, &SystemClock, options)
    }

    /// Whether a store can be made in a directory that holds a file of this name: what a fresh file system brings along,
    /// or a configuration that was put there first.
    #[must_use]
    pub fn tolerates(name: &std::ffi::OsStr) -> bool {
        name == "lost+found" || name == "cdpd.toml"
    }

    /// The same on any storage.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_on(storage: &dyn Storage, clock: &dyn Clock, options: &StoreOptions) -> Result<()> {
        let size = options.segment_bytes;
        if !size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&size) {
            let text = format!("segments of {size} bytes: must be a power of two from 1 MiB to 256 MiB");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let failed = |e| Error::io("making the store", e);
        storage.create_directory(segments::DIRECTORY).map_err(failed)?;
        let superblock = Superblock {
            store: *uuid::Uuid::new_v4().as_bytes(),
            generation: Generation(0),
            segment_bytes: size,
            created_ns: clock.wall_ns(),
        };
        let file = storage.create(SUPERBLOCK).map_err(failed)?;
        for slot in 0..2 {
            write_slot(storage, &*file, slot, &superblock)?;
        }
        file.sync().map_err(failed)?;
        storage.sync_directory("").map_err(failed)
    }

    /// Opens a store for writing and recovers it: one process at a time. Background threads keep its segments and
    /// its index in order until [`Store::close`].
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another process has it, [`ErrorKind::Foreign`] if the directory is no store,
    /// [`ErrorKind::Newer`] if this program is too old for it, [`ErrorKind::Corrupt`] if the store's own log is damaged. A
    /// damaged volume does not fail the opening: it is read-only and says so. Neither does one whose log the disk does not
    /// read.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self> {
        Self::open_with_progress(dir, options, Box::new(|_| ()))
    }

    /// The same; `progress` is told how much of the logs has been read, which is much only after the index was lost.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_progress(dir: &Path, options: StoreOptions, progress: OpeningProgress) -> Result<Self> {
        let at = dir.display();
        if !dir.join(SUPERBLOCK).exists() {
            return Err(Error::new(ErrorKind::Foreign, format!("{at} holds no store")));
        }
        let began = Instant::now();
        let passed_ms = || began.elapsed().as_millis() as u64;
        let storage =
            DirectoryStorage::open(dir).map_err(|e| Error::io(format!("opening the store {at}"), e))?;
        tracing::debug!(
            passed_ms = passed_ms(),
            "the store is locked, and nobody else's writes are under way"
        );
        let tuning = RocksOptions { memory_bytes: options.index_memory_bytes, ..RocksOptions::default() };
        let index = open_or_rebuild(&dir.join(INDEX_DIRECTORY), |p| RocksKv::open(p, &tuning))?;
        let catalogue = open_or_rebuild(&dir.join(CATALOGUE_DIRECTORY), |p| RocksKv::open_synced(p))?;
        tracing::debug!(passed_ms = passed_ms(), "the databases are open");
        let clock = Arc::new(SystemClock);
        let reach = Some(PathBuf::from(reach::DIRECTORY));
        let seams = Seams { storage: Arc::new(storage), index, catalogue, clock, secrets: random, reach };
        let opening = Opening::new(seams, options, Mode::Write)?.told_by(progress);
        tracing::debug!(
            passed_ms = passed_ms(),
            "the segments' headers are read, and the generation is claimed"
        );
        let store = opening.run()?;
        store.start_background()?;
        tracing::debug!(passed_ms = passed_ms(), "the logs are recovered, and the store is open");
        Ok(store)
    }

    /// Opens a store, or a copy of one, for inspection. Nothing is written, and nothing is said to a store's daemon:
    /// it must not be running.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_read_only(dir: &Path) -> Result<Self> {
        let at = dir.display();
        if !dir.join(SUPERBLOCK).exists() {
            return Err(Error::new(ErrorKind::Foreign, format!("{at} holds no store")));
        }
        let storage = DirectoryStorage::open_read_only(dir)
            .map_err(|e| Error::io(format!("opening the store {at}"), e))?;
        let empty = || Arc::new(crate::index::SimKv::new()) as Arc<dyn Kv>;
        // A missing or damaged database only costs time: everything is in the logs.
        let index =
            RocksKv::open_read_only(dir.join(INDEX_DIRECTORY)).map_or_else(|_| empty(), |kv| Arc::new(kv));
        let catalogue = RocksKv::open_synced_read_only(dir.join(CATALOGUE_DIRECTORY))
            .map_or_else(|_| empty(), |kv| Arc::new(kv));
        let clock = Arc::new(SystemClock);
        let seams =
            Seams { storage: Arc::new(storage), index, catalogue, clock, secrets: random, reach: None };
        Opening::new(seams, StoreOptions::default(), Mode::Read)?.run()
    }

    /// Opens a store on any seams, without background threads: [`Store::pool_step`], [`Store::load_step`],
    /// [`Store::close_chunks`], [`Store::index_step`] and [`Store::upkeep`] do their work.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(seams: Seams, options: StoreOptions) -> Result<Self> {
        let store = Opening::new(seams, options, Mode::Write)?.run()?;
        store.inner.shared.loaders.by_hand();
        Ok(store)
    }
}

/// Opens a database; one that is damaged is removed and made anew, since the logs have everything.
fn open_or_rebuild(
    path: &Path,
    open: impl Fn(&Path) -> crate::index::IndexResult<RocksKv>,
) -> Result<Arc<dyn Kv>> {
    let failed = |e| Error::new(ErrorKind::Io, format!("opening {}", path.display())).with(e);
    match open(path) {
        Ok(kv) => Ok(Arc::new(kv)),
        Err(error) if error.kind() == crate::index::IndexErrorKind::Corrupt => {
            tracing::warn!("{}: {error}; it is rebuilt from the logs", path.display());
            RocksKv::destroy(path).map_err(failed)?;
            Ok(Arc::new(open(path).map_err(failed)?))
        }
        Err(error) => Err(failed(error)),
    }
}

fn slot_at(storage: &dyn Storage, slot: u64) -> u64 {
    slot * crate::format::header_stride(storage.alignment().physical_block)
}

pub(super) fn write_slot(
    storage: &dyn Storage,
    file: &dyn File,
    slot: u64,
    superblock: &Superblock,
) -> Result<()> {
    let mut bytes = AlignedBuf::zeroed(slot_at(storage, 1) as usize);
    superblock.encode(&mut bytes[..SUPERBLOCK_LEN]);
    file.write_at(slot_at(storage, slot), &bytes).map_err(|e| Error::io("writing superblock", e))
}

/// The newer of the two valid slots, and which one that is.
pub(super) fn read_superblock(storage: &dyn Storage, file: &dyn File) -> Result<(Superblock, u64)> {
    let mut newest: Option<(Superblock, u64)> = None;
    let (mut invalid, mut unread) = (FormatError::Absent, None);
    for slot in 0..2 {
        let mut bytes = AlignedBuf::zeroed(slot_at(storage, 1) as usize);
        let at = slot_at(storage, slot);
        if let Err(error) = file.read_at(at, &mut bytes) {
            tracing::warn!("superblock, byte {at}: this copy cannot be read: {error}");
            unread = Some(Error::io(format!("reading superblock, byte {at}"), error));
            continue;
        }
        match Superblock::decode(&bytes[..SUPERBLOCK_LEN]) {
            Ok(found) if newest.is_none_or(|(newest, _)| newest.generation < found.generation) => {
                newest = Some((found, slot));
            }
            Ok(_) => {}
            // The other copy may be one from before the store was taken over by a newer program.
            Err(error @ FormatError::Newer { .. }) => {
                return Err(Error::format(format!("superblock, byte {at}"), error));
            }
            Err(error) => invalid = error,
        }
    }
    let neither = || Error::format("superblock: neither of its two copies is valid", invalid);
    newest.ok_or_else(|| unread.unwrap_or_else(neither))
}
