//! Random operations against a reference that remembers every version of every sector.
//!
//! Several queues have requests in flight that overlap, so what a read may return is decided afterwards: once nothing is
//! in flight, the log tells the order of the changes, and every read must have seen a state that this order allows.
//!
//! `MODEL_SEED=x` replays a run, `MODEL_RUNS=n` makes that many.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use cdp_types::{BlockDevice, Instant, Origin, Seq, VolumeName};
use rand::Rng;

use crate::content::{Stamp, stamps_of};
use crate::guest::{AREAS, Fate, Tracked, area};
use crate::machine::{Crash, Machine, Seen, read};
use crate::reference::{Sectors, logged};

/// Operations of one run.
const OPERATIONS: u64 = 100_000;
/// Operations between two moments at which nothing is in flight.
const ROUND: u64 = 200;
/// Instants compared after the databases were deleted.
const INSTANTS: usize = 100;

/// Every version of a volume's sectors.
#[derive(Debug, Default)]
struct Versions {
    sectors: BTreeMap<u64, Vec<(Seq, Stamp)>>,
    /// The last request that is in it.
    newest: Seq,
    /// Of each request.
    times: Vec<(u64, Seq)>,
}

impl Versions {
    fn at(&self, sector: u64, seq: Seq) -> Stamp {
        let Some(versions) = self.sectors.get(&sector) else { return 0 };
        let after = versions.partition_point(|(s, _)| *s <= seq);
        after.checked_sub(1).map_or(0, |last| versions[last].1)
    }

    /// Every sector as of `to` again, from `start` on.
    fn fork(&mut self, to: Seq, start: Seq, time_ns: u64) {
        let sectors: Vec<u64> = self.sectors.keys().copied().collect();
        for sector in sectors {
            let stamp = self.at(sector, to);
            self.sectors.entry(sector).or_default().push((start, stamp));
        }
        self.newest = start;
        self.times.push((time_ns, start));
    }

    fn add(&mut self, seq: Seq, time_ns: u64, tracked: &Tracked) {
        tracked.request.each(|sector, stamp| {
            let versions = self.sectors.entry(sector).or_default();
            match versions.last_mut() {
                Some(last) if last.0 == seq => last.1 = stamp,
                _ => versions.push((seq, stamp)),
            }
        });
        self.newest = seq;
        self.times.push((time_ns, seq));
    }
}

struct Model {
    machine: Machine,
    versions: BTreeMap<VolumeName, Versions>,
    operations: u64,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut machine = Machine::new(seed);
        machine.most_sectors = 24;
        machine.open().unwrap();
        machine.create();
        machine.create();
        Self { machine, versions: BTreeMap::new(), operations: 0 }
    }

    fn run(&mut self) {
        while self.operations < OPERATIONS {
            for _ in 0..ROUND {
                self.operate();
            }
            self.settle();
            for _ in 0..6 {
                self.read_the_past();
            }
        }
        self.rebuild();
    }

    fn operate(&mut self) {
        let machine = &mut self.machine;
        self.operations += 1;
        match machine.rng.random_range(0..10_000) {
            0..6470 => machine.submit(),
            6470..6500 => self.checkpoint(),
            6500..8500 => machine.submit_read(),
            8500..8900 => drop(machine.store().load_step()),
            8900..9400 => drop(machine.store().pool_step().unwrap()),
            9400..9500 => drop(machine.store().index_step().unwrap()),
            9500..9700 => machine.store().close_chunks(),
            9700..9860 => machine.store().flush_index().unwrap(),
            9860..9880 => machine.store().write_presents().unwrap(),
            9880..9930 => machine.mark(),
            9930..9945 => machine.resize(),
            9945..9960 => machine.create(),
            9960..9962 => machine.destroy(),
            9962..9966 => self.revert(),
            9966..9967 => self.clone_some(),
            9967..9968 => machine.delete_branch(),
            9968..9970 => self.open_reader(),
            9970..9971 => machine.check_readers(),
            9971..9972 => machine.upkeep(),
            9972..9973 => machine.drop_lane(),
            9973..9985 => machine.reopen(),
            _ => self.die(),
        }
        for _ in 0..2 {
            self.machine.poll_some();
            let _ = self.machine.disk.step();
        }
    }

    /// A volume goes back to an instant; what it holds is what it held then.
    fn revert(&mut self) {
        self.settle();
        self.machine.revert();
        self.take_in_forks();
    }

    /// Something is done with the virtual machine, which may go back.
    fn checkpoint(&mut self) {
        self.settle();
        self.machine.checkpoint_step();
        self.take_in_forks();
    }

    fn take_in_forks(&mut self) {
        for (name, memory) in &self.machine.volumes {
            let versions = self.versions.entry(name.clone()).or_default();
            let newest = versions.newest;
            for fork in memory.forks.iter().filter(|fork| fork.start > newest) {
                versions.fork(fork.to, fork.start, fork.time_ns);
            }
        }
    }

    /// A volume is cloned: it begins with what the other held.
    fn clone_some(&mut self) {
        self.settle();
        let Some((name, source, at)) = self.machine.clone_some() else { return };
        let mut versions = Versions::default();
        for sector in self.versions[&source].sectors.keys() {
            versions.sectors.insert(*sector, vec![(Seq::ZERO, self.versions[&source].at(*sector, at))]);
        }
        let branch = self.machine.store().branches(&name).unwrap()[0];
        versions.newest = branch.start;
        versions.times.push((branch.created_ns, branch.start));
        self.versions.insert(name, versions);
    }

    /// Opens a past instant and keeps it open.
    fn open_reader(&mut self) {
        self.settle();
        let names: Vec<VolumeName> = self.machine.volumes.keys().cloned().collect();
        let name = &names[self.machine.rng.random_range(0..names.len())];
        let (instant, seq) = self.some_instant(name);
        let Some(device) = self.machine.open_kept(name, &instant) else { return };
        let versions = &self.versions[name];
        let held = |sector: &u64| (*sector, versions.at(*sector, seq));
        let image = versions.sectors.keys().map(held).filter(|(_, stamp)| *stamp != 0).collect();
        self.machine.keep_open(device, image, format!("{name}@{instant}"));
    }

    /// The process is killed with requests in flight, and started again.
    fn die(&mut self) {
        self.check_reads_so_far();
        self.machine.crash(Crash::Kill);
        self.machine.open().unwrap();
        self.take_in();
        self.machine.check_vm();
    }

    fn settle(&mut self) {
        self.machine.drain();
        self.check_reads_so_far();
        self.check_flushes();
        self.take_in();
    }

    /// The requests of this round that a volume's log has, in its order.
    fn round_of(&self, name: &VolumeName) -> Vec<(Seq, u64, Origin)> {
        let newest = self.versions.get(name).map_or(Seq::ZERO, |v| v.newest);
        let log = logged(&self.machine.volume(name), newest.plus(1));
        log.iter().map(|l| (l.seq, l.time_ns, l.origin)).collect()
    }

    /// Moves what the logs have got in this round into the versions, and checks that it is what completed.
    fn take_in(&mut self) {
        self.versions.retain(|name, _| self.machine.volumes.contains_key(name));
        let names: Vec<VolumeName> = self.machine.volumes.keys().cloned().collect();
        for name in names {
            let round = self.round_of(&name);
            let versions = self.versions.entry(name.clone()).or_default();
            let memory = self.machine.volumes.get_mut(&name).unwrap();
            let mut latest_submission = 0;
            for (seq, time_ns, origin) in round {
                let Some(tracked) = memory.requests.remove(&origin) else {
                    panic!("{name} has request {origin}, which was never made, or twice")
                };
                assert_ne!(tracked.fate, Fate::Failed, "{name} has request {origin}, which failed");
                // One that had completed before another was submitted comes before it.
                assert!(
                    latest_submission < tracked.completed,
                    "{name}: request {origin} comes too late in the log"
                );
                latest_submission = latest_submission.max(tracked.submitted);
                versions.add(seq, time_ns, &tracked);
            }
            let lost = memory.requests.iter().find(|(_, t)| t.fate == Fate::Acknowledged);
            assert!(lost.is_none(), "{name} has lost {lost:?}");
            memory.requests.clear();
        }
    }

    /// Whether each read saw a state between the one when it was submitted and the one when it ended.
    fn check_reads_so_far(&mut self) {
        let names: Vec<VolumeName> = self.machine.volumes.keys().cloned().collect();
        let rounds: BTreeMap<VolumeName, _> =
            names.into_iter().map(|n| (n.clone(), self.round_of(&n))).collect();
        for seen in std::mem::take(&mut self.machine.seen) {
            // A volume that was destroyed meanwhile has no log any more.
            if let Some(round) = rounds.get(&seen.volume) {
                self.check_read(&seen, round);
            }
        }
    }

    fn check_read(&self, seen: &Seen, round: &[(Seq, u64, Origin)]) {
        let requests = &self.machine.volumes[&seen.volume].requests;
        let changes: Vec<&Tracked> = round
            .iter()
            .filter_map(|(_, _, o)| requests.get(o))
            .filter(|t| t.request.touches(seen.sectors))
            .collect();
        for (offset, &found) in seen.stamps.iter().enumerate() {
            let sector = seen.sectors.first + offset as u64;
            let before = self.versions.get(&seen.volume).map_or(0, |v| v.at(sector, Seq::MAX));
            let mut allowed = vec![before];
            for change in &changes {
                let mut stamp = None;
                change.request.each(|at, value| {
                    if at == sector {
                        stamp = Some(value);
                    }
                });
                let Some(stamp) = stamp.filter(|_| change.submitted < seen.completed) else { continue };
                if change.completed < seen.submitted {
                    allowed.clear();
                }
                allowed.push(stamp);
            }
            assert!(
                allowed.contains(&found),
                "{seen:?}: sector {sector} holds {found}; allowed: {allowed:?}"
            );
        }
    }

    /// `flush:-1` has everything that had completed before any completed flush was submitted.
    fn check_flushes(&mut self) {
        for (name, submitted) in std::mem::take(&mut self.machine.flushes) {
            if !self.machine.volumes.contains_key(&name) {
                continue;
            }
            let at = self.machine.store().resolve(&name, &Instant::FlushBack(1)).unwrap();
            let requests = &self.machine.volumes[&name].requests;
            for (seq, _, origin) in self.round_of(&name) {
                let covered = requests.get(&origin).is_some_and(|t| t.completed < submitted);
                assert!(!covered || seq <= at.seq, "{name}: flush:-1 is seq {}, without {seq}", at.seq);
            }
        }
    }

    /// An instant of a volume, by one of its names, and the last request in it.
    fn some_instant(&mut self, name: &VolumeName) -> (Instant, Seq) {
        let marks: Vec<_> = self.machine.volumes[name].marks.iter().map(|(l, s)| (l.clone(), *s)).collect();
        let epochs = self.machine.vm.epochs_of(name);
        let versions = &self.versions[name];
        let rng = &mut self.machine.rng;
        if !epochs.is_empty() && rng.random_bool(0.1) {
            let (epoch, seq) = epochs[rng.random_range(0..epochs.len())];
            return (Instant::Epoch(epoch), seq);
        }
        let Some(index) = versions.times.len().checked_sub(1).map(|last| rng.random_range(0..=last)) else {
            return (Instant::Head, Seq::MAX);
        };
        let (time_ns, seq) = versions.times[index];
        match rng.random_range(0..10) {
            0 => (Instant::Head, Seq::MAX),
            1..5 => (Instant::Seq(seq), seq),
            5..8 => {
                let until = versions.times.partition_point(|(t, _)| *t <= time_ns);
                (Instant::Time(time_ns), versions.times[until - 1].1)
            }
            _ if marks.is_empty() => (Instant::Seq(seq.before()), seq.before()),
            _ => {
                let (label, seq) = marks[rng.random_range(0..marks.len())].clone();
                (Instant::Mark(label), seq)
            }
        }
    }

    fn read_the_past(&mut self) {
        self.operations += 1;
        let names: Vec<VolumeName> = self.machine.volumes.keys().cloned().collect();
        let name = &names[self.machine.rng.random_range(0..names.len())];
        let (instant, seq) = self.some_instant(name);
        let sectors = area(self.machine.rng.random_range(0..AREAS.len()));
        let Some(device) = self.machine.open_kept(name, &instant) else { return };
        self.compare(name, &*device, &instant, seq, sectors);
    }

    fn compare(
        &self,
        name: &VolumeName,
        device: &dyn BlockDevice,
        instant: &Instant,
        seq: Seq,
        sectors: Sectors,
    ) {
        let bytes = read(device, sectors.bytes()).unwrap();
        for (offset, found) in stamps_of(&bytes).into_iter().enumerate() {
            let sector = sectors.first + offset as u64;
            let expected = self.versions[name].at(sector, seq);
            assert_eq!(found, Some(expected), "{name}@{instant}, sector {sector}");
        }
    }

    /// Without its databases the store gives the same answers, and checks as whole.
    fn rebuild(&mut self) {
        let seed = self.machine.rng.random();
        let mut other = self.machine.fork_without_index(seed);
        other.disk.kill_restart();
        other.open().unwrap();
        other.check_vm();
        let report = other.store().verify(&mut |_| ()).unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
        let names: Vec<VolumeName> = self.machine.volumes.keys().cloned().collect();
        for index in 0..INSTANTS {
            let name = &names[index % names.len()];
            let (instant, seq) = self.some_instant(name);
            let Some(device) = other.open_kept(name, &instant) else { continue };
            (0..AREAS.len()).for_each(|a| self.compare(name, &*device, &instant, seq, area(a)));
        }
    }
}

#[test]
fn a_hundred_thousand_operations_agree_with_the_reference() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seeds = match number("MODEL_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("MODEL_RUNS").unwrap_or(1)).collect(),
    };
    for seed in seeds {
        let mut model = Model::new(seed);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| model.run())) {
            eprintln!("after {} operations; to replay it: MODEL_SEED={seed}", model.operations);
            resume_unwind(panic);
        }
    }
}
