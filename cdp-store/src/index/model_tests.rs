//! The time index against a plain list of everything that ever happened.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use cdp_types::{BlockRange, Ordinal};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const VOLUME: VolumeId = VolumeId(7);
const BRANCHES: [BranchId; 2] = [BranchId(3), BranchId(4)];

/// Blocks around the borders of nodes of every level, where mistakes live.
fn some_block(rng: &mut SmallRng) -> u64 {
    let border = [0, 512, 1024, 1 << 18, 1 << 27, 1 << 36][rng.random_range(0..6)];
    (border + rng.random_range(0..1200u64)).saturating_sub(600)
}

fn some_leaf(rng: &mut SmallRng) -> u64 {
    some_block(rng) / FANOUT as u64
}

#[derive(Clone, Debug)]
struct Event {
    branch: BranchId,
    seq: Seq,
    range: BlockRange,
    state: ChangeState,
}

/// One index write: what it added, and the watermark it carries.
#[derive(Clone, Default)]
struct Write {
    batch: IndexBatch,
    events: Vec<Event>,
    times: Vec<(BranchId, TimeEntry)>,
    mark: Option<Watermark>,
}

struct Model {
    rng: SmallRng,
    /// All that is written, in the order of the log.
    writes: Vec<Write>,
    events: Vec<Event>,
    seq: Seq,
    time_ns: u64,
}

impl Model {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self {
            rng: SmallRng::seed_from_u64(seed),
            writes: Vec::new(),
            events: Vec::new(),
            seq: Seq(1 << 40),
            time_ns: 1_700_000_000_000_000_000,
        }
    }

    fn leaf(&self, branch: BranchId, leaf: u64, at: Seq) -> Box<[BlockState; FANOUT]> {
        let mut states = unsaid();
        let start = leaf * FANOUT as u64;
        let own = self.events.iter().filter(|event| event.branch == branch && event.seq <= at);
        for event in own {
            let first = event.range.first.clamp(start, start + FANOUT as u64) - start;
            let end = event.range.end().clamp(start, start + FANOUT as u64) - start;
            states[first as usize..end as usize].fill(match event.state {
                ChangeState::Zero => BlockState::Zero,
                ChangeState::Mapped(place) => BlockState::Mapped(place),
            });
        }
        states
    }

    /// A request, or one more block of the last one, which then has its `Seq`.
    fn event(&mut self, last: Option<&Event>) -> Event {
        if let Some(Event { branch, seq, range, state: ChangeState::Mapped(place) }) = last
            && self.rng.random_bool(0.3)
        {
            let state = ChangeState::Mapped(Place { crc: self.rng.random(), ..*place });
            return Event { branch: *branch, seq: *seq, range: BlockRange::new(range.end(), 1), state };
        }
        self.seq = self.seq.plus(self.rng.random_range(1..4));
        let first = some_block(&mut self.rng);
        let (range, state) = if self.rng.random_bool(0.7) {
            let pos =
                LogPos::new(self.rng.random_range(0..50), self.rng.random_range(0..1000) * 4096).unwrap();
            let crc = self.rng.random();
            (BlockRange::new(first, 1), ChangeState::Mapped(Place { pos, crc }))
        } else {
            let count = match self.rng.random_range(0..4) {
                0 => 1,
                1 => self.rng.random_range(1..2000),
                2 => self.rng.random_range(1..1 << 20),
                _ => self.rng.random_range(1..1 << 30),
            };
            (BlockRange::new(first, count), ChangeState::Zero)
        };
        Event { branch: BRANCHES[self.rng.random_range(0..2)], seq: self.seq, range, state }
    }

    /// Makes one index write of random changes, images and times.
    fn write(&mut self) -> Write {
        let mut write = Write::default();
        let mut nodes: BTreeMap<NodeKey, Vec<Change>> = BTreeMap::new();
        // The stretch of the log that this write covers begins with a `Seq` of its own.
        self.seq = self.seq.plus(1);
        let ordinal = Ordinal(self.writes.len() as u64 + 1);
        for _ in 0..self.rng.random_range(0..60) {
            let event = self.event(write.events.last());
            for run in decompose(event.range) {
                let NodeRun { level, node, first, count } = run;
                // A single block is never a whole node, so that a place ends on level 0.
                let key = NodeKey { branch: event.branch, level, node };
                let change = Change { seq: event.seq, first, count, state: event.state };
                nodes.entry(key).or_default().push(change);
            }
            if self.rng.random_bool(0.1) && self.seq > write.times.last().map_or(Seq::ZERO, |last| last.1.seq)
            {
                self.time_ns += self.rng.random_range(1..1000);
                let entry = TimeEntry { time_ns: self.time_ns, seq: self.seq, ordinal };
                write.times.push((event.branch, entry));
            }
            write.events.push(event);
        }
        for (node, changes) in &nodes {
            write.batch.changes(*node, changes).unwrap();
        }
        for of_branch in write.times.chunk_by(|(a, _), (b, _)| a == b) {
            let entries: Vec<TimeEntry> = of_branch.iter().map(|(_, entry)| *entry).collect();
            write.batch.times(of_branch[0].0, &entries).unwrap();
        }
        self.events.extend(write.events.iter().cloned());
        for _ in 0..self.rng.random_range(0..6) {
            // Mostly as of now, sometimes as of the midst of some earlier delta.
            let at = if self.rng.random_bool(0.7) { self.seq } else { self.some_seq().min(self.seq) };
            let (branch, leaf) = (BRANCHES[self.rng.random_range(0..2)], some_leaf(&mut self.rng));
            write.batch.image(branch, leaf, at, &self.leaf(branch, leaf, at));
        }
        let pos = LogPos::new(ordinal.0, 4096).unwrap();
        let header_crc = self.rng.random();
        let mark = Watermark { ordinal, seq: self.seq, pos, header_crc, time_ns: self.time_ns };
        write.batch.watermark(VOLUME, &mark);
        write.mark = Some(mark);
        self.writes.push(write.clone());
        write
    }

    fn some_seq(&mut self) -> Seq {
        Seq(self.rng.random_range((1 << 40) - 5..=self.seq.0 + 5))
    }

    /// Has what some or all leaves look like now written down, as a store does that rests; in so many writes.
    fn write_presents(&mut self, index: &TimeIndex) -> usize {
        let mut writes = 0;
        for branch in BRANCHES {
            let mut from = if self.rng.random_bool(0.5) { 0 } else { some_leaf(&mut self.rng) };
            loop {
                let leaves = index.stale_leaves(branch, from);
                assert!(leaves.is_sorted() && leaves.first().is_none_or(|first| *first >= from));
                let Some(last) = leaves.last() else { break };
                assert!(index.write_presents(branch, &leaves, self.seq).unwrap());
                writes += 1;
                from = last + 1;
                if self.rng.random_bool(0.1) {
                    break;
                }
            }
        }
        writes
    }

    fn check(&mut self, index: &TimeIndex, reads: usize) {
        for _ in 0..reads {
            let (branch, leaf, at) =
                (BRANCHES[self.rng.random_range(0..2)], some_leaf(&mut self.rng), self.some_seq());
            let read = index.leaf_at(branch, leaf, at).unwrap();
            let expected = self.leaf(branch, leaf, at);
            for (block, states) in read.states.iter().zip(expected.iter()).enumerate() {
                assert_eq!(states.0, states.1, "branch {branch}, leaf {leaf}, block {block} of it, at {at}");
            }
            assert_eq!(read.deltas_since_image == 0, read.changes_since_image == 0);
            for at in [at, self.seq, Seq::MAX] {
                let states = index.states_at(branch, leaf, at).unwrap();
                assert_eq!(states, self.leaf(branch, leaf, at), "branch {branch}, leaf {leaf}, at {at}");
            }
            self.check_time(index, branch, at);
            // Together, in any order, one of them twice.
            let others: [u64; 3] = std::array::from_fn(|_| some_leaf(&mut self.rng));
            let leaves = [others[0], leaf, others[1], leaf, leaf ^ 1, others[2]];
            let alone: Vec<LeafAt> =
                leaves.iter().map(|leaf| index.leaf_at(branch, *leaf, at).unwrap()).collect();
            assert_eq!(index.leaves_at(branch, &leaves, at).unwrap(), alone);
        }
        let mark = self.writes.last().and_then(|write| write.mark);
        assert_eq!(index.watermark(VOLUME).unwrap(), mark);
        assert_eq!(
            index.watermarks().unwrap(),
            mark.map(|mark| (VOLUME, mark)).into_iter().collect::<Vec<_>>()
        );
    }

    fn check_time(&mut self, index: &TimeIndex, branch: BranchId, seq: Seq) {
        let time_ns = self.time_ns.saturating_sub(self.rng.random_range(0..5000));
        let entries = || self.writes.iter().flat_map(|write| &write.times).filter(|entry| entry.0 == branch);
        let floor = entries().rfind(|entry| entry.1.time_ns <= time_ns);
        assert_eq!(index.floor_time(branch, time_ns).unwrap(), floor.map(|entry| entry.1));
        let floor = entries().rfind(|entry| entry.1.seq <= seq);
        assert_eq!(index.time_of(branch, seq).unwrap(), floor.map(|entry| entry.1));
    }

    /// Forgets what the watermark does not cover, and gives it back to be written again.
    fn lost_since(&mut self, mark: Option<Watermark>) -> Vec<Write> {
        self.writes.split_off(mark.map_or(0, |mark| mark.ordinal.0 as usize))
    }
}

#[test]
fn any_instant_reads_as_it_was_and_a_crash_loses_whole_index_writes_from_the_end() {
    for seed in 0..30 {
        let mut model = Model::new(seed);
        let kv = SimKv::new();
        let mut index = TimeIndex::new(Arc::new(kv.clone()));
        let (mut lost_writes, mut presents) = (0, 0);
        for _ in 0..40 {
            let write = model.write();
            index.write(&write.batch).unwrap();
            if model.rng.random_bool(0.3) {
                presents += model.write_presents(&index);
            }
            if model.rng.random_bool(0.2) {
                index.flush().unwrap();
                presents = 0;
            }
            if model.rng.random_bool(0.15) {
                let lost = kv.crash(&mut model.rng);
                index = TimeIndex::new(Arc::new(kv.clone()));
                let again = model.lost_since(index.watermark(VOLUME).unwrap());
                // Others were what leaves looked like.
                let others = lost.checked_sub(again.len());
                assert!(
                    others.is_some_and(|others| others <= presents),
                    "{lost} lost, {} known",
                    again.len()
                );
                presents = 0;
                lost_writes += again.len();
                for write in again {
                    index.write(&write.batch).unwrap();
                    model.writes.push(write);
                }
            }
            model.check(&index, 15);
        }
        assert!(lost_writes > 0 || seed > 0, "the first seed is known to lose something");
    }
}

#[test]
fn rocksdb_reads_the_same() {
    for seed in 100..103 {
        let mut model = Model::new(seed);
        let directory = tempfile::tempdir().unwrap();
        let options = RocksOptions { memory_bytes: 8 << 20, ..RocksOptions::default() };
        let open = || TimeIndex::new(Arc::new(RocksKv::open(directory.path(), &options).unwrap()));
        let mut index = open();
        for step in 0..60 {
            let write = model.write();
            index.write(&write.batch).unwrap();
            if model.rng.random_bool(0.3) {
                index.flush().unwrap();
            }
            if model.rng.random_bool(0.3) {
                model.write_presents(&index);
            }
            if step % 20 == 19 {
                drop(index);
                index = open();
            }
            model.check(&index, 20);
        }
        index.drop_branch(BRANCHES[0]).unwrap();
        assert!(index.stale_leaves(BRANCHES[0], 0).is_empty());
        model.events.retain(|event| event.branch != BRANCHES[0]);
        model.writes.iter_mut().for_each(|write| write.times.retain(|(branch, _)| *branch != BRANCHES[0]));
        model.check(&index, 200);
        index.clear().unwrap();
        model.events.clear();
        model.writes.clear();
        model.check(&index, 20);
    }
}

fn index() -> (SimKv, TimeIndex) {
    let kv = SimKv::new();
    (kv.clone(), TimeIndex::new(Arc::new(kv)))
}

fn zero(seq: u64, first: u16) -> Change {
    Change { seq: Seq(seq), first, count: 1, state: ChangeState::Zero }
}

fn batch_of(node: NodeKey, changes: &[Change]) -> IndexBatch {
    let mut batch = IndexBatch::new();
    batch.changes(node, changes).unwrap();
    batch
}

const LEAF: NodeKey = NodeKey { branch: BranchId(1), level: 0, node: 5 };

#[test]
fn a_delta_that_began_before_an_image_still_counts_after_it() {
    let (_, index) = index();
    index.write(&batch_of(LEAF, &[zero(3, 0), zero(12, 1), zero(20, 2)])).unwrap();
    let mut images = IndexBatch::new();
    for seq in [5, 9] {
        let mut states = unsaid();
        states[0] = BlockState::Zero;
        images.image(LEAF.branch, LEAF.node, Seq(seq), &states);
    }
    index.write(&images).unwrap();
    let zeroes = |at| {
        let leaf = index.leaf_at(LEAF.branch, LEAF.node, Seq(at)).unwrap();
        leaf.states.iter().filter(|state| **state == BlockState::Zero).count()
    };
    assert_eq!([2, 3, 11, 12, 19, 20].map(zeroes), [0, 1, 1, 2, 2, 3]);
}

#[test]
fn what_was_indexed_cannot_be_indexed_again_unless_the_write_failed() {
    let (kv, index) = index();
    let batch = batch_of(LEAF, &[zero(3, 0), zero(4, 1)]);
    kv.fail_after(0);
    assert_eq!(index.write(&batch).unwrap_err().kind(), IndexErrorKind::Io);
    assert_eq!(index.leaf_at(LEAF.branch, LEAF.node, Seq::MAX).unwrap().deltas_since_image, 0);
    kv.heal();
    index.write(&batch).unwrap();
    let other = NodeKey { node: 6, ..LEAF };
    for seq in [3, 4] {
        let again = index.write(&batch_of(other, &[zero(seq, 0)]));
        assert_eq!(again.unwrap_err().kind(), IndexErrorKind::Invalid);
    }
    index.write(&batch_of(other, &[zero(5, 0)])).unwrap();
    index.write(&batch_of(NodeKey { branch: BranchId(2), ..LEAF }, &[zero(3, 0)])).unwrap();
}

#[test]
fn changes_that_no_node_can_have_are_refused() {
    let mapped = |seq: u64| {
        let place = Place { pos: LogPos::default(), crc: 0 };
        Change { seq: Seq(seq), first: 0, count: 1, state: ChangeState::Mapped(place) }
    };
    let upper = NodeKey { level: 1, ..LEAF };
    for (node, changes) in [
        (LEAF, vec![zero(2, 0), zero(1, 0)]),
        (LEAF, vec![zero(0, 0)]),
        (LEAF, vec![Change { count: 0, ..zero(1, 0) }]),
        (LEAF, vec![Change { count: 2, ..zero(1, 511) }]),
        (LEAF, vec![Change { count: 2, ..mapped(1) }]),
        (upper, vec![mapped(1)]),
        (NodeKey { level: LEVELS, ..LEAF }, vec![zero(1, 0)]),
    ] {
        let refused = IndexBatch::new().changes(node, &changes);
        assert_eq!(refused.unwrap_err().kind(), IndexErrorKind::Invalid, "{node:?} {changes:?}");
    }
}

fn damage(kv: &SimKv, node: NodeKey, seq: u64) {
    let key = keys::map(node, Seq(seq), keys::RowKind::Delta);
    let mut value = kv.get(Family::Map, &key).unwrap().unwrap();
    value[1] ^= 4;
    let mut batch = WriteBatch::new();
    batch.put(Family::Map, &key, &value);
    kv.write(&batch).unwrap();
}

#[test]
fn a_damaged_row_is_corruption_and_not_a_wrong_answer() {
    let (kv, index) = index();
    index.write(&batch_of(LEAF, &[zero(3, 0)])).unwrap();
    damage(&kv, LEAF, 3);
    let error = index.leaf_at(LEAF.branch, LEAF.node, Seq::MAX).unwrap_err();
    assert_eq!(error.kind(), IndexErrorKind::Corrupt);
    // Before the damaged row's time the leaf still reads.
    assert!(index.leaf_at(LEAF.branch, LEAF.node, Seq(2)).is_ok());
}

#[test]
fn what_lies_behind_an_image_is_not_read() {
    let (kv, index) = index();
    let above = NodeKey { level: 1, node: 0, ..LEAF };
    let leaf = LEAF.node as u16;
    for seq in (10..60).step_by(10) {
        let mut batch = batch_of(LEAF, &[zero(seq, 0)]);
        batch.changes(above, &[zero(seq + 1, leaf)]).unwrap();
        if seq == 40 {
            batch.image(LEAF.branch, LEAF.node, Seq(41), &[BlockState::Zero; FANOUT]);
        }
        index.write(&batch).unwrap();
    }
    let read = index.leaf_at(LEAF.branch, LEAF.node, Seq::MAX).unwrap();
    assert_eq!((read.deltas_since_image, read.changes_since_image), (2, 2));
    // Every row but the image, the two after it and the first of each node behind it, which might reach beyond it.
    for seq in [10, 20, 30] {
        damage(&kv, LEAF, seq);
        damage(&kv, above, seq + 1);
    }
    assert_eq!(index.leaf_at(LEAF.branch, LEAF.node, Seq::MAX).unwrap(), read);
    assert!(index.leaf_at(LEAF.branch, LEAF.node, Seq(40)).is_err());
}

#[test]
fn a_time_is_the_newest_entry_at_or_before_it() {
    let (_, index) = index();
    let entry = |time_ns, seq| TimeEntry { time_ns, seq: Seq(seq), ordinal: Ordinal(seq * 10) };
    let branch = BranchId(1);
    let mut batch = IndexBatch::new();
    // Two batches in one nanosecond: the later one is what had happened by then.
    let entries = [entry(100, 1), entry(100, 2), entry(200, 7)];
    batch.times(branch, &entries).unwrap();
    batch.times(BranchId(2), &[entry(150, 4)]).unwrap();
    index.write(&batch).unwrap();
    let floor = |time| index.floor_time(branch, time).unwrap();
    assert_eq!(
        [99, 100, 199, 200, u64::MAX].map(floor),
        [None, Some(entries[1]), Some(entries[1]), Some(entries[2]), Some(entries[2]),]
    );
    let time_of = |seq| index.time_of(branch, Seq(seq)).unwrap();
    assert_eq!([0, 1, 6, 7].map(time_of), [None, Some(entries[0]), Some(entries[1]), Some(entries[2])]);
    for wrong in [[entry(300, 9), entry(299, 10)], [entry(300, 9), entry(301, 8)]] {
        assert_eq!(batch.times(branch, &wrong).unwrap_err().kind(), IndexErrorKind::Invalid);
    }
}

#[test]
fn times_are_found_in_rows_of_many_and_in_rows_of_one() {
    let (kv, index) = index();
    let entry = |n: u64| TimeEntry { time_ns: 1000 + 10 * n, seq: Seq(3 * n), ordinal: Ordinal(2 * n) };
    let entries: Vec<TimeEntry> = (1..=1000).map(entry).collect();
    let branch = BranchId(1);
    // In rows of one, as stores have them that were written before rows had many.
    let (old, new) = entries.split_at(200);
    for row in old.chunks(1).chain([&new[..300], &new[300..]]) {
        let mut batch = IndexBatch::new();
        batch.times(branch, row).unwrap();
        index.write(&batch).unwrap();
    }
    let mut rows = 0;
    kv.scan(Family::Time, &[], &[0xff; 33], &mut |_, _| {
        rows += 1;
        true
    })
    .unwrap();
    assert_eq!(rows, 2 * (200 + 3 + 4));
    for (n, expected) in (1..).zip(&entries) {
        for late in [0, 9] {
            assert_eq!(index.floor_time(branch, 1000 + 10 * n + late).unwrap(), Some(*expected));
        }
        for late in 0..3 {
            assert_eq!(index.time_of(branch, Seq(3 * n + late)).unwrap(), Some(*expected));
        }
    }
    assert_eq!(
        (index.floor_time(branch, 1009).unwrap(), index.time_of(branch, Seq(2)).unwrap()),
        (None, None)
    );
}

#[test]
fn of_batches_that_add_no_seq_the_last_one_counts_wherever_rows_end() {
    let entry = |n: u64| TimeEntry { time_ns: 1000 + n, seq: Seq(5 + n / 4), ordinal: Ordinal(n) };
    let entries: Vec<TimeEntry> = (0..400).map(entry).collect();
    let branch = BranchId(1);
    for splits in [vec![400], vec![1, 399], vec![130, 2, 268], vec![126, 1, 1, 1, 271]] {
        let (_, index) = index();
        let mut rest = &entries[..];
        for length in splits {
            let (row, behind) = rest.split_at(length);
            let mut batch = IndexBatch::new();
            batch.times(branch, row).unwrap();
            index.write(&batch).unwrap();
            rest = behind;
        }
        for entry in &entries {
            let last = entries.iter().rfind(|other| other.seq == entry.seq);
            assert_eq!(index.time_of(branch, entry.seq).unwrap().as_ref(), last);
            assert_eq!(index.floor_time(branch, entry.time_ns).unwrap().as_ref(), Some(entry));
        }
    }
}

#[test]
fn a_lost_row_of_times_is_damage_unless_its_branch_is_gone() {
    let (kv, index) = index();
    let entry = |n: u64| TimeEntry { time_ns: 1000 + n, seq: Seq(n), ordinal: Ordinal(n) };
    let mut batch = IndexBatch::new();
    batch.times(BranchId(1), &[entry(1), entry(2)]).unwrap();
    index.write(&batch).unwrap();
    let mut lost = WriteBatch::new();
    lost.delete(Family::Time, &keys::by_time(BranchId(1), 1001, Seq(1)));
    kv.write(&lost).unwrap();
    assert_eq!(index.time_of(BranchId(1), Seq(2)).unwrap_err().kind(), IndexErrorKind::Corrupt);
    index.drop_branch(BranchId(1)).unwrap();
    assert_eq!(index.time_of(BranchId(1), Seq(2)).unwrap(), None);
}

#[test]
fn rows_that_stand_for_several_times_are_told_from_those_that_stand_for_one() {
    let (kv, index) = index();
    let entry = |n: u64| TimeEntry { time_ns: 1000 + n, seq: Seq(n), ordinal: Ordinal(n) };
    let mut batch = IndexBatch::new();
    batch.times(BranchId(1), &[entry(1)]).unwrap();
    batch.times(BranchId(2), &[entry(1), entry(2)]).unwrap();
    index.write(&batch).unwrap();
    let mut versions = Vec::new();
    kv.scan(Family::Time, &[], &[0xff; 33], &mut |_, value| {
        versions.push(value[0]);
        true
    })
    .unwrap();
    assert_eq!(versions, [1, 1, 2, 2]);
}

#[test]
fn leaves_that_were_never_written_are_skipped() {
    let (_, index) = index();
    let mut batch = IndexBatch::new();
    for node in [5, 1 << 40] {
        batch.changes(NodeKey { node, ..LEAF }, &[zero(3, 0), zero(4, 0)]).unwrap();
    }
    batch.changes(NodeKey { level: 1, node: 9, ..LEAF }, &[zero(3, 0)]).unwrap();
    batch.changes(NodeKey { branch: BranchId(2), ..LEAF }, &[zero(3, 0)]).unwrap();
    index.write(&batch).unwrap();
    let next = |from| index.next_leaf(LEAF.branch, from).unwrap();
    assert_eq!([0, 5, 6, (1 << 40) + 1].map(next), [Some(5), Some(5), Some(1 << 40), None]);
}

#[test]
fn a_synced_database_loses_nothing_that_was_written() {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut found = [0; 2];
    for _ in 0..50 {
        let kv = SimKv::synced();
        let row = |key: &[u8]| {
            let mut batch = WriteBatch::new();
            batch.put(Family::Rows, key, b"v");
            batch
        };
        kv.write(&row(b"a")).unwrap();
        kv.fail_after(0);
        kv.write(&row(b"b")).unwrap_err();
        assert_eq!(kv.get(Family::Rows, b"b").unwrap(), None);
        kv.crash(&mut rng);
        assert!(kv.get(Family::Rows, b"a").unwrap().is_some());
        found[usize::from(kv.get(Family::Rows, b"b").unwrap().is_some())] += 1;
    }
    assert!(found[0] > 0 && found[1] > 0, "a failed write is found after some crashes: {found:?}");
}
