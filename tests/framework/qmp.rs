//! QEMU's control socket (QEMU's `docs/interop/qmp-spec.rst`), as much of it as tests need.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process::wait_for;

/// No command that tests send takes longer than this, `stop` with a slow disk included; nor does a QEMU take longer to be
/// there, though whoever starts it takes a checkpoint first.
const ANSWER: Duration = Duration::from_secs(180);

/// A connection, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to a QEMU that has just been started.
    ///
    /// # Errors
    /// Its socket does not appear in time, or speaks another language.
    pub fn connect(socket: &Path) -> Result<Self> {
        let what = format!("QEMU's socket {}", socket.display());
        let stream = wait_for(&what, ANSWER, || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut qmp = Self { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read()?;
        greeting.get("QMP").with_context(|| format!("no QMP greeting: {greeting}"))?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its answer.
    ///
    /// # Errors
    /// QEMU refuses it, or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        // In one piece: QEMU obeys at the closing brace, and after `quit` nobody reads the rest.
        self.stream.get_mut().write_all(request.as_bytes())?;
        loop {
            let mut answer = self.read().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.events.push(answer);
        }
    }

    /// `running`, `paused`, `io-error`…
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The events since the last call, oldest first.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn take_events(&mut self) -> Result<Vec<Value>> {
        // An answer comes behind all events before it.
        self.status()?;
        Ok(std::mem::take(&mut self.events))
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
