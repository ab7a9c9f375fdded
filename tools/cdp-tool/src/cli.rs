//! The command line. Help, manual pages and completions all come from these definitions.

use std::path::PathBuf;

use cdp_types::{Label, VolumeName};
use cdpd::size::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

mod doctor;
mod history;
mod machines;

pub(crate) use doctor::DoctorCommand;
pub(crate) use history::{BranchCommand, CloneArgs, MarkArgs, RevertArgs};
pub(crate) use machines::{
    CheckpointCommand, Mode, Running, VmCloneArgs, VmCommand, VmDisk, VmRevertArgs, VmRunArgs,
};

const INSTANTS: &str = "Instants:
  head                             the present (a volume's name alone means it too)
  -5m, -90s, -1h30m, -2d           that long ago
  2026-11-21T10:32:05.123456789Z   a time, with its offset from UTC (or +01:00)
  10:32:05, '2026-11-21 10:32:05'  a local time; without a date, the last time it was that late
  seq:N                            up to and including a change
  flush:-1                         the last flush; flush:-2 the one before it
  mark:NAME, epoch:N               a named instant, that of a machine's checkpoint";

/// Volumes that remember every write: make them, serve them, look into their past.
///
/// Commands that change something, and those about machines, need a running cdpd; rebuild-index needs a stopped
/// one. The others also work on a stopped store, or on a copy of one.
#[derive(Debug, Parser)]
#[command(
    name = "cdp-tool",
    version,
    after_help = "Exit status: 0 success, 1 a negative finding (verify found damage, doctor an obstacle), 2 \
                  failure."
)]
pub(crate) struct Cli {
    /// The store's directory
    #[arg(long, global = true, value_name = "DIR", env = "CDP_STORE")]
    pub(crate) store: Option<PathBuf>,
    /// Answer in JSON: one value, or one object a line for what is listed
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, list, change, serve and destroy volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Put volumes back to an instant; nothing is deleted, so it can be undone
    Revert(RevertArgs),
    /// Make volumes that share the history of others up to an instant
    Clone(CloneArgs),
    /// Name an instant of a volume, to find it again
    Mark(MarkArgs),
    /// List a volume's marks
    #[command(after_help = "Example:
  cdp-tool marks web1")]
    Marks {
        /// The volume
        volume: VolumeName,
    },
    /// Forget a mark; the instant that it names stays
    #[command(after_help = "Example:
  cdp-tool unmark web1 before-upgrade")]
    Unmark {
        /// The volume
        volume: VolumeName,
        /// The mark's name
        label: Label,
    },
    /// List and delete branches: what reverts have left behind
    #[command(subcommand)]
    Branch(BranchCommand),
    /// Register, list and put back machines: a QEMU, its disks and its memory
    #[command(subcommand)]
    Vm(VmCommand),
    /// Save running machines, memory and all, and list what was saved
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Find out what is in the way of something, and what cures it
    #[command(subcommand)]
    Doctor(DoctorCommand),
    /// Look into the store, its segments, and the records and the map of a volume
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Check every checksum of the logs, and the index against them
    #[command(
        after_help = "Exit status: 0 if all is well, 1 if something is damaged, 2 if that could not be found out.

Example:
  cdp-tool --store /srv/cdp verify"
    )]
    Verify,
    /// Make the index again from the logs alone; cdpd must be stopped
    #[command(after_help = "Example:
  systemctl stop cdpd@cdp
  cdp-tool --store /srv/cdp rebuild-index")]
    RebuildIndex,
    /// Write a volume, as it was at an instant, to a file
    #[command(
        after_help = INSTANTS,
        after_long_help = extract_help()
    )]
    Extract {
        /// The volume and the instant: web1, web1@-5m, web1@mark:before-upgrade
        #[arg(value_name = "VOLUME@INSTANT", allow_hyphen_values = true)]
        what: String,
        /// The file: raw and sparse, or qcow2 if its name ends in .qcow2. One that exists is replaced once
        /// the new one is complete
        file: PathBuf,
    },
    /// Print shell completions
    #[command(after_help = "Example:
  cdp-tool completions bash > /etc/bash_completion.d/cdp-tool")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write manual pages
    #[command(after_help = "Example:
  cdp-tool man /usr/local/share/man/man1")]
    Man {
        /// Where to
        directory: PathBuf,
    },
}

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume, empty or from an image
    #[command(after_help = "Examples:
  cdp-tool volume create web1 --size 10G
  cdp-tool volume create web1 --from debian.qcow2
  cdp-tool volume create web1 --from disk.img --format raw --size 20G

The volume appears once the whole image is in it, or not at all. Holes of the image stay holes.")]
    Create(CreateArgs),
    /// List the volumes
    List,
    /// Show a volume: its head, how it is served, its marks
    #[command(after_help = "Example:
  cdp-tool volume show web1 --json")]
    Show {
        /// The volume
        name: VolumeName,
    },
    /// Make a volume larger; volumes do not shrink
    #[command(after_help = "Example:
  cdp-tool volume resize web1 20G")]
    Resize {
        /// The volume
        name: VolumeName,
        /// The new size, as in 20G
        #[arg(required_unless_present = "size_flag")]
        size: Option<ByteSize>,
        /// The same, as a flag
        #[arg(long = "size", value_name = "SIZE", conflicts_with = "size", id = "size_flag")]
        size_flag: Option<ByteSize>,
    },
    /// Give a volume another name
    #[command(after_help = "Example:
  cdp-tool volume rename web1 web1-old")]
    Rename {
        /// The volume
        name: VolumeName,
        /// Its new name
        new: VolumeName,
    },
    /// Destroy a volume and its whole history, but for what clones share of it
    #[command(after_help = "Example:
  cdp-tool volume destroy web1 --yes

What clones share of its history stays as long as they need it: a volume can be destroyed under its \
                      clones, and gives back its space when the last of them is gone.")]
    Destroy {
        /// The volume
        name: VolumeName,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Even if a guest is served with it, whose requests then fail
        #[arg(long)]
        force: bool,
    },
    /// Serve a volume to a guest, now and whenever cdpd starts
    #[command(after_help = "Example:
  cdp-tool volume serve web1 --vhost-user /run/cdpd-cdp/web1.sock

QEMU attaches it with shared memory and these options:
  -object memory-backend-memfd,id=mem,size=2G,share=on -machine memory-backend=mem
  -chardev socket,id=web1,path=/run/cdpd-cdp/web1.sock,reconnect-ms=100
  -device vhost-user-blk-pci,chardev=web1
Before QEMU 9.2 it is reconnect=1, in seconds.")]
    Serve {
        /// The volume
        name: VolumeName,
        /// The vhost-user socket to make
        #[arg(long, value_name = "SOCKET")]
        vhost_user: PathBuf,
        /// The most queues that a guest can use, up to 256
        #[arg(long, value_name = "N", default_value_t = cdpd::DEFAULT_QUEUES)]
        queues: u16,
    },
    /// Stop serving a volume
    Unserve {
        /// The volume
        name: VolumeName,
    },
}

/// What the new volume is to be.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: letters, digits, '.', '_' and '-'
    pub(crate) name: VolumeName,
    /// Its size, as in 10G: a multiple of 4096 bytes; that of the image, rounded up, if there is one
    #[arg(long, required_unless_present = "from")]
    pub(crate) size: Option<ByteSize>,
    /// An image to fill it with: raw, or whatever qemu-img reads
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
    /// The image's format, rather than what it looks like
    #[arg(long, requires = "from")]
    pub(crate) format: Option<ImageFormat>,
    /// What the guest addresses, in bytes
    #[arg(long, value_name = "512|4096", default_value = "512", value_parser = block_size)]
    pub(crate) block_size: u32,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    Raw,
    Qcow2,
    Qed,
    Vdi,
    Vhdx,
    Vmdk,
    Vpc,
}

impl ImageFormat {
    /// Its name, as qemu-img has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
        }
    }
}

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum InspectCommand {
    /// The store: its id, its generation, what it uses
    Store,
    /// The segments of the logs
    Segments,
    /// The changes of a volume, oldest first
    #[command(after_help = INSTANTS, after_long_help = records_help())]
    Records(RecordsArgs),
    /// Where the blocks of a volume are, as of an instant
    #[command(after_help = INSTANTS)]
    Map {
        /// The volume and the instant: web1, web1@-5m
        #[arg(value_name = "VOLUME@INSTANT")]
        what: String,
    },
}

/// Which records.
#[derive(Debug, Args)]
pub(crate) struct RecordsArgs {
    /// The volume
    pub(crate) volume: VolumeName,
    /// Only changes after this instant
    #[arg(long, value_name = "INSTANT", allow_hyphen_values = true)]
    pub(crate) from: Option<String>,
    /// Only changes up to and including this instant
    #[arg(long, value_name = "INSTANT", allow_hyphen_values = true, default_value = "head")]
    pub(crate) to: String,
    /// At most so many
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
}

fn extract_help() -> String {
    format!(
        "Examples:
  cdp-tool extract web1 web1.raw
  cdp-tool extract web1@-5m web1.qcow2
  cdp-tool extract 'web1@2026-11-21 10:32:05' web1.raw

{INSTANTS}"
    )
}

fn records_help() -> String {
    format!(
        "Examples:
  cdp-tool inspect records web1 --from -5m
  cdp-tool inspect records web1 --from mark:before-upgrade --limit 100 --json

{INSTANTS}"
    )
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("512 or 4096 is possible".to_owned()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::CommandFactory;

    use super::*;

    pub(super) fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn global_options_may_come_last() {
        let cli = parse("cdp-tool volume list --json --store /srv/cdp").unwrap();
        assert!(cli.json);
        assert_eq!(cli.store.unwrap(), PathBuf::from("/srv/cdp"));
    }

    #[test]
    fn instants_that_look_like_options_are_none() {
        let Command::Inspect(InspectCommand::Records(args)) =
            parse("cdp-tool inspect records web1 --from -5m --to -1m30s").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((args.from.unwrap().as_str(), args.to.as_str()), ("-5m", "-1m30s"));
    }

    #[test]
    fn a_volume_has_a_size_from_somewhere() {
        assert!(parse("cdp-tool volume create web1").is_err());
        assert!(parse("cdp-tool volume create web1 --size 10G --block-size 4096").is_ok());
        assert!(parse("cdp-tool volume create web1 --from x.raw").is_ok());
        assert!(parse("cdp-tool volume create web1 --size 10G --format raw").is_err());
        assert!(parse("cdp-tool volume resize web1").is_err());
        assert!(parse("cdp-tool volume resize web1 10G").is_ok());
        assert!(parse("cdp-tool volume resize web1 --size 10G").is_ok());
    }

    #[test]
    fn bad_values_say_what_is_expected() {
        for (line, part) in [
            ("cdp-tool volume create web1 --size 10GB", "as in 10G"),
            ("cdp-tool volume create a/b --size 1G", "not a valid volume name"),
            ("cdp-tool volume create web1 --size 1G --block-size 1024", "512 or 4096"),
            ("cdp-tool mark web1 a:b", "not a valid mark label"),
            ("cdp-tool volume serve web1", "--vhost-user"),
            ("cdp-tool vm run web1 --volume a/b,bootindex=0", "not a valid volume name"),
            ("cdp-tool checkpoint schedule web1 --every 5", "as in 90s"),
            ("cdp-tool checkpoint schedule web1", "--every"),
        ] {
            let refusal = parse(line).unwrap_err();
            assert!(refusal.to_string().contains(part), "{line}: {refusal}");
            assert_eq!(refusal.exit_code(), 2);
        }
    }
}
