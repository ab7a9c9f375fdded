//! A store that is measured: one volume, with or without a past.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::Advice;

use super::Plan;
use super::segments;
use crate::api::Api;
use crate::client::{Client, Shape};
use crate::drive::{self, Job};
use crate::machine::gib;
use crate::meter::{self, MemoryWatch};
use crate::recovery::read_when_served;
use crate::server::Ours;
use crate::workload::{Access, Order};

pub(super) const BLOCK: u64 = 4096;
/// Blocks of a leaf of the map are neighbours within so many bytes.
pub(super) const LEAF_BYTES: u64 = 512 * BLOCK;
/// Writes between two looks at what can be given back.
const SLAB: u64 = 1_000_000;
/// Requests of a history in flight.
const DEPTH: usize = 128;
/// Sequential writes: so long, so many in flight.
const LARGE: (usize, usize) = (128 << 10, 16);
/// Nothing here takes longer.
const LONG: Duration = Duration::from_secs(24 * 3600);
const PATIENCE: Duration = Duration::from_secs(30);
/// Writes before a kill.
const BEFORE_KILL: u64 = 50_000;
/// How far a daemon that has been started may be from its first read when its memory is looked at for the last time.
const AFTER_OPEN: Duration = Duration::from_secs(2);

/// A daemon on a store of its own.
pub(super) struct Subject {
    pub(super) ours: Ours,
    /// Writes of 4 KiB that it has logged.
    pub(super) logged: u64,
    /// Segments whose data was given back.
    given_back: HashSet<PathBuf>,
    given_back_bytes: u64,
}

/// What a start after a kill took.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Opening {
    /// Requests in flight when it was killed.
    pub(super) in_flight: usize,
    /// From starting the daemon to the end of the first read.
    pub(super) first_read_ms: f64,
    pub(super) rss_bytes: u64,
    /// The most, until two seconds after the first read.
    pub(super) rss_anon_max_bytes: u64,
}

impl Subject {
    /// An empty store in `dir`.
    ///
    /// # Errors
    /// The daemon is not built, or does not start.
    pub(super) fn new(dir: &Path, plan: &Plan) -> Result<Self> {
        let ours = Ours::create(dir, plan.size_bytes)?;
        Ok(Self { ours, logged: 0, given_back: HashSet::new(), given_back_bytes: 0 })
    }

    /// Writes 4 KiB blocks at random until so many were logged, and gives old data back from time to time.
    ///
    /// # Errors
    /// A request fails, or the index is so far behind that what has to be given back may still be needed.
    pub(super) fn age(&mut self, plan: &Plan, until: u64) -> Result<()> {
        let start = (Instant::now(), self.logged);
        while self.logged < until {
            let count = SLAB.min(until - self.logged);
            // No slab goes where another one went.
            self.write(&plan.history(1_000_000 + self.logged, count), DEPTH)?;
            let rate = (self.logged - start.1) as f64 / start.0.elapsed().as_secs_f64();
            self.give_back(plan)?;
            eprintln!(
                "{} of {until} writes, {:.0} k/s; index {:.2} GiB; given back {:.1} GiB",
                self.logged,
                rate / 1e3,
                gib(self.index_bytes()?),
                gib(self.given_back_bytes),
            );
        }
        Ok(())
    }

    fn give_back(&mut self, plan: &Plan) -> Result<()> {
        let behind = Api::of(&self.ours).metric("cdpd_volume_pending_changes")? * BLOCK;
        ensure!(behind < plan.keep_bytes / 4, "the index is {:.1} GiB behind the log", gib(behind));
        let store = self.ours.store();
        self.given_back_bytes += segments::give_back(&store, plan.keep_bytes, &mut self.given_back)?;
        Ok(())
    }

    /// Makes the writes of a job on one queue.
    ///
    /// # Errors
    /// One fails.
    pub(super) fn write(&mut self, job: &Job, depth: usize) -> Result<()> {
        let shape = Shape { queues: 1, depth, request_bytes: job.bytes };
        drive::run(&mut Client::connect(&self.ours.place(), shape)?, job, || ())?;
        self.logged += job.limit_bytes / BLOCK;
        Ok(())
    }

    /// Writes the newest part of the history: the same on every store.
    ///
    /// # Errors
    /// As [`Subject::write`].
    pub(super) fn write_recent(&mut self, plan: &Plan) -> Result<()> {
        self.write(&plan.recent(), DEPTH)
    }

    /// Writes the working set once, from its start to its end.
    ///
    /// # Errors
    /// As [`Subject::write`].
    pub(super) fn write_working_set(&mut self, plan: &Plan) -> Result<()> {
        let (bytes, depth) = LARGE;
        let limit_bytes = plan.working_set_bytes;
        let job =
            Job { order: Order::Sequential, bytes, limit_bytes, time: LONG, ..plan.inside(Access::Write, 0) };
        self.write(&Job { warmup: Duration::ZERO, ..job }, depth)
    }

    /// Kills the daemon while it writes, starts it again, and reads.
    ///
    /// # Errors
    /// It does not come back, or a request fails.
    pub(super) fn kill_and_open(&mut self, plan: &Plan, seed: u64) -> Result<Opening> {
        let in_flight = self.write_and_kill(&plan.history(seed, BEFORE_KILL))?;
        let offset = drive::places(&plan.recent())?.next().context("no history")?;
        let start = Instant::now();
        self.ours.spawn()?;
        let watch = MemoryWatch::new(self.ours.pid()?);
        let place = self.ours.place();
        read_when_served(&mut self.ours, &place, offset)?;
        let first_read_ms = start.elapsed().as_secs_f64() * 1e3;
        let rss_bytes = meter::rss(self.ours.pid()?)?;
        std::thread::sleep(AFTER_OPEN);
        let opening = Opening { in_flight, first_read_ms, rss_bytes, rss_anon_max_bytes: watch.most() };
        eprintln!("first read after {first_read_ms:.0} ms");
        Ok(opening)
    }

    /// Makes the writes of a job, and kills the daemon when the last of them are in flight; returns how many are.
    ///
    /// # Errors
    /// One fails, or the daemon has ended.
    pub(super) fn write_and_kill(&mut self, job: &Job) -> Result<usize> {
        let shape = Shape { queues: 1, depth: DEPTH, request_bytes: job.bytes };
        let mut client = Client::connect(&self.ours.place(), shape)?;
        let lane = &mut client.lanes()[0];
        // Not zeroes: what is read later is told by them from what was never written.
        (0..DEPTH).for_each(|slot| lane.fill(slot, &[slot as u8 | 1; BLOCK as usize]));
        let mut free: Vec<usize> = (0..DEPTH).collect();
        let writes = job.limit_bytes / BLOCK;
        for offset in drive::places(job)?.take(writes as usize) {
            if free.is_empty() {
                let done = lane.reap(1, PATIENCE)?;
                ensure!(!done.is_empty() && done.iter().all(|done| done.ok), "a write failed: {done:?}");
                free.extend(done.iter().map(|done| done.slot));
            }
            let slot = free.pop().context("an answer without a slot")?;
            lane.write(slot, offset, job.bytes);
        }
        lane.reap(0, Duration::ZERO)?;
        let in_flight = lane.in_flight();
        self.ours.kill9()?;
        self.logged += writes - in_flight as u64;
        Ok(in_flight)
    }

    /// Stops the daemon cleanly and starts it with another budget for the map, or its own, when nothing of the index is in
    /// memory; it then begins to read the newest part of it by itself.
    ///
    /// # Errors
    /// It does not stop or start.
    pub(super) fn open_anew(&mut self, budget_bytes: Option<u64>) -> Result<()> {
        self.ours.stop()?;
        self.ours.configure(
            &budget_bytes.map_or(String::new(), |bytes| format!("[store]\nmap_budget = {bytes}\n")),
        )?;
        self.drop_cached_index()?;
        self.ours.spawn()?;
        self.ours.wait_until_it_serves()
    }

    /// Has the kernel forget what it holds of the index.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn drop_cached_index(&self) -> Result<()> {
        for path in self.index_files()? {
            rustix::fs::fadvise(File::open(path)?, 0, None, Advice::DontNeed)?;
        }
        Ok(())
    }

    /// What the time index takes on the disk.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn index_bytes(&self) -> Result<u64> {
        // A file that a compaction has removed meanwhile takes nothing.
        Ok(self.index_files()?.iter().filter_map(|path| fs::metadata(path).ok()).map(|file| file.len()).sum())
    }

    fn index_files(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.ours.store().join("index"))?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "sst")).collect())
    }

    /// The newest batch of its log.
    ///
    /// # Errors
    /// The daemon does not say.
    pub(super) fn ordinal(&self) -> Result<u64> {
        Api::of(&self.ours).metric("cdpd_volume_head_ordinal")
    }
}

impl Plan {
    /// Random writes all over the history's part of the disk.
    pub(super) fn history(&self, seed: u64, count: u64) -> Job {
        Job {
            access: Access::Write,
            order: Order::Random,
            bytes: BLOCK as usize,
            from_bytes: 0,
            range_bytes: self.spread_bytes,
            warmup: Duration::ZERO,
            time: LONG,
            limit_bytes: count * BLOCK,
            rate: None,
            seed,
        }
    }

    /// Those that every store gets last, so that it has some of every leaf that is looked at.
    pub(super) fn recent(&self) -> Job {
        self.history(1, self.recent_writes)
    }

    /// Random requests to the working set, which lies behind the history's part of the disk.
    pub(super) fn inside(&self, access: Access, seed: u64) -> Job {
        Job {
            access,
            from_bytes: self.spread_bytes,
            range_bytes: self.working_set_bytes,
            warmup: self.warmup,
            time: self.time,
            limit_bytes: if access == Access::Read { u64::MAX } else { self.phase_bytes },
            rate: None,
            ..self.history(seed, 0)
        }
    }
}
