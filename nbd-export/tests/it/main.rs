//! The server from outside: a client that speaks the protocol byte by byte, and clients that others wrote.

#![allow(clippy::unwrap_used, missing_docs)]

mod client;
mod fixture;
mod fuzz;
mod handshake;
mod hostile;
mod lifecycle;
mod model;
mod programs;
mod psk;
mod requests;
mod tls;
mod wakeups;
