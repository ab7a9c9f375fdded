//! The store as a whole: on a real directory, against a reference, and through every crash of a simulated machine.
#![allow(clippy::unwrap_used)]

mod content;
mod crash;
mod guest;
mod machine;
mod model;
mod reference;
mod smoke;
