//! fio inside a guest: a disk of ours next to one of `qemu-storage-daemon`, in turn.
//!
//! There is no KVM: QEMU emulates the guest's processors, which is what limits most of these rates. So the figures say what
//! our disk is like for such a guest, not what a server can do; [`crate::compare`] says that.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::debian::fio_image;
use e2e::{Cdpd, Guest, Scene};
use serde::Serialize;
use serde_json::Value;

use crate::client::{Client, Place, Shape};
use crate::drive::{self, Job};
use crate::machine::{Machine, need_space};
use crate::meter;
use crate::report::Spread;
use crate::server::{StorageDaemon, make_raw_file};
use crate::workload::{Access, Order};

/// What fio does before it measures, in seconds.
const RAMP: u64 = 1;
/// How long fio may take to start and to end, under an emulator.
const AROUND: Duration = Duration::from_secs(120);
const LARGE: (usize, usize) = (128 << 10, 16);
/// What fio does.
const RWS: [&str; 4] = ["randread", "randwrite", "read", "write"];
/// What our store takes of large writes at most, for each round of each kind: an emulated guest writes 2 GB/s.
const ROUND_BYTES: u64 = 16 << 30;
/// The disks in the guest: ours, and the other one.
const DISKS: [&str; 2] = ["/dev/vda", "/dev/vdb"];
/// Where the third disk, which has fio, is mounted.
const PREPARE: &str = "mkdir -p /debian && mount -t ext4 -o ro,noload /dev/vdc /debian && \
    mount -o bind /dev /debian/dev && mount -t proc proc /debian/proc && mount -t tmpfs tmp /debian/tmp";

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The disks' size, in GiB; all of it holds data
    #[arg(long, value_name = "GIB", default_value_t = 2)]
    size_gib: u64,
    /// Rounds: each measures both disks once
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// How long fio measures, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 4)]
    seconds: u64,
    /// Processors of the guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Only random requests of 4 KiB
    #[arg(long)]
    quick: bool,
    /// Only these, as fio calls them: read, write, randread, randwrite; may be repeated
    #[arg(long = "rw", value_name = "RW", value_parser = RWS)]
    rw: Vec<String>,
    /// Only requests of this size, in KiB
    #[arg(long, value_name = "KIB")]
    kib: Option<usize>,
    /// Where stores and files are made
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One thing that fio does.
#[derive(Clone, Copy, Debug, Serialize)]
struct Work {
    /// As fio calls it.
    rw: &'static str,
    bytes: usize,
    depth: usize,
}

#[derive(Debug, Serialize)]
struct Row {
    work: Work,
    /// Requests per second.
    ours: Spread,
    storage_daemon: Spread,
    /// Round by round.
    ratio: Spread,
}

#[derive(Debug, Serialize)]
struct GuestReport {
    machine: Machine,
    cpus: u32,
    rounds: usize,
    rows: Vec<Row>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, fio cannot be installed into an image, or QEMU, the guest or a server fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0 && args.size_gib > 0 && args.seconds > 0, "nothing to do");
    need_space(&args.dir, (args.size_gib << 30) * 5 / 2 + args.rounds as u64 * ROUND_BYTES)?;
    let machine = Machine::look(&args.dir)?;
    let mut report = GuestReport { machine, cpus: args.cpus, rounds: args.rounds, rows: Vec::new() };
    // Our store keeps all that is written: large writes of each kind get one of their own.
    for works in args.works().chunk_by(|one, next| one.shares_a_store_with(next)) {
        let scene = Scene::new_in(&args.dir)?;
        report.rows.extend(measure(args, &scene, works).inspect_err(|_| eprint!("{}", scene.tails()))?);
        if let Some(path) = &args.json {
            // What there is so far: it takes long, and a part of it is worth keeping.
            fs::write(path, serde_json::to_vec_pretty(&report)?)
                .with_context(|| path.display().to_string())?;
        }
    }
    println!("{}", report.markdown());
    Ok(())
}

fn measure(args: &Args, scene: &Scene, works: &[Work]) -> Result<Vec<Row>> {
    let bytes = args.size_gib << 30;
    let mut cdpd = Cdpd::start(scene)?;
    let ours = cdpd.tool().create_and_serve(scene, "disk", &bytes.to_string(), args.cpus)?;
    fill(&Place::VhostUser(ours.clone()), bytes)?;
    let raw = scene.path("disk.raw");
    make_raw_file(&raw, bytes)?;
    let theirs = StorageDaemon::start(scene.dir(), &raw)?;
    let programs = scene.path("programs.sock");
    let _programs = e2e::StorageDaemon::export(scene, &fio_image()?, &programs, 1)?;
    let builder = Guest::builder().disk(&ours).disk(theirs.socket()).disk(&programs);
    let mut guest = builder.queues(1).smp(args.cpus).memory_mb(512).boot(scene)?;
    guest.run(PREPARE)?;
    // The first time, fio is read from its disk, and the emulator has to translate it.
    for disk in DISKS {
        let rate = fio(args, &mut guest, disk, Work { rw: "randread", bytes: 4096, depth: 1 })?;
        eprintln!("not counted: {disk} {rate:.0}/s");
    }
    let mut rows = Vec::new();
    for work in works {
        rows.push(compare(args, &mut cdpd, &mut guest, *work)?);
    }
    guest.quit()?;
    cdpd.stop()?;
    scene.judge_logs()?;
    Ok(rows)
}

fn compare(args: &Args, cdpd: &mut Cdpd, guest: &mut Guest, work: Work) -> Result<Row> {
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..args.rounds {
        for disk in [round % 2, 1 - round % 2] {
            meter::settle_or_say(cdpd.pid()?)?;
            rates[disk].push(fio(args, guest, DISKS[disk], work)?);
        }
        eprintln!(
            "{} {} KiB, depth {}, round {}: ours {:.0}/s, qemu-storage-daemon {:.0}/s",
            work.rw,
            work.bytes >> 10,
            work.depth,
            round + 1,
            rates[0][round],
            rates[1][round]
        );
    }
    let ratio = Spread::of(rates[0].iter().zip(&rates[1]).map(|(ours, theirs)| ours / theirs).collect());
    let [ours, storage_daemon] = rates.map(Spread::of);
    Ok(Row { work, ours, storage_daemon, ratio })
}

/// Requests per second that fio makes of a disk in the guest.
fn fio(args: &Args, guest: &mut Guest, disk: &str, work: Work) -> Result<f64> {
    let Work { rw, bytes, depth } = work;
    let command = format!(
        "chroot /debian fio --name=work --filename={disk} --direct=1 --ioengine=libaio --rw={rw} --bs={bytes} \
         --iodepth={depth} --time_based --ramp_time={RAMP} --runtime={} --output-format=json",
        args.seconds
    );
    let text = guest.run_within(&command, AROUND + Duration::from_secs(RAMP + args.seconds))?;
    let start = text.find('{').with_context(|| format!("fio printed no JSON: {text}"))?;
    let report: Value = serde_json::from_str(&text[start..])?;
    let kind = if rw.ends_with("write") { "write" } else { "read" };
    report["jobs"][0][kind]["iops"].as_f64().context("fio reports no IOPS")
}

/// Writes a disk from its start to its end.
fn fill(place: &Place, bytes: u64) -> Result<()> {
    let (request_bytes, depth) = LARGE;
    let job = Job {
        access: Access::Write,
        order: Order::Sequential,
        bytes: request_bytes,
        from_bytes: 0,
        range_bytes: bytes,
        warmup: Duration::ZERO,
        time: Duration::from_secs(3600),
        limit_bytes: bytes,
        rate: None,
        seed: 0,
    };
    let mut client = Client::connect(place, Shape { queues: 1, depth, request_bytes })?;
    drive::run(&mut client, &job, || ()).map(drop)
}

impl Args {
    fn works(&self) -> Vec<Work> {
        let mut works = Vec::new();
        for bytes in [4 << 10, 128 << 10] {
            for rw in RWS {
                works.extend([1, 32].map(|depth| Work { rw, bytes, depth }));
            }
        }
        works.retain(|work| !self.quick || (work.bytes == 4 << 10 && work.rw.starts_with("rand")));
        works.retain(|work| self.rw.is_empty() || self.rw.iter().any(|rw| rw == work.rw));
        works.retain(|work| self.kib.is_none_or(|kib| work.bytes == kib << 10));
        works
    }
}

impl Work {
    fn writes_much(&self) -> bool {
        self.bytes > 4 << 10 && self.rw.ends_with("write")
    }

    fn shares_a_store_with(&self, next: &Self) -> bool {
        self.rw == next.rw || !(self.writes_much() || next.writes_much())
    }
}

impl GuestReport {
    fn markdown(&self) -> String {
        let Machine { processor, processors, kernel, file_system, storage_daemon, load_before, .. } =
            &self.machine;
        let mut out = format!(
            "{processor}, {processors} processors; Linux {kernel}; {file_system}; {storage_daemon}; load before: \
             {load_before}. fio (libaio, O_DIRECT) in a guest with {} emulated processors (TCG: these are the limit more \
             often than the disks). Median (least–most) of {} rounds.\n\n\
             | fio | depth | ours, 1/s | qemu-storage-daemon, raw file, 1/s | ratio |\n| --- | --- | --- | --- | --- |\n",
            self.cpus, self.rounds
        );
        for Row { work: Work { rw, bytes, depth }, ours, storage_daemon, ratio } in &self.rows {
            out += &format!(
                "| {rw}, {} KiB | {depth} | {:.0} | {:.0} | **{:.2}** ({:.2}–{:.2}) |\n",
                bytes >> 10,
                ours.median,
                storage_daemon.median,
                ratio.median,
                ratio.min,
                ratio.max
            );
        }
        out
    }
}
