//! Requests, in all three kinds of headers.

use std::time::Duration;

use crate::client::{Client, Headers, cmd, flag, opt, question, rep};
use crate::fixture::{CAPACITY, EXTENT, Fixture, late};

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];
const PERM: u32 = 1;
const INVAL: u32 = 22;
const NOSPC: u32 = 28;
const OVERFLOW: u32 = 75;

#[test]
fn every_command_does_what_it_says() {
    for headers in ALL {
        let fixture = Fixture::new();
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        let data: Vec<u8> = (0..200_000_u32 / 512 * 512).map(|byte| byte as u8 | 1).collect();
        assert_eq!(client.write(0, 4096, &data), 0);
        assert_eq!(client.read(4096, data.len() as u64), data);
        assert_eq!(fixture.content(4096, data.len() as u64), data);

        assert_eq!(fixture.exports.disk.flushes(), 0);
        assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).error, 0);
        assert_eq!(client.write(flag::FUA, 0, &[1; 512]), 0);
        assert_eq!(client.call(cmd::TRIM, flag::FUA, 4096, 4096).error, 0);
        assert_eq!(client.call(cmd::WRITE_ZEROES, flag::FUA | flag::NO_HOLE, 8192, 4096).error, 0);
        assert_eq!(fixture.exports.disk.flushes(), 4, "a flush, and one for each FUA");

        assert_eq!(client.call(cmd::WRITE_ZEROES, flag::FAST_ZERO, 12288, 512).error, 0);
        assert_eq!(client.call(cmd::CACHE, 0, 0, CAPACITY).error, 0);
        assert_eq!(fixture.content(4096, 8704), [0; 8704]);
        assert_eq!(client.read(12800, 512), fixture.content(12800, 512));
        client.start(cmd::DISC, 0, 0, 0);
        assert!(client.is_closed());
        fixture.nobody_is_left();
    }
}

#[test]
fn requests_without_length_are_done_at_once() {
    let fixture = Fixture::new();
    for headers in ALL {
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
            assert_eq!(client.call(command, 0, 512, 0).error, 0);
        }
        assert_eq!(client.write(0, 512, &[]), 0);
    }
}

#[test]
fn what_cannot_be_done_is_said_to_be_wrong_and_the_stream_stays_in_step() {
    let fixture = Fixture::new();
    for headers in ALL {
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        let overflow = if headers == Headers::Simple { INVAL } else { OVERFLOW };
        let cases = [
            (cmd::READ, 0, 1, 512, INVAL),
            (cmd::READ, 0, 0, 511, INVAL),
            (cmd::READ, 0, CAPACITY, 512, INVAL),
            (cmd::READ, 0, u64::MAX - 511, 512, INVAL),
            (cmd::READ, 0, 0, 33 << 20, overflow),
            (cmd::READ, flag::NO_HOLE, 0, 512, INVAL),
            (cmd::READ, 1 << 15, 0, 512, INVAL),
            (cmd::TRIM, 0, CAPACITY - 512, 1024, INVAL),
            (cmd::WRITE_ZEROES, 0, CAPACITY - 512, 1024, NOSPC),
            (cmd::WRITE_ZEROES, flag::DF, 0, 512, INVAL),
            (cmd::FLUSH, flag::REQ_ONE, 0, 0, INVAL),
            (cmd::BLOCK_STATUS, 0, 0, 512, INVAL),
            (8, 0, 0, 512, INVAL),
            (u16::MAX, 0, 0, 0, INVAL),
        ];
        for (command, flags, offset, length, error) in cases {
            let reply = client.call(command, flags, offset, length);
            assert_eq!(reply.error, error, "{headers:?}: {command} {flags:#x} {offset}+{length}");
            assert_eq!(reply.message.is_empty(), headers == Headers::Simple);
        }
        assert_eq!(client.write(0, 7, &[5; 512]), INVAL);
        assert_eq!(client.write(0, CAPACITY, &[5; 512]), NOSPC);
        assert_eq!(client.write(1 << 9, 0, &[5; 512]), INVAL);
        assert_eq!(client.write(0, 0, &vec![5; 33 << 20]), INVAL, "too long, and skipped");
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}

#[test]
fn nothing_is_written_to_what_is_read_only() {
    let fixture = Fixture::new();
    for headers in ALL {
        let mut client = Client::ready(&fixture.socket(), "past", headers, &[]);
        assert_eq!(client.write(0, 0, &[5; 4096]), PERM);
        assert_eq!(client.call(cmd::TRIM, 0, 0, 4096).error, PERM);
        assert_eq!(client.call(cmd::WRITE_ZEROES, 0, 0, 4096).error, PERM);
        assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).error, 0);
        assert_eq!(client.read(0, 4096), [0; 4096]);
    }
}

#[test]
fn zeroes_are_told_and_not_sent_unless_the_client_wants_one_piece() {
    let fixture = Fixture::new();
    for headers in [Headers::Structured, Headers::Extended] {
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        let reply = client.call(cmd::READ, 0, 1 << 20, 1 << 20);
        assert!(reply.hole && reply.data == vec![0; 1 << 20]);
        let reply = client.call(cmd::READ, flag::DF, 1 << 20, 1 << 20);
        assert!(!reply.hole && reply.data == vec![0; 1 << 20]);
        assert_eq!(client.write(0, (2 << 20) - 512, &[1; 512]), 0);
        assert!(!client.call(cmd::READ, 0, 1 << 20, 1 << 20).hole);
        assert_eq!(client.call(cmd::TRIM, 0, 1 << 20, 1 << 20).error, 0);
    }
}

#[test]
fn status_is_told_of_every_context_that_is_wanted() {
    let fixture = Fixture::new();
    let contexts = ["base:allocation", "qemu:dirty-bitmap:since@mark"];
    for headers in [Headers::Structured, Headers::Extended] {
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &contexts);
        let reply = client.call(cmd::BLOCK_STATUS, 0, EXTENT - 512, 2 * EXTENT);
        let extents = |flags| vec![(512, 0), (EXTENT, flags), (EXTENT - 512, 0)];
        assert_eq!(reply.status, [(0, extents(3)), (1, extents(1))]);
        let reply = client.call(cmd::BLOCK_STATUS, flag::REQ_ONE, EXTENT, 2 * EXTENT);
        assert_eq!(reply.status, [(0, vec![(EXTENT, 3)]), (1, vec![(EXTENT, 1)])]);
        let reply = client.call(cmd::BLOCK_STATUS, flag::REQ_ONE, EXTENT, 512);
        assert_eq!(reply.status[0].1, [(512, 3)]);
        assert_eq!(client.call(cmd::BLOCK_STATUS, 0, 0, CAPACITY + 512).error, INVAL);
        assert_eq!(client.call(cmd::BLOCK_STATUS, 0, 0, 0).error, INVAL);
    }
}

#[test]
fn with_extended_headers_contexts_can_be_picked() {
    let fixture = Fixture::new();
    let contexts = ["base:allocation", "qemu:dirty-bitmap:since@mark"];
    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Extended, &contexts);
    let mut pick = |offset: u64, effect: u64, ids: &[u32]| {
        let mut payload = effect.to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
        let length = payload.len() as u64;
        let mut request = client.header(cmd::BLOCK_STATUS, flag::PAYLOAD_LEN, offset, length);
        request.extend(payload);
        client.send(&request);
        client.reply()
    };
    assert_eq!(pick(0, EXTENT, &[1]).status, [(1, vec![(EXTENT, 0)])]);
    assert_eq!(pick(0, EXTENT, &[1, 0]).status.len(), 2);
    let (none, first): (&[u32], &[u32]) = (&[], &[0]);
    for (offset, effect, ids) in [
        (0, EXTENT, none),
        (0, EXTENT, &[2]),
        (0, EXTENT, &[0, 0]),
        (0, 0, first),
        (0, CAPACITY + 512, first),
        (512, CAPACITY, first),
        // Of blocks of 512 bytes no part has a status of its own.
        (0, 513, first),
        (1, 512, first),
    ] {
        assert_eq!(pick(offset, effect, ids).error, INVAL, "{effect} at {offset}, {ids:?}");
    }
    // A payload where none belongs.
    let mut request = client.header(cmd::READ, flag::PAYLOAD_LEN, 0, 100);
    request.extend([0; 100]);
    client.send(&request);
    assert_eq!(client.reply().error, INVAL);
    // A write that does not say that it has one, as QEMU's.
    let mut request = client.header(cmd::WRITE, 0, 0, 512);
    request.extend([6; 512]);
    client.send(&request);
    assert_eq!(client.reply().error, 0);
    assert_eq!(client.read(0, 512), [6; 512]);
}

#[test]
fn requests_end_in_any_order_and_reads_see_what_was_written() {
    for headers in ALL {
        let fixture = Fixture::with(late(Duration::from_millis(5)), |_| {});
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        let cookies: Vec<u64> =
            (0..100_u64).map(|block| client.start_write(0, block * 8192, &[block as u8 + 1; 8192])).collect();
        let mut ended: Vec<u64> = cookies.iter().map(|_| client.reply().cookie).collect();
        assert!(!ended.is_sorted(), "with delays, requests end out of order");
        ended.sort_unstable();
        assert_eq!(ended, cookies);
        let cookies: Vec<u64> =
            (0..100_u64).map(|block| client.start(cmd::READ, 0, block * 8192, 8192)).collect();
        for _ in &cookies {
            let reply = client.reply();
            let block = (reply.cookie - cookies[0]) as u8;
            assert_eq!(reply.data, [block + 1; 8192]);
        }
    }
}

#[test]
fn a_disconnection_lets_requests_in_flight_end() {
    let fixture = Fixture::with(late(Duration::from_millis(200)), |_| {});
    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
    for block in 0..20 {
        client.start_write(0, block * 512, &[7; 512]);
    }
    client.start(cmd::DISC, 0, 0, 0);
    for _ in 0..20 {
        assert_eq!(client.reply().error, 0);
    }
    assert!(client.is_closed());
    assert_eq!(fixture.content(0, 20 * 512), [7; 20 * 512]);
}

#[test]
fn longest_requests_pass_and_what_is_out_of_step_ends_it() {
    let fixture = Fixture::new();
    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
    let longest = vec![3; 32 << 20];
    assert_eq!(client.write(0, 0, &longest), 0);
    assert_eq!(client.read(0, 32 << 20), longest);
    client.send(&[0; 28]);
    assert!(client.is_closed());

    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Extended, &[]);
    let far_too_long = client.header(cmd::WRITE, flag::PAYLOAD_LEN, 0, 1 << 50);
    client.send(&far_too_long);
    assert!(client.is_closed());
    fixture.nobody_is_left();
}

#[test]
fn a_disk_that_takes_less_in_one_write_says_so_and_a_longer_one_is_refused() {
    let mut disk = cdp_types::MemoryConfig::new(CAPACITY);
    disk.info.max_write_bytes = 1 << 20;
    let fixture = Fixture::of(disk, |_| {});
    let maximum = |name: &str| {
        let replies = Client::greeted(&fixture.socket()).ask(opt::INFO, &question(name, &[3]));
        let blocks = replies.iter().find(|(kind, data)| *kind == rep::INFO && data[..2] == [0, 3]).unwrap();
        u32::from_be_bytes(blocks.1[10..14].try_into().unwrap())
    };
    assert_eq!((maximum("disk"), maximum("past")), (1 << 20, 32 << 20));
    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
    let longest = vec![3; 1 << 20];
    assert_eq!(client.write(0, 4096, &longest), 0);
    assert_eq!(client.write(0, 0, &vec![4; (1 << 20) + 512]), INVAL);
    // Nothing of it was written, and what it had with it was not taken for a request.
    assert_eq!(client.read(0, 4096), [0; 4096]);
    // Reads may be longer all the same.
    assert_eq!(client.read(4096, 2 << 20)[..1 << 20], longest);
}

#[test]
fn a_failing_device_is_reported_request_by_request() {
    let faults =
        cdp_types::MemoryFaults { seed: 1, max_delay: Duration::ZERO, errors_per_million: 1_000_000 };
    let fixture = Fixture::with(Some(faults), |_| {});
    for headers in ALL {
        let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
        assert_eq!(client.call(cmd::READ, 0, 0, 4096).error, 5);
        assert_eq!(client.write(0, 0, &[1; 4096]), 5);
        assert_eq!(client.call(cmd::TRIM, flag::FUA, 0, 4096).error, 5);
    }
}
