//! The loop between the session and the device.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use cdp_types::{DeviceQueue, Event, IoError, Op, RequestId, Wait};
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::Session;
use crate::memory::Buffer;
use crate::protocol::{Errno, Headers, Whose};
use crate::transport::Transport;

/// Requests in flight on the connection's own queue of the device.
pub(super) struct Lane {
    /// Dropped before the buffers that its requests may still use.
    pub(super) queue: Box<dyn DeviceQueue>,
    pub(super) pending: Slab<Pending>,
    pub(super) events: Vec<Event>,
}

/// A request in flight.
pub(super) struct Pending {
    whose: Whose,
    kind: Kind,
    buffer: Option<Buffer>,
}

#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Its buffer goes to the client; `whole` if it must be sent as data, even if it is all zeroes.
    Read { whole: bool },
    /// Its buffer has come from the client.
    Write,
    /// With a flush to follow, if it must be durable: a discard cannot be told to be.
    Trim { flush: bool },
    /// Only done or not done.
    Other,
}

impl Pending {
    pub(super) fn new(whose: Whose, kind: Kind, buffer: Option<Buffer>) -> Self {
        Self { whose, kind, buffer }
    }
}

impl Lane {
    pub(super) fn submit(&mut self, op: Op, pending: Pending) {
        let id = RequestId(self.pending.insert(pending) as u64);
        self.queue.submit(id, op);
    }
}

impl<T: Transport> Session<'_, T> {
    /// Runs the device's queue until nothing is in flight and nothing more will be.
    pub(super) async fn drive(&self, ready: AsyncFd<OwnedFd>) {
        // What a `poll` has returned counts as delivered at the next one, so there is one more before each rest.
        let mut undelivered = false;
        loop {
            let idle = self.lane.borrow().pending.is_empty();
            if idle && !undelivered {
                if self.ended.borrow().is_some() {
                    return;
                }
                self.submitted.wait().await;
                continue;
            }
            self.submitted.take();
            match self.poll_device() {
                Ok(events) => undelivered = events,
                Err(error) => return self.give_up(error),
            }
            if undelivered || idle {
                continue;
            }
            let wait = match self.lane.borrow_mut().queue.arm() {
                Ok(wait) => wait,
                Err(error) => return self.give_up(error),
            };
            match wait {
                // Others must have their turn all the same.
                Wait::No => tokio::task::yield_now().await,
                Wait::For(time) => self.rest(&ready, Some(time)).await,
                Wait::Forever => self.rest(&ready, None).await,
            }
        }
    }

    /// Answers what has ended. Says whether anything has.
    fn poll_device(&self) -> io::Result<bool> {
        let mut events = std::mem::take(&mut self.lane.borrow_mut().events);
        let polled = self.lane.borrow_mut().queue.poll(Wait::No, &mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            if let Event::Completed { id, result } = event {
                let pending = self.lane.borrow_mut().pending.try_remove(id.0 as usize);
                if let Some(pending) = pending {
                    self.complete(pending, result);
                }
            }
        }
        self.lane.borrow_mut().events = events;
        polled.map(|()| any)
    }

    /// Sleeps until the device or the reader has something, or the time is up.
    async fn rest(&self, ready: &AsyncFd<OwnedFd>, time: Option<Duration>) {
        let mut timer = pin!(async {
            match time {
                Some(time) => sleep(time).await,
                None => std::future::pending().await,
            }
        });
        poll_fn(|context| {
            if self.submitted.take() {
                return Poll::Ready(());
            }
            if let Poll::Ready(guard) = ready.poll_read_ready(context) {
                // Before the queue is polled: what comes after that makes it ready anew.
                if let Ok(mut guard) = guard {
                    guard.clear_ready();
                }
                return Poll::Ready(());
            }
            timer.as_mut().poll(context)
        })
        .await;
    }

    fn complete(&self, pending: Pending, result: Result<(), IoError>) {
        let Pending { whose, kind, buffer } = pending;
        if let Err(error) = result {
            self.complain(&error);
            self.refuse(whose, Errno::from(error.kind()), &error.kind().to_string());
            return self.close_request();
        }
        match (kind, buffer) {
            (Kind::Read { whole }, Some(buffer)) => {
                self.control.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                self.send_data(whose, buffer, whole);
            }
            (Kind::Trim { flush: true }, buffer) => {
                let flush = Pending::new(whose, Kind::Other, buffer);
                self.lane.borrow_mut().submit(Op::Flush, flush);
                return self.submitted.raise();
            }
            (kind, buffer) => {
                if let (Kind::Write, Some(buffer)) = (kind, &buffer) {
                    self.control.written_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                }
                drop(buffer);
                self.note_held();
                self.reply(|encoder, bytes| encoder.done(bytes, whose));
            }
        }
        self.close_request();
    }

    fn send_data(&self, whose: Whose, buffer: Buffer, whole: bool) {
        if !whole && self.view.headers != Headers::Simple && buffer.is_zero() {
            return self.reply(|encoder, bytes| encoder.hole(bytes, whose, buffer.len() as u32));
        }
        self.reply(|encoder, bytes| encoder.data(bytes, whose, buffer.len()));
        self.outbox.borrow_mut().payload(buffer);
    }

    /// The queue is broken: nothing that is in flight will be heard of again.
    fn give_up(&self, error: io::Error) {
        tracing::error!(connection = self.control.id, "the device's queue has failed: {error}");
        let pending: Vec<Whose> =
            self.lane.borrow().pending.iter().map(|(_, pending)| pending.whose).collect();
        for whose in pending {
            self.refuse(whose, Errno::Io, "the device's queue has failed");
            self.close_request();
        }
        self.fail(error);
    }

    fn complain(&self, error: &IoError) {
        let connection = self.control.id;
        self.complaints.borrow_mut().say(|more| {
            tracing::warn!(connection, more, "a request has failed: {error}");
        });
    }
}
