//! The program itself: signals, exit statuses, systemd.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cdpd::api::{ServingStatus, StoreStatus, Volume};
use cdpd::client::Client;
use cdpd::frames::{ContentStart, Frame};
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);

/// A directory for a store, and daemons in it.
struct Bench {
    root: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn store(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.path().join("log")).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let config = self.root.path().join("cdpd.toml");
        fs::write(&config, "[store]\nsegment_size = \"16M\"\npool_segments = 1\nreserve = \"1M\"\n").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdpd"));
        command.arg("--store").arg(self.store()).arg("--config").arg(config).args(arguments);
        command.env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
        command
    }

    /// A daemon that is ready.
    fn start(&self, arguments: &[&str]) -> (Daemon, Client) {
        let log = File::create(self.root.path().join("log")).unwrap();
        let daemon = Daemon(self.command(arguments).stderr(log).spawn().unwrap());
        (daemon, self.wait_until_ready())
    }

    fn wait_until_ready(&self) -> Client {
        let begun = Instant::now();
        loop {
            if let Some(client) =
                fs::metadata(self.store()).ok().and_then(|_| Client::find(&self.store()).unwrap())
            {
                return client;
            }
            assert!(begun.elapsed() < DEADLINE, "not ready: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Killed when it is dropped, so that a test that fails leaves nothing running.
struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn create(client: &Client, name: &str) {
    let new = json!({ "name": name, "size_bytes": 1 << 30 });
    client.send::<Volume>(Method::POST, "/v1/volumes", &new).unwrap();
}

#[test]
fn sigterm_and_sigint_are_clean_stops() {
    for signal in [Signal::TERM, Signal::INT] {
        let bench = Bench::new();
        let (mut daemon, client) = bench.start(&["--log-format", "json"]);
        create(&client, "web1");
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0), "{}", bench.log());
        assert!(!bench.store().join("cdpd.sock").exists());
        let last = bench.log().lines().last().unwrap().to_owned();
        let last: serde_json::Value = serde_json::from_str(&last).unwrap();
        assert_eq!(last["fields"]["message"], "stopped");
    }
}

#[test]
fn what_was_made_survives_a_kill() {
    let bench = Bench::new();
    let (mut daemon, client) = bench.start(&[]);
    create(&client, "web1");
    let socket = bench.root.path().join("web1.sock");
    let request = json!({ "socket": socket, "queues": 1 });
    client.send::<Volume>(Method::PUT, "/v1/volumes/web1/serve", &request).unwrap();
    let first: StoreStatus = client.get("/v1/store").unwrap();
    daemon.signal(Signal::KILL);
    assert_eq!(daemon.wait().signal(), Some(9));
    // Both sockets are left behind; neither is in the way.
    assert!(bench.store().join("cdpd.sock").exists() && socket.exists());

    let (mut daemon, client) = bench.start(&["--no-create"]);
    let again: StoreStatus = client.get("/v1/store").unwrap();
    assert_eq!(again.store.id, first.store.id);
    assert_eq!(again.store.generation.0, first.store.generation.0 + 1);
    let volume: Volume = client.get("/v1/volumes/web1").unwrap();
    assert_eq!(volume.serving.unwrap().status, ServingStatus::Listening);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", bench.log());
    assert!(!socket.exists());
}

/// Stops a daemon that has a slow client, with two signals; none if the clean stop was over before the second.
fn stop_twice(bench: &Bench, daemon: &mut Daemon, client: &Client) -> Option<()> {
    // A client that does not read keeps the clean stop waiting for some seconds, unless it has got nothing yet.
    let mut stream = client.content("/v1/volumes/big/data").unwrap();
    Frame::read(&mut stream).unwrap();
    daemon.signal(Signal::TERM);
    let begun = Instant::now();
    while !bench.log().contains("stopping") {
        assert!(begun.elapsed() < DEADLINE, "{}", bench.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    if daemon.0.try_wait().unwrap().is_none() {
        daemon.signal(Signal::TERM);
    }
    let status = daemon.wait();
    if status.code() == Some(0) {
        return None;
    }
    assert_eq!(status.code(), Some(2), "{}", bench.log());
    Some(())
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let bench = Bench::new();
    let (mut daemon, mut client) = bench.start(&[]);
    let mut next = 0;
    let mut frames = || {
        next += 1;
        Ok(match next {
            1 => Frame::Start(ContentStart { size_bytes: 64 << 20, at: None }),
            2..66 => Frame::Data { offset: (next - 2) << 20, bytes: vec![7; 1 << 20] },
            _ => Frame::End,
        })
    };
    client.import::<Volume>("/v1/volumes/big/import", &mut frames, &mut |_| ()).unwrap();
    let mut attempts = 0;
    while stop_twice(&bench, &mut daemon, &client).is_none() {
        attempts += 1;
        assert!(attempts < 20, "every stop was over before its second signal");
        (daemon, client) = bench.start(&[]);
    }
    let (_daemon, client) = bench.start(&[]);
    assert!(client.get::<Volume>("/v1/volumes/big").is_ok());
}

#[test]
fn systemd_hears_of_readiness_life_and_the_end() {
    let bench = Bench::new();
    let path = bench.root.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let hear = || {
        let mut message = [0; 200];
        let len = socket.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..len]).trim().to_owned()
    };
    let log = File::create(bench.root.path().join("log")).unwrap();
    let mut command = bench.command(&[]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "300000").stderr(log);
    let mut daemon = Daemon(command.spawn().unwrap());
    assert_eq!(hear(), "READY=1\nSTATUS=serving");
    // Whoever is told may connect at once.
    assert!(Client::find(&bench.store()).unwrap().is_some());
    for _ in 0..3 {
        assert_eq!(hear(), "WATCHDOG=1");
    }
    daemon.signal(Signal::TERM);
    let last = std::iter::repeat_with(hear).find(|message| message != "WATCHDOG=1").unwrap();
    assert_eq!(last, "STOPPING=1");
    assert_eq!(daemon.wait().code(), Some(0), "{}", bench.log());
}

#[test]
fn a_failure_to_start_is_one_line_with_what_to_do() {
    let bench = Bench::new();
    let complain = |arguments: &[&str]| {
        let mut child = bench.command(arguments).stderr(Stdio::piped()).spawn().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(2), "{text}");
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with("cdpd: ")).collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert_eq!(text.lines().last(), lines.last().copied(), "{text}");
        lines[0].to_owned()
    };
    assert!(complain(&["--no-create"]).contains("mounted"));
    assert!(complain(&["--http", "0.0.0.0:1"]).contains("--http-allow-remote"));
    fs::create_dir(bench.store()).unwrap();
    fs::write(bench.store().join("letter.txt"), "not ours").unwrap();
    let refusal = complain(&[]);
    assert!(refusal.contains("choose an empty directory"), "{refusal}");
    assert_eq!(fs::read_dir(bench.store()).unwrap().count(), 1, "something was made beside it");
    fs::remove_file(bench.store().join("letter.txt")).unwrap();
    // A configuration that waits for its store is no obstacle.
    fs::write(bench.store().join("cdpd.toml"), "").unwrap();
    let (_daemon, _client) = bench.start(&[]);
    assert!(complain(&[]).contains("stop the other cdpd"));
}

#[test]
fn a_socket_of_systemds_is_served_as_nbd() {
    let bench = Bench::new();
    let path = bench.root.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // As systemd passes it on (sd_listen_fds(3)): descriptor 3, and the process's own number in the environment.
    let program = bench.command(&[]);
    let mut command = Command::new("sh");
    command.args(["-c", "export LISTEN_PID=$$; exec \"$@\" 3<&0 0</dev/null", "sh"]);
    command.arg(program.get_program()).args(program.get_args());
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "nbd").env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::from(OwnedFd::from(listener)));
    let log = File::create(bench.root.path().join("log")).unwrap();
    let _daemon = Daemon(command.stderr(log).spawn().unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut greeting = [0; 8];
    client.read_exact(&mut greeting).unwrap_or_else(|error| panic!("{error}: {}", bench.log()));
    assert_eq!(&greeting, b"NBDMAGIC");
}

#[test]
fn a_shells_limit_of_open_files_does_not_limit_a_store() {
    let bench = Bench::new();
    let program = bench.command(&[]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -S -n 64 && exec \"$@\"", "sh"]);
    command.arg(program.get_program()).args(program.get_args()).env_remove("NOTIFY_SOCKET");
    let log = File::create(bench.root.path().join("log")).unwrap();
    let daemon = Daemon(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
    bench.wait_until_ready();
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.0.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let [soft, hard] = [0, 1].map(|nth| line.split_whitespace().nth(nth).unwrap().parse::<u64>().unwrap());
    // As many as it may, unless that is more than it wants.
    assert_eq!(soft, hard.min(1 << 20), "{limits}");
}
