//! The server from outside: clients that others wrote, a guest that misbehaves, and a server that is killed.

#![allow(clippy::unwrap_used, missing_docs)]

mod ahead;
mod clients;
mod faulty;
mod guard;
mod guest;
mod hostile;
mod inflight;
mod lifecycle;
mod migration;
mod owners;
mod requests;
mod saver;
mod windows;

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use cdp_types::{BlockDevice, MemoryConfig, MemoryDevice, MemoryFaults, NoVmControl, RingStop, VmControl};
use tempfile::TempDir;
use vhost_blk::{Server, ServerConfig};

/// No wait in these tests is longer; it is reached only when something is broken.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Requests end in any order, some milliseconds late.
pub(crate) fn slow(seed: u64) -> MemoryFaults {
    MemoryFaults { seed, max_delay: Duration::from_millis(3), errors_per_million: 0 }
}

/// A server of a disk in memory, in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) disk: Arc<MemoryDevice>,
    pub(crate) directory: TempDir,
}

impl Fixture {
    pub(crate) fn new(capacity: u64, faults: Option<MemoryFaults>) -> Self {
        Self::with(MemoryConfig { faults, ..MemoryConfig::new(capacity) }, Arc::new(NoVmControl))
    }

    pub(crate) fn with(config: MemoryConfig, vm: Arc<dyn VmControl>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Arc::new(MemoryDevice::new(config).unwrap());
        let config = ServerConfig { queues: 4, ..ServerConfig::new(directory.path().join("disk.sock")) };
        let server = Server::bind(config, Arc::clone(&disk) as Arc<dyn BlockDevice>, vm).unwrap();
        Self { server, disk, directory }
    }

    pub(crate) fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("disk.sock")
    }
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes down what it is told.
#[derive(Default)]
pub(crate) struct Recorder(pub(crate) Mutex<Vec<String>>);

impl VmControl for Recorder {
    fn ring_started(&self, _socket: &Path, ring: u16) {
        self.0.lock().unwrap().push(format!("started {ring}"));
    }
    fn ring_stopped(&self, _socket: &Path, ring: u16, why: RingStop, last: bool) {
        let why = match why {
            RingStop::Asked => "stopped",
            RingStop::Reset => "reset",
            RingStop::Failed => "failed",
        };
        self.0.lock().unwrap().push(format!("{why} {ring}{}", if last { ", the last" } else { "" }));
    }
    fn memory_changed(&self, socket: &Path) {
        assert_eq!(socket.file_name().unwrap(), "disk.sock");
        self.0.lock().unwrap().push("memory".to_owned());
    }
    fn disconnected(&self, _socket: &Path) {
        self.0.lock().unwrap().push("disconnected".to_owned());
    }
}
