//! The host's end of the agent's serial port.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::agent::{Event, Request};

/// What a command gets to hear.
enum Said {
    Line(String),
    Exit(i32),
}

#[derive(Default)]
struct Shared {
    boots: u64,
    /// Dropping a sender tells its command that no answer will come.
    commands: HashMap<u64, Sender<Said>>,
}

/// Sends commands and hands each its own answers.
#[derive(Debug)]
pub(super) struct Channel {
    port: UnixStream,
    next_id: u64,
    shared: Arc<Mutex<Shared>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "boot {}, {} commands", self.boots, self.commands.len())
    }
}

impl Channel {
    /// Listens on a connected port until QEMU closes it.
    pub(super) fn new(port: UnixStream) -> Result<Self> {
        let shared = Arc::<Mutex<Shared>>::default();
        let reader = port.try_clone()?;
        let ours = Arc::clone(&shared);
        std::thread::spawn(move || {
            listen(reader, &ours);
            // QEMU is gone: nobody waits for it any longer.
            lock(&ours).commands.clear();
        });
        Ok(Self { port, next_id: 0, shared })
    }

    /// Listens on the port of an agent that was put back with its machine: in the middle of whatever it did.
    pub(super) fn resumed(mut port: UnixStream) -> Result<Self> {
        // Ends what it had heard of a line.
        port.write_all(b"\n")?;
        Self::new(port)
    }

    /// How often the guest's agent has started.
    pub(super) fn boots(&self) -> u64 {
        lock(&self.shared).boots
    }

    pub(super) fn start(&mut self, command: &str) -> Result<Running> {
        self.next_id += 1;
        let (sender, said) = channel();
        lock(&self.shared).commands.insert(self.next_id, sender);
        let mut line = serde_json::to_vec(&Request { id: self.next_id, command: command.to_owned() })?;
        line.push(b'\n');
        self.port.write_all(&line).context("the guest's serial port")?;
        Ok(Running { said, output: String::new() })
    }
}

fn listen(port: UnixStream, shared: &Mutex<Shared>) {
    let mut port = BufReader::new(port);
    let mut line = Vec::new();
    while port.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        // A reset cuts a line short; what cannot be read is the remainder of one.
        if let Ok(event) = serde_json::from_slice(&line) {
            lock(shared).take(event);
        }
        line.clear();
    }
}

impl Shared {
    fn take(&mut self, event: Event) {
        match event {
            Event::Hello => {
                self.boots += 1;
                // Whatever ran before this boot has no end to tell of.
                self.commands.clear();
            }
            Event::Line { id, text } => {
                if let Some(command) = self.commands.get(&id) {
                    // Whoever no longer listens misses nothing.
                    let _ = command.send(Said::Line(text));
                }
            }
            Event::Exit { id, status } => {
                if let Some(command) = self.commands.remove(&id) {
                    let _ = command.send(Said::Exit(status));
                }
            }
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command that runs in the guest.
#[derive(Debug)]
pub struct Running {
    said: Receiver<Said>,
    output: String,
}

impl Running {
    /// Waits for its end; returns its exit status and all its output.
    ///
    /// # Errors
    /// It does not end within `limit`, or the guest resets or dies.
    pub fn finish(mut self, limit: Duration) -> Result<(i32, String)> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(Said::Line(line)) => self.note(&line),
                Ok(Said::Exit(status)) => return Ok((status, self.output)),
                Err(RecvTimeoutError::Timeout) => bail!("no end after {limit:?}; so far:\n{}", self.output),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone; so far:\n{}", self.output),
            }
        }
    }

    /// Its lines up to the guest's end, which the caller has brought about; those already returned included.
    ///
    /// # Errors
    /// The guest still lives after `limit`.
    pub fn last_words(mut self, limit: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(Said::Line(line)) => self.note(&line),
                Ok(Said::Exit(_)) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the guest still lives after {limit:?}"),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(self.output.lines().map(str::to_owned).collect())
    }

    /// The lines that have arrived since the last call, whether it still runs or has ended.
    pub fn new_lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Ok(said) = self.said.try_recv() {
            if let Said::Line(line) = said {
                self.note(&line);
                lines.push(line);
            }
        }
        lines
    }

    /// Waits for its next line.
    ///
    /// # Errors
    /// None comes within `limit`, it ends, or the guest is gone.
    pub fn next_line(&mut self, limit: Duration) -> Result<String> {
        match self.said.recv_timeout(limit) {
            Ok(Said::Line(line)) => {
                self.note(&line);
                Ok(line)
            }
            Ok(Said::Exit(status)) => bail!("it ended with status {status}; before that:\n{}", self.output),
            Err(RecvTimeoutError::Timeout) => bail!("silent for {limit:?}; so far:\n{}", self.output),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone; so far:\n{}", self.output),
        }
    }

    fn note(&mut self, line: &str) {
        self.output.push_str(line);
        self.output.push('\n');
    }
}
