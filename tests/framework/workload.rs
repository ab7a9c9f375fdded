//! Files whose content follows from a seed and their number, so that anyone can say what is missing or wrong.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// A test file: its name, size and every byte follow from these two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TestFile {
    /// The run's seed.
    pub seed: u64,
    /// The file's number in the run.
    pub number: u64,
}

/// A writer keeps this many of its files, so that it can run for any time on any disk.
pub const KEPT_FILES: usize = 150;

/// How many files, numbered from 0, have at least that many bytes together.
#[must_use]
pub fn files_of(seed: u64, bytes: u64) -> u64 {
    let (mut number, mut sum) = (0, 0);
    while sum < bytes {
        sum += TestFile { seed, number }.size();
        number += 1;
    }
    number
}

/// The largest test file. Small files make a journal busy, large ones make long requests.
pub const MAX_FILE_BYTES: u64 = 512 << 10;

impl TestFile {
    /// Its name in the run's directory.
    #[must_use]
    pub fn name(self) -> String {
        format!("file-{:06}", self.number)
    }

    /// Its size in bytes, odd more often than not: three of four are below 16 KiB.
    #[must_use]
    pub fn size(self) -> u64 {
        let random = mix(self.key() ^ 0x51_7e);
        let bound = if random.is_multiple_of(4) { MAX_FILE_BYTES } else { 16 << 10 };
        1 + (random >> 8) % bound
    }

    /// What it must contain.
    #[must_use]
    pub fn content(self) -> Vec<u8> {
        let size = self.size();
        let mut bytes = Vec::with_capacity(size as usize + 8);
        for word in 0..size.div_ceil(8) {
            bytes.extend_from_slice(&mix(self.key().wrapping_add(word)).to_le_bytes());
        }
        bytes.truncate(size as usize);
        bytes
    }

    /// Compares the file in `dir` with what it must contain.
    ///
    /// # Errors
    /// It is missing, has another length, or differs: the first wrong byte is named.
    pub fn check(self, dir: &Path) -> Result<()> {
        let path = dir.join(self.name());
        let got = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let want = self.content();
        if let Some(at) = got.iter().zip(&want).position(|(got, want)| got != want) {
            bail!("{} differs from byte {at} on: {:02x}, not {:02x}", path.display(), got[at], want[at]);
        }
        ensure!(got.len() == want.len(), "{} has {} bytes, not {}", path.display(), got.len(), want.len());
        Ok(())
    }

    fn key(self) -> u64 {
        mix(mix(self.seed).wrapping_add(self.number))
    }
}

/// Bytes of a block that `block_content` fills.
pub const BLOCK: usize = 4096;

/// What a block of a disk of known content holds: its number, scrambled, over and over.
#[must_use]
pub fn block_content(block: u64) -> [u8; BLOCK] {
    let word = mix(block).to_le_bytes();
    std::array::from_fn(|at| word[at % word.len()])
}

/// Whether a page holds what `block_content` says, without making it: a guest does that all the time.
#[must_use]
pub fn holds_block(page: &[u8; BLOCK], block: u64) -> bool {
    let word = mix(block).to_le_bytes();
    page.chunks_exact(word.len()).all(|chunk| chunk == word)
}

/// One step of `splitmix64` (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a writer says of its progress, one line each, before or after the fact as noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// This file and its name are on the disk: fsync has returned for both.
    Synced(u64),
    /// This file is about to be removed.
    Removing(u64),
    /// This file was written, but nobody asked for it to be on the disk.
    Written(u64),
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Synced(number) => write!(f, "synced {number}"),
            Self::Removing(number) => write!(f, "removing {number}"),
            Self::Written(number) => write!(f, "written {number}"),
        }
    }
}

impl Progress {
    /// Reads one line; `None` for one that is not about progress.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (word, number) = line.trim().split_once(' ')?;
        let number = number.parse().ok()?;
        match word {
            "synced" => Some(Self::Synced(number)),
            "removing" => Some(Self::Removing(number)),
            "written" => Some(Self::Written(number)),
            _ => None,
        }
    }
}

/// The files that must be on a disk after a crash: everything synced whose removal had not begun.
#[must_use]
pub fn must_survive(progress: &[Progress]) -> BTreeSet<u64> {
    let mut files = BTreeSet::new();
    for step in progress {
        match step {
            Progress::Synced(number) => files.insert(*number),
            Progress::Removing(number) => files.remove(number),
            Progress::Written(_) => false,
        };
    }
    files
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_wrong_byte_a_short_file_and_a_missing_one_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = TestFile { seed: 7, number: 3 };
        let path = dir.path().join(file.name());
        assert!(file.check(dir.path()).is_err());

        let mut content = file.content();
        fs::write(&path, &content).unwrap();
        file.check(dir.path()).unwrap();
        fs::write(&path, &content[..content.len() - 1]).unwrap();
        assert!(file.check(dir.path()).is_err());
        let last = content.len() - 1;
        content[last] ^= 1;
        fs::write(&path, &content).unwrap();
        let error = file.check(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("byte {last}")), "{error}");
    }

    #[test]
    fn a_page_holds_its_block_and_no_other_and_one_wrong_byte_is_found() {
        let mut page = block_content(7);
        assert!(holds_block(&page, 7) && !holds_block(&page, 8));
        page[BLOCK - 1] ^= 1;
        assert!(!holds_block(&page, 7));
    }

    #[test]
    fn files_differ_and_come_in_many_sizes() {
        let sizes: BTreeSet<u64> = (0..100).map(|number| TestFile { seed: 1, number }.size()).collect();
        assert!(sizes.len() > 90);
        let content = |seed, number| TestFile { seed, number }.content();
        assert_ne!(content(1, 1)[..1], content(1, 2)[..1]);
        assert_eq!(content(1, 1), content(1, 1));
        assert_ne!(content(1, 1), content(2, 1));
    }

    #[test]
    fn what_was_synced_and_not_being_removed_must_survive() {
        use Progress::{Removing, Synced, Written};
        let steps = [Synced(1), Written(2), Synced(3), Removing(1), Synced(4)];
        assert_eq!(must_survive(&steps), BTreeSet::from([3, 4]));
        for step in steps {
            assert_eq!(Progress::parse(&step.to_string()), Some(step));
        }
        assert_eq!(Progress::parse("sh: not found"), None);
    }
}
