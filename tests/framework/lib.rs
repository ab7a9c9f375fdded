//! A test bed for the whole system: guests under QEMU, the daemon under test, and the crashes.
//!
//! - [`Scene`] is one test's directory, and the judge of every log that is written into it.
//! - [`Cdpd`] starts, kills and restarts the daemon; [`Tool`] runs `cdp-tool` on its store.
//! - [`Guest`] is a small Linux under QEMU (no KVM: CI has none) that runs commands sent to it.
//! - [`Image`] is a disk image taken out of a store, to be checked and read without a guest.
//! - [`workload`] says what every test file contains, so that the guest which writes it and the host
//!   which reads it out of the past agree without exchanging data.
//!
//! Everything waits with a deadline, ends only processes that it started, and fails loudly where a
//! program is missing. The programs under test come from [`programs`]; nothing here links them.

pub mod agent;
mod cdpd;
mod cpio;
pub mod debian;
mod guest;
mod image;
mod initramfs;
mod kernel;
pub mod process;
pub mod programs;
mod qmp;
mod scene;
mod storage_daemon;
pub mod workload;

pub use cdpd::{Cdpd, Tool};
pub use guest::{Boot, Guest, GuestBuilder, Running};
pub use image::Image;
pub use qmp::Qmp;
pub use scene::{Scene, run_scene};
pub use storage_daemon::StorageDaemon;
