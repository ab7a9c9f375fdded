//! The daemon's log, and its last words.

use std::io::IsTerminal;
use std::panic;

use anyhow::Context;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends the log to standard error. `filter` is as in `RUST_LOG`, which overrides it.
///
/// # Errors
/// The filter is none, or there is a log already.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let directives = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) if !directives.is_empty() => directives,
        _ => filter.to_owned(),
    };
    let filter =
        EnvFilter::try_new(&directives).with_context(|| format!("'{directives}' is no log filter"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().try_init(),
    }
    .map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}

/// Makes a panic in any thread end the process, once it is in the log: a daemon that lost a thread would look
/// alive and answer nobody. What was acknowledged is in the log, as after any kill.
pub fn abort_on_panic() {
    panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::force_capture();
        let name = thread.name().unwrap_or("unnamed");
        tracing::error!(thread = name, %backtrace, "{panic}; aborting");
        std::process::abort();
    }));
}
