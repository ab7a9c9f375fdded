//! A volume's device queue as a place for a memory image.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use cdp_types::{BlockDevice, DeviceQueue, Event, Op, Origin, Ranges, RequestId, Wait};
use rustix::event::{EventfdFlags, eventfd};

use super::{Completion, PageStore, Request};
use crate::{Error, ErrorKind, Place};

/// A volume through a queue of its own, which one thread owns: it submits, and sleeps in the queue.
///
/// Requests are not tracked across a crash (their origin is 0): an image that was being saved is not continued.
#[derive(Debug)]
pub struct QueueStore {
    device: Arc<dyn BlockDevice>,
    /// Gone only while it is being dropped.
    requests: Option<Sender<(u64, Request)>>,
    done: Receiver<Completion>,
    /// Written to when there is something in `requests`.
    wake: Arc<OwnedFd>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl QueueStore {
    /// Opens a queue of the volume.
    ///
    /// # Errors
    /// `Store` when the operating system gives no queue or no thread.
    pub fn open(device: Arc<dyn BlockDevice>) -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Store, Place::Nowhere, "opening a queue of it").because(error)
        };
        let mut queue = device.open_queue().map_err(failed)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|errno| failed(errno.into()))?);
        queue.watch(Arc::clone(&wake), 0).map_err(failed)?;
        let (requests, submitted) = channel();
        let (ended, done) = channel();
        let worker = Worker { queue, submitted, ended, tokens: HashMap::new(), next: 0 };
        let thread = std::thread::Builder::new().name("ckpt-store".to_owned()).spawn(move || worker.run());
        let thread = Some(thread.map_err(failed)?);
        Ok(Self { device, requests: Some(requests), done, wake, in_flight: 0, thread })
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
    }
}

impl PageStore for QueueStore {
    fn capacity(&self) -> u64 {
        self.device.info().capacity
    }

    fn submit(&mut self, token: u64, request: Request) {
        self.in_flight += 1;
        // If the thread has ended, `completed` says so.
        let _ = self.requests.as_ref().map(|requests| requests.send((token, request)));
        self.wake();
    }

    fn completed(&mut self, patience: Duration, done: &mut Vec<Completion>) -> Result<(), Error> {
        let before = done.len();
        done.extend(self.done.try_iter());
        if done.len() == before {
            match self.done.recv_timeout(patience) {
                Ok(completion) => done.push(completion),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::Store, Place::Nowhere, "its queue is broken"));
                }
            }
            done.extend(self.done.try_iter());
        }
        self.in_flight -= done.len() - before;
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for QueueStore {
    fn drop(&mut self) {
        self.requests = None;
        self.wake();
        // A panic in the thread has been told by the panic hook.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct Worker {
    queue: Box<dyn DeviceQueue>,
    submitted: Receiver<(u64, Request)>,
    ended: Sender<Completion>,
    /// Tokens of requests in flight, which need not be unique, by the queue's ids, which are.
    tokens: HashMap<u64, u64>,
    next: u64,
}

impl Worker {
    /// Ends when the other side is gone or the queue breaks; what is in flight then nobody waits for.
    fn run(mut self) {
        let mut events = Vec::new();
        while self.submit_all() && self.queue.poll(Wait::Forever, &mut events).is_ok() {
            for event in events.drain(..) {
                if let Event::Completed { id, result } = event
                    && let Some(token) = self.tokens.remove(&id.0)
                {
                    // Nobody listens only when the other side is gone, which `submit_all` notices.
                    let _ = self.ended.send(Completion { token, result });
                }
            }
        }
    }

    /// Whether there will be more.
    fn submit_all(&mut self) -> bool {
        loop {
            match self.submitted.try_recv() {
                Ok((token, request)) => {
                    self.next += 1;
                    self.tokens.insert(self.next, token);
                    self.queue.submit(RequestId(self.next), operation(request));
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }
}

fn operation(request: Request) -> Op {
    let origin = Origin(0);
    match request {
        Request::Read { offset, into } => Op::Read { offset, into },
        Request::Write { offset, from } => Op::Write { offset, from, origin, fua: false },
        Request::Zero(range) => {
            let ranges: Ranges = std::iter::once(range).collect();
            Op::WriteZeroes { ranges, unmap: true, origin, fua: false }
        }
        Request::Flush => Op::Flush,
    }
}
