//! Revert and clone: one record of the store log, whatever the size of the volume and the length of its history.

use std::sync::Arc;
use std::time::Duration;

use cdp_types::{BranchId, Instant, Seq, VolumeName};
use serde::{Deserialize, Serialize};

use super::Store;
use super::instants::check_still_there;
use crate::catalogue::{
    BranchRow, BranchState, Catalogue, Change, CheckpointRow, Ledger, MarkRow, Stage, VolumeRow,
};
use crate::error::{Error, ErrorKind, Result};
use crate::lineage::At;
use crate::volume::{BranchInfo, Resolved, Volume};

/// How long a revert waits for writes that are in flight.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// A read looks in at most so many places before the line behind a branch is flattened in the background.
const FLATTEN_FROM: usize = 8;
/// From here on a revert or a clone does not return before that is done.
const DEPTH_LIMIT: usize = 64;

/// What a revert has done to one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverted {
    /// The volume.
    pub volume: VolumeName,
    /// The instant at which it is again.
    pub at: Resolved,
    /// Its new head branch.
    pub branch: BranchId,
    /// The new head's first instant.
    pub seq: Seq,
    /// Where it was before: reverting to this instant undoes the revert.
    pub undo: Resolved,
}

/// A volume that goes back, and where to.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) volume: Arc<Volume>,
    pub(super) to: Resolved,
}

/// A clone to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneSpec {
    /// Whose history it shares.
    pub source: VolumeName,
    /// Up to where.
    pub at: Instant,
    /// Its name.
    pub name: VolumeName,
}

impl Store {
    /// Puts volumes back to earlier instants, all of them or none: each goes on with a new branch that begins there.
    /// Nothing is deleted; [`Reverted::undo`] leads back. It takes as long for 1 GiB as for 16 TiB.
    ///
    /// Queues that were open stay behind: they fail every further request. Without `force` there must be none. If it fails they
    /// go on, but what was asked of them meanwhile may have failed.
    ///
    /// 1. Resolve the instants and make what they refer to durable. Crash: nothing happened.
    /// 2. Keep queues from writing, and wait for what is in flight.
    /// 3. Commit one record with all new branches: the commit point.
    /// 4. Switch the volumes' heads in memory.
    ///
    /// # Durability
    /// The new heads, and all that they refer to, survive a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a volume is in use or somebody else reverts it, [`ErrorKind::NotFound`] and
    /// [`ErrorKind::Invalid`] as [`Store::resolve`], [`ErrorKind::ReadOnly`] if a volume's log is damaged. No volume is changed then.
    pub fn revert(&self, targets: &[(VolumeName, Instant)], force: bool) -> Result<Vec<Reverted>> {
        self.writable()?;
        let mut volumes: Vec<Arc<Volume>> = Vec::with_capacity(targets.len());
        for (name, _) in targets {
            let volume = self.volume(name)?;
            if volumes.iter().any(|v| v.id() == volume.id()) {
                return Err(Error::new(ErrorKind::Invalid, format!("volume '{name}' is named twice")));
            }
            if let Some((_, why)) = volume.refusal() {
                return Err(Error::new(ErrorKind::ReadOnly, format!("volume '{name}': {why}")));
            }
            volumes.push(volume);
        }
        let instants: Vec<&Instant> = targets.iter().map(|(_, instant)| instant).collect();
        let origins = self.resolve_together(&volumes, &instants)?;
        let turns: Vec<Turn> =
            volumes.into_iter().zip(origins).map(|(volume, to)| Turn { volume, to }).collect();
        self.go_back(&turns, force, &|_| Ok(Vec::new()))
    }

    /// Puts volumes back to instants that are durable, and commits in the same record what `further` says then; nothing
    /// happens if that refuses.
    pub(super) fn go_back(
        &self,
        turns: &[Turn],
        force: bool,
        further: &dyn Fn(&Catalogue) -> Result<Vec<Change>>,
    ) -> Result<Vec<Reverted>> {
        let mut ended = Vec::new();
        let outcome = self.end_tenures(turns, force, &mut ended).and_then(|()| {
            // From here on nothing of these volumes moves.
            let undo: Vec<Resolved> =
                turns.iter().map(|t| self.resolve_of(&t.volume, &Instant::Head)).collect::<Result<_>>()?;
            self.commit_revert(turns, &undo, further)
        });
        for volume in ended {
            match &outcome {
                Ok(_) => volume.begin_tenure(),
                // It is what it was, and so it stays theirs who have it.
                Err(_) => volume.resume_tenure(),
            }
        }
        let reverted = outcome?;
        turns.iter().for_each(|turn| self.keep_shallow(&turn.volume));
        Ok(reverted)
    }

    fn end_tenures<'a>(
        &self,
        turns: &'a [Turn],
        force: bool,
        ended: &mut Vec<&'a Arc<Volume>>,
    ) -> Result<()> {
        for Turn { volume, .. } in turns {
            if !volume.end_tenure(force) {
                let name = volume.row().name;
                let text = match volume.log().is_switching() {
                    true => format!("volume '{name}' is being reverted or destroyed by somebody else"),
                    false => {
                        format!("volume '{name}' is in use; stop its users, or use force to cut them off")
                    }
                };
                return Err(Error::new(ErrorKind::Busy, text));
            }
            ended.push(volume);
        }
        turns.iter().try_for_each(|turn| self.wait_for_acks(&turn.volume, Seq::MAX))
    }

    /// The commit point of [`Store::go_back`]: nothing of these volumes moves meanwhile.
    pub(super) fn commit_revert(
        &self,
        turns: &[Turn],
        undo: &[Resolved],
        further: &dyn Fn(&Catalogue) -> Result<Vec<Change>>,
    ) -> Result<Vec<Reverted>> {
        let mut ledger = self.ledger();
        for Turn { volume, to } in turns {
            check_still_there(ledger.catalogue(), volume, to)?;
        }
        let further = further(ledger.catalogue())?;
        let (start, created_ns) = self.new_instant();
        let first = ledger.catalogue().next_branch().0;
        let rows: Vec<BranchRow> = turns
            .iter()
            .zip(first..)
            .map(|(Turn { volume, to }, id)| {
                let parent = Some(self.nearest_parent(*to));
                let (id, volume, state) = (BranchId(id), volume.id(), BranchState::Kept);
                BranchRow { id, volume, parent, start, created_ns, state }
            })
            .collect();
        let mut changes: Vec<Change> = rows.iter().map(|&branch| Change::Revert { branch }).collect();
        changes.extend(further);
        self.commit_over(&mut ledger, &changes, turns.iter().map(|turn| &turn.volume))?;
        let mut reverted = Vec::with_capacity(rows.len());
        for ((Turn { volume, to: at }, branch), &undo) in turns.iter().zip(&rows).zip(undo) {
            let at = *at;
            self.inner.shared.branches.insert(*branch);
            if let Some(row) = ledger.catalogue().volumes.get(&volume.id()) {
                volume.switch(branch, row.clone());
            }
            let volume = volume.row().name;
            reverted.push(Reverted { volume, at, branch: branch.id, seq: start, undo });
        }
        Ok(reverted)
    }

    /// Makes new volumes that share the history of others up to given instants, all of them or none. They take no
    /// space until they are written.
    ///
    /// # Durability
    /// The clones, and all that they refer to, survive a power cut once this returns.
    ///
    /// # Errors
    /// As [`Store::resolve`], or [`ErrorKind::Exists`] if a name is taken. Nothing is made then.
    pub fn clone_volumes(&self, specs: &[CloneSpec]) -> Result<Vec<Arc<Volume>>> {
        let sources: Vec<Arc<Volume>> =
            specs.iter().map(|spec| self.volume(&spec.source)).collect::<Result<_>>()?;
        let instants: Vec<&Instant> = specs.iter().map(|spec| &spec.at).collect();
        let origins = self.resolve_together(&sources, &instants)?;
        let mut ledger = self.ledger();
        for (index, spec) in specs.iter().enumerate() {
            self.check_free(&ledger, &spec.name)?;
            if specs[..index].iter().any(|other| other.name == spec.name) {
                return Err(Error::new(ErrorKind::Invalid, format!("'{}' is named twice", spec.name)));
            }
        }
        let names = specs.iter().map(|spec| Some(&spec.name));
        let volumes = self.commit_clones(&mut ledger, &sources, &origins, names)?;
        drop(ledger);
        volumes.iter().for_each(|volume| self.keep_shallow(volume));
        Ok(volumes)
    }

    /// Makes clones; one without a name is a scratch volume.
    pub(super) fn commit_clones<'a>(
        &self,
        ledger: &mut Ledger,
        sources: &[Arc<Volume>],
        origins: &[Resolved],
        names: impl Iterator<Item = Option<&'a VolumeName>>,
    ) -> Result<Vec<Arc<Volume>>> {
        for (source, origin) in sources.iter().zip(origins) {
            check_still_there(ledger.catalogue(), source, origin)?;
        }
        let (start, created_ns) = self.new_instant();
        let (volume, branch) = (ledger.catalogue().next_volume().0, ledger.catalogue().next_branch().0);
        let mut made = Vec::with_capacity(sources.len());
        for (((index, source), origin), name) in (0..).zip(sources).zip(origins).zip(names) {
            let (id, branch) = (cdp_types::VolumeId(volume + index), BranchId(branch + index));
            let source = source.row();
            let (name, stage) = match name {
                Some(name) => (name.clone(), Stage::Visible),
                None => (source.name, Stage::Scratch),
            };
            let row = VolumeRow { id, name, branch, created_ns, serving: None, stage, ..source };
            let parent = Some(self.nearest_parent(*origin));
            let state = BranchState::Kept;
            made.push((row, BranchRow { id: branch, volume: id, parent, start, created_ns, state }));
        }
        let create = |(volume, branch): &(VolumeRow, BranchRow)| Change::Create {
            volume: volume.clone(),
            branch: *branch,
        };
        self.commit(ledger, &made.iter().map(create).collect::<Vec<_>>())?;
        Ok(made.into_iter().map(|(row, branch)| self.show(row, branch)).collect())
    }

    /// A new point in the store's order, after everything that was acknowledged.
    fn new_instant(&self) -> (Seq, u64) {
        let log = &self.inner.shared.log;
        let seq = log.next_seq.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (Seq(seq), log.clock.stamp().time_ns)
    }

    /// What a branch that begins at an instant inherits from: the instant itself, or, if that is the very beginning of
    /// its branch, what that one inherits from.
    fn nearest_parent(&self, origin: Resolved) -> (BranchId, Seq) {
        let mut at = At { branch: origin.branch, seq: origin.seq };
        while let Some(branch) = self.inner.shared.branches.get(at.branch)
            && at.seq <= branch.row.start
            && let Some((parent, fork)) = branch.row.parent
        {
            at = At { branch: parent, seq: fork };
        }
        (at.branch, at.seq)
    }

    /// Resolves an instant of each of several volumes so that together they are one instant of the store, and makes
    /// what they refer to durable.
    fn resolve_together(&self, volumes: &[Arc<Volume>], instants: &[&Instant]) -> Result<Vec<Resolved>> {
        let heads = instants.iter().filter(|instant| ***instant == Instant::Head).count();
        let together = (volumes.len() > 1 && heads == volumes.len()).then(|| {
            let newest = volumes.iter().map(|v| v.head().seq).max().unwrap_or(Seq::ZERO);
            // What was given an earlier place on another volume may be acknowledged only after this.
            volumes.iter().try_for_each(|v| self.wait_for_acks(v, newest)).map(|()| newest)
        });
        let together = together.transpose()?;
        let resolve = |(volume, instant): (&Arc<Volume>, &&Instant)| match together {
            Some(seq) => self.resolve_durably(volume, &Instant::Seq(seq.min(volume.head().seq))),
            None => self.resolve_durably(volume, instant),
        };
        volumes.iter().zip(instants).map(resolve).collect()
    }

    /// Waits until nothing up to `seq` is in flight on a volume.
    pub(super) fn wait_for_acks(&self, volume: &Volume, seq: Seq) -> Result<()> {
        self.wait_while_in_flight(volume, |(first, _)| first <= seq)
    }

    /// Waits until nothing that was placed up to a time is in flight on a volume.
    pub(super) fn wait_for_acks_by_time(&self, volume: &Volume, time_ns: u64) -> Result<()> {
        self.wait_while_in_flight(volume, |(_, placed_ns)| placed_ns <= time_ns)
    }

    /// Waits while this is so of the first request in flight.
    fn wait_while_in_flight(&self, volume: &Volume, is_awaited: impl Fn((Seq, u64)) -> bool) -> Result<()> {
        let began = std::time::Instant::now();
        while volume.log().first_unacknowledged().is_some_and(&is_awaited) {
            if began.elapsed() > DRAIN_PATIENCE {
                let text = format!("volume '{}' has writes in flight that do not end", volume.row().name);
                return Err(Error::new(ErrorKind::Busy, text));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// What was committed is done, whether or not its reads can be made short at once.
    fn keep_shallow(&self, volume: &Volume) {
        if volume.read_depth() >= DEPTH_LIMIT
            && let Err(error) = self.flatten(volume)
        {
            tracing::warn!(volume = %volume.id(), "flattening a long line of branches: {error}; it is tried again");
        }
    }

    fn flatten(&self, volume: &Volume) -> Result<()> {
        let Some(branch) = self.inner.shared.branches.get(volume.row().branch) else { return Ok(()) };
        self.inner.shared.lineage().flatten(&branch.row)
    }

    /// Shortens the way that reads of heads have to go, where it has become long. What fails for one is no reason to leave
    /// the others as they are.
    ///
    /// # Errors
    /// If the index cannot be read or written: the first of them.
    pub(super) fn flatten_deep(&self) -> Result<()> {
        let deep = self.all_volumes().into_iter().filter(|volume| volume.read_depth() >= FLATTEN_FROM);
        deep.map(|volume| self.flatten(&volume)).fold(Ok(()), Result::and)
    }

    /// A volume's branches, oldest first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or if the index cannot be read.
    pub fn branches(&self, name: &VolumeName) -> Result<Vec<BranchInfo>> {
        let volume = self.volume(name)?;
        let (rows, origins) = {
            let ledger = self.ledger();
            let all = &ledger.catalogue().branches;
            let rows: Vec<BranchRow> = all.values().filter(|b| b.volume == volume.id()).copied().collect();
            let origin = |b: &BranchRow| b.parent.and_then(|(parent, _)| all.get(&parent).copied());
            let origins: Vec<Option<BranchRow>> = rows.iter().map(origin).collect();
            (rows, origins)
        };
        let mut infos = Vec::with_capacity(rows.len());
        for (index, (row, origin)) in rows.iter().zip(&origins).enumerate() {
            if row.state == BranchState::Gone {
                continue;
            }
            let from = match (row.parent, origin) {
                (Some((branch, seq)), Some(origin)) => {
                    Some(Resolved { seq, ..self.timed(At { branch, seq }, origin)? })
                }
                _ => None,
            };
            let end = match rows.get(index + 1) {
                Some(next) => At { branch: row.id, seq: next.start.before() },
                None => At { branch: row.id, seq: volume.head().seq },
            };
            infos.push(BranchInfo {
                id: row.id,
                head: row.id == volume.row().branch,
                from,
                from_volume: origin.map(|b| b.volume),
                start: row.start,
                created_ns: row.created_ns,
                end: self.timed(end, row)?,
                deleted: row.state != BranchState::Kept,
            });
        }
        Ok(infos)
    }

    fn timed(&self, at: At, branch: &BranchRow) -> Result<Resolved> {
        let entry = self.inner.shared.lineage().time_of(at)?;
        let (seq, time_ns) = entry.map_or((branch.start, branch.created_ns), |e| (e.seq, e.time_ns));
        Ok(Resolved { branch: at.branch, seq: seq.max(branch.start).min(at.seq), time_ns })
    }

    /// Deletes a branch that a revert has left behind: its instants cannot be opened any more, but for those that
    /// other branches inherit. Whoever reads one of them can go on.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] for the head, for a branch that a checkpoint needs, and, without
    /// `force`, for a branch with marks.
    pub fn delete_branch(&self, name: &VolumeName, branch: BranchId, force: bool) -> Result<()> {
        let volume = self.volume(name)?;
        let mut ledger = self.ledger();
        let row = ledger.catalogue().branches.get(&branch);
        let known = row.is_some_and(|row| row.volume == volume.id() && row.state == BranchState::Kept);
        if !known {
            let text = format!("volume '{name}' has no branch {branch}");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        if volume.row().branch == branch {
            let text = format!("branch {branch} is the head of volume '{name}'; revert to another one first");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let kept = ledger.catalogue().inherited_upto(branch);
        let needs = |(_, seq): &(&CheckpointRow, Seq)| kept.is_none_or(|kept| *seq > kept);
        if let Some((checkpoint, _)) = ledger.catalogue().pins_of(branch).find(needs) {
            let text = format!("checkpoint {} lies on branch {branch}; delete it first", checkpoint.id);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let lost = |mark: &&MarkRow| mark.branch == branch && kept.is_none_or(|kept| mark.seq > kept);
        let mark = ledger.catalogue().marks.values().find(lost);
        if let Some(mark) = mark.filter(|_| !force) {
            let text = format!(
                "mark '{}' lies on branch {branch}; delete it first, or use force to delete marks as well",
                mark.label
            );
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.commit(&mut ledger, &[Change::DeleteBranch { branch }])?;
        drop(ledger);
        self.reclaim_now_or_later();
        Ok(())
    }
}
