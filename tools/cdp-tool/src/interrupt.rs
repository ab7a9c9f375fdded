//! Unfinished files, which an interruption must not leave behind.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::Context;
use tempfile::{Builder, NamedTempFile};
use tokio::signal::unix::{SignalKind, signal};

/// Files to remove when a signal ends the program.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();

/// The exit status of an interruption: a failure.
const INTERRUPTED: i32 = 2;

/// A new file in `directory`, removed unless it is kept: also when SIGINT or SIGTERM ends the program.
pub(crate) fn unfinished_file(directory: &Path) -> anyhow::Result<Unfinished> {
    WATCH.call_once(|| {
        // Without the watcher an interruption leaves the file behind, which is no reason to do nothing at
        // all.
        let _ = std::thread::Builder::new().name("signals".to_owned()).spawn(watch);
    });
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let file = Builder::new()
        .prefix(".cdp-tool-")
        .suffix(".partial")
        .permissions(permissions)
        .tempfile_in(directory)
        .with_context(|| format!("cannot make a file in {}", directory.display()))?;
    unfinished().push(file.path().to_owned());
    Ok(Unfinished { file: Some(file) })
}

/// A file that is not complete yet.
pub(crate) struct Unfinished {
    file: Option<NamedTempFile>,
}

impl Unfinished {
    /// The file.
    pub(crate) fn file(&self) -> anyhow::Result<&std::fs::File> {
        Ok(self.file.as_ref().context("the file has been finished")?.as_file())
    }

    /// Its present name.
    pub(crate) fn path(&self) -> anyhow::Result<&Path> {
        Ok(self.file.as_ref().context("the file has been finished")?.path())
    }

    /// Gives it its name, in place of a file that has it.
    ///
    /// # Durability
    /// Both content and name survive a power cut once this returns.
    pub(crate) fn finish(mut self, name: &Path) -> anyhow::Result<()> {
        // 1. Sync the content. Crash: the unfinished file is left, under its own name.
        self.file()?.sync_all().with_context(|| format!("cannot write {}", name.display()))?;
        let Some(file) = self.file.take() else { return Ok(()) };
        forget(file.path());
        // 2. Rename. Crash: the name means the old file or the new one, never a part.
        file.persist(name).with_context(|| format!("cannot make {}", name.display()))?;
        // 3. Sync the directory.
        let directory = std::fs::File::open(directory_of(name))?;
        directory.sync_all().with_context(|| format!("cannot make {} durable", name.display()))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            forget(file.path());
        }
    }
}

/// The directory of a file's name.
pub(crate) fn directory_of(name: &Path) -> &Path {
    match name.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn forget(path: &Path) {
    unfinished().retain(|other| other != path);
}

fn watch() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    let signalled = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::io::Result::Ok(())
    });
    if signalled.is_ok() {
        let unfinished = unfinished();
        for path in &*unfinished {
            let _ = std::fs::remove_file(path);
        }
        eprintln!("cdp-tool: interrupted");
        std::process::exit(INTERRUPTED);
    }
}
