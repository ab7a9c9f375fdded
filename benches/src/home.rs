//! A directory for one run, and what its logs say when the run fails.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use e2e::process::tail;

/// The name of a store's directory: what is called a log in there is not for people.
pub(crate) const STORE: &str = "store";
/// What directories of runs are called, before the run's process id.
const PREFIX: &str = "bench-blk.";
/// Lines of each log that are shown.
const LINES: usize = 30;

/// Whether what a run has made stays when it ends.
pub(crate) fn kept() -> bool {
    std::env::var_os("KEEP").is_some()
}

/// A directory of this run's own; removed with it, unless `$KEEP` is set.
#[derive(Debug)]
pub(crate) struct Home(PathBuf);

impl Home {
    /// Makes one in `parent`.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        warn_of_leftovers(parent);
        // Short, because a Unix socket's path has at most 107 bytes.
        let dir = parent.canonicalize()?.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self(dir))
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    /// Passes a result on; the ends of all logs are shown with a bad one.
    ///
    /// # Errors
    /// The result's.
    pub(crate) fn explain<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            show_logs(&self.0);
        }
        result
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if kept() {
            eprintln!("bench-blk: {} is kept", self.0.display());
        } else if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("bench-blk: {} is left behind: {error}", self.0.display());
        }
    }
}

/// Runs that were killed leave gigabytes behind. Whether somebody wants them is not ours to say.
fn warn_of_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let run = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if run.is_some_and(|run| !Path::new("/proc").join(run).exists()) {
            eprintln!("bench-blk: {} is of a run that was kept or killed", entry.path().display());
        }
    }
}

fn show_logs(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            eprint!("{}", tail(&path, LINES));
        } else if path.is_dir() && !path.ends_with(STORE) {
            show_logs(&path);
        }
    }
}
