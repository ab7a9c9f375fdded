//! Segment files, read from outside by `docs/format.md`: what the batches in them take, and giving old data back.
//!
//! A disk that holds a hundred million writes is larger than the one that they are measured on. What grows with them is the
//! index and the number of segments, so the data of old segments is given back and their headers are kept. Nothing reads
//! that data: only whoever went back so far would.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::FallocateFlags;

const MAGIC: &[u8; 8] = b"HINDSITE";
const SEGMENT: u32 = 2;
const BATCH: u32 = 3;
const BLOCK: u64 = 4096;
/// The fixed part of a batch's header.
const BATCH_FIXED: usize = 160;

/// A segment of a volume's log.
#[derive(Debug)]
struct Segment {
    path: PathBuf,
    incarnation: u64,
    first_ordinal: u64,
    physical_block: u64,
    bytes: u64,
}

/// What a part of a log takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct LogUse {
    /// Blocks that were written.
    pub(super) payload_bytes: u64,
    /// The same with everything around them: headers, padding, and what was left unused at the ends of segments.
    pub(super) log_bytes: u64,
}

/// Gives back the data of all but the newest segments, which take `keep_bytes`, and remembers what was given back in
/// `done`. Returns how many bytes that was now.
///
/// # Errors
/// The file system's.
pub(super) fn give_back(store: &Path, keep_bytes: u64, done: &mut HashSet<PathBuf>) -> Result<u64> {
    let mut kept = 0;
    let mut given = 0;
    for segment in of_volumes(store, done)?.into_iter().rev() {
        kept += segment.bytes;
        let data = segment.bytes.saturating_sub(segment.data_start());
        if kept <= keep_bytes || data == 0 {
            continue;
        }
        let file = OpenOptions::new().write(true).open(&segment.path)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, segment.data_start(), data)
            .with_context(|| format!("giving back {}", segment.path.display()))?;
        given += data;
        done.insert(segment.path);
    }
    Ok(given)
}

/// What the batches behind ordinal `from` take, up to and including `to`. They must not have been given back.
///
/// # Errors
/// They are not there; the file system's.
pub(super) fn log_use(store: &Path, from: u64, to: u64) -> Result<LogUse> {
    let segments = of_volumes(store, &HashSet::new())?;
    let mut all = LogUse::default();
    let mut last = from;
    for (index, segment) in segments.iter().enumerate() {
        let next = segments.get(index + 1).map(|next| next.first_ordinal);
        if segment.first_ordinal > to || next.is_some_and(|next| next <= from + 1) {
            continue;
        }
        let end = segment.walk(next.unwrap_or(u64::MAX).min(to + 1), |ordinal, batch| {
            if ordinal > from {
                all.payload_bytes += batch.payload_bytes;
                all.log_bytes += batch.log_bytes;
                last = ordinal;
            }
        })?;
        if segment.first_ordinal > from {
            all.log_bytes += segment.data_start();
            if next.is_some_and(|next| next <= to + 1) {
                all.log_bytes += segment.bytes.saturating_sub(end);
            }
        }
    }
    ensure!(last == to, "the log has no batch {to}: it ends with {last}");
    Ok(all)
}

/// Segments of volumes, without the store log's, in the order in which they were opened.
fn of_volumes(store: &Path, without: &HashSet<PathBuf>) -> Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(store.join("segments"))? {
        let path = entry?.path();
        if !without.contains(&path) {
            // One that goes while we look is no segment of a log.
            let Ok(file) = File::open(&path) else { continue };
            segments.extend(Segment::read(&file, path)?);
        }
    }
    segments.sort_by_key(|segment| segment.incarnation);
    Ok(segments)
}

impl Segment {
    /// A volume's segment, if this is one (docs/format.md, "Segment").
    fn read(file: &File, path: PathBuf) -> Result<Option<Self>> {
        let mut header = [0; BLOCK as usize];
        if file.read_exact_at(&mut header, 0).is_err() || !is(&header, SEGMENT) || long(&header, 56) == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            path,
            incarnation: long(&header, 48),
            first_ordinal: long(&header, 88),
            physical_block: u64::from(word(&header, 100)).max(512),
            bytes: file.metadata()?.len(),
        }))
    }

    fn data_start(&self) -> u64 {
        2 * self.physical_block.max(BLOCK)
    }

    /// Calls `visit` with each batch before an ordinal (docs/format.md, "Batch"), and returns where the last one ends.
    fn walk(&self, before: u64, mut visit: impl FnMut(u64, LogUse)) -> Result<u64> {
        let file = File::open(&self.path)?;
        let mut at = self.data_start();
        let mut header = [0; BATCH_FIXED];
        while file.read_exact_at(&mut header, at).is_ok() && is(&header, BATCH) {
            let ordinal = long(&header, 96);
            if long(&header, 64) != self.incarnation || long(&header, 72) != at || ordinal >= before {
                break;
            }
            let payload_bytes = u64::from(word(&header, 152)) * BLOCK;
            let log_bytes =
                (u64::from(word(&header, 24)) + payload_bytes).next_multiple_of(self.physical_block);
            visit(ordinal, LogUse { payload_bytes, log_bytes });
            at += log_bytes;
        }
        Ok(at)
    }
}

fn is(header: &[u8], kind: u32) -> bool {
    header.starts_with(MAGIC) && word(header, 8) == kind
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at + 4)) << 32 | u64::from(word(bytes, at))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const BYTES: u64 = 4 << 20;

    fn header(kind: u32, fields: &[(usize, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&kind.to_le_bytes());
        for (at, value) in fields {
            let len = if [24, 100, 152].contains(at) { 4 } else { 8 };
            bytes[*at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        bytes
    }

    /// A store with segments of a volume's log, each of which has two batches of 16 blocks, one of the store log and a blank.
    fn store() -> tempfile::TempDir {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("segments")).unwrap();
        let make = |slot: u64, volume: u64| {
            let file = File::create(dir.path().join(format!("segments/{slot:08}"))).unwrap();
            file.write_all_at(&vec![1; BYTES as usize], 0).unwrap();
            let first = 2 * slot + 1;
            file.write_all_at(&header(SEGMENT, &[(48, slot), (56, volume), (88, first), (100, 4096)]), 0)
                .unwrap();
            for (ordinal, at) in [(first, 8192), (first + 1, 8192 + 17 * BLOCK)] {
                let fields = [(64, slot), (72, at), (96, ordinal), (24, 4096), (152, 16)];
                file.write_all_at(&header(BATCH, &fields), at).unwrap();
            }
        };
        (0..3).for_each(|slot| make(slot, 1));
        make(9, 0);
        fs::write(dir.path().join("segments/00000010"), vec![0; BYTES as usize]).unwrap();
        dir
    }

    #[test]
    fn batches_are_counted_with_their_headers_and_what_full_segments_left_unused() {
        let dir = store();
        let part = log_use(dir.path(), 1, 2).unwrap();
        assert_eq!(part, LogUse { payload_bytes: 16 * BLOCK, log_bytes: 17 * BLOCK });
        let all = log_use(dir.path(), 0, 6).unwrap();
        assert_eq!(all.payload_bytes, 6 * 16 * BLOCK);
        // Two segments as a whole, and of the newest one what is used.
        assert_eq!(all.log_bytes, 2 * BYTES + 8192 + 2 * 17 * BLOCK);
        assert!(log_use(dir.path(), 0, 7).is_err());
    }

    #[test]
    fn old_data_is_given_back_once_and_headers_stay() {
        let dir = store();
        let mut done = HashSet::new();
        assert_eq!(give_back(dir.path(), BYTES, &mut done).unwrap(), 2 * (BYTES - 8192));
        assert_eq!(give_back(dir.path(), BYTES, &mut done).unwrap(), 0);
        let taken =
            |slot: u64| fs::metadata(dir.path().join(format!("segments/{slot:08}"))).unwrap().blocks() * 512;
        assert_eq!([0, 1, 2, 9, 10].map(|slot| taken(slot) >= BYTES), [false, false, true, true, true]);
        assert_eq!(of_volumes(dir.path(), &HashSet::new()).unwrap().len(), 3);
    }
}
