//! What steers QEMU: an async QMP client with typed events in their exact order, and what checkpoints need of it.
//!
//! ```text
//!  Bridge ── reconnects ──► Client (many clones) ── commands ──► writer ──┐
//!     │                        ▲ replies, by id                          │ Unix socket   QEMU 7.2 … 10.0
//!     └─ state      Subscription ◄── notices ── Hub ◄── reader ◄─────────┘
//!
//!  machine: what is this VM, and what is in a checkpoint's way      migration: settings, start, progress, end
//!  control: stop, cont, reset, quit                                 Agent: the guest's file systems, on a socket of its own
//! ```
//!
//! What it keeps to:
//! - **One order.** All that comes from QEMU is numbered and handed out by one task, so that every event is before or
//!   after every reply, and a caller who has a reply has all events before it in its subscriptions.
//! - **Nothing is lost silently.** Subscriptions are bounded; one that is too slow is told how many events it missed,
//!   and where; a lost connection is told at its place among them.
//! - **Nothing is repeated.** After a lost connection nobody knows what was carried out. A [`Bridge`] reconnects, and
//!   the caller asks QEMU.
//! - **Every wait has a deadline, and every line a bound.** What answers may be another program, may hang, or may talk
//!   nonsense: [`ErrorKind`] tells these apart.
//! - **What is changed is put back.** [`migration::Plan::changes`] says beforehand what a later process needs for that.
//!
//! Command and reply types are those of crate `qapi-qmp`, generated from the schema of QEMU 9.1, where that fits all
//! versions. Replies whose fields differ between versions are read by small types that ask for what is needed and
//! ignore the rest; `qapi`'s own client is not used: it has no deadlines, takes lines of any length, and gives up on
//! an event that its schema does not have.
//!
//! Deliberately absent: what a checkpoint is, and when one may be taken. Transcripts of real QEMUs, with which this is
//! tested, are in `tests/transcripts`; `examples/record.rs` makes them, and its documentation says how.

mod agent;
mod bridge;
mod client;
mod connection;
pub mod control;
mod error;
mod event;
#[cfg(feature = "fake")]
pub mod fake;
mod handshake;
mod lines;
pub mod machine;
mod message;
pub mod migration;
mod subscription;

pub use agent::{Agent, AgentOptions, Frozen, thawing};
pub use bridge::{Backoff, Bridge, State};
pub use client::{Client, Options, Reply};
pub use error::{Error, ErrorKind, Refusal, Result};
pub use event::{Event, EventKind, MigrationStatus};
pub use message::Version;
pub use subscription::{Backlog, Notice, Subscription};
