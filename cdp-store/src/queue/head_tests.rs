//! What only shows from inside a queue.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::{Store, StoreOptions, VolumeSpec};

/// A store in `directory`, with one volume of a MiB.
fn store_with_volume(directory: &Path) -> (Store, Arc<Volume>) {
    let path = directory.join("store");
    let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
    Store::create(&path, &options).unwrap();
    let store = Store::open(&path, options).unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 512 };
    let volume = store.create_volume(&"web1".parse().unwrap(), spec).unwrap();
    (store, volume)
}

/// Has the queue do all of this, and returns how many requests each poll has ended.
fn run(queue: &mut HeadQueue, ops: Vec<Op>) -> Result<Vec<usize>, IoError> {
    let mut left = ops.len();
    (0..).zip(ops).for_each(|(id, op)| queue.submit(RequestId(id), op));
    let (mut events, mut portions) = (Vec::new(), Vec::new());
    while left > 0 {
        queue.poll(Wait::Forever, &mut events).unwrap();
        left -= events.len();
        portions.push(events.len());
        for event in events.drain(..) {
            if let Event::Completed { result, .. } = event {
                result?;
            }
        }
    }
    Ok(portions)
}

fn pattern(blocks: usize) -> Vec<u8> {
    (0..blocks * 4096).map(|at| (at / 4096 * 31 + at % 251) as u8).collect()
}

fn write(bytes: &[u8]) -> Op {
    Op::Write { offset: 0, from: IoBuf::from_bytes(bytes), fua: false, origin: cdp_types::Origin(0) }
}

/// Memory as a guest's.
fn foreign(len: usize) -> IoBuf {
    let memory = IoBuf::zeroed(len);
    // SAFETY: all of it is in `memory`, which is the owner.
    unsafe { IoBuf::new(memory.segments().iter().copied().collect(), Arc::new(memory.share())) }
}

#[test]
fn reads_that_end_together_are_reported_in_portions_and_none_is_slept_over() {
    const BLOCKS: usize = 48;
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let mut queue = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let bytes = pattern(BLOCKS);
    run(&mut queue, vec![write(&bytes)]).unwrap();
    let buffers: Vec<IoBuf> = (0..BLOCKS).map(|_| foreign(4096)).collect();
    let reads = (0..).step_by(4096).zip(&buffers);
    let reads = reads.map(|(offset, into)| Op::Read { offset, into: into.share() }).collect();
    let portions = run(&mut queue, reads).unwrap();
    assert!(portions.iter().all(|ended| *ended <= 8), "{portions:?}");
    assert!(buffers.iter().zip(bytes.chunks(4096)).all(|(into, block)| into.to_vec() == block));
    drop((queue, volume));
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
    rot(directory.path(), &bytes[40 * 4096..41 * 4096]);
    for (blocks, good) in [(0..40, true), (0..64, false), (36..44, false), (40..41, false), (41..64, true)] {
        let into = foreign(blocks.len() * 4096);
        let read = run(&mut queue, vec![Op::Read { offset: blocks.start as u64 * 4096, into }]);
        assert_eq!(
            read.map(drop).map_err(|e| e.kind()),
            if good { Ok(()) } else { Err(IoErrorKind::Corrupt) }
        );
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
