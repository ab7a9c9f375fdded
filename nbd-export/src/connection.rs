//! One connection from beginning to end.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::control::{Control, Registered};
use crate::exports::Exports;
use crate::handshake::{Agreement, Greeting, Opened, Outcome, Terms, negotiate};
use crate::memory::{Budget, Pool};
use crate::session::{self, Ended};
use crate::socket::Socket;
use crate::transport::{Plain, Tls, TlsSettings, Transport};
use crate::{Limits, TlsMode};

/// How long, and for how much, a client that has been sent away is listened to: if the socket were closed on what it
/// is still sending, it would not get what it was sent last.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 4 << 20;

/// What all connections have in common.
pub(crate) struct Shared {
    pub(crate) exports: Arc<dyn Exports>,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<TlsSettings>,
    pub(crate) budget: Arc<Budget>,
}

/// A client that has just been accepted.
pub(crate) struct Arrival {
    pub(crate) socket: Socket,
    pub(crate) registered: Registered,
}

/// Serves a client until it has gone. It stays registered until nothing of it is left.
pub(crate) async fn run(shared: Arc<Shared>, pool: Rc<Pool>, arrival: Arrival) {
    let Arrival { socket, registered } = arrival;
    let registered = Arc::new(registered);
    let control = Arc::clone(&registered.control);
    tracing::debug!(connection = control.id, peer = %control.peer, "a client has connected");
    let mut connection = Connection {
        shared: &shared,
        pool: &pool,
        registered: &registered,
        control: &control,
        deadline: Instant::now() + shared.limits.handshake,
        opened: None,
    };
    let left = connection.converse(Plain::new(socket, Arc::clone(&control))).await;
    let opened = connection.opened.take();
    let info = control.info();
    let (id, peer, export) = (info.id, info.peer.as_str(), info.export.as_deref().unwrap_or(""));
    let (requests, read, written) = (info.requests, info.read_bytes, info.written_bytes);
    match left {
        Left::ByItself => {
            tracing::debug!(connection = id, peer, export, requests, read, written, "the client has gone");
        }
        Left::Stopped => {
            tracing::debug!(
                connection = id,
                peer,
                export,
                requests,
                read,
                written,
                "the connection was ended"
            );
        }
        Left::Refused(why) => {
            tracing::warn!(connection = id, peer, export, requests, "the client was sent away: {why}");
        }
        Left::Failed(error) => {
            tracing::warn!(connection = id, peer, export, requests, "the connection has failed: {error}");
        }
    }
    control.hang_up();
    // In this order: it stays registered until its export has gone.
    part_with(id, (opened, registered)).await;
}

/// Drops something on a thread that may block: what an export does when it goes may take its time.
async fn part_with<T: Send + 'static>(connection: u64, what: T) {
    if let Err(error) = tokio::task::spawn_blocking(move || drop(what)).await {
        tracing::error!(connection, "an export's code has ended unexpectedly: {error}");
    }
}

/// How a connection came to its end.
enum Left {
    ByItself,
    Stopped,
    Refused(String),
    Failed(io::Error),
}

impl From<Ended> for Left {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Client => Self::ByItself,
            Ended::Stopped => Self::Stopped,
            Ended::Protocol(why) => Self::Refused(why.to_owned()),
            Ended::Failed(error) => Self::Failed(error),
        }
    }
}

struct Connection<'a> {
    shared: &'a Shared,
    pool: &'a Rc<Pool>,
    registered: &'a Arc<Registered>,
    control: &'a Control,
    /// Of the handshake.
    deadline: Instant,
    opened: Option<Opened>,
}

/// Where a handshake leads.
enum Path {
    Serve(Agreement),
    Encrypt(Greeting),
    Leave(Left),
}

impl Connection<'_> {
    async fn converse(&mut self, plain: Plain) -> Left {
        let (greeting, tls) = match (self.shake(&plain, Greeting::Due, false).await, &self.shared.tls) {
            (Path::Encrypt(greeting), Some(tls)) => (greeting, tls),
            (path, _) => return self.follow(&plain, path).await,
        };
        // Nothing that was agreed on in the open holds any longer.
        self.control.set_export(None);
        if let Some(old) = self.opened.take() {
            part_with(self.control.id, old).await;
        }
        let handshake = timeout_at(self.deadline, Tls::accept(plain, tls));
        let accepted = tokio::select! {
            biased;
            () = self.control.stopped() => return Left::Stopped,
            accepted = handshake => accepted,
        };
        let encrypted = match accepted {
            Ok(Ok(encrypted)) => encrypted,
            Ok(Err(error)) => return Left::Refused(format!("TLS: {error}")),
            Err(_) => return Left::Refused("its TLS handshake takes too long".to_owned()),
        };
        self.control.set_tls();
        let path = self.shake(&encrypted, greeting, true).await;
        self.follow(&encrypted, path).await
    }

    async fn shake<T: Transport>(&mut self, transport: &T, greeting: Greeting, encrypted: bool) -> Path {
        let terms = Terms {
            exports: &self.shared.exports,
            limits: &self.shared.limits,
            registered: self.registered,
            tls: self.shared.tls.as_ref().map(|tls: &TlsSettings| -> TlsMode { tls.mode }),
            encrypted,
            opened: &mut self.opened,
        };
        let negotiation = timeout_at(self.deadline, negotiate(transport, terms, greeting));
        let outcome = tokio::select! {
            biased;
            () = self.control.stopped() => return Path::Leave(Left::Stopped),
            outcome = negotiation => outcome,
        };
        match outcome {
            Ok(Ok(Outcome::Transmission(agreement))) => Path::Serve(agreement),
            Ok(Ok(Outcome::StartTls(greeting))) => Path::Encrypt(greeting),
            Ok(Ok(Outcome::Left(None))) => Path::Leave(Left::ByItself),
            Ok(Ok(Outcome::Left(Some(why)))) => Path::Leave(Left::Refused(why)),
            Ok(Err(error)) => Path::Leave(Left::Failed(error)),
            Err(_) => Path::Leave(Left::Refused("its handshake takes too long".to_owned())),
        }
    }

    async fn follow<T: Transport>(&mut self, transport: &T, path: Path) -> Left {
        let left = match (path, &self.opened) {
            (Path::Serve(agreement), Some(opened)) => {
                let (limits, pool) = (&self.shared.limits, self.pool);
                match session::serve(transport, self.control, limits, pool, opened, agreement).await {
                    Ok(ended) => ended.into(),
                    Err(error) => Left::Failed(error),
                }
            }
            (Path::Leave(left), _) => left,
            // The handshake promises an open export, and TLS only where there is some.
            (Path::Serve(_) | Path::Encrypt(_), _) => Left::Refused("nothing to serve".to_owned()),
        };
        let parting = async {
            transport.farewell().await;
            if !matches!(left, Left::ByItself) {
                linger(transport).await;
            }
        };
        // A client that does not listen any more is not waited for.
        let _ = timeout(LINGER, parting).await;
        left
    }
}

/// Receives what nobody will look at.
async fn linger<T: Transport>(transport: &T) {
    let mut memory = vec![0; 16 << 10];
    let mut left = LINGER_BYTES;
    loop {
        let (received, back) = transport.read(memory).await;
        memory = back;
        match received {
            Ok(count) if count > 0 && count < left => left -= count,
            _ => return,
        }
    }
}
