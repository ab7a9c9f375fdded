//! What each request does, and what it is answered.

use std::sync::Arc;

use cdp_types::{ByteRange, MemoryConfig, NoVmControl};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::guest::*;
use crate::{Fixture, slow};

fn set_writeback(guest: &mut Guest, on: bool) {
    guest.frontend().set_config(32, VhostUserConfigFlags::empty(), &[on.into()]).unwrap();
}

#[test]
fn data_written_is_read_back_with_every_combination_of_ring_features() {
    for without in [0, F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX | F_INDIRECT] {
        let fixture = Fixture::new(1 << 20, Some(slow(1)));
        let mut guest =
            Guest::start(&fixture.socket(), Options { without: without | F_LOG_ALL, ..Options::default() });
        let data: Vec<u8> = (0..8192u32).map(|byte| (byte * 7) as u8).collect();
        assert_eq!(guest.request(OUT, 24, &data, 0).0, OK);
        assert_eq!(fixture.disk.content(ByteRange::new(24 * 512, 8192)).unwrap(), data);
        assert_eq!(guest.request(IN, 24, &[], 8192), (OK, data));
        assert_eq!(guest.request(FLUSH, 0, &[], 0).0, OK);
        assert_eq!(fixture.disk.flushes(), 1);
    }
}

#[test]
fn discard_and_write_zeroes_take_many_ranges_and_refuse_what_the_specification_refuses() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(OUT, 0, &[9; 0x8000], 0).0, OK);

    let ranges = [range(1, 2, 1), range(16, 1, 0)].concat();
    assert_eq!(guest.request(WRITE_ZEROES, 0, &ranges, 0).0, OK);
    let ranges = [range(24, 8, 0), range(33, 6, 0), range(48, 16, 0)].concat();
    assert_eq!(guest.request(DISCARD, 0, &ranges, 0).0, OK);
    let mut expected = vec![9; 0x8000];
    // A discard of less than a block (33..39) changes nothing.
    for (sector, sectors) in [(1, 2), (16, 1), (24, 8), (48, 16)] {
        expected[sector * 512..(sector + sectors) * 512].fill(0);
    }
    assert_eq!(fixture.disk.content(ByteRange::new(0, 0x8000)).unwrap(), expected);

    for (kind, ranges, status) in [
        (DISCARD, range(0, 8, 1), UNSUPP),
        (DISCARD, range(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, range(0, 8, 2), UNSUPP),
        (DISCARD, range(0, 0, 0), IOERR),
        (WRITE_ZEROES, range(2047, 2, 0), IOERR),
        (WRITE_ZEROES, range(u64::MAX, 1, 0), IOERR),
        (DISCARD, range(0, 8, 0)[..15].to_vec(), IOERR),
        (DISCARD, Vec::new(), IOERR),
        (DISCARD, range(0, 1, 0).repeat(257), IOERR),
    ] {
        assert_eq!(guest.request(kind, 0, &ranges, 0).0, status, "{kind} {ranges:?}");
    }
    assert_eq!(
        fixture.disk.content(ByteRange::new(0, 0x8000)).unwrap(),
        expected,
        "refused, so nothing done"
    );
}

#[test]
fn the_id_is_padded_and_unknown_types_are_not_supported() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let mut id = b"memory".to_vec();
    id.resize(20, 0);
    assert_eq!(guest.request(GET_ID, 0, &[], 20), (OK, id));
    assert_eq!(guest.request(GET_ID, 0, &[], 3), (OK, b"mem".to_vec()));
    for kind in [2, 3, 9, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[1; 512], 0).0, UNSUPP, "{kind}");
    }
}

#[test]
fn what_lies_outside_the_disk_or_off_its_blocks_is_an_error() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    for (kind, sector, len) in [
        (IN, 2048, 512),
        (IN, 2047, 1024),
        (IN, u64::MAX, 512),
        (IN, u64::MAX / 512, 512),
        (IN, 0, 513),
        (IN, 0, 0),
        (OUT, 2048, 512),
        (OUT, 0, 100),
        (OUT, 0, 0),
    ] {
        let (out, into) = if kind == OUT { (vec![1; len as usize], 0) } else { (Vec::new(), len) };
        assert_eq!(guest.request(kind, sector, &out, into).0, IOERR, "{kind} {sector} {len}");
    }
    assert_eq!(guest.request(IN, 2047, &[], 512), (OK, vec![0; 512]), "the last sector is there");
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut config = MemoryConfig::new(1 << 20);
    config.info.read_only = true;
    let fixture = Fixture::with(config, Arc::new(NoVmControl));
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.features & 1 << 5, 1 << 5, "RO");
    assert_eq!(guest.features & (1 << 13 | 1 << 14 | F_CONFIG_WCE), 0);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &range(0, 8, 0), 0).0, IOERR);
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

#[test]
fn writes_are_durable_at_once_while_the_write_cache_is_off_or_flushes_are_not_negotiated() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 0);
    set_writeback(&mut guest, false);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &range(0, 8, 0), 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 2);
    set_writeback(&mut guest, true);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 2);
    drop(guest);

    let options = Options { without: F_FLUSH | F_LOG_ALL, ..Options::default() };
    let mut guest = Guest::start(&fixture.socket(), options);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 3);
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    for (offset, bytes) in [(0, vec![0; 8]), (32, vec![2]), (32, vec![0, 0]), (31, vec![0]), (100, vec![1])] {
        let flags = VhostUserConfigFlags::empty();
        assert!(guest.frontend().set_config(offset, flags, &bytes).is_err(), "{offset} {bytes:?}");
    }
    assert_eq!(guest.request(FLUSH, 0, &[], 0).0, OK, "the connection goes on");
}

#[test]
fn statistics_count_what_was_done() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    guest.request(OUT, 0, &[1; 4096], 0);
    guest.request(IN, 0, &[], 512);
    guest.request(IN, 9999, &[], 512);
    guest.request(FLUSH, 0, &[], 0);
    guest.request(77, 0, &[], 0);
    let stats = fixture.server.stats();
    assert!(stats.connected && stats.greeted);
    assert_eq!((stats.connections, stats.queues.len()), (1, 4));
    let queue = stats.queues[0];
    assert_eq!((queue.writes, queue.reads, queue.flushes, queue.others, queue.errors), (1, 2, 1, 1, 2));
    assert_eq!((queue.bytes_written, queue.bytes_read, queue.in_flight), (4096, 512, 0));
    assert!(queue.interrupts > 0);
}
