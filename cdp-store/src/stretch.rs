//! From closed chunks to index rows.
//!
//! Chunks that follow each other are written as one *stretch*. A row costs the index about as much for one change as for ten,
//! so the further it is behind, the less a change costs it: that is how it catches up with guests that write faster than it
//! can take small steps.

use std::sync::Arc;

use cdp_types::{BranchId, Ordinal, Seq, VolumeId};

use crate::chunk::{Chunk, ChunkEnd};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{Change, IndexBatch, LogPos, NodeKey, TimeIndex, Watermark};
use crate::pace::Pace;

/// One in so many leaves that get a row is looked at for whether it is due an image, and one in so many changes.
const LOOK_PER_ROWS: u64 = 16;
const LOOK_PER_CHANGES: u64 = 256;
/// Images at which the looks aim: more rows than this cost reads more than images cost space, and so many changes take as
/// many bytes as an image.
const IMAGE_AFTER_DELTAS: u32 = 16;
const IMAGE_AFTER_CHANGES: u32 = 256;

/// Nodes whose changes are gathered side by side: to go from one change of a node to the one before it takes a look into main
/// memory, and a processor can wait for several of those at once.
const NODES_AT_ONCE: usize = 8;
/// Leaves that are looked at together.
const LEAVES_AT_ONCE: usize = 16;
/// Bytes of images that are written together.
const IMAGES_BYTES: usize = 1 << 20;

/// Consecutive chunks of one log, at least one, and the batch with which the last one ends.
#[derive(Debug)]
pub struct Stretch<'a> {
    chunks: &'a [Arc<Chunk>],
    end: ChunkEnd,
}

impl<'a> Stretch<'a> {
    /// All of these; `None` if the last of them has no end yet, or there is none.
    #[must_use]
    pub fn new(chunks: &'a [Arc<Chunk>]) -> Option<Self> {
        Some(Self { chunks, end: chunks.last()?.end? })
    }

    /// Calls this with every node that changed, in the order of keys, and all its changes, oldest first.
    fn each_node(
        &self,
        pace: &mut Pace,
        mut call: impl FnMut(NodeKey, &[Change]) -> Result<()>,
    ) -> Result<()> {
        // Many small chunks gather while the index cannot be written: each is asked only for what it has.
        let each = self.chunks.iter().enumerate();
        let mut keys: Vec<(NodeKey, usize)> =
            each.flat_map(|(number, chunk)| chunk.nodes().map(move |node| (node, number))).collect();
        keys.sort_unstable();
        let of_nodes: Vec<_> = keys.chunk_by(|(a, _), (b, _)| a == b).collect();
        let mut changes: [Vec<Change>; NODES_AT_ONCE] = Default::default();
        for together in of_nodes.chunks(NODES_AT_ONCE) {
            pace.step();
            changes.iter_mut().for_each(Vec::clear);
            let newest_first = together.iter().map(|of_node| {
                of_node.iter().rev().flat_map(|&(node, chunk)| self.chunks[chunk].changes(node))
            });
            let mut left: Vec<_> = newest_first.zip(&mut changes).collect();
            while !left.is_empty() {
                left.retain_mut(|(rest, found)| rest.next().map(|change| found.push(*change)).is_some());
            }
            for (of_node, changes) in together.iter().zip(&mut changes) {
                changes.reverse();
                call(of_node[0].0, changes)?;
            }
        }
        Ok(())
    }

    /// Writes its rows and the watermark that covers them, all or none. Returns the leaves that are to be looked at.
    ///
    /// # Durability
    /// None before the next index flush, but possible at once: the stretch's part of the log must be durable.
    ///
    /// # Errors
    /// If the index cannot be written.
    pub fn write(&self, index: &TimeIndex, volume: VolumeId, pace: &mut Pace) -> Result<Vec<NodeKey>> {
        let mut batch = IndexBatch::new();
        let mut looks = Vec::new();
        let failed = |e| Error::new(ErrorKind::Io, "writing the time index").with(e);
        self.each_node(pace, |key, changes| {
            if key.level == 0 && is_sampled(key, self.end.ordinal, changes.len()) {
                looks.push(key);
            }
            batch.changes(key, changes).map_err(failed)
        })?;
        let times: Vec<_> = self.chunks.iter().flat_map(|chunk| &chunk.times).collect();
        let mut entries = Vec::new();
        for of_branch in times.chunk_by(|(a, _), (b, _)| a == b) {
            entries.clear();
            entries.extend(of_branch.iter().map(|(_, entry)| *entry));
            batch.times(of_branch[0].0, &entries).map_err(failed)?;
        }
        let ChunkEnd { ordinal, seq, crc, place, time_ns } = self.end;
        if let Some(pos) = LogPos::new(place.incarnation, place.offset) {
            batch.watermark(volume, &Watermark { ordinal, seq, pos, header_crc: crc, time_ns });
        }
        index.write(&batch).map_err(failed)?;
        Ok(looks)
    }

    /// Writes images of those of these leaves that are due one, so that no leaf's chain of deltas grows for ever.
    ///
    /// # Errors
    /// If the index cannot be read or written.
    pub fn write_images(&self, index: &TimeIndex, leaves: &[NodeKey], pace: &mut Pace) -> Result<()> {
        let failed = |e| Error::new(ErrorKind::Io, "writing images into the time index").with(e);
        let mut batch = IndexBatch::new();
        let seq = self.seq();
        let of_branches = leaves.chunk_by(|a, b| a.branch == b.branch);
        for keys in of_branches.flat_map(|of_branch| of_branch.chunks(LEAVES_AT_ONCE)) {
            pace.step();
            let (branch, nodes) = (keys[0].branch, keys.iter().map(|key| key.node).collect::<Vec<_>>());
            let found = index.leaves_at(branch, &nodes, seq).map_err(failed)?;
            for (node, found) in nodes.into_iter().zip(found) {
                if found.deltas_since_image >= IMAGE_AFTER_DELTAS
                    || found.changes_since_image >= IMAGE_AFTER_CHANGES
                {
                    batch.image(branch, node, seq, &found.states);
                }
            }
            // Each image is true by itself.
            if batch.size_bytes() >= IMAGES_BYTES {
                index.write(&batch).map_err(failed)?;
                batch.clear();
            }
        }
        if batch.is_empty() { Ok(()) } else { index.write(&batch).map_err(failed) }
    }

    /// The last `Seq` in it.
    #[must_use]
    pub fn seq(&self) -> Seq {
        self.end.seq
    }
}

/// Whether a leaf that got so many changes is looked at. Leaves are chosen by their number and the ordinal together, so that
/// each gets its turn; not by their low bits alone, since either may be a multiple of a power of two.
fn is_sampled(key: NodeKey, ordinal: Ordinal, changes: usize) -> bool {
    let BranchId(branch) = key.branch;
    let mixed =
        (key.node ^ branch.rotate_left(32) ^ ordinal.0.rotate_left(17)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let share = (LOOK_PER_CHANGES / LOOK_PER_ROWS).max(changes as u64);
    (mixed >> 32) % LOOK_PER_CHANGES < share
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::format::BatchPlace;
    use crate::index::{BlockState, ChangeState, FANOUT, Place, SimKv};

    const BRANCH: BranchId = BranchId(3);

    fn leaf(node: u64) -> NodeKey {
        NodeKey { branch: BRANCH, level: 0, node }
    }

    /// Chunks of single-block writes to a few leaves; `Seq` n is the n-th write.
    fn chunks(rng: &mut SmallRng, count: usize, writes: u64) -> Vec<Arc<Chunk>> {
        let mut seq = Seq::ZERO;
        let mut chunk = |ordinal| {
            let mut chunk = Chunk::default();
            for _ in 0..writes {
                seq = seq.plus(1);
                let pos = LogPos::new(1, seq.0 << 12).unwrap();
                let state = ChangeState::Mapped(Place { pos, crc: seq.0 as u32 });
                let first = rng.random_range(0..4) * 100;
                chunk.push(leaf(rng.random_range(0..3)), Change { seq, first, count: 1, state });
            }
            let place = BatchPlace { incarnation: 1, offset: ordinal << 12 };
            let ordinal = Ordinal(ordinal);
            chunk.end = Some(ChunkEnd { ordinal, seq, crc: 7, place, time_ns: seq.0 });
            Arc::new(chunk)
        };
        (1..=count as u64).map(&mut chunk).collect()
    }

    /// What the chunks make of a leaf's blocks: the `Seq` of the last write to each up to `at`, zero if there is none.
    fn expected(chunks: &[Arc<Chunk>], node: u64, at: u64) -> Vec<u64> {
        let mut blocks = vec![0; FANOUT];
        let changes = chunks.iter().flat_map(|chunk| chunk.changes(leaf(node)));
        for change in changes.filter(|change| change.seq.0 <= at) {
            let newest = &mut blocks[usize::from(change.first)];
            *newest = change.seq.0.max(*newest);
        }
        blocks
    }

    fn index() -> TimeIndex {
        TimeIndex::new(Arc::new(SimKv::new()))
    }

    /// Writes a stretch, and images of all leaves that it wants looked at; returns how many those are.
    fn write(index: &TimeIndex, chunks: &[Arc<Chunk>]) -> usize {
        let stretch = Stretch::new(chunks).unwrap();
        let looks = stretch.write(index, VolumeId(1), &mut Pace::hurried()).unwrap();
        stretch.write_images(index, &looks, &mut Pace::hurried()).unwrap();
        looks.len()
    }

    #[test]
    fn a_stretch_of_many_chunks_reads_as_its_chunks_one_by_one_do_at_every_instant() {
        let chunks = chunks(&mut SmallRng::seed_from_u64(1), 5, 40);
        assert_eq!(chunks.iter().map(|chunk| chunk.len()).sum::<usize>(), 200);
        let (one, single) = (index(), index());
        write(&one, &chunks);
        for chunk in chunks.chunks(1) {
            write(&single, chunk);
        }
        for (index, at) in [&one, &single].into_iter().flat_map(|index| (0..=200).map(move |at| (index, at)))
        {
            for node in 0..3 {
                let found = index.leaf_at(BRANCH, node, Seq(at)).unwrap().states;
                // Places tell which write a block is of.
                let seq_of = |state: &BlockState| match state {
                    BlockState::Mapped(place) => u64::from(place.crc),
                    BlockState::Zero | BlockState::Unsaid => 0,
                };
                let found: Vec<u64> = found.iter().map(seq_of).collect();
                assert_eq!(found, expected(&chunks, node, at), "leaf {node} at {at}");
            }
        }
        let mark = one.watermark(VolumeId(1)).unwrap();
        assert_eq!(mark, single.watermark(VolumeId(1)).unwrap());
        assert_eq!(mark.map(|mark| (mark.ordinal, mark.seq)), Some((Ordinal(5), Seq(200))));
    }

    #[test]
    fn a_leaf_that_changes_much_gets_an_image_at_once_and_others_in_turn() {
        let mut rng = SmallRng::seed_from_u64(2);
        let much = chunks(&mut rng, 1, 3 * u64::from(IMAGE_AFTER_CHANGES) + 200);
        let hot = index();
        assert_eq!(write(&hot, &much), 3);
        let found = hot.leaf_at(BRANCH, 1, Seq(u64::MAX)).unwrap();
        assert_eq!((found.deltas_since_image, found.changes_since_image), (0, 0));

        let little = index();
        let looks: usize = chunks(&mut rng, 400, 6).chunks(1).map(|chunk| write(&little, chunk)).sum();
        assert!((20..200).contains(&looks), "{looks} looks");
        for node in 0..3 {
            let found = little.leaf_at(BRANCH, node, Seq(u64::MAX)).unwrap();
            assert!(found.deltas_since_image < 150, "{} deltas", found.deltas_since_image);
        }
    }

    #[test]
    fn many_changes_of_a_leaf_are_several_rows_and_no_request_is_split() {
        let mut chunk = Chunk::default();
        for block in 0..4000u16 {
            // Requests of 300 blocks, which no row's length is a multiple of.
            let seq = Seq(1 + u64::from(block) / 300);
            let state = ChangeState::Zero;
            chunk.push(leaf(0), Change { seq, first: block % FANOUT as u16, count: 1, state });
        }
        let place = BatchPlace { incarnation: 1, offset: 4096 };
        chunk.end = Some(ChunkEnd { ordinal: Ordinal(1), seq: Seq(14), crc: 0, place, time_ns: 0 });
        let index = index();
        let chunks = [Arc::new(chunk)];
        Stretch::new(&chunks).unwrap().write(&index, VolumeId(1), &mut Pace::hurried()).unwrap();
        let found = index.leaf_at(BRANCH, 0, Seq(14)).unwrap();
        assert_eq!((found.deltas_since_image, found.changes_since_image), (4, 4000));
        let found = index.leaf_at(BRANCH, 0, Seq(1)).unwrap();
        let zeroes = found.states.iter().filter(|state| **state == BlockState::Zero).count();
        assert_eq!((zeroes, found.changes_since_image), (300, 300));
    }
}
