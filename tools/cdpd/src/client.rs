//! The other end of the API: a client of the control socket, for programs that may block.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc as events;

use bytes::{Buf, Bytes};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame as BodyFrame, Incoming};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::mpsc;

use crate::api::{ApiError, ErrorKind, Line, Progress};
use crate::frames::{CONTENT_TYPE, Frame};
use crate::socket;

/// The most bytes of an answer that is not streamed: a hundred thousand volumes.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// A daemon that answers.
pub struct Client {
    runtime: Runtime,
    store: PathBuf,
}

/// What comes before the end of an answer in lines.
#[derive(Debug)]
pub enum Step<T> {
    /// One of many results.
    Item(T),
    /// How far it has come.
    Progress(Progress),
}

type RequestBody = BoxBody<Bytes, io::Error>;

impl Client {
    /// A client of the daemon that serves the store in `directory`; `None` if there is none.
    ///
    /// # Errors
    /// There may be one, but it cannot be reached: no permission, for instance.
    pub fn find(directory: &Path) -> io::Result<Option<Self>> {
        if socket::connect(directory)?.is_none() {
            return Ok(None);
        }
        // One thread moves bytes while the caller's reads files and draws progress.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build()?;
        Ok(Some(Self { runtime, store: directory.to_owned() }))
    }

    /// GET, answered with JSON.
    ///
    /// # Errors
    /// The daemon's refusal, or that it cannot be reached.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(Method::GET, path, empty())
    }

    /// A request with JSON, answered with JSON.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body = serde_json::to_vec(body).map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?;
        self.json(method, path, full(body))
    }

    /// DELETE.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(Method::DELETE, path, empty())
    }

    /// A request that is answered in lines. `step` sees them as they come; when it returns false, the request
    /// is given up, and the answer is `None`.
    ///
    /// # Errors
    /// As for [`Client::get`]; also when the answer stops before its end.
    pub fn lines<T: DeserializeOwned, D: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        step: &mut dyn FnMut(Step<T>) -> bool,
    ) -> Result<Option<D>, ApiError> {
        let response =
            self.runtime.block_on(request(&self.store, method, path, "application/json", empty()))?;
        read_lines(self.answer(response)?, step)
    }

    /// GET, answered with a content stream, for [`Frame::read`].
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub fn content(&self, path: &str) -> Result<impl Read + use<>, ApiError> {
        let response =
            self.runtime.block_on(request(&self.store, Method::GET, path, "application/json", empty()))?;
        Ok(BufReader::with_capacity(256 << 10, self.answer(response)?))
    }

    /// POST of a content stream, answered in lines. `next` makes the frames; the last is [`Frame::End`].
    ///
    /// # Errors
    /// As for [`Client::lines`], and whatever `next` says: the daemon then forgets what it was sent.
    pub fn import<D: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        next: &mut dyn FnMut() -> Result<Frame, ApiError>,
        step: &mut dyn FnMut(Progress),
    ) -> Result<D, ApiError> {
        let (chunks, body) = mpsc::channel(4);
        let (event, events) = events::channel();
        let (store, path) = (self.store.clone(), path.to_owned());
        let handle = self.runtime.handle().clone();
        // The daemon may refuse in the middle, so its answer is read while the request is being sent.
        let answer = std::thread::spawn(move || {
            let body = BodyExt::boxed(Chunks(body));
            let response = handle.block_on(request(&store, Method::POST, &path, CONTENT_TYPE, body))?;
            read_lines::<(), D>(answer(&handle, response)?, &mut |step| {
                if let Step::Progress(progress) = step {
                    let _ = event.send(progress);
                }
                true
            })
        });
        let sent = loop {
            events.try_iter().for_each(&mut *step);
            match next() {
                Ok(frame) => {
                    let last = frame == Frame::End;
                    // It cannot be sent when the answer is there already, or never will be.
                    if chunks.blocking_send(frame.encode().into()).is_err() || last || answer.is_finished() {
                        break Ok(());
                    }
                }
                Err(error) => {
                    let _ = chunks.blocking_send(Frame::Error(error.clone()).encode().into());
                    break Err(error);
                }
            }
        };
        drop(chunks);
        events.iter().for_each(step);
        let answer = answer.join().unwrap_or_else(|_| Err(stopped("the thread that read the answer died")));
        sent?;
        answer?.ok_or_else(|| stopped("there was no answer"))
    }

    fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: RequestBody,
    ) -> Result<T, ApiError> {
        let response = self.runtime.block_on(request(&self.store, method, path, "application/json", body))?;
        let mut text = Vec::new();
        self.answer(response)?.take(MAX_ANSWER_BYTES).read_to_end(&mut text).map_err(|e| stopped(&e))?;
        let text = if text.is_empty() { b"null" } else { &text[..] };
        serde_json::from_slice(text).map_err(|e| stopped(&e))
    }

    fn answer(&self, response: Response<Incoming>) -> Result<Answer, ApiError> {
        answer(self.runtime.handle(), response)
    }
}

fn empty() -> RequestBody {
    full(Bytes::new())
}

fn full(bytes: impl Into<Bytes>) -> RequestBody {
    BodyExt::boxed(Full::new(bytes.into()).map_err(|never| match never {}))
}

fn stopped(why: &(impl ToString + ?Sized)) -> ApiError {
    ApiError::new(ErrorKind::Unavailable, format!("cdpd does not answer: {}", why.to_string()))
}

/// Sends a request over a connection of its own.
async fn request(
    store: &Path,
    method: Method,
    path: &str,
    media_type: &'static str,
    body: RequestBody,
) -> Result<Response<Incoming>, ApiError> {
    let stream = socket::connect(store)
        .and_then(|stream| stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
        .and_then(|stream| {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        })
        .map_err(|e| stopped(&e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| stopped(&e))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "cdpd")
        .header(header::CONTENT_TYPE, media_type)
        .body(body)
        .map_err(|e| ApiError::new(ErrorKind::Invalid, e.to_string()))?;
    sender.send_request(request).await.map_err(|e| stopped(&e))
}

/// The answer's body, or the refusal that it is.
fn answer(runtime: &Handle, response: Response<Incoming>) -> Result<Answer, ApiError> {
    let status = response.status();
    let mut answer = Answer { runtime: runtime.clone(), body: response.into_body(), current: Bytes::new() };
    if status.is_success() {
        return Ok(answer);
    }
    let mut text = Vec::new();
    answer.by_ref().take(MAX_ANSWER_BYTES).read_to_end(&mut text).map_err(|e| stopped(&e))?;
    Err(serde_json::from_slice(&text).unwrap_or_else(|_| stopped(&status)))
}

fn read_lines<T: DeserializeOwned, D: DeserializeOwned>(
    answer: Answer,
    step: &mut dyn FnMut(Step<T>) -> bool,
) -> Result<Option<D>, ApiError> {
    for line in BufReader::with_capacity(64 << 10, answer).split(b'\n') {
        let line = line.map_err(|e| stopped(&e))?;
        let step_on = match serde_json::from_slice(&line).map_err(|e| stopped(&e))? {
            Line::Item(item) => step(Step::Item(item)),
            Line::Progress(progress) => step(Step::Progress(progress)),
            Line::Done(done) => return Ok(Some(done)),
            Line::Error(error) => return Err(error),
        };
        if !step_on {
            return Ok(None);
        }
    }
    Err(stopped("the answer has no end"))
}

/// A body that is read by a thread that may block.
struct Answer {
    runtime: Handle,
    body: Incoming,
    current: Bytes,
}

impl Read for Answer {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.runtime.block_on(self.body.frame()) {
                None => return Ok(0),
                Some(frame) => {
                    self.current = frame.map_err(io::Error::other)?.into_data().unwrap_or_default();
                }
            }
        }
        let len = into.len().min(self.current.len());
        self.current.copy_to_slice(&mut into[..len]);
        Ok(len)
    }
}

/// A body that is written by a thread that may block.
struct Chunks(mpsc::Receiver<Bytes>);

impl Body for Chunks {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<BodyFrame<Bytes>, io::Error>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| Ok(BodyFrame::data(chunk))))
    }
}
