//! Asking beforehand.

use cdp_types::VmName;
use clap::Subcommand;

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum DoctorCommand {
    /// Can this machine be checkpointed, in which modes, what is in the way, and what cures it
    #[command(
        after_help = "Exit status: 0 if a hot checkpoint is possible, 1 if something is in its way, 2 if that could not \
                      be found out.

Example:
  cdp-tool doctor vm web1

Nothing is changed, and the guest does not notice."
    )]
    Vm {
        /// The machine
        name: VmName,
    },
}
