//! A log's next segment: ordered, supplied, and what becomes of requests while there is none.

use std::sync::Arc;
use std::sync::atomic::Ordering as Memory;

use cdp_types::{IoErrorKind, one_line};

use super::{Volume, lock};
use crate::error::{Error, ErrorKind};
use crate::format::data_start;
use crate::log::{Append, Draft, LogState};
use crate::queue::Inbox;
use crate::segments::Blank;

/// The reason of requests that fail since the store is full.
const STORE_FULL: &str = "the store is full; free space on its disk, or destroy a volume";

/// Why a log has not got the segment that it has ordered.
#[derive(Debug)]
pub(super) struct Refused {
    /// Since when, and when for the last time, on the boot clock.
    since_ns: u64,
    latest_ns: u64,
    /// What requests fail with that have waited for too long.
    kind: IoErrorKind,
    why: String,
    /// One has, so others wait only until it has been tried once more.
    has_failed_others: bool,
}

impl Volume {
    /// Gives a draft its place in the log; orders a segment where one is needed.
    pub(crate) fn append(&self, draft: Draft, owner: &Arc<Inbox>) -> Append {
        let mut log = self.log();
        self.append_locked(&mut log, draft, owner)
    }

    pub(crate) fn append_locked(&self, log: &mut LogState, draft: Draft, owner: &Arc<Inbox>) -> Append {
        let outcome = log.append(&self.shared.log, draft, owner);
        self.order_segment(log);
        if let Append::Blocked(_) = outcome {
            self.wait_for_change(owner);
        }
        outcome
    }

    pub(super) fn order_segment(&self, log: &LogState) {
        // Who tries again meanwhile does not hurry the pool: it looks as often as it should.
        if let Some(wish) = log.wants_segment(&self.shared.log)
            && self.shared.log.segments.order(self.id, wish)
        {
            self.shared.pool_bell.ring();
        }
    }

    /// Notes that the segment that was ordered cannot be had now. It is tried again.
    pub(crate) fn refuse_segment(&self, error: &Error) {
        let mut log = self.log();
        self.note_refused(error);
        if !log.cut_wants_segment() {
            self.cut_waits_since_ns.store(0, Memory::Relaxed);
        } else {
            let now = self.shared.clock.boot_ns().max(1);
            let before = self.cut_waits_since_ns.compare_exchange(0, now, Memory::Relaxed, Memory::Relaxed);
            let since = before.err().unwrap_or(now);
            // What is in flight can only end behind a cut, and for a cut there is space kept back. Somebody else may have
            // taken that: it is waited for like all space, and then what is in flight must end without.
            let unit = self.shared.log.segments.alignment().physical_block;
            match self.shared.log.segments.create_of_reserve(data_start(unit) + u64::from(unit)) {
                Ok(blank) => {
                    self.cut_waits_since_ns.store(0, Memory::Relaxed);
                    self.take_over(&mut log, blank);
                }
                Err(error) if self.starved(since).is_some() => {
                    log.poison(format!("no segment for a cut: {}", one_line(&error)));
                }
                Err(error) => tracing::debug!(volume = %self.id, "no segment for a cut: {error}"),
            }
            self.cut_if_due(&mut log, None);
        }
        drop(log);
        self.wake_waiters(None);
    }

    fn note_refused(&self, error: &Error) {
        let (kind, why) = match error.kind() {
            ErrorKind::NoSpace => (IoErrorKind::NoSpace, STORE_FULL.to_owned()),
            _ => (IoErrorKind::Device, format!("the log gets no further segment: {}", one_line(error))),
        };
        let mut refused = lock(&self.refused);
        if refused.as_ref().is_none_or(|before| before.kind != kind) {
            // Well before that, mostly: it is ordered when the present one is half full.
            match kind {
                IoErrorKind::NoSpace => {
                    tracing::warn!(volume = %self.id, "the store is full: writes wait, then fail")
                }
                _ => tracing::error!(volume = %self.id, "{why}; writes wait, then fail"),
            }
        }
        let latest_ns = self.shared.clock.boot_ns();
        let (since_ns, has_failed_others) = match &*refused {
            Some(before) => (before.since_ns, before.has_failed_others),
            None => (latest_ns, false),
        };
        *refused = Some(Refused { since_ns, latest_ns, kind, why, has_failed_others });
    }

    /// What a request is to fail with that has had no place in the log since then, on the boot clock: if that is longer than
    /// requests should wait, or another one has failed already and there still was no place when it was tried after that.
    pub(crate) fn starved(&self, since_ns: u64) -> Option<(IoErrorKind, String)> {
        let mut refused = lock(&self.refused);
        let Refused { since_ns: refused_ns, latest_ns, kind, why, has_failed_others } = refused.as_mut()?;
        let waited = self.shared.clock.boot_ns().saturating_sub(since_ns.max(*refused_ns));
        let is_over = u128::from(waited) >= self.shared.tuning.full_wait.as_nanos()
            || *has_failed_others && *latest_ns > since_ns;
        // It may come yet: what is lacking has been found, and is being filled with zeroes.
        let comes = || self.shared.log.segments.is_supplying(self.id);
        if !is_over || comes() {
            return None;
        }
        *has_failed_others = true;
        Some((*kind, why.clone()))
    }

    /// Hands over a blank segment that was ordered.
    pub(crate) fn supply(&self, blank: Blank) {
        match lock(&self.refused).take().map(|refused| refused.kind) {
            Some(IoErrorKind::NoSpace) => {
                tracing::info!(volume = %self.id, "the store has space again: writes go on");
            }
            Some(_) => tracing::info!(volume = %self.id, "the log gets segments again: writes go on"),
            None => {}
        }
        let mut log = self.log();
        self.cut_waits_since_ns.store(0, Memory::Relaxed);
        self.take_over(&mut log, blank);
        self.cut_if_due(&mut log, None);
        drop(log);
        self.wake_waiters(None);
    }

    /// Has the log take a blank segment; one that it had at hand already goes back.
    pub(crate) fn take_over(&self, log: &mut LogState, blank: Blank) {
        if let Some(spare) = log.supply(blank) {
            self.shared.log.segments.give_back(spare);
        }
    }
}
