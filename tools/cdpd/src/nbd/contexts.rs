//! What is known of an export's bytes: what is allocated, and what has changed.

use std::sync::Arc;

use cdp_store::{ExtentState, Resolved, Volume};
use cdp_types::{BlockDevice, BlockRange, ByteRange, IoError};
use nbd_export::{STATE_DIRTY, STATE_HOLE, STATE_ZERO, StatusContext, StatusExtent};

/// `base:allocation`.
pub(super) struct Allocation {
    name: String,
    volume: Arc<Volume>,
    at: Option<Resolved>,
}

impl Allocation {
    /// Of a volume at an instant, or of its moving present.
    pub(super) fn new(name: &str, volume: &Arc<Volume>, at: Option<Resolved>) -> Self {
        Self { name: name.to_owned(), volume: Arc::clone(volume), at }
    }
}

impl StatusContext for Allocation {
    fn name(&self) -> &str {
        &self.name
    }

    fn extents(&self, range: ByteRange, max: usize, out: &mut Vec<StatusExtent>) -> Result<(), IoError> {
        let mut runs = Runs::new(range, max, out);
        let at = self.at.unwrap_or_else(|| self.volume.present());
        let walked = self.volume.extents(at, range.touched_blocks(), &mut |extent| {
            let flags = match extent.state {
                ExtentState::Mapped { .. } => 0,
                // Zeroes take no space, whether they were written or never spoken of.
                ExtentState::Zero | ExtentState::Unsaid => STATE_HOLE | STATE_ZERO,
            };
            runs.add(BlockRange::new(extent.first_block, extent.block_count), flags)
        });
        walked.map_err(|e| e.to_io())
    }
}

/// `qemu:dirty-bitmap:since@INSTANT`.
pub(super) struct Changes {
    name: String,
    volume: Arc<Volume>,
    from: Resolved,
    /// Keeps the history that `from` lies in.
    _held: Arc<dyn BlockDevice>,
    to: Option<Resolved>,
}

impl Changes {
    /// From an instant, which is held open, to another, or to the moving present.
    pub(super) fn new(
        name: &str,
        volume: &Arc<Volume>,
        (from, held): (Resolved, Arc<dyn BlockDevice>),
        to: Option<Resolved>,
    ) -> Self {
        Self { name: name.to_owned(), volume: Arc::clone(volume), from, _held: held, to }
    }
}

impl StatusContext for Changes {
    fn name(&self) -> &str {
        &self.name
    }

    fn extents(&self, range: ByteRange, max: usize, out: &mut Vec<StatusExtent>) -> Result<(), IoError> {
        let mut runs = Runs::new(range, max, out);
        let to = self.to.unwrap_or_else(|| self.volume.present());
        let walked = self.volume.changes(self.from, to, range.touched_blocks(), &mut |run| {
            runs.add(run.blocks, if run.changed { STATE_DIRTY } else { 0 })
        });
        walked.map_err(|e| e.to_io())
    }
}

/// Makes extents of bytes out of runs of blocks, joining those of the same status.
struct Runs<'a> {
    range: ByteRange,
    max: usize,
    out: &'a mut Vec<StatusExtent>,
    added: usize,
}

impl<'a> Runs<'a> {
    fn new(range: ByteRange, max: usize, out: &'a mut Vec<StatusExtent>) -> Self {
        Self { range, max, out, added: 0 }
    }

    /// Adds a run; says whether there is room for another.
    fn add(&mut self, blocks: BlockRange, flags: u64) -> bool {
        let bytes = blocks.bytes();
        let (from, to) = (bytes.offset.max(self.range.offset), bytes.end().min(self.range.end()));
        let len_bytes = to.saturating_sub(from);
        if len_bytes == 0 {
            return true;
        }
        if let Some(last) = self.out.last_mut().filter(|last| self.added > 0 && last.flags == flags) {
            last.len_bytes += len_bytes;
            return true;
        }
        if self.added == self.max {
            return false;
        }
        self.out.push(StatusExtent { len_bytes, flags });
        self.added += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_clipped_to_what_was_asked_for() {
        let mut out = vec![StatusExtent { len_bytes: 1, flags: 3 }];
        let mut runs = Runs::new(ByteRange::new(512, 12288), 2, &mut out);
        assert!(runs.add(BlockRange::new(0, 1), 3));
        assert!(runs.add(BlockRange::new(1, 1), 3));
        assert!(runs.add(BlockRange::new(2, 1), 0));
        assert!(!runs.add(BlockRange::new(3, 1), 3), "a third extent was not asked for");
        let expected = [(1, 3), (7680, 3), (4096, 0)];
        assert_eq!(out, expected.map(|(len_bytes, flags)| StatusExtent { len_bytes, flags }));
    }
}
