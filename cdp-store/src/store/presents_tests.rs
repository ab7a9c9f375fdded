//! When what leaves look like now is written down.
#![allow(clippy::unwrap_used)]

use cdp_types::{BlockDevice, Event, IoBuf, Op, Origin, RequestId, VolumeName, Wait};

use super::super::VolumeSpec;
use super::super::meanwhile_tests::{open_with, options};
use super::*;
use crate::index::{Family, Kv, SimKv, WriteBatch};

/// A store without background threads, whose index no cache holds.
struct Bench {
    store: Store,
    volumes: [Arc<Volume>; 2],
    databases: [SimKv; 2],
    directory: tempfile::TempDir,
}

fn names() -> [VolumeName; 2] {
    ["first", "second"].map(|name| name.parse().unwrap())
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Store::create(directory.path(), &options()).unwrap();
        let databases = [SimKv::new(), SimKv::synced()];
        let store = open_with(directory.path(), &databases[1], &databases[0]).unwrap();
        let spec = VolumeSpec { size_bytes: 1 << 30, logical_block_size: 4096 };
        let volumes = names().map(|name| store.create_volume(&name, spec).unwrap());
        Self { store, volumes, databases, directory }
    }

    fn open_again(self) -> Self {
        let Self { store, volumes, databases, directory } = self;
        store.close().unwrap();
        drop((volumes, store));
        let store = open_with(directory.path(), &databases[1], &databases[0]).unwrap();
        let volumes = names().map(|name| store.volume(&name).unwrap());
        Self { store, volumes, databases, directory }
    }

    /// Removes the index's rows of a family with these keys.
    fn lose(&self, family: Family, from: &[u8], to: &[u8]) {
        let mut lost = WriteBatch::new();
        lost.delete_range(family, from, to);
        self.databases[0].write(&lost).unwrap();
    }

    fn findings(&self) -> usize {
        self.store.verify(&mut |_| ()).unwrap().findings.len()
    }

    /// Writes a block of each of so many leaves of each volume, and has them indexed.
    fn write_leaves(&self, count: u64) {
        for volume in &self.volumes {
            let mut queue = volume.open_queue().unwrap();
            let mut events = Vec::new();
            for leaf in 0..count {
                let from = IoBuf::from_bytes(&[7; 4096]);
                let write = Op::Write { offset: leaf << 21, from, fua: false, origin: Origin(0) };
                queue.submit(RequestId(1), write);
                while events.is_empty() {
                    queue.poll(Wait::For(Duration::from_millis(10)), &mut events).unwrap();
                    drop(self.store.pool_step());
                }
                assert!(matches!(events[..], [Event::Completed { result: Ok(()), .. }]), "{events:?}");
                events.clear();
            }
            queue.poll(Wait::No, &mut events).unwrap();
        }
        self.store.flush_index().unwrap();
    }

    fn stale(&self) -> [usize; 2] {
        let index = &self.store.inner.shared.index;
        self.volumes.each_ref().map(|volume| index.stale_leaves(volume.map().head(), 0).len())
    }

    fn rest(&self, rests: bool) {
        self.store.inner.shared.index_rests.store(rests, Ordering::SeqCst);
    }
}

#[test]
fn it_is_written_while_the_store_rests_once_in_a_while() {
    let bench = Bench::new();
    let _user = bench.store.clone();
    assert_eq!(bench.store.pass_presents().unwrap(), None, "nothing has changed");
    bench.write_leaves(3);
    assert_eq!(bench.stale(), [3, 3]);
    bench.rest(false);
    assert_eq!(bench.store.pass_presents().unwrap(), None);
    assert_eq!(bench.stale(), [3, 3], "somebody writes");
    bench.rest(true);
    assert_eq!(bench.store.pass_presents().unwrap(), None);
    assert_eq!(bench.stale(), [0, 0]);
    bench.write_leaves(2);
    bench.rest(true);
    let wait = bench.store.pass_presents().unwrap().expect("there was a pass a moment ago");
    assert!(wait <= PASS_INTERVAL && wait > PASS_INTERVAL / 2, "{wait:?}");
    assert_eq!(bench.stale(), [2, 2]);
    bench.store.inner.pass.lock().unwrap().over_ns = None;
    assert_eq!(bench.store.pass_presents().unwrap(), None);
    assert_eq!(bench.stale(), [0, 0]);
}

#[test]
fn a_pass_that_was_interrupted_goes_on_where_it_was() {
    let bench = Bench::new();
    bench.write_leaves(40);
    let mut next = (VolumeId(0), 0);
    let steps = std::cell::Cell::new(0);
    let two_steps = || steps.replace(steps.get() + 1) < 2;
    bench.store.write_presents_of_all(&mut next, two_steps).unwrap();
    assert_eq!((next, bench.stale()), ((bench.volumes[0].id(), 32), [8, 16]));
    bench.store.write_presents_of_all(&mut next, || true).unwrap();
    assert_eq!(bench.stale(), [0, 0]);
}

#[test]
fn a_comparison_with_the_log_finds_what_is_wrong_of_it_and_of_the_history_behind_it() {
    let mut bench = Bench::new();
    bench.write_leaves(1);
    bench.store.write_presents().unwrap();
    bench.write_leaves(1);
    bench = bench.open_again();
    assert_eq!((bench.findings(), bench.stale()), (0, [1, 1]));
    // Without the bits that say that it is old.
    bench.lose(Family::Present, &[0], &[1]);
    bench = bench.open_again();
    assert_eq!((bench.findings(), bench.stale()), (2, [0, 0]));
    bench.lose(Family::Present, &[0], &[2]);
    assert_eq!(bench.findings(), 0);
    bench.store.write_presents().unwrap();
    bench.lose(Family::Map, &[0], &[0xff]);
    assert_eq!((bench.findings(), bench.stale()), (2, [0, 0]));
}

#[test]
fn damage_keeps_its_own_leaf_out_and_no_other() {
    let bench = Bench::new();
    bench.write_leaves(40);
    let mut rotten = WriteBatch::new();
    let index = &bench.databases[0];
    let mut rows = 0;
    index
        .scan(Family::Map, &[], &[0xff], &mut |key, _| {
            rows += 1;
            rotten.put(Family::Map, key, b"rotten");
            rows < 3
        })
        .unwrap();
    index.write(&rotten).unwrap();
    let error = bench.store.write_presents().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(bench.stale(), [3, 0]);
}

#[test]
fn a_database_that_takes_nothing_ends_a_pass_where_it_is() {
    let bench = Bench::new();
    bench.write_leaves(40);
    let index = &bench.databases[0];
    index.fail_after(1);
    let mut next = (VolumeId(0), 0);
    bench.store.write_presents_of_all(&mut next, || true).unwrap_err();
    index.heal();
    assert_eq!(next, (bench.volumes[0].id(), 16));
    assert_eq!(bench.store.inner.shared.index.stale_leaves(bench.volumes[0].map().head(), 0)[0], 16);
}

#[test]
fn what_has_changed_behind_an_interrupted_pass_waits_for_the_next_one() {
    let bench = Bench::new();
    let _user = bench.store.clone();
    bench.write_leaves(3);
    bench.store.inner.pass.lock().unwrap().next = (bench.volumes[1].id(), 1);
    bench.rest(true);
    assert_eq!(bench.store.pass_presents().unwrap(), Some(PASS_INTERVAL));
    assert_eq!(bench.stale(), [3, 1]);
}

#[test]
fn a_store_that_only_its_own_thread_holds_is_not_kept_for_it() {
    let bench = Bench::new();
    bench.write_leaves(1);
    bench.rest(true);
    assert_eq!(bench.store.pass_presents().unwrap(), None);
    assert_eq!(bench.stale(), [1, 1]);
}
