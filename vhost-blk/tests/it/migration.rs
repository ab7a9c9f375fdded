//! The log of written pages.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

use crate::guest::*;
use crate::{Fixture, slow};

/// Bytes of log that cover all of the guest's memory.
const LOG_LEN: u64 = (BASE + MEMORY_LEN) / 4096 / 8;

struct Log(File);

impl Log {
    fn new(len: u64) -> Self {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Self(file)
    }

    fn region(&self, len: u64) -> Option<VhostUserDirtyLogRegion> {
        Some(VhostUserDirtyLogRegion { mmap_size: len, mmap_offset: 0, mmap_handle: self.0.as_raw_fd() })
    }

    /// The pages that are marked; the marks are removed.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; LOG_LEN as usize];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        self.0.write_all_at(&vec![0; bytes.len()], 0).unwrap();
        (0..8 * LOG_LEN).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
    }
}

fn switch(guest: &mut Guest, on: bool) {
    let features = if on { guest.features | F_LOG_ALL } else { guest.features & !F_LOG_ALL };
    let Guest { connection, rings, .. } = guest;
    let frontend = connection.as_mut().unwrap();
    frontend.set_features(features).unwrap();
    for ring in rings.iter() {
        frontend.set_vring_addr(ring.index, &ring.config(on.then_some(ring.used()))).unwrap();
    }
}

#[test]
fn exactly_what_the_device_writes_is_marked_and_only_while_logging_is_on() {
    for without in [0, F_EVENT_IDX] {
        let fixture = Fixture::new(1 << 20, Some(slow(8)));
        let mut guest = Guest::start(&fixture.socket(), Options { without, ..Options::default() });
        let log = Log::new(LOG_LEN);
        // The guest has negotiated LOG_ALL, but there is no log yet.
        assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
        switch(&mut guest, false);
        guest.frontend().set_log_base(0, log.region(LOG_LEN)).unwrap();
        assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
        assert_eq!(log.take(), BTreeSet::new(), "logging is off");

        switch(&mut guest, true);
        log.take();
        let page = |addr: u64| addr / 4096;
        let (status, used, data) =
            (page(guest.status_addr(0, 0)), page(guest.rings[0].used()), page(guest.data(0, 0)));
        assert_eq!(guest.request(OUT, 0, &[2; 8192], 0).0, OK);
        assert_eq!(log.take(), BTreeSet::from([status, used]), "a write changes no data in memory");
        assert_eq!(guest.request(IN, 0, &[], 8192).0, OK);
        assert_eq!(log.take(), BTreeSet::from([status, used, data, data + 1]));
        assert_eq!(guest.request(99, 0, &[], 8192).0, UNSUPP);
        assert_eq!(log.take(), BTreeSet::from([status, used]), "nothing is read for what is no request");

        switch(&mut guest, false);
        log.take();
        assert_eq!(guest.request(IN, 0, &[], 8192).0, OK);
        assert_eq!(log.take(), BTreeSet::new());
    }
}

/// With requests in flight all the time, logging is switched, and the log replaced: every page that was read into
/// while it was on is in one of the logs.
#[test]
fn logging_is_switched_and_replaced_under_load_without_losing_a_mark() {
    let fixture = Fixture::new(1 << 20, Some(slow(9)));
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 2, ..Options::default() });
    let logs = [Log::new(LOG_LEN), Log::new(LOG_LEN)];
    guest.frontend().set_log_base(0, logs[0].region(LOG_LEN)).unwrap();
    for round in 0..30 {
        switch(&mut guest, true);
        let mut marked = BTreeSet::new();
        for slot in 0..16 {
            for ring in 0..2 {
                guest.put(ring, slot, IN, 0, &[], 4096);
                guest.rings[ring].submit(1);
            }
            if slot == 8 {
                let region = logs[(round + 1) % 2].region(LOG_LEN);
                guest.frontend().set_log_base(0, region).unwrap();
                marked.append(&mut logs[round % 2].take());
            }
        }
        let target = guest.rings[0].added;
        for ring in 0..2 {
            while guest.rings[ring].seen != target {
                guest.rings[ring].wait();
            }
        }
        marked.append(&mut logs[(round + 1) % 2].take());
        for slot in 0..16 {
            for ring in 0..2 {
                assert_eq!(guest.status(ring, slot), OK);
                assert!(marked.contains(&(guest.data(ring, slot) / 4096)), "round {round}, {ring}, {slot}");
            }
        }
        assert_eq!(logs[round % 2].take(), BTreeSet::new(), "the old log is left alone");
        switch(&mut guest, false);
        logs[(round + 1) % 2].take();
    }
}

#[test]
fn memory_that_the_log_does_not_cover_is_refused() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let log = Log::new(LOG_LEN);
    guest.frontend().set_log_base(0, log.region(LOG_LEN)).unwrap();
    switch(&mut guest, true);
    let more =
        VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 40, userspace_addr: 4096, ..guest.memory.region() };
    assert!(guest.frontend().add_mem_region(&more).is_err());
    let config = guest.rings[0].config(Some(LOG_LEN * 8 * 4096 - 16));
    assert!(guest.frontend().set_vring_addr(0, &config).is_err(), "the used ring is logged past the end");
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);

    // A log that is too short has no answer that says no, so the connection ends.
    assert!(guest.frontend().set_log_base(0, log.region(LOG_LEN - 1)).is_err());
    assert!(guest.frontend().get_features().is_err());
    drop(guest);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    guest.frontend().set_log_base(0, log.region(LOG_LEN - 1)).unwrap();
    let features = guest.features | F_LOG_ALL;
    assert!(guest.frontend().set_features(features).is_err(), "too short when logging is switched on");
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

/// As QEMU does it when a disk stands still: it says that writes are logged, and what memory there is, before it sends the
/// log.
#[test]
fn a_ring_waits_for_a_log_that_covers_the_memory_and_then_starts() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    // A migration that is given up; then memory is plugged, and the machine stopped.
    let log = Log::new(LOG_LEN);
    guest.frontend().set_log_base(0, log.region(LOG_LEN)).unwrap();
    switch(&mut guest, true);
    switch(&mut guest, false);
    let more =
        VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 30, userspace_addr: 4096, ..guest.memory.region() };
    guest.frontend().add_mem_region(&more).unwrap();
    let base = guest.frontend().get_vring_base(0).unwrap() as u16;

    let features = guest.features | F_LOG_ALL;
    guest.frontend().set_features(features).unwrap();
    let regions = [guest.memory.region(), more];
    guest.frontend().set_mem_table(&regions).unwrap();
    guest.put(0, 0, IN, 0, &[], 512);
    guest.rings[0].submit(1);
    let Guest { connection, rings, .. } = &mut guest;
    let frontend = connection.as_mut().unwrap();
    start_ring(frontend, &rings[0], base);
    frontend.set_vring_addr(0, &rings[0].config(Some(rings[0].used()))).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rings[0].used_index(), base, "what it would write would not be migrated");

    let log_len = ((1 << 30) + MEMORY_LEN) / 4096 / 8;
    let log = Log::new(log_len);
    frontend.set_log_base(0, log.region(log_len)).unwrap();
    assert_eq!(rings[0].wait().len(), 1);
    assert_eq!(guest.status(0, 0), OK);
    assert!(log.take().contains(&(guest.data(0, 0) / 4096)));
}
