//! A program that is run, and killed at its deadline.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// What of a program's output goes into the log.
const MAX_LINES: usize = 200;
const MAX_LINE_BYTES: u64 = 4096;
/// What systemd has told this process, and nobody else.
const PRIVATE: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// Runs a program with `input` on its standard input, in a process group of its own, which is killed when the program
/// has ended or at the deadline.
///
/// # Errors
/// It cannot be started, fails, or takes longer.
pub(super) async fn run(
    program: &Path,
    arguments: &[String],
    environment: Vec<(&'static str, String)>,
    input: Vec<u8>,
    timeout: Duration,
) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).envs(environment).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in PRIVATE {
        command.env_remove(name);
    }
    let name = program.display().to_string();
    let ended = tokio::task::spawn_blocking(move || supervise(command, input, timeout));
    let status = ended.await.unwrap_or_else(|_| Err(anyhow!("its thread has died")));
    let status = status.with_context(|| name.clone())?;
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("{name}: {status}"),
        None => bail!("{name}: not within {timeout:?}: killed"),
    }
}

/// None if it had to be killed.
fn supervise(mut command: Command, input: Vec<u8>, timeout: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let by = Instant::now() + timeout;
    let mut child = command.spawn()?;
    let ended = converse(&mut child, input).and_then(|()| wait_until(&child, by));
    // Before it is reaped: until then nobody else has its number. What it has started must not outlive it either.
    let killed = kill_process_group(Pid::from_child(&child), Signal::KILL);
    if let Err(error) = killed {
        tracing::debug!(%error, "nobody is left of the callback");
    }
    let status = child.wait()?;
    Ok(ended?.then_some(status))
}

/// Gives it its input and logs its output, on threads of their own, which end with it.
fn converse(child: &mut Child, input: Vec<u8>) -> anyhow::Result<()> {
    let thread = || std::thread::Builder::new().name("callback".to_owned());
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read what it is told has decided so.
        thread().spawn(move || drop(stdin.write_all(&input)))?;
    }
    if let Some(stdout) = child.stdout.take() {
        thread().spawn(move || log(stdout))?;
    }
    if let Some(stderr) = child.stderr.take() {
        thread().spawn(move || log(stderr))?;
    }
    Ok(())
}

/// Whether it has ended by then. It is not reaped.
fn wait_until(child: &Child, by: Instant) -> anyhow::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("cannot be watched")?;
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).context("an impossible deadline")?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot be watched"),
        }
    }
}

fn log(output: impl Read) {
    let mut output = BufReader::new(output);
    for count in 0.. {
        let mut line = Vec::new();
        match (&mut output).take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(1..) if count < MAX_LINES => {
                tracing::info!("callback: {}", String::from_utf8_lossy(&line).trim_end());
            }
            Ok(1..) => {}
            _ => return,
        }
    }
}
