//! What is known of a volume's blocks at an instant, and what has changed between two.

use cdp_types::{BlockRange, Seq};

use super::{ExtentInfo, ExtentState, Resolved, Volume};
use crate::error::Result;
use crate::index::{BlockState, FANOUT, LogPos};
use crate::leaves::Leaf;
use crate::lineage::At;

/// Blocks that have, or have not, changed between two instants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRun {
    /// Which.
    pub blocks: BlockRange,
    /// Whether anything was written to them.
    pub changed: bool,
}

/// Part of one leaf, with its states at each of the instants asked for; or a stretch of leaves of which nothing was
/// ever said.
type Visitor<'a> = dyn FnMut(BlockRange, Option<&[Leaf]>) -> bool + 'a;

impl Volume {
    /// All blocks that the volume has.
    #[must_use]
    pub fn blocks(&self) -> BlockRange {
        BlockRange::new(0, self.geometry().0.div_ceil(cdp_types::BLOCK_SIZE))
    }

    /// The present, which moves: an instant that takes in whatever is acknowledged by the time it is read.
    #[must_use]
    pub fn present(&self) -> Resolved {
        let head = self.head();
        Resolved { branch: self.row().branch, seq: Seq::MAX, time_ns: head.time_ns }
    }

    /// Calls `visit` with what is known of blocks at an instant, in order, in the longest runs, until it says no.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn extents(
        &self,
        at: Resolved,
        blocks: BlockRange,
        visit: &mut dyn FnMut(ExtentInfo) -> bool,
    ) -> Result<()> {
        let mut run: Option<ExtentInfo> = None;
        let mut wanted = true;
        self.each_leaf(&[at], blocks, &mut |part, states| {
            let mut add = |first_block, block_count, state| {
                let one = ExtentInfo { first_block, block_count, state };
                match &mut run {
                    Some(last) if continues(last, &one) => last.block_count += block_count,
                    other => wanted = other.replace(one).is_none_or(&mut *visit),
                }
                wanted
            };
            match states {
                None => add(part.first, part.count, ExtentState::Unsaid),
                Some(leaves) => (part.first..part.end())
                    .all(|block| add(block, 1, extent_state(leaves[0][(block % FANOUT as u64) as usize]))),
            }
        })?;
        if let Some(run) = run.filter(|_| wanted) {
            visit(run);
        }
        Ok(())
    }

    /// Calls `visit` with runs of blocks that were, and were not, written between two instants, in order, until it says
    /// no. Blocks written with what they held already count as changed; zeroing what was never written does not.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn changes(
        &self,
        from: Resolved,
        to: Resolved,
        blocks: BlockRange,
        visit: &mut dyn FnMut(ChangedRun) -> bool,
    ) -> Result<()> {
        let mut run: Option<ChangedRun> = None;
        let mut wanted = true;
        self.each_leaf(&[from, to], blocks, &mut |part, states| {
            let mut add = |blocks: BlockRange, changed| {
                match &mut run {
                    Some(last) if last.changed == changed => last.blocks.count += blocks.count,
                    other => wanted = other.replace(ChangedRun { blocks, changed }).is_none_or(&mut *visit),
                }
                wanted
            };
            match states {
                None => add(part, false),
                Some(leaves) => (part.first..part.end()).all(|block| {
                    let [before, after] = [0, 1].map(|i| leaves[i][(block % FANOUT as u64) as usize]);
                    add(BlockRange::new(block, 1), differs(before, after))
                }),
            }
        })?;
        if let Some(run) = run.filter(|_| wanted) {
            visit(run);
        }
        Ok(())
    }

    fn each_leaf(&self, instants: &[Resolved], blocks: BlockRange, visit: &mut Visitor<'_>) -> Result<()> {
        let lineage = self.shared().lineage();
        let places: Vec<At> = instants.iter().map(|at| At { branch: at.branch, seq: at.seq }).collect();
        let said = lineage.said(places.iter().flat_map(|place| lineage.branches.line(*place)));
        let fanout = FANOUT as u64;
        let end = blocks.end();
        let mut at = blocks.first;
        while at < end {
            let leaf = at / fanout;
            let until = said.next(leaf)?.map_or(end, |next| (next * fanout).clamp(at, end));
            let (part, leaves) = if until > at {
                (BlockRange::new(at, until - at), None)
            } else {
                let leaves =
                    places.iter().map(|place| lineage.leaf_at(*place, leaf)).collect::<Result<Vec<_>>>()?;
                (BlockRange::new(at, ((leaf + 1) * fanout).min(end) - at), Some(leaves))
            };
            if !visit(part, leaves.as_deref()) {
                return Ok(());
            }
            at = part.end();
        }
        Ok(())
    }
}

fn extent_state(state: BlockState) -> ExtentState {
    match state {
        BlockState::Unsaid => ExtentState::Unsaid,
        BlockState::Zero => ExtentState::Zero,
        BlockState::Mapped(place) => mapped(place.pos),
    }
}

fn mapped(pos: LogPos) -> ExtentState {
    ExtentState::Mapped { segment: pos.incarnation(), offset: pos.offset_bytes() }
}

fn continues(last: &ExtentInfo, one: &ExtentInfo) -> bool {
    match (last.state, one.state) {
        (ExtentState::Mapped { segment: a, offset: x }, ExtentState::Mapped { segment: b, offset: y }) => {
            a == b && y == x + last.block_count * cdp_types::BLOCK_SIZE
        }
        (a, b) => a == b,
    }
}

/// Whether a block's states differ in what is read.
fn differs(before: BlockState, after: BlockState) -> bool {
    let holds_data = |state| matches!(state, BlockState::Mapped(_));
    before != after && (holds_data(before) || holds_data(after))
}
