//! Disks that fail and fill up, and guests that ask what has become of their requests: invariants 1, 4 and 6.

use std::collections::BTreeMap;
use std::time::Duration;

use cdp_store::storage::sim::OpKind;
use cdp_store::{Error, ErrorKind, Store};
use cdp_types::{
    BlockDevice, DeviceQueue, Event, Instant, IoErrorKind, Op, Origin, RequestId, Seq, VolumeName, Wait,
};

use crate::bench::{Bench, write_op};
use crate::machine::{Crash, FULL_WAIT};

#[test]
fn a_failed_sync_is_never_made_up_for() {
    let mut bench = Bench::new(1);
    bench.write(0, 1, 11).unwrap();
    bench.flush(0).unwrap();
    let volume = bench.machine.volume(&bench.name(0));
    let durable = volume.head().durable_ordinal;
    bench.write(0, 2, 12).unwrap();
    bench.machine.disk.fail_nth(OpKind::Sync, 0, libc::EIO);
    let what = "invariant 6 violated: a flush succeeded whose sync had failed";
    assert_eq!(bench.flush(0).expect_err(what).kind(), IoErrorKind::Device);
    for _ in 0..2 {
        let what = "invariant 6 violated: a flush succeeded after a sync had failed";
        assert_eq!(bench.flush(0).expect_err(what).kind(), IoErrorKind::Device);
        let what = "invariant 6 violated: a write was taken after a sync had failed";
        assert_eq!(bench.write(0, 3, 13).expect_err(what).kind(), IoErrorKind::Device);
        // The index may only have what is durable, so nothing new.
        let _ = bench.machine.store().flush_index();
        let now = volume.head().durable_ordinal;
        assert_eq!(now, durable, "invariant 6 violated: what a failed sync covered is called durable");
    }
    let _ = bench.machine.store().close();
    assert_eq!(volume.head().durable_ordinal, durable, "invariant 6 violated: closing calls it durable");
    assert_eq!(bench.block(0, 1).unwrap(), 11);
    bench.write(1, 0, 7).unwrap_err();
    drop(volume);
    bench.restart(Crash::PowerCut);
    assert_eq!(bench.block(0, 1).unwrap(), 11);
    bench.write(0, 3, 13).unwrap();
    bench.flush(0).unwrap();
}

/// What a failed write has left must not be seen, whatever it was, whenever it lands.
fn assert_not_there(bench: &Bench, when: &str) {
    for volume in 0..2 {
        for block in 0..4 {
            let stamp = bench.block(volume, block).unwrap();
            assert_ne!(
                stamp / 1000,
                6,
                "invariant 4 violated: {when}, a write that had failed is seen: {stamp}"
            );
        }
    }
}

#[test]
fn a_failed_write_is_never_seen_and_those_behind_it_run_again() {
    let mut runs_with_failures = 0;
    for seed in 0..60 {
        let mut bench = Bench::new(seed);
        let volume = bench.machine.volume(&bench.name(0));
        let mut queues = [volume.open_queue().unwrap(), volume.open_queue().unwrap()];
        bench.run(&mut *queues[0], write_op(0, 5000, Origin(0))).unwrap();
        // Six batches in flight on two queues; one of them fails.
        bench.machine.disk.fail_nth(OpKind::Write, seed % 4, libc::EIO);
        let mut results = Vec::new();
        for (index, queue) in queues.iter_mut().enumerate() {
            for number in 0..3 {
                let (block, stamp) = (index as u64 * 2 + number % 2, 6000 + index as u64 * 10 + number);
                queue.submit(RequestId(stamp), write_op(block, stamp, Origin(0)));
                queue.poll(Wait::No, &mut results).unwrap();
            }
        }
        let mut rounds = 0;
        while results.len() < 6 {
            for queue in &mut queues {
                queue.poll(Wait::No, &mut results).unwrap();
            }
            let _ = bench.machine.disk.step();
            let _ = bench.machine.store().pool_step();
            rounds += 1;
            assert!(rounds < 10_000, "requests behind a failed write never end: {results:?}");
        }
        let failed: Vec<u64> = results
            .iter()
            .filter_map(|e| match e {
                Event::Completed { id, result: Err(_) } => Some(id.0),
                Event::Completed { .. } | Event::Ready { .. } => None,
            })
            .collect();
        // The fault may have met the zero-filling of a segment, which is nobody's request.
        runs_with_failures += u32::from(!failed.is_empty());
        drop((queues, volume));
        let seen = |bench: &Bench, when: &str| {
            for block in 0..4 {
                let stamp = bench.block(0, block).unwrap();
                assert!(
                    !failed.contains(&stamp),
                    "invariant 4 violated: {when}, failed write {stamp} is seen"
                );
            }
            (0..4).map(|block| bench.block(0, block).unwrap()).collect::<Vec<_>>()
        };
        let before = seen(&bench, "at once");
        // All were in flight at once, so of several that succeeded any may be the last; but one of them is there.
        for (block, held) in (0..).zip(&before) {
            let succeeded = |event: &Event| match event {
                Event::Completed { id: RequestId(stamp), result: Ok(()) } => {
                    (stamp - 6000) / 10 * 2 + stamp % 10 % 2 == block
                }
                Event::Completed { .. } | Event::Ready { .. } => false,
            };
            let of_block: Vec<&Event> = results.iter().filter(|event| succeeded(event)).collect();
            let is_one = |event: &&Event| matches!(event, Event::Completed { id, .. } if id.0 == *held);
            assert!(
                of_block.is_empty() || of_block.iter().any(is_one),
                "invariant 1 violated: block {block} holds {held} and none of {of_block:?}, which were acknowledged"
            );
        }
        bench.machine.disk.land_late_writes();
        assert_eq!(seen(&bench, "after it landed late"), before);
        for how in [Crash::Kill, Crash::Kill] {
            bench.restart(how);
            bench.machine.disk.land_late_writes();
            assert_eq!(
                seen(&bench, "after a restart"),
                before,
                "invariant 1 violated: acknowledged writes are lost"
            );
        }
        bench.machine = bench.machine.fork_without_index(seed);
        bench.restart(Crash::Kill);
        assert_eq!(seen(&bench, "without the index"), before, "invariant 3 violated");
    }
    assert!(runs_with_failures > 20, "only {runs_with_failures} runs had a failed write");
}

#[test]
fn what_lands_after_an_opening_never_joins_the_log() {
    let mut runs_with_late_writes = 0;
    for seed in 0..400 {
        let mut bench = Bench::new(seed);
        bench.write(0, 0, 5000).unwrap();
        let volume = bench.machine.volume(&bench.name(0));
        let mut queues = [volume.open_queue().unwrap(), volume.open_queue().unwrap()];
        for (index, queue) in queues.iter_mut().enumerate() {
            for number in 0..2 {
                let block = 1 + index as u64 * 2 + number;
                queue.submit(RequestId(block), write_op(block, 6000 + block, Origin(0)));
                queue.poll(Wait::No, &mut Vec::new()).unwrap();
            }
        }
        drop(volume);
        bench.machine.crash(Crash::Kill);
        drop(queues);
        bench.machine.open().unwrap();
        runs_with_late_writes += u32::from(bench.machine.disk.late_writes() > 0);
        let content = |bench: &Bench| (0..5).map(|block| bench.block(0, block).unwrap()).collect::<Vec<_>>();
        let found = content(&bench);
        for _ in 0..2 {
            bench.machine.disk.land_late_writes();
            bench.restart(Crash::Kill);
            assert_eq!(
                content(&bench),
                found,
                "invariant 4 violated: what landed late is seen (seed {seed})"
            );
        }
    }
    assert!(runs_with_late_writes > 3, "only {runs_with_late_writes} runs had a late write");
}

#[test]
fn when_the_disk_keeps_failing_requests_end_and_reads_go_on() {
    let bench = Bench::new(3);
    bench.write(0, 0, 5000).unwrap();
    bench.machine.disk.fail_rate(OpKind::Write, 1.0, libc::EIO);
    for number in 0..3 {
        let error = bench.write(0, 1, 6000 + number).unwrap_err();
        assert_eq!(error.kind(), IoErrorKind::Device);
        assert_not_there(&bench, "while the disk fails");
        assert_eq!(bench.block(0, 0).unwrap(), 5000);
    }
}

#[test]
fn a_full_disk_is_back_pressure_then_an_error_and_ends_with_the_shortage() {
    let mut bench = Bench::new(4);
    let mut used = 3 << 20;
    bench.machine.disk.set_capacity(Some(used));
    let mut written = 0;
    let error = loop {
        match bench.write(0, written % 1000, 5000 + written) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 5000, "the disk never gets full");
    };
    assert_eq!(error.kind(), IoErrorKind::NoSpace);
    assert!(written > 50);
    for back in 1..50 {
        assert_eq!(bench.block(0, (written - back) % 1000).unwrap(), 5000 + written - back);
    }
    assert_eq!(bench.write(0, 0, 1).unwrap_err().kind(), IoErrorKind::NoSpace);
    used += 8 << 20;
    bench.machine.disk.set_capacity(Some(used));
    // The pool looks again now and then.
    let again = |bench: &Bench| bench.machine.store().pool_step().is_ok() && bench.write(0, 7, 77).is_ok();
    assert!((0..20).any(|_| again(&bench)), "there is space, and writes fail all the same");
    bench.flush(0).unwrap();
    bench.restart(Crash::PowerCut);
    assert_eq!(bench.block(0, 7).unwrap(), 77);
    assert_eq!(bench.block(0, (written - 9) % 1000).unwrap(), 5000 + written - 9);
}

#[test]
fn a_request_waits_for_space_as_long_as_it_may_however_long_the_store_has_been_full() {
    let bench = Bench::new(4);
    bench.machine.disk.set_capacity(Some(3 << 20));
    let clock = bench.machine.disk.clock();
    let now = || Duration::from_nanos(cdp_store::clock::Clock::boot_ns(&clock));
    for number in 0..5000 {
        // What is ordered ahead of its use is refused for much longer than anybody may wait.
        clock.advance(Duration::from_secs(1));
        let _ = bench.machine.store().pool_step();
        let began = now();
        let Err(error) = bench.write(0, number % 1000, 5000 + number) else { continue };
        assert_eq!(error.kind(), IoErrorKind::NoSpace);
        let waited = now() - began;
        assert!(waited >= FULL_WAIT, "{waited:?} after {number} writes");
        return;
    }
    panic!("the disk never gets full");
}

#[test]
fn requests_end_where_no_segment_can_be_made_and_go_on_once_one_can() {
    // All files open that may be, and a file system that has become read-only.
    for errno in [libc::EMFILE, libc::EROFS] {
        let bench = Bench::new(4);
        let mut written = 0;
        while written < 60 {
            bench.write(0, written, 5000 + written).unwrap();
            written += 1;
        }
        bench.machine.disk.fail_rate(OpKind::Create, 1.0, errno);
        let error = loop {
            match bench.write(0, written % 1000, 5000 + written) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
            assert!(written < 5000, "the log needs no further segment");
        };
        assert!(
            error.kind() == IoErrorKind::Device && error.to_string().contains("no further segment"),
            "{error}"
        );
        assert_eq!(bench.write(0, 0, 1).unwrap_err().kind(), IoErrorKind::Device);
        for back in 1..50 {
            assert_eq!(
                bench.block(0, (written - back) % 1000).unwrap(),
                5000 + written - back,
                "reads go on"
            );
        }
        bench.machine.disk.clear_faults();
        let again =
            |bench: &Bench| bench.machine.store().pool_step().is_ok() && bench.write(0, 7, 77).is_ok();
        assert!((0..20).any(|_| again(&bench)), "it could be made, and writes fail all the same");
        assert_eq!(bench.block(0, 7).unwrap(), 77);
    }
}

#[test]
fn a_failed_write_ends_where_no_segment_can_be_made_for_its_cut() {
    let bench = Bench::new(4);
    bench.write(0, 0, 5000).unwrap();
    bench.machine.disk.fail_rate(OpKind::Create, 1.0, libc::EMFILE);
    bench.machine.disk.fail_nth(OpKind::Write, 0, libc::EIO);
    assert_eq!(bench.write(0, 1, 6000).unwrap_err().kind(), IoErrorKind::Device);
    assert_eq!(bench.block(0, 0).unwrap(), 5000);
}

#[test]
fn the_space_of_what_a_dead_process_had_prepared_is_there_for_the_opening_that_needs_it() {
    // Of two seeds one has a disk that sets blocks aside.
    for seed in [4, 5] {
        let mut bench = Bench::new(seed);
        bench.write(0, 0, 7).unwrap();
        while bench.machine.store().pool_step().unwrap() {}
        let files = bench.machine.disk.files();
        // Nothing is left, not even the reserve.
        bench.machine.fill_disk(0);
        bench.restart(Crash::Kill);
        let now = bench.machine.disk.files();
        let blank = files.iter().filter(|name| name.starts_with("segments/") && !now.contains(name)).count();
        assert!(blank > 0, "a dead process may still write to its blank files: {now:?}");
        assert_eq!(bench.block(0, 0).unwrap(), 7);
        bench.write(0, 1, 8).unwrap();
        assert_eq!(bench.block(0, 1).unwrap(), 8);
    }
}

#[test]
fn a_store_on_a_full_disk_opens_and_destroys() {
    let mut bench = Bench::new(5);
    bench.machine.disk.set_capacity(Some(6 << 20));
    bench.write(1, 0, 7).unwrap();
    for block in 0..200 {
        bench.write(0, block, 5000 + block).unwrap();
    }
    while bench.write(0, 0, 1).is_ok() {}
    bench.restart(Crash::Kill);
    assert_eq!((bench.block(0, 9).unwrap(), bench.block(1, 0).unwrap()), (5009, 7));
    bench.machine.store().destroy_volume(&bench.name(0), false).unwrap();
    let name = bench.name(0);
    bench.machine.volumes.remove(&name);
    bench.write(0, 1, 8).unwrap();
}

/// Submits a write, and waits until the log has it, but not for the completion.
fn log_a_write(bench: &Bench, queue: &mut dyn DeviceQueue, block: u64, origin: Origin) {
    let volume = bench.machine.volume(&bench.name(0));
    let before = volume.head().ordinal;
    queue.submit(RequestId(origin.0), write_op(block, origin.0, origin));
    let mut events = Vec::new();
    for _ in 0..10_000 {
        queue.poll(Wait::No, &mut events).unwrap();
        let _ = bench.machine.disk.step();
        let _ = bench.machine.store().pool_step();
        if volume.head().ordinal > before {
            return;
        }
    }
    panic!("the write never gets into the log");
}

#[test]
fn requests_in_the_log_are_recognised_through_two_kills_and_index_flushes() {
    let mut bench = Bench::new(6);
    let volume = bench.machine.volume(&bench.name(0));
    let mut queue = volume.open_queue().unwrap();
    let delivered = volume.new_origin();
    bench.run(&mut *queue, write_op(0, 1, delivered)).unwrap();
    let logged = volume.new_origin();
    log_a_write(&bench, &mut *queue, 1, logged);
    // Its completion lies in the queue, and nobody has been told: the index must not move past it, whatever follows.
    bench.write(0, 3, 33).unwrap();
    bench.machine.store().flush_index().unwrap();
    let never = volume.new_origin();
    drop(volume);
    for life in 0..3 {
        bench.machine.crash(Crash::Kill);
        drop(std::mem::replace(&mut queue, {
            bench.machine.open().unwrap();
            bench.machine.volume(&bench.name(0)).open_queue().unwrap()
        }));
        let volume = bench.machine.volume(&bench.name(0));
        let told = volume.survived(&[logged, never]);
        assert_eq!(told, [true, false], "invariant 1 violated: in life {life}");
        bench.write(0, 2, 100 + life).unwrap();
        bench.machine.store().flush_index().unwrap();
        assert_eq!(volume.survived(&[logged, never]), [true, false], "in life {life}, after an index flush");
    }
    assert_eq!(bench.block(0, 1).unwrap(), logged.0);
}

#[test]
fn a_queue_that_goes_away_holds_up_neither_the_others_nor_the_index() {
    let bench = Bench::new(7);
    let volume = bench.machine.volume(&bench.name(0));
    let mut stays = volume.open_queue().unwrap();
    for round in 0..50 {
        let mut goes = volume.open_queue().unwrap();
        let mut events = Vec::new();
        for block in 0..4 {
            goes.submit(RequestId(block), write_op(block, 1000 + round, Origin(0)));
        }
        goes.submit(RequestId(9), Op::Flush);
        for _ in 0..round % 7 {
            goes.poll(Wait::No, &mut events).unwrap();
            let _ = bench.machine.disk.step();
        }
        drop(goes);
        bench.run(&mut *stays, write_op(5, round + 1, Origin(0))).unwrap();
        bench.run(&mut *stays, Op::Flush).unwrap();
        assert_eq!(bench.block(0, 5).unwrap(), round + 1);
    }
    let mut events = Vec::new();
    stays.poll(Wait::For(Duration::from_millis(1)), &mut events).unwrap();
    bench.machine.store().flush_index().unwrap();
    assert_eq!(volume.indexed(), volume.head().seq, "the index waits for completions that nobody will fetch");
}

/// What is to become of a volume: back to an instant, or away.
type Fate = fn(&Store, &VolumeName, Seq) -> Result<(), Error>;

/// The record of a revert or a destruction may count although writing it has failed: the next opening finds out. What a
/// guest was told meanwhile would then be lost.
#[test]
fn a_volume_whose_fate_is_not_known_acknowledges_nothing() {
    let fates: [Fate; 2] = [
        |store, name, to| store.revert(&[(name.clone(), Instant::Seq(to))], false).map(drop),
        |store, name, _| store.destroy_volume(name, true),
    ];
    let cases = fates.into_iter().flat_map(|fate| [(fate, OpKind::Write), (fate, OpKind::Sync)]);
    let errors = [(libc::EIO, ErrorKind::Io), (libc::ENOSPC, ErrorKind::NoSpace)];
    for ((fate, kind), (errno, told)) in cases.flat_map(|case| errors.map(|error| (case, error))) {
        let mut bench = Bench::new(7);
        let name = bench.name(0);
        bench.write(0, 0, 1).unwrap();
        let to = bench.machine.store().volume_info(&name).unwrap().head.seq;
        bench.write(0, 0, 2).unwrap();
        bench.flush(0).unwrap();
        bench.machine.disk.fail_nth(kind, 0, errno);
        assert_eq!(fate(bench.machine.store(), &name, to).unwrap_err().kind(), told);
        assert!(
            bench.write(0, 1, 3).is_err(),
            "invariant 1 violated: {kind:?}, {told}: acknowledged, and perhaps lost"
        );
        assert_eq!(bench.block(0, 0).unwrap(), 2, "it can still be read");
        assert!(bench.write(1, 1, 3).is_ok(), "another volume has nothing to do with it");
        bench.restart(Crash::Kill);
        assert_eq!(bench.block(1, 1).unwrap(), 3);
    }
}

#[test]
fn requests_that_wait_for_a_cut_end_when_their_volume_is_destroyed() {
    let bench = Bench::new(1);
    bench.write(0, 0, 1).unwrap();
    let name = bench.name(0);
    let volume = bench.machine.volume(&name);
    let mut queue = volume.open_queue().unwrap();
    bench.machine.disk.fail_nth(OpKind::Write, 0, libc::ENOSPC);
    queue.submit(RequestId(1), write_op(1, 2, Origin(0)));
    let mut events = Vec::new();
    let poll = |queue: &mut dyn DeviceQueue, events: &mut Vec<Event>| {
        for _ in 0..100 {
            queue.poll(Wait::For(Duration::from_millis(1)), events).unwrap();
        }
    };
    // Its batch fails, and nobody supplies a segment for the cut.
    poll(&mut *queue, &mut events);
    assert!(events.is_empty(), "{events:?}");
    bench.machine.store().destroy_volume(&name, true).unwrap();
    poll(&mut *queue, &mut events);
    assert!(matches!(events[..], [Event::Completed { id: RequestId(1), result: Err(_) }]), "{events:?}");
    drop((queue, volume));
}

#[test]
fn a_change_of_the_store_that_lacks_space_fails_and_nothing_else_does() {
    // Its file system can set blocks aside.
    let mut bench = Bench::new(4);
    let name = bench.name(0);
    bench.write(0, 0, 1).unwrap();
    let to = bench.machine.store().volume_info(&name).unwrap().head.seq;
    bench.write(0, 0, 2).unwrap();
    let mark = |bench: &Bench| {
        let label = "here".parse().unwrap();
        bench.machine.store().mark(&name, &Instant::Seq(to), &label, BTreeMap::new()).map(drop)
    };
    let revert = |bench: &Bench| {
        let targets = [(name.clone(), Instant::Seq(to))];
        bench.machine.store().revert(&targets, false).map(drop)
    };
    bench.machine.disk.set_capacity(Some(0));
    for _ in 0..2 {
        for refused in [mark(&bench), revert(&bench)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::NoSpace);
        }
        bench.write(0, 1, 3).expect("the volume's own log has its space");
    }
    bench.machine.disk.set_capacity(None);
    mark(&bench).unwrap();
    revert(&bench).unwrap();
    bench.restart(Crash::PowerCut);
    assert_eq!((bench.block(0, 0).unwrap(), bench.block(0, 1).unwrap()), (1, 0));
    assert_eq!(bench.machine.store().volume_info(&name).unwrap().marks.len(), 1);
}

#[test]
fn a_cut_that_lacks_space_is_waited_for_and_then_given_up() {
    for gets_space in [true, false] {
        let bench = Bench::new(4);
        bench.write(0, 0, 1).unwrap();
        let volume = bench.machine.volume(&bench.name(0));
        let mut queue = volume.open_queue().unwrap();
        bench.machine.disk.set_capacity(Some(0));
        bench.machine.disk.fail_nth(OpKind::Write, 0, libc::ENOSPC);
        queue.submit(RequestId(1), write_op(1, 2, Origin(0)));
        let mut events = Vec::new();
        for _ in 0..20 {
            queue.poll(Wait::For(Duration::from_millis(1)), &mut events).unwrap();
            bench.machine.store().pool_step().unwrap();
        }
        assert!(events.is_empty() && volume.refusal().is_none(), "{events:?}, {:?}", volume.refusal());
        if gets_space {
            bench.machine.disk.set_capacity(None);
        }
        let ended = bench.wait(&mut *queue);
        assert_eq!((ended.is_ok(), volume.refusal().is_none()), (gets_space, gets_space), "{ended:?}");
        assert_eq!(bench.block(0, 0).unwrap(), 1);
    }
}
