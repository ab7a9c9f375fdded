//! Clients that mean no good, beside one that does.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbd_export::Limits;

use crate::client::{Client, Headers, cmd, connect};
use crate::fixture::{CAPACITY, Fixture, eventually, late};

/// Sends until the socket takes no more for a while; how many requests that were.
fn flood(client: &mut Client<UnixStream>, request: &[u8], most: usize) -> usize {
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    for count in 0..most {
        match client.stream.write_all(request) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return count;
            }
            Err(error) => panic!("the server has gone: {error}"),
        }
    }
    most
}

fn requests(fixture: &Fixture) -> u64 {
    fixture.server.connections().iter().map(|connection| connection.requests).sum()
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let limits = Limits {
        max_request: 1 << 20,
        connection_bytes: 8 << 20,
        total_bytes: 64 << 20,
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits);
    let mut deaf = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    assert_eq!(deaf.write(0, 0, &vec![1; 1 << 20]), 0);
    let request = deaf.header(cmd::READ, 0, 0, 1 << 20);
    assert!(flood(&mut deaf, &request, 1_000_000) < 1_000_000);
    // What fits into memory, and the sockets' buffers.
    let taken = requests(&fixture);
    assert!(taken < 20, "{taken} requests were taken");
    // Others are served meanwhile, as if nothing were.
    let mut other = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
    assert_eq!(other.read(0, 4096), [1; 4096]);
    drop(deaf);
    drop(other);
    fixture.nobody_is_left();
}

#[test]
fn small_replies_that_are_not_read_do_not_pile_up() {
    let fixture = Fixture::new();
    let mut deaf = Client::ready(&fixture.socket(), "disk", Headers::Extended, &[]);
    let batch: Vec<u8> = (0..1000).flat_map(|_| deaf.header(cmd::READ, 0, 1, 1)).collect();
    assert!(flood(&mut deaf, &batch, 10_000) < 10_000);
    // A megabyte of replies, and the sockets' buffers.
    let taken = requests(&fixture);
    assert!(taken < 100_000, "{taken} requests were taken");
    drop(deaf);
    fixture.nobody_is_left();
}

/// How often `curious` asks.
const QUERIES: usize = 1024;

/// A client that asks for the status of the whole disk again and again, in two contexts, and reads no answer.
fn curious(fixture: &Fixture) -> Client<UnixStream> {
    let contexts = ["base:allocation", "qemu:dirty-bitmap:since@mark"];
    let mut deaf = Client::ready(&fixture.socket(), "disk", Headers::Extended, &contexts);
    let batch: Vec<u8> = (0..QUERIES).flat_map(|_| deaf.header(cmd::BLOCK_STATUS, 0, 0, CAPACITY)).collect();
    deaf.send(&batch);
    std::thread::sleep(Duration::from_secs(1));
    // Each is 16 KiB of extents: two megabytes of replies, and the sockets' buffers.
    let looked = fixture.exports.looked.load(Ordering::SeqCst);
    assert!(looked < QUERIES, "{looked} of {} were looked for", 2 * QUERIES);
    deaf
}

#[test]
fn status_that_is_not_read_is_not_looked_for() {
    let fixture = Fixture::limited(Limits { requests: QUERIES, ..Limits::default() });
    let mut deaf = curious(&fixture);
    // All of it comes to one who reads.
    for _ in 0..QUERIES {
        let reply = deaf.reply();
        assert_eq!((reply.error, reply.status.len()), (0, 2));
    }
    drop(deaf);
    fixture.nobody_is_left();
}

#[test]
fn status_that_somebody_who_has_gone_had_asked_for_is_not_looked_for() {
    let fixture = Fixture::limited(Limits { requests: QUERIES, ..Limits::default() });
    drop(curious(&fixture));
    fixture.nobody_is_left();
    let looked = fixture.exports.looked.load(Ordering::SeqCst);
    assert!(looked < QUERIES, "{looked} of {} were looked for", 2 * QUERIES);
}

#[test]
fn one_that_stalls_is_sent_away_when_others_need_its_memory() {
    let limits = Limits {
        max_request: 1 << 20,
        connection_bytes: 3 << 20,
        total_bytes: 4 << 20,
        stall: Duration::from_millis(500),
        ..Limits::default()
    };
    let fixture = Fixture::limited(limits);
    let mut stalling = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    assert_eq!(stalling.write(0, 0, &vec![1; 1 << 20]), 0);
    let reads: Vec<u8> = (0..64).flat_map(|_| stalling.header(cmd::READ, 0, 0, 1 << 20)).collect();
    stalling.send(&reads);
    eventually("it has all that it may have", || requests(&fixture) >= 4);
    // Another that sends half of a write, and has the rest.
    let mut hesitant = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    let header = hesitant.header(cmd::WRITE, 0, 0, 1 << 20);
    hesitant.send(&header);
    // As long as nobody needs it, they may.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(fixture.server.connections().len(), 2);
    let mut honest = Client::ready(&fixture.socket(), "past", Headers::Simple, &[]);
    assert_eq!(honest.read(0, 1 << 20), vec![1; 1 << 20]);
    // Its memory is free a moment before its place is.
    eventually("somebody goes", || fixture.server.connections().len() < 3);
    assert_eq!(honest.read(0, 4096), [1; 4096]);
}

#[test]
fn what_breaks_off_in_the_middle_leaves_nothing() {
    let fixture = Fixture::with(late(Duration::from_millis(20)), |_| {});
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        for cut in [1, 20, 31, 40, 5000] {
            let mut client = Client::ready(
                &fixture.socket(),
                "disk",
                headers,
                &["base:allocation"][..usize::from(headers != Headers::Simple)],
            );
            client.start_write(0, 0, &[1; 8192]);
            client.start(cmd::READ, 0, 0, 1 << 20);
            if headers != Headers::Simple {
                client.start(cmd::BLOCK_STATUS, 0, 0, CAPACITY);
            }
            let flags = if headers == Headers::Extended { 32 } else { 0 };
            let mut write = client.header(cmd::WRITE, flags, 65536, 8192);
            write.extend([9; 8192]);
            client.send(&write[..cut]);
        }
    }
    fixture.nobody_is_left();
    assert_eq!(fixture.content(65536, 8192), [0; 8192], "half a write is none");
}

#[test]
fn there_are_only_so_many_connections() {
    let fixture = Fixture::limited(Limits { connections: 3, ..Limits::default() });
    let mut first: Vec<_> = (0..3).map(|_| Client::greeted(&fixture.socket())).collect();
    let mut one_too_many = Client::new(connect(&fixture.socket()));
    assert!(one_too_many.is_closed());
    first.pop();
    eventually("there is room again", || fixture.server.connections().len() == 2);
    let mut next = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    assert_eq!(next.read(0, 512), [0; 512]);
}

#[test]
fn a_hundred_that_vanish_leave_nothing() {
    let fixture = Fixture::with(late(Duration::from_millis(2)), |_| {});
    for round in 0..100_u64 {
        let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
        for block in 0..round {
            client.start(cmd::READ, 0, block * 4096, 65536);
        }
    }
    fixture.nobody_is_left();
}
