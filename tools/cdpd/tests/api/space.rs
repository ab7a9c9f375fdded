//! What volumes cost before they are written.

use cdp_store::SegmentInfo;
use cdp_types::{VolumeId, VolumeName};
use cdpd::api::{Count, StoreStatus};
use cdpd::client::Step;
use hyper::Method;

use crate::guest::Guest;
use crate::{Bench, MIB};

/// Volumes to be made.
const VOLUMES: u64 = 200;
/// What each may cost, as docs/operations.md has it: a physical block of the store log.
const BLOCK_BYTES: u64 = 4096;
/// What files of logs are rounded up to.
const ROUNDING_BYTES: u64 = 64 << 10;
/// The store log's number among the volumes'.
const STORE_LOG: VolumeId = VolumeId(0);

impl Bench {
    fn status(&self) -> StoreStatus {
        self.client.get("/v1/store").unwrap()
    }

    /// The volumes that have files of their own, the store log left out.
    fn owners(&self) -> Vec<Option<VolumeName>> {
        let mut owners = Vec::new();
        let list = self.client.lines::<SegmentInfo, Count>(Method::GET, "/v1/segments", &mut |step| {
            if let Step::Item(segment) = step {
                owners.push((segment.volume, segment.volume_name));
            }
            true
        });
        let count = list.unwrap().unwrap().count;
        assert_eq!(count, owners.len() as u64);
        let volumes = owners.into_iter().filter(|(volume, _)| *volume != STORE_LOG);
        volumes.map(|(_, name)| name).collect()
    }
}

#[test]
fn a_volume_costs_a_record_of_the_store_log_until_it_is_written() {
    let mut bench = Bench::new();
    let before = bench.status().store;
    for number in 0..VOLUMES {
        bench.create(&format!("v{number}"), MIB << (number % 28)).unwrap();
    }
    let after = bench.status().store;
    assert_eq!(after.volumes, VOLUMES);
    let grown = after.log_bytes - before.log_bytes;
    assert!(grown <= VOLUMES * BLOCK_BYTES + ROUNDING_BYTES, "{grown} bytes for {VOLUMES} volumes");
    let owners = bench.owners();
    assert!(owners.is_empty(), "{owners:?}");

    // Nor does serving one, reading it, or opening the store again.
    let socket = bench.serve_here("v27");
    let mut guest = Guest::start(&socket);
    guest.read(64 << 10, 4096);
    guest.flush();
    drop(guest);
    bench.restart();
    let owners = bench.owners();
    assert!(owners.is_empty(), "{owners:?}");

    Guest::start(&socket).write(0, 4096);
    let written: VolumeName = "v27".parse().unwrap();
    assert_eq!(bench.owners(), [Some(written)]);
    bench.stop();
}
