//! Whether a machine can be checkpointed, what is in the way, and what cures it.
//!
//! One list of checks serves both who asks beforehand and [`crate::take`], which refuses what a check finds in the way
//! of its mode. Nothing here changes anything: QEMU is asked, and `/proc` is read.

mod host;
mod machine;

use std::fmt;

use cdp_store::CheckpointMode;
use serde::{Deserialize, Serialize};

use crate::gate::Unguarded;

pub use host::of_process;
pub(crate) use machine::{hot_doubt, leaves_protection};
pub use machine::{of_machine, of_settings};

/// All modes, in the order in which they are preferred.
pub const MODES: [CheckpointMode; 3] = [CheckpointMode::Hot, CheckpointMode::Live, CheckpointMode::Pause];

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing is in the way here.
    Ok,
    /// Some modes cannot work: [`Check::hinders`] has them.
    InTheWay,
    /// It cannot be told from here, and a checkpoint is worth a try.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::InTheWay => "in the way",
            Self::Unknown => "unknown",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What it is: `memory`, `disk 'web1'`.
    pub subject: String,
    /// How it went.
    pub verdict: Verdict,
    /// What was found, in one line.
    pub found: String,
    /// What to do about it, in one line: an option, a setting, a command.
    pub cure: Option<String>,
    /// The modes that it makes impossible.
    pub hinders: Vec<CheckpointMode>,
}

impl Check {
    /// Nothing is in the way.
    pub fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        let (subject, found) = (subject.into(), found.into());
        Self { subject, verdict: Verdict::Ok, found, cure: None, hinders: Vec::new() }
    }

    /// It makes these modes impossible.
    pub fn in_the_way(
        hinders: &[CheckpointMode],
        subject: impl Into<String>,
        found: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        let (verdict, hinders) = (Verdict::InTheWay, hinders.to_vec());
        Self { verdict, hinders, cure: Some(cure.into()), ..Self::ok(subject, found) }
    }

    /// It cannot be told from here.
    pub fn unknown(subject: impl Into<String>, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { verdict: Verdict::Unknown, cure: Some(cure.into()), ..Self::ok(subject, found) }
    }

    /// What a disk's guard has to say of its memory.
    #[must_use]
    pub fn of_guard(disk: &str, prepared: &Result<i32, Unguarded>) -> Self {
        let subject = format!("guard of {disk}");
        match prepared {
            Ok(pid) => Self::ok(subject, format!("the memory of process {pid} can be guarded")),
            Err(Unguarded { why, cure, .. }) => {
                Self::in_the_way(&[CheckpointMode::Hot], subject, why.clone(), cure.clone())
            }
        }
    }

    /// Whether it makes a mode impossible.
    #[must_use]
    pub fn hinders(&self, mode: CheckpointMode) -> bool {
        self.hinders.contains(&mode)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.found)?;
        match &self.cure {
            Some(cure) => write!(f, ": {cure}"),
            None => Ok(()),
        }
    }
}
