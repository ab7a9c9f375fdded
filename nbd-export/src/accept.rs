//! The thread that accepts connections, and looks after those that keep others waiting.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use front_end::Complaints;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::connection::{Arrival, Shared};
use crate::control::Registry;
use crate::socket::{Listener, Socket};
use crate::worker::Worker;

/// How often is looked for connections that keep others waiting, while any do.
const WATCH: Duration = Duration::from_millis(500);
/// What a connection must move in [`crate::Limits::stall`] to count as alive, in bytes.
const STALL_BYTES: u64 = 64 << 10;
/// How long is waited when the operating system gives no descriptor for a client.
const STARVED: Duration = Duration::from_millis(100);

/// Tells the accepting thread to end.
#[derive(Clone)]
pub(crate) struct Stop(Arc<OwnedFd>);

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn signal(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

pub(crate) struct Acceptor {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) stop: Stop,
}

impl Acceptor {
    /// Accepts until it is told to stop; then the sockets are closed and removed.
    pub(crate) fn run(self) {
        let mut complaints = Complaints::default();
        let mut watch = Watch::default();
        loop {
            let ready = match self.wait() {
                Ok(Some(ready)) => ready,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!("NBD clients cannot be waited for: {error}");
                    return;
                }
            };
            for listener in ready {
                match listener.accept() {
                    Ok(Some((socket, peer))) => self.admit(socket, peer, &mut complaints),
                    Ok(None) => {}
                    Err(error) => {
                        complaints.say(|more| {
                            tracing::warn!(
                                more,
                                "a client of {} could not be accepted: {error}",
                                listener.address()
                            );
                        });
                        std::thread::sleep(STARVED);
                    }
                }
            }
            if self.shared.budget.is_short() {
                watch.look(&self.registry, self.shared.limits.stall);
            } else {
                watch.forget();
            }
        }
    }

    /// The listeners on which somebody waits; None if it is time to stop.
    fn wait(&self) -> io::Result<Option<Vec<&Listener>>> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.stop.0.as_fd(), PollFlags::IN)];
        fds.extend(
            self.listeners.iter().map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)),
        );
        let watch = Timespec { tv_sec: 0, tv_nsec: i64::from(WATCH.subsec_nanos()) };
        match poll(&mut fds, Some(&watch)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(None);
        }
        let ready = fds[1..].iter().zip(&self.listeners).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(Some(ready.map(|(_, listener)| listener).collect()))
    }

    fn admit(&self, socket: Socket, peer: String, complaints: &mut Complaints) {
        let limit = self.shared.limits.connections;
        let registered = match socket.handle() {
            Ok(handle) => self.registry.add(limit, handle, peer),
            Err(error) => {
                return complaints.say(|more| tracing::warn!(more, "a client was turned away: {error}"));
            }
        };
        let Some(registered) = registered else {
            return complaints
                .say(|more| tracing::warn!(more, "a client was turned away: there are {limit} connections"));
        };
        if let Some(worker) = self.workers.iter().min_by_key(|worker| worker.load()) {
            worker.give(Arrival { socket, registered });
        }
    }
}

/// What connections that could be moving data have moved, since when.
#[derive(Default)]
struct Watch(HashMap<u64, (Instant, u64)>);

impl Watch {
    fn forget(&mut self) {
        self.0.clear();
    }

    /// Ends connections that hold memory for which others wait, and make next to nothing of it.
    fn look(&mut self, registry: &Registry, patience: Duration) {
        let now = Instant::now();
        let mut seen = HashMap::new();
        for control in registry.all().iter().filter(|control| control.keeps_others_waiting()) {
            let moved = control.moved_bytes.load(std::sync::atomic::Ordering::Relaxed);
            let (since, before) = self.0.get(&control.id).copied().unwrap_or((now, moved));
            if now.duration_since(since) < patience {
                seen.insert(control.id, (since, before));
            } else if moved - before < STALL_BYTES {
                let (connection, peer) = (control.id, &control.peer);
                tracing::warn!(connection, %peer, "disconnected: it stalls, and others wait for its memory");
                control.kill();
            } else {
                seen.insert(control.id, (now, moved));
            }
        }
        self.0 = seen;
    }
}
