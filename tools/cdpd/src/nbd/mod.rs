//! Volumes and their instants over NBD.

mod config;
mod contexts;
mod exports;
mod guarded;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cdp_types::VolumeId;
use nbd_export::{ConnectionInfo, Listen, Server, ServerConfig};

use crate::http::App;

pub use config::{Nbd, NbdAddress};
use exports::{Heads, StoreExports};

/// How long clients' requests in flight get when the daemon stops.
const PATIENCE: Duration = Duration::from_secs(10);

/// The NBD server of a daemon, if it has one. Clones of its exports hold the daemon's [`App`], never the other way
/// round.
#[derive(Default)]
pub(crate) struct NbdServer {
    server: Option<Server>,
}

impl NbdServer {
    /// Listens where the configuration says, and on what systemd has passed on.
    ///
    /// # Errors
    /// An address cannot be had, or the certificates cannot be used.
    pub(crate) fn start(config: &Nbd, app: &Arc<App>, inherited: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let mut listen: Vec<Listen> =
            config.listen.iter().map(|address| address.to_listen(config.mode)).collect();
        listen.extend(inherited.into_iter().map(Listen::Inherited));
        if listen.is_empty() {
            return Ok(Self::default());
        }
        let heads = Heads::new(&config.writable, config.writable_beside_guests);
        let exports = StoreExports::new(Arc::clone(app), heads);
        let server_config = ServerConfig {
            tls: config.tls.as_ref().map(config::NbdTls::to_tls),
            limits: config.limits(),
            ..ServerConfig::new(listen)
        };
        let server = Server::start(server_config, Arc::new(exports)).context("cannot serve NBD")?;
        for address in server.addresses() {
            tracing::info!(%address, tls = config.tls.is_some(), "NBD listens");
        }
        Ok(Self { server: Some(server) })
    }

    /// Who is connected.
    pub(crate) fn connections(&self) -> Vec<ConnectionInfo> {
        self.server.as_ref().map(Server::connections).unwrap_or_default()
    }

    /// Whether a client has one of these volumes' heads open, which keeps it from being reverted without force.
    pub(crate) fn has_head_open(&self, volumes: &[VolumeId]) -> bool {
        self.connections().iter().any(|client| has_head(client, volumes))
    }

    /// Cuts off the clients of volumes' heads, for whom a revert would change the disk under their feet.
    pub(crate) fn disconnect_heads(&self, volumes: &[VolumeId]) {
        let Some(server) = &self.server else { return };
        let left = server.disconnect(|client| has_head(client, volumes), PATIENCE);
        if left > 0 {
            tracing::warn!("{left} NBD connections have requests in flight that do not end");
        }
    }

    /// Lets requests in flight end, and stops.
    pub(crate) fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.shutdown(PATIENCE);
        }
    }
}

/// Whether a client has the head of one of these volumes open, whatever that is called now. The names of their past
/// instants have an `@`.
fn has_head(client: &ConnectionInfo, volumes: &[VolumeId]) -> bool {
    let is_head = client.export.as_ref().is_some_and(|export| !export.contains('@'));
    is_head && client.device.is_some_and(|device| volumes.contains(&device.volume))
}
