//! Completions and manual pages.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::output::Output;

/// Prints what a shell needs to complete our command line.
pub(super) fn completions(shell: Shell, output: &mut Output) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cdp-tool", &mut script);
    output.raw(&script)
}

/// Writes a page for each command, and one for the daemon.
pub(super) fn man(directory: &Path, output: &mut Output) -> anyhow::Result<()> {
    let write = || {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(Cli::command(), directory)?;
        clap_mangen::generate_to(cdpd::Args::command(), directory)
    };
    write().with_context(|| format!("cannot write manual pages to {}", directory.display()))?;
    if output.is_json() {
        return output.value(&serde_json::json!({ "directory": directory.to_string_lossy() }));
    }
    Ok(())
}
