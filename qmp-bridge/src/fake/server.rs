//! A socket behind which a transcript, or a test's own function, plays QEMU.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::transcript::{Fault, Step, Transcript};

/// How long a replay may take to its end once the test says that it should be over.
const FINISH_DEADLINE: Duration = Duration::from_secs(10);

/// What a fake QEMU says to a command.
#[derive(Clone, Debug)]
pub enum Say {
    /// The command's reply.
    Return(Value),
    /// The command's reply: an error of this class, in these words.
    Refuse(&'static str, String),
    /// An event of this name with this data.
    Event(&'static str, Value),
    /// Nothing for this long.
    Wait(Duration),
    /// Something goes wrong; what follows is not said, except after bytes.
    Fault(Fault),
}

/// A fake QEMU on a Unix socket, for as long as it lives.
#[derive(Debug)]
pub struct Fake {
    task: JoinHandle<Result<(), String>>,
}

/// Has a fake QEMU say something unasked.
#[derive(Clone, Debug)]
pub struct Voice {
    say: mpsc::UnboundedSender<(Say, SystemTime)>,
}

impl Voice {
    /// Says it once what was asked before is answered. As with QEMU, a client that has not negotiated yet hears nothing
    /// of it, nor does one that comes later. Events bear the time of this call.
    pub fn say(&self, say: Say) {
        // A fake that has gone says nothing.
        let _ = self.say.send((say, SystemTime::now()));
    }
}

struct Conversation {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// What of the next line has come.
    partial: Vec<u8>,
}

impl Fake {
    /// Listens at `path` and plays one transcript for each connection, in this order. Then nobody listens any more.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn replay(path: &Path, transcripts: Vec<Transcript>) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let path = path.to_owned();
        let task = tokio::spawn(async move {
            for (number, transcript) in transcripts.iter().enumerate() {
                let (stream, _) = listener.accept().await.map_err(|error| error.to_string())?;
                if number + 1 == transcripts.len() {
                    std::fs::remove_file(&path).map_err(|error| error.to_string())?;
                }
                Conversation::new(stream).play(transcript).await?;
            }
            Ok(())
        });
        Ok(Self { task })
    }

    /// Listens at `path`, greets each client, one after the other, as QEMU of this version, and does with each command
    /// what `answer` says. `qmp_capabilities` is answered here.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn answering<F>(path: &Path, version: (u32, u32, u32), answer: F) -> io::Result<Self>
    where
        F: FnMut(&str, &Value) -> Vec<Say> + Send + 'static,
    {
        Self::speaking(path, version, answer).map(|(fake, _)| fake)
    }

    /// As [`answering`](Self::answering), and says what it is told to at any time.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn speaking<F>(path: &Path, version: (u32, u32, u32), mut answer: F) -> io::Result<(Self, Voice)>
    where
        F: FnMut(&str, &Value) -> Vec<Say> + Send + 'static,
    {
        let listener = UnixListener::bind(path)?;
        let (say, mut unasked) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.map_err(|error| error.to_string())?;
                Conversation::new(stream).answer(version, &mut answer, &mut unasked).await;
            }
        });
        Ok((Self { task }, Voice { say }))
    }

    /// Waits until all transcripts have been played to their ends.
    ///
    /// # Errors
    /// What the client did that is not in the transcript; or that it did not do all of it.
    pub async fn finished(mut self) -> Result<(), String> {
        match tokio::time::timeout(FINISH_DEADLINE, &mut self.task).await {
            Ok(Ok(played)) => played,
            Ok(Err(died)) => Err(died.to_string()),
            Err(_) => Err("the transcripts are not at their end".into()),
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Conversation {
    fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: BufReader::new(reader), writer, partial: Vec::new() }
    }

    /// None once the client has hung up. Cancel-safe.
    async fn hear(&mut self) -> Option<Value> {
        let ended = self.reader.read_until(b'\n', &mut self.partial).await.is_err();
        let line = std::mem::take(&mut self.partial);
        if ended || line.is_empty() {
            return None;
        }
        let text = || Value::String(String::from_utf8_lossy(&line).into_owned());
        Some(serde_json::from_slice(&line).unwrap_or_else(|_| text()))
    }

    /// The client may be gone; then hearing nothing of it is the end.
    async fn say(&mut self, message: &Value) {
        let _ = self.writer.write_all(format!("{message}\r\n").as_bytes()).await;
    }

    /// Nothing that is said is heard.
    async fn silence(&mut self) {
        while self.hear().await.is_some() {}
    }

    /// Whether the conversation goes on.
    async fn fault(&mut self, fault: &Fault) -> bool {
        match fault {
            Fault::Silence => self.silence().await,
            Fault::HangUp => {}
            Fault::Say(bytes) => {
                let _ = self.writer.write_all(bytes).await;
                return true;
            }
        }
        false
    }

    async fn play(mut self, transcript: &Transcript) -> Result<(), String> {
        let mut ids = HashMap::new();
        for (number, step) in transcript.steps().iter().enumerate() {
            match step {
                Step::Note(_) => {}
                Step::Qemu(said) => self.say(&with_id(said, &ids)).await,
                Step::Client(expected) => {
                    let heard = self.hear().await;
                    let heard = heard.ok_or_else(|| format!("step {number}: hung up before {expected}"))?;
                    if without_id(&heard) != without_id(expected) {
                        return Err(format!("step {number}: {heard} instead of {expected}"));
                    }
                    ids.insert(expected["id"].to_string(), heard["id"].clone());
                }
                Step::Fault(fault) => {
                    if !self.fault(fault).await {
                        return Ok(());
                    }
                }
            }
        }
        match self.hear().await {
            None => Ok(()),
            Some(heard) => Err(format!("{heard} after the end of the transcript")),
        }
    }

    async fn answer<F>(
        mut self,
        (major, minor, micro): (u32, u32, u32),
        answer: &mut F,
        unasked: &mut mpsc::UnboundedReceiver<(Say, SystemTime)>,
    ) where
        F: FnMut(&str, &Value) -> Vec<Say>,
    {
        let version =
            json!({ "qemu": { "major": major, "minor": minor, "micro": micro }, "package": "fake" });
        self.say(&json!({ "QMP": { "version": version, "capabilities": ["oob"] } })).await;
        let mut negotiated = false;
        loop {
            let heard = tokio::select! {
                heard = self.hear() => heard,
                Some((say, at)) = unasked.recv(), if negotiated => {
                    if self.carry_out(say, at, &Value::Null).await { continue } else { return }
                }
            };
            let Some(heard) = heard else { return };
            let name = heard["execute"].as_str().or(heard["exec-oob"].as_str()).unwrap_or_default();
            let said = match name {
                "qmp_capabilities" => {
                    while unasked.try_recv().is_ok() {}
                    negotiated = true;
                    vec![Say::Return(json!({}))]
                }
                _ => answer(name, &heard["arguments"]),
            };
            for say in said {
                if !self.carry_out(say, SystemTime::now(), &heard["id"]).await {
                    return;
                }
            }
        }
    }

    /// Whether the conversation goes on.
    async fn carry_out(&mut self, say: Say, at: SystemTime, id: &Value) -> bool {
        match say {
            Say::Return(value) => self.say(&json!({ "return": value, "id": id })).await,
            Say::Refuse(class, desc) => {
                let error = json!({ "class": class, "desc": desc });
                self.say(&json!({ "error": error, "id": id })).await;
            }
            Say::Event(name, data) => {
                let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
                let timestamp = json!({ "seconds": at.as_secs(), "microseconds": at.subsec_micros() });
                self.say(&json!({ "event": name, "data": data, "timestamp": timestamp })).await;
            }
            Say::Wait(time) => tokio::time::sleep(time).await,
            Say::Fault(fault) => return self.fault(&fault).await,
        }
        true
    }
}

/// A reply with the id that the client has given its command.
fn with_id(said: &Value, ids: &HashMap<String, Value>) -> Value {
    let mut said = said.clone();
    if let Some(id) = said.get_mut("id")
        && let Some(given) = ids.get(&id.to_string())
    {
        *id = given.clone();
    }
    said
}

fn without_id(command: &Value) -> Value {
    let mut command = command.clone();
    if let Some(fields) = command.as_object_mut() {
        fields.remove("id");
    }
    command
}
