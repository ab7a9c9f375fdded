//! Machines that are run from here: QEMU's command line, its process, and the daemon's orders.

pub(crate) mod command;
pub(crate) mod supervisor;

/// What is said of a machine that goes on from a checkpoint for which its file systems were stilled, if the daemon cannot say
/// that they were let go.
pub(crate) fn still_frozen(why: &str) -> String {
    format!(
        "its file systems were stilled for the checkpoint and may still be: {why}; thaw them through its agent"
    )
}
