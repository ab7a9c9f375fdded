//! What only shows from inside a queue of the past.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use super::*;
use crate::queue::HeadQueue;
use crate::queue::testing::{
    DEADLINE, foreign, in_time, pattern, portions, reads, run, store_of, store_with_volume, write,
};
use crate::{Store, StoreOptions};

/// What the volume holds now, for ever.
fn now(store: &Store, volume: &Arc<Volume>) -> Arc<Past> {
    let at = store.resolve(&"web1".parse().unwrap(), &cdp_types::Instant::Head).unwrap();
    let branch = volume.shared().branches.get(at.branch).unwrap();
    Past::new(Arc::clone(volume), branch, at.seq)
}

/// Notes so many reads that have ended as if they had done so at once.
fn gather(queue: &mut PastQueue, reads: usize) {
    let (mut ended, deadline) = (Vec::new(), Instant::now() + DEADLINE);
    while ended.len() < reads {
        in_time(deadline, |wait| queue.lane.poll(wait, &mut ended).unwrap());
    }
    for one in ended {
        if let Done::Io { token, result, .. } = one {
            queue.reader.ended(token, result);
        }
    }
}

#[test]
fn reads_that_end_together_are_reported_in_portions() {
    const BLOCKS: usize = 48;
    let directory = tempfile::tempdir().unwrap();
    let (store, volume) = store_with_volume(directory.path());
    let bytes = pattern(BLOCKS);
    run(&mut HeadQueue::new(Arc::clone(&volume)).unwrap(), vec![write(&bytes)]).unwrap();
    let past = now(&store, &volume);
    // Of known blocks no read leaves this thread.
    past.states(BlockRange::new(0, BLOCKS as u64)).unwrap();
    let mut queue = PastQueue::new(past).unwrap();
    let buffers: Vec<IoBuf> = (0..BLOCKS).map(|_| foreign(4096)).collect();
    reads(&buffers).for_each(|(id, op)| queue.submit(id, op));
    gather(&mut queue, BLOCKS);
    assert_eq!(portions(&mut queue, BLOCKS), [1, 2, 4, 8, 8, 8, 8, 8, 1]);
    assert!(buffers.iter().zip(bytes.chunks(4096)).all(|(into, block)| into.to_vec() == block));
    drop((queue, volume));
    store.close().unwrap();
}

#[test]
fn what_is_not_known_yet_is_looked_up_elsewhere_and_read_all_the_same() {
    const LEAVES: usize = 40;
    const LEAF_BYTES: u64 = FANOUT as u64 * cdp_types::BLOCK_SIZE;
    let directory = tempfile::tempdir().unwrap();
    let options = StoreOptions { segment_bytes: 4 << 20, ..StoreOptions::default() };
    let (store, volume) = store_of(directory.path(), LEAVES as u64 * LEAF_BYTES, options);
    let mut head = HeadQueue::new(Arc::clone(&volume)).unwrap();
    let content = |leaf: usize, version: u8| [leaf as u8 ^ version; 4096];
    let write_all = |head: &mut HeadQueue, version: u8| {
        let writes = (0..LEAVES).map(|leaf| {
            let from = IoBuf::from_bytes(&content(leaf, version));
            Op::Write { offset: leaf as u64 * LEAF_BYTES, from, fua: false, origin: cdp_types::Origin(0) }
        });
        run(head, writes.collect()).unwrap();
    };
    write_all(&mut head, 0);
    let past = now(&store, &volume);
    write_all(&mut head, 0x80);

    let buffers: Vec<IoBuf> = (0..LEAVES).map(|_| IoBuf::zeroed(4096)).collect();
    let ask_for_all = |queue: &mut PastQueue| {
        for (leaf, into) in (0..).zip(&buffers) {
            queue.submit(RequestId(leaf), Op::Read { offset: leaf * LEAF_BYTES, into: into.share() });
        }
    };
    let mut queue = PastQueue::new(past).unwrap();
    ask_for_all(&mut queue);
    // The first had this thread for itself.
    assert_eq!(queue.seeking.0.len(), LEAVES - 1);
    let (mut events, deadline) = (Vec::new(), Instant::now() + DEADLINE);
    while events.len() < LEAVES {
        assert!(Instant::now() < deadline, "{} of {LEAVES} have ended", events.len());
        queue.poll(Wait::For(Duration::from_secs(1)), &mut events).unwrap();
    }
    assert!(events.iter().all(|e| matches!(e, Event::Completed { result: Ok(()), .. })), "{events:?}");
    assert_eq!((queue.seeking.0.len(), queue.in_flight()), (0, 0));
    assert!(buffers.iter().enumerate().all(|(leaf, into)| into.to_vec() == content(leaf, 0)));

    // A queue may go while it is being looked for.
    let past = now(&store, &volume);
    let mut hasty = PastQueue::new(Arc::clone(&past)).unwrap();
    ask_for_all(&mut hasty);
    drop((hasty, queue, head, volume));
    store.close().unwrap();
    drop(past);
}
