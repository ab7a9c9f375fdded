//! Whether the time index says of a volume's head what its log says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cdp_types::{BlockRange, Ordinal};

use super::inspect::{Finding, VerifyReport};
use crate::error::Result;
use crate::format::{BatchHeader, RecordKind};
use crate::index::{BlockState, FANOUT, LogPos, Place, unsaid};
use crate::map::Leaf;
use crate::volume::{Head, Volume};

/// Leaves that one walk of the log's headers compares: 16 GiB of disk, 64 MiB of memory.
const LEAVES_PER_WALK: u64 = 8192;

/// Replays the log's headers up to `head` in memory and compares where they place every block with where the index does;
/// as many walks as the written parts of the volume need.
///
/// # Errors
/// If the log or the index cannot be read. Differences are findings.
pub(super) fn compare_with_log(volume: &Arc<Volume>, head: Head, report: &mut VerifyReport) -> Result<()> {
    let leaves = volume.row().size_bytes.div_ceil(FANOUT as u64 * cdp_types::BLOCK_SIZE);
    let mut windows: BTreeSet<u64> = BTreeSet::new();
    volume.each_batch(Ordinal(0), &mut |batch| {
        for record in batch.header.records.iter().filter(|r| r.kind.has_payload() && r.count > 0) {
            let window = FANOUT as u64 * LEAVES_PER_WALK;
            windows.extend(record.first / window..=(record.first + record.count - 1) / window);
        }
        batch.header.ordinal < head.ordinal
    })?;
    for window in windows {
        let first = window * LEAVES_PER_WALK;
        let leaves = first..(first + LEAVES_PER_WALK).min(leaves);
        let mut replay = Replay { leaves, found: BTreeMap::new() };
        volume.each_batch(Ordinal(0), &mut |batch| {
            replay.apply(&batch.header, batch.payload_at);
            batch.header.ordinal < head.ordinal
        })?;
        for (leaf, expected) in replay.found {
            let stored = volume.leaf_at(volume.row().branch, leaf, head.seq)?;
            compare_leaf(volume, leaf, &expected, &stored, report);
        }
    }
    Ok(())
}

fn compare_leaf(volume: &Volume, leaf: u64, expected: &Leaf, stored: &Leaf, report: &mut VerifyReport) {
    report.blocks_compared += expected.iter().filter(|s| !matches!(s, BlockState::Unsaid)).count() as u64;
    let differs = |(a, b): (&BlockState, &BlockState)| !matches!(a, BlockState::Unsaid) && a != b;
    if let Some(index) = expected.iter().zip(stored.iter()).position(differs) {
        let block = leaf * FANOUT as u64 + index as u64;
        let what = format!(
            "block {block}: the log says {:?}, the index {:?}; run rebuild-index",
            expected[index], stored[index]
        );
        let file = super::open::INDEX_DIRECTORY.to_owned();
        report.findings.push(Finding { volume: volume.id(), file, offset: 0, what });
    }
}

struct Replay {
    leaves: std::ops::Range<u64>,
    found: BTreeMap<u64, Leaf>,
}

impl Replay {
    fn apply(&mut self, header: &BatchHeader, payload_at: u64) {
        let mut at = payload_at;
        let mut crcs = header.block_crcs.iter();
        for record in &header.records {
            let blocks = BlockRange::new(record.first, record.count);
            match record.kind {
                RecordKind::Write => {
                    for (block, &crc) in (blocks.first..blocks.end()).zip(crcs.by_ref()) {
                        if let Some(pos) = LogPos::new(header.place.incarnation, at) {
                            self.set(block, BlockState::Mapped(Place { pos, crc }));
                        }
                        at += cdp_types::BLOCK_SIZE;
                    }
                }
                RecordKind::Zero | RecordKind::Discard => self.clear(blocks),
                _ => {}
            }
        }
    }

    fn set(&mut self, block: u64, state: BlockState) {
        let leaf = block / FANOUT as u64;
        if self.leaves.contains(&leaf) {
            self.found.entry(leaf).or_insert_with(unsaid)[(block % FANOUT as u64) as usize] = state;
        }
    }

    /// Only leaves that were written before are compared, so only they need to be told.
    fn clear(&mut self, blocks: BlockRange) {
        if blocks.is_empty() {
            return;
        }
        let fanout = FANOUT as u64;
        for (&leaf, states) in self.found.range_mut(blocks.first / fanout..=(blocks.end() - 1) / fanout) {
            let from = blocks.first.saturating_sub(leaf * fanout).min(fanout) as usize;
            let to = (blocks.end() - leaf * fanout).min(fanout) as usize;
            states[from..to].fill(BlockState::Zero);
        }
    }
}
