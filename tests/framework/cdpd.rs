//! The daemon under test, and the tool that steers it.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::image::Image;
use crate::process::{Process, run, tail, tied, wait_for};
use crate::programs::built;
use crate::scene::Scene;

/// How long the daemon may take until it serves, a recovery included, on a busy machine.
const READY: Duration = Duration::from_secs(120);
/// What it says if the writes of the last one have not ended when it gives up waiting for them.
const STILL_LOCKED: &str = "is still locked, though its last owner";
/// How long a clean stop may take.
const STOP: Duration = Duration::from_secs(120);
/// How long a command of the tool may take; the longest read a whole disk.
const COMMAND: Duration = Duration::from_secs(180);

/// A daemon on a store of its own; dropping it kills it.
#[derive(Debug)]
pub struct Cdpd {
    store: PathBuf,
    log: PathBuf,
    notify: PathBuf,
    process: Option<Process>,
}

impl Cdpd {
    /// Starts a daemon on the scene's store and waits until it serves.
    ///
    /// # Errors
    /// It is not built, ends, or is not ready in time.
    pub fn start(scene: &Scene) -> Result<Self> {
        let mut cdpd = Self {
            store: scene.path("store"),
            log: scene.path("cdpd.log"),
            notify: scene.path("notify"),
            process: None,
        };
        cdpd.start_again()?;
        Ok(cdpd)
    }

    /// Starts it after a stop or a kill, and waits until it serves.
    ///
    /// # Errors
    /// As [`Cdpd::start`].
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "cdpd is running");
        // It says when it is ready as it says it to systemd (sd_notify(3)).
        let _ = std::fs::remove_file(&self.notify);
        let notify = UnixDatagram::bind(&self.notify)?;
        notify.set_nonblocking(true)?;
        let spawn = || {
            let mut command = tied(&built("cdpd")?);
            command.arg("--store").arg(&self.store).env("NOTIFY_SOCKET", &self.notify);
            Process::spawn("cdpd", command, &self.log)
        };
        let mut process = spawn()?;
        wait_for("cdpd to be ready", READY, || {
            // A disk that stands still for seconds keeps the writes of one that was killed under way: systemd, too, would
            // start it again.
            if process.must_run().is_err() && tail(&self.log, 1).contains(STILL_LOCKED) {
                process = spawn()?;
            }
            process.must_run()?;
            let mut message = [0; 4096];
            let got = notify.recv(&mut message).unwrap_or(0);
            let said = String::from_utf8_lossy(&message[..got]);
            Ok(said.lines().any(|line| line == "READY=1").then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it: SIGKILL, wherever it is.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill9(&mut self) -> Result<()> {
        self.running()?.must_run()?;
        self.running()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// Stops it as systemd does: SIGTERM, and it must end in time and with success.
    ///
    /// # Errors
    /// It does not.
    pub fn stop(&mut self) -> Result<()> {
        let process = self.running()?;
        process.must_run()?;
        process.signal(Signal::TERM)?;
        let status = process.wait(STOP)?;
        self.process = None;
        ensure!(status.success(), "cdpd's clean stop: {status}");
        Ok(())
    }

    /// Runs a second daemon on the same store, which must end by itself; returns what it said.
    ///
    /// # Errors
    /// It does not end, or ends with success.
    pub fn start_second(&self) -> Result<String> {
        let mut command = tied(&built("cdpd")?);
        let output = run(command.arg("--store").arg(&self.store), READY)?;
        ensure!(!output.status.success(), "a second cdpd started on the same store");
        Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
    }

    /// The process id of the running daemon.
    ///
    /// # Errors
    /// It is not running.
    pub fn pid(&mut self) -> Result<u32> {
        Ok(self.running()?.pid())
    }

    /// Its store.
    #[must_use]
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// `cdp-tool` on its store: through the daemon while it runs, offline otherwise.
    #[must_use]
    pub fn tool(&self) -> Tool {
        Tool { store: self.store.clone() }
    }

    fn running(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("cdpd is not running")
    }
}

/// `cdp-tool --store DIR`.
#[derive(Clone, Debug)]
pub struct Tool {
    store: PathBuf,
}

/// Where a volume's history stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The newest acknowledged change.
    pub seq: u64,
    /// Its time, RFC 3339.
    pub time: String,
}

impl Tool {
    /// The tool on any store.
    #[must_use]
    pub fn on(store: &Path) -> Self {
        Self { store: store.to_owned() }
    }

    /// The arguments as a user would type them.
    #[must_use]
    pub fn shown(args: &[&str]) -> String {
        format!("cdp-tool {}", args.join(" "))
    }

    /// Runs a command that must succeed, and returns what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}\n{stdout}{stderr}", Self::shown(args), output.status);
        }
        Ok(stdout)
    }

    /// Runs a command that must fail, and returns what it says on stderr.
    ///
    /// # Errors
    /// It succeeds, or ends by a signal or a panic.
    pub fn refused(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code();
        ensure!(matches!(code, Some(1 | 2)), "{}: {}\n{stderr}", Self::shown(args), output.status);
        Ok(stderr)
    }

    /// Runs a command that has a finding, good or bad: its exit status, 0 or 1, and what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn finding(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = self.output(args)?;
        match output.status.code() {
            Some(code @ (0 | 1)) => Ok((code, String::from_utf8_lossy(&output.stdout).into_owned())),
            _ => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                bail!("{}: {}\n{stderr}", Self::shown(args), output.status)
            }
        }
    }

    /// Runs a command with `--json` and returns what it prints.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let args = [args, &["--json"]].concat();
        let text = self.run(&args)?;
        serde_json::from_str(&text).with_context(|| format!("{} printed: {text}", Self::shown(&args)))
    }

    /// Where a volume's history stands now.
    ///
    /// # Errors
    /// The tool fails, or does not say.
    pub fn head(&self, volume: &str) -> Result<Head> {
        let shown = self.json(&["volume", "show", volume])?;
        let head = || -> Option<Head> {
            let head = shown.get("head")?;
            Some(Head { seq: head.get("seq")?.as_u64()?, time: head.get("time")?.as_str()?.to_owned() })
        };
        head().with_context(|| format!("no head in {shown}"))
    }

    /// Creates a volume of a size like `1G` and serves it on a socket in the scene, which is returned.
    ///
    /// # Errors
    /// The tool fails.
    pub fn create_and_serve(&self, scene: &Scene, volume: &str, size: &str, queues: u32) -> Result<PathBuf> {
        self.run(&["volume", "create", volume, "--size", size])?;
        self.serve(scene, volume, queues)
    }

    /// Serves a volume on a socket in the scene, which is returned.
    ///
    /// # Errors
    /// The tool fails.
    pub fn serve(&self, scene: &Scene, volume: &str, queues: u32) -> Result<PathBuf> {
        let socket = scene.path(&format!("{volume}.sock"));
        let path = socket.to_string_lossy();
        self.run(&["volume", "serve", volume, "--vhost-user", &path, "--queues", &queues.to_string()])?;
        Ok(socket)
    }

    /// Waits until the daemon has seen the end of a volume's last guest, and of its requests.
    ///
    /// # Errors
    /// The tool fails, or a guest is still there.
    pub fn wait_until_free(&self, volume: &str) -> Result<()> {
        wait_for(&format!("the end of the guest of '{volume}'"), COMMAND, || {
            let shown = self.json(&["volume", "show", volume])?;
            Ok((shown["serving"]["status"] != "connected").then_some(()))
        })
    }

    /// Copies a volume at an instant (`web1@head`) into a raw image beside the store.
    ///
    /// # Errors
    /// The tool fails.
    pub fn extract(&self, volume_at: &str, name: &str) -> Result<Image> {
        let path = self.store.with_file_name(name);
        // Extracting never overwrites; a second image of the same name is the test's wish.
        let _ = std::fs::remove_file(&path);
        self.run(&["extract", volume_at, &path.to_string_lossy()])?;
        Ok(Image::new(&path))
    }

    /// Runs a command that lists something, with `--json`: one object a line.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn json_lines(&self, args: &[&str]) -> Result<Vec<Value>> {
        let args = [args, &["--json"]].concat();
        let text = self.run(&args)?;
        let lines = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        lines.with_context(|| format!("{} printed: {text}", Self::shown(&args)))
    }

    /// The records of a volume's log, oldest first.
    ///
    /// # Errors
    /// The tool fails, or prints something else than records.
    pub fn records(&self, volume: &str) -> Result<Vec<Value>> {
        self.json_lines(&["inspect", "records", volume])
    }

    /// A command that runs for long, tied to the thread that starts it.
    ///
    /// # Errors
    /// The tool is not built.
    pub fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = tied(&built("cdp-tool")?);
        command.arg("--store").arg(&self.store).args(args);
        Ok(command)
    }

    fn output(&self, args: &[&str]) -> Result<Output> {
        run(Command::new(built("cdp-tool")?).arg("--store").arg(&self.store).args(args), COMMAND)
    }
}
