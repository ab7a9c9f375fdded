//! The vhost-user-blk server: serves any [`cdp_types::BlockDevice`] to a virtual machine.
//!
//! ```text
//!  front end (QEMU) ── socket ── connection's thread: server → session → rings
//!                                    │ commands (a channel and an eventfd)
//!  guest ── virtqueue, kick, call ── queue's thread: worker → queue → chain, request
//!                                    │                          └ guest (all access to guest memory)
//!                                    │                          └ guard, while a window is open: parks
//!                                    │                            requests until their pages are touched
//!                                    └── DeviceQueue::poll, the one place to sleep
//! ```
//!
//! What it keeps to:
//! - **The guest is not trusted.** A request that is wrong is answered with an error; a ring whose requests cannot
//!   be answered is stopped, with one line in the log and a signal to the front end, until the guest resets. Every
//!   value is read from guest memory once. Memory per queue is bounded by its size and
//!   [`ServerConfig::queue_bytes`].
//! - **A request is answered once.** With an in-flight region (the `inflight` module says how), that holds across
//!   `kill -9` of this process too.
//! - **Nothing is taken for granted at a stop.** When a ring has been stopped or disabled, nothing is in flight and
//!   nothing more is written to guest memory for it.
//! - **While a [`Guard`]'s window is open, no page of guest memory is written that was not touched**: what a background
//!   snapshot of QEMU saves is then the memory of one instant.
//! - **The path of a request takes no lock and allocates nothing** for requests of up to four segments; requests
//!   are submitted, reported and signalled in batches.
//!
//! Deliberately absent: packed rings, IOMMU, postcopy, secure erase, zones (front ends do not negotiate them for
//! block devices, or not by default), and STATUS, at which the `vhost` crate ends the connection. The crates
//! `virtio-queue` and `vhost-user-backend` are not used: the former's iterator ends without a word at a
//! malformed chain and reports requests one by one, where the in-flight protocol wants batches; the latter's
//! dirty log takes a lock for each mark and can be made only by its own handler.

mod back_channel;
mod chain;
mod config;
mod config_space;
mod error;
mod eventfd;
mod features;
mod guard;
mod guest;
mod inflight;
mod queue;
mod request;
mod rings;
mod server;
mod session;
mod spin;
mod stats;
mod worker;
mod write_cache;

pub use config::ServerConfig;
pub use error::{Error, ErrorKind};
pub use guard::{FilePage, Guard, GuardRefusal, GuardStats, GuardTarget, GuardTrouble, Window};
pub use server::Server;
pub use stats::{QueueStats, ServerStats};
pub use write_cache::{ExpectedOff, WriteCache};
