//! How long a killed daemon takes from its start to its first read, when its log is long.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde::Serialize;

use crate::client::{Client, Place, Shape};
use crate::home::Home;
use crate::machine::{Machine, need_space};
use crate::meter::{self, MemoryWatch};
use crate::report::Spread;
use crate::server::Ours;
use crate::verify::{self, Mix, Model, SECTOR, Session};

const BLOCK: usize = 4096;
/// Requests in flight while the log is written.
const DEPTH: usize = 128;
/// Random blocks that are checked after each recovery, besides the first read.
const CHECKED: u64 = 20_000;
/// What is written before each further kill.
const MORE: u64 = 200_000;
/// A daemon that serves nothing for so long is broken.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often the daemon is tried before it serves.
const TRY: Duration = Duration::from_micros(500);

/// What is written before, and how often it is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Writes of 4 KiB before the first kill
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    writes: u64,
    /// The disk's size, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 4)]
    size_gib: u64,
    /// How often it is killed and measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Where a store is made: it takes 4.4 GB for each million of writes
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Recovery {
    /// Writes that were acknowledged before the kill.
    acknowledged: u64,
    /// And those that were in flight.
    in_flight: usize,
    /// From starting the daemon to the end of the first read.
    first_read_ms: f64,
    rss_anon_at_first_read_bytes: u64,
    /// The most until the blocks were checked.
    rss_anon_max_bytes: u64,
}

#[derive(Debug, Serialize)]
struct RecoveryReport {
    machine: Machine,
    disk_bytes: u64,
    /// The most that the daemon has had while it wrote the log.
    rss_anon_max_writing_bytes: u64,
    first_read_ms: Spread,
    runs: Vec<Recovery>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, the daemon does not come back, or something acknowledged is missing.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.runs > 0 && args.writes > 0 && args.size_gib > 0, "nothing to do");
    let all = args.writes + MORE * args.runs as u64;
    need_space(&args.dir, all * BLOCK as u64 / 100 * 108 + (3 << 30))?;
    let home = Home::new(&args.dir)?;
    let report = home.explain(measure(args, &home))?;
    println!("{}", markdown(&report));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(args: &Args, home: &Home) -> Result<RecoveryReport> {
    let machine = Machine::look(home.dir())?;
    let disk_bytes = args.size_gib << 30;
    let mut model = Model::new(1, disk_bytes);
    let mut random = SmallRng::seed_from_u64(1);
    let mut ours = Ours::create(&home.dir().join("ours"), disk_bytes)?;
    let watch = MemoryWatch::new(ours.pid()?);
    let mut acknowledged = 0;
    let mut runs = Vec::new();
    for run in 0..args.runs {
        let writes = if run == 0 { args.writes } else { MORE };
        let start = Instant::now();
        let in_flight = write_and_kill(&mut ours, writes, &mut model, &mut random)?;
        acknowledged += writes - in_flight as u64;
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("{writes} writes in {seconds:.0} s, killed with {in_flight} of them in flight");
        let recovery = recover(&mut ours, acknowledged, in_flight, &mut model, &mut random)?;
        eprintln!("first read after {:.0} ms", recovery.first_read_ms);
        runs.push(recovery);
    }
    ours.destroy()?;
    let first_read_ms = Spread::of(runs.iter().map(|run| run.first_read_ms).collect());
    Ok(RecoveryReport { machine, disk_bytes, rss_anon_max_writing_bytes: watch.most(), first_read_ms, runs })
}

/// Writes, and kills the daemon when the last requests are in flight; returns how many.
fn write_and_kill(ours: &mut Ours, writes: u64, model: &mut Model, random: &mut SmallRng) -> Result<usize> {
    let mut session = Session::new(Client::connect(&ours.place(), verify::shape(1, DEPTH))?, model, random)?;
    session.make(Mix::BlockWrites, writes)?;
    ours.kill9()?;
    Ok(session.cut())
}

/// Starts the daemon, reads from it as soon as it lets us, and checks that it has forgotten nothing.
fn recover(
    ours: &mut Ours,
    acknowledged: u64,
    in_flight: usize,
    model: &mut Model,
    random: &mut SmallRng,
) -> Result<Recovery> {
    let start = Instant::now();
    ours.spawn()?;
    let place = ours.place();
    let mut client = read_when_served(ours, &place, 0)?;
    let first_read_ms = start.elapsed().as_secs_f64() * 1e3;
    let pid = ours.pid()?;
    let rss_anon_at_first_read_bytes = meter::rss_anon(pid)?;
    let watch = MemoryWatch::new(pid);
    let mut block = [0; BLOCK];
    client.lanes()[0].copy(0, &mut block);
    model.check(&(0..(BLOCK / SECTOR) as u64), &block)?;
    drop(client);
    let mut session = Session::new(Client::connect(&ours.place(), verify::shape(1, 32))?, model, random)?;
    session.make(Mix::BlockReads, CHECKED)?;
    session.finish()?;
    Ok(Recovery {
        acknowledged,
        in_flight,
        first_read_ms,
        rss_anon_at_first_read_bytes,
        rss_anon_max_bytes: watch.most(),
    })
}

/// Connects to a disk again and again until a daemon that is starting lets it in, and reads one block of it; that lies in
/// slot 0 then.
///
/// # Errors
/// The daemon ends, serves nothing for long, or the read fails.
pub(crate) fn read_when_served(ours: &mut Ours, place: &Place, offset: u64) -> Result<Client> {
    let start = Instant::now();
    let shape = Shape { queues: 1, depth: 1, request_bytes: BLOCK };
    let mut client = loop {
        match Client::connect(place, shape) {
            Ok(client) => break client,
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => {
                ours.must_run()?;
                std::thread::sleep(TRY);
            }
        }
    };
    let lane = &mut client.lanes()[0];
    lane.read(0, offset, BLOCK);
    match lane.reap(1, PATIENCE)? {
        [done] if done.ok => {}
        other => bail!("the first read: {other:?}"),
    }
    Ok(client)
}

fn markdown(report: &RecoveryReport) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut out = format!(
        "{}, {} processors; Linux {}; {}. A disk of {:.0} MiB; while it was written, cdpd had at most {:.0} MiB of \
         anonymous memory. From starting cdpd to its first read: {:.0} ms ({:.0}–{:.0}).\n\n\
         | writes acknowledged before the kill | in flight | first read, ms | RssAnon then, MiB | RssAnon at most, MiB |\n\
         | --- | --- | --- | --- | --- |\n",
        report.machine.processor,
        report.machine.processors,
        report.machine.kernel,
        report.machine.file_system,
        mib(report.disk_bytes),
        mib(report.rss_anon_max_writing_bytes),
        report.first_read_ms.median,
        report.first_read_ms.min,
        report.first_read_ms.max,
    );
    for run in &report.runs {
        out += &format!(
            "| {} | {} | {:.0} | {:.0} | {:.0} |\n",
            run.acknowledged,
            run.in_flight,
            run.first_read_ms,
            mib(run.rss_anon_at_first_read_bytes),
            mib(run.rss_anon_max_bytes),
        );
    }
    out
}
