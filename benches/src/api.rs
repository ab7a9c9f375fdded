//! The daemon's HTTP API, by hand: a client library's start-up would be measured with it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::server::{Ours, VOLUME};

const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon's control socket.
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    /// That of a daemon of ours.
    pub(crate) fn of(ours: &Ours) -> Self {
        Self { socket: ours.control() }
    }

    /// Sends a request that must succeed, and returns how long the answer took, in milliseconds.
    ///
    /// # Errors
    /// It is refused, or there is no answer.
    pub(crate) fn timed(&self, method: &str, path: &str, body: &Value) -> Result<f64> {
        let start = Instant::now();
        let (status, answer) = self.ask(method, path, &body.to_string())?;
        let milliseconds = start.elapsed().as_secs_f64() * 1e3;
        ensure!((200..300).contains(&status), "{method} {path}: {status}: {answer}");
        Ok(milliseconds)
    }

    /// Tries again what is refused because a guest has not quite gone.
    ///
    /// # Errors
    /// It is refused for another reason, or for too long.
    pub(crate) fn retrying(&self, ask: impl Fn(&Self) -> Result<f64>) -> Result<f64> {
        let start = Instant::now();
        loop {
            match ask(self) {
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(error) if error.to_string().contains("409") => {
                    std::thread::sleep(Duration::from_millis(50))
                }
                other => return other,
            }
        }
    }

    /// `Seq` of the newest change of the volume under measurement.
    ///
    /// # Errors
    /// The daemon does not say.
    pub(crate) fn head(&self) -> Result<u64> {
        let (status, answer) = self.ask("GET", &format!("/v1/volumes/{VOLUME}"), "")?;
        ensure!(status == 200, "{status}: {answer}");
        let volume: Value = serde_json::from_str(&answer)?;
        volume["head"]["seq"].as_u64().context("a volume without a head")
    }

    /// One of the metrics of the volume under measurement.
    ///
    /// # Errors
    /// There is no such metric.
    pub(crate) fn metric(&self, name: &str) -> Result<u64> {
        let (status, answer) = self.ask("GET", "/v1/metrics", "")?;
        ensure!(status == 200, "{status}: {answer}");
        let key = format!("{name}{{volume=\"{VOLUME}\"}} ");
        let value = answer.lines().find_map(|line| line.strip_prefix(&key)?.parse::<f64>().ok());
        Ok(value.with_context(|| format!("no metric {name}"))? as u64)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let mut stream = connect(&self.socket)?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: cdpd\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("no HTTP: {answer}") };
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.with_context(|| format!("no status: {head}"))?, body.to_owned()))
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}
