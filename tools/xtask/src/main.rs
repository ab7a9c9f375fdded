//! This project's own chores; `make` calls them.

mod bench;
mod demo;
mod guest;
mod mutants;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about, disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Measures what `make build` has built beside other servers, and writes tables and drawings
    Bench(bench::Args),
    /// A guided tour: a guest, its disk, its past, and what happens when everything is killed
    Demo,
    /// A shell in a guest whose disk is the volume that a running cdpd serves on this socket
    Guest {
        /// As given to `cdp-tool volume serve NAME --vhost-user SOCKET`
        socket: PathBuf,
        /// Queues, and CPUs to use them
        #[arg(long, default_value_t = 1)]
        queues: u32,
        /// Boot the system that is installed on the disk
        #[arg(long)]
        installed: bool,
    },
    /// Plants bugs in a copy of the store, one after the other: its tests must notice each
    Mutants {
        /// Only those whose names contain this
        only: Option<String>,
    },
    /// The rules that neither rustfmt nor clippy knows
    Tidy,
}

/// The checkout that this runs in; asked now, not at build time, as several checkouts may share a target directory.
fn workspace_root() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let asked =
        Command::new(cargo).args(["locate-project", "--workspace", "--message-format", "plain"]).output();
    let asked = asked.context("asking cargo for the workspace")?;
    ensure!(asked.status.success(), "not in the workspace: {}", String::from_utf8_lossy(&asked.stderr));
    let manifest = PathBuf::from(String::from_utf8(asked.stdout)?.trim_end());
    manifest.parent().map(Path::to_owned).context("a manifest without a directory")
}

fn main() -> ExitCode {
    let result = match Args::parse().chore {
        Chore::Bench(args) => bench::run(&args),
        Chore::Demo => demo::run(),
        Chore::Guest { socket, queues, installed } => guest::run(&socket, queues, installed),
        Chore::Mutants { only } => mutants::run(only.as_deref()),
        Chore::Tidy => tidy::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
