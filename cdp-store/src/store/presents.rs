//! Writing down what leaves look like now, while nobody writes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use cdp_types::{BranchId, VolumeId};

use super::{Inner, Store};
use crate::catalogue::Stage;
use crate::error::{Error, ErrorKind, Result};
use crate::index::{IndexError, IndexErrorKind};
use crate::pace::Pace;
use crate::volume::Volume;

/// At most one pass over all volumes in this time: leaves that change all the time are not written down after each change.
const PASS_INTERVAL: Duration = Duration::from_secs(30 * 60);

/// How far this pass is.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// The next leaf: volumes before it are done.
    next: (VolumeId, u64),
    /// When the last whole pass was over.
    over_ns: Option<u64>,
}

fn is_damage(error: &IndexError) -> bool {
    error.kind() == IndexErrorKind::Corrupt
}

fn failed(error: IndexError) -> Error {
    Error::new(ErrorKind::Io, "writing down what leaves look like now").with(error)
}

impl Store {
    /// Goes on with a pass over the stale leaves of all heads, until it is over or somebody writes; returns how long to wait
    /// until the next one is due, if one is. It is no use while the index's own cache is as large as the index.
    ///
    /// # Errors
    /// What the index says. Leaves whose rows are damaged are passed over.
    pub(super) fn pass_presents(&self) -> Result<Option<Duration>> {
        let Inner { shared, pass, .. } = &*self.inner;
        let mut pass = pass.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.index.fits_cache().map_err(failed)? || !self.has_stale_leaves() {
            return Ok(None);
        }
        if let Some(over) = pass.over_ns {
            let since = Duration::from_nanos(shared.clock.boot_ns().saturating_sub(over));
            if since < PASS_INTERVAL {
                return Ok(Some(PASS_INTERVAL - since));
            }
        }
        let rests = || shared.index_rests.load(Ordering::SeqCst) && !shared.is_closing();
        // Somebody may have let go of the store, which this thread then keeps for no longer than one step.
        let goes_on = || rests() && Arc::strong_count(&self.inner) > 1;
        let result = self.write_presents_of_all(&mut pass.next, goes_on);
        let is_over = goes_on();
        if is_over {
            *pass = Pass { over_ns: Some(shared.clock.boot_ns()), ..Pass::default() };
        }
        // Some may have changed behind it, if it was interrupted.
        result.map(|()| (is_over && self.has_stale_leaves()).then_some(PASS_INTERVAL))
    }

    /// Writes down all leaves of heads that have changed since they were written down. For stores without background threads.
    ///
    /// # Errors
    /// What the index says.
    pub fn write_presents(&self) -> Result<()> {
        self.write_presents_of_all(&mut (VolumeId(0), 0), || true)
    }

    /// Volumes that are there to stay.
    fn lasting(&self) -> impl Iterator<Item = Arc<Volume>> {
        let lasts = |volume: &Arc<Volume>| matches!(volume.row().stage, Stage::Visible | Stage::Memory);
        self.all_volumes().into_iter().filter(move |volume| !volume.is_read_only() && lasts(volume))
    }

    fn has_stale_leaves(&self) -> bool {
        let heads: Vec<BranchId> = self.lasting().map(|volume| volume.map().head()).collect();
        heads.iter().any(|head| !self.inner.shared.index.stale_leaves(*head, 0).is_empty())
    }

    fn write_presents_of_all(&self, next: &mut (VolumeId, u64), goes_on: impl Fn() -> bool) -> Result<()> {
        let index = &self.inner.shared.index;
        let (mut pace, mut outcome, mut wrote) = (Pace::gentle(), Ok(()), false);
        let begin = *next;
        'pass: for volume in self.lasting().filter(|volume| volume.id() >= begin.0) {
            let mut from = if volume.id() == begin.0 { begin.1 } else { 0 };
            while goes_on() {
                let (branch, indexed) = {
                    let map = volume.map();
                    (map.head(), map.indexed())
                };
                let leaves = index.stale_leaves(branch, from);
                let Some(last) = leaves.last() else { break };
                from = last + 1;
                let write = |leaves: &[u64]| index.write_presents(branch, leaves, indexed);
                let mut done = write(&leaves);
                if done.as_ref().is_err_and(is_damage) {
                    // Only some of them are damaged.
                    let each: Vec<_> = leaves.iter().map(|leaf| write(&[*leaf])).collect();
                    done = each.into_iter().try_fold(true, |all, one| Ok(one? && all));
                    wrote = true;
                }
                match done {
                    // Something was written meanwhile, so most likely the pass will go on here.
                    Ok(false) => continue,
                    Ok(true) => wrote = true,
                    Err(error) if is_damage(&error) => outcome = outcome.and(Err(failed(error))),
                    Err(error) => {
                        outcome = Err(failed(error));
                        break 'pass;
                    }
                }
                *next = (volume.id(), from);
                pace.step();
            }
        }
        if wrote && goes_on() {
            outcome = outcome.and(self.index_flush());
        } else if wrote {
            // Whoever writes now is not to wait for it.
            let mut health = self.inner.index_health.lock().unwrap_or_else(PoisonError::into_inner);
            health.changes_since_flush += 1;
        }
        outcome
    }
}

#[cfg(test)]
#[path = "presents_tests.rs"]
mod tests;
