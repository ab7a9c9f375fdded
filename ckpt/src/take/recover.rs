//! Putting things back: after an attempt, and what a dead process has left.

use std::path::Path;
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, Store};
use qmp_bridge::migration::{self, Saved};
use qmp_bridge::{Agent, AgentOptions, Client, ErrorKind, Options, Version, control};

use super::prepare::Undo;
use super::{TakeError, on_thread, whole};
use crate::doctor;
use crate::protection::Process;

/// How long a QEMU may hang that is to go on as it was: once its checkpoint is aborted, nobody tells it any more.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the agent of a dead process's checkpoint is asked again to thaw.
const THAW_PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at what QEMU has still protected.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Has QEMU go on as it was; on a new connection if the old one has ended, and once more if it hung.
pub(super) async fn wind_down(
    qmp: &Client,
    saved: &Saved,
    process: Option<Process>,
) -> Result<(), qmp_bridge::Error> {
    let winding_down = async {
        let mut wound = migration::wind_down(qmp, saved).await;
        if wound.as_ref().is_err_and(|error| error.kind() == ErrorKind::Deadline) {
            wait_for_answer(qmp).await;
            wound = migration::wind_down(qmp, saved).await;
        }
        let Err(first) = wound else { return Ok(()) };
        // Of the two that says more which tells a QEMU that has ended from one that nobody else gets to talk to.
        let again = Client::connect(qmp.path(), Options::default()).await;
        let again =
            again.map_err(|error| if error.kind() == ErrorKind::Unreachable { first } else { error })?;
        migration::wind_down(&again, saved).await.map(drop)
    };
    with_unprotected(&saved.version, process, winding_down).await
}

/// Waits until QEMU answers anything at all, for good or ill.
async fn wait_for_answer(qmp: &Client) {
    let by = Instant::now() + PATIENCE;
    while Instant::now() < by {
        match control::run_state(qmp).await {
            Err(error) if error.kind() == ErrorKind::Deadline => {
                tracing::warn!("QEMU is not put back as it was yet: {error}");
            }
            _ => return,
        }
    }
}

/// Does something with the QEMU of a checkpoint that a dead process has left, and sees to it that it does not hang in
/// the write protection that a hot one needs, if it is of a version that may.
pub async fn unprotected<T>(left: &CheckpointInfo, work: impl Future<Output = T>) -> T {
    match Undo::of(left) {
        Some(undo) => with_unprotected(&undo.settings.version, undo.process, work).await,
        None => work.await,
    }
}

async fn with_unprotected<T>(
    version: &Version,
    process: Option<Process>,
    work: impl Future<Output = T>,
) -> T {
    let Some(process) = process.filter(|_| doctor::leaves_protection(version)) else { return work.await };
    let mut work = std::pin::pin!(work);
    loop {
        lift(process).await;
        if let Ok(done) = tokio::time::timeout(LOOK_EVERY, &mut work).await {
            // What it has protected since; once its migration has ended it protects nothing more.
            lift(process).await;
            return done;
        }
    }
}

async fn lift(process: Process) {
    // A thread that dies has lifted nothing, as one that may not.
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || process.unprotect()).await {
        tracing::warn!("QEMU's memory may still be write-protected: {error}");
    }
}

/// Undoes what an earlier process has left of a checkpoint that it began: QEMU's settings are put back and the machine
/// runs again; file systems that may stand still are let go; then the checkpoint is aborted. `qmp` is none if QEMU has ended;
/// one that waits for a machine is left alone, since the one that was being saved has ended then, too.
///
/// # Errors
/// If QEMU cannot be put back as it was, or the store does not take the abort: the checkpoint is still begun then, and this
/// can be tried again. An agent that does not answer is no error: it may have ended with the guest's last boot.
pub async fn recover(store: &Store, left: &CheckpointInfo, qmp: Option<&Client>) -> Result<(), TakeError> {
    let is_another = match qmp {
        Some(client) => control::run_state(client).await.map_err(|error| whole(&error))?.is_incoming(),
        None => false,
    };
    let undo = Undo::of(left).filter(|_| !is_another);
    if let (Some(client), Some(undo)) = (qmp, &undo) {
        migration::wind_down(client, &undo.settings).await.map_err(|error| {
            TakeError::new(format!("QEMU could not be put back as it was: {}", whole(&error)))
        })?;
    }
    if let Some(agent) = undo.as_ref().and_then(|undo| undo.agent.as_ref())
        && let Err(error) = thaw_at_last(agent).await
    {
        tracing::error!(checkpoint = %left.id, "the guest's file systems may still be frozen: {error}");
    }
    let (store, id) = (store.clone(), left.id);
    on_thread(move || {
        store.abort_checkpoint(id, "the daemon ended while it was taken").map_err(|e| whole(&e))
    })
    .await
}

/// Lets the file systems of a machine go that may still be busy stilling them.
async fn thaw_at_last(agent: &Path) -> Result<(), qmp_bridge::Error> {
    let by = Instant::now() + THAW_PATIENCE;
    loop {
        let Err(error) = Agent::new(agent, AgentOptions::default()).thaw().await else { return Ok(()) };
        match error.kind() {
            // The guest has ended, and with it whatever stood still.
            ErrorKind::Unreachable => return Ok(()),
            ErrorKind::Deadline
            | ErrorKind::Held
            | ErrorKind::CannotConnect
            | ErrorKind::Gone
            | ErrorKind::Nonsense
                if Instant::now() < by =>
            {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            _ => return Err(error),
        }
    }
}

/// Lets the file systems of a machine go that runs: how many had stood still. A machine that was restored from a
/// quiesced checkpoint needs this, since its memory holds file systems that stand still.
///
/// # Errors
/// Nobody answers, or not in time.
pub async fn thaw(agent: &Path) -> Result<u64, TakeError> {
    Agent::new(agent, AgentOptions::default()).thaw().await.map_err(|error| whole(&error))
}
