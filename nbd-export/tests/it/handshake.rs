//! Options, one by one and in the wrong order.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nbd_export::Limits;

use crate::client::{Client, Headers, cmd, connect, flag, opt, option, queries, question, rep};
use crate::fixture::{CAPACITY, Fixture, eventually};

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;
const SEND_TRIM: u16 = 1 << 5;
const SEND_DF: u16 = 1 << 7;
const CAN_MULTI_CONN: u16 = 1 << 8;
const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

/// Transmission flags as NBD_INFO_EXPORT tells them.
fn flags(replies: &[(u32, Vec<u8>)]) -> u16 {
    let info = replies.iter().find(|(kind, data)| *kind == rep::INFO && data[..2] == [0, 0]).unwrap();
    u16_at(&info.1, 10)
}

#[test]
fn list_tells_names_and_descriptions() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    let replies = client.ask(opt::LIST, &[]);
    assert_eq!(replies[0], (rep::SERVER, b"\0\0\0\x04diskthe disk".to_vec()));
    assert_eq!(replies[2].0, rep::ACK);
    assert_eq!(client.ask(opt::LIST, b"x")[0].0, rep::ERR_INVALID);
    assert_eq!(client.ask(opt::ABORT, b"data is ignored")[0].0, rep::ACK);
    assert!(client.is_closed());
}

#[test]
fn info_tells_size_flags_blocks_and_what_was_asked_for() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    let replies = client.ask(opt::INFO, &question("", &[1, 2, 99]));
    let infos: Vec<_> = replies.iter().filter(|(kind, _)| *kind == rep::INFO).map(|(_, data)| data).collect();
    assert_eq!(infos[0][2..10], CAPACITY.to_be_bytes());
    assert_eq!(infos[1][..], [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(&infos[2][2..], b"disk", "the canonical name of the default export");
    assert_eq!(&infos[3][2..], b"for tests");
    assert_eq!(infos.len(), 4);
    let writable = flags(&replies);
    assert_eq!(writable & (HAS_FLAGS | READ_ONLY | SEND_TRIM | SEND_DF | CAN_MULTI_CONN), 0x121);
    let past = flags(&client.ask(opt::INFO, &question("past", &[])));
    assert_eq!(past & (READ_ONLY | SEND_TRIM), READ_ONLY);
}

#[test]
fn what_is_wrong_with_a_name_is_told_and_can_be_put_right() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    let replies = client.ask(opt::GO, &question("dsik", &[]));
    assert_eq!(replies, [(rep::ERR_UNKNOWN, b"'dsik' is not here; 'disk' is".to_vec())]);
    assert_eq!(client.ask(opt::GO, &question("busy", &[]))[0].0, rep::ERR_POLICY);
    assert_eq!(client.ask(opt::GO, b"short")[0].0, rep::ERR_INVALID);
    client.agree("disk", Headers::Simple, &[]);
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn an_export_is_opened_once_for_all_questions_about_it() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    client.ask(opt::INFO, &question("disk", &[]));
    client.agree("disk", Headers::Structured, &["base:allocation"]);
    assert_eq!(fixture.exports.opened.load(Ordering::SeqCst), 1);
    drop(client);
    fixture.nobody_is_left();
}

#[test]
fn headers_are_agreed_on_in_order() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    let select = queries("disk", &["base:allocation"]);
    assert_eq!(
        client.ask(opt::SET_META_CONTEXT, &select)[0].0,
        rep::ERR_INVALID,
        "structured replies come first"
    );
    assert_eq!(client.ask(opt::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
    assert_ne!(flags(&client.ask(opt::INFO, &question("disk", &[]))) & SEND_DF, 0);
    assert_eq!(client.ask(opt::EXTENDED_HEADERS, &[])[0].0, rep::ACK);
    assert_eq!(client.ask(opt::EXTENDED_HEADERS, &[])[0].0, rep::ERR_INVALID);
    assert_eq!(client.ask(opt::STRUCTURED_REPLY, &[])[0].0, rep::ERR_EXT_HEADER_REQD);
    assert_eq!(flags(&client.ask(opt::INFO, &question("disk", &[]))) & BLOCK_STATUS_PAYLOAD, 0);
    client.ask(opt::SET_META_CONTEXT, &select);
    assert_ne!(flags(&client.ask(opt::INFO, &question("disk", &[]))) & BLOCK_STATUS_PAYLOAD, 0);
    client.send(&option(opt::EXPORT_NAME, b"disk"));
    assert!(client.is_closed(), "not with extended headers");
}

#[test]
fn contexts_are_listed_by_namespace_and_selected_by_name() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    client.ask(opt::STRUCTURED_REPLY, &[]);
    let names = |replies: Vec<(u32, Vec<u8>)>| -> Vec<(u8, String)> {
        let of = |(_, data): &(u32, Vec<u8>)| (data[3], String::from_utf8(data[4..].to_vec()).unwrap());
        replies.iter().filter(|(kind, _)| *kind == rep::META_CONTEXT).map(of).collect()
    };
    let mut list = |wanted: &[&str]| names(client.ask(opt::LIST_META_CONTEXT, &queries("disk", wanted)));
    let (base, dirty) = ("base:allocation".to_owned(), "qemu:dirty-bitmap:since@mark".to_owned());
    assert_eq!(list(&[]), [(0, base.clone()), (0, dirty.clone())]);
    assert_eq!(list(&["qemu:dirty-bitmap:", "base:none", "x-other:y"]), [(0, dirty.clone())]);
    assert_eq!(list(&["qemu:", dirty.as_str(), "base:"]), [(0, dirty.clone()), (0, base.clone())]);

    let mut select = |wanted: &[&str]| client.ask(opt::SET_META_CONTEXT, &queries("disk", wanted));
    assert_eq!(names(select(&[&dirty, "base:", &base, &base])), [(0, dirty), (1, base)]);
    assert_eq!(select(&["no-colon"])[0].0, rep::ERR_INVALID);
    let expired = select(&["qemu:dirty-bitmap:since@expired"]);
    assert_eq!(expired, [(rep::ERR_INVALID, b"the oldest instant is mark".to_vec())]);
    client.headers = Headers::Structured;
    client.ask(opt::GO, &question("disk", &[]));
    assert_eq!(client.call(cmd::BLOCK_STATUS, 0, 0, 512).error, 22, "a failed selection selects nothing");
}

#[test]
fn contexts_of_another_export_do_not_count() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    client.ask(opt::STRUCTURED_REPLY, &[]);
    client.ask(opt::SET_META_CONTEXT, &queries("past", &["base:allocation"]));
    client.agree("disk", Headers::Structured, &[]);
    assert_eq!(client.call(cmd::BLOCK_STATUS, 0, 0, 512).error, 22);
}

#[test]
fn old_clients_get_their_zeroes_unless_they_do_not_want_them() {
    let fixture = Fixture::new();
    for (client_flags, zeroes) in [(1, 124), (3, 0), (0, 124)] {
        let mut client = Client::new(connect(&fixture.socket()));
        client.greet(client_flags);
        client.send(&option(opt::EXPORT_NAME, b"past"));
        let reply = client.take(10 + zeroes);
        assert_eq!(reply[..8], CAPACITY.to_be_bytes());
        assert_eq!(u16_at(&reply, 8) & READ_ONLY, READ_ONLY);
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert_eq!(client.read(4096, 512), [0; 512]);
    }
    let mut client = Client::greeted(&fixture.socket());
    client.send(&option(opt::EXPORT_NAME, b"nothing"));
    assert!(client.is_closed());
}

#[test]
fn options_that_are_too_long_are_skipped_or_end_it() {
    let fixture = Fixture::new();
    let mut client = Client::greeted(&fixture.socket());
    assert_eq!(client.ask(opt::GO, &vec![0; 100_000])[0].0, rep::ERR_TOO_BIG);
    assert_eq!(client.ask(77, b"whatever")[0].0, rep::ERR_UNSUP, "still in step");
    let mut absurd = option(opt::GO, &[]);
    absurd[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    client.send(&absurd);
    assert!(client.is_closed());
}

#[test]
fn whoever_does_not_speak_the_protocol_is_left() {
    let fixture = Fixture::new();
    let mut client = Client::new(connect(&fixture.socket()));
    client.greet(4);
    assert!(client.is_closed(), "an unknown client flag");
    let mut client = Client::greeted(&fixture.socket());
    client.send(b"GET / HTTP/1.1\r\n\r\n");
    assert!(client.is_closed());
    fixture.nobody_is_left();
}

/// A handshake is to end before its end, but has time enough to begin.
fn hasty() -> Limits {
    Limits { handshake: Duration::from_secs(2), ..Limits::default() }
}

#[test]
fn options_and_handshakes_are_bounded() {
    let fixture = Fixture::limited(hasty());
    let start = Instant::now();
    let mut idle = Client::greeted(&fixture.socket());
    assert!(idle.is_closed());
    assert!(start.elapsed() >= hasty().handshake);
    // Whatever an export's code does meanwhile.
    let mut slow = Client::greeted(&fixture.socket());
    slow.send(&option(opt::GO, &question("slow", &[])));
    assert!(slow.is_closed());
    fixture.exports.found_out.store(true, Ordering::SeqCst);

    let fixture = Fixture::new();
    let mut eager = Client::greeted(&fixture.socket());
    for _ in 0..1024 {
        assert_eq!(eager.ask(77, &[])[0].0, rep::ERR_UNSUP);
    }
    assert!(eager.is_closed());
}

#[test]
fn a_connection_counts_until_what_it_has_asked_for_has_come_to_its_end() {
    let fixture = Fixture::limited(hasty());
    let mut client = Client::greeted(&fixture.socket());
    client.send(&option(opt::GO, &question("slow", &[])));
    assert!(client.is_closed());
    assert!(!fixture.server.connections().is_empty(), "as long as the export's code takes");
    fixture.exports.found_out.store(true, Ordering::SeqCst);
    eventually("it ends", || fixture.server.connections().is_empty());
}

#[test]
fn everything_at_once_and_byte_by_byte_is_understood() {
    let fixture = Fixture::new();
    let mut all = 3_u32.to_be_bytes().to_vec();
    all.extend(option(opt::GO, &question("disk", &[])));
    let mut client = Client::new(connect(&fixture.socket()));
    all.extend(client.header(cmd::WRITE, flag::FUA, 512, 512));
    all.extend([9; 512]);
    all.extend(client.header(cmd::READ, 0, 512, 512));
    let mut slow = Client::new(connect(&fixture.socket()));
    slow.header(cmd::READ, 0, 0, 0);
    slow.header(cmd::READ, 0, 512, 512);
    client.take(18);
    client.send(&all);
    slow.take(18);
    for byte in &all {
        slow.stream.write_all(&[*byte]).unwrap();
    }
    for client in [&mut client, &mut slow] {
        assert_eq!(client.answers(opt::GO).last().unwrap().0, rep::ACK);
        assert_eq!(client.reply().error, 0);
        assert_eq!(client.reply().data, [9; 512]);
    }
}
