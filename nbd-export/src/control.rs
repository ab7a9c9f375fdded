//! What is known of each connection outside of its own thread, and how it is told to end.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cdp_types::DeviceIdentity;
use rustix::net::{Shutdown, shutdown};
use tokio::sync::watch;

use crate::exports::Export;

/// A client's connection, for a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// Counts from 1, and is never used again.
    pub id: u64,
    /// Address and port, or process and user.
    pub peer: String,
    /// The canonical name of the export that it has opened; that may be during its handshake already.
    pub export: Option<String>,
    /// Which disk's history that is, as of when it was opened: the name may be another's by now.
    pub device: Option<DeviceIdentity>,
    /// Bytes that it has read from the export.
    pub read_bytes: u64,
    /// Bytes that it has written to the export.
    pub written_bytes: u64,
    /// Requests that it has made.
    pub requests: u64,
    /// Whether TLS is on.
    pub tls: bool,
}

/// One connection, as other threads see it.
pub(crate) struct Control {
    pub(crate) id: u64,
    pub(crate) peer: String,
    /// A second descriptor of its socket.
    socket: OwnedFd,
    /// Whether it takes requests.
    serving: watch::Sender<bool>,
    export: Mutex<Option<(String, DeviceIdentity)>>,
    tls: AtomicBool,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) requests: AtomicU64,
    /// Bytes that have gone through the socket in either direction.
    pub(crate) moved_bytes: AtomicU64,
    /// Memory that it holds, in bytes.
    pub(crate) held_bytes: AtomicUsize,
    /// How many of its loops wait for the client, with something of ours in their hands.
    waiting_for_client: AtomicU32,
}

impl Control {
    /// Waits until no more requests shall be taken.
    pub(crate) async fn stopped(&self) {
        // The sender is `self`, so that this cannot fail.
        let _ = self.serving.subscribe().wait_for(|serving| !*serving).await;
    }

    /// Lets it take no more requests. Those that it has taken are carried out and answered.
    pub(crate) fn stop(&self) {
        self.serving.send_replace(false);
    }

    /// Ends it at once: nothing more is received or sent. What is in flight in the device still ends first.
    pub(crate) fn kill(&self) {
        self.stop();
        self.hang_up();
    }

    /// Ends both directions of the socket, so that nothing waits for it any more.
    pub(crate) fn hang_up(&self) {
        // It fails only if the client has done so before.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Tells the client that nothing more will be sent.
    pub(crate) fn end_sending(&self) {
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    pub(crate) fn set_export(&self, export: Option<&dyn Export>) {
        let opened = export.map(|export| (export.name().to_owned(), export.device().identity()));
        *locked(&self.export) = opened;
    }

    pub(crate) fn set_tls(&self) {
        self.tls.store(true, Ordering::Relaxed);
    }

    /// Marks, until dropped, that it is the client's turn.
    pub(crate) fn wait_for_client(&self) -> ClientsTurn<'_> {
        self.waiting_for_client.fetch_add(1, Ordering::Relaxed);
        ClientsTurn(self)
    }

    /// Whether it holds memory and waits for the client to receive or send.
    pub(crate) fn keeps_others_waiting(&self) -> bool {
        self.held_bytes.load(Ordering::Relaxed) > 0 && self.waiting_for_client.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn info(&self) -> ConnectionInfo {
        let (export, device) = locked(&self.export).clone().unzip();
        ConnectionInfo {
            id: self.id,
            peer: self.peer.clone(),
            export,
            device,
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            tls: self.tls.load(Ordering::Relaxed),
        }
    }
}

/// See [`Control::wait_for_client`].
pub(crate) struct ClientsTurn<'a>(&'a Control);

impl Drop for ClientsTurn<'_> {
    fn drop(&mut self) {
        self.0.waiting_for_client.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All connections that there are.
#[derive(Default)]
pub(crate) struct Registry {
    connections: Mutex<Connections>,
    changed: Condvar,
}

#[derive(Default)]
struct Connections {
    last_id: u64,
    by_id: BTreeMap<u64, Arc<Control>>,
}

impl Registry {
    /// Adds a connection, unless there are `limit` already.
    pub(crate) fn add(self: &Arc<Self>, limit: usize, socket: OwnedFd, peer: String) -> Option<Registered> {
        let mut connections = locked(&self.connections);
        if connections.by_id.len() >= limit {
            return None;
        }
        connections.last_id += 1;
        let control = Arc::new(Control {
            id: connections.last_id,
            peer,
            socket,
            serving: watch::Sender::new(true),
            export: Mutex::default(),
            tls: AtomicBool::default(),
            read_bytes: AtomicU64::default(),
            written_bytes: AtomicU64::default(),
            requests: AtomicU64::default(),
            moved_bytes: AtomicU64::default(),
            held_bytes: AtomicUsize::default(),
            waiting_for_client: AtomicU32::default(),
        });
        connections.by_id.insert(control.id, Arc::clone(&control));
        Some(Registered { control, registry: Arc::clone(self) })
    }

    pub(crate) fn all(&self) -> Vec<Arc<Control>> {
        locked(&self.connections).by_id.values().cloned().collect()
    }

    /// Waits until none of these is left. Returns how many are, once the time is up.
    pub(crate) fn wait_for_end(&self, ids: &[u64], deadline: Instant) -> usize {
        let left =
            |connections: &Connections| ids.iter().filter(|id| connections.by_id.contains_key(id)).count();
        let mut connections = locked(&self.connections);
        loop {
            let (left, time) = (left(&connections), deadline.saturating_duration_since(Instant::now()));
            if left == 0 || time == Duration::ZERO {
                return left;
            }
            let waited = self.changed.wait_timeout(connections, time);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A connection's place in the registry, until dropped.
pub(crate) struct Registered {
    pub(crate) control: Arc<Control>,
    registry: Arc<Registry>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.control.hang_up();
        locked(&self.registry.connections).by_id.remove(&self.control.id);
        self.registry.changed.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
