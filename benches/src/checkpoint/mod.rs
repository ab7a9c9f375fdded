//! What checkpoints cost a guest, seen from outside: how long it stands still, how long it stalls while it is saved, how
//! its disk answers meanwhile, what is stored, and how soon a restored one lives.
//!
//! QEMU stops the guest's clock with the guest, so it is timed here: by heartbeats on a serial port, one a millisecond.
//! A pause is the longest silence that overlaps the time between QEMU's STOP and RESUME; it has the millisecond between
//! two beats in it, and what the guest waits for its first pages after it.

mod beats;
mod report;
mod subject;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Guest, Running, Scene};

use crate::machine::{Machine, need_space};
use crate::report::Spread;
use beats::{Beats, Span, longest_ms, now_ns};
use report::{Disk, Figures, Ledger, MachineReport, Report, Series};
use subject::{Duty, NAME, Subject, Taken, dirty, latencies};

/// Between two checkpoints: what is outside of the windows is measured there.
const REST: Duration = Duration::from_secs(1);
/// How long an idle guest is left alone between its first two checkpoints.
const IDLE: Duration = Duration::from_secs(5);
/// Space that a store needs beside what is stored.
const ROOM_BYTES: u64 = 4 << 30;
/// Checkpoints between which part of the memory changes.
const LEDGER: usize = 10;

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Memory of the guests, in GiB
    #[arg(long, value_name = "GIB", value_delimiter = ',', default_value = "1,4,16")]
    memory_gib: Vec<u32>,
    /// How much of it the guest has filled with what does not compress, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=90))]
    filled: u64,
    /// How checkpoints are taken; those of an idle guest, and the ledger's, in the first of these ways
    #[arg(long, value_name = "MODE", value_delimiter = ',', default_value = "hot,live", value_parser = ["hot", "live", "pause"])]
    mode: Vec<String>,
    /// Checkpoints in each series
    #[arg(long, value_name = "N", default_value_t = 20)]
    times: usize,
    /// Times that a machine is brought back
    #[arg(long, value_name = "N", default_value_t = 3)]
    restores: usize,
    /// Processors of a guest, and queues of its disk
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Measure only a guest that does nothing but beat
    #[arg(long)]
    no_disk: bool,
    /// Have the guests' memory in huge pages, of which `vm.nr_hugepages` must have set enough aside
    #[arg(long)]
    huge_pages: bool,
    /// Take ten checkpoints too, between each of which 5 % of the memory changes; 70 % of it is filled
    #[arg(long)]
    ledger: bool,
    /// Where stores are made: they hold what is filled, and what changes of it
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, or QEMU, the guest or the daemon fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.times > 0, "nothing to do");
    let most = args.memory_gib.iter().max().copied().unwrap_or(0);
    need_space(&args.dir, (u64::from(most) << 30) * args.filled.max(70) / 100 * 2 + ROOM_BYTES)?;
    let mut report = Report {
        machine: Machine::look(&args.dir)?,
        filled_percent: args.filled,
        huge_pages: args.huge_pages,
        machines: Vec::new(),
    };
    for &memory_gib in &args.memory_gib {
        let scene = Scene::new_in(&args.dir)?;
        let measured = measure(args, &scene, memory_gib).inspect_err(|_| eprint!("{}", scene.tails()))?;
        report.machines.push(measured);
    }
    println!("{}", report.markdown());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(args: &Args, scene: &Scene, memory_gib: u32) -> Result<MachineReport> {
    let mut subject = Subject::new(scene, memory_gib, args.cpus, args.huge_pages)?;
    let mut report = MachineReport { memory_gib, ..MachineReport::default() };
    let mut guest = subject.boot()?;
    // Hot ones, if they were not asked for, may not be possible here.
    let mode = args.mode.first().context("no mode")?;
    // What a boot leaves to be done in the background.
    std::thread::sleep(IDLE);
    let first = subject.take(&mut guest, mode)?;
    std::thread::sleep(IDLE);
    let idle = subject.take(&mut guest, mode)?;
    report.first_stored_bytes = first.figure("stored_bytes")?;
    report.first_duration_ms = first.figure("duration_ms")?;
    report.idle_stored_bytes = idle.figure("stored_bytes")?;

    let fill_mib = u64::from(memory_gib) * 1024 * args.filled / 100;
    let mut last = idle.id;
    for disk in [false, true] {
        if disk && args.no_disk {
            continue;
        }
        guest = reboot(&subject, guest)?;
        let (beats, mut running) = subject.set_to_work(&mut guest, Duty { fill_mib, dirty_mib: 0, disk })?;
        for mode in &args.mode {
            let (series, id) = series(args, &subject, &mut guest, &beats, &mut running, mode, disk)?;
            eprintln!("{}", series.row(memory_gib));
            report.series.push(series);
            last = id;
        }
    }
    guest.kill()?;
    for _ in 0..args.restores {
        let (until_first_beat, guest) = subject.bring_back(&last)?;
        report.restore_ms.push(until_first_beat.ms());
        guest.kill()?;
    }
    if args.ledger {
        report.ledger = Some(ledger(&subject, memory_gib, mode)?);
    }
    subject.cdpd.stop()?;
    scene.judge_logs()?;
    Ok(report)
}

/// A fresh start: what one guest has filled is not the next one's.
fn reboot(subject: &Subject<'_>, guest: Guest) -> Result<Guest> {
    guest.kill()?;
    subject.boot()
}

/// Checkpoints of one mode, and the last of them.
fn series(
    args: &Args,
    subject: &Subject<'_>,
    guest: &mut Guest,
    beats: &Beats,
    running: &mut Running,
    mode: &str,
    disk: bool,
) -> Result<(Series, String)> {
    // What has changed since the last one is no part of the series.
    let mut last = subject.take(guest, mode)?.id;
    if disk {
        latencies(beats, running)?;
    }
    let (mut figures, mut after) = (Figures::default(), Vec::new());
    for _ in 0..args.times {
        let from = now_ns();
        let before = writes(subject, disk)?;
        let outside = Span { from, to: now_ns() };
        beats.command(b'i')?;
        let taken = subject.take(guest, mode)?;
        beats.command(b'o')?;
        beats.first_after(taken.window.to)?;
        note(&mut figures, beats, &taken, outside)?;
        after.push(writes(subject, disk)? / before);
        last = taken.id;
    }
    let disk = disk.then(|| latencies(beats, running)).transpose()?;
    // None at all means that its disk has failed, not that it was fast.
    ensure!(
        disk.iter().flatten().all(|latency| latency.requests > 0),
        "the guest's disk has answered nothing"
    );
    let disk = disk.map(|[outside, inside]| Disk { outside, inside, after: Spread::of(after) });
    Ok((Series { mode: mode.to_owned(), disk, figures }, last))
}

/// Waits a second; the writes of the guest per second meanwhile, if it uses its disk.
fn writes(subject: &Subject<'_>, disk: bool) -> Result<f64> {
    if !disk {
        std::thread::sleep(REST);
        return Ok(0.0);
    }
    let tool = subject.cdpd.tool();
    let count = || tool.head(NAME).map(|head| (head.seq, Instant::now()));
    let (first, from) = count()?;
    std::thread::sleep(REST);
    let (last, to) = count()?;
    Ok((last - first) as f64 / (to - from).as_secs_f64())
}

fn note(figures: &mut Figures, beats: &Beats, taken: &Taken, outside: Span) -> Result<()> {
    let inside = beats.gaps(taken.window);
    figures.pause_ms.push(longest_ms(&beats.gaps(taken.stopped), None));
    figures.qemu_pause_ms.push(taken.stopped.ms());
    let first = Span { from: taken.stopped.to, to: beats.first_after(taken.stopped.to)? };
    figures.first_beat_ms.push(first.ms());
    figures.stall_ms.push(longest_ms(&inside, Some(taken.stopped)));
    figures.outside_ms.push(longest_ms(&beats.gaps(outside), None));
    figures.duration_ms.push(taken.figure("duration_ms")? as f64);
    figures.stored_bytes.push(taken.figure("stored_bytes")?);
    Ok(())
}

/// What ten checkpoints store, with 5 % of the memory changed between each two.
fn ledger(subject: &Subject<'_>, memory_gib: u32, mode: &str) -> Result<Ledger> {
    let memory_mib = u64::from(memory_gib) << 10;
    let duty = Duty { fill_mib: memory_mib * 70 / 100, dirty_mib: memory_mib / 20, disk: false };
    let mut guest = subject.boot()?;
    let (beats, mut running) = subject.set_to_work(&mut guest, duty)?;
    let mut stored_bytes = Vec::new();
    for checkpoint in 0..LEDGER {
        if checkpoint > 0 {
            dirty(&beats, &mut running)?;
        }
        stored_bytes.push(subject.take(&mut guest, mode)?.figure("stored_bytes")?);
    }
    guest.kill()?;
    Ok(Ledger { stored_bytes })
}
