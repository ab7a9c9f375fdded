//! Machines and checkpoints on the command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use cdp_types::{Label, VmName, VolumeName};
use clap::{Args, Subcommand, ValueEnum};
use jiff::SignedDuration;

/// What to do with machines.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Say which volumes are the disks of one machine, and how to reach its QEMU
    #[command(after_help = "Example:
  cdp-tool vm register web1 --qmp /run/web1.qmp --volume web1-root --volume web1-data

QEMU needs a QMP socket for us alone: -qmp unix:/run/web1.qmp,server=on,wait=off. A machine that is registered \
                      already is changed, and keeps its checkpoints; while it has any, its disks stay what they are.")]
    Register {
        /// Its name
        name: VmName,
        /// QEMU's QMP socket
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// A disk of it; all that it writes to, in order
        #[arg(long = "volume", value_name = "VOLUME", required = true)]
        volumes: Vec<VolumeName>,
        /// The socket of its guest agent, for us alone; as it was unless said, if the machine is registered already
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
        /// Delete its checkpoints, too; without, a machine that has any is not forgotten
        #[arg(long)]
        delete_checkpoints: bool,
    },
    /// Run a machine here: its QEMU with our disks, looked after until it ends
    #[command(after_help = "Examples:
  cdp-tool vm run web1 --volume web1 -- qemu-system-x86_64 -enable-kvm -m 4G -smp 4 -nic user -nographic
  cdp-tool vm run web1                       the same again
  cdp-tool vm run web1 --at before-upgrade   go on from a checkpoint instead of booting
  cdp-tool vm run web1 --print               show QEMU's whole command line, and do nothing

Added to the command line are memory that the disks' server can share, a disk for each --volume, and a QMP socket. \
                      The volumes are served if they are not. SIGTERM asks the guest to switch itself off; SIGINT, or a \
                      second SIGTERM, ends QEMU.")]
    Run(VmRunArgs),
    /// Make a copy of a machine, memory and all, and run it here
    #[command(after_help = "Examples:
  cdp-tool vm clone web1 web2                  as web1 is now; it runs on
  cdp-tool vm clone golden ci-7 --at booted    a machine that need not boot
  cdp-tool vm clone web1 web2 --at 3 -- qemu-system-x86_64 -m 4G -smp 4 -nic none

The copy's disks are clones, which take no space until they are written. Its memory is that of the original, and so are \
                      the addresses of its network cards and its host name: keep the two on separate networks.")]
    Clone(VmCloneArgs),
    /// Put a whole machine back to a checkpoint: disks, memory and devices
    #[command(after_help = "Examples:
  cdp-tool vm revert web1 --to before-upgrade

A machine that 'vm run' looks after is saved as it is now, and then put back. Of any other, end the QEMU first, and \
                      start it again with -incoming defer added to its command line.

The machine then goes on as it was at the checkpoint. What its disks were before stays as a branch of each: what \
                      undoes it is printed.")]
    Revert(VmRevertArgs),
}

/// A machine to be run.
#[derive(Debug, Args)]
pub(crate) struct VmRunArgs {
    /// Its name; it is registered if it is new
    pub(crate) name: VmName,
    /// A disk of it, with further properties of its device if there are any: web1,bootindex=0. As the last time unless said
    #[arg(long = "volume", value_name = "VOLUME[,PROPERTY=VALUE]")]
    pub(crate) volumes: Vec<VmDisk>,
    /// Go on from a checkpoint: its number or label
    #[arg(long, value_name = "CHECKPOINT", value_parser = checkpoint, conflicts_with = "boot")]
    pub(crate) at: Option<String>,
    /// Boot a clone, instead of going on from the memory that it was cloned with
    #[arg(long)]
    pub(crate) boot: bool,
    /// Add a port for the QEMU guest agent
    #[arg(long)]
    pub(crate) agent: bool,
    /// Only print QEMU's whole command line
    #[arg(long)]
    pub(crate) print: bool,
    #[command(flatten)]
    pub(crate) running: Running,
}

impl VmRunArgs {
    /// A machine that is known already.
    pub(crate) fn plain(name: VmName, running: Running) -> Self {
        Self { name, volumes: Vec::new(), at: None, boot: false, agent: false, print: false, running }
    }
}

/// A machine to be copied.
#[derive(Debug, Args)]
pub(crate) struct VmCloneArgs {
    /// The machine
    pub(crate) name: VmName,
    /// The copy's name
    pub(crate) new: VmName,
    /// As of which checkpoint, by its number or label; unless said, one is taken now
    #[arg(long, value_name = "CHECKPOINT", value_parser = checkpoint)]
    pub(crate) at: Option<String>,
    /// Only make it; start it later with: vm run NEW
    #[arg(long)]
    pub(crate) no_run: bool,
    #[command(flatten)]
    pub(crate) running: Running,
}

/// How a machine is run here.
#[derive(Clone, Debug, Args)]
pub(crate) struct Running {
    /// Where its sockets are made; in the store's directory unless said
    #[arg(long, value_name = "DIR")]
    pub(crate) sockets: Option<PathBuf>,
    /// How long its guest may take to switch itself off when it is asked to, before QEMU is ended
    #[arg(long, value_name = "TIME", default_value = "90s")]
    pub(crate) stop_timeout: Span,
    /// QEMU and its arguments; as the last time unless said
    #[arg(last = true, value_name = "QEMU")]
    pub(crate) command: Vec<String>,
}

/// A volume, with properties of the device that it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmDisk {
    pub(crate) volume: VolumeName,
    pub(crate) properties: String,
}

impl FromStr for VmDisk {
    type Err = cdp_types::NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (volume, properties) = text.split_once(',').unwrap_or((text, ""));
        Ok(Self { volume: volume.parse()?, properties: properties.to_owned() })
    }
}

/// The longest time that can be said: a century. It is added to clocks, which end somewhere.
const LONGEST: Duration = Duration::from_secs(36_525 * 24 * 3600);

/// A time that something takes: 90s, 5m, 1h30m.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let span = text.parse::<SignedDuration>().ok().and_then(|span| Duration::try_from(span).ok());
        let span = span.filter(|span| *span <= LONGEST);
        span.map(Self).ok_or_else(|| {
            format!("'{text}' is no time, or more than a century: say it as in 90s, 5m or 1h30m")
        })
    }
}

/// Back to which checkpoint, and what of it.
#[derive(Debug, Args)]
pub(crate) struct VmRevertArgs {
    /// The machine
    pub(crate) name: VmName,
    /// The checkpoint: its number or its label
    #[arg(long, value_name = "CHECKPOINT", value_parser = checkpoint)]
    pub(crate) to: String,
    /// Only the disks: the machine then boots from them
    #[arg(long)]
    pub(crate) disks_only: bool,
    /// Do not save a running machine as it is now before it is put back: its memory of now is then lost
    #[arg(long)]
    pub(crate) no_save: bool,
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Save a machine as it is now: memory, devices and disks
    #[command(after_help = "Examples:
  cdp-tool checkpoint take web1 --label before-upgrade
  cdp-tool checkpoint take web1 --mode live

Modes: hot stops the guest for tens of milliseconds, longer the more memory it has, and saves its memory as of then \
                      while it runs on; live copies memory first, and stops the guest for some 10 ms at the end, which is \
                      the instant; pause stops it until all is saved.

SIGINT or SIGTERM gives the checkpoint up; a second one ends the command without waiting for cdpd.")]
    Take {
        /// The machine
        vm: VmName,
        /// How; unless said, hot where that is possible, and else live
        #[arg(long)]
        mode: Option<Mode>,
        /// A name for it
        #[arg(long)]
        label: Option<Label>,
        /// Have the guest's agent still its file systems for the cut, so that what is on the disks is clean
        #[arg(long)]
        quiesce: bool,
        /// In mode live, how long to go on sending what the guest has changed again, until it can be stopped shortly [default: 10m]
        #[arg(long, value_name = "TIME")]
        give_up_after: Option<Span>,
    },
    /// Take checkpoints of a machine every so often, and delete the oldest of these
    #[command(after_help = "Examples:
  cdp-tool checkpoint schedule web1 --every 5m --keep 12
  cdp-tool checkpoint schedule web1 --off

Scheduled checkpoints are labelled auto-TIME. One that is pinned or labelled otherwise is kept, and does not count. \
                      While the machine is not running, none is taken.")]
    Schedule {
        /// The machine
        vm: VmName,
        /// From one to the next: 10s at least
        #[arg(long, value_name = "TIME", required_unless_present = "off")]
        every: Option<Span>,
        /// How many are kept
        #[arg(long, value_name = "N", default_value_t = 12)]
        keep: u64,
        /// How; unless said, hot where that is possible, and else live
        #[arg(long)]
        mode: Option<Mode>,
        /// No more
        #[arg(long, conflicts_with = "every")]
        off: bool,
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
        #[arg(value_parser = checkpoint)]
        checkpoint: String,
    },
    /// Give a checkpoint another name
    Label {
        /// The machine
        vm: VmName,
        /// Its number or label
        #[arg(value_parser = checkpoint)]
        checkpoint: String,
        /// The new name
        label: Label,
    },
    /// Keep a checkpoint from being deleted
    Pin {
        /// The machine
        vm: VmName,
        /// Its number or label
        #[arg(value_parser = checkpoint)]
        checkpoint: String,
    },
    /// Let a checkpoint be deleted again
    Unpin {
        /// The machine
        vm: VmName,
        /// Its number or label
        #[arg(value_parser = checkpoint)]
        checkpoint: String,
    },
    /// Delete a checkpoint; its instant of the disks stays
    Delete {
        /// The machine
        vm: VmName,
        /// Its number or label
        #[arg(value_parser = checkpoint)]
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

/// A checkpoint's number or label. It becomes part of a resource's name, and nothing else there: `3?` would be another one
/// than was said.
fn checkpoint(text: &str) -> Result<String, String> {
    let refusal = |_| "a checkpoint is named by its number or its label: see checkpoint list".to_owned();
    text.parse::<Label>().map(String::from).map_err(refusal)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use crate::cli::tests::parse;

    #[test]
    fn a_time_ends_before_clocks_do() {
        for (time, possible) in [("876600h", true), ("876601h", false), ("9223372036854775807s", false)] {
            let parsed = parse(&format!("cdp-tool vm run web1 --stop-timeout {time}"));
            assert_eq!(parsed.is_ok(), possible, "{time}");
        }
    }

    #[test]
    fn a_checkpoint_is_a_number_or_a_label() {
        for named in ["3", "before-upgrade", "auto-2026.11_21"] {
            assert!(parse(&format!("cdp-tool checkpoint delete web1 {named}")).is_ok(), "{named}");
        }
        for command in
            ["checkpoint delete web1", "checkpoint pin web1", "vm revert web1 --to", "vm run web1 --at"]
        {
            for odd in ["3?x", "3#x", "a/b", "%33"] {
                let refusal = parse(&format!("cdp-tool {command} {odd}")).unwrap_err();
                assert!(refusal.to_string().contains("checkpoint list"), "{command} {odd}: {refusal}");
            }
        }
    }
}
