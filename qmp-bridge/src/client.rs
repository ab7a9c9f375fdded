//! One connection to QEMU, for many callers at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qapi_spec::Command;
use serde_json::Value;
use tokio::time::Instant;

use crate::connection::{Asked, Connection};
use crate::error::{Error, ErrorKind, Result};
use crate::handshake;
use crate::message::{Version, command_line};
use crate::subscription::{Backlog, Hub, Subscription};

/// Bounds of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// From connecting until QEMU is ready for commands.
    pub greeting_deadline: Duration,
    /// From asking to the answer, unless [`Client::within`] says otherwise.
    pub command_deadline: Duration,
    /// The longest line that is taken from QEMU.
    pub max_line_bytes: usize,
}

impl Default for Options {
    /// Five seconds to connect; ten for a command, for QEMU's main thread may wait for disks; lines of 8 MiB
    /// (`query-qmp-schema` needs 0.3).
    fn default() -> Self {
        Self {
            greeting_deadline: Duration::from_secs(5),
            command_deadline: Duration::from_secs(10),
            max_line_bytes: 8 << 20,
        }
    }
}

/// What QEMU answered, and when among all its messages.
#[derive(Clone, Debug)]
pub struct Reply {
    /// What the command returned.
    pub value: Value,
    /// Its place among events: see [`Event::arrival`](crate::Event::arrival).
    pub arrival: u64,
}

/// One connection to QEMU. Clones share it; it is closed when the last one is dropped. It does not reconnect:
/// [`Bridge`](crate::Bridge) does.
///
/// Commands may be in flight side by side; QEMU carries them out one after the other, in the order in which the calls
/// were first polled. A call that is dropped, or whose deadline passes, may still be carried out; its late answer is
/// thrown away and disturbs nobody.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Arc<Connection>,
    hub: Arc<Hub>,
    deadline: Duration,
}

impl Client {
    /// Connects to the Unix socket at `path`, takes QEMU's greeting and makes it take commands, out of band ones too
    /// where it can.
    ///
    /// # Errors
    /// `Unreachable`, `CannotConnect`, `Held` (another client has this socket, or QEMU hangs), `NotQmp`, `Gone`, `Nonsense`,
    /// `Refused`.
    pub async fn connect(path: &Path, options: Options) -> Result<Self> {
        let hub = Arc::new(Hub::default());
        let mut client = Self::connect_to(path, options, Arc::clone(&hub)).await?;
        // A client alone has one connection, and when that is over so are its subscriptions.
        if let Some(connection) = Arc::get_mut(&mut client.connection) {
            connection.close_hub_at_end();
        }
        Ok(client)
    }

    pub(crate) async fn connect_to(path: &Path, options: Options, hub: Arc<Hub>) -> Result<Self> {
        let opened = handshake::open(path, options).await?;
        let connection = Connection::start(path, opened, Arc::clone(&hub));
        Ok(Self { connection: Arc::new(connection), hub, deadline: options.command_deadline })
    }

    /// The same connection, with another deadline for its commands.
    #[must_use]
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// What answers.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.connection.version
    }

    /// Where it was connected to.
    #[must_use]
    pub fn path(&self) -> &PathBuf {
        &self.connection.path
    }

    /// Whether QEMU takes commands out of band here.
    #[must_use]
    pub fn takes_oob(&self) -> bool {
        self.connection.oob
    }

    /// All that arrives from now on.
    #[must_use]
    pub fn subscribe(&self, backlog: Backlog) -> Subscription {
        self.hub.subscribe(backlog)
    }

    /// Why the connection has ended, once it has. Cancel-safe.
    pub async fn ended(&self) -> Error {
        self.connection.ended().await
    }

    /// Runs a command of the schema that crate `qapi-qmp` has (QEMU 9.1's), with its argument and reply types. Those
    /// of other versions differ here and there: what must work with all of them goes through
    /// [`execute_raw`](Self::execute_raw).
    ///
    /// # Errors
    /// As [`execute_raw`](Self::execute_raw), and `Unexpected` if the reply does not fit the type.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Ok> {
        let arguments = serde_json::to_value(&command).map_err(|error| {
            Error::because(ErrorKind::Unexpected, C::NAME, "its arguments are no JSON", error)
        })?;
        let value = self.execute_raw(C::NAME, arguments).await?;
        read_as(C::NAME, value)
    }

    /// Runs any command: what it returned. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// `Deadline`, `Gone`, `Nonsense`, `Refused`, `UnknownCommand`.
    pub async fn execute_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        Ok(self.ask(name, arguments).await?.value)
    }

    /// As [`execute_raw`](Self::execute_raw), and says when the reply arrived among the events.
    ///
    /// # Errors
    /// As [`execute_raw`](Self::execute_raw).
    pub async fn ask(&self, name: &str, arguments: Value) -> Result<Reply> {
        self.run(name, arguments, false).await
    }

    /// Runs a command out of band: QEMU carries it out while others hang. Few commands can be (`migrate-pause`,
    /// `migrate-recover`, `yank`).
    ///
    /// # Errors
    /// As [`execute_raw`](Self::execute_raw); `Refused` if the command cannot be, and `UnknownCommand` if nothing can
    /// be out of band on this connection.
    pub async fn execute_oob(&self, name: &str, arguments: Value) -> Result<Value> {
        if !self.takes_oob() {
            let why = "QEMU does not take commands out of band on this socket";
            return Err(Error::new(ErrorKind::UnknownCommand, name, why));
        }
        Ok(self.run(name, arguments, true).await?.value)
    }

    async fn run(&self, name: &str, arguments: Value, oob: bool) -> Result<Reply> {
        let by = Instant::now() + self.deadline;
        let arguments = match arguments {
            Value::Null => None,
            Value::Object(fields) if fields.is_empty() => None,
            given => Some(given),
        };
        let asked = async {
            let Asked { answer, .. } =
                self.connection.ask(oob, |id| command_line(name, arguments.as_ref(), id, oob)).await?;
            answer.await.map_err(|_| self.connection.reason())
        };
        let late = || {
            let detail = format!("QEMU has not answered within {:?}; it may still do it", self.deadline);
            Error::new(ErrorKind::Deadline, name, detail)
        };
        let answered = match tokio::time::timeout_at(by, asked).await {
            Err(_) => return Err(late()),
            Ok(Err(ended)) => return Err(ended.of(name)),
            Ok(Ok(answered)) => answered,
        };
        match answered.answer {
            Ok(value) => Ok(Reply { value, arrival: answered.arrival }),
            Err(refusal) => Err(Error::refused(name, refusal)),
        }
    }
}

/// A reply, or a part of one, as a type.
pub(crate) fn read_as<T: serde::de::DeserializeOwned>(name: &str, value: Value) -> Result<T> {
    serde_json::from_value(value)
        .map_err(|error| Error::because(ErrorKind::Unexpected, name, "not as this program knows it", error))
}
