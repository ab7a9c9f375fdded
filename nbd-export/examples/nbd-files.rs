//! Serves files by NBD, each as an export of its name: for measurements, and for trying clients by hand.
//!
//! ```text
//! cargo run --release -p nbd-export --example nbd-files -- unix:/tmp/nbd.sock disk.img other.img
//! ```

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cdp_types::{
    BlockDevice, BranchId, ByteRange, DeviceIdentity, DeviceInfo, DeviceQueue, Event, IoError, IoErrorKind,
    MemoryConfig, Op, Origin, Ranges, RequestId, VolumeId, Wait,
};
use nbd_export::{
    Export, ExportEntry, ExportError, ExportErrorKind, Exports, Listen, STATE_HOLE, STATE_ZERO, Server,
    ServerConfig, StatusContext, StatusExtent,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

struct Files(Vec<PathBuf>);

struct Disk {
    name: String,
    device: Arc<dyn BlockDevice>,
    file: Arc<File>,
}

/// A file as a device that carries requests out one by one, as they come.
#[derive(Clone, Debug)]
struct FileDevice {
    file: Arc<File>,
    capacity: u64,
}

struct FileQueue {
    device: FileDevice,
    ended: Vec<Event>,
    /// Never readable: what ends, ends before anybody could wait for it.
    silent: OwnedFd,
}

impl BlockDevice for FileDevice {
    fn info(&self) -> DeviceInfo {
        MemoryConfig::new(self.capacity).info
    }

    fn identity(&self) -> DeviceIdentity {
        DeviceIdentity { store: [0; 16], volume: VolumeId(1), branch: BranchId(1) }
    }

    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let silent = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Box::new(FileQueue { device: self.clone(), ended: Vec::new(), silent }))
    }

    fn new_origin(&self) -> Origin {
        Origin(0)
    }

    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        vec![false; origins.len()]
    }

    fn on_change(&self, _notify: cdp_types::Listener) {}
}

impl FileDevice {
    fn run(&self, op: Op) -> io::Result<()> {
        let punch = |ranges: Ranges| -> io::Result<()> {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            ranges.iter().try_for_each(|range| Ok(fallocate(&self.file, flags, range.offset, range.len)?))
        };
        match op {
            Op::Read { mut offset, into } => {
                for segment in into.segments() {
                    // SAFETY: the segment is mapped by `IoBuf`'s contract, for as long as `into` lives. It is the
                    // server's own memory, which nobody touches while the request is in flight.
                    let bytes = unsafe { std::slice::from_raw_parts_mut(segment.base, segment.len) };
                    self.file.read_exact_at(bytes, offset)?;
                    offset += segment.len as u64;
                }
                Ok(())
            }
            Op::Write { mut offset, from, fua, .. } => {
                for segment in from.segments() {
                    // SAFETY: as above.
                    let bytes = unsafe { std::slice::from_raw_parts(segment.base, segment.len) };
                    self.file.write_all_at(bytes, offset)?;
                    offset += segment.len as u64;
                }
                if fua { self.file.sync_data() } else { Ok(()) }
            }
            Op::WriteZeroes { ranges, .. } | Op::Discard { ranges, .. } => punch(ranges),
            Op::Flush => self.file.sync_data(),
        }
    }
}

impl DeviceQueue for FileQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        let failed = |error: io::Error| IoError::new(IoErrorKind::Device, error.to_string());
        self.ended.push(Event::Completed { id, result: self.device.run(op).map_err(failed) });
    }

    fn watch(&mut self, _eventfd: Arc<OwnedFd>, _tag: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unwatch(&mut self, _tag: u64) {}

    fn poll(&mut self, _wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        events.append(&mut self.ended);
        Ok(())
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.silent.as_fd())
    }

    fn arm(&mut self) -> io::Result<Wait> {
        Ok(if self.ended.is_empty() { Wait::Forever } else { Wait::No })
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }
}

/// Holes as the file system knows them.
struct Allocation(Arc<File>);

impl Exports for Files {
    fn list(&self) -> Result<Vec<ExportEntry>, ExportError> {
        let entry =
            |path: &PathBuf| ExportEntry { name: name(path), description: path.display().to_string() };
        Ok(self.0.iter().map(entry).collect())
    }

    fn open(&self, wanted: &str) -> Result<Arc<dyn Export>, ExportError> {
        let path = self.0.iter().find(|path| wanted.is_empty() || name(path) == wanted);
        let unknown = || ExportError::new(ExportErrorKind::Unknown, format!("no file '{wanted}' is served"));
        let path = path.ok_or_else(unknown)?;
        let failed = |error: io::Error| ExportError::new(ExportErrorKind::Failed, error.to_string());
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(path).map_err(failed)?);
        let capacity = file.metadata().map_err(failed)?.len() / 512 * 512;
        let device = FileDevice { file: Arc::clone(&file), capacity };
        Ok(Arc::new(Disk { name: name(path), device: Arc::new(device), file }))
    }
}

impl Export for Disk {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        ""
    }

    fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    fn writable(&self) -> bool {
        true
    }

    fn multi_conn(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned()]
    }

    fn context(&self, query: &str) -> Result<Option<Arc<dyn StatusContext>>, ExportError> {
        let known = query == "base:allocation";
        Ok(known.then(|| Arc::new(Allocation(Arc::clone(&self.file))) as Arc<dyn StatusContext>))
    }
}

impl StatusContext for Allocation {
    fn name(&self) -> &str {
        "base:allocation"
    }

    fn extents(&self, range: ByteRange, max: usize, out: &mut Vec<StatusExtent>) -> Result<(), IoError> {
        let failed = |error: Errno| IoError::new(IoErrorKind::Device, error.to_string());
        let mut at = range.offset;
        while at < range.end() && out.len() < max {
            let data = match seek(&self.0, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => range.end(), // there is none any more
                result => result.map_err(failed)?,
            };
            let (end, flags) = match data > at {
                true => (data, STATE_HOLE | STATE_ZERO),
                false => (seek(&self.0, SeekFrom::Hole(at)).map_err(failed)?, 0),
            };
            let end = end.min(range.end());
            out.push(StatusExtent { len_bytes: end - at, flags });
            at = end;
        }
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: nbd-files unix:PATH|tcp:ADDRESS FILE...")?;
    let listen = match address.split_once(':') {
        Some(("unix", path)) => Listen::Unix { path: path.into(), mode: 0o600 },
        Some(("tcp", address)) => Listen::Tcp(address.parse()?),
        _ => return Err("an address is unix:PATH or tcp:ADDRESS".into()),
    };
    let config = ServerConfig::new(vec![listen]);
    let server = Server::start(config, Arc::new(Files(arguments.map(PathBuf::from).collect())))?;
    println!("{}", server.addresses()[0]);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
