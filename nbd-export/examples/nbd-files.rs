//! Serves files by NBD, each as an export of its name: for measurements, and for trying clients by hand.
//!
//! ```text
//! cargo run --release -p nbd-export --example nbd-files -- unix:/tmp/nbd.sock disk.img other.img
//! ```

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cdp_types::{BlockDevice, ByteRange, IoError, IoErrorKind, MemoryConfig, MemoryDevice};
use nbd_export::{
    Export, ExportEntry, ExportError, ExportErrorKind, Exports, Listen, STATE_HOLE, STATE_ZERO, Server,
    ServerConfig, StatusContext, StatusExtent,
};

struct Files(Vec<PathBuf>);

struct Disk {
    name: String,
    device: Arc<dyn BlockDevice>,
    file: Arc<File>,
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
        let failed = |error: std::io::Error| ExportError::new(ExportErrorKind::Failed, error.to_string());
        let open = || OpenOptions::new().read(true).write(true).open(path).map_err(failed);
        let (file, data) = (Arc::new(open()?), open()?);
        let capacity = file.metadata().map_err(failed)?.len() / 512 * 512;
        let journal = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
        let device = MemoryDevice::in_files(MemoryConfig::new(capacity), data, journal).map_err(failed)?;
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
        let failed = |error: std::io::Error| IoError::new(IoErrorKind::Device, error.to_string());
        let mut block = [0; 4096];
        let mut at = range.offset;
        while at < range.end() {
            let len = (range.end() - at).min(4096);
            self.0.read_exact_at(&mut block[..len as usize], at).map_err(failed)?;
            let zero = block[..len as usize].iter().all(|byte| *byte == 0);
            let flags = if zero { STATE_HOLE | STATE_ZERO } else { 0 };
            let full = out.len() == max;
            match out.last_mut() {
                Some(last) if last.flags == flags => last.len_bytes += len,
                _ if full => return Ok(()),
                _ => out.push(StatusExtent { len_bytes: len, flags }),
            }
            at += len;
        }
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: nbd-files unix:PATH|tcp:ADDRESS FILE...")?;
    let listen = match address.split_once(':') {
        Some(("unix", path)) => Listen::Unix { path: path.into(), mode: 0o600 },
        Some(("tcp", address)) => Listen::Tcp(address.parse()?),
        _ => return Err("an address is unix:PATH or tcp:ADDRESS".into()),
    };
    let server = Server::start(
        ServerConfig::new(vec![listen]),
        Arc::new(Files(arguments.map(PathBuf::from).collect())),
    )?;
    println!("{}", server.addresses()[0]);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
