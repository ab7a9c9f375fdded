//! Programs that notice when a restored machine's memory is not that of one instant, or not that of its disk. Each says
//! every half second how far it is, on its output: the console, so that a restored guest is heard too.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::workload::{BLOCK, holds_block, mix};
use rustix::fs::OFlags;

/// Threads that read at the same time.
const READERS: u64 = 4;
const REPORT: Duration = Duration::from_millis(500);

/// A buffer that the disk writes to directly.
#[repr(align(4096))]
#[derive(Clone)]
pub(crate) struct Page(pub(crate) [u8; BLOCK]);

/// A device past the page cache.
pub(crate) fn open(device: &str) -> Result<File> {
    let options =
        File::options().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(device);
    options.with_context(|| device.to_owned())
}

fn open_all(disks: &[&str]) -> Result<Vec<File>> {
    disks.iter().map(|disk| open(disk)).collect()
}

/// How often each thread has been around what is its own.
struct Rounds(Mutex<Vec<u64>>);

impl Rounds {
    fn of(threads: u64) -> Self {
        Self(Mutex::new(vec![0; threads as usize]))
    }

    fn one_more(&self, thread: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[thread as usize] += 1;
    }

    /// How often everything has been gone over: the slowest thread's.
    fn least(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().min().copied().unwrap_or(0)
    }
}

struct Progress {
    sweeps: Rounds,
    refills: AtomicU64,
    mismatches: AtomicU64,
}

/// Fills that many pages by direct reads of each disk's first `blocks` blocks, which hold what `block_content` says,
/// checks all of them, refills them, and so on for ever. Readers take the disks in turn.
pub(crate) fn pages(pages: u64, blocks: u64, disks: &[&str]) -> Result<()> {
    let disks = open_all(disks)?;
    let (refills, mismatches) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = Progress { sweeps: Rounds::of(READERS), refills, mismatches };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .zip(disks.iter().cycle())
            .map(|(reader, disk)| {
                let progress = &progress;
                scope.spawn(move || read_for_ever(disk, progress, reader, pages / READERS, blocks))
            })
            .collect();
        while readers.iter().all(|reader| !reader.is_finished()) {
            std::thread::sleep(REPORT);
            let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let Progress { sweeps, refills, mismatches } = &progress;
            say(&format!(
                "pages: sweeps {} refills {} mismatches {}",
                sweeps.least(),
                of(refills),
                of(mismatches)
            ))?;
        }
        give_up(readers)
    })
}

/// Says why the first thread that has ended did so, which none of them should, and ends the program: the scope of these
/// threads would wait for the others, which never end.
fn give_up(threads: Vec<ScopedJoinHandle<'_, Result<()>>>) -> Result<()> {
    let ended = threads.into_iter().find(ScopedJoinHandle::is_finished);
    match ended.map(ScopedJoinHandle::join) {
        Some(Ok(Err(error))) => eprintln!("guest-agent: {error:#}"),
        _ => eprintln!("guest-agent: a thread has panicked"),
    }
    std::process::exit(1)
}

fn read_for_ever(device: &File, progress: &Progress, reader: u64, count: u64, blocks: u64) -> Result<()> {
    let mut pages = vec![Page([0; BLOCK]); count as usize];
    let mut held = vec![None; pages.len()];
    let mut random = reader + 1;
    loop {
        for (page, &held) in pages.iter().zip(&held) {
            check(progress, page, held);
        }
        progress.sweeps.one_more(reader);
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
    if held.is_some_and(|block| !holds_block(&page.0, block)) {
        progress.mismatches.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the writers of stamps have done, all together.
struct Stamped {
    rounds: Rounds,
    writes: AtomicU64,
    mismatches: AtomicU64,
}

/// Has each of `writers` threads keep a counter in memory and in blocks of its own on every disk: `slots` of them each,
/// from block `first` on.
pub(crate) fn stamp(writers: u64, first: u64, slots: u64, disks: &[&str]) -> Result<()> {
    let disks = open_all(disks)?;
    let (writes, mismatches) = (AtomicU64::new(0), AtomicU64::new(0));
    let stamped = Stamped { rounds: Rounds::of(writers), writes, mismatches };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|writer| {
                let (disks, stamped) = (&disks, &stamped);
                scope.spawn(move || stamp_for_ever(disks, stamped, writer, first + writer * slots, slots))
            })
            .collect();
        while threads.iter().all(|thread| !thread.is_finished()) {
            std::thread::sleep(REPORT);
            say(&format!(
                "stamp: rounds {} writes {} mismatches {}",
                stamped.rounds.least(),
                stamped.writes.load(Ordering::Relaxed),
                stamped.mismatches.load(Ordering::Relaxed)
            ))?;
        }
        give_up(threads)
    })
}

/// Writes a counter into one slot after the other and around, the same on each disk in turn, and keeps it in memory:
/// whoever restores one without the other is found out by the slot to be written next, which must hold what was written
/// there a round before, and by the last, which must hold what memory says.
fn stamp_for_ever(disks: &[File], stamped: &Stamped, writer: u64, first: u64, slots: u64) -> Result<()> {
    let mut page = Page([0; BLOCK]);
    let mut counter = 0u64;
    loop {
        for disk in disks {
            let place = |counter: u64| (first + counter % slots) * BLOCK as u64;
            let mut expect = |value: u64, place: u64| -> Result<()> {
                disk.read_exact_at(&mut page.0, place)?;
                let as_written = page.0[..8] == value.to_le_bytes();
                stamped.mismatches.fetch_add(u64::from(!as_written), Ordering::Relaxed);
                Ok(())
            };
            if counter > 0 {
                expect(counter, place(counter))?;
            }
            if counter >= slots {
                expect(counter + 1 - slots, place(counter + 1))?;
            }
            page.0[..8].copy_from_slice(&(counter + 1).to_le_bytes());
            disk.write_all_at(&page.0, place(counter + 1))?;
            stamped.writes.fetch_add(1, Ordering::Relaxed);
        }
        counter += 1;
        if counter.is_multiple_of(slots) {
            stamped.rounds.one_more(writer);
        }
    }
}

pub(crate) fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
