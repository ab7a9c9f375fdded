//! The production database: RocksDB, set up for what the time index and the catalogue do with it.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{ColumnFamily, CompactOptions, DB, FlushOptions, ReadOptions, WriteOptions, properties};

use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::keys::NODE_PREFIX_LEN;
use super::kv::{Family, Kv, KvStats, VisitEach, WriteBatch, WriteOp};
use super::preload::preload;
use super::rocks_tuning::{self as tuning, Tuned};

pub use super::rocks_tuning::RocksOptions;

/// What a database is opened for.
#[derive(Clone, Debug)]
enum Mode {
    /// The time index: no write-ahead log, all families flushed together.
    Index(RocksOptions),
    /// The catalogue: every write synced.
    Synced,
    /// Either, as it is on disk.
    ReadOnly(&'static [Family]),
}

impl Mode {
    fn families(&self) -> &'static [Family] {
        match self {
            Self::Index(_) => Family::TIME_INDEX,
            Self::Synced => Family::CATALOGUE,
            Self::ReadOnly(families) => families,
        }
    }
}

struct Open {
    db: DB,
    tuned: Tuned,
}

/// A RocksDB database. Its directory belongs to it alone.
pub struct RocksKv {
    path: PathBuf,
    place: String,
    mode: Mode,
    /// `None` only after a failed [`Kv::clear`].
    open: RwLock<Option<Open>>,
    /// It compacts more than it does while it is written.
    tidying: AtomicBool,
}

/// The kind of an error that RocksDB reports, which has no codes through this interface, only texts.
fn classify(error: &rocksdb::Error, opening: bool) -> IndexErrorKind {
    let text: &str = error.as_ref();
    let says = |what: &str| text.contains(what);
    if says("While lock file") || says("lock hold by current process") {
        return IndexErrorKind::Locked;
    }
    if says("No space left on device") || says("Space limit reached") {
        return IndexErrorKind::NoSpace;
    }
    match error.kind() {
        rocksdb::ErrorKind::Corruption => IndexErrorKind::Corrupt,
        // A manifest or a table that is named but absent, a family that is missing or foreign, a format of a
        // newer RocksDB: whatever it is, it cannot be used as it is.
        rocksdb::ErrorKind::NotFound
        | rocksdb::ErrorKind::InvalidArgument
        | rocksdb::ErrorKind::NotSupported
            if opening =>
        {
            IndexErrorKind::Corrupt
        }
        rocksdb::ErrorKind::IOError if opening && says("No such file or directory") => {
            IndexErrorKind::Corrupt
        }
        rocksdb::ErrorKind::InvalidArgument | rocksdb::ErrorKind::NotSupported => IndexErrorKind::Invalid,
        _ => IndexErrorKind::Io,
    }
}

fn io_error(operation: &'static str, path: &Path, error: io::Error) -> IndexError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull => IndexErrorKind::NoSpace,
        _ => IndexErrorKind::Io,
    };
    IndexError::new(kind, operation, path.display().to_string()).because(error)
}

/// Where a database is moved before it is deleted, so that no crash leaves half of one in its place.
fn discarded(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".discarded");
    PathBuf::from(name)
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => fs::File::open(parent)?.sync_all(),
        _ => fs::File::open(".")?.sync_all(),
    }
}

impl RocksKv {
    /// Opens the time index's database, or creates it. Nothing written to it is durable before [`Kv::flush`].
    ///
    /// # Errors
    /// `Corrupt` if there is something that cannot be used ([`Self::destroy`] it, open again and rebuild),
    /// `Locked` if it is open elsewhere, `NoSpace`, `Io`.
    pub fn open(path: impl AsRef<Path>, options: &RocksOptions) -> IndexResult<Self> {
        Self::with_mode(path.as_ref(), Mode::Index(options.clone()))
    }

    /// Opens the catalogue's database, or creates it. Each write to it is durable on return.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_synced(path: impl AsRef<Path>) -> IndexResult<Self> {
        Self::with_mode(path.as_ref(), Mode::Synced)
    }

    /// Opens the time index's database as it is on disk, writing nothing. Another process may have it open; what
    /// that one does from then on may make reads fail.
    ///
    /// # Errors
    /// `Missing` if there is none; otherwise as [`Self::open`].
    pub fn open_read_only(path: impl AsRef<Path>) -> IndexResult<Self> {
        Self::with_mode(path.as_ref(), Mode::ReadOnly(Family::TIME_INDEX))
    }

    /// Opens the catalogue's database as it is on disk, as [`Self::open_read_only`].
    ///
    /// # Errors
    /// As [`Self::open_read_only`].
    pub fn open_synced_read_only(path: impl AsRef<Path>) -> IndexResult<Self> {
        Self::with_mode(path.as_ref(), Mode::ReadOnly(Family::CATALOGUE))
    }

    /// Deletes a database that nobody has open, whatever state it is in.
    ///
    /// # Durability
    /// On return. A crash meanwhile leaves either the whole of it or none.
    ///
    /// # Errors
    /// `Io`.
    pub fn destroy(path: impl AsRef<Path>) -> IndexResult<()> {
        let path = path.as_ref();
        let failed = |error| io_error("delete", path, error);
        let aside = discarded(path);
        remove_directory(&aside).map_err(failed)?;
        match fs::rename(path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(failed)?,
        }
        sync_parent(path).map_err(failed)?;
        remove_directory(&aside).map_err(failed)
    }

    fn with_mode(path: &Path, mode: Mode) -> IndexResult<Self> {
        let place = path.display().to_string();
        if let Mode::ReadOnly(_) = mode {
            // RocksDB's own answer is an I/O error like any other.
            if !path.join("CURRENT").exists() {
                return Err(IndexError::new(IndexErrorKind::Missing, "open", place));
            }
        } else {
            fs::create_dir_all(path).map_err(|error| io_error("create", path, error))?;
            remove_directory(&discarded(path)).map_err(|error| io_error("open", path, error))?;
        }
        let open = Self::open_database(path, &mode)
            .map_err(|error| IndexError::new(classify(&error, true), "open", &*place).because(error))?;
        Ok(Self {
            path: path.to_owned(),
            place,
            mode,
            open: RwLock::new(Some(open)),
            tidying: AtomicBool::new(false),
        })
    }

    /// Opens it on a thread of that name: RocksDB's threads, of which one is without end, inherit it.
    fn open_database(path: &Path, mode: &Mode) -> Result<Open, rocksdb::Error> {
        std::thread::scope(|scope| {
            let name = std::thread::Builder::new().name("rocksdb".to_owned());
            match name.spawn_scoped(scope, || Self::open_here(path, mode)) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(_) => Self::open_here(path, mode),
            }
        })
    }

    fn open_here(path: &Path, mode: &Mode) -> Result<Open, rocksdb::Error> {
        let tuned = match mode {
            Mode::Index(options) => tuning::time_index(options),
            Mode::Synced => tuning::catalogue(),
            Mode::ReadOnly(families) => tuning::read_only(families),
        };
        // Of what is read as it is, an older version has left a family out.
        let found = match mode {
            Mode::ReadOnly(_) => Some(DB::list_cf(&tuned.database, path)?),
            Mode::Index(_) | Mode::Synced => None,
        };
        let is_there = |family: &Family| {
            let names = found.as_ref().filter(|_| *family == Family::Present);
            names.is_none_or(|names| names.iter().any(|name| name == family.name()))
        };
        let wanted = mode.families().iter().filter(|family| is_there(family));
        let families = wanted.map(|family| (family.name(), tuned.family(*family)));
        let db = match mode {
            Mode::ReadOnly(_) => DB::open_cf_with_opts_for_read_only(&tuned.database, path, families, false)?,
            _ => DB::open_cf_with_opts(&tuned.database, path, families)?,
        };
        Ok(Open { db, tuned })
    }

    fn failed(&self, operation: &'static str) -> impl Fn(rocksdb::Error) -> IndexError + '_ {
        move |error| IndexError::new(classify(&error, false), operation, &*self.place).because(error)
    }

    /// Has files of the map's level 0 compacted when there are so many.
    fn compact_from(&self, open: &Open, files: i32) -> Result<(), rocksdb::Error> {
        let Some(map) = open.db.cf_handle(Family::Map.name()) else { return Ok(()) };
        open.db.set_options_cf(map, &[("level0_file_num_compaction_trigger", &files.to_string())])
    }

    fn invalid(&self, operation: &'static str) -> IndexError {
        IndexError::new(IndexErrorKind::Invalid, operation, &*self.place)
    }

    /// The open database, kept open for as long as the guard lives.
    fn opened(&self, operation: &'static str) -> IndexResult<Opened<'_>> {
        let guard = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() {
            let place = format!("{} (closed by a failed deletion)", self.place);
            return Err(IndexError::new(IndexErrorKind::Io, operation, place));
        }
        Ok(Opened(guard))
    }

    fn family<'a>(
        &self,
        open: &'a Open,
        family: Family,
        operation: &'static str,
    ) -> IndexResult<&'a ColumnFamily> {
        open.db.cf_handle(family.name()).ok_or_else(|| self.invalid(operation))
    }
}

/// A read guard over a database that is known to be there.
struct Opened<'a>(RwLockReadGuard<'a, Option<Open>>);

impl std::ops::Deref for Opened<'_> {
    type Target = Open;

    fn deref(&self) -> &Open {
        match &*self.0 {
            Some(open) => open,
            None => unreachable!("checked when the guard was taken, and only a write guard can take it away"),
        }
    }
}

impl Kv for RocksKv {
    fn place(&self) -> &str {
        &self.place
    }

    fn write_together(&self, batches: &[&WriteBatch]) -> IndexResult<()> {
        const OPERATION: &str = "write rows";
        let open = self.opened(OPERATION)?;
        let mut options = WriteOptions::default();
        match self.mode {
            Mode::Index(_) => options.disable_wal(true),
            Mode::Synced => options.set_sync(true),
            Mode::ReadOnly(_) => return Err(self.invalid(OPERATION)),
        }
        // Looked up once per batch, not once per row.
        let mut families = Vec::with_capacity(self.mode.families().len());
        for family in self.mode.families() {
            families.push((*family, self.family(&open, *family, OPERATION)?));
        }
        // RocksDB puts up to 15 bytes before each row: its kind, its family and two lengths.
        let bytes: usize = batches.iter().map(|batch| batch.size_bytes() + 15 * batch.len()).sum();
        let mut rows = rocksdb::WriteBatch::with_capacity_bytes(bytes + 12);
        for (family, op) in batches.iter().flat_map(|batch| batch.steps()) {
            let Some((_, family)) = families.iter().find(|(known, _)| *known == family) else {
                return Err(self.invalid(OPERATION));
            };
            match op {
                WriteOp::Put { key, value } => rows.put_cf(family, key, value),
                WriteOp::Delete { key } => rows.delete_cf(family, key),
                WriteOp::DeleteRange { from, to } => rows.delete_range_cf(family, from, to),
            }
        }
        if self.tidying.load(Ordering::Acquire) && self.tidying.swap(false, Ordering::AcqRel) {
            // No row depends on it.
            if let Err(error) = self.compact_from(&open, tuning::LEVEL_ZERO_FILES) {
                tracing::warn!("{}: the options for writing are not set: {error}", self.place);
                self.tidying.store(true, Ordering::Release);
            }
        }
        open.db.write_opt(rows, &options).map_err(self.failed(OPERATION))
    }

    fn flush(&self) -> IndexResult<()> {
        const OPERATION: &str = "flush";
        if let Mode::ReadOnly(_) = self.mode {
            return Err(self.invalid(OPERATION));
        }
        let open = self.opened(OPERATION)?;
        let mut families = Vec::new();
        for family in self.mode.families() {
            families.push(self.family(&open, *family, OPERATION)?);
        }
        let mut options = FlushOptions::default();
        options.set_wait(true);
        open.db.flush_cfs_opt(&families.iter().collect::<Vec<_>>(), &options).map_err(self.failed(OPERATION))
    }

    fn get(&self, family: Family, key: &[u8]) -> IndexResult<Option<Vec<u8>>> {
        const OPERATION: &str = "read a row";
        let open = self.opened(OPERATION)?;
        let family = self.family(&open, family, OPERATION)?;
        open.db.get_cf(family, key).map_err(self.failed(OPERATION))
    }

    fn scan_each(
        &self,
        family: Family,
        ranges: &[(&[u8], &[u8])],
        visit: &mut VisitEach<'_>,
    ) -> IndexResult<()> {
        const OPERATION: &str = "scan rows";
        let Some(last) = ranges.iter().map(|(_, to)| *to).max() else { return Ok(()) };
        let open = self.opened(OPERATION)?;
        let handle = self.family(&open, family, OPERATION)?;
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(last);
        let in_one_node = |(from, to): &(&[u8], &[u8])| {
            let node = from.get(..NODE_PREFIX_LEN);
            node.is_some() && node == to.get(..NODE_PREFIX_LEN)
        };
        if family == Family::Map && ranges.iter().all(in_one_node) {
            // Files whose filter does not know the node are not even looked into.
            options.set_prefix_same_as_start(true);
        } else {
            options.set_total_order_seek(true);
        }
        // To make it costs as much as to seek with it.
        let mut rows = open.db.raw_iterator_cf_opt(handle, options);
        for (which, (from, to)) in ranges.iter().enumerate() {
            rows.seek(from);
            while let Some((key, value)) = rows.item().filter(|(key, _)| key < to) {
                if !visit(which, key, value) {
                    break;
                }
                rows.next();
            }
            rows.status().map_err(self.failed(OPERATION))?;
        }
        Ok(())
    }

    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> IndexResult<()> {
        const OPERATION: &str = "reclaim space";
        if let Mode::ReadOnly(_) = self.mode {
            return Err(self.invalid(OPERATION));
        }
        let open = self.opened(OPERATION)?;
        let family = self.family(&open, family, OPERATION)?;
        // Whole files first: they cost nothing. The compaction then rids the others of the rows, and itself of
        // the range's tombstone, which iterators would otherwise have to look at.
        open.db.delete_file_in_range_cf(family, from, to).map_err(self.failed(OPERATION))?;
        let mut options = CompactOptions::default();
        // Otherwise no other compaction runs meanwhile, and writers would come to wait for those.
        options.set_exclusive_manual_compaction(false);
        open.db.compact_range_cf_opt(family, Some(from), Some(to), &options);
        Ok(())
    }

    fn clear(&self) -> IndexResult<()> {
        const OPERATION: &str = "delete all rows";
        if let Mode::ReadOnly(_) = self.mode {
            return Err(self.invalid(OPERATION));
        }
        let mut guard = self.open.write().unwrap_or_else(PoisonError::into_inner);
        *guard = None;
        Self::destroy(&self.path)?;
        *guard = Some(Self::open_database(&self.path, &self.mode).map_err(self.failed(OPERATION))?);
        sync_parent(&self.path).map_err(|error| io_error(OPERATION, &self.path, error))
    }

    fn tidy(&self) -> IndexResult<()> {
        const OPERATION: &str = "tidy";
        let Mode::Index(_) = self.mode else { return Ok(()) };
        let open = self.opened(OPERATION)?;
        let map = self.family(&open, Family::Map, OPERATION)?;
        let level_zero = open.db.property_int_value_cf(map, properties::num_files_at_level(0));
        if level_zero.map_err(self.failed(OPERATION))?.unwrap_or(0) >= tuning::WORTH_TIDYING {
            let set = self.compact_from(&open, tuning::LEVEL_ZERO_FILES_IDLE);
            // Only now, and even if it failed, which it may say of an option that is in force: a write that came in between
            // has set nothing back, and the next one will.
            self.tidying.store(true, Ordering::Release);
            set.map_err(self.failed(OPERATION))?;
        }
        Ok(())
    }

    fn preload(&self, stop: &dyn Fn() -> bool) {
        const OPERATION: &str = "preload";
        let Mode::Index(options) = &self.mode else { return };
        let most = usize::from(options.max_open_files) * 3 / 4;
        let Ok(open) = self.opened(OPERATION) else { return };
        // What leaves look like now is small beside their history, and what is asked for most.
        let mut opened = 0;
        for (of, most) in [(Family::Present, most / 4), (Family::Map, most)] {
            if let Ok(family) = self.family(&open, of, OPERATION) {
                opened += preload(&open.db, family, of.name(), most - opened, stop);
            }
        }
    }

    fn fits_cache(&self) -> IndexResult<bool> {
        let capacity = self.opened("read statistics")?.tuned.cache_bytes;
        Ok(self.stats()?.disk_bytes <= capacity as u64)
    }

    fn stats(&self) -> IndexResult<KvStats> {
        const OPERATION: &str = "read statistics";
        let open = self.opened(OPERATION)?;
        let mut stats = KvStats { cache_bytes: open.tuned.cache.get_usage() as u64, ..KvStats::default() };
        for family in self.mode.families() {
            let Some(family) = open.db.cf_handle(family.name()) else { continue };
            let property = |name: &properties::PropName| {
                let value = open.db.property_int_value_cf(family, name).map_err(self.failed(OPERATION))?;
                Ok(value.unwrap_or(0))
            };
            stats.disk_bytes += property(properties::LIVE_SST_FILES_SIZE)?;
            stats.memtable_bytes += property(properties::SIZE_ALL_MEM_TABLES)?;
            stats.compaction_debt_bytes += property(properties::ESTIMATE_PENDING_COMPACTION_BYTES)?;
            stats.stalled |= property(properties::IS_WRITE_STOPPED)? > 0;
            stats.stalled |= property(properties::ACTUAL_DELAYED_WRITE_RATE)? > 0;
        }
        Ok(stats)
    }
}

impl fmt::Debug for RocksKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RocksKv({}, {:?})", self.place, self.mode)
    }
}

#[cfg(test)]
#[path = "rocks_tests.rs"]
mod tests;
