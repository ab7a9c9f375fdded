//! Answers that go on for long: produced by a thread that may block, sent as the client takes them.

use std::io::{self, Read};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes};
use cdp_types::VmName;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::api::{ApiError, ErrorKind, Line, Order, Progress};
use crate::machines::{Machines, Place};

use super::{App, permit, thread_died};

/// How long a client may take nothing: long enough for one whose user reads page by page.
const STALL: Duration = Duration::from_secs(600);
/// Chunks on their way, in either direction. Together with the chunks' size it bounds a stream's memory.
const CHUNKS: usize = 4;
/// Lines are gathered up to about so many bytes.
const LINES_BYTES: usize = 32 << 10;
/// Between two looks whether a machine has got its memory.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Progress is told this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// What a stream's thread sends: first perhaps a refusal, which becomes the answer's status, else bytes.
type Chunk = Result<Bytes, ApiError>;

/// Where a stream's thread sends its bytes.
pub(super) struct Outlet {
    sender: mpsc::Sender<Chunk>,
    stopping: watch::Receiver<bool>,
    runtime: Handle,
    begun: bool,
    /// Why nothing more is sent.
    closed: Option<ApiError>,
}

impl Outlet {
    /// Sends bytes; false if nobody wants any more.
    pub(super) fn send(&mut self, bytes: impl Into<Bytes>) -> bool {
        if self.closed.is_some() {
            return false;
        }
        let sent = self.runtime.block_on(async {
            tokio::select! {
                sent = tokio::time::timeout(STALL, self.sender.send(Ok(bytes.into()))) => match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err("the client has gone"),
                    Err(_) => Err("the client takes nothing"),
                },
                _ = self.stopping.wait_for(|stopping| *stopping) => Err("the daemon is stopping"),
            }
        });
        self.begun = true;
        self.closed = sent.err().map(|why| ApiError::new(ErrorKind::Unavailable, why));
        self.closed.is_none()
    }

    /// Ends the stream with an error: as the answer's status if nothing was sent, else as `last` puts it.
    fn fail(&mut self, error: ApiError, last: impl FnOnce(ApiError) -> Vec<u8>) {
        tracing::warn!(kind = ?error.kind, error = error.message, "a long answer failed");
        // Without waiting: if the client takes nothing, it sees the stream stop, which says the same.
        let chunk = if self.begun { Ok(last(error).into()) } else { Err(error) };
        let _ = self.sender.try_send(chunk);
    }

    /// Why the stream was cut off, if it was.
    fn cut_off(&mut self) -> Option<ApiError> {
        self.closed.take()
    }
}

/// Runs `work` on a thread of its own and answers with what it sends; `last` puts a late error into the
/// stream.
pub(super) async fn stream(
    app: &Arc<App>,
    media_type: &'static str,
    last: fn(ApiError) -> Vec<u8>,
    work: impl FnOnce(&App, &mut Outlet) -> Result<(), ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let permit = permit(&app.streams).await?;
    let (sender, mut chunks) = mpsc::channel(CHUNKS);
    let mut outlet = Outlet {
        sender,
        stopping: app.stopping.clone(),
        runtime: Handle::current(),
        begun: false,
        closed: None,
    };
    let app = Arc::clone(app);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let worked = work(&app, &mut outlet);
        if let Some(error) = outlet.cut_off().or(worked.err()) {
            outlet.fail(error, last);
        }
    });
    match chunks.recv().await {
        None => Err(thread_died()),
        Some(Err(refusal)) => Err(refusal),
        Some(Ok(first)) => {
            let body = axum::body::Body::new(Chunks { first: Some(first), chunks });
            Ok((StatusCode::OK, [(header::CONTENT_TYPE, media_type)], body).into_response())
        }
    }
}

/// The body of a streamed answer.
struct Chunks {
    first: Option<Bytes>,
    chunks: mpsc::Receiver<Chunk>,
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = ApiError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(Frame::data(first)))),
            None => self.chunks.poll_recv(context).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data))),
        }
    }
}

/// Gathers lines of NDJSON.
pub(super) struct Lines<'a, T> {
    outlet: &'a mut Outlet,
    gathered: Vec<u8>,
    told: Instant,
    items: PhantomData<fn(T)>,
}

impl<T: Serialize> Lines<'_, T> {
    /// Sends one result; false if nobody wants any more.
    pub(super) fn item(&mut self, item: &T) -> bool {
        append(&mut self.gathered, &Line::<&T, ()>::Item(item));
        self.gathered.len() < LINES_BYTES || self.flush()
    }

    /// Tells how far it has come, now and then; false if nobody wants any more.
    pub(super) fn progress(&mut self, progress: Progress) -> bool {
        if self.told.elapsed() < PROGRESS_EVERY && progress.done_bytes != progress.total_bytes {
            return self.outlet.closed.is_none();
        }
        self.told = Instant::now();
        append(&mut self.gathered, &Line::<&T, ()>::Progress(progress));
        self.flush()
    }

    fn flush(&mut self) -> bool {
        self.outlet.send(std::mem::take(&mut self.gathered))
    }
}

/// Appends a line. Nothing that the API says can fail to be JSON; if it did, a line would be missing its end
/// and the client would refuse it.
fn append(lines: &mut Vec<u8>, line: &impl Serialize) {
    let _ = serde_json::to_writer(&mut *lines, line);
    lines.push(b'\n');
}

/// Answers in lines: what `work` sends, then what it returns.
pub(super) async fn lines<T: Serialize + 'static, D: Serialize>(
    app: &Arc<App>,
    work: impl FnOnce(&App, &mut Lines<'_, T>) -> Result<D, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let last = |error| {
        let mut line = Vec::new();
        append(&mut line, &Line::<(), ()>::Error(error));
        line
    };
    stream(app, "application/x-ndjson", last, move |app, outlet| {
        let mut lines = Lines { outlet, gathered: Vec::new(), told: Instant::now(), items: PhantomData };
        let done = work(app, &mut lines)?;
        append(&mut lines.gathered, &Line::<(), D>::Done(done));
        lines.flush();
        Ok(())
    })
    .await
}

/// Answers in lines with the orders for a supervisor, until it, or the daemon, goes away; not before one has heard that the
/// machine has got its memory which is just being given to it.
pub(super) fn orders(app: &App, mut place: Place) -> Response {
    let (sender, chunks) = mpsc::channel(CHUNKS);
    let (machines, vm) = (Arc::clone(&app.machines), place.vm().clone());
    let mut stopping = app.stopping.clone();
    tokio::spawn(async move {
        let mut order = Order::Attached;
        loop {
            let mut line = Vec::new();
            append(&mut line, &Line::<Order, ()>::Item(order));
            if sender.send(Ok(line.into())).await.is_err() {
                return;
            }
            order = tokio::select! {
                biased;
                next = place.order() => match next { Some(order) => order, None => return },
                () = sender.closed() => return,
                () = over(&mut stopping, &machines, &vm) => return,
            };
        }
    });
    let body = axum::body::Body::new(Chunks { first: None, chunks });
    (StatusCode::OK, [(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Ends when the daemon stops and does nothing more with a machine.
async fn over(stopping: &mut watch::Receiver<bool>, machines: &Machines, vm: &VmName) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
    while machines.is_returning(vm) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A request's body, for a thread that may block.
pub(super) struct Inlet {
    chunks: mpsc::Receiver<Bytes>,
    stopping: watch::Receiver<bool>,
    runtime: Handle,
    current: Bytes,
}

impl Inlet {
    /// The body of a request that the caller is answering.
    pub(super) fn new(app: &App, mut body: axum::body::Body) -> Self {
        let (sender, chunks) = mpsc::channel(CHUNKS);
        tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                if let Ok(data) = frame.into_data() {
                    // When nobody reads any more, the rest is taken all the same: a client that is still
                    // writing must not be cut off before it has read why.
                    let _ = sender.send(data).await;
                }
            }
        });
        Self { chunks, stopping: app.stopping.clone(), runtime: Handle::current(), current: Bytes::new() }
    }
}

impl Read for Inlet {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            let chunk = self.runtime.block_on(async {
                tokio::select! {
                    chunk = tokio::time::timeout(STALL, self.chunks.recv()) => {
                        chunk.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client sends nothing"))
                    }
                    _ = self.stopping.wait_for(|stopping| *stopping) => {
                        Err(io::Error::other("the daemon is stopping"))
                    }
                }
            })?;
            match chunk {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let len = into.len().min(self.current.len());
        self.current.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}
