//! A guest agent for tests.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// What an agent does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentConduct {
    /// What it is asked.
    Obeys,
    /// It does not run: nothing is ever answered.
    Absent,
    /// It freezes, and does not answer that.
    FreezesInSilence,
    /// It takes so long to freeze, and hears nothing meanwhile.
    FreezesSlowly(Duration),
    /// It refuses to freeze.
    RefusesToFreeze,
    /// It does not say whether file systems stand still.
    SaysNoStatus,
    /// The port is closed at the first attempt to thaw, which is not carried out.
    HangsUpAtThaw,
}

/// A guest agent on a Unix socket, for as long as it lives. It speaks as qemu-ga does, and each new client first gets
/// an answer that somebody before it has not read.
#[derive(Debug)]
pub struct GuestAgent {
    state: Arc<Mutex<Guest>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Guest {
    frozen: bool,
    thaws: u32,
}

impl GuestAgent {
    /// Listens at `path`.
    ///
    /// # Errors
    /// If it cannot.
    pub fn start(path: &Path, conduct: AgentConduct) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let state = Arc::new(Mutex::new(Guest::default()));
        let guest = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, conduct, &guest).await;
            }
        });
        Ok(Self { state, task })
    }

    /// Whether the guest's file systems stand still.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).frozen
    }

    /// Has somebody else still the guest's file systems.
    pub fn freeze(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).frozen = true;
    }

    /// How often thawing was asked for.
    #[must_use]
    pub fn thaws(&self) -> u32 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).thaws
    }
}

impl Drop for GuestAgent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: UnixStream, conduct: AgentConduct, guest: &Mutex<Guest>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    if conduct != AgentConduct::Absent {
        let _ = writer.write_all(b"{\"return\": \"of yesterday\"}\n").await;
    }
    while matches!(reader.read_until(b'\n', &mut line).await, Ok(1..)) {
        let heard: Value =
            serde_json::from_slice(line.strip_prefix(&[0xff]).unwrap_or(&line)).unwrap_or_default();
        line.clear();
        let name = heard["execute"].as_str().unwrap_or_default();
        if let (AgentConduct::FreezesSlowly(time), "guest-fsfreeze-freeze") = (conduct, name) {
            tokio::time::sleep(time).await;
        }
        let said = {
            let mut guest = guest.lock().unwrap_or_else(PoisonError::into_inner);
            answer(name, &heard["arguments"], conduct, &mut guest)
        };
        match said {
            Said::Line(said) => {
                let _ = writer.write_all(&said).await;
            }
            Said::Nothing => {}
            Said::HangUp => return,
        }
    }
}

enum Said {
    Line(Vec<u8>),
    Nothing,
    HangUp,
}

fn answer(name: &str, arguments: &Value, conduct: AgentConduct, guest: &mut Guest) -> Said {
    let line = |value: Value| Said::Line(format!("{value}\n").into_bytes());
    let refuse = |desc: &str| line(json!({ "error": { "class": "GenericError", "desc": desc } }));
    let disabled = |why: &str| {
        let desc = format!("Command {name} has been disabled: {why}");
        line(json!({ "error": { "class": "CommandNotFound", "desc": desc } }))
    };
    match (name, conduct) {
        (_, AgentConduct::Absent) => Said::Nothing,
        ("guest-sync-delimited", _) => {
            let mut said = vec![0xff];
            said.extend(format!("{}\n", json!({ "return": arguments["id"] })).into_bytes());
            Said::Line(said)
        }
        ("guest-fsfreeze-freeze", AgentConduct::RefusesToFreeze) => {
            refuse("failed to freeze /: not supported")
        }
        ("guest-fsfreeze-freeze", _) if guest.frozen => disabled("the agent is in frozen state"),
        ("guest-fsfreeze-freeze", _) => {
            guest.frozen = true;
            match conduct {
                AgentConduct::FreezesInSilence => Said::Nothing,
                _ => line(json!({ "return": 2 })),
            }
        }
        ("guest-fsfreeze-thaw", _) => {
            guest.thaws += 1;
            if conduct == AgentConduct::HangsUpAtThaw && guest.thaws == 1 {
                return Said::HangUp;
            }
            let thawed = u32::from(guest.frozen) * 2;
            guest.frozen = false;
            line(json!({ "return": thawed }))
        }
        ("guest-fsfreeze-status", AgentConduct::SaysNoStatus) => disabled("the command is not allowed"),
        ("guest-fsfreeze-status", _) => {
            line(json!({ "return": if guest.frozen { "frozen" } else { "thawed" } }))
        }
        _ => refuse("The command has not been found"),
    }
}
