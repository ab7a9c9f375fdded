//! The daemon: one store, its volumes served to guests, and an HTTP API to steer it.
//!
//! [`Daemon`] is the whole of it, for the `cdpd` program and for tests in one process. [`api`] holds what
//! goes over the API's wire, [`frames`] the stream in which a volume's content goes, and [`client`] the other
//! end of both; with [`inspect`] and [`content`], `cdp-tool` looks into a stopped store without a daemon.
//!
//! # Where things may block
//! Every call of the store may block, so none is made from an asynchronous task: requests go through
//! `http::blocking`, and answers that go on for long are produced by a thread of their own (`http::stream`).

pub mod api;
mod args;
mod callback;
pub mod client;
pub mod config;
pub mod content;
mod daemon;
pub mod frames;
mod http;
pub mod inspect;
pub mod logging;
mod machines;
mod nbd;
mod open_files;
mod serving;
pub mod size;
pub mod socket;
pub mod systemd;

pub use args::Args;
pub use callback::Callback;
pub use config::Config;
pub use daemon::Daemon;
pub use nbd::{Nbd, NbdAddress};
pub use open_files::allow_open_files;
pub use serving::{DEFAULT_QUEUES, MAX_QUEUES};
