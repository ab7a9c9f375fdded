//! This project's own chores; `make` calls them.

mod demo;
mod guest;
mod mutants;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about, disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
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

fn main() -> ExitCode {
    let result = match Args::parse().chore {
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
