//! The servers under measurement. Each is a process of its own that ends with this one.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::Tool;
use e2e::process::{Process, run_ok, tail, tied, wait_for};
use e2e::programs::{built, system};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rustix::fs::{Advice, FallocateFlags};
use rustix::process::Signal;

use crate::client::Place;
use crate::home::{self, STORE};

/// How long a server may take until it listens; one that recovers a long log included.
const READY: Duration = Duration::from_secs(120);
/// How long a clean stop may take.
const STOP: Duration = Duration::from_secs(60);
/// The volume in our store.
pub(crate) const VOLUME: &str = "bench";

/// Queues that every server offers.
pub(crate) const QUEUES: usize = 4;

/// Our daemon, on a store of its own with one volume.
#[derive(Debug)]
pub(crate) struct Ours {
    dir: PathBuf,
    process: Option<Process>,
}

impl Ours {
    /// A daemon on a new store in `dir`, which must be empty or missing.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub(crate) fn create(dir: &Path, volume_bytes: u64) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut ours = Self { dir: dir.to_owned(), process: None };
        ours.spawn()?;
        ours.wait_until_it_listens()?;
        let (size, queues) = (volume_bytes.to_string(), QUEUES.to_string());
        let socket = ours.socket();
        let socket = socket.to_str().context("the directory's name is not UTF-8")?;
        let tool = ours.tool();
        tool.run(&["volume", "create", VOLUME, "--size", &size])?;
        tool.run(&["volume", "serve", VOLUME, "--vhost-user", socket, "--queues", &queues])?;
        Ok(ours)
    }

    /// Has it read this configuration from its next start on; the defaults, if it is empty.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn configure(&self, toml: &str) -> Result<()> {
        Ok(fs::write(self.config(), toml)?)
    }

    /// Starts it, and waits for nothing.
    ///
    /// # Errors
    /// It is not built.
    pub(crate) fn spawn(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "cdpd is running");
        let mut command = tied(&built("cdpd")?);
        command.arg("--store").arg(self.store());
        command.arg("--nbd").arg(format!("unix:{}", self.nbd_socket().display()));
        if self.config().exists() {
            command.arg("--config").arg(self.config());
        }
        self.process = Some(Process::spawn("cdpd", command, &self.log())?);
        Ok(())
    }

    /// Waits until its volume can be connected to.
    ///
    /// # Errors
    /// It ends, or takes too long.
    pub(crate) fn wait_until_it_serves(&mut self) -> Result<()> {
        let socket = self.socket();
        self.wait_for(&socket)
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let socket = self.control();
        self.wait_for(&socket)
    }

    fn wait_for(&mut self, socket: &Path) -> Result<()> {
        wait_for(&format!("{}", socket.display()), READY, || {
            self.must_run()?;
            Ok(UnixStream::connect(socket).ok().map(drop))
        })
    }

    /// An error with the end of its log, if it has ended.
    ///
    /// # Errors
    /// That it has ended.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        self.process.as_mut().context("cdpd is not running")?.must_run()
    }

    /// Kills it: SIGKILL, wherever it is.
    ///
    /// # Errors
    /// It had ended before.
    pub(crate) fn kill9(&mut self) -> Result<()> {
        self.must_run()?;
        self.process.take().context("cdpd is not running")?.kill()
    }

    /// Stops it cleanly.
    ///
    /// # Errors
    /// It does not stop in time, or not with success.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.must_run()?;
        let mut process = self.process.take().context("cdpd is not running")?;
        process.signal(Signal::TERM)?;
        let status = process.wait(STOP)?;
        ensure!(status.success(), "cdpd's clean stop: {status}\n{}", tail(&self.log(), 20));
        Ok(())
    }

    /// Stops it and, unless `$KEEP` is set, removes everything it has made, and has the file system finish with that.
    ///
    /// # Errors
    /// Its log speaks of an error, it does not stop, or something cannot be removed.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.stop()?;
        let complaints = self.complaints()?;
        ensure!(complaints.is_empty(), "cdpd complains: {}", complaints.join("\n"));
        if home::kept() {
            // The next one may be made in the same place.
            let mut names = (0..).map(|nth| self.dir.with_extension(format!("kept{nth}")));
            let free = names.find(|name| !name.exists()).context("all names are taken")?;
            return Ok(fs::rename(&self.dir, free)?);
        }
        fs::remove_dir_all(&self.dir)?;
        let parent = File::open(self.dir.parent().unwrap_or(Path::new("/")))?;
        Ok(rustix::fs::syncfs(parent)?)
    }

    /// Lines of its log that speak of an error.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(crate) fn complaints(&self) -> Result<Vec<String>> {
        let log = fs::read(self.log())?;
        let log = String::from_utf8_lossy(&log);
        let bad = |line: &&str| line.contains(" ERROR ") || line.contains("panicked at");
        Ok(log.lines().filter(bad).map(str::to_owned).collect())
    }

    /// `cdp-tool` on its store.
    pub(crate) fn tool(&self) -> Tool {
        Tool::on(&self.store())
    }

    /// Where its volume is served.
    pub(crate) fn place(&self) -> Place {
        Place::VhostUser(self.socket())
    }

    /// Where it answers its API.
    pub(crate) fn control(&self) -> PathBuf {
        self.store().join("cdpd.sock")
    }

    /// Where it serves NBD.
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// One of its exports, for clients that take URIs.
    pub(crate) fn nbd_uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd_socket().display())
    }

    /// Its process id.
    ///
    /// # Errors
    /// It is not running.
    pub(crate) fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("cdpd is not running")?.pid())
    }

    /// Its store.
    pub(crate) fn store(&self) -> PathBuf {
        self.dir.join(STORE)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("cdpd.toml")
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("disk.sock")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("cdpd.log")
    }
}

/// QEMU's server, without the page cache.
#[derive(Debug)]
pub(crate) struct StorageDaemon {
    socket: PathBuf,
    process: Process,
}

impl StorageDaemon {
    /// Serves a raw file; its socket and log are made in `dir`.
    ///
    /// # Errors
    /// It is not installed, or does not start.
    pub(crate) fn start(dir: &Path, file: &Path) -> Result<Self> {
        let node =
            format!("driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring", file.display());
        Self::serve(dir, "qsd", &[&node])
    }

    /// Serves a new, empty qcow2 file over a raw one, which others may be writing; both are in `dir`, as are its socket
    /// and log.
    ///
    /// # Errors
    /// QEMU's programs are not installed, or do not do it.
    pub(crate) fn start_overlay(dir: &Path, file: &Path) -> Result<Self> {
        let overlay = dir.join("overlay.qcow2");
        let mut create = Command::new(system("qemu-img")?);
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(file).arg(&overlay);
        run_ok(&mut create, Duration::from_secs(20))?;
        let direct = "cache.direct=on,aio=io_uring";
        let base = format!(
            "driver=file,node-name=base,filename={},locking=off,read-only=on,{direct}",
            file.display()
        );
        let file = format!("driver=file,node-name=file,filename={},{direct}", overlay.display());
        Self::serve(dir, "qcow2", &[&base, &file, "driver=qcow2,node-name=disk,file=file,backing=base"])
    }

    /// Serves the node called disk, the last of these.
    fn serve(dir: &Path, name: &str, nodes: &[&str]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={QUEUES},\
             iothread=io",
            socket.display()
        );
        let mut command = tied(&system("qemu-storage-daemon")?);
        nodes.iter().for_each(|node| {
            command.args(["--blockdev", node]);
        });
        // A thread of its own looks for work before it sleeps, as ours does; the main loop never would.
        command.args(["--object", "iothread,id=io", "--export", &export]);
        let mut process = Process::spawn("qemu-storage-daemon", command, &dir.join(format!("{name}.log")))?;
        wait_for("qemu-storage-daemon's socket", READY, || {
            process.must_run()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { socket, process })
    }

    /// Ends it, and whatever it has made.
    ///
    /// # Errors
    /// It had ended before, or something cannot be removed.
    pub(crate) fn discard_overlay(self, dir: &Path) -> Result<()> {
        let Self { socket, mut process } = self;
        process.kill()?;
        fs::remove_file(dir.join("overlay.qcow2"))?;
        Ok(fs::remove_file(socket)?)
    }

    /// The socket on which it is served.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where the file is served.
    pub(crate) fn place(&self) -> Place {
        Place::VhostUser(self.socket.clone())
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it calls itself.
    ///
    /// # Errors
    /// It is not installed.
    pub(crate) fn version() -> Result<String> {
        let program = system("qemu-storage-daemon")?;
        let text = run_ok(Command::new(program).arg("--version"), Duration::from_secs(20))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

/// Makes a raw file whose blocks have all been written, in as few extents as the file system gives, and of which the page
/// cache keeps nothing: the best case for whoever then overwrites it in place.
///
/// # Errors
/// The file system's.
pub(crate) fn make_raw_file(path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    let mut random = SmallRng::seed_from_u64(1);
    let mut content = vec![0; 4 << 20];
    random.fill_bytes(&mut content);
    let mut left = bytes;
    while left > 0 {
        let len = left.min(content.len() as u64);
        file.write_all(&content[..len as usize])?;
        left -= len;
    }
    file.sync_all()?;
    // A direct write over what the page cache still holds does not go to the disk at once: io_uring gives it to a worker.
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}
