//! What only shows from inside a queue.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{Store, StoreOptions, VolumeSpec};

#[test]
fn a_message_whose_wake_up_was_taken_is_not_slept_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
    Store::create(&path, &options).unwrap();
    let store = Store::open(&path, options).unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 512 };
    let volume = store.create_volume(&"web1".parse().unwrap(), spec).unwrap();
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
