//! Accepting connections, over the control socket and over TCP.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, header};
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::api::{ApiError, ErrorKind};

/// How long a connection may take to say what it wants, idle time between two requests included.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long accepting pauses after a failure: mostly for want of descriptors, which others must give back
/// first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// The most bytes of a request's head, and of what is read ahead of a body.
const MAX_BUFFER_BYTES: usize = 256 << 10;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A process of this machine, as it was when it connected (`SO_PEERCRED`, unix(7)).
    Local {
        /// Its user.
        uid: u32,
        /// The process, if it is in our namespace.
        pid: Option<i32>,
    },
    /// Somebody on the network.
    Remote(SocketAddr),
}

impl Peer {
    /// Its user, if that is certain.
    pub(crate) fn uid(self) -> Option<u32> {
        match self {
            Self::Local { uid, .. } => Some(uid),
            Self::Remote(_) => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { uid, pid: Some(pid) } => write!(f, "uid {uid}, pid {pid}"),
            Self::Local { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Remote(address) => address.fmt(f),
        }
    }
}

/// Where connections come from.
pub(crate) enum Listener {
    Control(UnixListener),
    Network(TcpListener),
}

/// What accepting goes by.
#[derive(Clone)]
pub(crate) struct Listening {
    pub(crate) router: Router,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) stopping: watch::Receiver<bool>,
}

/// Accepts and serves connections until the daemon stops, and then until those that are open have got their
/// answers.
pub(crate) async fn listen(listener: Listener, mut on: Listening) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = stopped(&mut on.stopping) => break,
        };
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Of connections beyond the limit one waits here, and the others in the socket's backlog. A listener that nobody
        // connects to must not have a place: there may be but one for all listeners.
        let permit = tokio::select! {
            permit = Arc::clone(&on.connections).acquire_owned() => permit,
            () = stopped(&mut on.stopping) => break,
        };
        let on = on.clone();
        connections.spawn(async move {
            let _permit = permit;
            serve(stream, peer, on).await;
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Ends when the daemon stops, or is gone.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(listener: &Listener) -> io::Result<(Box<dyn Stream>, Peer)> {
    match listener {
        Listener::Control(listener) => {
            let (stream, _) = listener.accept().await?;
            let credentials = stream.peer_cred()?;
            let peer = Peer::Local { uid: credentials.uid(), pid: credentials.pid() };
            Ok((Box::new(stream), peer))
        }
        Listener::Network(listener) => {
            let (stream, address) = listener.accept().await?;
            Ok((Box::new(stream), Peer::Remote(address)))
        }
    }
}

async fn serve(stream: Box<dyn Stream>, peer: Peer, mut on: Listening) {
    let service = TowerToHyperService::new(on.router.layer(Extension(peer)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut on.stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// Refuses what a browser sends over TCP on behalf of somebody else's web page: the API has no passwords, so
/// a page that could reach it could destroy volumes.
pub(super) fn check_origin(peer: Option<Peer>, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(Peer::Remote(_)) = peer else { return Ok(()) };
    let refuse = |why: &str| Err(ApiError::new(ErrorKind::Invalid, why));
    if headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site" || site == "same-site") {
        return refuse("requests from other sites' pages are refused");
    }
    // The header above goes only to addresses that browsers trust, https and this machine's own; this one goes with whatever
    // a page may send without asking first, a GET excepted. There are no pages of ours.
    if headers.contains_key(header::ORIGIN) {
        return refuse("requests from web pages are refused");
    }
    // A page can have its own name resolve to this address; it cannot choose the Host header.
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    if name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    refuse("name this machine by its address, or as localhost")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn checked(peer: Peer, pairs: &[(&'static str, &str)]) -> bool {
        let headers =
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        check_origin(Some(peer), &headers).is_ok()
    }

    #[test]
    fn over_tcp_only_addresses_are_hosts() {
        let remote = Peer::Remote("127.0.0.1:9".parse().unwrap());
        for host in ["127.0.0.1:80", "localhost", "LOCALHOST:8080", "[::1]:80", "[::1]", "192.0.2.7"] {
            assert!(checked(remote, &[("host", host)]), "{host}");
        }
        for host in ["evil.example:80", "", "127.0.0.1.evil.example", "localhost.evil.example"] {
            assert!(!checked(remote, &[("host", host)]), "{host}");
        }
        assert!(!checked(remote, &[]));
        assert!(!checked(remote, &[("host", "localhost"), ("sec-fetch-site", "cross-site")]));
        assert!(checked(remote, &[("host", "localhost"), ("sec-fetch-site", "none")]));
        for origin in ["http://evil.example", "http://192.0.2.7", "null"] {
            assert!(!checked(remote, &[("host", "192.0.2.7:80"), ("origin", origin)]), "{origin}");
        }
    }

    #[test]
    fn the_control_socket_has_permissions_instead() {
        assert!(checked(Peer::Local { uid: 0, pid: None }, &[("host", "cdpd")]));
    }
}
