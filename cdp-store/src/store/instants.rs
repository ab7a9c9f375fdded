//! Finding instants.
//!
//! A volume's history is what its users saw, in the order in which they saw it: before a revert the old branch, from
//! its start on the new one. So a time or a `Seq` means the same whatever was reverted since, and what a revert has
//! left behind is still found where it was. Before a clone's own beginning its history is that of its source.

use std::sync::Arc;

use cdp_types::{BlockDevice, Instant, Seq, VolumeName};

use super::Store;
use super::checkpoints::find_epoch;
use crate::catalogue::{BranchRow, BranchState, Catalogue, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::lineage::At;
use crate::volume::{Resolved, Volume};

/// A point of the store's order.
#[derive(Clone, Copy, Debug)]
enum Point {
    Seq(Seq),
    Time(u64),
}

impl Point {
    fn reaches(self, branch: &BranchRow) -> bool {
        match self {
            Self::Seq(seq) => branch.start <= seq,
            Self::Time(time_ns) => branch.created_ns <= time_ns,
        }
    }
}

impl Store {
    /// Finds an instant of a volume's history.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such volume, mark, flush or complete checkpoint's epoch, if the instant lies before the volume's
    /// history, or in a part of it that was deleted; [`ErrorKind::Invalid`] for a `Seq` in the future; [`ErrorKind::Busy`] for a
    /// time at which writes were placed that do not end.
    pub fn resolve(&self, name: &VolumeName, instant: &Instant) -> Result<Resolved> {
        self.resolve_of(&*self.volume(name)?, instant)
    }

    /// The same for a volume that is at hand, whatever its name has become, and for scratch volumes, which have none.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn resolve_of(&self, volume: &Volume, instant: &Instant) -> Result<Resolved> {
        let head = volume.head();
        let point = match instant {
            Instant::Head => Point::Seq(head.seq),
            Instant::Seq(seq) if *seq > head.seq => {
                let text =
                    format!("seq:{seq} is not in the history yet; the newest instant is seq:{}", head.seq);
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            Instant::Seq(seq) => Point::Seq(*seq),
            Instant::Time(time_ns) => {
                let now = self.inner.shared.log.clock.stamp().time_ns;
                if *time_ns > now {
                    let text = format!("{instant} lies in the future; it is {}", Instant::Time(now));
                    return Err(Error::new(ErrorKind::Invalid, text));
                }
                // What was placed by then is part of the instant, and cannot be read before it is acknowledged.
                self.wait_for_acks_by_time(volume, *time_ns)?;
                Point::Time(*time_ns)
            }
            Instant::FlushBack(back) => Point::Seq(volume.find_flush(*back)?),
            Instant::Mark(label) => {
                let ledger = self.ledger();
                let marks = &ledger.catalogue().marks;
                let Some(mark) = marks.get(&(volume.id(), label.clone())) else {
                    let names =
                        marks.keys().filter(|(of, _)| *of == volume.id()).map(|(_, name)| name.as_str());
                    let names: Vec<&str> = names.take(8).collect();
                    let there = if names.is_empty() { "it has none".to_owned() } else { names.join(", ") };
                    let text =
                        format!("volume '{}' has no mark '{label}'; its marks: {there}", volume.row().name);
                    return Err(Error::new(ErrorKind::NotFound, text));
                };
                let at = Resolved { branch: mark.branch, seq: mark.seq, time_ns: mark.time_ns };
                check_still_there(ledger.catalogue(), volume, &at)?;
                return Ok(at);
            }
            Instant::Epoch(epoch) => return find_epoch(self.ledger().catalogue(), volume, *epoch),
        };
        let (branch, limit) = locate(self.ledger().catalogue(), volume, point)?;
        let lineage = self.inner.shared.lineage();
        let seq = match point {
            Point::Seq(seq) => seq,
            Point::Time(time_ns) => {
                lineage.floor_time(branch.id, time_ns)?.map_or(branch.start, |entry| entry.seq)
            }
        };
        let at = At { branch: branch.id, seq: seq.max(branch.start).min(limit) };
        self.check_kept(volume, &branch, at.seq)?;
        let time_ns = lineage.time_of(at)?.map_or(branch.created_ns, |entry| entry.time_ns);
        Ok(Resolved { branch: at.branch, seq: at.seq, time_ns })
    }

    /// The same, with everything up to the instant made durable. What lies behind damage cannot be.
    ///
    /// # Durability
    /// What the instant refers to, once this returns.
    pub(super) fn resolve_durably(&self, volume: &Volume, instant: &Instant) -> Result<Resolved> {
        let at = self.resolve_of(volume, instant)?;
        let owner = self.inner.shared.branches.owner_of(at.branch);
        // What is shared of a destroyed volume was made durable when it began to be.
        if let Some(owner) = owner.filter(|owner| owner.row().stage != Stage::Destroyed) {
            if let Some(last) = owner.whole_upto() {
                self.inner.shared.lineage().check_whole(At { branch: at.branch, seq: at.seq }, last)?;
            }
            let last = owner.map().reaching(at.branch, at.seq);
            owner.make_durable(last)?;
        }
        Ok(at)
    }

    /// Refuses what is left of a deleted branch only by chance.
    fn check_kept(&self, volume: &Volume, branch: &BranchRow, seq: Seq) -> Result<()> {
        let ledger = self.ledger();
        let catalogue = ledger.catalogue();
        let state = catalogue.branches.get(&branch.id).map_or(BranchState::Gone, |row| row.state);
        let inherited = catalogue.inherited_upto(branch.id);
        if state == BranchState::Kept
            || (state == BranchState::Deleted && inherited.is_some_and(|fork| seq <= fork))
        {
            return Ok(());
        }
        let nearest = match inherited.filter(|_| state == BranchState::Deleted) {
            Some(fork) => fork,
            None => catalogue.branches.get(&volume.row().branch).map_or(Seq::ZERO, |head| head.start),
        };
        let text = format!(
            "seq:{seq} of volume '{}' lies on branch {}, which was deleted; the nearest instant left is seq:{nearest}",
            volume.row().name,
            branch.id
        );
        Err(Error::new(ErrorKind::NotFound, text))
    }

    /// Opens a volume at an instant, for reading. What is read never changes, whatever is written, reverted, cloned or
    /// deleted meanwhile.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn open_at(&self, name: &VolumeName, instant: &Instant) -> Result<Arc<dyn BlockDevice>> {
        let volume = self.volume(name)?;
        let at = self.resolve_of(&volume, instant)?;
        volume.open_resolved(at)
    }
}

/// Refuses an instant that was found before, if what it refers to was deleted since: asked under the ledger's lock, by
/// whoever commits something that refers to it.
pub(super) fn check_still_there(catalogue: &Catalogue, volume: &Volume, at: &Resolved) -> Result<()> {
    let row = catalogue.volumes.get(&volume.id());
    if row.is_none_or(|row| row.stage == Stage::Destroyed) {
        let text = format!("volume '{}' was destroyed", volume.row().name);
        return Err(Error::new(ErrorKind::NotFound, text));
    }
    let state = catalogue.branches.get(&at.branch).map_or(BranchState::Gone, |row| row.state);
    // Before the first request there is nothing that could be lost.
    let is_there = at.seq == Seq::ZERO
        || state == BranchState::Kept
        || (state == BranchState::Deleted && catalogue.is_needed(at.branch));
    if is_there {
        return Ok(());
    }
    let text = format!(
        "seq:{} of volume '{}' lies on branch {}, which was deleted",
        at.seq,
        volume.row().name,
        at.branch
    );
    Err(Error::new(ErrorKind::NotFound, text))
}

/// On which branch a volume was at a point, and the last `Seq` of that branch that is part of its history.
fn locate(catalogue: &Catalogue, volume: &Volume, point: Point) -> Result<(BranchRow, Seq)> {
    let own: Vec<BranchRow> =
        catalogue.branches.values().filter(|b| b.volume == volume.id()).copied().collect();
    if let Some(index) = own.iter().rposition(|b| point.reaches(b)) {
        let limit = own.get(index + 1).map_or(Seq::MAX, |next| next.start.before());
        return Ok((own[index], limit));
    }
    let mut branch = own.first();
    while let Some((parent, fork)) = branch.and_then(|b| b.parent) {
        branch = catalogue.branches.get(&parent);
        if let Some(found) = branch.filter(|b| point.reaches(b)) {
            return Ok((*found, fork));
        }
    }
    let began = cdp_types::Instant::Time(branch.map_or(0, |b| b.created_ns));
    let text = format!("the history of volume '{}' begins at {began}", volume.row().name);
    Err(Error::new(ErrorKind::NotFound, text))
}
