//! A disk image with ext4 in it, looked into without mounting it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{run, run_ok};
use crate::programs::system;
use crate::workload::TestFile;

const LIMIT: Duration = Duration::from_secs(120);

/// A raw image that is ours to change.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
}

impl Image {
    /// An image at this path.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Does what the kernel does on mounting: replays the journal, nothing else.
    ///
    /// # Errors
    /// The journal cannot be replayed.
    pub fn replay_journal(&self) -> Result<()> {
        let output = self.e2fsck(&["-y", "-E", "journal_only"])?;
        // 1 says that something was corrected: that was the replay.
        ensure!(matches!(output.status.code(), Some(0 | 1)), "journal replay: {}", text(&output));
        Ok(())
    }

    /// Checks the whole file system and changes nothing; the journal must have been replayed.
    ///
    /// # Errors
    /// `e2fsck` finds anything at all to complain about.
    pub fn must_be_clean(&self) -> Result<()> {
        let output = self.e2fsck(&["-f", "-n"])?;
        ensure!(output.status.success(), "the file system is not clean:\n{}", text(&output));
        Ok(())
    }

    /// A file's content.
    ///
    /// # Errors
    /// The file is not there.
    pub fn cat(&self, file: &str) -> Result<Vec<u8>> {
        let output = self.debugfs(&format!("cat {file}"))?;
        // debugfs succeeds in any case; what went wrong is on its stderr, behind its banner.
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!complaint.contains("not found"), "{}: {complaint}", self.path.display());
        Ok(output.stdout)
    }

    /// Copies a directory of test files out of the image and compares each of `files` with what it must contain.
    ///
    /// # Errors
    /// One is missing or differs.
    pub fn check_files(&self, dir: &str, seed: u64, files: impl IntoIterator<Item = u64>) -> Result<()> {
        let out = tempfile::tempdir_in(self.path.parent().context("an image without a directory")?)?;
        let output = self.debugfs(&format!("rdump {dir} {}", out.path().display()))?;
        let name = Path::new(dir).file_name().context("the root directory cannot be copied")?;
        let copied = out.path().join(name);
        ensure!(copied.is_dir(), "no {dir} in {}: {}", self.path.display(), text(&output));
        for number in files {
            TestFile { seed, number }.check(&copied)?;
        }
        Ok(())
    }

    /// A checksum of all its bytes.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn checksum(&self) -> Result<String> {
        let out = run_ok(Command::new(system("sha256sum")?).arg(&self.path), LIMIT)?;
        Ok(out.split_whitespace().next().unwrap_or_default().to_owned())
    }

    fn e2fsck(&self, options: &[&str]) -> Result<Output> {
        run(Command::new(system("e2fsck")?).args(options).arg(&self.path), LIMIT)
    }

    fn debugfs(&self, request: &str) -> Result<Output> {
        run(Command::new(system("debugfs")?).args(["-R", request]).arg(&self.path), LIMIT)
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
