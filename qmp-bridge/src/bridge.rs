//! A connection that comes back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::client::{Client, Options};
use crate::error::{Error, ErrorKind, Result};
use crate::message::Version;
use crate::subscription::{Backlog, Hub, Subscription};

/// How long to wait before connecting again. Each failure doubles it, a connection resets it.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After the first failure, and after the end of a connection.
    pub first: Duration,
    /// At most.
    pub longest: Duration,
}

impl Default for Backoff {
    /// From a tenth of a second to five: QEMU's socket is there within a fraction of a second after its start.
    fn default() -> Self {
        Self { first: Duration::from_millis(100), longest: Duration::from_secs(5) }
    }
}

/// Where a bridge stands.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum State {
    /// It tries for the first time.
    Connecting,
    /// Commands can be given.
    Connected {
        /// What answers. It may be another QEMU than before.
        version: Version,
        /// Counts the connections of this bridge, from 1.
        connection: u64,
    },
    /// They cannot, and this is why. It tries again.
    Disconnected {
        /// Why the last connection ended, or why none came about.
        reason: Error,
    },
}

/// Owns the connection to one QEMU and reconnects, for as long as it lives.
///
/// It never repeats a command: what was in flight when a connection ended has failed with `Gone`, and nobody knows
/// whether it was carried out. Whoever sent it asks QEMU on the next connection. Subscriptions live on over
/// reconnections, with a [`Notice`](crate::Notice) at each gap.
#[derive(Debug)]
pub struct Bridge {
    path: PathBuf,
    hub: Arc<Hub>,
    state: watch::Receiver<Current>,
    task: JoinHandle<()>,
}

#[derive(Clone, Debug)]
struct Current {
    state: State,
    client: Option<Client>,
}

impl Bridge {
    /// Begins to connect to the QMP socket at `path`, and keeps at it. Needs a tokio runtime around it.
    #[must_use]
    pub fn start(path: &Path, options: Options, backoff: Backoff) -> Self {
        let hub = Arc::new(Hub::default());
        let (publish, state) = watch::channel(Current { state: State::Connecting, client: None });
        let task = tokio::spawn(keep_up(path.to_owned(), options, backoff, Arc::clone(&hub), publish));
        Self { path: path.to_owned(), hub, state, task }
    }

    /// Where it stands now.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.borrow().state.clone()
    }

    /// Waits until its state is one that is `wanted`: that state. No state that lasts is missed; one that was left
    /// again at once may be, and is then among the notices of a [`Subscription`]. Cancel-safe.
    pub async fn until(&self, mut wanted: impl FnMut(&State) -> bool) -> State {
        let mut current = self.state.clone();
        match current.wait_for(|now| wanted(&now.state)).await {
            Ok(now) => now.state.clone(),
            // The task ends only with this bridge, which is borrowed.
            Err(_) => self.state(),
        }
    }

    /// The connection that is up now.
    ///
    /// # Errors
    /// Why there is none.
    pub fn client(&self) -> Result<Client> {
        let now = self.state.borrow();
        match (&now.client, &now.state) {
            (Some(client), _) => Ok(client.clone()),
            (None, State::Disconnected { reason }) => Err(reason.clone()),
            (None, _) => Err(Error::new(ErrorKind::Unreachable, self.path.display(), "not connected yet")),
        }
    }

    /// The connection that is up, or comes up within `deadline`. Cancel-safe.
    ///
    /// # Errors
    /// Why there is none by then.
    pub async fn connected(&self, deadline: Duration) -> Result<Client> {
        let by = Instant::now() + deadline;
        let mut state = self.state.clone();
        let _ = timeout_at(by, state.wait_for(|now| now.client.is_some())).await;
        self.client()
    }

    /// All that arrives from now on, over all connections.
    #[must_use]
    pub fn subscribe(&self, backlog: Backlog) -> Subscription {
        self.hub.subscribe(backlog)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.task.abort();
        self.hub.close();
    }
}

async fn keep_up(
    path: PathBuf,
    options: Options,
    backoff: Backoff,
    hub: Arc<Hub>,
    publish: watch::Sender<Current>,
) {
    let mut wait = backoff.first;
    let mut connection = 0;
    loop {
        let reason = match Client::connect_to(&path, options, Arc::clone(&hub)).await {
            Ok(client) => {
                connection += 1;
                let reason = attend(client, connection, &publish).await;
                wait = backoff.first;
                reason
            }
            Err(reason) => {
                tracing::debug!(%reason, "no QMP connection");
                reason
            }
        };
        publish.send_replace(Current { state: State::Disconnected { reason }, client: None });
        sleep(wait).await;
        wait = backoff.longest.min(wait * 2);
    }
}

/// Publishes a connection until it has ended: why.
async fn attend(client: Client, connection: u64, publish: &watch::Sender<Current>) -> Error {
    let state = State::Connected { version: client.version().clone(), connection };
    publish.send_replace(Current { state, client: Some(client.clone()) });
    client.ended().await
}
