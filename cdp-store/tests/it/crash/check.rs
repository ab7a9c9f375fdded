//! What must hold of a store that has just been opened after a crash.

use std::collections::{BTreeMap, BTreeSet};

use cdp_types::{BlockDevice, Instant, IoError, Origin, Seq, VolumeName};
use rand::Rng;

use crate::content::{SECTOR, stamps_of};
use crate::guest::{AREAS, Fate, Memory, area};
use crate::machine::{Machine, Undecided, read};
use crate::reference::{Image, Logged, logged};

/// Of two recoveries from one crash, one log continues the other: both are prefixes of what was appended.
pub fn one_continues_the_other(a: &[Logged], b: &[Logged]) {
    let common = a.len().min(b.len());
    assert_eq!(
        a[..common],
        b[..common],
        "invariant 2 violated: what a power cut left is no prefix of the log"
    );
}

/// Reads all areas of a device and compares them with an image.
pub fn assert_holds(device: &dyn BlockDevice, image: &Image, what: &str) {
    try_assert_holds(device, image, what).unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// The same, where reading may fail.
pub fn try_assert_holds(device: &dyn BlockDevice, image: &Image, what: &str) -> Result<(), IoError> {
    for index in 0..AREAS.len() {
        let sectors = area(index);
        let bytes = read(device, sectors.bytes())?;
        assert_eq!(bytes.len(), sectors.count as usize * SECTOR);
        for (offset, found) in stamps_of(&bytes).into_iter().enumerate() {
            let sector = sectors.first + offset as u64;
            let expected = image.get(&sector).copied().unwrap_or(0);
            let show = |stamp: u64| format!("sector {} of request {}", stamp & 0xFFFF, stamp >> 16);
            assert_eq!(
                found,
                Some(expected),
                "{what}: sector {sector} should hold {}, and holds {}",
                show(expected),
                found.map_or("damaged bytes".to_owned(), show)
            );
        }
    }
    Ok(())
}

impl Machine {
    /// Checks everything, and takes what was found for the truth from here on.
    pub fn check(&mut self) -> BTreeMap<VolumeName, Vec<Logged>> {
        self.check_catalogue();
        let names: Vec<VolumeName> = self.volumes.keys().cloned().collect();
        let mut logs = BTreeMap::new();
        for name in &names {
            let log = self.check_volume(name);
            logs.insert(name.clone(), log);
        }
        self.power_was_cut = false;
        self.check_vm();
        if self.rng.random() {
            self.flush_all();
        }
        self.check_rebuilt(&logs);
        logs
    }

    /// Ends a workload that did not crash, and checks what it left.
    pub fn finish(&mut self) {
        if !self.is_alive() {
            return;
        }
        self.drain();
        self.disk.clear_faults();
        // A fault may have kept a change from being told of, and an opening since may have found it.
        self.check_catalogue();
        self.check_vm();
        let names: Vec<VolumeName> = self.volumes.keys().cloned().collect();
        for name in names {
            let volume = self.volume(&name);
            let log = logged(&volume, Seq::ZERO);
            let memory = &self.volumes[&name];
            assert_nothing_lost(&name, memory, &log, |t| t.fate == Fate::Acknowledged, "1");
            assert_nothing_dead(&name, memory, &log);
            assert_holds(&*volume, &memory.image(&log, Seq::MAX), "invariant 4 violated: at the head");
        }
    }

    fn check_catalogue(&mut self) {
        let infos = self.store().volumes();
        let there: BTreeSet<VolumeName> = infos.iter().map(|i| i.name.clone()).collect();
        for undecided in std::mem::take(&mut self.undecided) {
            match undecided {
                Undecided::Create(name, unit) if there.contains(&name) => {
                    self.volumes.insert(name, Memory::new(unit));
                }
                Undecided::Destroy(name) if !there.contains(&name) => drop(self.volumes.remove(&name)),
                Undecided::Resize(name, blocks) => {
                    let size = infos.iter().find(|i| i.name == name).map_or(0, |i| i.size_bytes);
                    if size == blocks * cdp_types::BLOCK_SIZE {
                        self.volumes.get_mut(&name).unwrap().blocks = blocks;
                    }
                }
                Undecided::Mark(name, label) => {
                    let info = infos.iter().find(|i| i.name == name);
                    if let Some(mark) = info.and_then(|i| i.marks.iter().find(|m| m.label == label)) {
                        self.volumes.get_mut(&name).unwrap().marks.insert(label, mark.seq);
                    }
                }
                Undecided::Clone(name, memory) if there.contains(&name) => {
                    self.volumes.insert(name, *memory);
                }
                Undecided::Revert(name, to) => self.decide_revert(&name, to),
                Undecided::DeleteBranch(name, start) => self.decide_deletion(&name, start),
                Undecided::Vm(change) => self.decide_vm(change),
                Undecided::Create(..) | Undecided::Destroy(_) | Undecided::Clone(..) => {}
            }
        }
        let expected: BTreeSet<VolumeName> = self.volumes.keys().cloned().collect();
        assert_eq!(there, expected, "invariant 3 violated: the volumes of the store");
        for info in &infos {
            let memory = &self.volumes[&info.name];
            let size = memory.blocks * cdp_types::BLOCK_SIZE;
            assert_eq!(info.size_bytes, size, "invariant 3 violated: the size of {}", info.name);
            self.check_branches(&info.name);
            self.check_marks(&info.name);
        }
    }

    fn check_volume(&mut self, name: &VolumeName) -> Vec<Logged> {
        let volume = self.volume(name);
        if let Some((_, why)) = volume.refusal() {
            panic!("invariant 5 violated: a crash is taken for rot: {why}");
        }
        let log = logged(&volume, Seq::ZERO);
        let memory = &self.volumes[name];
        if self.power_was_cut {
            assert_nothing_lost(name, memory, &log, |t| t.flushed, "2");
        } else {
            assert_nothing_lost(name, memory, &log, |t| t.fate == Fate::Acknowledged, "1");
        }
        assert_nothing_dead(name, memory, &log);
        one_continues_the_other(&memory.order, &log);
        self.check_survivors(name, &log);
        self.check_content(name, &log);
        self.adopt(name, &log);
        log
    }

    /// Whoever asks after its requests in flight is told which of them the log has.
    fn check_survivors(&self, name: &VolumeName, log: &[Logged]) {
        let orphans: Vec<Origin> =
            self.volumes[name].requests.iter().filter(|(_, t)| t.orphaned).map(|(&o, _)| o).collect();
        let told = self.volume(name).survived(&orphans);
        for (origin, told) in orphans.iter().zip(told) {
            let there = log.iter().any(|l| l.origin == *origin);
            assert_eq!(told, there, "invariant 4 violated: whether request {origin} of {name} survived");
        }
    }

    /// The head, and random instants of the past, hold what the log says.
    fn check_content(&mut self, name: &VolumeName, log: &[Logged]) {
        let volume = self.volume(name);
        let memory = &self.volumes[name];
        assert_holds(
            &*volume,
            &memory.image(log, Seq::MAX),
            &format!("invariant 2 violated: {name} at the head"),
        );
        let mut instants: Vec<Instant> = memory.marks.keys().cloned().map(Instant::Mark).collect();
        for _ in 0..2.min(log.len()) {
            let at = log[self.rng.random_range(0..log.len())];
            instants.push(Instant::Seq(at.seq));
            instants.push(Instant::Time(at.time_ns));
        }
        for (epoch, seq) in self.vm.epochs_of(name) {
            let what = format!("invariant 8 violated: {name}@epoch:{epoch}");
            let device = self.store().open_at(name, &Instant::Epoch(epoch));
            let device = device.unwrap_or_else(|e| panic!("{what}: {e:?}"));
            assert_holds(&*device, &self.volumes[name].image(log, seq), &what);
        }
        let memory = &self.volumes[name];
        for instant in instants {
            let at = match &instant {
                Instant::Time(time) => memory.floor_time(log, *time),
                Instant::Mark(label) => memory.marks[label],
                Instant::Seq(seq) => *seq,
                other => unreachable!("{other} is not asked for"),
            };
            let Some(device) = self.open_kept(name, &instant) else { continue };
            let image = memory.image(log, at);
            assert_holds(&*device, &image, &format!("invariant 4 violated: {name} at {instant}"));
        }
    }

    fn adopt(&mut self, name: &VolumeName, log: &[Logged]) {
        let memory = self.volumes.get_mut(name).unwrap();
        let there: BTreeSet<Origin> = log.iter().map(|l| l.origin).collect();
        for (origin, tracked) in &mut memory.requests {
            tracked.fate = if there.contains(origin) { Fate::Acknowledged } else { Fate::Dead };
        }
        memory.order = log.to_vec();
    }

    /// With both databases gone, the logs say the same.
    fn check_rebuilt(&mut self, logs: &BTreeMap<VolumeName, Vec<Logged>>) {
        let seed = self.rng.random();
        let mut other = self.fork_without_index(seed);
        other.disk.kill_restart();
        if let Err(error) = other.open() {
            panic!("invariant 3 violated: without its index the store does not open: {error:?}");
        }
        other.check_catalogue();
        for (name, log) in logs {
            let found = logged(&other.volume(name), Seq::ZERO);
            assert_eq!(&found, log, "invariant 3 violated: the log of {name} without the index");
            other.check_content(name, log);
            other.check_survivors(name, log);
        }
        other.check_vm();
        let report = other.store().verify(&mut |_| ()).unwrap();
        assert!(report.findings.is_empty(), "invariant 3 violated: {report:?}");
    }
}

fn assert_nothing_lost(
    name: &VolumeName,
    memory: &Memory,
    log: &[Logged],
    counts: impl Fn(&crate::guest::Tracked) -> bool,
    invariant: &str,
) {
    let there: BTreeSet<Origin> = log.iter().map(|l| l.origin).collect();
    for (origin, tracked) in memory.requests.iter().filter(|(_, t)| counts(t)) {
        assert!(
            there.contains(origin),
            "invariant {invariant} violated: {name} has lost request {origin}: {tracked:?}"
        );
    }
}

fn assert_nothing_dead(name: &VolumeName, memory: &Memory, log: &[Logged]) {
    let mut seen = BTreeSet::new();
    for logged in log {
        let tracked = memory.requests.get(&logged.origin);
        let fate = tracked.map(|t| t.fate);
        assert!(
            matches!(fate, Some(Fate::InFlight | Fate::Abandoned | Fate::Undecided | Fate::Acknowledged)),
            "invariant 4 violated: {name} has request {} in its log: {tracked:?}",
            logged.origin
        );
        assert!(
            seen.insert(logged.origin),
            "invariant 4 violated: request {} of {name} is there twice",
            logged.origin
        );
    }
}
