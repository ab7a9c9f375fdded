//! The commands.

mod doctor;
mod documents;
mod extract;
mod history;
mod inspect;
mod machines;
mod marks;
mod run;
mod taking;
mod verify;
mod volume;

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, bail};
use cdp_types::{Instant, VolumeAt};
use jiff::Zoned;

use crate::access::{Access, online, stopped};
use crate::cli::{BranchCommand, Cli, Command, DoctorCommand, InspectCommand, VolumeCommand};
use crate::output::{Output, unless_gone};

/// How a command went that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All is well.
    Good,
    /// What was looked for was found, and it is bad.
    Bad,
}

/// Does what the command line says.
pub(crate) fn run(cli: Cli) -> anyhow::Result<Outcome> {
    let mut output = Output::new(cli.json);
    let outcome = dispatch(cli.command, cli.store.as_deref(), &mut output);
    // What was found before a failure is worth having.
    let finished = output.finish();
    let outcome = outcome?;
    unless_gone(finished)?;
    Ok(outcome)
}

fn dispatch(command: Command, store: Option<&Path>, output: &mut Output) -> anyhow::Result<Outcome> {
    let store = || store.context("which store? say --store DIR, or set CDP_STORE");
    match command {
        Command::Volume(command) => volumes(command, store()?, output)?,
        Command::Mark(args) => marks::mark(&online(store()?)?, args, output)?,
        Command::Marks { volume } => marks::list(&Access::open(store()?)?, &volume, output)?,
        Command::Unmark { volume, label } => marks::unmark(&online(store()?)?, &volume, &label, output)?,
        Command::Revert(args) => history::revert(&online(store()?)?, &args, output)?,
        Command::Clone(args) => history::clone(&online(store()?)?, &args, output)?,
        Command::Branch(BranchCommand::List { volume }) => {
            history::branches(&Access::open(store()?)?, &volume, output)?;
        }
        Command::Branch(BranchCommand::Delete { volume, branch, force, yes }) => {
            history::delete_branch(&online(store()?)?, &volume, branch, force, yes, output)?;
        }
        Command::Vm(command) => machines::vm(store()?, &command, output)?,
        Command::Checkpoint(command) => machines::checkpoint(&online(store()?)?, store()?, &command, output)?,
        Command::Doctor(DoctorCommand::Vm { name }) => return doctor::vm(&online(store()?)?, &name, output),
        Command::Inspect(command) => {
            let access = Access::open(store()?)?;
            match command {
                InspectCommand::Store => inspect::store(&access, output)?,
                InspectCommand::Segments => inspect::segments(&access, output)?,
                InspectCommand::Records(args) => inspect::records(&access, args, output)?,
                InspectCommand::Map { what } => inspect::map(&access, &volume_at(&what)?, output)?,
            }
        }
        Command::Verify => return verify::verify(&Access::open(store()?)?, output),
        Command::RebuildIndex => verify::rebuild_index(&stopped(store()?)?, output)?,
        Command::Extract { what, file } => {
            extract::extract(&Access::open(store()?)?, &volume_at(&what)?, &file, output)?;
        }
        Command::Completions { shell } => documents::completions(shell, output)?,
        Command::Man { directory } => documents::man(&directory, output)?,
    }
    Ok(Outcome::Good)
}

fn volumes(command: VolumeCommand, store: &Path, output: &mut Output) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create(args) => volume::create(&online(store)?, args, output),
        VolumeCommand::List => volume::list(&Access::open(store)?, output),
        VolumeCommand::Show { name } => volume::show(&Access::open(store)?, &name, output),
        VolumeCommand::Resize { name, size, size_flag } => {
            let size = size.or(size_flag).context("to what size?")?;
            volume::resize(&online(store)?, &name, size, output)
        }
        VolumeCommand::Rename { name, new } => volume::rename(&online(store)?, &name, new, output),
        VolumeCommand::Destroy { name, yes, force } => {
            volume::destroy(&online(store)?, &name, yes, force, output)
        }
        VolumeCommand::Serve { name, vhost_user, queues } => {
            volume::serve(&online(store)?, &name, &vhost_user, queues, output)
        }
        VolumeCommand::Unserve { name } => volume::unserve(&online(store)?, &name, output),
    }
}

/// Asks whether something may go for good: it may if the answer is `word`.
fn confirmed(what: &str, deed: &str, question: &str, word: &str) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        bail!("there is nobody to ask whether {what} may be {deed}; say --yes");
    }
    write!(io::stderr(), "{question}").context("cannot ask")?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    Ok(answer.trim() == word)
}

/// A volume at an instant, as the user's clock and zone have it.
fn volume_at(text: &str) -> anyhow::Result<VolumeAt> {
    Ok(VolumeAt::parse(text, &Zoned::now())?)
}

/// An instant, as the user's clock and zone have it.
fn instant(text: &str) -> anyhow::Result<Instant> {
    Ok(Instant::parse(text, &Zoned::now())?)
}
