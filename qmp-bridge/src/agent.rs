//! The agent inside a guest (qemu-ga), on the socket of its virtio-serial port: stilling its file systems for a
//! checkpoint.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout_at};

use crate::client::read_as;
use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::lines::{Lines, NoLine, excerpt};

/// A byte that is in no JSON: the agent puts it in front of its answer to `guest-sync-delimited`, so that all before
/// it, answers to somebody's earlier questions, can be told from it.
const DELIMITER: u8 = 0xff;

/// Bounds of a conversation with an agent.
#[derive(Clone, Copy, Debug)]
pub struct AgentOptions {
    /// For one answer. An agent that does not run does not answer: there is no other sign of it.
    pub command_deadline: Duration,
    /// For `guest-fsfreeze-freeze`, which writes out all dirty pages of the guest.
    pub freeze_deadline: Duration,
    /// The longest line that is taken from the guest.
    pub max_line_bytes: usize,
}

impl Default for AgentOptions {
    /// Five seconds, thirty to freeze; lines of 64 KiB.
    fn default() -> Self {
        Self {
            command_deadline: Duration::from_secs(5),
            freeze_deadline: Duration::from_secs(30),
            max_line_bytes: 64 << 10,
        }
    }
}

/// The agent of one guest. Connects when something is asked, and again after any failure; asks one thing at a time.
/// The guest is not trusted: it cannot make this wait longer than the deadlines, nor hold more than a line.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    options: AgentOptions,
    /// None after a failure, since an answer that is late would be taken for one to the next question.
    connection: Option<Connection>,
    syncs: u64,
}

#[derive(Debug)]
struct Connection {
    lines: Lines<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

/// How long an agent that does not answer is asked again to thaw.
const THAW_PATIENCE: Duration = Duration::from_secs(600);
const THAW_AGAIN: Duration = Duration::from_secs(1);

/// Guests that are being thawed in the background.
static THAWING: AtomicUsize = AtomicUsize::new(0);

/// How many guests this process is thawing in the background, since whoever had stilled them has failed or gone. If it ends
/// before they are, they stay as they are.
#[must_use]
pub fn thawing() -> usize {
    THAWING.load(Ordering::Relaxed)
}

/// A guest whose file systems stand still, until [`thaw`](Self::thaw). If that fails, or is never called, dropping this
/// has it tried in the background for ten minutes: a guest with much to write out takes long to freeze, and answers nothing
/// before that.
#[derive(Debug)]
pub struct Frozen {
    agent: Agent,
    filesystems: u64,
    thawed: bool,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<AgentError>,
}

#[derive(Deserialize)]
struct AgentError {
    class: String,
    desc: String,
}

impl Agent {
    /// The agent behind the socket at `path`. Nothing is connected yet.
    #[must_use]
    pub fn new(path: &Path, options: AgentOptions) -> Self {
        // Numbers of earlier processes should not be given out again: their answers may still be in the port.
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let syncs = started.map_or(0, |since| since.as_micros() as u64 & 0x000f_ffff_ffff_ffff);
        Self { path: path.to_owned(), options, connection: None, syncs }
    }

    /// Stills all file systems of the guest. If that fails in whatever way, or this future is dropped, thawing is
    /// tried, for nobody knows how far it came. A guest that somebody else has frozen is left so.
    ///
    /// # Errors
    /// `Deadline` (no agent runs, or the guest is too busy), `Refused` (some file system cannot, or they stand still
    /// already), `UnknownCommand` (the agent may not, or not now), `Unreachable`, `CannotConnect`, `Held` (its socket has another client),
    /// `Gone`, `Nonsense`.
    pub async fn freeze(mut self) -> Result<Frozen> {
        const FREEZE: &str = "guest-fsfreeze-freeze";
        // An agent that never answers gets no freeze that it might carry out when nobody waits any more.
        self.sync().await?;
        self.refuse_frozen(FREEZE).await?;
        let within = self.options.freeze_deadline;
        let mut frozen = Frozen { agent: self, filesystems: 0, thawed: false };
        match frozen.agent.ask(FREEZE, within).await.and_then(|count| number(FREEZE, &count)) {
            Ok(filesystems) => {
                frozen.filesystems = filesystems;
                Ok(frozen)
            }
            // It has not begun: should anything stand still, somebody else wants that.
            Err(error) if error.kind() == ErrorKind::UnknownCommand => {
                frozen.thawed = true;
                Err(error)
            }
            Err(error) => {
                if let Err(failed) = frozen.thaw().await {
                    tracing::warn!(%failed, "a guest that could not be frozen could not be thawed either");
                }
                Err(error)
            }
        }
    }

    /// Refuses a guest that somebody else has frozen: its agent takes no second freeze, and the thaw that follows ours would
    /// end the first.
    async fn refuse_frozen(&mut self, name: &str) -> Result<()> {
        match self.freeze_status().await {
            Ok(status) if status == "frozen" => {
                let detail = "its file systems stand still already, and not for us: whoever has frozen them has to let them \
                              go first (guest-fsfreeze-thaw)";
                Err(Error::new(ErrorKind::Refused, name, detail))
            }
            Ok(_) => Ok(()),
            // An agent that does not say may freeze all the same.
            Err(error) => match error.kind() {
                ErrorKind::Refused | ErrorKind::UnknownCommand | ErrorKind::Unexpected => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Whether the guest's file systems stand still: `frozen` or `thawed`.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    pub async fn freeze_status(&mut self) -> Result<String> {
        let value = self.ask("guest-fsfreeze-status", self.options.command_deadline).await?;
        read_as("guest-fsfreeze-status", value)
    }

    /// Lets the guest's file systems go on, whoever has stilled them: how many had been.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    pub async fn thaw(&mut self) -> Result<u64> {
        const THAW: &str = "guest-fsfreeze-thaw";
        let value = self.ask(THAW, self.options.command_deadline).await?;
        number(THAW, &value)
    }

    async fn ask(&mut self, name: &str, within: Duration) -> Result<Value> {
        if self.connection.is_none() {
            self.sync().await?;
        }
        self.exchange(name, Value::Null, within, false).await
    }

    /// Connects if need be, and skips all that the port still holds of earlier conversations.
    async fn sync(&mut self) -> Result<()> {
        if self.connection.is_none() {
            self.connection = Some(Connection::open(&self.path, self.options.max_line_bytes).await?);
        }
        self.syncs += 1;
        let id = self.syncs;
        let arguments = json!({ "id": id });
        let answer =
            self.exchange("guest-sync-delimited", arguments, self.options.command_deadline, true).await?;
        if answer.as_u64() == Some(id) {
            return Ok(());
        }
        self.connection = None;
        let detail =
            format!("it was asked to repeat {id} and says '{answer}': is somebody else talking to it?");
        Err(Error::new(ErrorKind::Nonsense, self.path.display(), detail))
    }

    /// One question and its answer. The connection is taken out meanwhile: should this be dropped, or fail, it is gone.
    async fn exchange(
        &mut self,
        name: &str,
        arguments: Value,
        within: Duration,
        sync: bool,
    ) -> Result<Value> {
        let Some(mut connection) = self.connection.take() else {
            return Err(Error::new(ErrorKind::Gone, name, "not connected"));
        };
        let exchanged = connection.exchange(name, &arguments, sync);
        let answer = match timeout_at(Instant::now() + within, exchanged).await {
            Ok(answer) => {
                answer.map_err(|error| error.of(format_args!("{}: {name}", self.path.display())))?
            }
            Err(_) => {
                let detail = format!("no answer from the guest within {within:?}: does qemu-ga run in it?");
                return Err(Error::new(ErrorKind::Deadline, name, detail));
            }
        };
        self.connection = Some(connection);
        match (answer.returned, answer.error) {
            (Some(value), None) => Ok(value),
            (_, Some(AgentError { class, desc })) => Err(Error::refused(name, Refusal { class, desc })),
            (None, None) => Err(Error::new(ErrorKind::Unexpected, name, "neither a return nor an error")),
        }
    }
}

impl Connection {
    async fn open(path: &Path, max_line_bytes: usize) -> Result<Self> {
        let stream = UnixStream::connect(path).await.map_err(|error| {
            let (kind, detail) = match error.kind() {
                // As many wait as may: QEMU accepts nobody while it has a client.
                io::ErrorKind::WouldBlock => {
                    (ErrorKind::Held, "somebody else talks to the guest agent, or QEMU hangs")
                }
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    (ErrorKind::Unreachable, "nobody listens for the guest agent")
                }
                _ => (ErrorKind::CannotConnect, "the guest agent may be there"),
            };
            Error::because(kind, path.display(), detail, error)
        })?;
        let (reader, writer) = stream.into_split();
        Ok(Self { lines: Lines::new(reader, max_line_bytes), writer })
    }

    async fn exchange(&mut self, name: &str, arguments: &Value, sync: bool) -> Result<Answer> {
        let mut command = json!({ "execute": name });
        if !arguments.is_null() {
            command["arguments"] = arguments.clone();
        }
        let mut line = Vec::new();
        if sync {
            // Ends whatever half a command a predecessor has left in the agent's parser.
            line.push(DELIMITER);
        }
        line.extend(command.to_string().into_bytes());
        line.push(b'\n');
        self.writer.write_all(&line).await.map_err(|error| end(NoLine::Io(error)))?;
        loop {
            let line = self.lines.next().await.map_err(end)?;
            let said = match line.iter().rposition(|byte| *byte == DELIMITER) {
                Some(at) => &line[at + 1..],
                // Before the delimiter comes what others have asked.
                None if sync => continue,
                None => &line[..],
            };
            return serde_json::from_slice(said)
                .map_err(|error| Error::because(ErrorKind::Nonsense, "", excerpt(said), error));
        }
    }
}

impl Frozen {
    /// How many file systems stand still.
    #[must_use]
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// Lets them go on: how many did. Tried twice, the second time on a new connection.
    ///
    /// # Errors
    /// As [`Agent::freeze`]: then the guest may stand still until somebody thaws it.
    pub async fn thaw(mut self) -> Result<u64> {
        let first = self.agent.thaw().await;
        let thawed = match first {
            Ok(count) => Ok(count),
            Err(_) => {
                self.agent.connection = None;
                self.agent.thaw().await
            }
        };
        self.thawed = thawed.is_ok();
        thawed
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.thawed {
            return;
        }
        let agent = Agent::new(&self.agent.path, self.agent.options);
        // The socket serves one at a time.
        self.agent.connection = None;
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            tracing::error!(path = %agent.path.display(), "a frozen guest was dropped outside a runtime: not thawed");
            return;
        };
        let counted = Counted::new();
        runtime.spawn(async move {
            let _counted = counted;
            keep_thawing(agent).await;
        });
    }
}

/// One more in [`THAWING`].
struct Counted(());

impl Counted {
    fn new() -> Self {
        THAWING.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        THAWING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Has a guest thaw that may still be busy freezing: until all is written out its agent answers nothing, and what it is asked
/// then would come before the end of the freeze if nobody asked again.
async fn keep_thawing(mut agent: Agent) {
    let by = Instant::now() + THAW_PATIENCE;
    while let Err(error) = agent.thaw().await {
        let is_there = matches!(
            error.kind(),
            ErrorKind::Deadline | ErrorKind::Held | ErrorKind::Gone | ErrorKind::Nonsense
        );
        if !is_there || Instant::now() >= by {
            tracing::error!(%error, "a guest may still be frozen");
            return;
        }
        agent.connection = None;
        tokio::time::sleep(THAW_AGAIN).await;
    }
}

fn end(end: NoLine) -> Error {
    match end {
        NoLine::End | NoLine::Torn => Error::new(ErrorKind::Gone, "", "the guest agent's socket was closed"),
        NoLine::TooLong => Error::new(ErrorKind::Nonsense, "", "a line is longer than any answer should be"),
        NoLine::Io(error) => Error::because(ErrorKind::Gone, "", error.to_string(), error),
    }
}

fn number(name: &str, value: &Value) -> Result<u64> {
    let wrong = || Error::new(ErrorKind::Unexpected, name, format!("'{value}' is no number"));
    value.as_u64().ok_or_else(wrong)
}
