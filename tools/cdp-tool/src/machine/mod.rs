//! Machines that are run from here: QEMU's command line, its process, and the daemon's orders.

pub(crate) mod command;
pub(crate) mod supervisor;
