//! What a log's state is after something failed.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::log::testing::context;
use crate::storage::sim::{OpKind, SimDisk};

#[test]
fn an_event_that_could_not_be_written_is_not_in_flight_for_ever() {
    const SEGMENT: u64 = 1 << 20;
    let disk = SimDisk::new(1);
    let context = context(&disk, SEGMENT);
    let mut log = LogState::new(VolumeId(1), BranchId(1), &LogEnd::EMPTY, None);
    assert!(log.supply(context.segments.create(SEGMENT).unwrap()).is_none());
    let event = || Record::event(RecordKind::Durable, 0);
    log.append_synced(&context, event(), Vec::new()).unwrap();
    assert!(!log.had_failures());
    disk.fail_nth(OpKind::Write, 0, libc::EIO);
    assert!(log.append_synced(&context, event(), Vec::new()).is_err());
    assert!(log.poisoned().is_some());
    assert!(log.had_failures(), "its file would be used again, although the write may land late");
    assert_eq!((log.in_flight(), log.first_unacknowledged(), log.acked()), (0, None, Ordinal(1)));
}
