//! What going back costs: reverts, clones and the first byte of a past instant, by the size of the volume and the
//! length of its history; and reads of the past next to reads of the present.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::json;

use crate::api::Api;
use crate::client::{Client, Shape};
use crate::drive::{self, Job};
use crate::home::Home;
use crate::machine::{Machine, need_space};
use crate::meter;
use crate::nbd::{self, FirstByte};
use crate::report::{Spread, percentile};
use crate::server::{Ours, VOLUME};
use crate::workload::{Access, Order};

const BLOCK: u64 = 4096;
/// Where the writes go: so much of the volume, from its start.
const WRITTEN_BYTES: u64 = 4 << 30;
const DEPTH: usize = 128;

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Sizes of volumes, in GiB
    #[arg(long, value_name = "GIB", value_delimiter = ',', default_value = "1,16384")]
    size_gib: Vec<u64>,
    /// Writes of 4 KiB in a volume's history
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "10,10000000")]
    writes: Vec<u64>,
    /// Reverts, clones and instants opened, of each volume
    #[arg(long, value_name = "N", default_value_t = 50)]
    times: usize,
    /// How long each round of reads takes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 4)]
    seconds: u64,
    /// Rounds of reads of the past and of the present
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Where stores are made: 4.4 GB for each million of writes
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One volume.
#[derive(Debug, Serialize)]
struct Travel {
    size_gib: u64,
    writes: u64,
    /// From the request on the control socket to its answer.
    revert_ms: Spread,
    revert_p99_ms: f64,
    clone_ms: Spread,
    clone_p99_ms: f64,
    /// From connecting over NBD to the first byte of a random instant, at a random place.
    first_byte_ms: Spread,
    first_byte_p99_ms: f64,
    /// Random reads of 4 KiB over NBD, 32 in flight: the past's share of the present's.
    past_to_head: Option<Spread>,
}

#[derive(Debug, Serialize)]
struct TravelReport {
    machine: Machine,
    volumes: Vec<Travel>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, or a server or a client fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.times > 0 && args.rounds > 0, "nothing to do");
    let most = args.writes.iter().max().copied().unwrap_or(0);
    need_space(&args.dir, most * BLOCK / 100 * 108 + (3 << 30))?;
    let home = Home::new(&args.dir)?;
    let machine = Machine::look(home.dir())?;
    let mut volumes = Vec::new();
    for &writes in &args.writes {
        for &size_gib in &args.size_gib {
            let travel = home.explain(measure(args, &home, size_gib, writes))?;
            eprintln!("{}", row(&travel));
            volumes.push(travel);
        }
    }
    let report = TravelReport { machine, volumes };
    println!("{}", markdown(&report));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(args: &Args, home: &Home, size_gib: u64, writes: u64) -> Result<Travel> {
    let mut random = SmallRng::seed_from_u64(size_gib ^ writes);
    let ours = Ours::create(&home.dir().join("ours"), size_gib << 30)?;
    let written = WRITTEN_BYTES.min(size_gib << 30);
    write(&ours, writes, written)?;
    // A guest that has gone leaves its rings a moment later.
    let api = Api::of(&ours);
    let head = api.head()?;
    let first = (head >> 40) << 40;
    meter::settle_or_say(ours.pid()?)?;
    // First, while past and present are the same. Reads of blocks that were never written would cost nothing, in either.
    let past_to_head = (writes >= written / BLOCK).then(|| reads(args, &ours, head)).transpose()?;
    let some_seq = move |random: &mut SmallRng| random.random_range(first + 1..=head);

    let mut reverts = Vec::new();
    for _ in 0..args.times {
        let at = format!("seq:{}", some_seq(&mut random));
        let body = json!({"volumes": [{"name": VOLUME, "at": at}]});
        reverts.push(api.retrying(|api| api.timed("POST", "/v1/revert", &body))?);
    }
    let mut clones = Vec::new();
    for index in 0..args.times {
        let at = format!("seq:{}", some_seq(&mut random));
        let body = json!({"clones": [{"source": VOLUME, "at": at, "name": format!("clone{index}")}]});
        clones.push(api.timed("POST", "/v1/clone", &body)?);
    }
    let mut first_bytes = Vec::new();
    for _ in 0..args.times {
        let export = format!("{VOLUME}@seq:{}", some_seq(&mut random));
        let offset = random.random_range(0..written / BLOCK) * BLOCK;
        first_bytes.push(FirstByte::of(&ours.nbd_socket(), &export, offset)?.as_secs_f64() * 1e3);
    }
    ours.destroy()?;
    let [revert_p99_ms, clone_p99_ms, first_byte_p99_ms] =
        [&reverts, &clones, &first_bytes].map(|figures| percentile(figures, 99));
    Ok(Travel {
        size_gib,
        writes,
        revert_ms: Spread::of(reverts),
        revert_p99_ms,
        clone_ms: Spread::of(clones),
        clone_p99_ms,
        first_byte_ms: Spread::of(first_bytes),
        first_byte_p99_ms,
        past_to_head,
    })
}

/// Gives the volume a history.
fn write(ours: &Ours, writes: u64, range_bytes: u64) -> Result<()> {
    let shape = Shape { queues: 1, depth: DEPTH, request_bytes: BLOCK as usize };
    let job = Job {
        access: Access::Write,
        order: Order::Random,
        bytes: BLOCK as usize,
        from_bytes: 0,
        range_bytes,
        warmup: Duration::ZERO,
        time: Duration::from_secs(24 * 3600),
        limit_bytes: writes * BLOCK,
        rate: None,
        seed: writes,
    };
    let outcome = drive::run(&mut Client::connect(&ours.place(), shape)?, &job, || ())?;
    eprintln!("{} writes in {:.0} s", outcome.operations, outcome.seconds);
    Ok(())
}

/// Reads the present and the past in turn.
fn reads(args: &Args, ours: &Ours, head: u64) -> Result<Spread> {
    let past = ours.nbd_uri(&format!("{VOLUME}@seq:{head}"));
    let present = ours.nbd_uri(VOLUME);
    let size = WRITTEN_BYTES;
    let mut ratios = Vec::new();
    for round in 0..args.rounds {
        let fio = |uri: &str| nbd::fio_random_reads(uri, 32, args.seconds, size);
        let (past, present) = if round % 2 == 0 {
            let present = fio(&present)?;
            (fio(&past)?, present)
        } else {
            (fio(&past)?, fio(&present)?)
        };
        eprintln!("round {}: the past {past:.0}/s, the present {present:.0}/s", round + 1);
        ratios.push(past / present);
    }
    Ok(Spread::of(ratios))
}

fn row(travel: &Travel) -> String {
    let Travel { size_gib, writes, revert_ms, clone_ms, first_byte_ms, .. } = travel;
    let reads = travel.past_to_head.as_ref().map_or_else(
        || "–".to_owned(),
        |ratio| format!("**{:.2}** ({:.2}–{:.2})", ratio.median, ratio.min, ratio.max),
    );
    format!(
        "| {size_gib} | {writes} | {:.1} / {:.1} | {:.1} / {:.1} | {:.1} / {:.1} | {reads} |",
        revert_ms.median,
        travel.revert_p99_ms,
        clone_ms.median,
        travel.clone_p99_ms,
        first_byte_ms.median,
        travel.first_byte_p99_ms
    )
}

fn markdown(report: &TravelReport) -> String {
    let Machine { processor, processors, kernel, file_system, load_before, .. } = &report.machine;
    let mut out = format!(
        "{processor}, {processors} processors; Linux {kernel}; {file_system}; load before: {load_before}. Milliseconds: \
         median / 99th percentile. Reads: random, 4 KiB, 32 in flight, over NBD; the past's share of the present's, \
         median (least–most) of the rounds.\n\n\
         | volume, GiB | writes in its history | revert | clone | first byte of a past instant | reads of the past |\n\
         | --- | --- | --- | --- | --- | --- |\n"
    );
    for travel in &report.volumes {
        out += &row(travel);
        out.push('\n');
    }
    out
}
