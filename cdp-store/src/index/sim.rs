//! A database in memory for tests, which loses in a crash what RocksDB could lose.
//!
//! Faults that it has: a crash loses what was not flushed, down to a random point between two batches (RocksDB
//! may flush by itself after any of them); writes and flushes fail from a chosen one on until they are healed,
//! as RocksDB's do after a failed flush. Faults that it does not have: torn batches, families that flush
//! apart, rot. RocksDB excludes the first two by atomic flushes, and detects the third.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::Rng;

use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::kv::{Family, Kv, KvStats, VisitEach, WriteBatch, WriteOp};

type Rows = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

#[derive(Clone, Debug, Default)]
struct State {
    /// What a reader sees.
    rows: Rows,
    /// What has survived for certain.
    durable: Rows,
    /// Written since: each may have survived if those before it have.
    unflushed: Vec<WriteBatch>,
    /// Writes and flushes that still succeed; no limit if `None`.
    until_failure: Option<u64>,
}

/// What happens in the midst of something else.
type Meanwhile = Box<dyn FnOnce() + Send>;

/// A simulated database; clones share its rows, so that they outlive whoever has it open.
#[derive(Clone, Default)]
pub struct SimKv {
    synced: bool,
    state: Arc<Mutex<State>>,
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
}

fn apply(rows: &mut Rows, batch: &WriteBatch) {
    for (family, op) in batch.steps() {
        match op {
            WriteOp::Put { key, value } => {
                rows.insert((family, key.to_vec()), value.to_vec());
            }
            WriteOp::Delete { key } => {
                rows.remove(&(family, key.to_vec()));
            }
            WriteOp::DeleteRange { from, to } if from < to => {
                let range = (family, from.to_vec())..(family, to.to_vec());
                let keys: Vec<_> = rows.range(range).map(|(key, _)| key.clone()).collect();
                keys.iter().for_each(|key| drop(rows.remove(key)));
            }
            WriteOp::DeleteRange { .. } => {}
        }
    }
}

impl State {
    /// Counts one write or flush down.
    fn fails(&mut self) -> bool {
        match &mut self.until_failure {
            None => false,
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }

    fn settle(&mut self) {
        for batch in self.unflushed.drain(..) {
            apply(&mut self.durable, &batch);
        }
    }
}

impl SimKv {
    /// An empty time index: durable once flushed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty catalogue: durable once written.
    #[must_use]
    pub fn synced() -> Self {
        Self { synced: true, ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere says so itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process that has it open, or cuts its power: of the batches that are not durable a random number
    /// of the first ones survives. Heals failures. Returns how many batches were lost.
    pub fn crash(&self, rng: &mut impl Rng) -> usize {
        let mut state = self.state();
        let survive = rng.random_range(0..=state.unflushed.len());
        let lost = state.unflushed.len() - survive;
        state.unflushed.truncate(survive);
        state.settle();
        state.rows = state.durable.clone();
        state.until_failure = None;
        lost
    }

    /// A copy of the database as it is now, which goes its own way from here on.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = Arc::new(Mutex::new(self.state().clone()));
        Self { synced: self.synced, state, meanwhile: Arc::default() }
    }

    /// Has something else happen right before the next scan.
    pub fn before_next_scan(&self, meanwhile: impl FnOnce() + Send + 'static) {
        *self.next_meanwhile() = Some(Box::new(meanwhile));
    }

    /// Whether that is still to happen.
    #[must_use]
    pub fn awaits_scan(&self) -> bool {
        self.next_meanwhile().is_some()
    }

    fn next_meanwhile(&self) -> MutexGuard<'_, Option<Meanwhile>> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets so many more writes and flushes succeed and all after them fail, until [`Self::heal`] or
    /// [`Self::crash`].
    pub fn fail_after(&self, operations: u64) {
        self.state().until_failure = Some(operations);
    }

    /// Ends the failing. What a synced database failed to write then counts as never written.
    pub fn heal(&self) {
        let mut state = self.state();
        state.until_failure = None;
        if self.synced {
            state.unflushed.clear();
        }
    }

    fn injected(operation: &'static str) -> IndexError {
        IndexError::new(IndexErrorKind::Io, operation, "simulated database").because("injected failure")
    }
}

impl Kv for SimKv {
    fn place(&self) -> &str {
        "simulated database"
    }

    fn write_together(&self, batches: &[&WriteBatch]) -> IndexResult<()> {
        let mut batch = WriteBatch::new();
        batches.iter().for_each(|part| batch.append(part));
        let mut state = self.state();
        if state.fails() {
            if self.synced {
                // It is in the write-ahead log, perhaps: nobody sees it, but the next opening may find it.
                state.unflushed.push(batch);
            }
            return Err(Self::injected("write rows"));
        }
        apply(&mut state.rows, &batch);
        state.unflushed.push(batch);
        if self.synced {
            state.settle();
        }
        Ok(())
    }

    fn flush(&self) -> IndexResult<()> {
        let mut state = self.state();
        if state.fails() {
            return Err(Self::injected("flush"));
        }
        if !self.synced {
            state.settle();
        }
        Ok(())
    }

    fn get(&self, family: Family, key: &[u8]) -> IndexResult<Option<Vec<u8>>> {
        Ok(self.state().rows.get(&(family, key.to_vec())).cloned())
    }

    fn scan_each(
        &self,
        family: Family,
        ranges: &[(&[u8], &[u8])],
        visit: &mut VisitEach<'_>,
    ) -> IndexResult<()> {
        let meanwhile = self.next_meanwhile().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        let state = self.state();
        for (which, (from, to)) in ranges.iter().enumerate().filter(|(_, (from, to))| from < to) {
            let range = (family, from.to_vec())..(family, to.to_vec());
            let mut rows = state.rows.range(range);
            while rows.next().is_some_and(|((_, key), value)| visit(which, key, value)) {}
        }
        Ok(())
    }

    fn reclaim(&self, _family: Family, _from: &[u8], _to: &[u8]) -> IndexResult<()> {
        Ok(())
    }

    fn clear(&self) -> IndexResult<()> {
        let mut state = self.state();
        if state.fails() {
            return Err(Self::injected("delete all rows"));
        }
        state.unflushed.clear();
        state.rows.clear();
        state.durable.clear();
        Ok(())
    }

    fn stats(&self) -> IndexResult<KvStats> {
        let state = self.state();
        let bytes = |rows: &Rows| rows.iter().map(|((_, key), value)| (key.len() + value.len()) as u64).sum();
        Ok(KvStats {
            disk_bytes: bytes(&state.durable),
            memtable_bytes: state.unflushed.iter().map(|batch| batch.size_bytes() as u64).sum(),
            ..KvStats::default()
        })
    }
}

impl fmt::Debug for SimKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimKv({})", if self.synced { "synced" } else { "flushed" })
    }
}
