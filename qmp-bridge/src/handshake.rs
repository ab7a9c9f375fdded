//! From a path to a QEMU that takes commands.

use std::io;
use std::path::Path;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::client::Options;
use crate::error::{Error, ErrorKind, Result};
use crate::lines::{Lines, NoLine, excerpt};
use crate::message::{Greeting, Message, Version, command_line};

/// What to do about a socket that says nothing.
const HELD: &str = "a QMP socket serves one client at a time: close the other one (libvirt, a shell, another daemon), or \
                    give QEMU a second socket for this one, with -qmp unix:PATH,server=on,wait=off. If nobody else \
                    uses it, QEMU hangs, or this is the socket of something that waits to be spoken to";

/// A connection that is ready for commands.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) lines: Lines<OwnedReadHalf>,
    pub(crate) writer: OwnedWriteHalf,
    pub(crate) version: Version,
    pub(crate) oob: bool,
}

/// Connects, takes the greeting, negotiates; all within the greeting's deadline.
pub(crate) async fn open(path: &Path, options: Options) -> Result<Opened> {
    let subject = path.display();
    let stream = connect(path).await?;
    let (reader, mut writer) = stream.into_split();
    let mut lines = Lines::new(reader, options.max_line_bytes);
    let by = tokio::time::Instant::now() + options.greeting_deadline;

    let greeting = match tokio::time::timeout_at(by, greeting(path, &mut lines)).await {
        Ok(greeting) => greeting?,
        Err(_) if lines.partial().is_empty() => {
            let detail = format!("no greeting within {:?}; {HELD}", options.greeting_deadline);
            return Err(Error::new(ErrorKind::Held, subject, detail));
        }
        Err(_) => return Err(other_protocol(path, lines.partial())),
    };
    let negotiation = negotiate(path, &mut lines, &mut writer, greeting.oob);
    match tokio::time::timeout_at(by, negotiation).await {
        Ok(done) => done?,
        Err(_) => {
            let detail = "QEMU has greeted, and then said nothing more: it hangs";
            return Err(Error::new(ErrorKind::Deadline, subject, detail));
        }
    }
    Ok(Opened { lines, writer, version: greeting.version, oob: greeting.oob })
}

async fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).await.map_err(|error| match error.kind() {
        // The queue of those who wait to be accepted is full: QEMU accepts nobody while it has a client.
        io::ErrorKind::WouldBlock => Error::because(ErrorKind::Held, path.display(), HELD, error),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            let detail = "nobody listens there: is the machine running, and this its -qmp socket?";
            Error::because(ErrorKind::Unreachable, path.display(), detail, error)
        }
        _ => Error::because(ErrorKind::CannotConnect, path.display(), error.to_string(), error),
    })
}

async fn greeting(path: &Path, lines: &mut Lines<OwnedReadHalf>) -> Result<Greeting> {
    match lines.next().await {
        Ok(line) => Greeting::parse(&line).ok_or_else(|| other_protocol(path, &line)),
        Err(NoLine::TooLong | NoLine::Torn) => Err(other_protocol(path, lines.partial())),
        Err(end) => Err(ended(path, end)),
    }
}

async fn negotiate(
    path: &Path,
    lines: &mut Lines<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    oob: bool,
) -> Result<()> {
    const NEGOTIATION: &str = "qmp_capabilities";
    let arguments = oob.then(|| serde_json::json!({ "enable": ["oob"] }));
    let command = command_line(NEGOTIATION, arguments.as_ref(), 0, false);
    writer.write_all(&command).await.map_err(|error| ended(path, NoLine::Io(error)))?;
    loop {
        let line = lines.next().await.map_err(|end| ended(path, end))?;
        match Message::parse(&line) {
            Ok(Message::Reply { answer: Ok(_), .. }) => return Ok(()),
            Ok(Message::Reply { answer: Err(refusal), .. }) => {
                return Err(Error::refused(NEGOTIATION, refusal));
            }
            // QEMU takes us for negotiated before it says so, and its threads do not wait for that. Nobody here is told: what
            // was before a connection is up, nobody has seen.
            Ok(Message::Event { .. }) => {}
            Err(wrong) => return Err(nonsense(path, &format!("{wrong}: '{}'", excerpt(&line)))),
        }
    }
}

fn other_protocol(path: &Path, said: &[u8]) -> Error {
    let detail = format!("it says '{}'; the path should be that of QEMU's -qmp socket", excerpt(said));
    Error::new(ErrorKind::NotQmp, path.display(), detail)
}

fn nonsense(path: &Path, detail: &str) -> Error {
    Error::new(ErrorKind::Nonsense, path.display(), detail)
}

/// How the end of a stream is put.
pub(crate) fn ended(path: &Path, end: NoLine) -> Error {
    let subject = path.display();
    match end {
        NoLine::End => Error::new(ErrorKind::Gone, subject, "QEMU has closed it: it has ended, or is ending"),
        NoLine::Torn => Error::new(ErrorKind::Gone, subject, "it ended in the middle of a message"),
        NoLine::TooLong => {
            Error::new(ErrorKind::Nonsense, subject, "a line is longer than any answer should be")
        }
        NoLine::Io(error) => Error::because(ErrorKind::Gone, subject, error.to_string(), error),
    }
}
