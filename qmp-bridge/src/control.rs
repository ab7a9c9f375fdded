//! Stopping, continuing, resetting, switching off and ending a machine.

use std::time::Duration;

use qapi_spec::Command;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::client::{Client, read_as};
use crate::error::{Error, ErrorKind, Result};

/// How long a machine may take between states before it can run again.
const RUN_DEADLINE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What `query-status` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RunState {
    /// Whether the vCPUs run.
    pub running: bool,
    /// QEMU's `RunState`: `running`, `paused`, `prelaunch`, `inmigrate`, `postmigrate`, `finish-migrate`…
    pub status: String,
}

impl RunState {
    /// Whether QEMU waits for a machine (`-incoming`), or is taking one in.
    #[must_use]
    pub fn is_incoming(&self) -> bool {
        self.status == "inmigrate"
    }

    /// Whether somebody has stopped it. For a migration's end QEMU stops it in another state, `finish-migrate`, but for a
    /// background snapshot in this one, too.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.status == "paused"
    }
}

/// Whether the machine runs, and if not, why.
///
/// # Errors
/// As [`Client::execute_raw`], and `Unexpected`.
pub async fn run_state(client: &Client) -> Result<RunState> {
    // Not with the schema's type: later versions may have further states.
    let query = qapi_qmp::query_status::NAME;
    read_as(query, client.execute_raw(query, Value::Null).await?)
}

/// Stops the machine. QEMU answers when all vCPUs and all vhost-user rings have stopped.
///
/// # Errors
/// As [`Client::execute_raw`].
pub async fn stop(client: &Client) -> Result<()> {
    client.execute(qapi_qmp::stop {}).await.map(drop)
}

/// Lets the machine run.
///
/// # Errors
/// As [`Client::execute_raw`]; `Refused` during some parts of a migration.
pub async fn cont(client: &Client) -> Result<()> {
    client.execute(qapi_qmp::cont {}).await.map(drop)
}

/// Lets the machine run unless it does, and sees to it that it does: QEMU refuses for a moment while a migration ends.
/// A guest that has switched itself off, or panicked, is left as it is, and so is one that sleeps (S3), which QEMU does not
/// wake for this.
///
/// # Errors
/// As [`cont`]; `Refused` if QEMU goes on refusing.
pub async fn run_again(client: &Client) -> Result<()> {
    let by = Instant::now() + RUN_DEADLINE;
    loop {
        let state = run_state(client).await?;
        if state.running || matches!(state.status.as_str(), "shutdown" | "guest-panicked" | "suspended") {
            return Ok(());
        }
        match cont(client).await {
            Err(error) if error.kind() != ErrorKind::Refused || Instant::now() >= by => return Err(error),
            // Also after success: the state is looked at once more.
            _ if Instant::now() >= by => {
                let detail = format!("it stays '{}'", state.status);
                return Err(Error::new(ErrorKind::Refused, "cont", detail));
            }
            _ => sleep(LOOK_EVERY).await,
        }
    }
}

/// Resets the machine, as the button would.
///
/// # Errors
/// As [`Client::execute_raw`].
pub async fn system_reset(client: &Client) -> Result<()> {
    client.execute(qapi_qmp::system_reset {}).await.map(drop)
}

/// Asks the guest to switch itself off, as a short press of the button would. It may take its time, or not listen.
///
/// # Errors
/// As [`Client::execute_raw`].
pub async fn system_powerdown(client: &Client) -> Result<()> {
    client.execute(qapi_qmp::system_powerdown {}).await.map(drop)
}

/// Ends QEMU, without asking the guest. It may be gone before it has answered: that is no error.
///
/// # Errors
/// As [`Client::execute_raw`], but not `Gone`.
pub async fn quit(client: &Client) -> Result<()> {
    match client.execute(qapi_qmp::quit {}).await {
        Err(error) if error.kind() != ErrorKind::Gone => Err(error),
        _ => Ok(()),
    }
}
