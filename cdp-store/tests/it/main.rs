//! The store as a whole: on a real directory, against a reference, and through every crash of a simulated machine.
#![allow(clippy::unwrap_used)]

mod bench;
mod branches;
mod branching;
mod checkpointing;
mod checkpoints;
mod content;
mod crash;
mod faults;
mod guest;
mod machine;
mod model;
mod reference;
mod rot;
mod smoke;
