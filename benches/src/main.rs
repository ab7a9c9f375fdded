//! `bench-blk`: what a guest gets from a disk that we serve, next to what it gets from others.
//!
//! - [`client`] is the guest's side, without a guest: `blkio`'s vhost-user driver, one loop for all servers.
//! - [`drive`] keeps a number of requests in flight for a while, and counts.
//! - [`server`] starts and kills what is measured: our `cdpd`, `qemu-storage-daemon`, or nothing but a file.
//! - [`compare`] measures them in turn; [`report`] makes medians, ratios, JSON and Markdown of it,
//!   [`plot`] a drawing.
//! - [`verify`] does not measure: it checks every byte, across abrupt disconnects and kills.
//! - [`travel`] measures what reverts, clones and past instants cost, [`nbd`] our exports beside `qemu-nbd`'s.
//! - [`guest`] has fio measure a disk of ours and one of qemu-storage-daemon's inside a guest.
//! - [`disturbance`] measures what marks and clones cost whoever writes meanwhile.
//! - [`recovery`] measures how long a killed daemon with a long log takes to its first read.
//! - [`growth`] measures the same things on stores with a short and with a long past, many branches, many volumes.
//! - [`checkpoint`] measures what checkpoints of whole machines cost the guest.
//!
//! Nothing here links the programs under test, and nothing here passes or fails by the clock.

mod api;
mod checkpoint;
mod client;
mod compare;
mod disturbance;
mod drive;
mod growth;
mod guest;
mod home;
mod machine;
mod meter;
mod nbd;
mod plot;
mod recovery;
mod report;
mod server;
mod travel;
mod verify;
mod workload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures and verifies disks through vhost-user, as a guest sees them.
#[derive(Debug, Parser)]
#[command(version, after_help = "Exit status: 0 done, 1 the disk has not what it must have, 2 a failure.")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Our server, qemu-storage-daemon on a raw file, and raw io_uring on that file, in turn on one file system
    Compare(compare::Args),
    /// Draws reports of `compare`, or one of `growth`
    Draw(plot::Args),
    /// How long cdpd takes from its start to its first read, after a kill in the middle of writing
    Recovery(recovery::Args),
    /// Random writes in the second before and after a mark and a clone
    Disturbance(disturbance::Args),
    /// How long reverts, clones and the first byte of a past instant take
    Travel(travel::Args),
    /// What a long history, many branches and many volumes cost, next to an empty store
    Growth(growth::Args),
    /// Our NBD exports and qemu-nbd's of a raw file, in turn
    Nbd(nbd::Args),
    /// fio inside a guest, on our disk and qemu-storage-daemon's in turn
    Guest(guest::Args),
    /// What checkpoints cost a guest: how long it stands still, stalls, what is stored, how soon it is restored
    Checkpoint(checkpoint::Args),
    /// Random requests with every byte checked, across abrupt disconnects and kills of the daemon
    Verify(verify::Args),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Compare(args) => compare::run(&args),
        Command::Draw(args) => plot::run(&args),
        Command::Recovery(args) => recovery::run(&args),
        Command::Disturbance(args) => disturbance::run(&args),
        Command::Travel(args) => travel::run(&args),
        Command::Growth(args) => growth::run(&args),
        Command::Nbd(args) => nbd::run(&args),
        Command::Guest(args) => guest::run(&args),
        Command::Checkpoint(args) => checkpoint::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-blk: {error:#}");
            ExitCode::from(if error.is::<verify::Wrong>() { 1 } else { 2 })
        }
    }
}
