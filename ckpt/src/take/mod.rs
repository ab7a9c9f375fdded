//! Taking a checkpoint: from the machine as it runs to one record that says that all of it is there.
//!
//! ```text
//!  begun ── settings written down ──► file systems stilled (if wanted), epoch armed ──► QEMU migrates into our socket
//!    │        the machine stops: the last ring's stop cuts the epoch, on all disks (`gate`)
//!    │        hot: it runs on behind write protection · live, pause: it waits until all is sent
//!    ├── memory stored, migration completed, the cut was that of this migration ──► committed
//!    ├── the cut may have been somebody else's stop ──► all is put back, and once more
//!    └── anything else: connection closed, machine runs on, settings put back ──► aborted
//! ```
//!
//! Nothing that goes wrong here stops the machine for good: whatever happens after the stop is followed by
//! [`wind_down`](qmp_bridge::migration::wind_down), in this process or, from what was written down, in the next
//! ([`recover`]). File systems that were stilled are let go by the same ways.
//!
//! `prepare` refuses and writes down, `attempt` is one try, `patience` ends one that would not, `seen` says what events mean,
//! `stillness` has the guest's file systems.

mod attempt;
mod patience;
pub(crate) mod prepare;
mod recover;
mod seen;
mod stillness;
mod told;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, CheckpointMode, EpochCut, Store};
use cdp_types::{Label, VmName, one_line};
use qmp_bridge::Client;
use serde_json::Value;
use tokio::sync::watch;

use crate::firsts::Firsts;
use crate::gate::{DiskGuard, Gate, WriteCacheOff};
use attempt::Attempt;
use prepare::Prepared;

pub use recover::{recover, thaw, unprotected};

/// How often a checkpoint is tried whose cut may have been somebody else's stop.
const ATTEMPTS: u32 = 3;

/// How long a live checkpoint may send again what the guest has changed, unless somebody says otherwise.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(600);

/// Why a checkpoint was not taken. The machine runs on.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct TakeError {
    why: String,
    /// Nothing is wrong, and it may work at once.
    again: bool,
    /// It was refused for what is in the way of its mode alone, and not of mode live.
    hot_alone: bool,
}

impl TakeError {
    fn new(why: impl std::fmt::Display) -> Self {
        Self { why: why.to_string(), again: false, hot_alone: false }
    }

    /// Whether the machine can be checkpointed live, and was refused only because it was to be checkpointed hot.
    #[must_use]
    pub fn is_of_hot_alone(&self) -> bool {
        self.hot_alone
    }

    /// One that another attempt may cure.
    fn passing(why: impl std::fmt::Display) -> Self {
        Self { again: true, ..Self::new(why) }
    }
}

/// Why, with all that lies behind it.
fn whole(error: &dyn std::error::Error) -> TakeError {
    TakeError::new(one_line(error))
}

/// A disk of a machine.
#[derive(Clone)]
pub struct Disk {
    /// The socket on which it is served.
    pub socket: PathBuf,
    /// Its guard.
    pub guard: Arc<dyn DiskGuard>,
    /// Its write cache.
    pub write_cache_off: WriteCacheOff,
}

/// A machine whose checkpoint is to be taken.
pub struct Machine {
    /// The store of its disks.
    pub store: Store,
    /// Its name there.
    pub name: VmName,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Where their rings are watched.
    pub gate: Arc<Gate>,
    /// Its QEMU.
    pub qmp: Client,
    /// A directory for the socket of the migration, for this user alone.
    pub directory: PathBuf,
    /// What earlier checkpoints have learned of it.
    pub firsts: Arc<Firsts>,
}

/// What is to be taken.
#[derive(Clone)]
pub struct Order {
    /// How.
    pub mode: CheckpointMode,
    /// Refuse mode hot also where it works, but may harm the guest if it is given up: for who has not asked for it.
    pub careful: bool,
    /// Its name.
    pub label: Option<Label>,
    /// The guest agent's socket, if its file systems are to be stilled for the cut.
    pub quiesce: Option<PathBuf>,
    /// How long QEMU may send again what the guest has changed, in mode live, until the checkpoint is given up.
    pub give_up_after: Duration,
    /// Who is told of the cut.
    pub at_cut: Option<AtCut>,
}

/// Called once the epoch has been cut, for each attempt. In modes live and pause the machine stands still until what it
/// returns has ended; hot, it runs on meanwhile.
pub type AtCut = Arc<dyn Fn(CutNotice) -> Pin<Box<dyn Future<Output = Called> + Send>> + Send + Sync>;

/// A cut, as it is told. It may still come to nothing.
#[derive(Clone, Debug)]
pub struct CutNotice {
    /// The checkpoint, with machine and mode.
    pub checkpoint: CheckpointInfo,
    /// The cut.
    pub cut: EpochCut,
}

/// What came of telling.
#[derive(Clone, Debug)]
pub struct Called {
    /// For the checkpoint's figures.
    pub figures: Value,
    /// Why the checkpoint must not be completed.
    pub veto: Option<String>,
}

/// How far it is, for whoever waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taking {
    /// Pages that have come.
    pub received_pages: u64,
    /// Pages of the machine.
    pub total_pages: u64,
}

/// The caller's hold on a checkpoint that is being taken.
#[derive(Clone, Debug)]
pub struct Hold {
    /// Turns true when the checkpoint is to be given up.
    pub cancel: watch::Receiver<bool>,
    /// Told how far it is.
    pub progress: watch::Sender<Taking>,
}

impl Hold {
    /// Ends when the checkpoint is to be given up.
    async fn cancelled(&mut self) -> TakeError {
        if self.cancel.wait_for(|cancel| *cancel).await.is_err() {
            // Nobody can cancel it any more.
            std::future::pending::<()>().await;
        }
        TakeError::new("it was cancelled")
    }
}

/// Takes a checkpoint of a machine. It goes on even if nobody waits: dropping the future in the middle leaves the
/// machine to [`recover`], so run it in a task of its own.
///
/// # Durability
/// The checkpoint, once this returns.
///
/// # Errors
/// Why there is none; the machine runs on as before, with QEMU's settings as before, as far as QEMU can be reached.
pub async fn take(machine: &Machine, order: &Order, mut hold: Hold) -> Result<CheckpointInfo, TakeError> {
    let began = Instant::now();
    let prepared = Prepared::new(machine, order).await?;
    let begun = prepared.begin(machine, order).await?;
    match try_until_cut(machine, order, &prepared, &begun, &mut hold).await {
        Ok(complete) => {
            let (store, id, mut figures) = (machine.store.clone(), begun.id, complete.figures);
            figures["duration_ms"] = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX).into();
            let committed = on_thread(move || {
                store
                    .commit_checkpoint(id, &complete.cut, complete.image_bytes, figures)
                    .map_err(|error| whole(&error))
            });
            match committed.await {
                Ok(info) => Ok(info),
                Err(error) => Err(abort(machine, &begun, error).await),
            }
        }
        Err(error) => Err(abort(machine, &begun, error).await),
    }
}

/// One attempt after the other, until one fails for a reason that another would not cure.
async fn try_until_cut(
    machine: &Machine,
    order: &Order,
    prepared: &Prepared,
    begun: &CheckpointInfo,
    hold: &mut Hold,
) -> Result<attempt::Complete, TakeError> {
    let mut left = ATTEMPTS;
    loop {
        let attempt = Attempt::new(machine, order, prepared, begun).await?;
        left -= 1;
        match attempt.run(hold).await {
            Err(error) if error.again && left > 0 => {
                tracing::info!(vm = %machine.name, "the checkpoint is tried again: {error}");
            }
            Err(error) if error.again => {
                return Err(TakeError::new(format!("{error} ({ATTEMPTS} times); try again later")));
            }
            outcome => return outcome,
        }
    }
}

/// Says that there will be no such checkpoint, and returns why.
async fn abort(machine: &Machine, begun: &CheckpointInfo, error: TakeError) -> TakeError {
    let (store, id, reason) = (machine.store.clone(), begun.id, error.to_string());
    let aborted = on_thread(move || store.abort_checkpoint(id, &reason).map_err(|e| whole(&e)));
    match aborted.await {
        Ok(()) => error,
        Err(second) => TakeError::new(format!("{error}; and it could not be marked as aborted: {second}")),
    }
}

/// Runs what blocks on a thread that may.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TakeError> + Send + 'static,
) -> Result<T, TakeError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(TakeError::new(error)))
}
