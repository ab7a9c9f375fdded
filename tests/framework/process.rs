//! Processes with a deadline and an owner: none outlives the test that started it.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How often a condition that nothing announces is looked at again.
const POLL: Duration = Duration::from_millis(10);
/// What counts of the time between two looks: a test that was itself stopped has not waited for anybody.
const COUNTED: Duration = Duration::from_secs(5);
/// How long the output of a command that has ended is waited for.
const AFTER_END: Duration = Duration::from_secs(10);

/// Looks until `probe` has an answer.
///
/// # Errors
/// The probe's own, or that `what` did not happen within `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (mut waited, mut looked) = (Duration::ZERO, Instant::now());
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        waited += looked.elapsed().min(COUNTED);
        looked = Instant::now();
        if waited >= limit {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(POLL);
    }
}

/// A command that the kernel kills when the thread that starts it ends, however that ends.
///
/// `Drop` does the same in an orderly exit; this is for a test run that is itself killed.
#[must_use]
pub fn tied(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a command to its end and returns what it said.
///
/// # Errors
/// It cannot be started, or is not done within `limit` (and is then killed). Its exit status is the caller's.
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let done = wait_for("its end", limit, || Ok(child.try_wait()?));
    if done.is_err() {
        // It may have ended since; then there is nothing to kill.
        let _ = child.kill();
        let _ = child.wait();
    }
    let [stdout, stderr] = [stdout, stderr].map(Collected::take);
    let status = done.with_context(|| {
        format!("{shown}\n{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr))
    })?;
    Ok(Output { status, stdout, stderr })
}

/// As [`run`], and anything but success is an error that quotes the command's output.
///
/// # Errors
/// As [`run`], or the command failed.
pub fn run_ok(command: &mut Command, limit: Duration) -> Result<String> {
    let output = run(command, limit)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// What comes out of a pipe, while it comes.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    ended: mpsc::Receiver<()>,
}

impl Collected {
    /// All of it, once the pipe has ended. A child of the command's may hold it open for longer: that is not waited for.
    fn take(self) -> Vec<u8> {
        let _ = self.ended.recv_timeout(AFTER_END);
        std::mem::take(&mut *self.bytes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> Collected {
    let (end, ended) = mpsc::channel();
    let bytes: Arc<Mutex<Vec<u8>>> = Arc::default();
    let into = Arc::clone(&bytes);
    std::thread::spawn(move || {
        let _end: mpsc::Sender<()> = end;
        let Some(mut pipe) = pipe else { return };
        let mut piece = vec![0; 64 << 10];
        // A read error ends the output; the exit status tells the rest.
        loop {
            match pipe.read(&mut piece) {
                Ok(count @ 1..) => {
                    into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&piece[..count]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
            }
        }
    });
    Collected { bytes, ended }
}

/// A running server whose output goes to a file; dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it, with stdout and stderr appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened or the program cannot be started.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("{}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// The operating system's.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// An error, with the end of its log, if it has ended.
    ///
    /// # Errors
    /// That it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}\n{}", self.name, tail(&self.log, 20)),
        }
    }

    /// Sends a signal; a process that has ended is left alone.
    ///
    /// # Errors
    /// The operating system's.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_none()
            && let Some(pid) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw)
        {
            kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))?;
        }
        Ok(())
    }

    /// Kills it (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// The operating system's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It is still running after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || self.ended())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log, for people.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let mut out = format!("--- the end of {}\n", log.display());
    for line in &all[all.len().saturating_sub(lines)..] {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_command_past_its_deadline_is_killed_and_its_output_quoted() {
        let started = Instant::now();
        let error = run(Command::new("sh").args(["-c", "echo here; exec sleep 60"]), Duration::from_secs(3))
            .unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(50));
        assert!(format!("{error:#}").contains("here"), "{error:#}");
    }

    #[test]
    fn output_that_a_child_of_a_command_holds_open_is_not_waited_for() {
        let started = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "echo here; sleep 60 & true"]);
        assert_eq!(run_ok(&mut command, Duration::from_secs(50)).unwrap(), "here\n");
        assert!(started.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn dropping_a_process_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = tied(Path::new("sleep"));
        command.arg("60");
        let process = Process::spawn("sleep", command, &dir.path().join("log")).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }
}
