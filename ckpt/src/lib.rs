//! Checkpoints: a running machine's memory and devices, taken out of QEMU and put back.
//!
//! ```text
//!  QEMU ── migrate ──► StreamReader ── pages ──► Saver ────► PageStore (a volume's DeviceQueue)
//!                          └── everything else, as bytes ──►   │   header, slots, RAM blocks, opaque parts
//!  QEMU ◄─ -incoming ─ StreamWriter ◄─ pages ── Restorer ◄─────┘
//! ```
//!
//! - [`stream`] knows QEMU's migration stream: what is memory in it and what is not, and nothing of devices.
//! - [`memory`] keeps a machine's memory on a volume, each page at its place, and writes only what has changed.
//!
//! What it keeps to:
//! - **A stream is untrusted.** Whatever comes ends in a clear error with its position: no panic, and no more memory
//!   than [`stream::Limits`] allow.
//! - **Whole or not at all.** A stream that was cut short, or in which a page of memory never came, makes no image
//!   that anyone can restore.
//! - **No allocation for a page**, on its way in or out.
//!
//! Above these, [`take`] runs a checkpoint from QEMU's first byte to the record that commits it, [`gate`] cuts the disks'
//! epoch in the middle of it, and [`restore`] puts a machine back. [`doctor`] says beforehand what is in the way, and
//! [`firsts`] shortens what a guest waits for after its stop.
//!
//! Deliberately absent: which machines there are, and vhost-user. The guard of guest memory comes in as a trait.

#![deny(unsafe_code)]

mod coverage;
pub mod doctor;
mod error;
pub mod firsts;
pub mod gate;
pub mod memory;
#[allow(unsafe_code)]
mod protection;
pub mod receiver;
pub mod restore;
pub mod stream;
pub mod take;

pub use error::{Error, ErrorKind, Place};

/// Bytes in a page of an x86 guest, and in a block of a volume: `TARGET_PAGE_SIZE` in QEMU.
pub const PAGE_SIZE: usize = 4096;

// A page is a block of the volume, so that a changed page is one changed block.
const _: () = assert!(PAGE_SIZE as u64 == cdp_types::BLOCK_SIZE);

/// A page of zeroes, to compare with.
pub(crate) const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
