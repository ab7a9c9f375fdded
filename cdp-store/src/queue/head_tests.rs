//! What only shows from inside a queue of a head.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use super::*;
use crate::StoreOptions;
use crate::queue::testing::{
    DEADLINE, foreign, in_time, pattern, portions, reads, run, store_of, store_with_volume, write,
};

/// Waits until the queue's lane has ended so many operations.
fn gather(queue: &mut HeadQueue, operations: usize) {
    let deadline = Instant::now() + DEADLINE;
    while queue.done.len() < operations {
        in_time(deadline, |wait| queue.lane.poll(wait, &mut queue.done).unwrap());
    }
}

#[test]
fn reads_that_end_together_are_reported_in_portions() {
    const BLOCKS: usize = 48;
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let bytes = pattern(BLOCKS);
    run(&mut queue, vec![write(&bytes)]).unwrap();
    let buffers: Vec<IoBuf> = (0..BLOCKS).map(|_| foreign(4096)).collect();
    reads(&buffers).for_each(|(id, op)| queue.submit(id, op));
    gather(&mut queue, BLOCKS);
    assert_eq!(portions(&mut queue, BLOCKS), [1, 2, 4, 8, 8, 8, 8, 8, 1]);
    assert!(buffers.iter().zip(bytes.chunks(4096)).all(|(into, block)| into.to_vec() == block));
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn what_is_unchecked_of_a_single_read_is_not_slept_over() {
    const BLOCKS: usize = 24;
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let bytes = pattern(BLOCKS);
    // From the last to the first, so that no block lies behind the one before it.
    let writes = (0..BLOCKS).rev().map(|nth| {
        let (from, origin) = (IoBuf::from_bytes(&bytes[nth * 4096..][..4096]), cdp_types::Origin(0));
        Op::Write { offset: nth as u64 * 4096, from, fua: false, origin }
    });
    run(&mut queue, writes.collect()).unwrap();
    let into = foreign(bytes.len());
    queue.submit(RequestId(0), Op::Read { offset: 0, into: into.share() });
    gather(&mut queue, BLOCKS);
    // Each poll checks two portions, since the first of them ends nothing: 1 and 2, 4 and 8, 8 and the last block.
    assert_eq!(portions(&mut queue, 1), [0, 0, 1]);
    assert!(into.to_vec() == bytes);
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn memory_that_a_dropped_queue_has_borrowed_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    run(&mut queue, vec![write(&pattern(64))]).unwrap();
    queue.submit(RequestId(0), Op::Read { offset: 0, into: foreign(256 << 10) });
    let landings = Arc::clone(&volume.shared().landings);
    assert_eq!(landings.made_bytes() - landings.free_bytes(), 256 << 10);
    drop(queue);
    assert_eq!(landings.made_bytes(), landings.free_bytes());
    drop(volume);
    store.close().unwrap();
}

#[test]
fn large_reads_of_a_guest_are_checked_wherever_they_land() {
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let bytes = pattern(64);
    run(&mut queue, vec![write(&bytes)]).unwrap();
    for (offset, len) in [(0, 256 << 10), (4096, 40 << 10), (512, 33 << 10), (8192 + 1024, 512)] {
        let into = foreign(len);
        run(&mut queue, vec![Op::Read { offset, into: into.share() }]).unwrap();
        assert!(into.to_vec() == bytes[offset as usize..][..len], "{len} bytes from {offset}");
    }
    assert_eq!(volume.shared().landings.made_bytes(), 2 << 20, "none of them has landed where it should");
    rot(directory.path(), &bytes[40 * 4096..41 * 4096]);
    for (blocks, good) in [(0..40, true), (0..64, false), (36..44, false), (40..41, false), (41..64, true)] {
        let into = foreign(blocks.len() * 4096);
        let read = run(&mut queue, vec![Op::Read { offset: blocks.start as u64 * 4096, into }]);
        assert_eq!(read.map_err(|e| e.kind()), if good { Ok(()) } else { Err(IoErrorKind::Corrupt) });
    }
    drop((queue, volume));
    store.close().unwrap();
}

/// Flips a bit of this block, wherever it lies in the store's segments.
fn rot(directory: &Path, block: &[u8]) {
    let segments = std::fs::read_dir(directory.join("store/segments")).unwrap();
    let mut found = 0;
    for segment in segments.map(|entry| entry.unwrap().path()) {
        let content = std::fs::read(&segment).unwrap();
        let file = OpenOptions::new().write(true).open(&segment).unwrap();
        for at in (0..content.len()).step_by(4096).filter(|&at| content[at..].starts_with(block)) {
            file.write_all_at(&[block[7] ^ 1], at as u64 + 7).unwrap();
            file.sync_all().unwrap();
            found += 1;
        }
    }
    assert_eq!(found, 1, "the block lies in one place");
}

#[test]
fn a_message_whose_wake_up_was_taken_is_not_slept_over() {
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    queue.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!(queue.arm().unwrap(), Wait::Forever);
    queue.poll(Wait::No, &mut Vec::new()).unwrap();
    // As when a message comes between a poll's last look into the inbox and the last that it asks of its lane.
    queue.inbox.send(Mail::Retry, None);
    queue.lane.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!(queue.arm().unwrap(), Wait::No);
    queue.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!(queue.arm().unwrap(), Wait::Forever);
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn a_message_that_was_taken_and_not_acted_on_is_not_slept_over() {
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    run(&mut queue, vec![write(&pattern(1))]).unwrap();
    // As when somebody else's sync ends, for which a flush waits, between `pump`'s last step and its last look at the inbox.
    let (somebody, deadline) = (Inbox::nobody(), Instant::now() + DEADLINE);
    let plan = loop {
        let plan = volume.log().begin_sync(&somebody);
        if let Some(plan) = plan {
            break plan;
        }
        // The store's own thread is at it.
        assert!(Instant::now() < deadline, "its sync does not end");
        std::thread::yield_now();
    };
    run(&mut queue, vec![write(&pattern(2))]).unwrap();
    queue.submit(RequestId(9), Op::Flush);
    queue.pump().unwrap();
    plan.segments.iter().for_each(|segment| segment.file.sync().unwrap());
    for waiter in volume.log().end_sync(&plan, Ok(())) {
        waiter.send(Mail::Retry, None);
    }
    queue.take_mail();
    queue.lane.poll(Wait::No, &mut Vec::new()).unwrap();
    assert_eq!(queue.arm().unwrap(), Wait::No);
    let mut events = Vec::new();
    let deadline = Instant::now() + DEADLINE;
    while events.is_empty() {
        in_time(deadline, |wait| queue.poll(wait, &mut events).unwrap());
    }
    assert!(matches!(events[..], [Event::Completed { id: RequestId(9), result: Ok(()) }]), "{events:?}");
    queue.poll(Wait::No, &mut events).unwrap();
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn a_request_may_have_more_edges_than_leaves_are_cached() {
    const LEAF: u64 = 512 * 4096;
    const LEAVES: u64 = 40;
    let directory = tempfile::tempdir().unwrap();
    let options = StoreOptions { map_budget_bytes: 0, segment_bytes: 4 << 20, ..StoreOptions::default() };
    let (store, volume) = store_of(directory.path(), LEAVES * LEAF, options);
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let origin = cdp_types::Origin(0);
    let zeroes = |from: u64| {
        let ranges = (0..LEAVES).map(|leaf| ByteRange::new(leaf * LEAF + from, 512)).collect();
        Op::WriteZeroes { ranges, unmap: false, fua: false, origin }
    };
    // Nothing has ever been written; then every block that is touched lies in the log.
    run(&mut queue, vec![zeroes(512)]).unwrap();
    let ones = |leaf| {
        let from = IoBuf::from_bytes(&[1; 4096]);
        Op::Write { offset: leaf * LEAF, from, fua: false, origin }
    };
    run(&mut queue, (0..LEAVES).map(ones).collect()).unwrap();
    run(&mut queue, vec![zeroes(1024)]).unwrap();
    for leaf in 0..LEAVES {
        let into = IoBuf::zeroed(4096);
        run(&mut queue, vec![Op::Read { offset: leaf * LEAF, into: into.share() }]).unwrap();
        let bytes = into.to_vec();
        assert!(bytes[1024..1536].iter().all(|byte| *byte == 0), "leaf {leaf}");
        assert!(bytes[..1024].iter().chain(&bytes[1536..]).all(|byte| *byte == 1), "leaf {leaf}");
    }
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn requests_behind_discards_of_less_than_a_block_are_not_refused() {
    let directory = tempfile::tempdir().unwrap();
    let options = StoreOptions { batch_bytes: 64 << 10, segment_bytes: 1 << 20, ..StoreOptions::default() };
    let (store, volume) = store_of(directory.path(), 1 << 20, options);
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let discard = || {
        let ranges = [ByteRange::new(512, 1024)].into_iter().collect();
        Op::Discard { ranges, origin: cdp_types::Origin(0) }
    };
    // A write that is larger than a batch usually is; and more discards than are taken at once.
    for (discards, blocks) in [(1, 32), (40, 1), (40, 32)] {
        let bytes = pattern(blocks);
        let ops: Vec<Op> = (0..discards).map(|_| discard()).chain([write(&bytes)]).collect();
        run(&mut queue, ops).unwrap();
        let into = IoBuf::zeroed(bytes.len());
        run(&mut queue, vec![Op::Read { offset: 0, into: into.share() }]).unwrap();
        assert!(into.to_vec() == bytes, "{blocks} blocks behind {discards} discards");
    }
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn a_request_that_does_not_fit_into_a_segment_that_is_hardly_used_gets_another() {
    let directory = tempfile::tempdir().unwrap();
    // So that a log's first segment, of 4 MiB, is shorter than two of its longest requests.
    let options = StoreOptions { segment_bytes: 16 << 20, pool_segments: 0, ..StoreOptions::default() };
    let (store, volume) = store_of(directory.path(), 4 << 20, options);
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let longest = pattern(volume.shared().tuning.max_request_bytes as usize / 4096);
    assert_eq!(longest.len(), 4 << 20);
    run(&mut queue, vec![write(&longest[..4096])]).unwrap();
    run(&mut queue, vec![write(&longest)]).unwrap();
    let into = IoBuf::zeroed(longest.len());
    run(&mut queue, vec![Op::Read { offset: 0, into: into.share() }]).unwrap();
    assert!(into.to_vec() == longest);
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn a_request_that_waits_for_a_segment_is_counted_once() {
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    // A log has none before its first request. One of these changes a part of a block, the other a whole one.
    for (bytes, written) in [(512, 512), (4096, 4608)] {
        run(&mut queue, vec![write(&pattern(1)[..bytes])]).unwrap();
        assert_eq!(volume.counters().written_bytes.load(Memory::Relaxed), written);
    }
    assert_eq!(volume.counters().writes.load(Memory::Relaxed), 2);
    drop((queue, volume));
    store.close().unwrap();
}
