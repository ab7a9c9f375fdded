//! Getting a database that was just opened ready for reads that nobody has made yet.
//!
//! RocksDB opens 16 of its tables when it is opened, and each of the others when a read first needs it, which takes
//! that read some five reads of the disk more. A read of a leaf looks into every file of level 0 and into one of each other
//! level, and needs a piece of each one's index first. Most of that was in the kernel's cache when the process ended, but is
//! not after a reboot.

use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rocksdb::{ColumnFamily, DB, LiveFile, ReadOptions};

/// How much of the newest files is read. Level 0 and the level that follows it rarely have more.
const NEWEST_BYTES: u64 = 256 << 20;
/// Which part of a table its index takes, which is its end; where each node has but one short row it takes more.
const INDEX_SHARE: u64 = 128;
/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 256 << 10;
/// The shortest pause after a piece and after a table: guests come first. Where the disk takes longer, so does the pause.
const PAUSE: Duration = Duration::from_micros(500);

/// Opens the tables of a family, up to `most` of them, the largest levels first, reads their indexes, and reads the newest
/// tables whole, so that the kernel has them. Ends early once `stop` says so. What cannot be read is left to whoever needs it.
/// Returns how many tables there are to be opened.
pub(super) fn preload(
    db: &DB,
    family: &ColumnFamily,
    name: &str,
    most: usize,
    stop: &dyn Fn() -> bool,
) -> usize {
    let Ok(mut files) = db.live_files() else { return 0 };
    files.retain(|file| file.column_family_name == name);
    // A new file's name is greater than all older ones'.
    files.sort_by(|a, b| (a.level, &b.name).cmp(&(b.level, &a.name)));
    let mut left = NEWEST_BYTES;
    for file in &files {
        let whole = left.min(file.size as u64);
        left -= whole;
        if stop() {
            break;
        }
        // One that was compacted away meanwhile is missing.
        if let Err(error) = Reader::of(db, file).and_then(|mut table| table.read(whole, stop)) {
            tracing::debug!(%error, "{} is not read ahead", file.name);
        }
    }
    for file in files.iter().rev().take(most) {
        if stop() {
            break;
        }
        open_table(db, family, file);
        sleep(PAUSE);
    }
    files.len().min(most)
}

/// Reads a table, so that the kernel keeps it.
struct Reader {
    file: File,
    bytes: u64,
    scratch: Vec<u8>,
}

impl Reader {
    fn of(db: &DB, table: &LiveFile) -> Result<Self> {
        let path: PathBuf = db.path().join(table.name.trim_start_matches('/'));
        let file = File::open(path)?;
        Ok(Self { file, bytes: table.size as u64, scratch: vec![0; PIECE_BYTES as usize] })
    }

    /// So much of its beginning, and its last part in any case.
    fn read(&mut self, beginning: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let index = (self.bytes / INDEX_SHARE).max(PIECE_BYTES).min(self.bytes);
        self.range(0, beginning, stop)?;
        self.range(beginning.max(self.bytes - index), self.bytes, stop)
    }

    fn range(&mut self, mut from: u64, to: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        while from < to && !stop() {
            let piece = &mut self.scratch[..PIECE_BYTES.min(to - from) as usize];
            let begun = Instant::now();
            self.file.read_exact_at(piece, from)?;
            from += piece.len() as u64;
            sleep(begun.elapsed().max(PAUSE));
        }
        Ok(())
    }
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
