//! Flushes, and writes that must be durable before they complete.

use std::io;
use std::sync::atomic::Ordering as Memory;

use cdp_types::{IoError, IoErrorKind, Ordinal, RequestId, Seq};

use super::head::{HeadQueue, Job};
use crate::log::SyncPlan;
use crate::storage::Token;

/// What waits for the log to be durable.
#[derive(Debug, Default)]
pub struct Flushes {
    waiting: Vec<Waiting>,
    running: Option<Running>,
    /// Batches all of whose requests are among the events of the present `poll`.
    pub(super) finished: Vec<Ordinal>,
}

#[derive(Debug)]
struct Waiting {
    target: Ordinal,
    requests: Vec<RequestId>,
    reason: Reason,
}

#[derive(Debug)]
enum Reason {
    /// A guest's flush, which covers everything up to this `Seq`.
    Flush(Seq),
    /// A batch with writes that must be durable.
    Batch(Ordinal),
}

/// A sync that this queue leads.
#[derive(Debug)]
struct Running {
    plan: SyncPlan,
    left: usize,
    error: Option<String>,
}

impl Flushes {
    /// A batch's requests complete once it is durable.
    pub(super) fn add_batch(&mut self, ordinal: Ordinal, requests: Vec<RequestId>) {
        self.waiting.push(Waiting { target: ordinal, requests, reason: Reason::Batch(ordinal) });
    }
}

impl Flushes {
    /// Forgets what waits, and returns the batches whose completions nobody has been told of.
    pub(super) fn abandon(&mut self) -> Vec<Ordinal> {
        let batches = self.waiting.drain(..).filter_map(|waiting| match waiting.reason {
            Reason::Batch(ordinal) => Some(ordinal),
            Reason::Flush(_) => None,
        });
        batches.chain(self.finished.drain(..)).collect()
    }
}

impl HeadQueue {
    /// Everything acknowledged so far, on any queue, is durable once this request completes.
    pub(super) fn start_flush(&mut self, id: RequestId) {
        self.volume.counters().flushes.fetch_add(1, Memory::Relaxed);
        let log = self.volume.log();
        let (target, (seq, _)) = (log.acked(), log.head());
        drop(log);
        let waiting = Waiting { target, requests: vec![id], reason: Reason::Flush(seq) };
        self.flushes.waiting.push(waiting);
    }

    /// Ends what is durable by now, and starts a sync for the rest unless one is running.
    pub(super) fn pump_flushes(&mut self) {
        if self.flushes.waiting.is_empty() {
            return;
        }
        let volume = std::sync::Arc::clone(&self.volume);
        let mut log = volume.log();
        if let Some(why) = log.poisoned().map(str::to_owned) {
            drop(log);
            self.fail_flushes(&why);
            return;
        }
        let durable = log.durable();
        let mut flushed = None;
        let (ended, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.flushes.waiting).into_iter().partition(|w| w.target <= durable);
        self.flushes.waiting = rest;
        for waiting in &ended {
            if let Reason::Flush(seq) = waiting.reason {
                log.note_flush(seq);
                flushed = Some((seq, log.head().1));
            }
        }
        let plan = if self.flushes.waiting.is_empty() || self.flushes.running.is_some() {
            None
        } else {
            log.begin_sync(&self.inbox)
        };
        drop(log);
        if let Some((seq, time_ns)) = flushed {
            volume.map().note_flush(seq, time_ns);
        }
        for waiting in ended {
            self.end_waiting(waiting, Ok(()));
        }
        if let Some(plan) = plan {
            self.start_sync(plan);
        }
    }

    fn end_waiting(&mut self, waiting: Waiting, result: Result<(), IoError>) {
        for id in waiting.requests {
            self.finish(id, result.clone());
        }
        if let Reason::Batch(ordinal) = waiting.reason {
            self.flushes.finished.push(ordinal);
        }
    }

    fn fail_flushes(&mut self, why: &str) {
        for waiting in std::mem::take(&mut self.flushes.waiting) {
            self.end_waiting(waiting, Err(IoError::new(IoErrorKind::Device, why)));
        }
    }

    fn start_sync(&mut self, plan: SyncPlan) {
        self.volume.counters().syncs.fetch_add(1, Memory::Relaxed);
        for segment in &plan.segments {
            let token = self.jobs.insert(Job::Sync) as Token;
            self.lane.sync(token, &segment.file);
        }
        let left = plan.segments.len();
        self.flushes.running = Some(Running { plan, left, error: None });
        if left == 0 {
            self.end_sync();
        }
    }

    /// One file of the running sync has ended.
    pub(super) fn file_synced(&mut self, result: io::Result<()>) {
        let Some(running) = &mut self.flushes.running else { return };
        running.left -= 1;
        if let Err(error) = result {
            running.error.get_or_insert(format!("syncing the log failed: {error}"));
        }
        if running.left == 0 {
            self.end_sync();
        }
    }

    fn end_sync(&mut self) {
        let Some(running) = self.flushes.running.take() else { return };
        let result = running.error.map_or(Ok(()), Err);
        let mut log = self.volume.log();
        let waiters = log.end_sync(&running.plan, result);
        self.volume.cut_if_due(&mut log, Some(&self.inbox));
        drop(log);
        for waiter in waiters {
            waiter.send(super::Mail::Retry, Some(&self.inbox));
        }
        self.pump_flushes();
    }
}
