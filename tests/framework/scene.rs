//! One test's directory, and the judgement of its logs.

use std::cell::{Cell, RefCell};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::process::tail;

/// What must not be in a log unless the test says so. Kernel messages are of the `linux` source files
/// `block/blk-core.c`, `fs/buffer.c`, `fs/ext4/super.c`, `kernel/hung_task.c`, `kernel/panic.c`.
const BAD: [&str; 9] = [
    " ERROR ",
    "\"level\":\"ERROR\"",
    "panicked at",
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "blocked for more than",
    "Kernel panic",
    "Oops:",
];

/// How much of each log a failing test prints.
const TAIL_LINES: usize = 60;

/// Holds everything that a test makes; removed with it, unless `$KEEP` is set.
///
/// It lies on disk (`$TMPDIR`, else `/var/tmp`), because `/tmp` is often memory, and its path is short,
/// because a Unix socket's has at most 107 bytes.
#[derive(Debug)]
pub struct Scene {
    dir: TempDir,
    guests: Cell<u32>,
    allowed: RefCell<Vec<String>>,
}

impl Scene {
    /// A new, empty directory.
    ///
    /// # Errors
    /// The file system's.
    pub fn new() -> Result<Self> {
        let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        Self::new_in(&base)
    }

    /// A new, empty directory in `base`.
    ///
    /// # Errors
    /// The file system's.
    pub fn new_in(base: &Path) -> Result<Self> {
        let mut dir = tempfile::Builder::new()
            .prefix("hindsight-")
            .tempdir_in(base)
            .with_context(|| format!("{}", base.display()))?;
        dir.disable_cleanup(std::env::var_os("KEEP").is_some());
        Ok(Self { dir, guests: Cell::new(0), allowed: RefCell::default() })
    }

    /// A path in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Lets lines that contain this text be in the logs: errors that the test provokes.
    pub fn allow(&self, text: &str) {
        self.allowed.borrow_mut().push(text.to_owned());
    }

    /// Judges every `*.log` in the directory.
    ///
    /// # Errors
    /// One of them has lines that speak of an error and were not allowed.
    pub fn judge_logs(&self) -> Result<()> {
        let mut found = String::new();
        for log in self.logs()? {
            let bytes = fs::read(&log)?;
            for line in String::from_utf8_lossy(&bytes).lines().filter(|line| self.is_bad(line)) {
                found.push_str(&format!("{}: {}\n", log.display(), line.trim_end()));
            }
        }
        if !found.is_empty() {
            bail!("unexpected lines in the logs:\n{found}");
        }
        Ok(())
    }

    /// The end of every log, for people.
    #[must_use]
    pub fn tails(&self) -> String {
        let logs = self.logs().unwrap_or_default();
        logs.iter().map(|log| tail(log, TAIL_LINES)).collect()
    }

    /// The number of the next guest, from 1.
    pub(crate) fn next_guest(&self) -> u32 {
        self.guests.set(self.guests.get() + 1);
        self.guests.get()
    }

    fn is_bad(&self, line: &str) -> bool {
        BAD.iter().any(|bad| line.contains(bad))
            && !self.allowed.borrow().iter().any(|ok| line.contains(ok.as_str()))
    }

    fn logs(&self) -> Result<Vec<PathBuf>> {
        let mut logs = Vec::new();
        for entry in fs::read_dir(self.dir())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                logs.push(path);
            }
        }
        logs.sort();
        Ok(logs)
    }
}

/// Runs a test in a scene: it passes if the body does *and* no log has a line that it should not have.
///
/// # Panics
/// The test failed; the ends of all logs are printed first.
pub fn run_scene(body: impl FnOnce(&Scene) -> Result<()>) {
    let scene = match Scene::new() {
        Ok(scene) => scene,
        Err(error) => panic!("no directory to test in: {error:#}"),
    };
    let result = catch_unwind(AssertUnwindSafe(|| body(&scene).and_then(|()| scene.judge_logs())));
    if matches!(result, Ok(Ok(()))) {
        return;
    }
    print!("{}", scene.tails());
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            println!("{error:?}");
            // Last and short, since of a long output often only the end is kept.
            panic!("{error:#}");
        }
        Err(panic) => resume_unwind(panic),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_error_in_a_log_fails_the_scene_unless_it_is_allowed() {
        let scene = Scene::new().unwrap();
        fs::write(scene.path("a.log"), "2026 INFO fine\n2026 ERROR store: disk on fire\n").unwrap();
        assert!(scene.judge_logs().unwrap_err().to_string().contains("disk on fire"));
        scene.allow("disk on fire");
        scene.judge_logs().unwrap();
        fs::write(scene.path("b.log"), "[ 1.0] I/O error, dev vda, sector 0\n").unwrap();
        assert!(scene.judge_logs().is_err());
    }
}
