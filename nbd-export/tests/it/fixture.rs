//! A server of a disk in memory, in a directory of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cdp_types::{BlockDevice, ByteRange, IoError, MemoryConfig, MemoryDevice, MemoryFaults};
use nbd_export::{
    Export, ExportEntry, ExportError, ExportErrorKind, Exports, Limits, Listen, STATE_DIRTY, STATE_HOLE,
    STATE_ZERO, Server, ServerConfig, StatusContext, StatusExtent,
};
use tempfile::TempDir;

/// No wait in these tests is longer; it is reached only when something is broken.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// Size of the disk.
pub(crate) const CAPACITY: u64 = 64 << 20;
/// Length of the extents that the contexts tell of, in turns.
pub(crate) const EXTENT: u64 = 64 << 10;

/// `disk` (also the default) and `past`, which is the same read-only; `busy` and `slow`, which are not to be had.
pub(crate) struct TestExports {
    pub(crate) disk: Arc<MemoryDevice>,
    pub(crate) opened: AtomicUsize,
    pub(crate) dropped: Arc<AtomicUsize>,
    /// How often a context was asked for extents.
    pub(crate) looked: Arc<AtomicUsize>,
    /// Whether who has asked for `slow` is to hear.
    pub(crate) found_out: AtomicBool,
}

struct TestExport {
    name: String,
    device: Arc<dyn BlockDevice>,
    dropped: Arc<AtomicUsize>,
    looked: Arc<AtomicUsize>,
}

impl Drop for TestExport {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl Exports for TestExports {
    fn list(&self) -> Result<Vec<ExportEntry>, ExportError> {
        let entry = |name: &str| ExportEntry { name: name.to_owned(), description: format!("the {name}") };
        Ok(vec![entry("disk"), entry("past")])
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>, ExportError> {
        let name = match name {
            "" | "disk" => "disk",
            "past" => "past",
            "busy" => return Err(ExportError::new(ExportErrorKind::Busy, "a guest has it")),
            "slow" => {
                eventually("the export's code ends", || self.found_out.load(Ordering::SeqCst));
                return Err(ExportError::new(ExportErrorKind::Unknown, "slowly found out"));
            }
            _ => {
                return Err(ExportError::new(
                    ExportErrorKind::Unknown,
                    format!("'{name}' is not here; 'disk' is"),
                ));
            }
        };
        self.opened.fetch_add(1, Ordering::SeqCst);
        let device = Arc::clone(&self.disk) as Arc<dyn BlockDevice>;
        let (dropped, looked) = (Arc::clone(&self.dropped), Arc::clone(&self.looked));
        Ok(Arc::new(TestExport { name: name.to_owned(), device, dropped, looked }))
    }
}

impl Export for TestExport {
    fn name(&self) -> &str {
        &self.name
    }
    fn description(&self) -> &str {
        "for tests"
    }
    fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }
    fn writable(&self) -> bool {
        self.name != "past"
    }
    fn multi_conn(&self) -> bool {
        true
    }
    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned(), "qemu:dirty-bitmap:since@mark".to_owned()]
    }
    fn context(&self, query: &str) -> Result<Option<Arc<dyn StatusContext>>, ExportError> {
        let flags = match query {
            "base:allocation" => STATE_HOLE | STATE_ZERO,
            "qemu:dirty-bitmap:since@mark" => STATE_DIRTY,
            "qemu:dirty-bitmap:since@expired" => {
                return Err(ExportError::new(ExportErrorKind::Invalid, "the oldest instant is mark"));
            }
            _ => return Ok(None),
        };
        let looked = Arc::clone(&self.looked);
        Ok(Some(Arc::new(Stripes { name: query.to_owned(), flags, looked })))
    }
}

/// Every second extent has the flags.
struct Stripes {
    name: String,
    flags: u64,
    looked: Arc<AtomicUsize>,
}

impl StatusContext for Stripes {
    fn name(&self) -> &str {
        &self.name
    }
    fn extents(&self, range: ByteRange, max: usize, out: &mut Vec<StatusExtent>) -> Result<(), IoError> {
        self.looked.fetch_add(1, Ordering::SeqCst);
        let mut at = range.offset;
        while at < range.end() && out.len() < max {
            let end = (at / EXTENT + 1) * EXTENT;
            out.push(StatusExtent { len_bytes: end - at, flags: (at / EXTENT % 2) * self.flags });
            at = end;
        }
        Ok(())
    }
}

pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) exports: Arc<TestExports>,
    pub(crate) directory: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(None, |_| {})
    }

    pub(crate) fn with(faults: Option<MemoryFaults>, change: impl FnOnce(&mut ServerConfig)) -> Self {
        Self::of(MemoryConfig { faults, ..MemoryConfig::new(CAPACITY) }, change)
    }

    pub(crate) fn of(disk: MemoryConfig, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = MemoryDevice::new(disk).unwrap();
        let (disk, opened) = (Arc::new(disk), AtomicUsize::new(0));
        let exports = Arc::new(TestExports {
            disk,
            opened,
            dropped: Arc::default(),
            looked: Arc::default(),
            found_out: AtomicBool::new(false),
        });
        let listen = Listen::Unix { path: directory.path().join("nbd.sock"), mode: 0o600 };
        let mut config = ServerConfig::new(vec![listen]);
        change(&mut config);
        let server = Server::start(config, Arc::clone(&exports) as Arc<dyn Exports>).unwrap();
        Self { server, exports, directory }
    }

    pub(crate) fn limited(limits: Limits) -> Self {
        Self::with(None, |config| config.limits = limits)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    pub(crate) fn content(&self, offset: u64, len: u64) -> Vec<u8> {
        self.exports.disk.content(ByteRange::new(offset, len)).unwrap()
    }

    pub(crate) fn nobody_is_left(&self) {
        eventually("all connections end", || self.server.connections().is_empty());
        let opened = self.exports.opened.load(Ordering::SeqCst);
        assert_eq!(
            self.exports.dropped.load(Ordering::SeqCst),
            opened,
            "every export that was opened is dropped"
        );
    }
}

/// Requests end in any order, up to this much later.
pub(crate) fn late(max_delay: Duration) -> Option<MemoryFaults> {
    Some(MemoryFaults { seed: 7, max_delay, errors_per_million: 0 })
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
