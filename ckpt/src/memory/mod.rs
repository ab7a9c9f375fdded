//! A machine's memory on a volume: a *memory image*.
//!
//! Its bytes are described in `docs/format.md`, *Memory image*. Each RAM block has a *slot*, a range of the volume
//! that is reserved for it by name. The next image on the same volume gives the block the same slot, so that an
//! unchanged page is an unchanged block of the volume, and its history costs nothing. What is not memory has slots as
//! well.
//!
//! # What is durable, and when
//!
//! [`Saver`] writes in this order:
//!
//! 1. the header, as *unfinished*, with the new slots; flush. From here on nobody restores the volume as it is.
//! 2. zeroes where blocks have gone, and all pages that differ from what the volume holds.
//! 3. the opaque parts; flush.
//! 4. the header, as *complete*; flush. From here on the image can be restored.
//!
//! A crash in between leaves an unfinished image, or, if it tore the header, a damaged one. Both are refused; the
//! caller goes back to what the volume held before, or saves over an unfinished one: pages are compared with what is
//! there, not with what should be there.

mod format;
mod layout;
mod pages;
mod pipeline;
mod queue;
mod restorer;
mod saver;
mod store;

pub use format::{Image, MachineFacts};
pub use layout::capacity_for;
pub use pages::MemoryPages;
pub use queue::QueueStore;
pub use restorer::Restorer;
pub use saver::{Saver, save_stream};
pub use store::{Completion, PageStore, Request};

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::Error;

/// How long to wait for the volume before looking whether the caller still wants it.
const PATIENCE: Duration = Duration::from_millis(50);

/// How far saving or restoring has come. Pages are 4096 bytes each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The machine's memory, in pages.
    pub total: u64,
    /// Pages that came out of the stream, or went into it; live, a page may come several times.
    pub received: u64,
    /// Of those, pages of zeroes.
    pub zero: u64,
    /// Pages that differed from what the volume held.
    pub changed: u64,
    /// Bytes written to the volume; pages that became zero are not among them.
    pub stored_bytes: u64,
}

/// The caller's hold on something that takes long.
pub struct Control<'a> {
    /// Set from any thread to have it end soon, with an error of kind `Cancelled`. Whoever waits for a socket hears
    /// of it only when the socket is shut down, or has a timeout.
    pub cancel: &'a AtomicBool,
    /// Called every few megabytes, and at the end.
    pub progress: &'a mut dyn FnMut(&Progress),
}

impl Control<'_> {
    fn check(&self) -> Result<(), Error> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::cancelled()) } else { Ok(()) }
    }
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("cancel", self.cancel).finish_non_exhaustive()
    }
}
