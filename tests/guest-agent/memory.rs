//! Programs that notice when a restored machine's memory is not that of one instant, or not that of its disk. Each says
//! every half second how far it is, on its output: the console, so that a restored guest is heard too.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use e2e::workload::{BLOCK, block_content, mix};
use rustix::fs::OFlags;

/// Threads that read at the same time.
const READERS: u64 = 4;
const REPORT: Duration = Duration::from_millis(500);

/// A buffer that the disk writes to directly.
#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; BLOCK]);

fn open(device: &Path) -> Result<File> {
    let options =
        File::options().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(device);
    options.with_context(|| device.display().to_string())
}

#[derive(Default)]
struct Progress {
    sweeps: AtomicU64,
    refills: AtomicU64,
    mismatches: AtomicU64,
}

/// Fills that many pages by direct reads of the device's first `blocks` blocks, which hold what `block_content` says,
/// checks all of them, refills them, and so on for ever.
pub(crate) fn pages(device: &Path, pages: u64, blocks: u64) -> Result<()> {
    let device = open(device)?;
    let progress = Progress::default();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (device, progress) = (&device, &progress);
                scope.spawn(move || read_for_ever(device, progress, reader, pages / READERS, blocks))
            })
            .collect();
        while readers.iter().all(|reader| !reader.is_finished()) {
            std::thread::sleep(REPORT);
            let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let Progress { sweeps, refills, mismatches } = &progress;
            say(&format!(
                "pages: sweeps {} refills {} mismatches {}",
                of(sweeps),
                of(refills),
                of(mismatches)
            ))?;
        }
        let ended = readers.into_iter().map(|reader| reader.join());
        ended.filter_map(Result::ok).collect()
    })
}

fn read_for_ever(device: &File, progress: &Progress, reader: u64, count: u64, blocks: u64) -> Result<()> {
    let mut pages = vec![Page([0; BLOCK]); count as usize];
    let mut held = vec![None; pages.len()];
    let mut random = reader + 1;
    loop {
        for (page, &held) in pages.iter().zip(&held) {
            check(progress, page, held);
        }
        progress.sweeps.fetch_add(1, Ordering::Relaxed);
        for _ in 0..count {
            random = mix(random);
            let (at, block) = ((random % count) as usize, random / count % blocks);
            // Before it is overwritten, or a restored guest would cover the traces.
            check(progress, &pages[at], held[at]);
            device.read_exact_at(&mut pages[at].0, block * BLOCK as u64)?;
            held[at] = Some(block);
            progress.refills.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Counts a page that does not hold the block that was read into it.
fn check(progress: &Progress, page: &Page, held: Option<u64>) {
    if held.is_some_and(|block| page.0 != block_content(block)) {
        progress.mismatches.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a counter into the blocks from `first` on, one after the other and around, and keeps it in memory: whoever
/// restores one without the other is found out by the block to be written next, which must hold what was written there
/// a round before, and by the last, which must hold what memory says.
pub(crate) fn stamp(device: &Path, first: u64, slots: u64) -> Result<()> {
    let device = open(device)?;
    let mut page = Page([0; BLOCK]);
    let (mut counter, mut mismatches) = (0u64, 0u64);
    let mut said = Instant::now();
    let place = |counter: u64| (first + counter % slots) * BLOCK as u64;
    let expect = |page: &mut Page, counter: u64, value: u64| -> Result<u64> {
        device.read_exact_at(&mut page.0, place(counter))?;
        let mut stamp = [0; 8];
        stamp.copy_from_slice(&page.0[..8]);
        Ok(u64::from(u64::from_le_bytes(stamp) != value))
    };
    loop {
        if counter > 0 {
            mismatches += expect(&mut page, counter, counter)?;
        }
        if counter >= slots {
            mismatches += expect(&mut page, counter + 1, counter + 1 - slots)?;
        }
        counter += 1;
        page.0[..8].copy_from_slice(&counter.to_le_bytes());
        device.write_all_at(&page.0, place(counter))?;
        if said.elapsed() > REPORT {
            said = Instant::now();
            say(&format!("stamp: at {counter} mismatches {mismatches}"))?;
        }
    }
}

fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
