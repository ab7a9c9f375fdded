//! `cdp-tool`: what an administrator does with a store.
//!
//! Exit status: 0 for success, 1 for a negative finding, 2 for a failure. A reader of the output that goes
//! away early is no failure.

mod access;
mod cli;
mod commands;
mod image;
mod interrupt;
mod machine;
mod output;
mod progress;
mod sparse;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::commands::Outcome;
use crate::output::{ReaderGone, say};

fn main() -> ExitCode {
    let cli = Cli::parse();
    cdpd::allow_open_files();
    match commands::run(cli) {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Bad) => ExitCode::from(1),
        Err(error) if error.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("{error:#}"));
            ExitCode::from(2)
        }
    }
}
