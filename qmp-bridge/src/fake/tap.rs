//! Recording what a client and a QEMU say to each other.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::transcript::{Step, Transcript};

/// Listens at `listen` for one client, passes on everything between it and the QEMU at `qemu`, and writes it down.
/// `replace` takes what should not be in a transcript (paths of one machine) out of each line; it has to leave JSON.
/// The task ends when either side has hung up.
///
/// # Errors
/// If it cannot listen, or QEMU does not. The task: if one of the two could not be read or written, or said no JSON.
pub async fn tap<F>(listen: &Path, qemu: &Path, replace: F) -> io::Result<JoinHandle<io::Result<Transcript>>>
where
    F: Fn(String) -> String + Send + Sync + 'static,
{
    let listener = UnixListener::bind(listen)?;
    let qemu = UnixStream::connect(qemu).await?;
    Ok(tokio::spawn(async move {
        let (client, _) = listener.accept().await?;
        let (from_qemu, to_qemu) = qemu.into_split();
        let (from_client, to_client) = client.into_split();
        let written = Arc::new(Mutex::new(Transcript::default()));
        tokio::select! {
            ended = pass(from_qemu, to_client, &written, |line| Ok(Step::Qemu(parse(&replace, line)?))) => ended?,
            ended = pass(from_client, to_qemu, &written, |line| Ok(Step::Client(parse(&replace, line)?))) => ended?,
        }
        let transcript = written.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(transcript)
    }))
}

fn parse<F: Fn(String) -> String>(replace: &F, line: &str) -> io::Result<serde_json::Value> {
    Ok(serde_json::from_str(&replace(line.to_owned()))?)
}

/// Each line is written down before it is passed on, so that the order is one that both sides have seen.
async fn pass<R, W>(
    from: R,
    mut to: W,
    written: &Mutex<Transcript>,
    step: impl Fn(&str) -> io::Result<Step>,
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut from = BufReader::new(from);
    let mut line = String::new();
    while from.read_line(&mut line).await? > 0 {
        let said = step(&line)?;
        written.lock().unwrap_or_else(PoisonError::into_inner).push(said);
        to.write_all(line.as_bytes()).await?;
        line.clear();
    }
    Ok(())
}
