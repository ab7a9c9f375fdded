//! What a long past costs: the same figures after no writes, a million, a hundred million; with many branches and many
//! volumes. A curve, not a point.
//!
//! A store with a past and one without are measured in turn. Both get the same working set, which is newer than the past.
//! [`subject`] is such a store, [`pair`] two of them, [`segments`] gives the data of old writes back while a history is
//! longer than the disk, [`crowd`] makes branches and volumes, [`report`] tables and [`curve`] a drawing.

mod crowd;
mod curve;
mod pair;
mod report;
mod segments;
mod subject;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::home::Home;
use crate::machine::{Machine, need_space};
use crate::meter::{self, MemoryWatch};
use pair::{Cold, Pair, Rates};
use report::Report;
use segments::LogUse;
use subject::{Opening, Subject};

/// Kills of each store.
const KILLS: u64 = 3;
/// The most that the index is expected to take for each write; only to find out early that there is no room.
const INDEX_BYTES: u64 = 130;
/// What two stores take besides what is written: segments filled ahead, most of all.
const ROOM_BYTES: u64 = 10 << 30;

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lengths of histories, in writes of 4 KiB [default: 0,1000000,10000000,100000000; 0,100000,1000000 in a quick run]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    points: Vec<u64>,
    /// Branches of a volume [default: 1000, or 100 in a quick run]
    #[arg(long, value_name = "N")]
    branches: Option<usize>,
    /// Volumes of a store [default: 1000, or 100 in a quick run]
    #[arg(long, value_name = "N")]
    volumes: Option<usize>,
    /// Only this part; may be repeated
    #[arg(long = "part", value_name = "PART")]
    parts: Vec<Part>,
    /// The size of the volumes, which are sparse, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 16 << 10)]
    size_gib: u64,
    /// How much of it the history is spread over, in GiB [default: 64, or 8 in a quick run]
    #[arg(long, value_name = "GIB")]
    spread_gib: Option<u64>,
    /// The working set that is measured, in MiB [default: 1024, or 256 in a quick run]
    #[arg(long, value_name = "MIB")]
    working_set_mib: Option<u64>,
    /// The newest data of a history, in GiB, that is not given back while it is written
    #[arg(long, value_name = "GIB", default_value_t = 12)]
    keep_gib: u64,
    /// A budget of the map that the working set does not fit, in KiB [default: a quarter of what it needs]
    #[arg(long, value_name = "KIB")]
    small_budget_kib: Option<u64>,
    /// Rounds: each measures both stores once [default: 5, or 2 in a quick run]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// How long a phase takes, in seconds [default: 3, or 1 in a quick run]; one that writes may end earlier
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// A selection that takes some minutes
    #[arg(long)]
    quick: bool,
    /// Where stores are made
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables to this file too
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the curves into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A volume with a long history.
    History,
    /// A volume with many branches.
    Branches,
    /// A store with many volumes.
    Volumes,
}

/// How everything is measured.
#[derive(Clone, Copy, Debug, Serialize)]
struct Plan {
    size_bytes: u64,
    spread_bytes: u64,
    working_set_bytes: u64,
    keep_bytes: u64,
    small_budget_bytes: u64,
    rounds: usize,
    #[serde(skip)]
    warmup: Duration,
    #[serde(skip)]
    time: Duration,
    /// The most that a phase writes.
    phase_bytes: u64,
    /// The last writes of each history.
    recent_writes: u64,
    /// Leaves that are read cold.
    cold: usize,
}

/// What is measured of any store with a past.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    /// Starts after a kill: of the store with a past, and of the one without.
    openings: [Vec<Opening>; 2],
    /// With a budget of the map that has room for the working set.
    within: Rates,
    /// What those writes have added to the log, and to the time index.
    log: LogUse,
    index_growth_bytes: u64,
    /// The most anonymous memory meanwhile.
    rss_anon_max_bytes: u64,
    /// With one that has not.
    past_budget: Rates,
    /// The store with a past, and the one without.
    cold: [Vec<Cold>; 2],
}

/// A history of some length.
#[derive(Debug, Serialize, Deserialize)]
struct Point {
    writes: u64,
    index_bytes: u64,
    /// The most anonymous memory while it was written.
    rss_anon_max_writing_bytes: u64,
    figures: Figures,
}

/// A volume with branches.
#[derive(Debug, Serialize)]
struct Branched {
    branches: usize,
    figures: Figures,
}

/// Draws the histories of a report into an SVG file.
///
/// # Errors
/// It is no report of `growth`; the file system's.
pub(crate) fn draw(points: serde_json::Value, path: &Path) -> Result<()> {
    let points: Vec<Point> = serde_json::from_value(points).context("not a report of growth")?;
    curve::draw(&points, path)
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, or our daemon fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    let plan = args.plan();
    ensure!(plan.rounds > 0 && plan.working_set_bytes > 0 && plan.keep_bytes > 0, "nothing to do");
    let longest = args.points().into_iter().max().unwrap_or(0);
    let phases = 2 * plan.rounds as u64 * plan.phase_bytes + plan.working_set_bytes;
    let history = (longest * subject::BLOCK).min(plan.keep_bytes) / 100 * 108;
    need_space(&args.dir, history + longest * INDEX_BYTES + 2 * phases + ROOM_BYTES)?;
    let home = Home::new(&args.dir)?;
    let mut report =
        Report { machine: Machine::look(home.dir())?, plan, points: Vec::new(), branched: None, crowd: None };
    home.explain(measure(args, &home, &mut report))?;
    println!("{}", report.markdown());
    Ok(())
}

fn measure(args: &Args, home: &Home, report: &mut Report) -> Result<()> {
    let plan = report.plan;
    if args.wants(Part::History) {
        for writes in args.points() {
            report.points.push(point(home, &plan, writes)?);
            args.save(report)?;
        }
    }
    if args.wants(Part::Branches) {
        let branches = args.branches.unwrap_or(if args.quick { 100 } else { 1000 });
        report.branched = Some(branched(home, &plan, branches)?);
        args.save(report)?;
    }
    if args.wants(Part::Volumes) {
        let volumes = args.volumes.unwrap_or(if args.quick { 100 } else { 1000 });
        report.crowd = Some(crowd::volumes(home, &plan, volumes)?);
        args.save(report)?;
    }
    Ok(())
}

fn point(home: &Home, plan: &Plan, writes: u64) -> Result<Point> {
    eprintln!("a history of {writes} writes");
    let mut pair = new_pair(home, plan, &writes.to_string())?;
    let watch = MemoryWatch::new(pair.aged.ours.pid()?);
    pair.aged.age(plan, writes)?;
    meter::settle_or_say(pair.aged.ours.pid()?)?;
    let index_bytes = pair.aged.index_bytes()?;
    let rss_anon_max_writing_bytes = watch.most();
    prepare(&mut pair, plan)?;
    let figures = figures(&mut pair, plan)?;
    end(pair)?;
    Ok(Point { writes, index_bytes, rss_anon_max_writing_bytes, figures })
}

fn branched(home: &Home, plan: &Plan, branches: usize) -> Result<Branched> {
    eprintln!("a volume with {branches} branches");
    let mut pair = new_pair(home, plan, "branches")?;
    // What the branches inherit.
    prepare(&mut pair, plan)?;
    crowd::branch(&mut pair.aged, plan, branches)?;
    let figures = figures(&mut pair, plan)?;
    end(pair)?;
    Ok(Branched { branches, figures })
}

fn new_pair(home: &Home, plan: &Plan, of: &str) -> Result<Pair> {
    let new = |name: &str| Subject::new(&home.dir().join(format!("{name}-{of}")), plan);
    Ok(Pair { aged: new("aged")?, young: new("young")? })
}

fn end(pair: Pair) -> Result<()> {
    pair.aged.ours.destroy()?;
    pair.young.ours.destroy()
}

/// Gives both stores what is measured.
fn prepare(pair: &mut Pair, plan: &Plan) -> Result<()> {
    for subject in [&mut pair.aged, &mut pair.young] {
        subject.write_recent(plan)?;
        subject.write_working_set(plan)?;
    }
    Ok(())
}

fn figures(pair: &mut Pair, plan: &Plan) -> Result<Figures> {
    let kill = |subject: &mut Subject| (0..KILLS).map(|kill| subject.kill_and_open(plan, 2 + kill)).collect();
    let openings: [Result<Vec<Opening>>; 2] = [kill(&mut pair.aged), kill(&mut pair.young)];
    let [aged, young] = openings;
    let openings = [aged?, young?];

    let pid = pair.aged.ours.pid()?;
    let watch = MemoryWatch::new(pid);
    meter::settle_or_say(pid)?;
    let before = (pair.aged.index_bytes()?, pair.aged.ordinal()?);
    let within = pair.rates(plan, "within the budget")?;
    meter::settle_or_say(pid)?;
    let rss_anon_max_bytes = watch.most();
    let index_growth_bytes = pair.aged.index_bytes()?.saturating_sub(before.0);
    let log = segments::log_use(&pair.aged.ours.store(), before.1, pair.aged.ordinal()?)?;

    for subject in [&mut pair.aged, &mut pair.young] {
        subject.open_anew(Some(plan.small_budget_bytes))?;
    }
    let past_budget = pair.rates(plan, "past the budget")?;
    let cold = pair.cold(plan)?;
    Ok(Figures { openings, within, log, index_growth_bytes, rss_anon_max_bytes, past_budget, cold })
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    fn points(&self) -> Vec<u64> {
        let usual: &[u64] =
            if self.quick { &[0, 100_000, 1_000_000] } else { &[0, 1_000_000, 10_000_000, 100_000_000] };
        let mut points = if self.points.is_empty() { usual.to_vec() } else { self.points.clone() };
        points.sort_unstable();
        points
    }

    fn plan(&self) -> Plan {
        let of = |full: u64, quick: u64| if self.quick { quick } else { full };
        let working_set_bytes = self.working_set_mib.unwrap_or(of(1024, 256)) << 20;
        // A leaf has 512 places of 16 bytes.
        let needed = working_set_bytes / subject::LEAF_BYTES * 8192;
        Plan {
            size_bytes: self.size_gib << 30,
            spread_bytes: self.spread_gib.unwrap_or(of(64, 8)) << 30,
            working_set_bytes,
            keep_bytes: self.keep_gib << 30,
            small_budget_bytes: self.small_budget_kib.map_or(needed / 4, |kib| kib << 10),
            rounds: self.rounds.unwrap_or(of(5, 2) as usize),
            warmup: Duration::from_millis(250),
            time: Duration::from_secs(self.seconds.unwrap_or(of(3, 1))),
            phase_bytes: of(1024, 512) << 20,
            recent_writes: of(200_000, 50_000),
            cold: of(4000, 1000) as usize,
        }
    }

    /// Writes what there is so far: a run takes long, and a part of it is worth keeping.
    fn save(&self, report: &Report) -> Result<()> {
        if let Some(path) = &self.markdown {
            fs::write(path, report.markdown()).with_context(|| path.display().to_string())?;
        }
        if let Some(path) = &self.json {
            fs::write(path, serde_json::to_vec_pretty(report)?)
                .with_context(|| path.display().to_string())?;
        }
        if let Some(path) = &self.svg {
            curve::draw(&report.points, path)?;
        }
        Ok(())
    }
}
