//! What marks and clones cost whoever writes meanwhile: random writes in the second before and in the second after.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::client::{Client, Shape};
use crate::drive::{self, Job, SLICE};
use crate::home::Home;
use crate::machine::{Machine, need_space};
use crate::meter;
use crate::report::Spread;
use crate::server::{Ours, VOLUME};
use crate::workload::{Access, Order};

/// When it happens, after the writes have begun.
const AT: Duration = Duration::from_secs(2);
/// What is compared, before and after.
const WINDOW: Duration = Duration::from_secs(1);
/// Rounds on one store, which takes what they write: each happening is once the first, the second and the third in them.
const ROUNDS_ON_ONE: u64 = HAPPENINGS.len() as u64;
/// What a phase writes at most, in bytes, and takes in the store: as much as a very fast disk lets it.
const PHASE_BYTES: u64 = 6 << 30;
const DEPTH: usize = 32;
const BLOCK: usize = 4096;

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The working set, in GiB
    #[arg(long, value_name = "GIB", default_value_t = 1)]
    size_gib: u64,
    /// Rounds: each has a mark, a clone, and nothing at all; best a multiple of three
    #[arg(long, value_name = "N", default_value_t = 9)]
    rounds: u64,
    /// Where stores are made
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What happens.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Happening {
    /// Nothing: how much the rate moves by itself.
    Nothing,
    Mark,
    Clone,
}

const HAPPENINGS: [Happening; 3] = [Happening::Nothing, Happening::Mark, Happening::Clone];

#[derive(Debug, Serialize)]
struct Row {
    happening: Happening,
    /// The rate after it, divided by that before it, in each round.
    ratios: Vec<f64>,
    spread: Spread,
}

#[derive(Debug, Serialize)]
struct DisturbanceReport {
    machine: Machine,
    rows: Vec<Row>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, or our daemon fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0 && args.size_gib > 0, "nothing to do");
    // The first on a store is one more.
    let phases = args.rounds.min(ROUNDS_ON_ONE) * HAPPENINGS.len() as u64 + 1;
    need_space(&args.dir, phases * PHASE_BYTES / 100 * 108 + (4 << 30))?;
    let home = Home::new(&args.dir)?;
    let report = home.explain(measure(args, &home))?;
    println!("| random writes, second after / second before | median (least–most) |\n| --- | --- |");
    for Row { happening, spread: Spread { median, min, max }, .. } in &report.rows {
        println!("| {happening:?} | {median:.2} ({min:.2}–{max:.2}) |");
    }
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(args: &Args, home: &Home) -> Result<DisturbanceReport> {
    let machine = Machine::look(home.dir())?;
    let size_bytes = args.size_gib << 30;
    let mut rows =
        HAPPENINGS.map(|happening| Row { happening, ratios: Vec::new(), spread: Spread::of(Vec::new()) });
    let mut store: Option<Ours> = None;
    for round in 0..args.rounds {
        if round % ROUNDS_ON_ONE == 0 {
            store.take().map_or(Ok(()), Ours::destroy)?;
            let ours = Ours::create(&home.dir().join("ours"), size_bytes)?;
            // The pool of segments grows when it is used up for the first time.
            phase(&ours, Happening::Nothing, args.rounds, size_bytes)?;
            store = Some(ours);
        }
        let ours = store.as_ref().context("made in the first round")?;
        for turn in 0..rows.len() {
            let row = &mut rows[(round as usize + turn) % HAPPENINGS.len()];
            meter::settle_or_say(ours.pid()?)?;
            let ratio = phase(ours, row.happening, round, size_bytes)?;
            eprintln!("round {}: {:?} {ratio:.2}", round + 1, row.happening);
            row.ratios.push(ratio);
        }
    }
    store.map_or(Ok(()), Ours::destroy)?;
    for row in &mut rows {
        row.spread = Spread::of(row.ratios.clone());
    }
    Ok(DisturbanceReport { machine, rows: rows.into() })
}

fn phase(ours: &Ours, happening: Happening, round: u64, size_bytes: u64) -> Result<f64> {
    let job = Job {
        access: Access::Write,
        order: Order::Random,
        bytes: BLOCK,
        from_bytes: 0,
        range_bytes: size_bytes,
        warmup: Duration::ZERO,
        time: AT + 2 * WINDOW,
        limit_bytes: PHASE_BYTES,
        rate: None,
        seed: 1000 * (round + 1),
    };
    let shape = Shape { queues: 1, depth: DEPTH, request_bytes: BLOCK };
    let mut client = Client::connect(&ours.place(), shape)?;
    let outcome = thread::scope(|scope| {
        let other = scope.spawn(|| {
            thread::sleep(AT);
            cause(ours, happening, round)
        });
        let outcome = drive::run(&mut client, &job, || {});
        other.join().map_err(|_| anyhow!("a thread panicked"))??;
        outcome
    })?;
    let slices = |duration: Duration| (duration.as_nanos() / SLICE.as_nanos()) as usize;
    let rate = |from: Duration| -> Result<f64> {
        let window =
            outcome.slices.get(slices(from)..slices(from + WINDOW)).context("the phase ended early")?;
        Ok(window.iter().sum::<u64>() as f64)
    };
    Ok(rate(AT)? / rate(AT - WINDOW)?)
}

fn cause(ours: &Ours, happening: Happening, round: u64) -> Result<()> {
    let name = format!("round-{round}");
    match happening {
        Happening::Nothing => Ok(()),
        Happening::Mark => ours.tool().run(&["mark", VOLUME, &name]).map(drop),
        Happening::Clone => ours.tool().run(&["clone", VOLUME, &name]).map(drop),
    }
}
