//! Getting a database that was just opened ready for reads that nobody has made yet.
//!
//! RocksDB opens 16 of its tables when it is opened, and each of the others when a read first needs it, which takes
//! that read some five reads of the disk more. And a read of a leaf looks into every file of level 0: most of them were
//! in the kernel's cache when the process ended, but are not after a reboot.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use rocksdb::{ColumnFamily, DB, LiveFile, ReadOptions};
use rustix::fs::Advice;

/// How much of the newest files the kernel is asked to read. Level 0 rarely has more.
const AHEAD_BYTES: u64 = 192 << 20;
/// Bytes that it is asked for at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// A pause after each piece and after each table: guests come first.
const PAUSE: Duration = Duration::from_millis(2);

/// Has the newest tables of a family read by the kernel, and opens all, up to `most` of them, the largest levels first. Ends early once `stop` says so. What cannot be read is left to whoever needs it.
pub(super) fn preload(db: &DB, family: &ColumnFamily, name: &str, most: usize, stop: &dyn Fn() -> bool) {
    let Ok(mut files) = db.live_files() else { return };
    files.retain(|file| file.column_family_name == name);
    // A new file's name is greater than all older ones'.
    files.sort_by(|a, b| (a.level, &b.name).cmp(&(b.level, &a.name)));
    let mut left = AHEAD_BYTES;
    for file in files.iter().take_while(|file| file.level <= 0) {
        let bytes = (file.size as u64).min(left);
        left -= bytes;
        if stop() || read_ahead(db.path(), file, bytes, stop).is_err() {
            return;
        }
    }
    for file in files.iter().rev().take(most) {
        if stop() {
            return;
        }
        open_table(db, family, file);
        std::thread::sleep(PAUSE);
    }
}

fn read_ahead(database: &Path, file: &LiveFile, bytes: u64, stop: &dyn Fn() -> bool) -> std::io::Result<()> {
    let table = File::open(database.join(file.name.trim_start_matches('/')))?;
    let mut at = 0;
    while at < bytes && !stop() {
        rustix::fs::fadvise(&table, at, std::num::NonZeroU64::new(PIECE_BYTES), Advice::WillNeed)?;
        at += PIECE_BYTES;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Looks at the first row of a table, which leaves it open. The block that the row lies in is not kept.
fn open_table(db: &DB, family: &ColumnFamily, file: &LiveFile) {
    let Some(first) = &file.start_key else { return };
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options.set_prefix_same_as_start(true);
    let mut rows = db.raw_iterator_cf_opt(family, options);
    rows.seek(first);
}
