//! The seam below the time index and the catalogue: ordered rows in a few families, written in atomic batches.
//!
//! In production it is RocksDB ([`RocksKv`](super::RocksKv)), in tests memory that loses what a power cut would
//! lose ([`SimKv`](super::SimKv)).

use std::fmt;

use super::error::IndexResult;

/// A set of rows with an order of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Time index: what happened to each node of each branch.
    Map,
    /// Time index: which `Seq` a time stands for.
    Time,
    /// Time index: how far each volume's log has been indexed.
    Watermark,
    /// Time index: what leaves look like now.
    Present,
    /// Catalogue: its only family.
    Rows,
}

impl Family {
    /// The families of the time index's database.
    pub const TIME_INDEX: &'static [Self] = &[Self::Map, Self::Time, Self::Watermark, Self::Present];
    /// The families of the catalogue's database.
    pub const CATALOGUE: &'static [Self] = &[Self::Rows];

    /// Its name in the database.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Time => "time",
            Self::Watermark => "watermark",
            Self::Present => "present",
            Self::Rows => "rows",
        }
    }
}

/// One step of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOp<'a> {
    /// Inserts or replaces a row.
    Put {
        /// Its key.
        key: &'a [u8],
        /// Its value.
        value: &'a [u8],
    },
    /// Removes a row, if there is one.
    Delete {
        /// Its key.
        key: &'a [u8],
    },
    /// Removes every row with `from` <= key < `to`.
    DeleteRange {
        /// The first key that goes.
        from: &'a [u8],
        /// The first key that stays.
        to: &'a [u8],
    },
}

#[derive(Clone, Copy, Debug)]
enum StepKind {
    Put,
    Delete,
    DeleteRange,
}

/// Where one step's two byte strings end in the arena; each begins where the string before it ends.
#[derive(Clone, Copy, Debug)]
struct Step {
    family: Family,
    kind: StepKind,
    first_end: usize,
    second_end: usize,
}

/// Steps to be taken all or none, in order. All keys and values lie in one allocation, which `clear` keeps.
#[derive(Clone, Default)]
pub struct WriteBatch {
    arena: Vec<u8>,
    steps: Vec<Step>,
}

impl WriteBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row.
    pub fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.put_with(family, key, |out| out.extend_from_slice(value));
    }

    /// Adds a row whose value `write` appends to the buffer that it is given. It must only append.
    pub fn put_with(&mut self, family: Family, key: &[u8], write: impl FnOnce(&mut Vec<u8>)) {
        self.arena.extend_from_slice(key);
        let first_end = self.arena.len();
        write(&mut self.arena);
        debug_assert!(self.arena.len() >= first_end, "a value's writer must only append");
        self.steps.push(Step { family, kind: StepKind::Put, first_end, second_end: self.arena.len() });
    }

    /// Removes a row, if there is one.
    pub fn delete(&mut self, family: Family, key: &[u8]) {
        self.push(family, StepKind::Delete, key, &[]);
    }

    /// Removes the rows with `from` <= key < `to`.
    pub fn delete_range(&mut self, family: Family, from: &[u8], to: &[u8]) {
        self.push(family, StepKind::DeleteRange, from, to);
    }

    fn push(&mut self, family: Family, kind: StepKind, first: &[u8], second: &[u8]) {
        self.arena.extend_from_slice(first);
        let first_end = self.arena.len();
        self.arena.extend_from_slice(second);
        self.steps.push(Step { family, kind, first_end, second_end: self.arena.len() });
    }

    /// Adds the steps of another batch.
    pub fn append(&mut self, other: &Self) {
        let start = self.arena.len();
        self.arena.extend_from_slice(&other.arena);
        let moved = |step: &Step| Step {
            first_end: start + step.first_end,
            second_end: start + step.second_end,
            ..*step
        };
        self.steps.extend(other.steps.iter().map(moved));
    }

    /// The steps, in order.
    pub fn steps(&self) -> impl Iterator<Item = (Family, WriteOp<'_>)> {
        let mut start = 0;
        self.steps.iter().map(move |step| {
            let first = &self.arena[start..step.first_end];
            let second = &self.arena[step.first_end..step.second_end];
            start = step.second_end;
            let op = match step.kind {
                StepKind::Put => WriteOp::Put { key: first, value: second },
                StepKind::Delete => WriteOp::Delete { key: first },
                StepKind::DeleteRange => WriteOp::DeleteRange { from: first, to: second },
            };
            (step.family, op)
        })
    }

    /// Number of steps.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether it has no step.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Bytes of its keys and values.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Makes it empty, for reuse.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.steps.clear();
    }
}

impl fmt::Debug for WriteBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteBatch({} steps, {} bytes)", self.len(), self.size_bytes())
    }
}

/// What a database reports of itself, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvStats {
    /// Bytes of its live files.
    pub disk_bytes: u64,
    /// Bytes of rows in memory that are not in a file yet, with their overhead.
    pub memtable_bytes: u64,
    /// Bytes of its block cache in use.
    pub cache_bytes: u64,
    /// Bytes that compaction is behind by its own estimate.
    pub compaction_debt_bytes: u64,
    /// Whether it slows down or stops writers at present.
    pub stalled: bool,
}

/// Reads rows in ascending order of their keys: (key, value) → whether to go on.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> bool + 'a;

/// The same for several ranges: (which range, key, value) → whether to go on within it.
pub type VisitEach<'a> = dyn FnMut(usize, &[u8], &[u8]) -> bool + 'a;

/// A database of ordered rows.
///
/// Errors are [`IndexError`](super::IndexError)s of these kinds: `Corrupt`, `NoSpace` and `Io` from any method,
/// `Invalid` from those that change a database that was opened read-only. All methods block.
pub trait Kv: Send + Sync + fmt::Debug {
    /// Its path, for messages.
    fn place(&self) -> &str;

    /// Takes the steps of a batch, all or none. They are visible to every reader once this returns.
    ///
    /// # Durability
    /// Of a database opened as *synced* (the catalogue): on return. Of the time index: none until [`Kv::flush`]
    /// returns, but possible at any time before. What a power cut leaves is the state after some batch, the
    /// same one in every family. A failed write of a synced database may yet be found after the next opening.
    fn write(&self, batch: &WriteBatch) -> IndexResult<()> {
        self.write_together(&[batch])
    }

    /// Takes the steps of several batches in this order, all or none, as [`Kv::write`] does those of one.
    fn write_together(&self, batches: &[&WriteBatch]) -> IndexResult<()>;

    /// Makes durable all that was written before the call, in all families together.
    ///
    /// # Durability
    /// On return, of every batch whose `write` had returned when this was called.
    fn flush(&self) -> IndexResult<()>;

    /// A row's value.
    fn get(&self, family: Family, key: &[u8]) -> IndexResult<Option<Vec<u8>>>;

    /// Visits the rows with `from` <= key < `to`, ascending, until `visit` returns false.
    ///
    /// It sees the state of one moment. `visit` must not call back into the database. It is fastest when `from`
    /// and `to` agree in their first 17 bytes (the node, in [`Family::Map`]).
    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> IndexResult<()> {
        self.scan_each(family, &[(from, to)], &mut |_, key, value| visit(key, value))
    }

    /// Does the same for several ranges (`from`, `to`), one after the other, all in the state of one moment; when `visit`
    /// returns false it goes on with the next range.
    fn scan_each(
        &self,
        family: Family,
        ranges: &[(&[u8], &[u8])],
        visit: &mut VisitEach<'_>,
    ) -> IndexResult<()>;

    /// Gives back the space of deleted rows between `from` and `to`, and rids later scans of the cost of having
    /// deleted them. It takes as long as rewriting the neighbouring rows: for background threads. No row in the
    /// range may be live.
    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> IndexResult<()>;

    /// Removes every row, for a rebuild.
    ///
    /// # Durability
    /// On return. A power cut meanwhile leaves either the old rows or none.
    fn clear(&self) -> IndexResult<()>;

    /// Makes the first reads after an opening faster, by what a background thread can do for them ahead; returns
    /// early once `stop` says so.
    fn preload(&self, stop: &dyn Fn() -> bool) {
        let _ = stop;
    }

    /// Uses a time in which nothing is written to make reads shorter, in the background; the next write ends it.
    ///
    /// # Errors
    /// Of the kinds above. Nothing is lost but the time.
    fn tidy(&self) -> IndexResult<()> {
        Ok(())
    }

    /// Whether its own cache is as large as its files, so that few reads wait for the disk.
    ///
    /// # Errors
    /// Of the kinds above.
    fn fits_cache(&self) -> IndexResult<bool> {
        Ok(false)
    }

    /// Figures for metrics.
    fn stats(&self) -> IndexResult<KvStats>;
}
