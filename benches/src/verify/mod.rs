//! Random requests with every byte checked, cut off abruptly again and again.
//!
//! What was acknowledged must be there after every cut; what was in flight has happened or not, and whichever a first
//! read shows must hold from then on. A cut is the end of the connection without GET_VRING_BASE, as when a virtual
//! machine is killed, or a kill of our daemon, or both.

mod content;
mod model;
mod session;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub(crate) use content::SECTOR;
pub(crate) use model::{Model, Wrong};
pub(crate) use session::{Mix, Session, shape};

use crate::client::{Client, Place};
use crate::home::Home;
use crate::server::{Ours, QUEUES, StorageDaemon};

/// The depths that are tried, at random.
const DEPTHS: [usize; 6] = [1, 2, 8, 32, 64, 128];

/// What is verified, and for how long.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench-blk verify --cuts 100 --kills 20
  bench-blk verify --cuts 10 --storage-daemon
  bench-blk verify --socket /run/cdpd/scratch.sock     overwrites that disk")]
pub(crate) struct Args {
    /// How often it is cut off
    #[arg(long, value_name = "N", default_value_t = 100)]
    cuts: u32,
    /// At how many of the cuts the daemon is killed (SIGKILL) too
    #[arg(long, value_name = "N", default_value_t = 0)]
    kills: u32,
    /// Requests between two cuts
    #[arg(long, value_name = "N", default_value_t = 2000)]
    requests: u64,
    /// The disk's size, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    size_mib: u64,
    /// Fixes what is drawn at random; not when the server answers, so a failure may need several runs to show again
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Where a store is made
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Verify qemu-storage-daemon instead of our daemon: to tell a fault of this client from one of ours
    #[arg(long, conflicts_with_all = ["kills", "socket"])]
    storage_daemon: bool,
    /// Verify whatever is served on this vhost-user socket; all that is on that disk is LOST. It must hold zeroes
    #[arg(long, value_name = "SOCKET", conflicts_with = "kills")]
    socket: Option<PathBuf>,
    /// With --socket: how many queues are served there
    #[arg(long, value_name = "N", default_value_t = QUEUES, requires = "socket")]
    queues: usize,
}

/// What is verified.
enum Target {
    Ours(Ours),
    StorageDaemon(StorageDaemon),
    Socket(PathBuf),
}

impl Target {
    fn place(&self) -> Place {
        match self {
            Self::Ours(ours) => ours.place(),
            Self::StorageDaemon(daemon) => daemon.place(),
            Self::Socket(socket) => Place::VhostUser(socket.clone()),
        }
    }

    fn connect(&self, queues: usize, depth: usize) -> Result<Client> {
        let shape = shape(queues, depth);
        match self {
            Self::StorageDaemon(_) | Self::Socket(_) => Client::connect_in_time(&self.place(), shape),
            Self::Ours(_) => Client::connect(&self.place(), shape),
        }
    }
}

/// Verifies.
///
/// # Errors
/// [`Wrong`] if the disk has not what it must have; others if a request fails, or the server does not live.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.kills <= args.cuts, "there cannot be more kills than cuts");
    ensure!(
        args.size_mib > 0 && (1..=QUEUES).contains(&args.queues),
        "1 to {QUEUES} queues, and a disk of some size"
    );
    // The standard library's hash tables are seeded by the operating system.
    let seed = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
    println!("verify: seed {seed}");
    let home = Home::new(&args.dir)?;
    let bytes = args.size_mib << 20;
    let mut target = if let Some(socket) = &args.socket {
        Target::Socket(socket.clone())
    } else if args.storage_daemon {
        let file = home.dir().join("disk.raw");
        File::create(&file)?.set_len(bytes)?;
        Target::StorageDaemon(StorageDaemon::start(home.dir(), &file)?)
    } else {
        Target::Ours(Ours::create(&home.dir().join("ours"), bytes)?)
    };
    home.explain(verify(args, &mut target, seed)).with_context(|| format!("seed {seed}"))
}

fn verify(args: &Args, target: &mut Target, seed: u64) -> Result<()> {
    let start = Instant::now();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut model = Model::new(seed, args.size_mib << 20);
    let (mut in_flight, mut doubtful) = (0, 0);
    if matches!(target, Target::Ours(_)) {
        // Of others, requests that they do not take are made as writes.
        ensure!(target.connect(1, 1)?.can_zero()?, "cdpd offers no discards or no write-zeroes");
    }
    for cut in 0..args.cuts {
        let (queues, depth) =
            (random.random_range(1..=args.queues), DEPTHS[random.random_range(0..DEPTHS.len())]);
        let kill = kills_at(cut, args.cuts, args.kills);
        in_flight += between_cuts(args, target, queues, depth, kill, &mut model, &mut random)
            .with_context(|| format!("cut {} of {}, {queues} queues, depth {depth}", cut + 1, args.cuts))?;
        doubtful += model.doubtful();
    }
    let mut session = Session::new(target.connect(1, 16)?, &mut model, &mut random)?;
    session.check_everything().context("after the last cut")?;
    drop(session);
    if let Target::Ours(ours) = target {
        finish_ours(ours)?;
    }
    println!(
        "verify: {} requests on {} MiB in {:.0} s, {} cuts ({} of them kills) with {in_flight} requests in flight that \
         left {doubtful} sectors open: all well",
        u64::from(args.cuts) * args.requests,
        args.size_mib,
        start.elapsed().as_secs_f64(),
        args.cuts,
        args.kills,
    );
    Ok(())
}

/// Whether a cut is one of the kills: they are spread evenly, the last cut among them.
fn kills_at(cut: u32, cuts: u32, kills: u32) -> bool {
    let until = |cut: u64| cut * u64::from(kills) / u64::from(cuts);
    until(u64::from(cut) + 1) > until(u64::from(cut))
}

/// Connects, checks the whole disk, makes requests, and cuts. Returns how many requests were in flight then.
fn between_cuts(
    args: &Args,
    target: &mut Target,
    queues: usize,
    depth: usize,
    kill: bool,
    model: &mut Model,
    random: &mut SmallRng,
) -> Result<usize> {
    let mut session = Session::new(target.connect(queues, depth)?, model, random)?;
    session.check_everything()?;
    session.make(Mix::Everything, args.requests)?;
    match target {
        Target::Ours(ours) if kill => {
            ours.kill9()?;
            let in_flight = session.cut();
            ours.spawn()?;
            ours.wait_until_it_serves()?;
            Ok(in_flight)
        }
        _ => Ok(session.cut()),
    }
}

/// A clean stop, and then the tool's own opinion of what the daemon has left.
fn finish_ours(ours: &mut Ours) -> Result<()> {
    ours.stop()?;
    ours.tool().run(&["verify"]).context("after a clean stop")?;
    let complaints = ours.complaints()?;
    if !complaints.is_empty() {
        bail!("cdpd has complained:\n{}", complaints.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_spread_over_the_cuts_however_many_there_are() {
        for (cuts, kills) in [(100, 20), (20, 5), (7, 7), (7, 0), (100_000, 60_000)] {
            let met = (0..cuts).filter(|&cut| kills_at(cut, cuts, kills)).count();
            assert_eq!(met, kills as usize, "{cuts}");
            assert_eq!(kills_at(cuts - 1, cuts, kills), kills > 0, "{cuts}");
        }
    }
}
