//! Reverts, clones and deletions, one at a time.

use std::collections::BTreeMap;

use cdp_store::clock::Clock as _;
use cdp_store::{CloneSpec, ErrorKind, Reverted};
use cdp_types::{BlockDevice, BlockRange, Instant, Op, Origin, Seq, VolumeName, Wait};

use crate::bench::{Bench, block_of, write_op};
use crate::machine::{Crash, run};

const HELD: &str = "invariant 9 violated";

fn revert(bench: &Bench, name: &VolumeName, to: Seq) -> Reverted {
    bench.machine.store().revert(&[(name.clone(), Instant::Seq(to))], false).unwrap().remove(0)
}

fn clone(bench: &Bench, source: &VolumeName, at: Instant, name: &str) -> VolumeName {
    let name: VolumeName = name.parse().unwrap();
    let spec = CloneSpec { source: source.clone(), at, name: name.clone() };
    bench.machine.store().clone_volumes(&[spec]).unwrap();
    name
}

fn head(bench: &Bench, name: &VolumeName) -> Seq {
    bench.machine.store().volume_info(name).unwrap().head.seq
}

fn blocks(bench: &Bench, name: &VolumeName, at: &Instant) -> [u64; 4] {
    let device = bench.machine.store().open_at(name, at).unwrap();
    [0, 1, 2, 600].map(|block| block_of(&*device, block).unwrap())
}

fn write(bench: &Bench, name: &VolumeName, block: u64, stamp: u64) {
    let volume = bench.machine.volume(name);
    let mut queue = volume.open_queue().unwrap();
    bench.run(&mut *queue, write_op(block, stamp, Origin(0))).unwrap();
}

fn discard(bench: &Bench, name: &VolumeName, blocks: BlockRange) {
    let volume = bench.machine.volume(name);
    let mut queue = volume.open_queue().unwrap();
    let ranges = [blocks.bytes()].into_iter().collect();
    bench.run(&mut *queue, Op::Discard { ranges, origin: Origin(0) }).unwrap();
}

#[test]
fn a_revert_is_undone_by_another_and_every_instant_stays_where_it_was() {
    let mut bench = Bench::new(1);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    write(&bench, &name, 1, 1);
    let good = head(&bench, &name);
    write(&bench, &name, 1, 2);
    write(&bench, &name, 2, 2);
    let bad = head(&bench, &name);
    let bad_time = bench.machine.store().volume_info(&name).unwrap().head.time_ns;

    let first = revert(&bench, &name, good);
    assert_eq!((first.at.seq, first.undo.seq), (good, bad));
    assert_eq!(blocks(&bench, &name, &Instant::Head), [1, 1, 0, 0]);
    write(&bench, &name, 600, 3);
    assert_eq!(blocks(&bench, &name, &Instant::Head), [1, 1, 0, 3]);
    let third = head(&bench, &name);
    let undone = revert(&bench, &name, first.undo.seq);
    assert_eq!(undone.undo.seq, third);

    let check = |bench: &Bench| {
        let at = |instant| blocks(bench, &name, &instant);
        assert_eq!(at(Instant::Head), [1, 2, 2, 0], "{HELD}: the undone head");
        assert_eq!(at(Instant::Seq(good)), [1, 1, 0, 0]);
        assert_eq!(at(Instant::Seq(bad)), [1, 2, 2, 0]);
        assert_eq!(at(Instant::Time(bad_time)), [1, 2, 2, 0], "the disk as it was then");
        assert_eq!(at(Instant::Seq(first.seq)), [1, 1, 0, 0], "{HELD}: the first instant after the revert");
        assert_eq!(at(Instant::Seq(third)), [1, 1, 0, 3], "{HELD}: what the undoing left behind");
        assert_eq!(bench.machine.store().branches(&name).unwrap().len(), 3);
    };
    check(&bench);
    bench.machine.store().flush_index().unwrap();
    check(&bench);
    for how in [Crash::Kill, Crash::PowerCut] {
        bench.restart(how);
        check(&bench);
    }
    let report = bench.machine.store().verify(&mut |_| ()).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
}

#[test]
fn a_clone_outlives_its_source_and_neither_sees_the_other() {
    let mut bench = Bench::new(2);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    write(&bench, &name, 1, 1);
    write(&bench, &name, 600, 1);
    let at = head(&bench, &name);
    write(&bench, &name, 0, 2);
    let copy = clone(&bench, &name, Instant::Seq(at), "copy");
    assert_eq!(blocks(&bench, &copy, &Instant::Head), [1, 1, 0, 1], "{HELD}: a clone of the past");
    write(&bench, &name, 2, 3);
    write(&bench, &copy, 1, 4);
    discard(&bench, &copy, BlockRange::new(512, 512));
    // In a leaf of which it says little else: the rest is the source's, and this is not.
    discard(&bench, &copy, BlockRange::new(0, 1));
    let expected = [0, 4, 0, 0];
    assert_eq!(blocks(&bench, &copy, &Instant::Head), expected, "{HELD}: what a clone has written");
    assert_eq!(blocks(&bench, &name, &Instant::Head), [2, 1, 3, 1], "{HELD}: what its source has");
    assert_eq!(blocks(&bench, &copy, &Instant::Seq(at)), [1, 1, 0, 1], "before the clone was made");

    let again = clone(&bench, &copy, Instant::Head, "again");
    bench.machine.store().destroy_volume(&name, false).unwrap();
    let segments = || bench.machine.store().segments().unwrap().len();
    let shared = segments();
    for volume in [&copy, &again] {
        let device = bench.machine.volume(volume);
        let held = [0, 1, 2, 600].map(|block| block_of(&*device, block).unwrap_or(u64::MAX));
        assert_eq!(held, expected, "{HELD}: {volume} without its source");
    }
    bench.machine.store().destroy_volume(&copy, false).unwrap();
    assert_eq!(blocks(&bench, &again, &Instant::Head), expected, "{HELD}: a clone of a clone");
    bench.machine.store().destroy_volume(&again, false).unwrap();
    assert!(segments() < shared, "what nobody shares any more is given back");
    bench.restart(Crash::PowerCut);
    assert!(bench.machine.store().volumes().iter().all(|v| v.name != name && v.name != copy));
}

#[test]
fn a_volume_in_use_is_not_reverted_and_force_leaves_its_queues_behind() {
    let bench = Bench::new(3);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    let good = head(&bench, &name);
    let volume = bench.machine.volume(&name);
    let mut queue = volume.open_queue().unwrap();
    bench.run(&mut *queue, write_op(0, 2, Origin(0))).unwrap();
    let to = [(name.clone(), Instant::Seq(good))];
    let refused = bench.machine.store().revert(&to, false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    bench.run(&mut *queue, write_op(1, 2, Origin(0))).expect("a refused revert changes nothing");

    // One that has been taken and not begun is refused as well.
    queue.submit(cdp_types::RequestId(7), write_op(2, 9, Origin(0)));
    bench.machine.store().revert(&to, true).unwrap();
    let late = bench.wait(&mut *queue);
    let later = bench.run(&mut *queue, write_op(2, 9, Origin(0)));
    assert_eq!(
        blocks(&bench, &name, &Instant::Head),
        [1, 0, 0, 0],
        "{HELD}: an old queue wrote to the new head"
    );
    assert!(late.is_err() && later.is_err(), "{HELD}: an old queue's write was acknowledged");
    drop(queue);
    write(&bench, &name, 2, 3);
    assert_eq!(blocks(&bench, &name, &Instant::Head), [1, 0, 3, 0]);
}

#[test]
fn several_volumes_go_back_together_or_not_at_all() {
    let bench = Bench::new(4);
    let (one, two) = (bench.name(0), bench.name(1));
    write(&bench, &one, 0, 1);
    write(&bench, &two, 0, 1);
    let at = head(&bench, &two);
    write(&bench, &one, 0, 2);
    write(&bench, &two, 0, 2);
    let store = bench.machine.store();
    let targets = |seq| [(one.clone(), Instant::Seq(seq)), (two.clone(), Instant::Seq(seq))];
    let volume = bench.machine.volume(&two);
    let user = volume.open_queue().unwrap();
    assert_eq!(store.revert(&targets(at), false).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!([&one, &two].map(|v| store.branches(v).unwrap().len()), [1, 1], "{HELD}: half a revert");
    drop(user);
    write(&bench, &one, 1, 1);
    let reverted = store.revert(&targets(at), false).unwrap();
    assert_eq!(reverted[0].seq, reverted[1].seq, "together they are one instant");
    assert_eq!([&one, &two].map(|v| blocks(&bench, v, &Instant::Head)), [[1, 0, 0, 0]; 2]);
    let twice = [(one.clone(), Instant::Head), (one.clone(), Instant::Head)];
    assert_eq!(store.revert(&twice, false).unwrap_err().kind(), ErrorKind::Invalid);

    let clones = |a: &str, b: &str| {
        let spec = |source: &VolumeName, name: &str| CloneSpec {
            source: source.clone(),
            at: Instant::Head,
            name: name.parse().unwrap(),
        };
        store.clone_volumes(&[spec(&one, a), spec(&two, b)])
    };
    assert_eq!(clones("a", one.as_str()).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(clones("a", "a").unwrap_err().kind(), ErrorKind::Invalid);
    assert!(store.volume(&"a".parse().unwrap()).is_err(), "{HELD}: half a pair of clones");
    clones("a", "b").unwrap();
    assert_eq!(blocks(&bench, &"b".parse().unwrap(), &Instant::Head), [1, 0, 0, 0]);
}

#[test]
fn a_deleted_branch_cannot_be_opened_and_who_reads_it_can_go_on() {
    let mut bench = Bench::new(5);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    let good = head(&bench, &name);
    write(&bench, &name, 0, 2);
    let bad = head(&bench, &name);
    let first = bench.machine.store().branches(&name).unwrap()[0].id;
    assert_eq!(bench.machine.store().delete_branch(&name, first, false).unwrap_err().kind(), ErrorKind::Busy);
    for (seq, label) in [(good, "good"), (bad, "bad")] {
        let label = label.parse().unwrap();
        bench.machine.store().mark(&name, &Instant::Seq(seq), &label, BTreeMap::new()).unwrap();
    }
    // Of this branch nothing is inherited, but for what the head was put back to.
    revert(&bench, &name, Seq::ZERO);
    write(&bench, &name, 1, 5);
    let middle = bench.machine.store().branches(&name).unwrap()[1];
    let of_middle = head(&bench, &name);
    revert(&bench, &name, good);
    bench.machine.store().flush_index().unwrap();

    let store = bench.machine.store();
    let reader = store.open_at(&name, &Instant::Seq(of_middle)).unwrap();
    assert_eq!(
        store.delete_branch(&name, first, false).unwrap_err().kind(),
        ErrorKind::Busy,
        "a mark is on it"
    );
    store.delete_branch(&name, middle.id, false).unwrap();
    assert_eq!(block_of(&*reader, 1).unwrap(), 5, "{HELD}: a reader of a deleted branch");
    let opened = store.open_at(&name, &Instant::Seq(of_middle));
    assert_eq!(opened.map(|_| ()).unwrap_err().kind(), ErrorKind::NotFound);
    drop(reader);
    store.upkeep().unwrap();
    let refused = store.open_at(&name, &Instant::Seq(of_middle)).unwrap_err();
    assert!(refused.to_string().contains("the nearest instant left"), "{refused}");

    store.delete_branch(&name, first, true).unwrap();
    let marks = store.volume_info(&name).unwrap().marks;
    let marks: Vec<&str> = marks.iter().map(|mark| mark.label.as_str()).collect();
    assert_eq!(
        marks,
        ["good"],
        "{HELD}: marks go with their branch, but for those on what the head inherits"
    );
    for kept in [Instant::Seq(good), Instant::Mark("good".parse().unwrap())] {
        assert_eq!(blocks(&bench, &name, &kept), [1, 0, 0, 0], "{HELD}: what the head inherits stays");
    }
    assert_eq!(
        bench.machine.store().open_at(&name, &Instant::Seq(bad)).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    bench.restart(Crash::Kill);
    assert_eq!(blocks(&bench, &name, &Instant::Head), [1, 0, 0, 0], "{HELD}: the head after all that");
    let seed = 77;
    let mut rebuilt = bench.machine.fork_without_index(seed);
    rebuilt.disk.kill_restart();
    rebuilt.open().unwrap();
    let refused = rebuilt.store().open_at(&name, &Instant::Seq(of_middle)).map(|_| ());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotFound, "a rebuild brings nothing deleted back");
}

#[test]
fn a_long_line_of_reverts_reads_the_same_and_no_slower() {
    let mut bench = Bench::new(6);
    let name = bench.name(0);
    let mut expected = [0_u64; 4];
    for round in 1..40_u64 {
        for (index, block) in [0, 1, 2, 600].into_iter().enumerate() {
            if (round + index as u64).is_multiple_of(3) {
                write(&bench, &name, block, round);
                expected[index] = round;
            }
        }
        if round % 7 == 0 {
            discard(&bench, &name, BlockRange::new(512, 512));
            expected[3] = 0;
        }
        let at = head(&bench, &name);
        write(&bench, &name, 1, 1000);
        revert(&bench, &name, at);
        if round % 5 == 0 {
            bench.machine.store().upkeep().unwrap();
        }
        assert_eq!(blocks(&bench, &name, &Instant::Head), expected, "{HELD}: after revert {round}");
    }
    bench.machine.store().upkeep().unwrap();
    bench.machine.store().flush_index().unwrap();
    assert!(
        bench.machine.volume(&name).read_depth() < 8,
        "reads walk {}",
        bench.machine.volume(&name).read_depth()
    );
    assert_eq!(blocks(&bench, &name, &Instant::Head), expected, "{HELD}: a flattened line");
    bench.restart(Crash::Kill);
    assert!(bench.machine.volume(&name).read_depth() < 8, "what was flattened stays so");
    assert_eq!(blocks(&bench, &name, &Instant::Head), expected, "{HELD}: a flattened line, opened again");
}

#[test]
fn a_scratch_view_is_written_alone_and_vanishes() {
    let mut bench = Bench::new(8);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    let at = head(&bench, &name);
    write(&bench, &name, 0, 2);
    let store = bench.machine.store().clone();
    let volumes = store.volumes().len();
    let scratch = store.scratch(&store.volume(&name).unwrap(), &Instant::Seq(at)).unwrap();
    let mut queue = scratch.volume().open_queue().unwrap();
    run(&mut *queue, Op::Flush).unwrap();
    bench.run(&mut *queue, write_op(1, 3, Origin(0))).unwrap();
    queue.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!([0, 1].map(|b| block_of(&**scratch.volume(), b).unwrap()), [1, 3]);
    assert_eq!(
        blocks(&bench, &name, &Instant::Head),
        [2, 0, 0, 0],
        "{HELD}: a scratch view wrote to its source"
    );
    assert_eq!(store.volumes().len(), volumes, "nobody else sees it");
    let segments = store.segments().unwrap().len();
    drop(queue);
    drop(scratch);
    assert!(store.segments().unwrap().len() < segments, "it gives its space back");
    let forgotten = store.scratch(&store.volume(&name).unwrap(), &Instant::Seq(at)).unwrap();
    std::mem::forget(forgotten);
    drop(store);
    bench.restart(Crash::Kill);
    assert_eq!(bench.machine.store().volumes().len(), volumes, "a crash ends it as well");
}

#[test]
fn an_instant_inside_the_first_batch_of_a_branch_is_on_that_branch() {
    let bench = Bench::new(9);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    let base = head(&bench, &name);
    write(&bench, &name, 0, 2);
    revert(&bench, &name, base);
    let volume = bench.machine.volume(&name);
    let mut queue = volume.open_queue().unwrap();
    // Taken together, they share a batch.
    queue.submit(cdp_types::RequestId(1), write_op(1, 3, Origin(0)));
    queue.submit(cdp_types::RequestId(2), write_op(2, 3, Origin(0)));
    for _ in 0..crate::machine::PATIENCE {
        queue.poll(Wait::For(std::time::Duration::from_millis(1)), &mut Vec::new()).unwrap();
        bench.machine.store().pool_step().unwrap();
        if queue.in_flight() == 0 {
            break;
        }
    }
    assert_eq!(queue.in_flight(), 0, "the writes never end");
    drop(queue);
    let records = bench.records(0);
    let [first, second] = &records[records.len() - 2..] else { panic!("{records:?}") };
    assert_eq!(first.ordinal, second.ordinal, "the test is about one batch");
    let first = first.seq;
    assert_eq!(blocks(&bench, &name, &Instant::Seq(first)), [1, 3, 0, 0]);
    revert(&bench, &name, first);
    assert_eq!(blocks(&bench, &name, &Instant::Head), [1, 3, 0, 0], "{HELD}: half of a batch");
    let copy = clone(&bench, &name, Instant::Seq(first), "copy");
    assert_eq!(blocks(&bench, &copy, &Instant::Head), [1, 3, 0, 0], "{HELD}: a clone of half of a batch");
}

#[test]
fn a_time_at_which_a_write_was_placed_has_that_write() {
    let bench = Bench::new(5);
    let name = bench.name(0);
    write(&bench, &name, 0, 1);
    let volume = bench.machine.volume(&name);
    let mut queue = volume.open_queue().unwrap();
    queue.submit(cdp_types::RequestId(1), write_op(0, 2, Origin(0)));
    queue.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!(queue.in_flight(), 1);
    let clock = bench.machine.disk.clock();
    clock.advance(std::time::Duration::from_millis(1));
    let instant = Instant::Time(clock.wall_ns());
    let store = bench.machine.store().clone();
    std::thread::scope(|scope| {
        let found = scope.spawn(|| store.resolve(&name, &instant).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!found.is_finished(), "the write is in flight, and the instant was found");
        bench.wait(&mut *queue).unwrap();
        assert_eq!(found.join().unwrap().seq, head(&bench, &name));
    });
    assert_eq!(block_of(&*bench.machine.store().open_at(&name, &instant).unwrap(), 0).unwrap(), 2);
}
