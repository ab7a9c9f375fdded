//! What a server costs, as the kernel accounts for it in `/proc`.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How often memory is looked at.
const WATCH: Duration = Duration::from_millis(20);
/// A server is quiet when it has done nothing for so long: longer than our daemon waits after guests' last writes before
/// it fills segments ahead, or that would fall into the next server's time.
const QUIET: Duration = Duration::from_millis(2600);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(200);
/// How long a server may take to become quiet.
const SETTLE: Duration = Duration::from_secs(60);

/// CPU seconds that a process has used, its ended threads included (proc(5), `stat`).
///
/// # Errors
/// It has ended.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    cpu_of_stat(&read(pid, "stat")?).map(|(_, seconds)| seconds)
}

/// CPU seconds that those threads of our daemon have used which keep the time index: its own for that, and RocksDB's.
///
/// # Errors
/// It has ended.
pub(crate) fn index_cpu_seconds(pid: u32) -> Result<f64> {
    let mut sum = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ends meanwhile is none of those.
        let Ok(text) = fs::read_to_string(task?.path().join("stat")) else { continue };
        let (name, seconds) = cpu_of_stat(&text)?;
        if name == "cdp-index" || name.starts_with("rocksdb:") {
            sum += seconds;
        }
    }
    Ok(sum)
}

/// Name and CPU seconds in a line of `stat`.
fn cpu_of_stat(text: &str) -> Result<(&str, f64)> {
    // The name in parentheses may contain anything; utime and stime are the 12th and 13th field after it.
    let (start, fields) = text.rsplit_once(')').context("a stat line without a name")?;
    let name = start.split_once('(').map_or("", |(_, name)| name);
    let fields = fields.split_whitespace();
    let ticks: Vec<u64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    let [user, system] = ticks[..] else { anyhow::bail!("/proc has another format: {text}") };
    Ok((name, (user + system) as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// Bytes that a process has sent to the disk, and had the disk send.
///
/// # Errors
/// It has ended.
fn moved_bytes(pid: u32) -> Result<u64> {
    let io = read(pid, "io")?;
    let of = |field| number(&io, field).context("/proc does not count bytes read and written");
    Ok(of("write_bytes:")? + of("read_bytes:")?)
}

/// Anonymous resident memory of a process, in bytes: its own, without what it maps of others and of files.
///
/// # Errors
/// It has ended.
pub(crate) fn rss_anon(pid: u32) -> Result<u64> {
    Ok(number(&read(pid, "status")?, "RssAnon:").context("/proc does not show RssAnon")? << 10)
}

/// Resident memory of a process, in bytes: what it maps of others and of files too.
///
/// # Errors
/// It has ended.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    Ok(number(&read(pid, "status")?, "VmRSS:").context("/proc does not show VmRSS")? << 10)
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| path.clone())
}

fn number(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Waits until a process neither reads nor writes nor computes, so that its background work does not burden whoever is
/// measured next. Returns whether that came to pass.
///
/// # Errors
/// It has ended.
pub(crate) fn settle(pid: u32) -> Result<bool> {
    let deadline = Instant::now() + SETTLE;
    let mut busy_at = Instant::now();
    let mut before = (moved_bytes(pid)?, cpu_seconds(pid)?);
    while Instant::now() < deadline {
        if busy_at.elapsed() >= QUIET {
            return Ok(true);
        }
        thread::sleep(LOOK);
        let now = (moved_bytes(pid)?, cpu_seconds(pid)?);
        if now.0 != before.0 || now.1 - before.1 > 0.015 {
            busy_at = Instant::now();
        }
        before = now;
    }
    Ok(false)
}

/// As [`settle`], but whether that came to pass is only said: for what has no place for it in its report.
///
/// # Errors
/// It has ended.
pub(crate) fn settle_or_say(pid: u32) -> Result<()> {
    if !settle(pid)? {
        eprintln!("not quiet before the next figure");
    }
    Ok(())
}

/// The most anonymous memory that a process has had, watched all the time.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    /// Watches a process until it ends or the watch is dropped.
    pub(crate) fn new(pid: u32) -> Self {
        let most = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let watch = (Arc::clone(&most), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !watch.1.load(Ordering::Relaxed) {
                let Ok(now) = rss_anon(pid) else { return };
                watch.0.fetch_max(now, Ordering::Relaxed);
                thread::sleep(WATCH);
            }
        });
        Self { most, stop, thread: Some(thread) }
    }

    /// The most so far, in bytes.
    pub(crate) fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and there would be nothing to do about it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let pid = std::process::id();
        let watch = MemoryWatch::new(pid);
        let before = cpu_seconds(pid).unwrap();
        let start = Instant::now();
        while cpu_seconds(pid).unwrap() < before + 0.05 {
            assert!(start.elapsed() < Duration::from_secs(30), "no CPU time counted");
        }
        assert!(rss_anon(pid).unwrap() > 100 << 10);
        moved_bytes(pid).unwrap();
        while watch.most() == 0 {
            assert!(start.elapsed() < Duration::from_secs(30), "no memory seen");
        }
    }

    #[test]
    fn what_proc_says_is_read() {
        let line = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 100 50 0 0 20 0";
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(cpu_of_stat(line).unwrap(), ("a) b", 150.0 / ticks));
        assert!(cpu_of_stat("7 (a) S 1").is_err());
        assert_eq!(number("VmRSS:\t  12 kB\nRssAnon:\t  3456 kB\n", "RssAnon:"), Some(3456));
        assert_eq!(number("VmRSS:\t  12 kB\n", "RssAnon:"), None);
    }
}
