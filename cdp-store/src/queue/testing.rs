//! What the tests of queues share.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_types::{DeviceQueue, Event, IoBuf, IoError, Op, RequestId, Wait};

use crate::volume::Volume;
use crate::{Store, StoreOptions, VolumeSpec};

/// What a test waits for must have come by then.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Calls `poll` with how long it may sleep at most: by then what it waits for has come, or it never will.
pub fn in_time(deadline: Instant, poll: impl FnOnce(Wait)) {
    poll(Wait::For(deadline.saturating_duration_since(Instant::now())));
    assert!(Instant::now() < deadline, "what is waited for does not come");
}

/// A store in `directory`, with one volume of a MiB.
pub fn store_with_volume(directory: &Path) -> (Store, Arc<Volume>) {
    store_of(directory, 1 << 20, StoreOptions { segment_bytes: 1 << 20, ..StoreOptions::default() })
}

/// A store in `directory` that is opened like this, with one volume of this size.
pub fn store_of(directory: &Path, size_bytes: u64, options: StoreOptions) -> (Store, Arc<Volume>) {
    let path = directory.join("store");
    let options = StoreOptions { reserve_bytes: 0, ..options };
    Store::create(&path, &options).unwrap();
    let store = Store::open(&path, options).unwrap();
    let spec = VolumeSpec { size_bytes, logical_block_size: 512 };
    let volume = store.create_volume(&"web1".parse().unwrap(), spec).unwrap();
    (store, volume)
}

/// Has the queue do all of this.
pub fn run(queue: &mut dyn DeviceQueue, ops: Vec<Op>) -> Result<(), IoError> {
    let (mut left, deadline) = (ops.len(), Instant::now() + DEADLINE);
    (0..).zip(ops).for_each(|(id, op)| queue.submit(RequestId(id), op));
    let mut events = Vec::new();
    while left > 0 {
        in_time(deadline, |wait| queue.poll(wait, &mut events).unwrap());
        left -= events.len();
        for event in events.drain(..) {
            if let Event::Completed { result, .. } = event {
                result?;
            }
        }
    }
    Ok(())
}

/// Bytes that differ from block to block.
pub fn pattern(blocks: usize) -> Vec<u8> {
    (0..blocks * 4096).map(|at| (at / 4096 * 31 + at % 251) as u8).collect()
}

/// A write of these from the start.
pub fn write(bytes: &[u8]) -> Op {
    Op::Write { offset: 0, from: IoBuf::from_bytes(bytes), fua: false, origin: cdp_types::Origin(0) }
}

/// Memory as a guest's.
pub fn foreign(len: usize) -> IoBuf {
    let memory = IoBuf::zeroed(len);
    // SAFETY: all of it is in `memory`, which is the owner.
    unsafe { IoBuf::new(memory.segments().iter().copied().collect(), Arc::new(memory.share())) }
}

/// Reads of the first blocks, one by one.
pub fn reads(buffers: &[IoBuf]) -> impl Iterator<Item = (RequestId, Op)> {
    let reads =
        (0..).zip(buffers).map(|(nth, into)| (nth, Op::Read { offset: nth * 4096, into: into.share() }));
    reads.map(|(nth, op)| (RequestId(nth), op))
}

/// How many requests the next polls end, while the queue says that it has something.
pub fn portions(queue: &mut dyn DeviceQueue, requests: usize) -> Vec<usize> {
    let (mut events, mut portions) = (Vec::new(), Vec::new());
    while portions.iter().sum::<usize>() < requests {
        assert_eq!(queue.arm().unwrap(), Wait::No, "after {portions:?} of {requests}");
        queue.poll(Wait::For(DEADLINE), &mut events).unwrap();
        assert!(events.iter().all(|e| matches!(e, Event::Completed { result: Ok(()), .. })), "{events:?}");
        portions.push(events.drain(..).count());
    }
    portions
}
