//! A guest at work in a way that shows whether its memory and its disk are of one instant, wherever it goes on.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::Guest;
use e2e::process::wait_for;
use e2e::workload::block_content;

/// Blocks of known content on each disk, which are read into page buffers.
const BLOCKS: u64 = 8192;
/// Blocks behind them for each writer, into which a counter is written that memory has as well.
const SLOTS: u64 = 32;
/// Page buffers.
const PAGES: u64 = 8192;
/// How the two programs' reports begin.
const PAGES_SAY: &str = "pages:";
const STAMP_SAYS: &str = "stamp:";
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
            Ok(said(guest, PAGES_SAY, "sweeps")?.zip(said(guest, STAMP_SAYS, "rounds")?).map(drop))
        })
    }

    /// Waits until all pages have been checked that many times more, by the slowest reader, and all slots written.
    pub(crate) fn wait_for_progress(guest: &Guest, sweeps: u64) -> Result<()> {
        let so_far = || -> Result<(u64, u64)> {
            let (swept, stamped) = (said(guest, PAGES_SAY, "sweeps")?, said(guest, STAMP_SAYS, "rounds")?);
            Ok((swept.unwrap_or(0), stamped.unwrap_or(0)))
        };
        let (before, rounds) = so_far()?;
        wait_for("sweeps over all pages", LIMIT, || {
            let (swept, stamped) = so_far()?;
            Ok((swept >= before + sweeps && stamped > rounds).then_some(()))
        })
    }

    /// How many pages and stamps did not hold what they should.
    pub(crate) fn mismatches(guest: &Guest) -> Result<(u64, u64)> {
        let of = |program| {
            said(guest, program, "mismatches")?.with_context(|| format!("{program} has said nothing"))
        };
        Ok((of(PAGES_SAY)?, of(STAMP_SAYS)?))
    }

    /// That all pages and stamps held what they should: memory and disks are of one instant.
    pub(crate) fn must_match(guest: &Guest) -> Result<()> {
        let (pages, stamps) = Self::mismatches(guest)?;
        let sound = (pages, stamps) == (0, 0);
        ensure!(
            sound,
            "memory and disks are not of one instant: {pages} pages and {stamps} stamps do not match"
        );
        Ok(())
    }
}

/// A number in the last report of a program, if it has made one.
fn said(guest: &Guest, program: &str, word: &str) -> Result<Option<u64>> {
    let lines = guest.said()?;
    let report = lines.lines().rev().find_map(|line| report(line, program));
    Ok(report.and_then(|numbers| numbers.get(word).copied()))
}

/// The numbers of a line that is a program's report, whole: the kernel may say something in its middle.
fn report<'a>(line: &'a str, program: &str) -> Option<HashMap<&'a str, u64>> {
    let words: Vec<&str> = line.strip_prefix(program)?.split_whitespace().collect();
    let numbers: Option<HashMap<_, _>> =
        words.chunks(2).map(|pair| Some((pair[0], pair.get(1)?.parse().ok()?))).collect();
    numbers.filter(|numbers| numbers.contains_key("mismatches"))
}

#[test]
fn a_report_that_the_kernel_has_spoken_into_is_none() {
    let report = |line| report(line, PAGES_SAY);
    let whole = report("pages: sweeps 4 refills 26076 mismatches 2").unwrap_or_default();
    assert_eq!((whole["sweeps"], whole["mismatches"]), (4, 2));
    for line in [
        "pages: sweeps 4 refills 26076 mismatches ",
        "pages: sweeps 4 refills 26076 mismatches [   22.009751] hrtimer: interrupt took 10440870 ns",
        "pages: sweeps 4 ref[   22.009751] hrtimer: interrupt took 10440870 ns",
        "pages: sweeps 4",
        "stamp: rounds 21 writes 8332 mismatches 0",
    ] {
        assert!(report(line).is_none(), "{line}");
    }
}
