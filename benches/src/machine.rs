//! Where a measurement was made: figures mean nothing without it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::server::StorageDaemon;

/// The machine, and the file system that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    /// Device, type and options, as mounted.
    pub(crate) file_system: String,
    pub(crate) storage_daemon: String,
    /// The machine's load (proc(5), `loadavg`) before anything was measured.
    pub(crate) load_before: String,
}

impl Machine {
    /// This machine, and the file system that holds `dir`.
    ///
    /// # Errors
    /// `/proc` does not say.
    pub(crate) fn look(dir: &Path) -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let memory = fs::read_to_string("/proc/meminfo")?;
        let kib = value(&memory, "MemTotal:").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Ok(Self {
            processor: value(&processors, "model name\t:").unwrap_or("unknown").to_owned(),
            processors: std::thread::available_parallelism()?.get(),
            memory_bytes: kib.context("/proc/meminfo has no MemTotal")? << 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system: file_system(&fs::read_to_string("/proc/self/mounts")?, &dir.canonicalize()?)?,
            storage_daemon: StorageDaemon::version().unwrap_or_else(|_| "none".to_owned()),
            load_before: fs::read_to_string("/proc/loadavg")?.trim().to_owned(),
        })
    }
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// The mount that a directory is in: of those with the longest path, the last, which covers the others.
fn file_system(mounts: &str, dir: &Path) -> Result<String> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let over = fields.filter(|fields| fields.len() >= 4 && dir.starts_with(fields[1]));
    let mount = over.max_by_key(|fields| fields[1].len()).context("the directory is on no file system")?;
    Ok(format!("{} on {} ({})", mount[2], mount[0], mount[3]))
}

/// Fails unless the file system of `dir` has so many bytes to give.
///
/// # Errors
/// It has not.
pub(crate) fn need_space(dir: &Path, bytes: u64) -> Result<()> {
    let free = free_bytes(dir)?;
    ensure!(
        free >= bytes,
        "{} has {:.1} GiB free, and {:.1} GiB are needed",
        dir.display(),
        gib(free),
        gib(bytes)
    );
    Ok(())
}

/// Bytes that the file system of `dir` has to give.
///
/// # Errors
/// The file system's.
pub(crate) fn free_bytes(dir: &Path) -> Result<u64> {
    let state = rustix::fs::statvfs(dir).with_context(|| dir.display().to_string())?;
    Ok(state.f_bavail * state.f_frsize)
}

/// Bytes in GiB, for people.
pub(crate) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw,nosuid 0 0\n/dev/b /tmp xfs ro 0 0\n";
        assert_eq!(file_system(mounts, Path::new("/tmp/x")).unwrap(), "xfs on /dev/b (ro)");
        assert_eq!(file_system(mounts, Path::new("/tmpfile")).unwrap(), "ext4 on /dev/a (rw)");
        assert!(file_system("", Path::new("/")).is_err());
    }

    #[test]
    fn more_space_than_there_is_is_refused() {
        let dir = std::env::temp_dir();
        need_space(&dir, 0).unwrap();
        assert!(need_space(&dir, u64::MAX).unwrap_err().to_string().contains("are needed"));
    }
}
