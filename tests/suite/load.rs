//! A guest at work in a way that shows whether its memory and its disk are of one instant, wherever it goes on.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::Guest;
use e2e::process::wait_for;
use e2e::workload::block_content;

/// Blocks of known content, which are read into page buffers.
const BLOCKS: u64 = 8192;
/// Blocks behind them, into which a counter is written that memory has as well.
const STAMPS: u64 = 64;
/// Page buffers.
const PAGES: u64 = 8192;
const LIMIT: Duration = Duration::from_secs(120);

/// `guest-agent pages` and `guest-agent stamp` on the first disk, heard on the console.
pub(crate) struct Load;

impl Load {
    /// Writes what the disk must hold to a raw image.
    pub(crate) fn image(path: &Path) -> Result<()> {
        let mut image = BufWriter::new(File::create(path)?);
        (0..BLOCKS).try_for_each(|block| image.write_all(&block_content(block)))?;
        image.into_inner()?.set_len((BLOCKS + STAMPS) * 4096).map_err(Into::into)
    }

    /// Starts both programs.
    pub(crate) fn start(guest: &mut Guest) -> Result<()> {
        guest.run(&format!("guest-agent pages /dev/vda {PAGES} {BLOCKS} </dev/null >/dev/ttyS0 2>&1 &"))?;
        guest.run(&format!("guest-agent stamp /dev/vda {BLOCKS} {STAMPS} </dev/null >/dev/ttyS0 2>&1 &"))?;
        Ok(())
    }

    /// Waits until a restored guest has said anything.
    pub(crate) fn wait_for_word(guest: &Guest) -> Result<()> {
        wait_for("a word of the restored guest", LIMIT, || {
            Ok(said(guest, "pages:", "sweeps").zip(said(guest, "stamp:", "at")).map(drop))
        })
    }

    /// Waits until all pages have been checked that many times more, and all stamps written.
    pub(crate) fn wait_for_progress(guest: &Guest, sweeps: u64) -> Result<()> {
        let (before, stamp) =
            (said(guest, "pages:", "sweeps").unwrap_or(0), said(guest, "stamp:", "at").unwrap_or(0));
        wait_for("sweeps over all pages", LIMIT, || {
            let swept = said(guest, "pages:", "sweeps").unwrap_or(0) >= before + sweeps;
            let stamped = said(guest, "stamp:", "at").unwrap_or(0) > stamp + STAMPS;
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
