//! Reverts, clones, deleted branches, and readers that stay open across them.

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
        let change = Undecided::Clone(name.clone(), Box::new(memory.clone()));
        self.change(change, |store| store.clone_volumes(&[spec]))?;
        self.volumes.get_mut(&source).unwrap().flushed(&covered);
        self.volumes.insert(name.clone(), memory);
        Some((name, source, at))
    }

    /// One of the branches that reverts have left behind is deleted.
    pub fn delete_branch(&mut self) {
        let Some(name) = self.some_volume() else { return };
        let branches: Vec<BranchInfo> =
            self.store().branches(&name).unwrap().into_iter().filter(|b| !b.head && !b.deleted).collect();
        if branches.len() < 2 && self.rng.random_bool(0.5) || branches.is_empty() {
            return;
        }
        let count = branches.len();
        let index = if count >= MOST_BRANCHES { 0 } else { self.rng.random_range(0..count) };
        let branch = branches[index].id;
        let epochs = self.vm.epochs_of(&name);
        let change = Undecided::DeleteBranch(name.clone());
        let deleted = self.change(change, |store| match store.delete_branch(&name, branch, true) {
            // A checkpoint needs it.
            Err(error) if error.kind() == ErrorKind::Busy && !epochs.is_empty() => Ok(()),
            other => other,
        });
        if deleted.is_some() {
            self.adopt_marks(&name);
        } else if self.is_alive() {
            // It is deleted all the same: only giving its rows back has failed.
            self.adopt_marks(&name);
        }
    }

    /// Marks on a deleted branch go with it.
    fn adopt_marks(&mut self, name: &VolumeName) {
        let info = self.store().volume_info(name).unwrap();
        let memory = self.volumes.get_mut(name).unwrap();
        memory.marks.retain(|label, _| info.marks.iter().any(|m| m.label == *label));
    }

    /// After a crash: whether a branch was deleted shows in the marks that were on it.
    pub fn decide_deletion(&mut self, name: &VolumeName) {
        if self.store().volume(name).is_ok() {
            self.adopt_marks(name);
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
