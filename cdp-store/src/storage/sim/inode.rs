//! One file: what readers see, what a power cut leaves, and the writes between the two.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use rand::Rng;
use rand::rngs::SmallRng;

use super::SECTOR;
use super::content::Content;

/// Bytes and their place in a file.
#[derive(Clone)]
pub(super) struct Write {
    pub(super) offset: u64,
    pub(super) bytes: Arc<[u8]>,
}

impl Write {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }

    /// The part of it in a range of its bytes.
    pub(super) fn part(&self, range: Range<usize>) -> Self {
        Self { offset: self.offset + range.start as u64, bytes: self.bytes[range].into() }
    }

    /// What is left of it when it is torn: some of its sectors, at random.
    pub(super) fn tear(&self, rng: &mut SmallRng) -> Vec<Self> {
        self.tear_into(SECTOR as u64, rng)
    }

    /// Some of the units of the disk that it covers, at random.
    pub(super) fn tear_into(&self, unit: u64, rng: &mut SmallRng) -> Vec<Self> {
        let first = self.offset / unit;
        let units = self.end().div_ceil(unit) - first;
        // Half of the time it simply stops somewhere; otherwise units are missing anywhere.
        let reached = if rng.random() { rng.random_range(0..=units) } else { units };
        let sieve = reached == units;
        let mut parts: Vec<Range<usize>> = Vec::new();
        for number in (0..reached).filter(|_| !sieve || rng.random()).collect::<Vec<_>>() {
            let start = ((first + number) * unit).max(self.offset) - self.offset;
            let end = ((first + number + 1) * unit).min(self.end()) - self.offset;
            let range = start as usize..end as usize;
            match parts.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => parts.push(range),
            }
        }
        parts.into_iter().map(|range| self.part(range)).collect()
    }
}

/// A write that was executed and is not known to be durable.
#[derive(Clone)]
struct Unsynced {
    /// When it was executed, in the order of all executions.
    order: u64,
    write: Write,
}

/// What a power cut does to unsynced writes. It is drawn once per cut: independent draws for each write would hardly
/// ever keep, or drop, all of many.
#[derive(Clone, Copy)]
pub(super) struct Severity {
    keep: f64,
    tear: f64,
    destroy: f64,
}

impl Severity {
    pub(super) fn draw(rng: &mut SmallRng) -> Self {
        let mut pick = |from: &[f64]| from[rng.random_range(0..from.len())];
        Self {
            keep: pick(&[0.0, 0.1, 0.5, 0.9, 1.0]),
            tear: pick(&[0.0, 0.5, 1.0]),
            destroy: pick(&[0.0, 0.25, 0.75]),
        }
    }
}

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub(super) volatile: Content,
    durable: Content,
    /// In the order of their execution.
    unsynced: Vec<Unsynced>,
}

impl Inode {
    pub(super) fn execute(&mut self, order: u64, write: Write) {
        self.volatile.write(write.offset, &write.bytes);
        self.unsynced.push(Unsynced { order, write });
    }

    /// A successful sync of what was executed before `order`.
    pub(super) fn sync(&mut self, order: u64) {
        for write in self.take_before(order) {
            self.durable.write(write.offset, &write.bytes);
        }
    }

    /// A failed sync: each write that it covered has reached the disk, or in part, or never will.
    pub(super) fn fail_sync(&mut self, order: u64, rng: &mut SmallRng) {
        for write in self.take_before(order) {
            match rng.random_range(0..3) {
                0 => self.durable.write(write.offset, &write.bytes),
                1 => {
                    for part in write.tear(rng) {
                        self.durable.write(part.offset, &part.bytes);
                    }
                }
                _ => {}
            }
        }
    }

    fn take_before(&mut self, order: u64) -> Vec<Write> {
        let count = self.unsynced.partition_point(|unsynced| unsynced.order < order);
        self.unsynced.drain(..count).map(|unsynced| unsynced.write).collect()
    }

    /// Leaves what a power cut leaves.
    pub(super) fn cut_power(&mut self, severity: Severity, physical_block: u64, rng: &mut SmallRng) {
        let mut destroyed = BTreeSet::new();
        for Write { offset, bytes } in self.take_before(u64::MAX) {
            let write = Write { offset, bytes };
            if rng.random_bool(severity.keep) {
                self.durable.write(write.offset, &write.bytes);
            } else if rng.random_bool(severity.tear) {
                for part in write.tear(rng) {
                    self.durable.write(part.offset, &part.bytes);
                }
                // The file system may have recorded the new length already.
                if rng.random() {
                    self.durable.grow(write.end());
                }
                let blocks = write.offset / physical_block..write.end().div_ceil(physical_block);
                destroyed.extend(blocks.filter(|_| rng.random_bool(severity.destroy)));
            }
        }
        for block in destroyed {
            let start = block * physical_block;
            let len = physical_block.min(self.durable.len().saturating_sub(start));
            let mut garbage = vec![0; len as usize];
            rng.fill(&mut garbage[..]);
            self.durable.write(start, &garbage);
        }
        self.volatile = self.durable.clone();
    }

    pub(super) fn flip_bit(&mut self, offset: u64, bit: u8) {
        self.volatile.flip_bit(offset, bit);
        self.durable.flip_bit(offset, bit);
        for Unsynced { write, .. } in &mut self.unsynced {
            if (write.offset..write.end()).contains(&offset) {
                let mut bytes = write.bytes.to_vec();
                bytes[(offset - write.offset) as usize] ^= 1 << bit;
                write.bytes = bytes.into();
            }
        }
    }
}
