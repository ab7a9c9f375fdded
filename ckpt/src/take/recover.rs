//! Putting things back: after an attempt, and what a dead process has left.

use std::path::Path;
use std::time::Duration;

use cdp_store::{CheckpointInfo, Store};
use qmp_bridge::migration::{self, Saved};
use qmp_bridge::{Agent, AgentOptions, Client, Options, Version};

use super::prepare::Undo;
use super::{TakeError, on_thread, whole};
use crate::doctor;
use crate::protection::Process;

/// Between two looks at what QEMU has still protected.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Has QEMU go on as it was; on a new connection if the old one has ended.
pub(super) async fn wind_down(
    qmp: &Client,
    saved: &Saved,
    process: Option<Process>,
) -> Result<(), qmp_bridge::Error> {
    let winding_down = async {
        let Err(first) = migration::wind_down(qmp, saved).await else { return Ok(()) };
        let again = Client::connect(qmp.path(), Options::default()).await.map_err(|_| first)?;
        migration::wind_down(&again, saved).await.map(drop)
    };
    with_unprotected(&saved.version, process, winding_down).await
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
/// runs again, if it can be reached through `qmp`; file systems that may stand still are let go; then the checkpoint is
/// aborted.
///
/// # Errors
/// If the store does not take the abort. A QEMU or an agent that cannot be reached is no error: it may have ended.
pub async fn recover(store: &Store, left: &CheckpointInfo, qmp: Option<&Client>) -> Result<(), TakeError> {
    let undo = Undo::of(left);
    if let (Some(client), Some(undo)) = (qmp, &undo) {
        if let Err(error) = migration::wind_down(client, &undo.settings).await {
            tracing::warn!(checkpoint = %left.id, "QEMU could not be put back as it was: {error}");
        }
        if let Some(agent) = &undo.agent
            && let Err(error) = thaw(agent).await
        {
            tracing::warn!(checkpoint = %left.id, "the guest's file systems may still be frozen: {error}");
        }
    }
    let (store, id) = (store.clone(), left.id);
    on_thread(move || {
        store.abort_checkpoint(id, "the daemon ended while it was taken").map_err(|e| whole(&e))
    })
    .await
}

/// Lets the file systems of a machine go that runs: how many had stood still. A machine that was restored from a
/// quiesced checkpoint needs this, since its memory holds file systems that stand still.
///
/// # Errors
/// Nobody answers, or not in time.
pub async fn thaw(agent: &Path) -> Result<u64, TakeError> {
    Agent::new(agent, AgentOptions::default()).thaw().await.map_err(|error| whole(&error))
}
