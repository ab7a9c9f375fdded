//! What the host and the agent in the guest say to each other: one JSON object a line, over a serial port.

use serde::{Deserialize, Serialize};

/// From the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in every [`Event`] of this command.
    pub id: u64,
    /// For the guest's `sh -c`.
    pub command: String,
}

/// From the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The agent has started: the guest has booted, or booted again.
    Hello,
    /// A line of a command's output (stdout and stderr together), without its newline.
    Line {
        /// Whose.
        id: u64,
        /// The line; bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// A command has ended; its output is complete.
    Exit {
        /// Whose end.
        id: u64,
        /// Its exit status; 128 + the signal that ended it, as shells say it.
        status: i32,
    },
}
