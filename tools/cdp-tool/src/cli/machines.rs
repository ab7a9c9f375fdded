//! Machines and checkpoints on the command line.

use std::path::PathBuf;

use cdp_types::{Label, VmName, VolumeName};
use clap::{Args, Subcommand, ValueEnum};

/// What to do with machines.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Say which volumes are the disks of one machine, and how to reach its QEMU
    #[command(after_help = "Example:
  cdp-tool vm register web1 --qmp /run/web1.qmp --volume web1-root --volume web1-data

QEMU needs a QMP socket for us alone: -qmp unix:/run/web1.qmp,server=on,wait=off")]
    Register {
        /// Its name
        name: VmName,
        /// QEMU's QMP socket
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// A disk of it; all that it writes to, in order
        #[arg(long = "volume", value_name = "VOLUME", required = true)]
        volumes: Vec<VolumeName>,
        /// The socket of its guest agent, for us alone
        #[arg(long, value_name = "SOCKET")]
        agent: Option<PathBuf>,
    },
    /// List the machines
    List,
    /// Show a machine
    Show {
        /// The machine
        name: VmName,
    },
    /// Forget a machine; its disks stay
    Remove {
        /// The machine
        name: VmName,
        /// Delete its checkpoints, too
        #[arg(long)]
        delete_checkpoints: bool,
    },
    /// Put a whole machine back to a checkpoint: disks, memory and devices
    #[command(
        after_help = "Example: end its QEMU, start it again with -incoming defer added to its command line, and
  cdp-tool vm revert web1 --to before-upgrade

The machine then goes on as it was at the checkpoint. What its disks were before stays as a branch of each: the \
                      instants that undo it are printed."
    )]
    Revert(VmRevertArgs),
}

/// Back to which checkpoint, and what of it.
#[derive(Debug, Args)]
pub(crate) struct VmRevertArgs {
    /// The machine
    pub(crate) name: VmName,
    /// The checkpoint: its number or its label
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) to: String,
    /// Only the disks: the machine then boots from them
    #[arg(long)]
    pub(crate) disks_only: bool,
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Save a machine as it is now: memory, devices and disks
    #[command(after_help = "Examples:
  cdp-tool checkpoint take web1 --label before-upgrade
  cdp-tool checkpoint take web1 --mode live

Modes: hot stops the guest for milliseconds and saves its memory while it runs on; live copies memory first and stops \
                      for the rest; pause stops it until all is saved.")]
    Take {
        /// The machine
        vm: VmName,
        /// How
        #[arg(long, default_value = "hot")]
        mode: Mode,
        /// A name for it
        #[arg(long)]
        label: Option<Label>,
        /// Have the guest's agent still its file systems for the cut, so that what is on the disks is clean
        #[arg(long)]
        quiesce: bool,
    },
    /// Give up the checkpoint that is being taken
    Cancel {
        /// The machine
        vm: VmName,
    },
    /// List a machine's checkpoints
    List {
        /// The machine
        vm: VmName,
    },
    /// Show a checkpoint and what it cost
    Show {
        /// The machine
        vm: VmName,
        /// Its number or label
        checkpoint: String,
    },
    /// Give a checkpoint another name
    Label {
        /// The machine
        vm: VmName,
        /// Its number or label
        checkpoint: String,
        /// The new name
        label: Label,
    },
    /// Keep a checkpoint from being deleted
    Pin {
        /// The machine
        vm: VmName,
        /// Its number or label
        checkpoint: String,
    },
    /// Let a checkpoint be deleted again
    Unpin {
        /// The machine
        vm: VmName,
        /// Its number or label
        checkpoint: String,
    },
    /// Delete a checkpoint; its instant of the disks stays
    Delete {
        /// The machine
        vm: VmName,
        /// Its number or label
        checkpoint: String,
    },
}

/// How a checkpoint is taken.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Mode {
    Hot,
    Live,
    Pause,
}
