//! Which settings each way of taking a checkpoint needs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::settings::{Saved, Settings};
use crate::client::Client;
use crate::error::{Error, ErrorKind, Result};

/// QEMU saves memory while the machine runs, as it was at one instant.
pub const BACKGROUND_SNAPSHOT: &str = "background-snapshot";
/// QEMU waits for `migrate-continue` between stopping the machine and giving its devices away.
pub const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";
/// QEMU tells of each state of a migration.
pub const EVENTS: &str = "events";

/// Capabilities beside which QEMU refuses `background-snapshot`, in 7.2 or in 10.0 (`migration/options.c`, before 8.1
/// `migration/migration.c`).
pub const REFUSED_BY_BACKGROUND_SNAPSHOT: [&str; 17] = [
    "auto-converge",
    "compress",
    "dirty-bitmaps",
    "late-block-activate",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "return-path",
    "switchover-ack",
    "validate-uuid",
    "x-colo",
    "xbzrle",
    "zero-copy-send",
];

/// Bytes a second that no socket reaches. `0` would mean the same in later versions only.
const NO_LIMIT_BYTES_PER_S: u64 = 1 << 50;

/// How a checkpoint is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The machine stops for milliseconds, and its memory is saved by write protection while it runs on.
    Hot,
    /// Memory is sent while the machine runs, again where it changes, until little is left; then the machine stops
    /// for that.
    Live,
    /// The machine is stopped until all is saved.
    Pause,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hot => "hot",
            Self::Live => "live",
            Self::Pause => "pause",
        })
    }
}

/// The settings of a mode: every capability that is not wanted is off, known ones and those of versions to come, for
/// what is on decides what the stream looks like, and we read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    mode: Mode,
    on: &'static [&'static str],
    parameters: Map<String, Value>,
}

impl Plan {
    /// The plan for `mode`. `downtime` is what QEMU may take, by its own estimate, to send the rest after stopping the
    /// machine; only `live` needs it. A guest that dirties memory faster than the socket takes it may never get there.
    #[must_use]
    pub fn new(mode: Mode, downtime: Duration) -> Self {
        let on: &[&str] = match mode {
            Mode::Hot => &[EVENTS, BACKGROUND_SNAPSHOT],
            Mode::Live => &[EVENTS, PAUSE_BEFORE_SWITCHOVER],
            Mode::Pause => &[EVENTS],
        };
        let mut parameters = Map::new();
        parameters.insert("max-bandwidth".into(), NO_LIMIT_BYTES_PER_S.into());
        // The stream goes to a socket of this machine: what an administrator has set up for the network stays out.
        parameters.insert("tls-creds".into(), "".into());
        // Since 8.2: with another mode, memory would not be in the stream.
        parameters.insert("mode".into(), "normal".into());
        if mode == Mode::Live {
            // The estimate is made from what was measured, not from a bandwidth that somebody has promised (8.2).
            parameters.insert("avail-switchover-bandwidth".into(), 0.into());
            // QEMU takes 0 to 2000 s.
            let downtime_ms = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX).clamp(1, 2_000_000);
            parameters.insert("downtime-limit".into(), downtime_ms.into());
        }
        Self { mode, on, parameters }
    }

    /// The mode that it is for.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Capabilities that are on; all others are off.
    #[must_use]
    pub fn capabilities_on(&self) -> &[&'static str] {
        self.on
    }

    /// Parameters and their values. A QEMU that lacks one does without.
    #[must_use]
    pub fn parameters(&self) -> &Map<String, Value> {
        &self.parameters
    }

    /// What putting this plan into effect would change, as it is now: to be written down before
    /// [`apply`](Self::apply). `running` is whether the machine is to run afterwards.
    ///
    /// # Errors
    /// `UnknownCommand` if this QEMU lacks a capability that the mode needs: it is named.
    pub fn changes(&self, client: &Client, before: &Settings, running: bool) -> Result<Saved> {
        let wanted = self.wanted(before)?;
        let capabilities = before.capabilities.iter().filter(|(name, was)| wanted.get(*name) != Some(*was));
        let parameters = before
            .parameters
            .iter()
            .filter(|(name, was)| self.parameters.get(*name).is_some_and(|wanted| wanted != *was));
        Ok(Saved {
            version: client.version().clone(),
            running,
            capabilities: capabilities.map(|(name, was)| (name.clone(), *was)).collect(),
            parameters: parameters.map(|(name, was)| (name.clone(), was.clone())).collect(),
        })
    }

    /// Puts the plan into effect, given what is in effect.
    ///
    /// # Errors
    /// As [`changes`](Self::changes) and [`Client::execute_raw`]. Some of it may be in effect then:
    /// [`Saved::restore`] undoes it.
    pub async fn apply(&self, client: &Client, before: &Settings) -> Result<()> {
        before.change(client, &self.wanted(before)?, &self.parameters).await
    }

    /// Every capability that QEMU has, as this plan wants it.
    fn wanted(&self, before: &Settings) -> Result<BTreeMap<String, bool>> {
        if let Some(lacking) = self.on.iter().find(|name| !before.capabilities.contains_key(**name)) {
            let detail =
                format!("its migration has no capability '{lacking}', which mode {} needs", self.mode);
            return Err(Error::new(ErrorKind::UnknownCommand, "migrate-set-capabilities", detail));
        }
        let wanted = |name: &String| (name.clone(), self.on.contains(&name.as_str()));
        Ok(before.capabilities.keys().map(wanted).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MODES: [Mode; 3] = [Mode::Hot, Mode::Live, Mode::Pause];

    #[test]
    fn hot_mode_turns_on_nothing_that_background_snapshot_refuses() {
        let plan = Plan::new(Mode::Hot, Duration::ZERO);
        assert!(plan.capabilities_on().contains(&BACKGROUND_SNAPSHOT));
        assert!(REFUSED_BY_BACKGROUND_SNAPSHOT.iter().all(|name| !plan.capabilities_on().contains(name)));
    }

    #[test]
    fn every_mode_has_events_and_no_limit_and_no_tls() {
        for plan in MODES.map(|mode| Plan::new(mode, Duration::from_millis(20))) {
            assert!(plan.capabilities_on().contains(&EVENTS));
            assert!(plan.parameters()["max-bandwidth"].as_u64().unwrap() > 1 << 40);
            assert_eq!(plan.parameters()["tls-creds"], "");
            let downtime = plan.parameters().get("downtime-limit").and_then(Value::as_u64);
            assert_eq!(downtime, (plan.mode() == Mode::Live).then_some(20));
        }
    }
}
