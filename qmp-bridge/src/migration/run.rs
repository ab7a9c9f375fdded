//! A migration while it runs, and its end.

use std::path::Path;
use std::time::Duration;

use qapi_spec::Command;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::settings::Saved;
use crate::client::{Client, read_as};
use crate::control;
use crate::error::{Error, ErrorKind, Result};
use crate::event::MigrationStatus;

/// Between two looks at a migration that is ending.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long QEMU may take to end a migration that was cancelled. Closing our end of its socket makes it faster.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Its state.
    pub status: MigrationStatus,
    /// Memory; none before it has begun.
    pub ram: Option<RamProgress>,
    /// Since its beginning, in milliseconds.
    pub total_ms: Option<u64>,
    /// How long the machine was stopped for it, in milliseconds, once it is over.
    pub downtime_ms: Option<u64>,
    /// Why it has failed.
    pub error: Option<String>,
    /// Why this machine cannot be migrated at all, one entry for each device that is in the way.
    pub blockers: Vec<String>,
}

/// How much memory has gone over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamProgress {
    /// On the socket so far.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// Still to go, as far as is known now.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// The guest's memory.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// Pages that were all zero.
    #[serde(rename = "duplicate", default)]
    pub zero_pages: u64,
    /// Pages that were sent whole.
    #[serde(rename = "normal", default)]
    pub normal_pages: u64,
    /// Rounds over memory.
    #[serde(rename = "dirty-sync-count", default)]
    pub rounds: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Wire {
    status: Option<String>,
    ram: Option<RamProgress>,
    total_time: Option<u64>,
    downtime: Option<u64>,
    error_desc: Option<String>,
    #[serde(default)]
    blocked_reasons: Vec<String>,
}

/// Begins to migrate into the Unix socket at `stream`, on which somebody listens. Returns when QEMU has begun; from
/// then on events and [`progress`] tell.
///
/// # Errors
/// As [`Client::execute_raw`]; `Refused` names what blocks it.
pub async fn start(client: &Client, stream: &Path) -> Result<()> {
    let Some(path) = stream.to_str() else {
        let detail = format!("{} is no text, and QMP has only text", stream.display());
        return Err(Error::new(ErrorKind::Refused, "migrate", detail));
    };
    let command =
        qapi_qmp::migrate { uri: Some(format!("unix:{path}")), channels: None, detach: None, resume: None };
    client.execute(command).await.map(drop)
}

/// How far it is.
///
/// # Errors
/// As [`Client::execute_raw`], and `Unexpected`.
pub async fn progress(client: &Client) -> Result<Progress> {
    // Not with the schema's type: what is in it differs from version to version.
    let query = qapi_qmp::query_migrate::NAME;
    let wire: Wire = read_as(query, client.execute_raw(query, Value::Null).await?)?;
    Ok(Progress {
        status: wire.status.map_or(MigrationStatus::None, |name| MigrationStatus::from_name(&name)),
        ram: wire.ram,
        total_ms: wire.total_time,
        downtime_ms: wire.downtime,
        error: wire.error_desc,
        blockers: wire.blocked_reasons,
    })
}

/// Asks for the end of what runs; [`settled`] says when it has. Nothing happens if nothing runs.
///
/// # Errors
/// As [`Client::execute_raw`].
pub async fn cancel(client: &Client) -> Result<()> {
    client.execute(qapi_qmp::migrate_cancel {}).await.map(drop)
}

/// Lets QEMU go on that waits in `pre-switchover`.
///
/// # Errors
/// As [`Client::execute_raw`]; `Refused` if it does not wait there.
pub async fn proceed(client: &Client) -> Result<()> {
    let state = json!({ "state": MigrationStatus::PreSwitchover.to_string() });
    client.execute_raw(qapi_qmp::migrate_continue::NAME, state).await.map(drop)
}

/// Waits until no migration runs: how the last one ended. Cancel-safe.
///
/// # Errors
/// As [`progress`], and `Deadline` if one still runs after `deadline`.
pub async fn settled(client: &Client, deadline: Duration) -> Result<Progress> {
    let by = Instant::now() + deadline;
    loop {
        let progress = progress(client).await?;
        if progress.status.has_ended() {
            return Ok(progress);
        }
        if Instant::now() >= by {
            let detail = format!("the migration is still in state '{}' after {deadline:?}", progress.status);
            return Err(Error::new(ErrorKind::Deadline, "query-migrate", detail));
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Brings a QEMU back to what it was before a checkpoint, however far that came, and whoever began it:
///
/// 1. what still runs is cancelled, and waited for;
/// 2. the machine runs, if it did before;
/// 3. the settings are put back.
///
/// Each step is tried even if one before has failed, and doing it all again does no harm. It says how the migration
/// ended; one that had completed stays so. One that runs with the settings as they were is somebody else's: then nothing is
/// done.
///
/// # Errors
/// The first one; then it should be done again on the next connection.
pub async fn wind_down(client: &Client, saved: &Saved) -> Result<Progress> {
    let now = progress(client).await;
    // QEMU takes no other capabilities while a migration runs: were it ours, so would they be.
    if let Ok(now) = &now
        && !now.status.has_ended()
        && saved.is_back(client).await.unwrap_or(false)
    {
        return Ok(now.clone());
    }
    let ended = match now {
        Ok(now) if now.status.has_ended() => Ok(now),
        Ok(_) => end(client).await,
        Err(error) => Err(error),
    };
    let running = if saved.running { control::run_again(client).await } else { Ok(()) };
    let settings = saved.restore(client).await;
    let progress = ended?;
    running?;
    settings?;
    Ok(progress)
}

async fn end(client: &Client) -> Result<Progress> {
    cancel(client).await?;
    settled(client, SETTLE_DEADLINE).await
}
