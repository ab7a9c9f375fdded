//! A connection's two tasks: one writes commands, one reads what comes and hands it out in its order.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::handshake::{Opened, ended};
use crate::lines::{Lines, NoLine, excerpt};
use crate::message::{Message, Version};
use crate::subscription::{Hub, Notice};

/// Commands that QEMU is asked at a time, out of band ones not counted. QEMU stops reading when eight are queued, and
/// one out of band could then not overtake them (qmp-spec, "out-of-band execution").
const IN_FLIGHT: usize = 7;
/// Commands out of band at a time. They too have to be bounded by something.
const IN_FLIGHT_OOB: usize = 8;

#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) answer: std::result::Result<Value, Refusal>,
    pub(crate) arrival: u64,
}

/// A command that is on its way.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) answer: oneshot::Receiver<Answered>,
}

/// Who waits for a reply. The permit goes back when QEMU has answered, not when the caller gives up: until then the
/// command takes its place in QEMU's queue.
#[derive(Debug)]
struct Caller {
    to: oneshot::Sender<Answered>,
    _place: OwnedSemaphorePermit,
}

/// What callers and the two tasks share.
#[derive(Debug)]
struct Shared {
    callers: Mutex<Callers>,
    /// The reason, once the connection has ended.
    end: watch::Sender<Option<Error>>,
}

#[derive(Debug, Default)]
struct Callers {
    last_id: u64,
    waiting: HashMap<u64, Caller>,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
    pub(crate) oob: bool,
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    oob_places: Arc<Semaphore>,
    to_writer: mpsc::UnboundedSender<Vec<u8>>,
    tasks: [JoinHandle<()>; 2],
    hub: Arc<Hub>,
    closes_hub: bool,
}

impl Connection {
    pub(crate) fn start(path: &Path, opened: Opened, hub: Arc<Hub>) -> Self {
        let Opened { lines, writer, version, oob } = opened;
        let shared =
            Arc::new(Shared { callers: Mutex::new(Callers::default()), end: watch::Sender::new(None) });
        // Before anything of this connection can arrive.
        hub.tell(&Notice::Connected { version: version.clone() });
        // Unbounded, and no longer than the callers whom the semaphores have let through.
        let (to_writer, commands) = mpsc::unbounded_channel();
        let writing =
            tokio::spawn(write(path.to_owned(), writer, commands, Arc::clone(&shared), Arc::clone(&hub)));
        let reading = tokio::spawn(read(path.to_owned(), lines, Arc::clone(&shared), Arc::clone(&hub)));
        Self {
            path: path.to_owned(),
            version,
            oob,
            shared,
            places: Arc::new(Semaphore::new(IN_FLIGHT)),
            oob_places: Arc::new(Semaphore::new(IN_FLIGHT_OOB)),
            to_writer,
            tasks: [writing, reading],
            hub,
            closes_hub: false,
        }
    }

    /// Subscriptions end with this connection.
    pub(crate) fn close_hub_at_end(&mut self) {
        self.closes_hub = true;
    }

    /// Sends a command once there is a place for it.
    ///
    /// # Errors
    /// Why the connection has ended, if it has.
    pub(crate) async fn ask(&self, oob: bool, line: impl FnOnce(u64) -> Vec<u8>) -> Result<Asked> {
        let places = if oob { &self.oob_places } else { &self.places };
        let place = tokio::select! {
            place = Arc::clone(places).acquire_owned() => place.map_err(|_| self.reason())?,
            reason = self.ended() => return Err(reason),
        };
        let (to, answer) = oneshot::channel();
        let mut callers = self.shared.callers();
        // Asked under the lock: `Shared::finish` sets the reason and then forgets all callers under it.
        if let Some(reason) = self.shared.end.borrow().clone() {
            return Err(reason);
        }
        callers.last_id += 1;
        let id = callers.last_id;
        callers.waiting.insert(id, Caller { to, _place: place });
        // Under the lock, so that ids are in the order of sending. A writer that is gone has left a reason, or will.
        let _ = self.to_writer.send(line(id));
        Ok(Asked { answer })
    }

    /// Why it has ended; waits until it has.
    pub(crate) async fn ended(&self) -> Error {
        let mut end = self.shared.end.subscribe();
        match end.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(|| dropped(&self.path)),
            Err(_) => dropped(&self.path),
        }
    }

    /// Why it has ended, if it has just done so.
    pub(crate) fn reason(&self) -> Error {
        self.shared.end.borrow().clone().unwrap_or_else(|| dropped(&self.path))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.finish(&self.hub, dropped(&self.path));
        if self.closes_hub {
            self.hub.close();
        }
    }
}

impl Shared {
    /// No code that holds this lock can panic halfway through a change.
    fn callers(&self) -> MutexGuard<'_, Callers> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection for everybody, once: the first reason counts.
    fn finish(&self, hub: &Hub, reason: Error) {
        let first = self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert_with(|| reason.clone());
            first
        });
        if first {
            tracing::debug!(%reason, "QMP connection ended");
            hub.tell(&Notice::Disconnected { reason });
        }
        // Dropping the senders wakes the callers, who then find the reason.
        let gone = std::mem::take(&mut self.callers().waiting);
        drop(gone);
    }
}

fn dropped(path: &Path) -> Error {
    Error::new(ErrorKind::Gone, path.display(), "it was closed from this side")
}

async fn write(
    path: PathBuf,
    mut writer: OwnedWriteHalf,
    mut commands: mpsc::UnboundedReceiver<Vec<u8>>,
    shared: Arc<Shared>,
    hub: Arc<Hub>,
) {
    while let Some(line) = commands.recv().await {
        if let Err(error) = writer.write_all(&line).await {
            // What QEMU said last may still be unread, and is more telling than a broken pipe: the reader ends it,
            // unless it is the reading side that stays open.
            if error.kind() != std::io::ErrorKind::BrokenPipe {
                shared.finish(&hub, ended(&path, NoLine::Io(error)));
            }
            return;
        }
    }
}

async fn read(path: PathBuf, mut lines: Lines<OwnedReadHalf>, shared: Arc<Shared>, hub: Arc<Hub>) {
    let reason = loop {
        match lines.next().await {
            Ok(line) => {
                if let Err(wrong) = take(&line, &shared, &hub) {
                    let detail = format!("{wrong}: '{}'", excerpt(&line));
                    break Error::new(ErrorKind::Nonsense, path.display(), detail);
                }
            }
            Err(end) => break ended(&path, end),
        }
    };
    shared.finish(&hub, reason);
}

/// Hands one message out. This is the only place where events and replies get their numbers, and it runs in one task.
fn take(line: &[u8], shared: &Shared, hub: &Hub) -> std::result::Result<(), String> {
    match Message::parse(line)? {
        Message::Event { kind, time_us } => hub.event(kind, time_us, line.len()),
        Message::Reply { id, answer } => {
            let arrival = hub.number();
            let caller = id.and_then(|id| shared.callers().waiting.remove(&id));
            let caller = caller.ok_or("an answer to nothing that was asked")?;
            // The caller may have given up.
            let _ = caller.to.send(Answered { answer, arrival });
        }
    }
    Ok(())
}
