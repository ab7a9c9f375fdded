//! Guests that write test files, as several tests need them.

use std::time::Duration;

use anyhow::{Result, bail};
use e2e::workload::{KEPT_FILES, Progress, must_survive};
use e2e::{Guest, Running};

/// How long a writer may take for a step; a server that is down meanwhile included.
pub(crate) const STEP: Duration = Duration::from_secs(120);

/// Makes ext4 on a disk of the guest and mounts it; `/dev/vda` on `/mnt/vda`.
pub(crate) fn format(guest: &mut Guest, disk: &str) -> Result<()> {
    guest.run(&format!("mkfs.ext4 -q /dev/{disk}"))?;
    mount(guest, disk)
}

/// Mounts a disk that has ext4 on it.
pub(crate) fn mount(guest: &mut Guest, disk: &str) -> Result<()> {
    guest.run(&format!("mkdir -p /mnt/{disk} && mount -t ext4 /dev/{disk} /mnt/{disk}")).map(drop)
}

/// A writer at work, in a directory of its own.
pub(crate) struct Writer {
    dir: String,
    seed: u64,
    running: Running,
    progress: Vec<Progress>,
}

impl Writer {
    /// Starts one that makes every file durable before it goes on.
    pub(crate) fn synced(guest: &mut Guest, dir: &str, seed: u64) -> Result<Self> {
        Self::start(guest, dir, seed, "synced")
    }

    /// Starts one that leaves its files to the kernel's writeback.
    pub(crate) fn lazy(guest: &mut Guest, dir: &str, seed: u64) -> Result<Self> {
        Self::start(guest, dir, seed, "lazy")
    }

    fn start(guest: &mut Guest, dir: &str, seed: u64, mode: &str) -> Result<Self> {
        let running = guest.spawn(&format!("guest-agent write {dir} {seed} {mode}"))?;
        Ok(Self { dir: dir.to_owned(), seed, running, progress: Vec::new() })
    }

    /// Waits until it has written that many more files from now on.
    pub(crate) fn wait_files(&mut self, files: usize) -> Result<()> {
        // What it did before this call does not count.
        for line in self.running.new_lines() {
            self.progress.extend(Progress::parse(&line));
        }
        let mut seen = 0;
        while seen < files {
            let line = self.running.next_line(STEP)?;
            let Some(step) = Progress::parse(&line) else { bail!("{}: {line}", self.dir) };
            seen += usize::from(!matches!(step, Progress::Removing(_)));
            self.progress.push(step);
        }
        Ok(())
    }

    /// Asks it to stop, and checks from the disk that all its files are there and right.
    pub(crate) fn stop_and_check(self, guest: &mut Guest) -> Result<()> {
        let Self { dir, seed, running, .. } = self;
        guest.run(&format!("touch {dir}.stop"))?;
        let (status, output) = running.finish(STEP)?;
        if status != 0 {
            bail!("the writer of {dir} failed with status {status}:\n{output}");
        }
        let all: Vec<Progress> = output.lines().filter_map(Progress::parse).collect();
        let written = all.iter().filter(|step| matches!(step, Progress::Written(_))).count();
        // It is one kind of writer or the other.
        let kept = must_survive(&all).len() + written.min(KEPT_FILES);
        guest.drop_caches()?;
        guest.run(&format!("guest-agent check {dir} {seed} {kept} && rm {dir}.stop")).map(drop)
    }

    /// Everything that it said up to the end of its guest, which has been killed or reset.
    pub(crate) fn progress_of_the_dead(self) -> Result<Vec<Progress>> {
        let lines = self.running.last_words(Duration::from_secs(60))?;
        Ok(lines.iter().filter_map(|line| Progress::parse(line)).collect())
    }
}
