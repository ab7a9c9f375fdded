//! The real storage: a directory, direct I/O, io_uring.
//!
//! | module | what it owns |
//! |---|---|
//! | `directory` | [`DirectoryStorage`]: names, opening, free space |
//! | `lock` | one owner per directory, and outwaiting the writes of a killed one |
//! | `alignment` | what the file system and the device demand |
//! | `file` | the blocking calls |
//! | `lane` | operations, watches and sleeping on one ring |
//! | `in_flight` | the memory that the kernel uses, until it has given it back |
//! | `ring` | setting a ring up, submitting, reaping |
//! | `waker` | getting a lane out of its sleep |
//!
//! Choices that were measured (ext4 on a virtio disk, Linux 6.18, two busy cores, random 4 KiB reads at depth 32 and
//! 256 KiB writes at depth 2, medians of 13 alternating runs: all variants within 8 % of each other, and each one's own
//! runs further apart than that):
//! - Files are not registered with the ring: it made no difference that could be told from noise, and the kernel
//!   would keep a removed segment's blocks for as long as the table names it. The table holds the lock alone.
//! - `COOP_TASKRUN` and `TASKRUN_FLAG`, so that looking for completions without sleeping costs no system call.
//!   `SINGLE_ISSUER` and `DEFER_TASKRUN` gained nothing either, and would bind a lane to the first thread that polls
//!   it: a lane dropped by another could not even collect what is in flight.

mod alignment;
mod directory;
mod file;
mod in_flight;
mod lane;
mod lock;
mod ring;
#[cfg(test)]
mod tests;
mod waker;

pub use directory::{DirectoryStorage, OUTWAIT};
