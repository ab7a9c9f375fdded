//! The daemon's command line; `cdp-tool man` makes its manual page from it.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

use crate::config::Overrides;
use crate::logging::LogFormat;
use crate::nbd::NbdAddress;

/// Serves the volumes of one store to virtual machines, and keeps every write that they make.
///
/// The store is steered with cdp-tool, through the socket cdpd.sock in its directory. SIGTERM and SIGINT stop
/// the daemon cleanly; a second one stops it at once, which loses nothing that was acknowledged.
#[derive(Debug, Parser)]
#[command(
    name = "cdpd",
    version,
    after_help = "Examples:
  cdpd --store /srv/cdp
  cdpd --store /srv/cdp --http 127.0.0.1:8080 --log-format json
  cdpd --store /srv/cdp --nbd unix:/run/cdp/nbd.sock --nbd tcp:127.0.0.1:10809

Exit status: 0 after a clean stop, 2 after a failure."
)]
pub struct Args {
    /// The store's directory; a store is made in it if it is empty or missing
    #[arg(long, value_name = "DIR", env = "CDP_STORE")]
    pub store: PathBuf,
    /// The configuration file [default: cdpd.toml in the store's directory, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Fail if there is no store, rather than make one: against file systems that are not mounted
    #[arg(long)]
    no_create: bool,
    /// Answer the API on this address too, without passwords
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
    /// Let --http be an address that other machines can reach
    #[arg(long)]
    http_allow_remote: bool,
    /// Export volumes and their instants over NBD on this socket, unix:PATH or tcp:ADDRESS:PORT; may be repeated
    #[arg(long, value_name = "SOCKET")]
    nbd: Vec<NbdAddress>,
    /// Let --nbd be an address that other machines can reach, though clients need not show who they are
    #[arg(long)]
    nbd_allow_remote: bool,
    /// How the log on standard error looks; RUST_LOG says what goes into it
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

impl Args {
    /// What it says besides the store.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides {
            file: self.config.clone(),
            no_create: self.no_create,
            http: self.http,
            http_allow_remote: self.http_allow_remote,
            nbd: self.nbd.clone(),
            nbd_allow_remote: self.nbd_allow_remote,
            log_format: self.log_format,
        }
    }
}
