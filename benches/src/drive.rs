//! Keeps requests in flight for a while and counts what ends: the same loop for every server.

use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rand_distr::{Distribution, Zipf};

use crate::client::{Client, Lane};
use crate::workload::{Access, Order};

/// The rate is kept for every stretch of this length.
pub(crate) const SLICE: Duration = Duration::from_millis(100);
/// A server that ends no request for so long is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// Latencies are kept with this many digits.
const DIGITS: u8 = 3;
/// The part of a job that may be done before it is measured: a fast server is through with little before the time is over.
const WARMUP_PART: u64 = 4;
/// Which part of mixed requests are reads.
const READS_OF_MIXED: f64 = 0.7;
/// How steeply the wish for blocks falls ([`Order::Zipf`]).
const ZIPF_EXPONENT: f64 = 0.99;

/// What to do with a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) access: Access,
    pub(crate) order: Order,
    /// Bytes of a request.
    pub(crate) bytes: usize,
    /// The working set begins at this byte of the disk.
    pub(crate) from_bytes: u64,
    /// And has so many.
    pub(crate) range_bytes: u64,
    /// What ends within this time after the start is not measured; it is shorter if a quarter of `limit_bytes` was asked for
    /// before.
    pub(crate) warmup: Duration,
    /// When it ends after that.
    pub(crate) time: Duration,
    /// It also ends when so many bytes were asked for.
    pub(crate) limit_bytes: u64,
    /// Operations per second, over all queues, if they are made at fixed times rather than as fast as they end.
    pub(crate) rate: Option<f64>,
    /// Where random requests go follows from it.
    pub(crate) seed: u64,
}

/// What came of a job.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Operations that ended while it was measured.
    pub(crate) operations: u64,
    /// For how long it was measured.
    pub(crate) seconds: f64,
    /// How long the operations took, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
    /// Operations that ended in each [`SLICE`] since the start, warm-up included.
    pub(crate) slices: Vec<u64>,
}

/// Runs a job on every queue of a client at once, as deep as the client was connected for.
///
/// `measuring` is called, on this thread, when the warm-up is over.
///
/// # Errors
/// A request failed, or none ended for a long time.
pub(crate) fn run(client: &mut Client, job: &Job, measuring: impl FnOnce()) -> Result<Outcome> {
    let lanes = client.lanes();
    let queues = lanes.len() as u64;
    let start = Instant::now();
    let (over, is_over) = mpsc::channel();
    let warmup = Warmup { by_time: start + job.warmup, by_work: OnceLock::new(), over };
    let outcomes: Vec<Result<LaneOutcome>> = thread::scope(|scope| {
        let started: Vec<_> = (0..)
            .zip(lanes)
            .map(|(index, lane)| {
                let (places, warmup) = (Places::new(job, index, queues), &warmup);
                scope.spawn(move || Loop::new(lane, job, places?, start, queues, warmup)?.run())
            })
            .collect();
        // That nobody says so is how it usually ends.
        let _ = is_over.recv_timeout(job.warmup.saturating_sub(start.elapsed()));
        measuring();
        started
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a queue's thread panicked"))?)
            .collect()
    });
    let mut all =
        Outcome { operations: 0, seconds: 0.0, latency: Histogram::new(DIGITS)?, slices: Vec::new() };
    for outcome in outcomes {
        let outcome = outcome?;
        all.operations += outcome.latency.len();
        all.seconds = all.seconds.max(outcome.end.saturating_duration_since(warmup.end()).as_secs_f64());
        all.latency.add(&outcome.latency)?;
        all.slices.resize(all.slices.len().max(outcome.slices.len()), 0);
        all.slices.iter_mut().zip(&outcome.slices).for_each(|(sum, count)| *sum += count);
    }
    ensure!(all.seconds > 0.0 && all.operations > 0, "the work was done before the warm-up was over");
    Ok(all)
}

/// Where the requests of a job on one queue go, in the order in which they are made; without end.
///
/// # Errors
/// The working set is empty.
pub(crate) fn places(job: &Job) -> Result<impl Iterator<Item = u64>> {
    let mut places = Places::new(job, 0, 1)?;
    Ok(std::iter::repeat_with(move || places.next()))
}

/// Where the requests of one queue go.
struct Places {
    order: Order,
    from: u64,
    bytes: u64,
    /// This queue's part of the working set, in requests.
    first: u64,
    count: u64,
    next: u64,
    zipf: Option<Zipf<f64>>,
    random: SmallRng,
}

impl Places {
    /// Places for one of several queues; it fails only on an empty working set.
    fn new(job: &Job, index: u64, queues: u64) -> Result<Self> {
        let bytes = job.bytes as u64;
        let all = job.range_bytes / bytes;
        let (first, count) = match job.order {
            Order::Random | Order::Zipf => (0, all),
            Order::Sequential => (all / queues * index, all / queues),
        };
        ensure!(count > 0, "an empty working set");
        let zipf = match job.order {
            Order::Zipf => Some(Zipf::new(all as f64, ZIPF_EXPONENT).context("an empty working set")?),
            Order::Random | Order::Sequential => None,
        };
        let random = SmallRng::seed_from_u64(job.seed.wrapping_add(index));
        Ok(Self { order: job.order, from: job.from_bytes, bytes, first, count, next: 0, zipf, random })
    }

    fn next(&mut self) -> u64 {
        let request = match self.order {
            Order::Random => self.random.random_range(0..self.count),
            // Ranks count from 1. The multiplier, a large prime, strews them over the disk: neighbours in rank are none there.
            Order::Zipf => {
                let rank = self.zipf.map_or(1.0, |zipf| zipf.sample(&mut self.random)) as u64;
                rank.wrapping_mul(0x9E37_79B9_7F4A_7C55) % self.count
            }
            Order::Sequential => {
                self.next += 1;
                (self.next - 1) % self.count
            }
        };
        self.from + (self.first + request) * self.bytes
    }
}

/// When what ends begins to count.
struct Warmup {
    by_time: Instant,
    by_work: OnceLock<Instant>,
    over: Sender<()>,
}

impl Warmup {
    fn end(&self) -> Instant {
        self.by_work.get().copied().unwrap_or(self.by_time)
    }

    /// Enough is done: it ends now, unless it is over.
    fn end_at(&self, now: Instant) {
        if now < self.by_time && self.by_work.set(now).is_ok() {
            // Who waits for it is there as long as this is.
            let _ = self.over.send(());
        }
    }
}

struct LaneOutcome {
    latency: Histogram<u64>,
    slices: Vec<u64>,
    end: Instant,
}

/// One queue's loop.
struct Loop<'a> {
    lane: &'a mut Lane,
    job: &'a Job,
    places: Places,
    start: Instant,
    /// Requests that may still be made.
    left: u64,
    warmup: &'a Warmup,
    /// Fewer are left once enough is done to be measured.
    warm_left: u64,
    /// Between two operations, if they are made at fixed times.
    pace: Option<Duration>,
    /// When each slot's operation began, and whether its flush is in flight.
    slots: Vec<(Instant, bool)>,
    latency: Histogram<u64>,
    slices: Vec<u64>,
}

impl<'a> Loop<'a> {
    fn new(
        lane: &'a mut Lane,
        job: &'a Job,
        places: Places,
        start: Instant,
        queues: u64,
        warmup: &'a Warmup,
    ) -> Result<Self> {
        let depth = lane.shape().depth;
        let mut content = vec![0; job.bytes];
        // A copy of the generator: the places must be the same when they are drawn again.
        let mut random = places.random.clone();
        for slot in 0..depth {
            // No server is to gain from zeroes or from what it has seen before.
            random.fill_bytes(&mut content);
            lane.fill(slot, &content);
        }
        let left = job.limit_bytes / job.bytes as u64 / queues;
        let pace = job.rate.map(|rate| Duration::from_secs_f64(queues as f64 / rate));
        let slots = vec![(start, false); depth];
        Ok(Self {
            lane,
            job,
            places,
            start,
            left,
            warmup,
            warm_left: left - left / WARMUP_PART,
            pace,
            slots,
            latency: Histogram::new(DIGITS)?,
            slices: Vec::new(),
        })
    }

    fn run(self) -> Result<LaneOutcome> {
        match self.pace {
            Some(pace) => self.run_paced(pace),
            None => self.run_full(),
        }
    }

    /// Begins an operation every `pace`, whether earlier ones have ended or not. How long it takes counts from the time
    /// at which it was due: one that finds no slot free has begun to wait all the same.
    fn run_paced(mut self, pace: Duration) -> Result<LaneOutcome> {
        let deadline = self.start + self.job.warmup + self.job.time;
        let mut free: Vec<usize> = (0..self.slots.len()).collect();
        let mut due = self.start;
        let mut end = self.start;
        loop {
            let now = Instant::now();
            while due <= now && due < deadline && self.left > 0 {
                let Some(slot) = free.pop() else { break };
                self.begin(slot, due);
                due += pace;
            }
            let more = due < deadline && self.left > 0;
            if self.lane.in_flight() == 0 {
                if !more {
                    break;
                }
                thread::sleep(due.saturating_duration_since(Instant::now()));
                continue;
            }
            let waits = more && !free.is_empty();
            let patience = if waits { due.saturating_duration_since(now) } else { PATIENCE };
            let ended = self.lane.reap(1, patience)?;
            ensure!(waits || !ended.is_empty(), "no request has ended for {PATIENCE:?}");
            let (now, ended) = (Instant::now(), ended.to_vec());
            for done in ended {
                ensure!(done.ok, "a request failed");
                let begun = self.slots[done.slot].0;
                self.count(now, begun, begun >= self.warmup.end())?;
                free.push(done.slot);
                end = now;
            }
        }
        Ok(LaneOutcome { latency: self.latency, slices: self.slices, end })
    }

    fn run_full(mut self) -> Result<LaneOutcome> {
        let deadline = self.start + self.job.warmup + self.job.time;
        for slot in 0..self.slots.len() {
            self.begin(slot, Instant::now());
        }
        let mut ended = Vec::with_capacity(self.slots.len());
        let mut now = Instant::now();
        while self.lane.in_flight() > 0 {
            ended.clear();
            ended.extend_from_slice(self.lane.reap(1, PATIENCE)?);
            ensure!(!ended.is_empty(), "no request has ended for {PATIENCE:?}");
            now = Instant::now();
            let measured = now >= self.warmup.end();
            for done in &ended {
                ensure!(done.ok, "a request failed");
                let (begun, flushing) = self.slots[done.slot];
                if self.job.access == Access::WriteFlush && !flushing {
                    self.slots[done.slot].1 = true;
                    self.lane.flush(done.slot);
                    continue;
                }
                // What is still in flight at the deadline is waited for, not counted.
                if now < deadline {
                    self.count(now, begun, measured)?;
                    self.begin(done.slot, now);
                }
            }
        }
        Ok(LaneOutcome { latency: self.latency, slices: self.slices, end: now.min(deadline) })
    }

    /// Begins the next operation in a slot, if there is one left.
    fn begin(&mut self, slot: usize, now: Instant) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        if self.left < self.warm_left {
            self.warmup.end_at(now);
        }
        self.slots[slot] = (now, false);
        let offset = self.places.next();
        let reads = match self.job.access {
            Access::Read => true,
            Access::Mixed => self.places.random.random_bool(READS_OF_MIXED),
            Access::Write | Access::WriteFlush => false,
        };
        if reads {
            self.lane.read(slot, offset, self.job.bytes);
        } else {
            self.lane.write(slot, offset, self.job.bytes);
        }
    }

    fn count(&mut self, now: Instant, begun: Instant, measured: bool) -> Result<()> {
        let slice = ((now - self.start).as_nanos() / SLICE.as_nanos()) as usize;
        if slice >= self.slices.len() {
            self.slices.resize(slice + 1, 0);
        }
        self.slices[slice] += 1;
        if measured {
            let latency = (now - begun).as_nanos() as u64;
            self.latency.record(latency).context("a latency beyond all bounds")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;
    use crate::client::{Place, Shape};

    const BYTES: u64 = 1 << 20;

    fn job(access: Access, order: Order) -> Job {
        Job {
            access,
            order,
            bytes: 4096,
            from_bytes: 0,
            range_bytes: BYTES,
            warmup: Duration::ZERO,
            time: Duration::from_secs(3600),
            limit_bytes: BYTES,
            rate: None,
            seed: 1,
        }
    }

    #[test]
    fn queues_share_sequential_work_and_roam_in_random_work() {
        let places = |order, index| {
            let mut places = Places::new(&job(Access::Read, order), index, 4).unwrap();
            (0..64).map(|_| places.next()).collect::<BTreeSet<_>>()
        };
        let sequential: BTreeSet<u64> = (0..4).flat_map(|index| places(Order::Sequential, index)).collect();
        assert_eq!(sequential.len() as u64, BYTES / 4096);
        assert_eq!(places(Order::Sequential, 3).first(), Some(&(BYTES / 4 * 3)));
        assert!(places(Order::Random, 0).iter().any(|offset| *offset > BYTES / 4 * 3));
        assert_ne!(places(Order::Random, 0), places(Order::Random, 1));
    }

    #[test]
    fn an_empty_working_set_is_refused() {
        for order in [Order::Random, Order::Zipf, Order::Sequential] {
            let job = Job { range_bytes: 4 * 4096 - 1, ..job(Access::Read, order) };
            assert!(Places::new(&job, 0, 1).is_ok(), "{order:?}");
            assert_eq!(Places::new(&job, 0, 4).is_err(), order == Order::Sequential, "{order:?}");
            assert!(Places::new(&Job { range_bytes: 4095, ..job }, 0, 1).is_err(), "{order:?}");
        }
    }

    #[test]
    fn a_few_blocks_get_most_zipf_requests_and_lie_anywhere() {
        let mut places = Places::new(&job(Access::Read, Order::Zipf), 0, 1).unwrap();
        let mut counts = std::collections::BTreeMap::<u64, u32>::new();
        (0..10_000).for_each(|_| *counts.entry(places.next()).or_default() += 1);
        assert!(counts.keys().all(|offset| *offset < BYTES && offset % 4096 == 0));
        let mut most: Vec<(u32, u64)> = counts.into_iter().map(|(offset, count)| (count, offset)).collect();
        most.sort_unstable_by(|a, b| b.cmp(a));
        // Of 256 blocks, the first gets one in six, and the first eight nearly half.
        assert!((1300..2000).contains(&most[0].0), "{most:?}");
        assert!((3500..5000).contains(&most[..8].iter().map(|(count, _)| count).sum::<u32>()), "{most:?}");
        assert!(most[1].1.abs_diff(most[0].1) > 4096, "{most:?}");
    }

    #[test]
    fn a_job_ends_with_its_bytes_and_counts_every_operation() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(BYTES).unwrap();
        let place = Place::File(file.path().to_owned());
        let shape = Shape { queues: 2, depth: 8, request_bytes: 4096 };
        for access in [Access::Write, Access::WriteFlush, Access::Read, Access::Mixed] {
            let mut client = Client::connect(&place, shape).unwrap();
            let mut called = 0;
            let outcome = run(&mut client, &job(access, Order::Sequential), || called += 1).unwrap();
            assert_eq!((outcome.operations, called), (BYTES / 4096, 1), "{access:?}");
            assert_eq!(outcome.slices.iter().sum::<u64>(), BYTES / 4096);
        }
        let content = std::fs::read(file.path()).unwrap();
        assert!(
            content.chunks(4096).all(|block| block.iter().any(|byte| *byte != 0)),
            "a block was not written"
        );
    }

    #[test]
    fn a_job_that_is_done_within_its_warm_up_is_measured_all_the_same() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(BYTES).unwrap();
        let shape = Shape { queues: 2, depth: 8, request_bytes: 4096 };
        let mut client = Client::connect(&Place::File(file.path().to_owned()), shape).unwrap();
        let job = Job { warmup: Duration::from_secs(600), ..job(Access::Write, Order::Random) };
        let mut called = None;
        let outcome = run(&mut client, &job, || called = Some(Instant::now())).unwrap();
        assert!(called.is_some() && outcome.seconds < 600.0, "{} s", outcome.seconds);
        assert_eq!(outcome.slices.iter().sum::<u64>(), BYTES / 4096);
        assert!((BYTES / 4096 / 2..=BYTES / 4096).contains(&outcome.operations), "{}", outcome.operations);
    }

    #[test]
    fn what_a_job_writes_can_be_drawn_again() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(64 * BYTES).unwrap();
        let shape = Shape { queues: 1, depth: 8, request_bytes: 4096 };
        let mut client = Client::connect(&Place::File(file.path().to_owned()), shape).unwrap();
        let limit_bytes = 50 * 4096;
        let job = Job {
            from_bytes: BYTES,
            range_bytes: 63 * BYTES,
            limit_bytes,
            ..job(Access::Write, Order::Random)
        };
        run(&mut client, &job, || {}).unwrap();
        let content = std::fs::read(file.path()).unwrap();
        let blocks = (0..).step_by(4096).zip(content.chunks(4096));
        let written = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        let written: BTreeSet<u64> = written.map(|(at, _)| at).collect();
        assert_eq!(written, places(&job).unwrap().take(50).collect());
        assert!(written.first() >= Some(&BYTES));
    }

    #[test]
    fn a_paced_job_makes_its_requests_when_they_are_due_and_counts_how_late_they_end() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(BYTES).unwrap();
        let shape = Shape { queues: 2, depth: 4, request_bytes: 4096 };
        let mut client = Client::connect(&Place::File(file.path().to_owned()), shape).unwrap();
        let paced = |rate| Job {
            rate: Some(rate),
            time: Duration::from_millis(50),
            limit_bytes: u64::MAX,
            ..job(Access::Read, Order::Random)
        };
        let outcome = run(&mut client, &paced(1000.0), || {}).unwrap();
        assert_eq!(outcome.operations, 50, "each queue makes one every 2 ms");
        // More than any disk does: those that are due wait, and are waited for.
        let outcome = run(&mut client, &paced(1e6), || {}).unwrap();
        assert_eq!(outcome.operations, 50_000);
        let waited = outcome.latency.max() as f64 / 1e9;
        assert!(
            waited > outcome.seconds - 0.1,
            "the last one, due after 0.05 s, waited {waited} of {} s",
            outcome.seconds
        );
    }

    #[test]
    fn a_job_ends_with_its_time() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(BYTES).unwrap();
        let shape = Shape { queues: 1, depth: 2, request_bytes: 4096 };
        let mut client = Client::connect(&Place::File(file.path().to_owned()), shape).unwrap();
        let (warmup, time) = (Duration::from_millis(50), Duration::from_millis(200));
        let job = Job { warmup, time, limit_bytes: u64::MAX, ..job(Access::Read, Order::Random) };
        // A machine that does something else meanwhile may leave a warm-up without requests, but not again and again.
        let had_warm_up = (0..50).any(|_| {
            let Ok(outcome) = run(&mut client, &job, || {}) else { return false };
            assert!(outcome.seconds <= 0.2, "{}", outcome.seconds);
            outcome.slices.iter().sum::<u64>() > outcome.operations
        });
        assert!(had_warm_up, "the warm-up is in the slices only");
    }
}
