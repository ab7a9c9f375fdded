//! `make bench`: all benchmarks, one after the other, into one directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::programs::built;

/// The latency and the processor time of a server alone, without a disk, are seen on a file system in memory.
const MEMORY: &str = "/dev/shm";
const IN_MEMORY: [&str; 4] = ["rand-read-4k-d1", "rand-read-4k-d32", "rand-write-4k-d1", "rand-write-4k-d32"];

/// What a run leaves, as far as it comes; a quick one only the first two.
const REPORTS: [&str; 9] = [
    "compare",
    "compare-memory",
    "nbd",
    "guest",
    "disturbance",
    "checkpoint",
    "travel",
    "recovery",
    "growth",
];

/// Which measurements, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A selection that takes some ten minutes, rather than two hours
    #[arg(long)]
    quick: bool,
    /// More rounds, longer ones, and larger guests: most of a day
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// A directory on the file system to measure
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Where tables (Markdown), figures (JSON) and drawings (SVG) go
    #[arg(long, value_name = "DIR")]
    reports: PathBuf,
    /// The writes that recovery is measured after, and going back in the longest history
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    writes: u64,
}

/// Runs them, one after the other; one that fails does not keep the others from leaving their reports.
///
/// # Errors
/// Something is not built, or a benchmark has failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    built("bench-blk")?;
    let names = if args.quick { &REPORTS[..2] } else { &REPORTS[..] };
    forget_reports(&args.reports, names).with_context(|| args.reports.display().to_string())?;
    let mut failed = Vec::new();
    let mut part = |name: &'static str, outcome: Result<()>| {
        if let Err(error) = outcome {
            eprintln!("xtask: {error:#}");
            failed.push(name);
        }
    };
    part("compare", args.compare("compare", &args.dir, &[]));
    part("compare in memory", args.compare("compare-memory", Path::new(MEMORY), &IN_MEMORY));
    if !args.quick {
        let writes = args.writes.to_string();
        let checkpoints: &[&str] =
            if args.long { &["--ledger"] } else { &["--ledger", "--memory-gib", "1,4", "--times", "10"] };
        part("nbd", args.other("nbd", &[]));
        part("guest", args.other("guest", &[]));
        part("disturbance", args.other("disturbance", &[]));
        part("checkpoint", args.other("checkpoint", checkpoints));
        part("travel", args.other("travel", &["--writes", &format!("10,{writes}")]));
        part("recovery", args.other("recovery", &["--writes", &writes]));
        part("growth", args.growth());
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Removes the reports of earlier runs: one that this run does not get to would pass for its own.
fn forget_reports(directory: &Path, names: &[&str]) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    for (name, extension) in names.iter().flat_map(|name| ["json", "md", "svg"].map(|kind| (name, kind))) {
        match fs::remove_file(directory.join(name).with_extension(extension)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl Args {
    fn compare(&self, name: &str, dir: &Path, workloads: &[&str]) -> Result<()> {
        let mut command = self.bench("compare", dir)?;
        for (option, extension) in [("--json", "json"), ("--markdown", "md"), ("--svg", "svg")] {
            command.arg(option).arg(self.report(name, extension));
        }
        if self.quick || dir == Path::new(MEMORY) {
            command.arg("--quick");
        } else {
            self.shorten(&mut command, "3");
        }
        for workload in workloads {
            command.args(["--workload", workload]);
        }
        must_succeed(command)
    }

    fn growth(&self) -> Result<()> {
        let mut command = self.bench("growth", &self.dir)?;
        for (option, extension) in [("--json", "json"), ("--markdown", "md"), ("--svg", "svg")] {
            command.arg(option).arg(self.report("growth", extension));
        }
        self.shorten(&mut command, "2");
        must_succeed(command)
    }

    /// Has a benchmark take so many rounds, and short ones, unless there is time for its own.
    fn shorten(&self, command: &mut Command, rounds: &str) {
        if !self.long {
            command.args(["--rounds", rounds, "--seconds", "2"]);
        }
    }

    fn other(&self, name: &str, options: &[&str]) -> Result<()> {
        let mut command = self.bench(name, &self.dir)?;
        command.arg("--json").arg(self.report(name, "json")).args(options);
        must_succeed(command)
    }

    fn bench(&self, mode: &str, dir: &Path) -> Result<Command> {
        let mut command = Command::new(built("bench-blk")?);
        command.arg(mode).arg("--dir").arg(dir);
        Ok(command)
    }

    fn report(&self, name: &str, extension: &str) -> PathBuf {
        self.reports.join(name).with_extension(extension)
    }
}

fn must_succeed(mut command: Command) -> Result<()> {
    println!("\n$ {command:?}");
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
