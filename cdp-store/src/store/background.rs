//! What a store does by itself: supplying segments, zero-filling ahead, syncing, indexing, and once, after its opening,
//! preloading the index.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use cdp_types::one_line;

use super::{Inner, Store};
use crate::catalogue::Stage;
use crate::error::{Error, ErrorKind, Result};
use crate::segments::PoolStep;
use crate::volume::Volume;

/// Changes written to the index until the next index flush, and what one step writes beyond: so much more than what is not
/// indexed a recovery replays.
const CHANGES_PER_FLUSH: usize = 256 << 10;
/// With so many changes that are not indexed, of all volumes, the index is behind.
const BEHIND_CHANGES: usize = CHANGES_PER_FLUSH / 2;
/// Nothing indexed stays unflushed for longer than this.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
/// A volume without writes for this long gets a "durable" record.
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// How long the pool's thread sleeps when it has no space.
const FULL_RETRY: Duration = Duration::from_millis(200);

/// Zero-filling ahead starts when no log has taken a full-sized segment for this long.
const FILL_DELAY: Duration = Duration::from_secs(2);

/// A pause after each MiB that is zero-filled while guests write: they come first.
const FILL_PACE_BUSY: Duration = Duration::from_millis(20);
/// The same while guests flush: the disk's own flush, for which they wait, takes the zeroes along. Measured with one
/// write and one flush at a time: at 20 ms guests get 0.6 of the flushes that they get without any filling.
const FILL_PACE_FLUSHED: Duration = Duration::from_millis(200);
/// The same while no guest writes.
const FILL_PACE_IDLE: Duration = Duration::from_millis(1);
/// More syncs than this between two pieces of filling are guests' flushes, not our own upkeep.
const OWN_SYNCS: u64 = 2;
/// How long a thread sleeps that has nothing to do: it is woken when it has.
const REST: Duration = Duration::from_secs(24 * 3600);
/// While something fails, another failure is told after this long.
const RETELL_AFTER: Duration = Duration::from_secs(60);
/// How recent a write makes a store busy.
const BUSY_FOR: Duration = Duration::from_secs(1);

/// Whether there is more to do for the pool.
#[derive(Clone, Copy, Debug)]
enum Progress {
    More,
    Filled,
    Later,
    None,
}

/// The background threads.
#[derive(Debug, Default)]
pub(super) struct Background {
    threads: Vec<JoinHandle<()>>,
}

/// What the index thread has done and left undone.
#[derive(Debug, Default)]
pub(super) struct IndexHealth {
    /// Changes that were written since the last index flush; chunks without any count as one, and so does what a pass wrote.
    pub(super) changes_since_flush: usize,
    flushed_at_ns: u64,
    closed_at_ns: u64,
    /// What has failed and was told, and when.
    failing: Option<(String, u64)>,
    rested: bool,
}

/// What has failed of work that goes on all the same: the first failure is told.
#[derive(Debug, Default)]
struct Failures {
    first: Option<Error>,
}

impl Failures {
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(done) => Some(done),
            Err(error) => {
                self.first.get_or_insert(error);
                None
            }
        }
    }

    fn first(self) -> Result<()> {
        self.first.map_or(Ok(()), Err)
    }
}

impl Store {
    pub(super) fn start_background(&self) -> Result<()> {
        let mut background = self.inner.background.lock().unwrap_or_else(PoisonError::into_inner);
        for task in [Task::Pool, Task::Index] {
            let weak = Arc::downgrade(&self.inner);
            let thread = std::thread::Builder::new()
                .name(task.name().to_owned())
                .spawn(move || task.run_until_closed(&weak))
                .map_err(|e| Error::io(format!("starting thread {}", task.name()), e))?;
            background.threads.push(thread);
        }
        let loaders = self.inner.shared.loaders.start();
        background.threads.extend(loaders.map_err(|e| Error::io("starting threads that read leaves", e))?);
        let (shared, store) = (Arc::clone(&self.inner.shared), Arc::downgrade(&self.inner));
        let thread = std::thread::Builder::new()
            .name("cdp-preload".to_owned())
            .spawn(move || shared.index.preload(&|| shared.is_closing() || store.strong_count() == 0))
            .map_err(|e| Error::io("starting thread cdp-preload", e))?;
        background.threads.push(thread);
        Ok(())
    }

    /// Does one piece of the pool's work; says whether there may be more. For stores without background threads.
    ///
    /// # Errors
    /// What the file system says when segments are filled ahead, other than that it is full.
    pub fn pool_step(&self) -> Result<bool> {
        Ok(matches!(self.pool_progress()?, Progress::More | Progress::Filled))
    }

    /// Looks up the places that the read waits for which has waited the longest; says whether any did. For stores without
    /// background threads.
    pub fn load_step(&self) -> bool {
        self.inner.shared.loaders.step()
    }

    fn pool_progress(&self) -> Result<Progress> {
        match self.inner.shared.log.segments.step()? {
            PoolStep::Supplied(volume, blank) => {
                let volumes = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
                let found = volumes.get(&volume).cloned();
                drop(volumes);
                match found {
                    Some(found) => found.supply(blank),
                    None => {
                        self.inner.shared.log.segments.forget_wishes(volume);
                        self.inner.shared.log.segments.give_back(blank);
                    }
                }
                Ok(Progress::More)
            }
            PoolStep::Filled => Ok(Progress::Filled),
            PoolStep::GivenBack => Ok(Progress::More),
            PoolStep::Busy => Ok(Progress::Later),
            PoolStep::Refused(volume, error) => {
                let volumes = self.inner.volumes.read().unwrap_or_else(PoisonError::into_inner);
                let found = volumes.get(&volume).cloned();
                drop(volumes);
                match found {
                    Some(found) => found.refuse_segment(&error),
                    None => self.inner.shared.log.segments.forget_wishes(volume),
                }
                Ok(Progress::Later)
            }
            PoolStep::Idle => Ok(Progress::None),
        }
    }

    /// Brings the index closer to the logs, by one step of every volume; says whether it did anything.
    ///
    /// # Errors
    /// If a log cannot be synced or the index not written.
    pub fn index_step(&self) -> Result<bool> {
        let mut failures = Failures::default();
        let worked = self.index_volumes(|| true, &mut failures);
        failures.first().map(|()| worked)
    }

    fn index_volumes(&self, hurries: impl Fn() -> bool, failures: &mut Failures) -> bool {
        let mut worked = false;
        for volume in self.all_volumes() {
            worked |= self.index_volume(&volume, hurries(), failures);
        }
        worked
    }

    /// Takes a step of one volume; says whether anything of it is in the index that was not. A damaged row fails the images
    /// of its own volume, and nothing else.
    fn index_volume(&self, volume: &Arc<Volume>, hurried: bool, failures: &mut Failures) -> bool {
        let Some(Some(step)) = failures.note(volume.index_step(hurried)) else { return false };
        let mut health = self.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
        health.changes_since_flush += step.changes.max(1);
        drop(health);
        failures.note(step.images);
        true
    }

    /// Ends the chunks that changes are gathered in, as the index thread does every
    /// [`crate::StoreOptions::index_interval`], so that [`Store::index_step`] takes them. For stores without background threads.
    pub fn close_chunks(&self) {
        self.all_volumes().iter().for_each(|volume| volume.close_chunk());
    }

    /// Writes everything acknowledged into the index, as far as it is delivered, and flushes it. Not beside the index thread.
    ///
    /// # Durability
    /// What was indexed is not replayed by later openings.
    ///
    /// # Errors
    /// If a log cannot be synced or the index not written.
    pub fn flush_index(&self) -> Result<()> {
        self.close_chunks();
        let mut failures = Failures::default();
        for volume in self.all_volumes() {
            while self.index_volume(&volume, true, &mut failures) {}
        }
        failures.note(self.index_flush());
        failures.first()
    }

    pub(super) fn index_flush(&self) -> Result<()> {
        let flushed = self.inner.shared.index.flush();
        flushed.map_err(|e| Error::new(ErrorKind::Io, "flushing the time index").with(e))?;
        let mut health = self.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
        health.changes_since_flush = 0;
        health.flushed_at_ns = self.inner.shared.clock.boot_ns();
        Ok(())
    }

    /// A round of the index thread, every [`crate::StoreOptions::index_interval`] or when enough has gathered; says whether
    /// there may be more to do at once.
    fn index_round(&self) -> Result<bool> {
        let now = self.inner.shared.clock.boot_ns();
        let close = {
            let mut health = self.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
            let due = u128::from(now.saturating_sub(health.closed_at_ns))
                >= self.inner.options.index_interval.as_nanos();
            if due {
                health.closed_at_ns = now;
            }
            due
        };
        // What fails for one volume, or of one kind of work, is no reason to leave the rest undone.
        let mut failures = Failures::default();
        for volume in self.all_volumes() {
            if volume.has_unsynced() {
                failures.note(volume.sync_in_background());
            }
        }
        if close {
            self.close_chunks();
        }
        // Guests may always have written more meanwhile: what comes after this must have its turn all the same.
        let mut more = true;
        while more && !self.index_flush_is_due() {
            let pending: usize = self.all_volumes().iter().map(|v| v.map().pending_changes()).sum();
            more = self.index_volumes(|| pending >= BEHIND_CHANGES || self.is_awaited(now), &mut failures);
        }
        if self.index_flush_is_due() {
            failures.note(self.index_flush());
        }
        failures.note(self.upkeep());
        failures.note(self.note_idle_volumes());
        failures.first().map(|()| more)
    }

    /// Whether a round that began at this time should end: the store is being closed, or the next one is due soon.
    fn is_awaited(&self, began_ns: u64) -> bool {
        let lasts = self.inner.shared.clock.boot_ns().saturating_sub(began_ns);
        self.inner.shared.is_closing()
            || u128::from(lasts) >= self.inner.options.index_interval.as_nanos() / 2
    }

    fn index_flush_is_due(&self) -> bool {
        let health = self.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
        let age = self.inner.shared.clock.boot_ns().saturating_sub(health.flushed_at_ns);
        health.changes_since_flush >= CHANGES_PER_FLUSH
            || (health.changes_since_flush > 0 && u128::from(age) >= FLUSH_INTERVAL.as_nanos())
    }

    /// Gives back what its last reader has left, and keeps reads of heads short.
    ///
    /// # Errors
    /// If the store log or the index cannot be written.
    pub fn upkeep(&self) -> Result<()> {
        if self.has_unreclaimed() {
            self.reclaim()?;
        }
        self.flatten_deep()
    }

    /// Whether the index thread has nothing to do until somebody writes or changes something. Whoever does either from here
    /// on wakes it.
    fn may_rest(&self) -> bool {
        // First this, then the look: what is missed by the look was done by someone who finds this set.
        self.inner.shared.index_rests.store(true, Ordering::SeqCst);
        let rests = !self.has_unreclaimed() && self.all_volumes().iter().all(|v| v.is_at_rest());
        if !rests {
            self.inner.shared.index_rests.store(false, Ordering::SeqCst);
        }
        rests
    }

    /// How long to pause after a piece of zero-filling.
    fn fill_pace(&self) -> Duration {
        let syncs = self.all_volumes().iter().map(|v| v.counters().syncs.load(Ordering::Relaxed)).sum();
        let before = self.inner.syncs_seen.swap(syncs, Ordering::Relaxed);
        match self.is_written() {
            true if syncs > before + OWN_SYNCS => FILL_PACE_FLUSHED,
            true => FILL_PACE_BUSY,
            false => FILL_PACE_IDLE,
        }
    }

    /// Whether any volume was written just now.
    fn is_written(&self) -> bool {
        let now = self.inner.shared.log.clock.stamp().time_ns;
        self.all_volumes()
            .iter()
            .any(|v| u128::from(now.saturating_sub(v.head().time_ns)) < BUSY_FOR.as_nanos())
    }

    fn note_idle_volumes(&self) -> Result<()> {
        let now = self.inner.shared.log.clock.stamp().time_ns;
        let mut failures = Failures::default();
        for volume in self.all_volumes() {
            let idle_ns = now.saturating_sub(volume.head().time_ns);
            if u128::from(idle_ns) >= IDLE_AFTER.as_nanos() {
                failures.note(volume.note_durable());
            }
        }
        failures.first()
    }

    /// Ends the store in order: background work stops, every log is synced and says so, the index is flushed.
    /// Requests that still come are refused. Idempotent.
    ///
    /// # Durability
    /// Everything acknowledged.
    ///
    /// # Errors
    /// If a log cannot be synced or the index not written; the next opening recovers then.
    pub fn close(&self) -> Result<()> {
        let shared = &self.inner.shared;
        if shared.closing.swap(true, Ordering::SeqCst) || !self.inner.writable {
            return Ok(());
        }
        shared.pool_bell.ring();
        shared.index_bell.ring();
        shared.loaders.close();
        if let Some(reach) = &shared.reach {
            reach.remove_if_small();
        }
        let threads = {
            let mut background = self.inner.background.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut background.threads)
        };
        for thread in threads {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
        let mut result = Ok(());
        for volume in self.all_volumes() {
            if volume.row().stage == Stage::Destroyed {
                // What others share of it was made durable when they began to.
                continue;
            }
            let closed = volume.make_durable(volume.head().ordinal).and_then(|()| volume.note_durable());
            result = result.and(closed);
        }
        result.and(self.flush_index())
    }
}

/// A thread that sleeps until it is told of something holds the store's lock.
impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.pool_bell.ring();
        self.shared.index_bell.ring();
    }
}

/// What a background thread does.
#[derive(Clone, Copy, Debug)]
enum Task {
    Pool,
    Index,
}

impl Task {
    fn name(self) -> &'static str {
        match self {
            Self::Pool => "cdp-pool",
            Self::Index => "cdp-index",
        }
    }

    /// Works until the store is closed or dropped; each round says how long to wait for the bell.
    fn run_until_closed(self, store: &Weak<Inner>) {
        while let Some(inner) = store.upgrade() {
            let store = Store { inner };
            if store.inner.shared.is_closing() {
                return;
            }
            let wait = match self {
                Self::Pool => pool(&store),
                Self::Index => index(&store),
            };
            // The store must not live on for the length of a wait only because this thread sleeps.
            let shared = Arc::clone(&store.inner.shared);
            drop(store);
            let bell = match self {
                Self::Pool => &shared.pool_bell,
                Self::Index => &shared.index_bell,
            };
            if !wait.is_zero() {
                bell.wait(wait);
            }
        }
    }
}

fn pool(store: &Store) -> Duration {
    match store.pool_progress() {
        Ok(Progress::More) => Duration::ZERO,
        Ok(Progress::Filled) => store.fill_pace(),
        Ok(Progress::Later) => match store.inner.shared.log.segments.wanted() {
            0 => FILL_DELAY,
            // Each of them once in this time, however many wait.
            wanted => FULL_RETRY / u32::try_from(wanted).unwrap_or(u32::MAX),
        },
        Ok(Progress::None) => REST,
        Err(error) => {
            tracing::error!("supplying segments: {}", one_line(&error));
            Duration::from_secs(1)
        }
    }
}

fn index(store: &Store) -> Duration {
    let interval = store.inner.options.index_interval;
    let health = || store.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::take(&mut health().rested) {
        // Most likely somebody has begun to write: a sync now would only make the first writes wait.
        return interval;
    }
    let outcome = store.index_round();
    let mut kept = health();
    let more = matches!(outcome, Ok(true));
    match outcome {
        Ok(_) => {
            if kept.failing.take().is_some() {
                tracing::info!("the time index is being written again");
            }
        }
        // It was refused since the store is being closed, which writes the index itself.
        Err(_) if store.inner.shared.is_closing() => {}
        Err(error) => {
            let (why, now) = (one_line(&error), store.inner.shared.clock.boot_ns());
            let is_news = |(told, at_ns): &(String, u64)| {
                *told != why && u128::from(now.saturating_sub(*at_ns)) >= RETELL_AFTER.as_nanos()
            };
            if kept.failing.as_ref().is_none_or(is_news) {
                // Guests do not depend on it: the log has everything, and the next round tries again.
                tracing::error!("keeping the time index: {why}");
                kept.failing = Some((why, now));
            }
        }
    }
    let done = kept.failing.is_none() && kept.changes_since_flush == 0;
    drop(kept);
    let rests = done && store.may_rest();
    let mut rest = REST;
    if rests {
        match store.pass_presents() {
            Ok(next) => rest = next.unwrap_or(REST),
            Err(error) => tracing::warn!("{}", one_line(&error)),
        }
        let shared = &store.inner.shared;
        let still_rests = shared.index_rests.load(Ordering::SeqCst) && !shared.is_closing();
        if still_rests && let Err(error) = shared.index.tidy() {
            tracing::warn!("tidying the time index: {}", one_line(&error));
        }
    }
    health().rested = rests;
    match (rests, more) {
        (true, _) => rest,
        (_, true) => Duration::ZERO,
        (_, false) => interval,
    }
}
