//! Reverts, clones, deleted branches, and readers that stay open across them.

use std::collections::BTreeMap;
use std::sync::Arc;

use cdp_store::{BranchInfo, CloneSpec, ErrorKind};
use cdp_types::{BlockDevice, Instant, Seq, VolumeName};
use rand::Rng;

use crate::crash::try_assert_holds;
use crate::guest::{Fork, Memory};
use crate::machine::{MOST_VOLUMES, Machine, Undecided};
use crate::reference::{Image, Logged, logged, try_logged};

/// A past instant that is held open.
pub struct Reader {
    device: Arc<dyn BlockDevice>,
    image: Image,
    what: String,
}

impl Memory {
    /// The number of the branch on which an instant lies.
    fn branch_of(&self, at: Seq) -> usize {
        self.forks.partition_point(|f| f.start <= at)
    }

    /// What a branch that begins at an instant inherits from: another, up to an instant of it. The very beginning of a
    /// branch is what that one has inherited.
    fn parent_of(&self, mut at: Seq) -> (usize, Seq) {
        loop {
            let branch = self.branch_of(at);
            match branch.checked_sub(1).map(|fork| self.forks[fork]) {
                Some(fork) if fork.start == at => at = fork.to,
                _ => return (branch, at),
            }
        }
    }

    /// All that it inherits, the nearest first.
    fn line_of(&self, at: Seq) -> Vec<(usize, Seq)> {
        let mut line = vec![self.parent_of(at)];
        while let Some(&(branch @ 1.., _)) = line.last() {
            line.push(self.parent_of(self.forks[branch - 1].to));
        }
        line
    }
}

/// Readers held open at a time.
const MOST_READERS: usize = 4;
/// Branches of a volume, deleted ones not counted; more, and old ones go.
const MOST_BRANCHES: usize = 12;

impl Machine {
    /// Closes every queue of a volume, once nothing is in flight.
    pub fn quiesce(&mut self, name: &VolumeName) {
        self.drain_volume(name);
        if let Some(running) = &mut self.running {
            running.guests.remove(name);
        }
    }

    /// Some instant that a volume has had since it was made.
    fn some_seq(&mut self, name: &VolumeName) -> Option<Seq> {
        let log = self.log_of(name)?;
        let forks = self.volumes[name].forks.iter().map(|f| f.start);
        let seqs: Vec<Seq> = log.iter().map(|l| l.seq).chain(forks).collect();
        if seqs.is_empty() {
            return Some(self.store().volume_info(name).unwrap().head.seq);
        }
        Some(seqs[self.rng.random_range(0..seqs.len())])
    }

    /// A volume's log; none if the process died while it was read.
    fn log_of(&self, name: &VolumeName) -> Option<Vec<Logged>> {
        let log = try_logged(&self.volume(name), Seq::ZERO);
        self.expect(log)
    }

    /// A volume at an instant; none if that lies in a part of the history that was deleted.
    pub fn open_kept(&self, name: &VolumeName, instant: &Instant) -> Option<Arc<dyn BlockDevice>> {
        match self.store().open_at(name, instant) {
            Ok(device) => Some(device),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let deleted = self.store().branches(name).unwrap().iter().any(|b| b.deleted);
                assert!(deleted || self.has_forgotten(name), "{name}@{instant}: {error:?}");
                None
            }
            Err(error) => {
                assert!(!self.is_alive(), "{name}@{instant}: {error:?}");
                None
            }
        }
    }

    /// Whether a branch of a volume is gone for good.
    fn has_forgotten(&self, name: &VolumeName) -> bool {
        self.store().branches(name).unwrap().len() < self.volumes[name].forks.len() + 1
    }

    /// A volume goes back to an instant, or forth again.
    pub fn revert(&mut self) {
        let Some(name) = self.some_volume() else { return };
        self.quiesce(&name);
        if !self.is_alive() || self.volume(&name).refusal().is_some() {
            return;
        }
        let Some(to) = self.some_seq(&name) else { return };
        let Some(log) = self.log_of(&name) else { return };
        if self.open_kept(&name, &Instant::Seq(to)).is_none() {
            return;
        }
        let before = self.store().volume_info(&name).unwrap().head.seq;
        let targets = [(name.clone(), Instant::Seq(to))];
        let reverted =
            self.change(Undecided::Revert(name.clone(), to), |store| store.revert(&targets, false));
        if let Some([reverted]) = reverted.as_deref() {
            assert_eq!((reverted.undo.seq, reverted.at.seq), (before, to), "{name}");
            self.note_revert(&name, &log, to);
            assert_eq!(self.store().volume_info(&name).unwrap().head.seq, reverted.seq);
        }
    }

    /// What a revert refers to is durable, and its branch is the newest.
    pub fn note_revert(&mut self, name: &VolumeName, log: &[Logged], to: Seq) {
        let newest = *self.store().branches(name).unwrap().last().unwrap();
        let memory = self.volumes.get_mut(name).unwrap();
        let covered: Vec<_> = log.iter().filter(|l| memory.counts(l.seq, to)).map(|l| l.origin).collect();
        memory.flushed(&covered);
        memory.forks.push(Fork { start: newest.start, time_ns: newest.created_ns, to });
    }

    /// After a crash: whether a revert has happened shows in the volume's branches.
    pub fn decide_revert(&mut self, name: &VolumeName, to: Seq) {
        if self.store().volume(name).is_err() {
            return;
        }
        let branches = self.store().branches(name).unwrap();
        let newest = branches.last().unwrap().start;
        // A volume that was never reverted has one branch, which for a clone begins late.
        let known = self.volumes[name].forks.last().map_or(branches[0].start, |f| f.start);
        if newest > known {
            let log = logged(&self.volume(name), Seq::ZERO);
            self.note_revert(name, &log, to);
        }
    }

    /// A volume is cloned: returns the clone, the source and the instant.
    pub fn clone_some(&mut self) -> Option<(VolumeName, VolumeName, Seq)> {
        if self.volumes.len() >= MOST_VOLUMES {
            return None;
        }
        let source = self.some_volume()?;
        self.drain_volume(&source);
        if !self.is_alive() || self.volume(&source).refusal().is_some() {
            return None;
        }
        let at = self.some_seq(&source)?;
        self.open_kept(&source, &Instant::Seq(at))?;
        let log = self.log_of(&source)?;
        let name: VolumeName = format!("clone{}", self.number()).parse().unwrap();
        let original = &self.volumes[&source];
        let memory =
            Memory { blocks: original.blocks, base: original.image(&log, at), ..Memory::new(original.unit) };
        let covered: Vec<_> = log.iter().filter(|l| original.counts(l.seq, at)).map(|l| l.origin).collect();
        let spec = CloneSpec { source: source.clone(), at: Instant::Seq(at), name: name.clone() };
        self.volumes.get_mut(&source).unwrap().clones.push((name.clone(), at));
        let change = Undecided::Clone(name.clone(), Box::new(memory.clone()));
        self.change(change, |store| store.clone_volumes(&[spec]))?;
        self.volumes.get_mut(&source).unwrap().flushed(&covered);
        self.volumes.insert(name.clone(), memory);
        Some((name, source, at))
    }

    /// One of the branches that reverts have left behind is deleted; not while it is open what branches there are.
    pub fn delete_branch(&mut self) {
        let Some(name) = self.some_volume() else { return };
        let branches: Vec<BranchInfo> =
            self.store().branches(&name).unwrap().into_iter().filter(|b| !b.head && !b.deleted).collect();
        if branches.len() < 2 && self.rng.random_bool(0.5) || branches.is_empty() {
            return;
        }
        let count = branches.len();
        let index = if count >= MOST_BRANCHES { 0 } else { self.rng.random_range(0..count) };
        let BranchInfo { id, start, .. } = branches[index];
        if !self.undecided.is_empty() {
            return;
        }
        let epochs = self.vm.epochs_of(&name);
        let change = Undecided::DeleteBranch(name.clone(), start);
        let deleted = self.change(change, |store| match store.delete_branch(&name, id, true) {
            // A checkpoint needs it.
            Err(error) if error.kind() == ErrorKind::Busy && !epochs.is_empty() => Ok(false),
            other => other.map(|()| true),
        });
        if deleted == Some(true) {
            self.note_deletion(&name, start);
            self.check_marks(&name);
        }
    }

    /// The store's marks of a volume are those that were made and have not gone with their branch.
    pub fn check_marks(&self, name: &VolumeName) {
        let marks = self.store().volume_info(name).unwrap().marks;
        let marks: BTreeMap<_, _> = marks.into_iter().map(|m| (m.label, m.seq)).collect();
        assert_eq!(marks, self.volumes[name].marks, "invariant 3 violated: the marks of {name}");
    }

    /// Marks on a deleted branch go with it, but for those on what others inherit. What is certainly inherited is so by a
    /// branch that can be opened; deleted ones, and clones that are gone, inherit until they have been given back, and
    /// when that is done is the store's affair.
    fn note_deletion(&mut self, name: &VolumeName, start: Seq) {
        let memory = &self.volumes[name];
        let number = memory.branch_of(start);
        let next = memory.forks.get(number).map(|f| f.start);
        let can_be_opened = |(clone, _): &&(VolumeName, Seq)| {
            self.volumes.get(clone).is_some_and(|clone| !clone.deleted.contains(&0))
        };
        let forks = memory.forks.iter().zip(1_usize..).filter(|(_, number)| !memory.deleted.contains(number));
        let origins = forks.map(|(fork, _)| fork.to);
        let origins = origins.chain(memory.clones.iter().filter(can_be_opened).map(|(_, at)| *at));
        // What begins where the branch does inherits from what that one does.
        let certainly = origins
            .flat_map(|at| memory.line_of(at))
            .filter(|(branch, upto)| *branch == number && *upto > start)
            .map(|(_, upto)| upto)
            .max();
        let origins = memory.forks.iter().map(|f| f.to).chain(memory.clones.iter().map(|(_, at)| *at));
        let possibly = origins
            .map(|at| memory.parent_of(at))
            .filter(|(branch, _)| *branch == number)
            .map(|(_, upto)| upto)
            .max();
        let there = self.store().volume_info(name).unwrap().marks;
        let memory = self.volumes.get_mut(name).unwrap();
        memory.deleted.insert(number);
        memory.marks.retain(|label, &mut seq| {
            let elsewhere = seq < start || next.is_some_and(|next| seq >= next);
            let unsure = Some(seq) <= possibly && there.iter().any(|m| m.label == *label);
            elsewhere || Some(seq) <= certainly || unsure
        });
    }

    /// After a crash: whether a branch was deleted.
    pub fn decide_deletion(&mut self, name: &VolumeName, start: Seq) {
        if self.store().volume(name).is_err() {
            return;
        }
        let branches = self.store().branches(name).unwrap();
        // One that is not told of has been given back.
        if branches.iter().all(|b| b.deleted || b.start != start) {
            self.note_deletion(name, start);
        }
    }

    /// The store's branches of a volume are those that were made.
    pub fn check_branches(&self, name: &VolumeName) {
        let branches = self.store().branches(name).unwrap();
        let forks: Vec<Seq> = self.volumes[name].forks.iter().map(|f| f.start).collect();
        assert_eq!(
            branches.iter().filter(|b| b.head).count(),
            1,
            "invariant 3 violated: {name}: {branches:?}"
        );
        for branch in branches.iter().skip(1) {
            assert!(
                forks.contains(&branch.start),
                "invariant 9 violated: {name} has a branch that nobody made: {branch:?}"
            );
        }
        let head = branches.iter().find(|b| b.head).map(|b| b.start);
        if let Some(last) = forks.last() {
            assert_eq!(head, Some(*last), "invariant 9 violated: {name} was reverted, and is not");
        }
    }

    /// Opens a past instant and keeps it open.
    pub fn open_reader(&mut self) {
        let Some(name) = self.some_volume() else { return };
        self.drain_volume(&name);
        if !self.is_alive() {
            return;
        }
        let Some(at) = self.some_seq(&name) else { return };
        let Some(device) = self.open_kept(&name, &Instant::Seq(at)) else { return };
        let Some(log) = self.log_of(&name) else { return };
        let image = self.volumes[&name].image(&log, at);
        self.keep_open(device, image, format!("{name}@seq:{at}"));
    }

    /// Keeps a past instant open that holds this.
    pub fn keep_open(&mut self, device: Arc<dyn BlockDevice>, image: Image, what: String) {
        let what =
            format!("invariant 4 violated: a reader of {what}, open since event {}", self.next_event());
        if let Some(running) = &mut self.running {
            if running.readers.len() == MOST_READERS {
                running.readers.remove(0);
            }
            running.readers.push(Reader { device, image, what });
        }
    }

    /// What open readers see has not changed.
    pub fn check_readers(&mut self) {
        if self.faulty || !self.is_alive() {
            return;
        }
        for reader in self.running.iter().flat_map(|r| &r.readers) {
            let read = try_assert_holds(&*reader.device, &reader.image, &reader.what);
            self.expect(read);
        }
    }

    /// What the store does by itself now and then.
    pub fn upkeep(&mut self) {
        if self.is_alive() {
            let done = self.store().upkeep();
            self.expect(done);
        }
    }
}
