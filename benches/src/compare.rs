//! Measures several servers in turn: one after the other, round by round, on the same file system.
//!
//! Only ratios of one run mean something on a shared machine. So every round measures all servers, directly one after
//! the other, each round begins with another one, and the ratio is made per round. Before each phase our daemon has to
//! be quiet, so that what it does in the background (filling segments with zeroes, flushing its index) is not charged
//! to others, nor hidden in their time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::{Client, Place, Shape};
use crate::drive::{self, Job};
use crate::home::Home;
use crate::machine::{Machine, free_bytes, gib, need_space};
use crate::meter::{self, MemoryWatch};
use crate::plot;
use crate::report::{Phase, Report, Settings, TargetReport, WorkloadReport};
use crate::server::{Ours, StorageDaemon, make_raw_file};
use crate::workload::{self, Access, Layout, Order, Workload};

/// What a sustained phase writes: twice what our store can have prepared.
const SUSTAINED_BYTES: u64 = 8 << 30;
/// A sustained phase ends by its bytes, or if that takes longer than this.
const SUSTAINED_TIME: Duration = Duration::from_secs(300);

/// Which measurements, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where stores and files are made: a directory on the file system to measure
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// The working set, in GiB [default: 4, or 2 in a quick run]
    #[arg(long, value_name = "GIB")]
    size_gib: Option<u64>,
    /// Rounds: each measures every server once [default: 5, or 3 in a quick run]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// How long each phase is measured, in seconds [default: 4, or 2 in a quick run]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// What each phase does before that, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 500)]
    warmup_ms: u64,
    /// The most that one workload may write into our store, in GiB [default: half of what is free beside the working sets]
    #[arg(long, value_name = "GIB")]
    budget_gib: Option<u64>,
    /// Only the workload of this name, or those whose name contains it; may be repeated
    #[arg(long = "workload", value_name = "TEXT")]
    workloads: Vec<String>,
    /// A selection that takes some ten minutes: fewer workloads and rounds, a smaller working set
    #[arg(long)]
    quick: bool,
    /// Only the server of this name, or those whose name contains it; may be repeated
    #[arg(long = "server", value_name = "TEXT")]
    servers: Vec<String>,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables to this file too
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the ratios into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl Args {
    fn size_bytes(&self) -> u64 {
        self.size_gib.unwrap_or(if self.quick { 2 } else { 4 }) << 30
    }
}

/// Names of the servers.
const OURS: &str = "hindsight";
const QSD: &str = "qemu-storage-daemon";
const OVERLAY: &str = "qemu-storage-daemon, qcow2 overlay";
const RAW: &str = "raw io_uring";

/// Measures and prints.
///
/// # Errors
/// A program is missing, there is too little space, or a request fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    let size_bytes = args.size_bytes();
    ensure!(size_bytes > 0 && args.rounds != Some(0) && args.seconds != Some(0), "nothing to do");
    fs::create_dir_all(&args.dir)?;
    need_space(&args.dir, 3 * size_bytes + (4 << 30))?;
    let mut workloads: Vec<Workload> = chosen(&workload::ALL, &args.workloads, |workload| workload.name);
    if args.quick && args.workloads.is_empty() {
        workloads.retain(|workload| workload::QUICK.contains(&workload.name));
    }
    ensure!(!workloads.is_empty(), "no workload has such a name");
    let names: Vec<&'static str> = chosen(&[OURS, QSD, OVERLAY, RAW], &args.servers, |name| name);
    ensure!(!names.is_empty(), "no server has such a name");
    let home = Home::new(&args.dir)?;
    let settings = Settings {
        size_bytes,
        rounds: args.rounds.unwrap_or(if args.quick { 3 } else { 5 }),
        seconds: args.seconds.unwrap_or(if args.quick { 2 } else { 4 }),
        warmup_ms: args.warmup_ms,
        store_budget_bytes: budget(args)?,
    };
    let mut report = Report { machine: Machine::look(&args.dir)?, settings, workloads: Vec::new() };
    home.explain(measure(&home, &workloads, &names, &mut report, args))?;
    println!("{}", report.markdown());
    Ok(())
}

/// Writes what there is so far: a run takes long, and a part of it is worth keeping.
fn save(report: &Report, args: &Args) -> Result<()> {
    if let Some(path) = &args.markdown {
        fs::write(path, report.markdown()).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(report)?).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.svg {
        plot::ratios(vec![serde_json::to_value(report)?], path)?;
    }
    Ok(())
}

fn measure(
    home: &Home,
    workloads: &[Workload],
    names: &[&'static str],
    report: &mut Report,
    args: &Args,
) -> Result<()> {
    let mut bench = Bench::start(home.dir(), report.settings, names)?;
    for workload in workloads {
        report.workloads.push(bench.measure(workload)?);
        save(report, args)?;
    }
    bench.end()
}

/// Those with one of the names, or with a text in their name that is nobody's whole name; all, if nothing is wanted.
fn chosen<T: Copy>(all: &[T], wanted: &[String], name: impl Fn(&T) -> &'static str) -> Vec<T> {
    let matches = |own: &str, text: &String| {
        if all.iter().any(|other| name(other) == text) { own == text } else { own.contains(text.as_str()) }
    };
    let is_wanted = |item: &&T| wanted.is_empty() || wanted.iter().any(|text| matches(name(item), text));
    all.iter().filter(is_wanted).copied().collect()
}

fn budget(args: &Args) -> Result<u64> {
    match args.budget_gib {
        Some(gib) => Ok(gib << 30),
        // The raw file, what the store is filled with, and the overlay come on top.
        None => Ok(free_bytes(&args.dir)?.saturating_sub(3 * args.size_bytes()) / 2),
    }
}

/// Everything that is measured, running.
struct Bench<'a> {
    home: &'a Path,
    settings: Settings,
    names: Vec<&'static str>,
    storage_daemon: Option<StorageDaemon>,
    ours: Option<Store>,
}

/// Our daemon, what is in its store, and the most memory it has had.
struct Store {
    ours: Ours,
    memory: MemoryWatch,
    /// What was written; none once a workload has written over it.
    layout: Option<Layout>,
}

impl<'a> Bench<'a> {
    fn start(home: &'a Path, settings: Settings, names: &[&'static str]) -> Result<Self> {
        let mut bench = Self { home, settings, names: names.to_vec(), storage_daemon: None, ours: None };
        if names.iter().any(|name| *name != OURS) {
            make_raw_file(&bench.raw_file(), settings.size_bytes)?;
        }
        if names.contains(&QSD) {
            bench.storage_daemon = Some(StorageDaemon::start(home, &bench.raw_file())?);
        }
        Ok(bench)
    }

    fn end(&mut self) -> Result<()> {
        self.storage_daemon = None;
        self.ours.take().map_or(Ok(()), |store| store.ours.destroy())
    }

    fn measure(&mut self, workload: &Workload) -> Result<WorkloadReport> {
        let rounds = if workload.sustained { self.settings.rounds.min(2) } else { self.settings.rounds };
        let mut targets: Vec<TargetReport> = self.names.iter().map(|name| TargetReport::new(name)).collect();
        self.prepare_store(workload.layout)?;
        let rate = if workload.paced { Some(self.half_load(workload)?) } else { None };
        for round in 0..rounds {
            for turn in 0..targets.len() {
                let target = &mut targets[(round + turn) % self.names.len()];
                let phase = self.phase(workload, rate, target.name, round)?;
                eprintln!(
                    "{:28} round {}: {:20} {:9.0}/s in {:.1} s, p99 {:6.0} us",
                    workload.name,
                    round + 1,
                    target.name,
                    phase.iops,
                    phase.seconds,
                    phase.p99_us
                );
                target.phases.push(phase);
            }
        }
        let memory = self.ours.as_ref().map(|store| store.memory.most());
        if workload.writes()
            && let Some(store) = &mut self.ours
        {
            store.layout = None;
        }
        Ok(WorkloadReport::new(*workload, targets, memory))
    }

    /// Sees to a store in which exactly this was written, if our daemon is measured.
    fn prepare_store(&mut self, layout: Layout) -> Result<()> {
        if !self.names.contains(&OURS) || self.ours.as_ref().is_some_and(|store| store.layout == Some(layout))
        {
            return Ok(());
        }
        // What is filled sequentially can still be scattered; nothing else can be made of what is there.
        if self.ours.as_ref().is_none_or(|store| store.layout != Some(Layout::Sequential)) {
            if let Some(store) = self.ours.take() {
                store.ours.destroy()?;
            }
            let ours = Ours::create(&self.home.join("ours"), self.settings.size_bytes)?;
            let memory = MemoryWatch::new(ours.pid()?);
            self.fill(&ours.place(), Order::Sequential)?;
            self.ours = Some(Store { ours, memory, layout: Some(Layout::Sequential) });
        }
        if let Some(store) = &self.ours
            && layout == Layout::Scattered
        {
            self.fill(&store.ours.place(), Order::Random)?;
        }
        if let Some(store) = &mut self.ours {
            store.layout = Some(layout);
        }
        Ok(())
    }

    /// Writes as many bytes as the working set has.
    fn fill(&self, place: &Place, order: Order) -> Result<()> {
        let (bytes, depth) = if order == Order::Sequential { (128 << 10, 16) } else { (4 << 10, 128) };
        let mut client = Client::connect(place, Shape { queues: 1, depth, request_bytes: bytes })?;
        let job = Job {
            access: Access::Write,
            order,
            bytes,
            from_bytes: 0,
            range_bytes: self.settings.size_bytes,
            warmup: Duration::ZERO,
            time: Duration::from_secs(3600),
            limit_bytes: self.settings.size_bytes,
            rate: None,
            seed: 2,
        };
        drive::run(&mut client, &job, || {}).context("filling our store").map(drop)
    }

    /// Half of what qemu-storage-daemon reaches, in operations per second.
    fn half_load(&self, workload: &Workload) -> Result<f64> {
        let full = Workload { paced: false, ..*workload };
        ensure!(self.names.contains(&QSD), "half of {QSD}'s load is only known if it is measured, too");
        let rate = self.phase(&full, None, QSD, 0)?.iops / 2.0;
        eprintln!("{:28} at {rate:.0}/s", workload.name);
        Ok(rate)
    }

    fn phase(&self, workload: &Workload, rate: Option<f64>, name: &str, round: usize) -> Result<Phase> {
        let settled = match &self.ours {
            Some(store) => meter::settle(store.ours.pid()?)?,
            None => true,
        };
        let overlay = match name {
            OVERLAY => Some(StorageDaemon::start_overlay(self.home, &self.raw_file())?),
            _ => None,
        };
        let job = Job { rate, ..self.job(workload, round) };
        let phase = self.drive(workload, &job, name, overlay.as_ref(), settled);
        overlay.map_or(Ok(()), |daemon| daemon.discard_overlay(self.home))?;
        phase
    }

    fn drive(
        &self,
        workload: &Workload,
        job: &Job,
        name: &str,
        overlay: Option<&StorageDaemon>,
        settled: bool,
    ) -> Result<Phase> {
        let (place, pid) = match overlay {
            Some(daemon) => (daemon.place(), daemon.pid()),
            None => self.target(name)?,
        };
        let shape = Shape { queues: workload.queues, depth: workload.depth, request_bytes: workload.bytes };
        let mut client = match name {
            OURS | RAW => Client::connect(&place, shape)?,
            _ => Client::connect_in_time(&place, shape)?,
        };
        let mut before = Ok((0.0, 0.0));
        let cpu = || anyhow::Ok((meter::cpu_seconds(pid)?, meter::index_cpu_seconds(pid)?));
        let outcome = drive::run(&mut client, job, || before = cpu())
            .with_context(|| format!("{}, {name}", workload.name))?;
        let (before, after) = (before?, cpu()?);
        let mut phase = Phase::new(&outcome, workload, after.0 - before.0, settled);
        if name == OURS {
            phase.index_cpu_share = Some((after.1 - before.1) / phase.cpu_seconds);
        }
        Ok(phase)
    }

    fn job(&self, workload: &Workload, round: usize) -> Job {
        let rounds = self.settings.rounds as u64;
        let (warmup, time, limit_bytes) = if workload.sustained {
            (Duration::ZERO, SUSTAINED_TIME, SUSTAINED_BYTES.min(self.settings.store_budget_bytes / 2))
        } else {
            let limit = if workload.writes() { self.settings.store_budget_bytes / rounds } else { u64::MAX };
            let warmup = Duration::from_millis(self.settings.warmup_ms);
            (warmup, Duration::from_secs(self.settings.seconds), limit)
        };
        Job {
            access: workload.access,
            order: workload.order,
            bytes: workload.bytes,
            from_bytes: 0,
            range_bytes: self.settings.size_bytes,
            warmup,
            time,
            limit_bytes,
            rate: None,
            // Everybody gets the same requests in the same round.
            seed: 1000 * (round as u64 + 1),
        }
    }

    /// Where a server is, and the process that does its work.
    fn target(&self, name: &str) -> Result<(Place, u32)> {
        match name {
            OURS => {
                let store = self.ours.as_ref().context("our daemon is not running")?;
                Ok((store.ours.place(), store.ours.pid()?))
            }
            QSD => {
                let daemon = self.storage_daemon.as_ref().context("qemu-storage-daemon is not running")?;
                Ok((daemon.place(), daemon.pid()))
            }
            _ => Ok((Place::File(self.raw_file()), std::process::id())),
        }
    }

    fn raw_file(&self) -> PathBuf {
        self.home.join("disk.raw")
    }
}

impl Settings {
    /// One line for people.
    pub(crate) fn describe(&self) -> String {
        format!(
            "Working set {:.0} GiB; {} rounds, each phase {} s after {} ms of warm-up; at most {:.0} GiB of writes per \
             workload",
            gib(self.size_bytes),
            self.rounds,
            self.seconds,
            self.warmup_ms,
            gib(self.store_budget_bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_chooses_one_and_a_part_of_names_all_of_them() {
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
            chosen(&workload::ALL, &wanted, |workload| workload.name)
                .iter()
                .map(|w| w.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&["rand-write-4k-d1"]), ["rand-write-4k-d1"]);
        assert_eq!(names(&["zipf", "flush"]), ["zipf-read-4k-d32", "zipf-write-4k-d32", "write-flush-4k-d1"]);
        assert_eq!(names(&[]).len(), workload::ALL.len());
        assert!(names(&["nothing"]).is_empty());
    }
}
