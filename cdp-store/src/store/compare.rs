//! Whether the time index says of a volume's branches what its log says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cdp_types::{BlockRange, BranchId, Ordinal};

use super::inspect::{Finding, VerifyReport};
use crate::catalogue::{BranchState, Catalogue};
use crate::error::Result;
use crate::format::{BatchHeader, RecordKind};
use crate::index::{BlockState, FANOUT, LogPos, Place, unsaid};
use crate::leaves::Leaf;
use crate::lineage::{At, Branch};
use crate::log::BatchAt;
use crate::volume::{Head, Volume};

/// Leaves that one walk of the log's headers compares: 16 GiB of disk, 64 MiB of memory.
const LEAVES_PER_WALK: usize = 8192;

/// Replays the log's headers up to `head` in memory and compares where they place every block with where the index does;
/// as many walks as the written parts of its branches need.
///
/// # Errors
/// If the log or the index cannot be read. Differences are findings.
pub(super) fn compare_with_log(
    volume: &Arc<Volume>,
    head: Head,
    catalogue: &Catalogue,
    report: &mut VerifyReport,
) -> Result<()> {
    Written::up_to(volume, head, catalogue)?.compare(volume, head, report)
}

/// What of a volume is compared.
pub(super) struct Written {
    leaves: Vec<(BranchId, u64)>,
    /// Held: of what is deleted from here on, nothing leaves the index before it was compared.
    _branches: BTreeMap<BranchId, Arc<Branch>>,
}

impl Written {
    /// All leaves that the log has writes to, of branches whose rows the index must have.
    pub(super) fn up_to(volume: &Arc<Volume>, head: Head, catalogue: &Catalogue) -> Result<Self> {
        let mut written: BTreeSet<(BranchId, u64)> = BTreeSet::new();
        each_batch_up_to(volume, head, &mut |batch| {
            for record in batch.header.records.iter().filter(|r| r.kind.has_payload() && r.count > 0) {
                let leaves = record.first / FANOUT as u64..=(record.first + record.count - 1) / FANOUT as u64;
                written.extend(leaves.map(|leaf| (batch.header.branch, leaf)));
            }
        })?;
        // What was deleted is not in the index any more, or, if that was interrupted, not wholly.
        let is_going = |branch: &BranchId| {
            let row = catalogue.branches.get(branch);
            row.is_some_and(|row| row.state == BranchState::Deleted) && !catalogue.is_needed(*branch)
        };
        let named: BTreeSet<BranchId> = written.iter().map(|(branch, _)| *branch).collect();
        let there = named.into_iter().filter(|branch| !is_going(branch));
        let branches: BTreeMap<BranchId, Arc<Branch>> =
            there.filter_map(|branch| Some((branch, volume.shared().branches.get(branch)?))).collect();
        written.retain(|(branch, _)| branches.contains_key(branch));
        Ok(Self { leaves: written.into_iter().collect(), _branches: branches })
    }

    /// See [`compare_with_log`].
    pub(super) fn compare(&self, volume: &Arc<Volume>, head: Head, report: &mut VerifyReport) -> Result<()> {
        let shared = volume.shared();
        // Behind damage nothing is read, and the log says nothing either.
        let seq = volume.whole_upto().map_or(head.seq, |last| last.min(head.seq));
        for leaves in self.leaves.chunks(LEAVES_PER_WALK) {
            let mut replay = Replay { found: leaves.iter().map(|key| (*key, unsaid())).collect() };
            each_batch_up_to(volume, head, &mut |batch| replay.apply(&batch.header, batch.payload_at))?;
            for ((branch, leaf), expected) in replay.found {
                let (lineage, at) = (shared.lineage(), At { branch, seq });
                let stored = [lineage.own_leaf_of_history(at, leaf)?, lineage.own_leaf_at(at, leaf)?];
                compare_leaf(volume, leaf, &expected, &stored, report);
            }
        }
        Ok(())
    }
}

/// Calls `visit` with every batch of the log up to `head`, which may be before the first one.
fn each_batch_up_to(volume: &Volume, head: Head, visit: &mut dyn FnMut(&BatchAt)) -> Result<()> {
    volume.each_batch(Ordinal(0), &mut |batch| {
        if batch.header.ordinal <= head.ordinal {
            visit(batch);
        }
        batch.header.ordinal < head.ordinal
    })
}

/// Compares a leaf with what the index has of it, in both places where it may have something.
fn compare_leaf(volume: &Volume, leaf: u64, expected: &Leaf, stored: &[Leaf; 2], report: &mut VerifyReport) {
    report.blocks_compared += expected.iter().filter(|s| !matches!(s, BlockState::Unsaid)).count() as u64;
    let differs = |(a, b): (&BlockState, &BlockState)| !matches!(a, BlockState::Unsaid) && a != b;
    let found = stored.iter().find_map(|stored| {
        let index = expected.iter().zip(stored.iter()).position(differs)?;
        Some((stored, index))
    });
    if let Some((stored, index)) = found {
        let block = leaf * FANOUT as u64 + index as u64;
        let what = format!(
            "block {block}: the log says {:?}, the index {:?}; run rebuild-index",
            expected[index], stored[index]
        );
        let file = super::open::INDEX_DIRECTORY.to_owned();
        report.findings.push(Finding { volume: volume.id(), file, offset: 0, what });
    }
}

/// What the log says of some leaves, each of one branch.
struct Replay {
    found: BTreeMap<(BranchId, u64), Leaf>,
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
                            self.set(header.branch, block, BlockState::Mapped(Place { pos, crc }));
                        }
                        at += cdp_types::BLOCK_SIZE;
                    }
                }
                RecordKind::Zero | RecordKind::Discard => self.clear(header.branch, blocks),
                _ => {}
            }
        }
    }

    fn set(&mut self, branch: BranchId, block: u64, state: BlockState) {
        if let Some(states) = self.found.get_mut(&(branch, block / FANOUT as u64)) {
            states[(block % FANOUT as u64) as usize] = state;
        }
    }

    /// Only leaves that were written are compared, so only they need to be told.
    fn clear(&mut self, branch: BranchId, blocks: BlockRange) {
        if blocks.is_empty() {
            return;
        }
        let fanout = FANOUT as u64;
        let leaves = (branch, blocks.first / fanout)..=(branch, (blocks.end() - 1) / fanout);
        for (&(_, leaf), states) in self.found.range_mut(leaves) {
            let from = blocks.first.saturating_sub(leaf * fanout).min(fanout) as usize;
            let to = (blocks.end() - leaf * fanout).min(fanout) as usize;
            states[from..to].fill(BlockState::Zero);
        }
    }
}
