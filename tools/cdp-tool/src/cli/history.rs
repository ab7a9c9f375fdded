//! Commands about history: marks, reverts, clones, branches.

use cdp_types::{BranchId, Label, VolumeName};
use clap::{Args, Subcommand};

use super::INSTANTS;

/// What is to be named.
#[derive(Debug, Args)]
#[command(after_help = INSTANTS, after_long_help = mark_help())]
pub(crate) struct MarkArgs {
    /// The volume, and the instant if it is not the present: web1, web1@-5m
    #[arg(value_name = "VOLUME[@INSTANT]")]
    pub(crate) what: String,
    /// The name: letters, digits, '.', '_' and '-'
    pub(crate) label: Label,
    /// Something to keep with it; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,
}

/// What is to go back, and where to.
#[derive(Debug, Args)]
#[command(after_help = INSTANTS, after_long_help = revert_help())]
pub(crate) struct RevertArgs {
    /// The volumes, each with its instant (web1@-5m), or all with that of --at
    #[arg(value_name = "VOLUME[@INSTANT]", required = true)]
    pub(crate) what: Vec<String>,
    /// The instant for all of them
    #[arg(long, value_name = "INSTANT", allow_hyphen_values = true)]
    pub(crate) at: Option<String>,
    /// Even if guests run on them: those are disconnected, and their requests fail until they are reset
    #[arg(long)]
    pub(crate) force: bool,
}

/// What is to be cloned.
#[derive(Debug, Args)]
#[command(after_help = INSTANTS, after_long_help = clone_help())]
pub(crate) struct CloneArgs {
    /// A volume, perhaps at an instant, and the name of its clone; or several pairs, as in web1=web1-test
    #[arg(value_name = "VOLUME[@INSTANT] NEW | VOLUME[@INSTANT]=NEW", required = true)]
    pub(crate) what: Vec<String>,
    /// The instant for all of them
    #[arg(long, value_name = "INSTANT", allow_hyphen_values = true)]
    pub(crate) at: Option<String>,
}

/// What to do with branches.
#[derive(Debug, Subcommand)]
pub(crate) enum BranchCommand {
    /// List a volume's branches, oldest first: each revert begins one
    #[command(after_help = "Example:
  cdp-tool branch list web1")]
    List {
        /// The volume
        volume: VolumeName,
    },
    /// Delete a branch that a revert has left behind: its instants cannot be opened any more
    #[command(after_help = "Example:
  cdp-tool branch list web1
  cdp-tool branch delete web1 3 --yes

What other branches and clones inherit from it stays. Whoever reads one of its instants can go on.")]
    Delete {
        /// The volume
        volume: VolumeName,
        /// The branch, by its number
        #[arg(value_parser = branch)]
        branch: BranchId,
        /// Even if marks lie on it; they are deleted as well
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it is given as KEY=VALUE".to_owned()),
    }
}

fn branch(text: &str) -> Result<BranchId, String> {
    text.parse().map(BranchId).map_err(|_| "a branch is named by its number: see branch list".to_owned())
}

fn mark_help() -> String {
    format!(
        "Examples:
  cdp-tool mark web1 before-upgrade
  cdp-tool mark web1@-5m good --set ticket=4711 --set by=anna
  cdp-tool extract web1@mark:before-upgrade web1.raw

{INSTANTS}"
    )
}

fn revert_help() -> String {
    format!(
        "Examples:
  cdp-tool revert web1@10:31
  cdp-tool revert web1@mark:before-upgrade
  cdp-tool revert db-data db-log --at -5m       all of them or none, to one instant

Nothing is deleted: the volume goes on with a new branch that begins at the instant, and the command \
         prints the instant that undoes it. It takes as long for a large volume as for a small one.

A guest that runs must be stopped first (shut down, or `stop` in QMP), since it would not know that its \
         disk has changed; one that was only stopped must be reset before it uses its disk again.

{INSTANTS}"
    )
}

fn clone_help() -> String {
    format!(
        "Examples:
  cdp-tool clone web1 web1-test
  cdp-tool clone web1@-5m web1-test
  cdp-tool clone db-data=test-data db-log=test-log --at 10:31       all of them or none, of one instant

A clone is a volume like any other. It shares the history of its source up to that instant, takes no \
         space until it is written, and stays if its source is destroyed.

{INSTANTS}"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use crate::cli::Command;
    use crate::cli::tests::parse;

    #[test]
    fn metadata_are_pairs() {
        let Command::Mark(args) = parse("cdp-tool mark web1 x --set a=b=c --set d=").unwrap().command else {
            panic!("another command");
        };
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(args.set, [pair("a", "b=c"), pair("d", "")]);
        for bad in ["--set a", "--set =b"] {
            let refusal = parse(&format!("cdp-tool mark web1 x {bad}")).unwrap_err();
            assert!(refusal.to_string().contains("KEY=VALUE"), "{refusal}");
        }
    }

    #[test]
    fn an_instant_for_all_may_look_like_an_option() {
        let Command::Revert(args) = parse("cdp-tool revert web1 web2 --at -5m --force").unwrap().command
        else {
            panic!("another command");
        };
        assert_eq!((args.what.len(), args.at.as_deref(), args.force), (2, Some("-5m"), true));
        assert!(parse("cdp-tool revert").is_err());
        assert!(parse("cdp-tool clone").is_err());
    }

    #[test]
    fn a_branch_is_a_number() {
        assert!(parse("cdp-tool branch delete web1 3").is_ok());
        let refusal = parse("cdp-tool branch delete web1 main").unwrap_err();
        assert!(refusal.to_string().contains("branch list"), "{refusal}");
    }
}
