//! The guest's file systems, stilled by its agent from shortly before the cut until the machine runs after it.

use std::path::Path;
use std::time::Instant;

use cdp_types::VmName;
use qmp_bridge::{Agent, AgentOptions, ErrorKind, Frozen};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{TakeError, whole};

/// How it stands with them.
#[derive(Debug)]
pub(super) enum Stillness {
    /// Nobody has asked for it, or all is over.
    Never,
    /// The agent was asked, by a task of its own: should nobody wait any more, the guest stills them all the same.
    Freezing(JoinHandle<qmp_bridge::Result<Frozen>>),
    /// They stand still.
    Frozen {
        /// The hold on them.
        frozen: Frozen,
        /// Since when.
        since: Instant,
    },
    /// They are being let go, by a task of its own: nobody has to wait for the guest.
    Thawing(JoinHandle<Thawed>),
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Thawed {
    filesystems: u64,
    frozen_us: u64,
    error: Option<String>,
}

impl Stillness {
    /// Begins to still the file systems of a machine that runs.
    ///
    /// # Errors
    /// The machine stands still: with what to do about it.
    pub(super) fn begin(agent: &Path, running: bool) -> Result<Self, TakeError> {
        if !running {
            let text = "the machine stands still, so its agent cannot be asked to quiesce it: continue it, or leave \
                        out --quiesce";
            return Err(TakeError::new(text));
        }
        Ok(Self::Freezing(tokio::spawn(Agent::new(agent, AgentOptions::default()).freeze())))
    }

    /// Waits until they stand still. May be dropped, and called again.
    ///
    /// # Errors
    /// Nobody answers, or a file system refuses: with what to do about it. They have been let go then.
    pub(super) async fn frozen(&mut self) -> Result<(), TakeError> {
        let Self::Freezing(freezing) = self else { return Ok(()) };
        let frozen = freezing.await;
        *self = Self::Never;
        let frozen = frozen.map_err(|error| whole(&error))?.map_err(|error| {
            let cure = match error.kind() {
                ErrorKind::Deadline | ErrorKind::Unreachable => {
                    "; is qemu-guest-agent installed and running in it?"
                }
                _ => "; without --quiesce, the checkpoint is one of crashed file systems, which recover",
            };
            TakeError::new(format!("the guest's file systems were not quiesced: {}{cure}", whole(&error)))
        })?;
        *self = Self::Frozen { frozen, since: Instant::now() };
        Ok(())
    }

    /// Begins to let them go, unless that was done before.
    pub(super) fn let_go(&mut self) {
        *self = match std::mem::replace(self, Self::Never) {
            Self::Frozen { frozen, since } => Self::Thawing(tokio::spawn(thaw(frozen, since))),
            Self::Freezing(freezing) => Self::Thawing(tokio::spawn(async move {
                match freezing.await {
                    Ok(Ok(frozen)) => thaw(frozen, Instant::now()).await,
                    // What it has begun, it has undone.
                    _ => Thawed { filesystems: 0, frozen_us: 0, error: None },
                }
            })),
            other => other,
        };
    }

    /// Waits until they have been let go, also if the agent was still busy stilling them: what is to be kept of it, if they
    /// ever stood still.
    pub(super) async fn over(self, vm: &VmName) -> Option<Value> {
        let Self::Thawing(thawing) = self else { return None };
        let thawed = thawing.await.ok()?;
        if let Some(error) = &thawed.error {
            tracing::error!(%vm, "the guest's file systems may still be frozen: {error}");
        }
        Some(json!({
            "filesystems": thawed.filesystems,
            "frozen_us": thawed.frozen_us,
            "thaw_error": thawed.error,
        }))
    }
}

async fn thaw(frozen: Frozen, since: Instant) -> Thawed {
    let filesystems = frozen.filesystems();
    let error = frozen.thaw().await.err().map(|error| whole(&error).to_string());
    let frozen_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    Thawed { filesystems, frozen_us, error }
}
