//! The transmission phase: requests and replies (NBD, "Transmission").
//!
//! Four loops in one task (see [`crate::rounds`]), in the order in which the work flows:
//!
//! ```text
//!  reader ──► device ──────► writer
//!      └────► status ──────────┘
//! ```
//!
//! The session ends when the reader has ended and everything that it has taken has been answered, or the client can
//! no longer be answered.

mod device;
mod reader;
mod status;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cdp_types::{BlockDevice, Origin};
use front_end::Complaints;
use slab::Slab;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::Limits;
use crate::control::Control;
use crate::exports::StatusContext;
use crate::handshake::{Agreement, Opened};
use crate::memory::Pool;
use crate::outgoing::Outbox;
use crate::protocol::{Encoder, Errno, Headers, Whose};
use crate::rounds::{Rounds, Signal};
use crate::transport::Transport;
use device::Lane;
use status::Query;

/// Replies without payload that may wait to be sent, in bytes, before no further request is taken, nor a query answered.
const MAX_GATHERED: usize = 1 << 20;
/// NBD clients keep no in-flight region: no request has a number in it.
const NO_ORIGIN: Origin = Origin(0);

/// Why no more requests are taken.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The client has said so, or closed its stream.
    Client,
    /// The server wants it.
    Stopped,
    /// The client cannot be understood any more.
    Protocol(&'static str),
    /// The socket, or the device's queue, has failed.
    Failed(io::Error),
}

/// What the client has to do with.
struct View {
    size: u64,
    block: u64,
    writable: bool,
    /// Longest write, in bytes.
    longest_write: u64,
    headers: Headers,
    contexts: Vec<Arc<dyn StatusContext>>,
}

struct Session<'a, T> {
    transport: &'a T,
    control: &'a Control,
    limits: &'a Limits,
    view: View,
    encoder: Encoder,
    lane: RefCell<Lane>,
    queries: RefCell<VecDeque<Query>>,
    outbox: RefCell<Outbox>,
    complaints: RefCell<Complaints>,
    pool: Rc<Pool>,
    /// Memory that its requests hold, in bytes.
    held: Rc<Cell<usize>>,
    /// Requests that were taken and have no reply in the outbox yet.
    open_requests: Cell<usize>,
    /// Why the reader has ended, once it has: from then on no request is taken.
    ended: RefCell<Option<Ended>>,
    /// What has failed, and so ended the session before its time.
    failure: RefCell<Option<io::Error>>,
    /// Whether the client cannot be answered any more.
    mute: Cell<bool>,
    /// To the reader: there may be room for another request.
    room: Signal,
    /// To the device's loop: requests have been submitted, or the reader has ended.
    submitted: Signal,
    /// To the status loop: there are queries, or may be room for another answer, or the reader has ended.
    queried: Signal,
    /// To the writer: there are replies, or something has ended.
    replied: Signal,
}

/// Serves requests until the end. When this returns, nothing is in flight and the device's queue is closed.
///
/// # Errors
/// When there is no queue to be had.
pub(crate) async fn serve<T: Transport>(
    transport: &T,
    control: &Control,
    limits: &Limits,
    pool: &Rc<Pool>,
    opened: &Opened,
    agreement: Agreement,
) -> io::Result<Ended> {
    let device: &Arc<dyn BlockDevice> = opened.export.device();
    let info = device.info();
    let queue = device.open_queue()?;
    // A descriptor of its own: tokio must be able to forget it whatever has become of the queue.
    let descriptor = queue.descriptor()?.try_clone_to_owned()?;
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and `AsyncFd` owns it until then.
    let ready = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
    let rounds = Rounds::default();
    let Agreement { headers, size, input } = agreement;
    let session = Session {
        transport,
        control,
        limits,
        view: View {
            size,
            block: u64::from(info.logical_block_size),
            writable: opened.export.writable() && !info.read_only,
            longest_write: info.max_write_bytes.min(limits.max_request as u64),
            headers,
            contexts: opened.contexts.clone(),
        },
        encoder: Encoder { headers },
        lane: RefCell::new(Lane { queue, pending: Slab::new(), events: Vec::with_capacity(limits.requests) }),
        queries: RefCell::default(),
        outbox: RefCell::default(),
        complaints: RefCell::default(),
        pool: Rc::clone(pool),
        held: Rc::default(),
        open_requests: Cell::new(0),
        ended: RefCell::default(),
        failure: RefCell::default(),
        mute: Cell::new(false),
        room: rounds.signal(),
        submitted: rounds.signal(),
        queried: rounds.signal(),
        replied: rounds.signal(),
    };
    rounds.run(session.read(input), session.answer_queries(), session.drive(ready), session.write()).await;
    Ok(match session.failure.take() {
        Some(error) => Ended::Failed(error),
        None => session.ended.take().unwrap_or(Ended::Client),
    })
}

impl<T: Transport> Session<'_, T> {
    /// Whether all that was taken has been answered, and nothing more will be taken.
    fn is_settled(&self) -> bool {
        self.ended.borrow().is_some() && self.open_requests.get() == 0
    }

    /// The reader's last act.
    fn end(&self, why: Ended) {
        self.ended.replace(Some(why));
        self.submitted.raise();
        self.queried.raise();
        self.replied.raise();
    }

    /// Has the reader end before it takes anything more: it looks for that first.
    fn fail(&self, error: io::Error) {
        self.failure.borrow_mut().get_or_insert(error);
        self.control.stop();
        self.room.raise();
    }

    fn reply(&self, write: impl FnOnce(Encoder, &mut Vec<u8>)) {
        self.outbox.borrow_mut().gather(|bytes| write(self.encoder, bytes));
        self.replied.raise();
    }

    fn refuse(&self, whose: Whose, errno: Errno, message: &str) {
        self.reply(|encoder, bytes| encoder.error(bytes, whose, errno, message));
    }

    /// Takes note that a request has its reply in the outbox.
    fn close_request(&self) {
        self.open_requests.set(self.open_requests.get() - 1);
        self.room.raise();
        if self.is_settled() {
            self.replied.raise();
        }
    }

    /// Sends what is in the outbox, until nothing more will come into it.
    async fn write(&self) {
        let mut batch = Vec::new();
        loop {
            batch = self.outbox.borrow_mut().take(batch);
            if batch.is_empty() {
                if self.is_settled() {
                    return;
                }
                self.replied.wait().await;
                continue;
            }
            let mut result = Ok(());
            if !self.mute.get() {
                (result, batch) = self.transport.send(batch).await;
            }
            batch = self.outbox.borrow_mut().recycle(batch);
            self.note_held();
            if let Err(error) = result {
                self.mute.set(true);
                self.outbox.borrow_mut().clear();
                self.fail(error);
            }
            self.room.raise();
            self.queried.raise();
        }
    }

    fn note_held(&self) {
        self.control.held_bytes.store(self.held.get(), Ordering::Relaxed);
    }
}
