//! The threads that serve connections: each is an io_uring runtime of its own.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::connection::{self, Arrival, Shared};
use crate::memory::Pool;

/// Entries of a worker's ring: more operations than that are submitted in several calls.
const RING_ENTRIES: u32 = 256;

/// A thread, as the accepting one sees it. When it is dropped, the thread ends once its connections have.
pub(crate) struct Worker {
    arrivals: UnboundedSender<Arrival>,
    load: Arc<AtomicUsize>,
}

impl Worker {
    /// Starts a thread, once it has got its ring.
    pub(crate) fn spawn(index: usize, shared: Arc<Shared>) -> io::Result<(Self, JoinHandle<()>)> {
        let (arrivals, receiver) = unbounded_channel();
        let load = Arc::new(AtomicUsize::new(0));
        let (started, start) = mpsc::sync_channel(1);
        let counted = Arc::clone(&load);
        let thread = std::thread::Builder::new().name(format!("nbd-{index}")).spawn(move || {
            let runtime = match tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES)) {
                Ok(runtime) => runtime,
                // Somebody waits for it, in `spawn`.
                Err(error) => return drop(started.send(Err(error))),
            };
            if started.send(Ok(())).is_ok() {
                runtime.block_on(serve(shared, receiver, counted));
            }
        })?;
        match start.recv() {
            Ok(Ok(())) => Ok((Self { arrivals, load }, thread)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread has ended before it began")),
        }
    }

    /// Connections that it has.
    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    pub(crate) fn give(&self, arrival: Arrival) {
        self.load.fetch_add(1, Ordering::Relaxed);
        // It fails only if the thread has panicked; the connection is then closed.
        let _ = self.arrivals.send(arrival);
    }
}

async fn serve(shared: Arc<Shared>, mut arrivals: UnboundedReceiver<Arrival>, load: Arc<AtomicUsize>) {
    let pool = Pool::new(Arc::clone(&shared.budget));
    let mut connections = JoinSet::new();
    let mut open = true;
    while open || !connections.is_empty() {
        tokio::select! {
            arrival = arrivals.recv(), if open => match arrival {
                Some(arrival) => {
                    connections.spawn_local(connection::run(Arc::clone(&shared), Rc::clone(&pool), arrival));
                }
                None => open = false,
            },
            Some(ended) = connections.join_next() => {
                load.fetch_sub(1, Ordering::Relaxed);
                if let Err(error) = ended {
                    tracing::error!("a connection's code has ended unexpectedly: {error}");
                }
            }
        }
    }
}
