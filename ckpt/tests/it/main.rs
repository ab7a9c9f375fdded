//! Streams and memory images from outside: made-up machines, and real ones under QEMU.

#![allow(clippy::unwrap_used, missing_docs)]

mod fuzz;
mod gate;
mod image;
mod machine;
mod model;
mod qemu;
mod qmp;
mod stream;
mod take;
