//! A guest that is timed from outside: a byte on a serial port every millisecond, and requests to a disk whose latency
//! it measures itself. The same port brings commands, a byte each.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::workload::{BLOCK, mix};

use crate::memory::{Page, open, say};

const BEAT: Duration = Duration::from_millis(1);
/// So much of the disk is written and read.
const DISK_BLOCKS: u64 = 65536;
const MIB: u64 = 1 << 20;

/// Latencies of requests, in microseconds, outside and inside of the windows that the host has told of.
#[derive(Default)]
struct Latencies {
    inside_now: AtomicBool,
    taken: [Mutex<Vec<u32>>; 2],
}

/// Fills so many MiB of memory with what does not compress, says `filled`, and beats until the port closes. With a disk,
/// reads and writes random blocks of it in turn. Commands: `i` and `o`, a window begins and ends; `r`, say the latencies
/// and forget them; `d`, write to so many MiB of the filled pages, anywhere among them.
pub(crate) fn run(port: &str, fill_mib: u64, dirty_mib: u64, disk: Option<&str>) -> Result<()> {
    let (beats, commands) = (File::options().write(true).open(port)?, File::open(port)?);
    let pages_of = |mib: u64| mib * MIB / BLOCK as u64;
    let mut filled = vec![Page([0; BLOCK]); pages_of(fill_mib) as usize];
    filled.iter_mut().zip(1..).for_each(|(page, seed)| page.scramble(seed));
    let disk = disk.map(open).transpose()?;
    if let Some(disk) = &disk {
        fill(disk)?;
    }
    say("filled")?;
    let latencies = Latencies::default();
    std::thread::scope(|scope| {
        scope.spawn(|| tell_of(beat(&beats)));
        if let Some(disk) = &disk {
            scope.spawn(|| tell_of(ask(disk, &latencies)));
        }
        obey(&commands, &latencies, &mut filled, pages_of(dirty_mib))
    })
}

/// Says why something has ended that should not have: whoever waits for an answer hears this instead.
fn tell_of(ended: Result<()>) {
    if let Err(error) = ended {
        eprintln!("guest-agent: {error:#}");
    }
}

/// Says on the port that we live. One that is late is not made up for.
fn beat(mut port: &File) -> Result<()> {
    let mut next = Instant::now();
    for number in (0..=u8::MAX).cycle() {
        port.write_all(&[number])?;
        let now = Instant::now();
        next = (next + BEAT).max(now);
        std::thread::sleep(next - now);
    }
    Ok(())
}

fn obey(mut port: &File, latencies: &Latencies, filled: &mut [Page], dirty_pages: u64) -> Result<()> {
    let mut command = [0];
    for round in 1.. {
        if port.read(&mut command)? == 0 {
            break;
        }
        match command[0] {
            b'i' => latencies.inside_now.store(true, Ordering::Relaxed),
            b'o' => latencies.inside_now.store(false, Ordering::Relaxed),
            b'r' => latencies.report()?,
            b'd' => {
                for seed in (0..dirty_pages).map(|dirty| mix(round << 32 | dirty)) {
                    let page = (seed % filled.len().max(1) as u64) as usize;
                    filled.get_mut(page).context("nothing was filled")?.scramble(seed);
                }
                say("dirtied")?;
            }
            other => bail!("'{}' is no command", other as char),
        }
    }
    bail!("the port was closed")
}

impl Page {
    /// Fills it with what does not compress.
    fn scramble(&mut self, seed: u64) {
        let first = seed.wrapping_mul(BLOCK as u64);
        for (word, at) in self.0.chunks_exact_mut(8).zip(0u64..) {
            word.copy_from_slice(&mix(first.wrapping_add(at)).to_le_bytes());
        }
    }
}

/// Writes the part of the disk that will be read.
fn fill(disk: &File) -> Result<()> {
    let mut page = Page([0; BLOCK]);
    for block in 0..DISK_BLOCKS {
        page.0.fill(block as u8 | 1);
        disk.write_all_at(&page.0, block * BLOCK as u64)?;
    }
    Ok(())
}

/// Reads and writes random blocks in turn, one at a time.
fn ask(disk: &File, latencies: &Latencies) -> Result<()> {
    let mut page = Page([1; BLOCK]);
    for request in 0u64.. {
        let place = mix(request) % DISK_BLOCKS * BLOCK as u64;
        let inside = latencies.inside_now.load(Ordering::Relaxed);
        let from = Instant::now();
        if request.is_multiple_of(2) {
            disk.read_exact_at(&mut page.0, place)?;
        } else {
            disk.write_all_at(&page.0, place)?;
        }
        let took_us = u32::try_from(from.elapsed().as_micros()).unwrap_or(u32::MAX);
        let inside = inside || latencies.inside_now.load(Ordering::Relaxed);
        let mut taken = latencies.taken[usize::from(inside)].lock().unwrap_or_else(PoisonError::into_inner);
        taken.push(took_us);
    }
    Ok(())
}

impl Latencies {
    /// `latency outside COUNT P50 P99 MAX inside COUNT P50 P99 MAX`, in microseconds.
    fn report(&self) -> Result<()> {
        let of = |taken: &Mutex<Vec<u32>>| {
            let mut taken = std::mem::take(&mut *taken.lock().unwrap_or_else(PoisonError::into_inner));
            taken.sort_unstable();
            let at =
                |percent: usize| taken.get((taken.len() * percent / 100).min(taken.len().saturating_sub(1)));
            let [p50, p99, max] = [50, 99, 100].map(|percent| at(percent).copied().unwrap_or(0));
            format!("{} {p50} {p99} {max}", taken.len())
        };
        let [outside, inside] = &self.taken;
        say(&format!("latency outside {} inside {}", of(outside), of(inside)))
    }
}
