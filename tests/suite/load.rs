//! A guest at work in a way that shows whether its memory and its disk are of one instant, wherever it goes on.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::Guest;
use e2e::process::wait_for;
use e2e::workload::block_content;

/// Blocks of known content on each disk, which are read into page buffers.
const BLOCKS: u64 = 8192;
/// Blocks behind them for each writer, into which a counter is written that memory has as well.
const SLOTS: u64 = 32;
/// Page buffers.
const PAGES: u64 = 8192;
const LIMIT: Duration = Duration::from_secs(120);

/// `guest-agent pages` and `guest-agent stamp` on all disks of a guest, heard on the console.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Disks of the guest; each holds the same.
    pub(crate) disks: usize,
    /// Threads that stamp, each all disks.
    pub(crate) writers: u64,
}

impl Load {
    /// One disk, one writer.
    pub(crate) const SIMPLE: Self = Self { disks: 1, writers: 1 };

    /// Writes what a disk must hold to a raw image.
    pub(crate) fn image(self, path: &Path) -> Result<()> {
        let mut image = BufWriter::new(File::create(path)?);
        (0..BLOCKS).try_for_each(|block| image.write_all(&block_content(block)))?;
        image.into_inner()?.set_len((BLOCKS + self.writers * SLOTS) * 4096).map_err(Into::into)
    }

    /// Starts both programs.
    pub(crate) fn start(self, guest: &mut Guest) -> Result<()> {
        let disks: Vec<String> =
            ('a'..='z').take(self.disks).map(|letter| format!("/dev/vd{letter}")).collect();
        let (disks, writers) = (disks.join(" "), self.writers);
        for program in
            [format!("pages {PAGES} {BLOCKS} {disks}"), format!("stamp {writers} {BLOCKS} {SLOTS} {disks}")]
        {
            guest.run(&format!("guest-agent {program} </dev/null >/dev/ttyS0 2>&1 &"))?;
        }
        Ok(())
    }

    /// Waits until a restored guest has said anything.
    pub(crate) fn wait_for_word(guest: &Guest) -> Result<()> {
        wait_for("a word of the restored guest", LIMIT, || {
            Ok(said(guest, "pages:", "sweeps").zip(said(guest, "stamp:", "rounds")).map(drop))
        })
    }

    /// Waits until all pages have been checked that many times more, by the slowest reader, and all slots written.
    pub(crate) fn wait_for_progress(guest: &Guest, sweeps: u64) -> Result<()> {
        let (before, rounds) =
            (said(guest, "pages:", "sweeps").unwrap_or(0), said(guest, "stamp:", "rounds").unwrap_or(0));
        wait_for("sweeps over all pages", LIMIT, || {
            let swept = said(guest, "pages:", "sweeps").unwrap_or(0) >= before + sweeps;
            let stamped = said(guest, "stamp:", "rounds").unwrap_or(0) > rounds;
            Ok((swept && stamped).then_some(()))
        })
    }

    /// How many pages and stamps did not hold what they should.
    pub(crate) fn mismatches(guest: &Guest) -> Result<(u64, u64)> {
        let of = |program| {
            said(guest, program, "mismatches").with_context(|| format!("{program} has said nothing"))
        };
        Ok((of("pages:")?, of("stamp:")?))
    }
}

/// The last number behind a word in the last line of the console that begins with a program's name.
fn said(guest: &Guest, program: &str, word: &str) -> Option<u64> {
    let console = String::from_utf8_lossy(&std::fs::read(guest.console()).ok()?).into_owned();
    let line =
        console.lines().rev().find(|line| line.starts_with(program) && line.contains("mismatches "))?;
    line.split_whitespace().skip_while(|&it| it != word).nth(1)?.parse().ok()
}
