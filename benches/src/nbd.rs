//! NBD: our exports next to those of `qemu-nbd` and of nbdkit, of a raw file.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::process::{Process, run_ok, tied, wait_for};
use e2e::programs::system;
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use serde_json::Value;

use crate::home::Home;
use crate::machine::{Machine, need_space};
use crate::meter;
use crate::report::Spread;
use crate::server::{Ours, make_raw_file};

const READY: Duration = Duration::from_secs(20);
const CLIENT: Duration = Duration::from_secs(600);

/// What is measured, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The disk's size, in GiB; all of it holds data
    #[arg(long, value_name = "GIB", default_value_t = 2)]
    size_gib: u64,
    /// Rounds: each measures every server once
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// How long each phase of random reads takes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 4)]
    seconds: u64,
    /// Where stores and files are made
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One thing that clients do.
#[derive(Debug, Serialize)]
struct Comparison {
    what: &'static str,
    unit: &'static str,
    ours: Spread,
    peers: Vec<Peer>,
}

#[derive(Debug, Serialize)]
struct Peer {
    name: &'static str,
    rate: Spread,
    /// Ours divided by theirs, round by round; the rate of a copy counts, not its time.
    ratio: Spread,
}

#[derive(Debug, Serialize)]
struct NbdReport {
    machine: Machine,
    comparisons: Vec<Comparison>,
}

/// Measures and prints.
///
/// # Errors
/// There is too little space, or a server or a client fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0 && args.size_gib > 0, "nothing to do");
    need_space(&args.dir, (args.size_gib << 30) * 5 / 2 + (2 << 30))?;
    let home = Home::new(&args.dir)?;
    let report = home.explain(measure(args, &home))?;
    println!("{}", markdown(&report));
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(args: &Args, home: &Home) -> Result<NbdReport> {
    let machine = Machine::look(home.dir())?;
    let bytes = args.size_gib << 30;
    let raw = home.dir().join("raw");
    make_raw_file(&raw, bytes)?;
    let ours = Ours::create(&home.dir().join("ours"), 1 << 30)?;
    let tool = ours.tool();
    tool.run(&["volume", "create", "disk", "--from", &raw.to_string_lossy()])?;
    // nbdkit goes through the page cache: what was just read to be imported would not be read from the disk.
    fadvise(fs::File::open(&raw)?, 0, None, Advice::DontNeed)?;
    let peers = [PeerServer::qemu_nbd(home.dir(), &raw)?, PeerServer::nbdkit(home.dir(), &raw)?];
    let (head, past) = (ours.nbd_uri("disk"), ours.nbd_uri(&format!("disk@seq:{}", tool.head("disk")?.seq)));
    // Segments filled ahead and the index: not during anybody's turn. Reads leave nothing to be done.
    ensure!(meter::settle(ours.pid()?)?, "cdpd does not become quiet");

    let fio = |depth| move |uri: &str| fio_random_reads(uri, depth, args.seconds, bytes);
    let copy = move |uri: &str| nbdcopy(uri, bytes);
    let comparisons = vec![
        compare("random reads, 4 KiB, 1 in flight (fio)", "1/s", args.rounds, &head, &peers, fio(1))?,
        compare("random reads, 4 KiB, 32 in flight (fio)", "1/s", args.rounds, &head, &peers, fio(32))?,
        compare("the whole disk, copied (nbdcopy)", "MiB/s", args.rounds, &head, &peers, copy)?,
        compare("a past instant, copied (nbdcopy)", "MiB/s", args.rounds, &past, &peers, copy)?,
    ];
    drop(peers);
    ours.destroy()?;
    Ok(NbdReport { machine, comparisons })
}

fn compare(
    what: &'static str,
    unit: &'static str,
    rounds: usize,
    ours: &str,
    peers: &[PeerServer],
    rate: impl Fn(&str) -> Result<f64>,
) -> Result<Comparison> {
    let uris: Vec<String> =
        std::iter::once(ours.to_owned()).chain(peers.iter().map(PeerServer::uri)).collect();
    let mut rates = vec![Vec::new(); uris.len()];
    for round in 0..rounds {
        for turn in 0..uris.len() {
            let server = (round + turn) % uris.len();
            rates[server].push(rate(&uris[server])?);
        }
        let names = std::iter::once("ours").chain(peers.iter().map(|peer| peer.name));
        let figures: Vec<String> =
            names.zip(&rates).map(|(name, rates)| format!("{name} {:.0}", rates[round])).collect();
        eprintln!("{what}, round {}: {} {unit}", round + 1, figures.join(", "));
    }
    let mut rates = rates.into_iter();
    let ours = rates.next().unwrap_or_default();
    let peers = peers.iter().zip(rates).map(|(peer, theirs)| {
        let ratio = Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect());
        Peer { name: peer.name, rate: Spread::of(theirs), ratio }
    });
    let peers = peers.collect();
    Ok(Comparison { what, unit, ours: Spread::of(ours), peers })
}

/// Random reads of 4 KiB with fio's engine for NBD, per second.
pub(crate) fn fio_random_reads(uri: &str, depth: usize, seconds: u64, bytes: u64) -> Result<f64> {
    let mut fio = Command::new(system("fio")?);
    fio.args([
        "--name=read",
        "--ioengine=nbd",
        // One that is killed leaves no job behind then.
        "--thread",
        "--rw=randread",
        "--bs=4k",
        "--time_based",
        "--output-format=json",
    ]);
    fio.arg(format!("--uri={uri}")).arg(format!("--iodepth={depth}"));
    fio.arg(format!("--runtime={seconds}")).arg(format!("--size={bytes}"));
    let text = run_ok(&mut fio, CLIENT)?;
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..])?;
    report["jobs"][0]["read"]["iops"].as_f64().context("fio reports no IOPS")
}

/// The rate at which nbdcopy copies an export to nowhere, in MiB/s.
fn nbdcopy(uri: &str, bytes: u64) -> Result<f64> {
    let start = Instant::now();
    run_ok(Command::new(system("nbdcopy")?).args([uri, "null:"]), CLIENT)?;
    Ok(bytes as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}

/// Another server, of a raw file.
struct PeerServer {
    name: &'static str,
    socket: PathBuf,
    _process: Process,
}

impl PeerServer {
    /// QEMU's, without the page cache.
    fn qemu_nbd(dir: &Path, file: &Path) -> Result<Self> {
        let socket = dir.join("qemu-nbd.sock");
        let mut command = tied(&system("qemu-nbd")?);
        command.args([
            "--persistent",
            "--shared=16",
            "--read-only",
            "--format=raw",
            "--cache=none",
            "--aio=io_uring",
        ]);
        command.arg("--socket").arg(&socket).arg(file);
        Self::start("qemu-nbd", dir, socket, command)
    }

    /// nbdkit with its `file` plugin, which has the page cache forget what was read (it has no direct I/O).
    fn nbdkit(dir: &Path, file: &Path) -> Result<Self> {
        let socket = dir.join("nbdkit.sock");
        let mut command = tied(&system("nbdkit")?);
        command.args(["--foreground", "--readonly", "--unix"]).arg(&socket);
        command.arg("file").arg(file).arg("cache=none");
        Self::start("nbdkit", dir, socket, command)
    }

    fn start(name: &'static str, dir: &Path, socket: PathBuf, command: Command) -> Result<Self> {
        let mut process = Process::spawn(name, command, &dir.join(format!("{name}.log")))?;
        wait_for(&format!("{name}'s socket"), READY, || {
            process.must_run()?;
            Ok(UnixStream::connect(&socket).ok().map(drop))
        })?;
        Ok(Self { name, socket, _process: process })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

/// A client that knows just enough to ask for one block (the NBD protocol: "Newstyle negotiation", `NBD_OPT_GO`, and
/// "Request message"): the start of a real one would be measured with it.
pub(crate) struct FirstByte;

impl FirstByte {
    /// How long it takes from connecting to having 4 KiB of an export.
    pub(crate) fn of(socket: &Path, export: &str, offset: u64) -> Result<Duration> {
        const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
        let start = Instant::now();
        let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(READY))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[8..16] == IHAVEOPT, "no NBD server");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(IHAVEOPT);
        hello.extend_from_slice(&7_u32.to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        hello.extend_from_slice(&0_u16.to_be_bytes());
        stream.write_all(&hello)?;
        loop {
            let mut reply = [0; 20];
            stream.read_exact(&mut reply)?;
            let word =
                |at: usize| reply[at..at + 4].iter().fold(0_u32, |word, &byte| word << 8 | u32::from(byte));
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data)?;
            ensure!(word(12) >> 31 == 0, "{export}: {}", String::from_utf8_lossy(&data));
            if word(12) == 1 {
                break;
            }
        }
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend_from_slice(&[0; 4]);
        request.extend_from_slice(&7_u64.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&4096_u32.to_be_bytes());
        stream.write_all(&request)?;
        let mut reply = [0; 16];
        stream.read_exact(&mut reply)?;
        ensure!(reply[4..8] == [0; 4], "{export}: the read failed");
        stream.read_exact(&mut [0; 4096])?;
        Ok(start.elapsed())
    }
}

fn markdown(report: &NbdReport) -> String {
    let Machine { processor, processors, kernel, file_system, load_before, .. } = &report.machine;
    let mut out = format!(
        "{processor}, {processors} processors; Linux {kernel}; {file_system}; load before: {load_before}. Median \
         (least–most) of the rounds.\n\n| | ours "
    );
    let names: Vec<&str> = report
        .comparisons
        .first()
        .map(|first| first.peers.iter().map(|peer| peer.name).collect())
        .unwrap_or_default();
    names.iter().for_each(|name| out += &format!("| {name}, raw file | ratio "));
    out += &format!("|\n| --- | --- {}|\n", "| --- | --- ".repeat(names.len()));
    for Comparison { what, unit, ours, peers } in &report.comparisons {
        out += &format!("| {what} | {:.0} {unit} ", ours.median);
        for Peer { rate, ratio, .. } in peers {
            out += &format!(
                "| {:.0} {unit} | **{:.2}** ({:.2}–{:.2}) ",
                rate.median, ratio.median, ratio.min, ratio.max
            );
        }
        out += "|\n";
    }
    out
}
