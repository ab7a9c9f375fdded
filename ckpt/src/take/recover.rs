//! Putting things back: after an attempt, and what a dead process has left.

use std::path::Path;

use cdp_store::{CheckpointInfo, Store};
use qmp_bridge::migration::{self, Saved};
use qmp_bridge::{Agent, AgentOptions, Client, Options};

use super::prepare::Undo;
use super::{TakeError, on_thread, whole};

/// Has QEMU go on as it was; on a new connection if the old one has ended.
pub(super) async fn wind_down(qmp: &Client, saved: &Saved) -> Result<(), qmp_bridge::Error> {
    let Err(first) = migration::wind_down(qmp, saved).await else { return Ok(()) };
    let again = Client::connect(qmp.path(), Options::default()).await.map_err(|_| first)?;
    migration::wind_down(&again, saved).await.map(drop)
}

/// Undoes what an earlier process has left of a checkpoint that it began: QEMU's settings are put back and the machine
/// runs again, if it can be reached through `qmp`; file systems that may stand still are let go; then the checkpoint is
/// aborted.
///
/// # Errors
/// If the store does not take the abort. A QEMU or an agent that cannot be reached is no error: it may have ended.
pub async fn recover(store: &Store, left: &CheckpointInfo, qmp: Option<&Client>) -> Result<(), TakeError> {
    let undo: Option<Undo> = serde_json::from_value(left.restore.clone()).ok();
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
