//! What leaves look like now, where it counts and where it does not.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use cdp_types::{BranchId, Seq};

use super::super::{BlockState, Change, ChangeState, IndexBatch, NodeKey, SimKv, TimeIndex};
use super::*;

const LEAF: NodeKey = NodeKey { branch: BranchId(1), level: 0, node: 5 };

fn zero(node: NodeKey, seq: u64, child: u16) -> IndexBatch {
    let mut batch = IndexBatch::new();
    let change = Change { seq: Seq(seq), first: child, count: 1, state: ChangeState::Zero };
    batch.changes(node, &[change]).unwrap();
    batch
}

fn open(kv: &SimKv) -> TimeIndex {
    TimeIndex::new(Arc::new(kv.clone()))
}

/// How many of the leaf's blocks read as zeroes.
fn zeroes(index: &TimeIndex, at: u64) -> usize {
    let states = index.states_at(LEAF.branch, LEAF.node, Seq(at)).unwrap();
    states.iter().filter(|state| **state == BlockState::Zero).count()
}

fn refresh(index: &TimeIndex, indexed: u64) -> IndexResult<bool> {
    let leaves = index.stale_leaves(LEAF.branch, 0);
    index.write_presents(LEAF.branch, &leaves, Seq(indexed))
}

/// A leaf with two changes, the second one of which its history has lost since: only what was written down has both.
fn written_down() -> (SimKv, TimeIndex) {
    let kv = SimKv::new();
    let index = open(&kv);
    index.write(&zero(LEAF, 3, 0)).unwrap();
    index.write(&zero(LEAF, 4, 1)).unwrap();
    assert!(refresh(&index, 4).unwrap());
    let mut lost = WriteBatch::new();
    lost.delete(Family::Map, &keys::map(LEAF, Seq(4), keys::RowKind::Delta));
    kv.write(&lost).unwrap();
    (kv, index)
}

#[test]
fn it_is_read_instead_of_the_history_and_only_where_it_is_no_older() {
    let (kv, index) = written_down();
    for index in [index, open(&kv)] {
        assert_eq!([3, 4, 5].map(|at| zeroes(&index, at)), [1, 2, 2]);
        assert!(index.stale_leaves(LEAF.branch, 0).is_empty());
    }
}

#[test]
fn what_is_zeroed_above_it_later_counts_after_it() {
    let (_, index) = written_down();
    index.write(&zero(NodeKey { level: 1, node: 0, ..LEAF }, 7, LEAF.node as u16)).unwrap();
    assert_eq!([6, 7].map(|at| zeroes(&index, at)), [2, 512]);
}

#[test]
fn it_does_not_count_once_its_leaf_has_changed_until_it_is_written_again() {
    let (kv, index) = written_down();
    index.write(&zero(NodeKey { node: 6, ..LEAF }, 5, 0)).unwrap();
    assert_eq!(zeroes(&index, 5), 2, "another leaf has changed");
    index.write(&zero(LEAF, 6, 2)).unwrap();
    for index in [&index, &open(&kv)] {
        assert_eq!(zeroes(index, 6), 2, "the history, which has lost one of three");
        assert_eq!(index.stale_leaves(LEAF.branch, 0), [5, 6]);
        assert_eq!(index.stale_leaves(LEAF.branch, 6), [6]);
    }
    assert!(refresh(&index, 6).unwrap());
    assert!(open(&kv).stale_leaves(LEAF.branch, 0).is_empty());
    // Its row, not the history: one without the other.
    let key = keys::map(LEAF, Seq(6), keys::RowKind::Delta);
    let mut lost = WriteBatch::new();
    lost.delete(Family::Map, &key);
    kv.write(&lost).unwrap();
    assert_eq!(zeroes(&index, 6), 2);
}

#[test]
fn it_is_not_written_down_before_all_of_its_branch_is_indexed() {
    let (_, index) = written_down();
    index.write(&zero(LEAF, 9, 2)).unwrap();
    assert!(!refresh(&index, 8).unwrap());
    assert_eq!(index.stale_leaves(LEAF.branch, 0), [5]);
    assert!(refresh(&index, 9).unwrap());
    assert!(index.stale_leaves(LEAF.branch, 0).is_empty());
}

#[test]
fn it_is_not_written_down_if_something_else_is_written_meanwhile() {
    let kv = SimKv::new();
    let index = Arc::new(open(&kv));
    index.write(&zero(LEAF, 3, 0)).unwrap();
    let others: [fn(&TimeIndex); 3] = [
        |index| index.write(&zero(NodeKey { branch: BranchId(2), ..LEAF }, 3, 0)).unwrap(),
        |index| index.write(&zero(LEAF, 4, 1)).unwrap(),
        |index| index.drop_branch(LEAF.branch).unwrap(),
    ];
    for other in others {
        let leaves = index.stale_leaves(LEAF.branch, 0);
        let meanwhile = Arc::clone(&index);
        kv.before_next_scan(move || other(&meanwhile));
        assert!(!index.write_presents(LEAF.branch, &leaves, Seq(3)).unwrap());
    }
    // Nor if the branch was dropped after its leaves were found.
    assert!(!index.write_presents(LEAF.branch, &[LEAF.node], Seq(4)).unwrap());
    assert_eq!(kv.get(Family::Present, &keys::present(LEAF.branch, LEAF.node)).unwrap(), None);
}

#[test]
fn of_a_damaged_history_it_is_not_written_down() {
    let (kv, index) = written_down();
    let above = NodeKey { level: 1, node: 0, ..LEAF };
    index.write(&zero(LEAF, 10, 2)).unwrap();
    index.write(&zero(above, 11, 1)).unwrap();
    let mut rotten = WriteBatch::new();
    rotten.put(Family::Map, &keys::map(above, Seq(11), keys::RowKind::Delta), b"rotten");
    kv.write(&rotten).unwrap();
    assert_eq!(refresh(&index, 11).unwrap_err().kind(), IndexErrorKind::Corrupt);
    assert_eq!(index.stale_leaves(LEAF.branch, 0), [5]);
}

#[test]
fn one_that_is_damaged_or_was_never_written_costs_time_and_is_written_again() {
    for value in [Some(b"rotten"), None] {
        let (kv, index) = written_down();
        let key = keys::present(LEAF.branch, LEAF.node);
        let mut lost = WriteBatch::new();
        match value {
            Some(value) => lost.put(Family::Present, &key, value),
            None => lost.delete(Family::Present, &key),
        }
        kv.write(&lost).unwrap();
        assert_eq!(zeroes(&index, 5), 1, "what the history says");
        assert_eq!(index.stale_leaves(LEAF.branch, 0), [5]);
        // Nothing is missed where there never was anything.
        index.states_at(LEAF.branch, 77, Seq(5)).unwrap();
        index.states_at(BranchId(3), LEAF.node, Seq(5)).unwrap();
        assert!(index.stale_leaves(LEAF.branch, 6).is_empty());
        assert!(index.stale_leaves(BranchId(3), 0).is_empty());
        // The database learns it from the next write, whatever that is about.
        assert!(open(&kv).stale_leaves(LEAF.branch, 0).is_empty());
        index.write(&zero(NodeKey { branch: BranchId(2), ..LEAF }, 7, 0)).unwrap();
        assert_eq!(open(&kv).stale_leaves(LEAF.branch, 0), [5]);
        assert!(refresh(&index, 4).unwrap());
        let mut gone = WriteBatch::new();
        gone.delete(Family::Map, &keys::map(LEAF, Seq(3), keys::RowKind::Delta));
        kv.write(&gone).unwrap();
        assert_eq!(zeroes(&index, 5), 1, "only the row has it");
    }
}

#[test]
fn an_instant_before_it_leaves_it_as_it_is() {
    let (_, index) = written_down();
    assert_eq!(zeroes(&index, 3), 1);
    assert!(index.stale_leaves(LEAF.branch, 0).is_empty());
}

#[test]
fn whatever_a_failed_write_has_left_it_does_not_count() {
    let (kv, index) = written_down();
    kv.fail_after(0);
    index.write(&zero(LEAF, 6, 2)).unwrap_err();
    kv.heal();
    assert_eq!(zeroes(&index, 6), 1, "what the history says");
    assert_eq!(zeroes(&open(&kv), 6), 2, "nothing was written");
    // The change comes again, and its leaf, which is stale already, is so in the database, too.
    index.write(&zero(LEAF, 6, 2)).unwrap();
    for index in [&index, &open(&kv)] {
        assert_eq!(zeroes(index, 6), 2, "what the history says");
        assert_eq!(index.stale_leaves(LEAF.branch, 0), [5]);
    }
    kv.fail_after(0);
    refresh(&index, 6).unwrap_err();
    kv.heal();
    assert_eq!(index.stale_leaves(LEAF.branch, 0), [5]);
    // It may have been written all the same; and then a change must make it stale.
    let written = open(&kv);
    assert!(refresh(&written, 6).unwrap());
    index.write(&zero(LEAF, 8, 3)).unwrap();
    assert_eq!(open(&kv).stale_leaves(LEAF.branch, 0), [5]);
    assert_eq!(zeroes(&open(&kv), 8), 3);
    // What could not be removed reads as before.
    assert!(refresh(&index, 8).unwrap());
    kv.fail_after(0);
    index.drop_branch(LEAF.branch).unwrap_err();
    kv.heal();
    assert_eq!(zeroes(&index, 8), 3);
}

#[test]
fn if_the_bits_cannot_be_read_none_counts_and_all_are_removed() {
    let (kv, index) = written_down();
    index.write(&zero(NodeKey { node: 6, ..LEAF }, 5, 0)).unwrap();
    let mut rotten = WriteBatch::new();
    rotten.put(Family::Present, &keys::stale(LEAF.branch, 0), b"rotten");
    kv.write(&rotten).unwrap();
    let index = open(&kv);
    assert_eq!(zeroes(&index, 5), 1, "what the history says");
    assert!(!index.write_presents(LEAF.branch, &[LEAF.node], Seq(5)).unwrap());
    kv.fail_after(0);
    index.write(&zero(LEAF, 6, 2)).unwrap_err();
    kv.heal();
    assert_eq!(index.stale_leaves(LEAF.branch, 0), [LEAF.node]);
    assert!(!index.write_presents(LEAF.branch, &[LEAF.node], Seq(5)).unwrap());
    // The next write removes them, even if it has nothing to do with them.
    index.write(&zero(NodeKey { branch: BranchId(2), ..LEAF }, 7, 0)).unwrap();
    let mut rows = Vec::new();
    kv.scan(Family::Present, &[], &keys::PRESENT_END, &mut |key, _| {
        rows.push(key.to_vec());
        true
    })
    .unwrap();
    assert_eq!(rows, [keys::stale(LEAF.branch, 0), keys::stale(BranchId(2), 0)]);
    index.write(&zero(LEAF, 8, 3)).unwrap();
    assert_eq!(zeroes(&index, 8), 2);
    assert!(refresh(&index, 8).unwrap());
    assert!(open(&kv).stale_leaves(LEAF.branch, 0).is_empty());
}

#[test]
fn a_branch_that_is_dropped_takes_its_own_along() {
    let (kv, index) = written_down();
    let other = NodeKey { branch: BranchId(2), ..LEAF };
    index.write(&zero(other, 5, 0)).unwrap();
    index.drop_branch(LEAF.branch).unwrap();
    assert_eq!(zeroes(&index, 9), 0);
    assert_eq!(index.stale_leaves(other.branch, 0), [LEAF.node]);
    index.drop_branch(other.branch).unwrap();
    let mut rows = 0;
    kv.scan(Family::Present, &[], &keys::PRESENT_END, &mut |_, _| {
        rows += 1;
        true
    })
    .unwrap();
    assert_eq!(rows, 0);
}

#[test]
fn stale_leaves_come_in_order_and_not_too_many_at_once() {
    let kv = SimKv::new();
    let index = open(&kv);
    let leaves: Vec<u64> = (0..40).chain([511, 512, 1 << 20, (1 << 20) + 63, (1 << 20) + 64]).collect();
    for (seq, leaf) in (1..).zip(&leaves) {
        index.write(&zero(NodeKey { node: *leaf, ..LEAF }, seq, 0)).unwrap();
    }
    let mut found = Vec::new();
    let mut from = 0;
    loop {
        let some = index.stale_leaves(LEAF.branch, from);
        assert!(some.len() <= 16);
        let Some(last) = some.last() else { break };
        from = last + 1;
        found.extend(some);
    }
    assert_eq!(found, leaves);
}
