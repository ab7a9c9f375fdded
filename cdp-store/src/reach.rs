//! How far each log was written, noted where a killed process leaves it and a power cut does not.
//!
//! An opening must tell a log that ends from one of which a part is damaged, and looks for batches behind the end: two
//! megabytes for each volume, which nobody notices with ten volumes and everybody with a thousand. But if nothing was
//! ever placed behind the end, there is nothing to find. So the process that writes notes, before it writes, where each
//! log's last batch ends: in a file in memory (tmpfs), mapped, which is one store to memory for each batch.
//!
//! - The notes outlive the process, however it dies, and not the machine, whose disk may have lost what they speak of.
//! - They count only for the generation that made them, and only once: an opening takes them away before anything is
//!   appended.
//! - They only ever spare a search, and only where a log ends in exactly the place that was noted. Where they are missing,
//!   wrong or unreadable, everything is as it would be without.
//!
//! The file: a header of 64 bytes (magic, store, generation), then slots of 24 bytes (volume, the place as [`LogPos`] has
//! it, 0 for none, and the secret of its segment, which tells copies of a store apart), little-endian. It is no part of the
//! store's format: a program that does not know it loses nothing.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use cdp_types::{Generation, VolumeId};
use rustix::fs::{OFlags, fstatfs};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use crate::index::LogPos;

/// Where notes are kept: a file system in memory on every Linux.
pub const DIRECTORY: &str = "/dev/shm";
const MAGIC: [u8; 8] = *b"HSREACH1";
const HEADER: usize = 64;
const SLOT: usize = 24;
/// For so many volumes the notes stay after a clean end, until the next opening or the machine's end.
const WORTH_KEEPING: u64 = 32;
/// What is asked of the memory at once, in bytes.
const PIECE: usize = 4096;
/// A table is so long, in bytes, next to all of it a hole; volumes without a slot are searched.
const LENGTH: usize = 1 << 20;
const SLOTS: u64 = ((LENGTH - HEADER) / SLOT) as u64;
/// `<linux/magic.h>`
const TMPFS: i64 = 0x0102_1994;

/// Where a log's last batch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The byte behind it.
    pub place: LogPos,
    /// Of the segment that it is in.
    pub secret: u64,
}

/// Where logs ended when their process ended.
pub type Reached = HashMap<VolumeId, End>;

/// The notes of the process that has a store open.
#[derive(Debug)]
pub struct ReachTable {
    path: PathBuf,
    file: File,
    region: MmapRegion,
    /// Slots, and bytes that the memory has given.
    taken: Mutex<(u64, usize)>,
}

/// One log's note.
#[derive(Debug)]
pub struct Reach {
    table: Arc<ReachTable>,
    slot: u64,
}

fn path_of(directory: &Path, store: [u8; 16]) -> PathBuf {
    directory.join(format!("hindsight-{}", uuid::Uuid::from_bytes(store).simple()))
}

/// Takes what the last process has noted, and removes it: from here on it counts no more.
#[must_use]
pub fn take(directory: &Path, store: [u8; 16], generation: Generation) -> Reached {
    let path = path_of(directory, store);
    let read = read(&path);
    let removed = std::fs::remove_file(&path);
    match (read, removed) {
        (Ok(bytes), Ok(())) => parse(&bytes, store, generation).unwrap_or_default(),
        (Err(error), _) | (_, Err(error)) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!("{}: {error}; all logs are searched", path.display());
            }
            Reached::default()
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Anybody may put something there: a pipe would wait for its other end.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    let is_ours = metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw();
    if !is_ours || metadata.len() > LENGTH as u64 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it was not made by this user's daemon"));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut &file, &mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8], store: [u8; 16], generation: Generation) -> Option<Reached> {
    let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let fits = bytes.get(..8)? == MAGIC && bytes.get(8..24)? == store && number(24)? == generation.0;
    if !fits {
        return None;
    }
    let slots = bytes.get(HEADER..)?.chunks_exact(SLOT).map(|slot| {
        let number = |at: usize| slot[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or_default();
        (VolumeId(number(0)), number(8), number(16))
    });
    let noted = slots.filter(|(_, place, _)| *place != 0);
    let end = |place, secret| End { place: LogPos::from_bits(place), secret };
    Some(noted.map(|(volume, place, secret)| (volume, end(place, secret))).collect())
}

impl ReachTable {
    /// A table of this opening.
    ///
    /// # Errors
    /// The directory is not in memory, or has no room. A store works without.
    pub fn create(directory: &Path, store: [u8; 16], generation: Generation) -> io::Result<Arc<Self>> {
        let path = path_of(directory, store);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Self::begin(path.clone(), file, store, generation).inspect_err(|_| {
            // It is ours, and says nothing.
            let _ = std::fs::remove_file(&path);
        })
    }

    fn begin(path: PathBuf, file: File, store: [u8; 16], generation: Generation) -> io::Result<Arc<Self>> {
        if fstatfs(&file)?.f_type != TMPFS {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it is not in a tmpfs"));
        }
        let mut first = [0; PIECE];
        first[..8].copy_from_slice(&MAGIC);
        first[8..24].copy_from_slice(&store);
        first[24..32].copy_from_slice(&generation.0.to_le_bytes());
        file.write_all_at(&first, 0)?;
        file.set_len(LENGTH as u64)?;
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), LENGTH);
        let region = region.map_err(io::Error::other)?;
        Ok(Arc::new(Self { path, file, region, taken: Mutex::new((0, PIECE)) }))
    }

    /// A slot for a volume's log, which ends here if that is known; none if all are taken, or no memory is left.
    #[must_use]
    pub fn slot(self: &Arc<Self>, volume: VolumeId, end: Option<End>) -> Option<Reach> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let (slot, given) = *taken;
        if slot >= SLOTS {
            return None;
        }
        if HEADER + (slot as usize + 1) * SLOT > given {
            // Before it is used through the mapping: there, memory that cannot be had would end the process.
            self.file.write_all_at(&[0; PIECE], given as u64).ok()?;
            taken.1 += PIECE;
        }
        taken.0 += 1;
        drop(taken);
        self.put(slot, 0, volume.0);
        let reach = Reach { table: Arc::clone(self), slot };
        reach.note(end);
        Some(reach)
    }

    /// Removes the file at a clean end, if the next opening would gain nothing by it that anybody notices.
    pub fn remove_if_small(&self) {
        let few = self.taken.lock().unwrap_or_else(PoisonError::into_inner).0 < WORTH_KEEPING;
        let is_ours = || Some(std::fs::metadata(&self.path).ok()?.ino() == self.file.metadata().ok()?.ino());
        if few && is_ours() == Some(true) {
            // It would be removed by the next opening.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn put(&self, slot: u64, at: usize, value: u64) {
        let offset = HEADER + slot as usize * SLOT + at;
        let stored = self.region.as_volatile_slice().store(value.to_le(), offset, Ordering::Release);
        debug_assert!(stored.is_ok(), "slot {slot} is in the table");
    }
}

impl Reach {
    /// Notes where the last batch ends that was placed: before it is written. None if that cannot be said.
    pub fn note(&self, end: Option<End>) {
        // Whoever is killed in between has noted nothing.
        self.table.put(self.slot, 8, 0);
        if let Some(End { place, secret }) = end {
            self.table.put(self.slot, 16, secret);
            self.table.put(self.slot, 8, place.to_bits());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STORE: [u8; 16] = [7; 16];

    fn end_at(offset: u64) -> Option<End> {
        Some(End { place: LogPos::new(5, offset)?, secret: 77 })
    }

    fn memory() -> tempfile::TempDir {
        tempfile::tempdir_in(DIRECTORY).unwrap()
    }

    #[test]
    fn what_was_noted_last_is_taken_once() {
        let directory = memory();
        let table = ReachTable::create(directory.path(), STORE, Generation(3)).unwrap();
        let pos = end_at;
        let first = table.slot(VolumeId(1), pos(4096)).unwrap();
        let _second = table.slot(VolumeId(9), None).unwrap();
        let third = table.slot(VolumeId(12), pos(512)).unwrap();
        first.note(pos(8192));
        third.note(None);
        // The process is gone; nothing is said in the end.
        std::mem::forget((first, third, table));
        let reached = take(directory.path(), STORE, Generation(3));
        assert_eq!(reached, HashMap::from([(VolumeId(1), pos(8192).unwrap())]));
        assert_eq!(take(directory.path(), STORE, Generation(3)), HashMap::new(), "only once");
    }

    #[test]
    fn notes_of_another_opening_or_store_count_for_nothing_and_are_removed() {
        let directory = memory();
        for (store, generation) in [(STORE, 4), (STORE, 2), ([8; 16], 3)] {
            let table = ReachTable::create(directory.path(), STORE, Generation(3)).unwrap();
            let _slot = table.slot(VolumeId(1), end_at(512));
            std::fs::rename(path_of(directory.path(), STORE), path_of(directory.path(), store)).unwrap();
            assert_eq!(take(directory.path(), store, Generation(generation)), HashMap::new());
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn many_volumes_have_slots_and_memory_is_taken_as_they_come() {
        let directory = memory();
        let table = ReachTable::create(directory.path(), STORE, Generation(1)).unwrap();
        let taken = || std::fs::metadata(path_of(directory.path(), STORE)).unwrap().blocks() * 512;
        assert_eq!(taken(), PIECE as u64);
        let slots: Vec<_> =
            (0..1000).map(|n| table.slot(VolumeId(n), end_at((n + 1) * 512)).unwrap()).collect();
        assert_eq!(taken(), (HEADER + 1000 * SLOT).next_multiple_of(PIECE) as u64);
        drop(slots);
        assert_eq!((1000..).find(|&n| table.slot(VolumeId(n), None).is_none()), Some(SLOTS));
        let reached = take(directory.path(), STORE, Generation(1));
        assert_eq!(reached.len(), 1000);
        assert_eq!(reached[&VolumeId(999)], end_at(512_000).unwrap());
    }

    #[test]
    fn files_that_are_cut_short_links_and_other_file_systems_are_refused() {
        let directory = memory();
        let path = path_of(directory.path(), STORE);
        for bytes in [&b"HSREACH1"[..], b"", &[0; 100]] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(take(directory.path(), STORE, Generation(0)), HashMap::new());
            assert!(!path.exists());
        }
        let other = directory.path().join("other");
        std::fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(take(directory.path(), STORE, Generation(0)), HashMap::new());
        assert_eq!(std::fs::read(&other).unwrap(), b"somebody's");
        std::fs::remove_file(&other).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(take(directory.path(), STORE, Generation(0)), HashMap::new(), "a pipe is not waited for");
        let on_disk = tempfile::tempdir_in("/var/tmp").unwrap();
        let refused = ReachTable::create(on_disk.path(), STORE, Generation(1)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        assert_eq!(std::fs::read_dir(on_disk.path()).unwrap().count(), 0);
    }
}
