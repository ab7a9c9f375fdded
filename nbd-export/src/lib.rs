//! The NBD server: serves any [`cdp_types::BlockDevice`] over Unix and TCP sockets, by name.
//!
//! ```text
//!  client ── socket ── accept's thread ── a worker's thread (one io_uring runtime, many connections)
//!                                          │
//!                         handshake ── Exports::open(name) ── Export
//!                                          │
//!                         session:  reader ─► device ─► writer     (one task, polled in this order)
//!                                        └──► status ──┘           (block status; off the thread)
//!                                          └── DeviceQueue
//! ```
//!
//! What it keeps to:
//! - **The client is not trusted.** Whatever it sends is answered with an error, or ends its connection, and costs
//!   nobody else anything: memory is bounded per connection and in total ([`Limits`]), replies that it does not read
//!   stop its requests from being read, and a handshake has a deadline.
//! - **A name means one thing per connection.** What [`Exports::open`] returned for it during the handshake is what
//!   is served, however often it was asked about before.
//! - **An [`Export`] is dropped when its last connection is through with it**: nothing is in flight any more, and
//!   the device's queue is closed.
//! - **Batches.** All requests that one receive has brought are submitted before the device is polled, and all that
//!   has ended by then is answered in one send. Payloads are received into, and sent from, the memory that the device
//!   uses.
//!
//! Deliberately absent: the oldstyle handshake and RESIZE (no client has it). Names and instants mean nothing here:
//! [`Exports`] gives them their meaning. What of the protocol is supported is in `docs/nbd-protocol.md`.

mod accept;
mod config;
mod connection;
mod control;
mod error;
mod exports;
mod handshake;
mod input;
mod memory;
mod outgoing;
mod protocol;
mod rounds;
mod server;
mod session;
mod socket;
mod transport;
mod worker;

pub use config::{Limits, Listen, ServerConfig, Tls, TlsCredentials, TlsMode};
pub use control::ConnectionInfo;
pub use error::{Error, ErrorKind};
pub use exports::{
    Export, ExportEntry, ExportError, ExportErrorKind, Exports, STATE_DIRTY, STATE_HOLE, STATE_ZERO,
    StatusContext, StatusExtent,
};
pub use server::Server;
pub use socket::Address;
