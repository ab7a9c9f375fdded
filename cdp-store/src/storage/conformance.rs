//! What every storage must do, checked on each.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_types::{IoBuf, IoSegment, Wait};

use super::{AlignedBuf, Done, File, Lane, Storage, Token};

type Check = fn(&dyn Storage);

/// All checks, each to be given an empty storage.
pub(super) const CHECKS: &[(&str, Check)] = &[
    ("names", names),
    ("names_stay_inside", names_stay_inside),
    ("directories", directories),
    ("blocking_io", blocking_io),
    ("removed_files_live_on", removed_files_live_on),
    ("lane_io", lane_io),
    ("lane_read_past_the_end", lane_read_past_the_end),
    ("scattered_and_unaligned_memory", scattered_and_unaligned_memory),
    ("more_operations_than_a_ring_holds", more_operations_than_a_ring_holds),
    ("misplaced_io_is_refused", misplaced_io_is_refused),
    ("foreign_files_are_refused", foreign_files_are_refused),
    ("a_call_comes_before_the_sleep", a_call_comes_before_the_sleep),
    ("waiting_ends", waiting_ends),
    ("a_dropped_lane_has_written", a_dropped_lane_has_written),
    ("lanes_move_between_threads", lanes_move_between_threads),
];

fn filled(len: usize, with: u8) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(len);
    buffer.fill(with);
    buffer
}

fn read(file: &dyn File, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = filled(len, 0xEE);
    file.read_at(offset, &mut buffer).unwrap();
    buffer.to_vec()
}

/// Polls until nothing is in flight.
fn finish(lane: &mut dyn Lane) -> Vec<Done> {
    let mut done = Vec::new();
    while lane.in_flight() > 0 {
        lane.poll(Wait::Forever, &mut done).unwrap();
    }
    done
}

/// The one result among `done`.
fn only(mut done: Vec<Done>) -> (Token, std::io::Result<()>, Option<AlignedBuf>) {
    assert_eq!(done.len(), 1, "{done:?}");
    match done.remove(0) {
        Done::Io { token, result, buffer } => (token, result, buffer),
        Done::Ready { tag } => panic!("nothing is watched, least of all {tag}"),
    }
}

fn names(storage: &dyn Storage) {
    storage.create("b").unwrap();
    let made = storage.create("a").unwrap();
    assert_eq!(made.name(), "a");
    assert_eq!(storage.create("a").unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(storage.open("c").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.list("").unwrap(), ["a", "b"]);
    storage.sync_directory("").unwrap();
    storage.remove("a").unwrap();
    assert_eq!(storage.remove("a").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.open("a").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.list("").unwrap(), ["b"]);
}

fn names_stay_inside(storage: &dyn Storage) {
    for name in ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "nul\0"] {
        assert_eq!(storage.create(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        assert_eq!(storage.open(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        assert_eq!(storage.remove(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        assert_eq!(storage.create_directory(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
    }
}

fn directories(storage: &dyn Storage) {
    assert_eq!(storage.list("segments").unwrap(), [""; 0]);
    assert_eq!(storage.create("segments/1").unwrap_err().kind(), ErrorKind::NotFound);
    storage.create_directory("segments").unwrap();
    storage.create_directory("segments").unwrap();
    storage.create_directory("segments/old").unwrap();
    storage.create("segments/1").unwrap();
    storage.create("segments/old/2").unwrap();
    assert_eq!(storage.list("segments").unwrap(), ["1"]);
    assert_eq!(storage.list("segments/old").unwrap(), ["2"]);
    assert_eq!(storage.list("").unwrap(), [""; 0]);
    storage.sync_directory("segments").unwrap();
    storage.sync_directory("").unwrap();
    assert_eq!(storage.sync_directory("nowhere").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.create_directory("segments/1").unwrap_err().kind(), ErrorKind::AlreadyExists);
}

fn blocking_io(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    assert_eq!(file.len().unwrap(), 0);
    file.write_at(8192, &filled(4096, 7)).unwrap();
    file.sync().unwrap();
    assert_eq!(file.len().unwrap(), 12288);
    let again = storage.open("f").unwrap();
    assert_eq!(read(&*again, 4096, 12288), [[0; 4096], [7; 4096], [0; 4096]].concat());
    assert_eq!(read(&*again, 1 << 40, 4096), [0; 4096]);
    assert!(storage.free_bytes().unwrap() > 0);
}

fn removed_files_live_on(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    storage.remove("f").unwrap();
    file.write_at(0, &filled(4096, 1)).unwrap();
    file.sync().unwrap();
    storage.create("f").unwrap();
    assert_eq!(read(&*file, 0, 4096), [1; 4096]);
    assert_eq!(storage.open("f").unwrap().len().unwrap(), 0);
}

fn lane_io(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    let mut lane = storage.lane().unwrap();
    let mut buffer = filled(16384, 1);
    buffer[4096..12288].fill(2);
    lane.write(5, &file, 4096, buffer, 4096..12288);
    assert_eq!(lane.in_flight(), 1);
    let (token, result, buffer) = only(finish(&mut *lane));
    assert_eq!((token, buffer.unwrap().len()), (5, 16384));
    result.unwrap();
    lane.sync(6, &file);
    let (token, result, buffer) = only(finish(&mut *lane));
    assert!(token == 6 && buffer.is_none());
    result.unwrap();
    assert_eq!(file.len().unwrap(), 12288);
    let into = IoBuf::zeroed(8192);
    lane.read(7, &file, 0, into.share());
    let (token, result, buffer) = only(finish(&mut *lane));
    assert!(token == 7 && buffer.is_none());
    result.unwrap();
    assert_eq!(into.to_vec(), [[0; 4096], [2; 4096]].concat());
}

fn lane_read_past_the_end(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    file.write_at(0, &filled(4096, 3)).unwrap();
    let mut lane = storage.lane().unwrap();
    for (offset, len) in [(0, 8192), (4096, 4096), (1 << 30, 4096)] {
        lane.read(1, &file, offset, IoBuf::zeroed(len));
        let (_, result, _) = only(finish(&mut *lane));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::UnexpectedEof, "{len} bytes at {offset}");
    }
    // Nothing is everywhere.
    lane.read(1, &file, 4096, IoBuf::zeroed(0));
    only(finish(&mut *lane)).1.unwrap();
}

fn scattered_and_unaligned_memory(storage: &dyn Storage) {
    let pattern: Vec<u8> = (0..1 << 20).map(|n: u32| (n / 512 * 31 + n % 251) as u8).collect();
    let mut buffer = AlignedBuf::zeroed(pattern.len());
    buffer.copy_from_slice(&pattern);
    let file = storage.create("f").unwrap();
    file.write_at(0, &buffer).unwrap();
    let mut lane = storage.lane().unwrap();
    // The pieces' length, the gap between them and their number: aligned, unaligned, and more than one readv takes.
    for (piece, gap, count) in [(4096, 4096, 16), (1000, 24, 64), (512, 0, 2000)] {
        let memory = IoBuf::zeroed((piece + gap) * count);
        let base = memory.segments()[0].base;
        let pieces = (0..count).map(|n| IoSegment { base: base.wrapping_add(n * (piece + gap)), len: piece });
        // SAFETY: all pieces lie in `memory`, which is the owner; it gives out no references.
        let into = unsafe { IoBuf::new(pieces.collect(), Arc::new(memory.share())) };
        let len = into.len() - into.len() % 4096;
        let into = into.slice(0, len);
        lane.read(9, &file, 4096, into.share());
        only(finish(&mut *lane)).1.unwrap();
        assert!(into.to_vec() == pattern[4096..4096 + len], "{count} pieces of {piece}");
    }
}

fn more_operations_than_a_ring_holds(storage: &dyn Storage) {
    const COUNT: u64 = 3000;
    let file = storage.create("f").unwrap();
    let mut lane = storage.lane().unwrap();
    for n in 0..COUNT {
        lane.write(n, &file, n * 4096, filled(4096, (n % 255) as u8), 0..4096);
    }
    let mut tokens: Vec<Token> = finish(&mut *lane)
        .into_iter()
        .map(|done| match done {
            Done::Io { token, result: Ok(()), buffer: Some(_) } => token,
            other => panic!("{other:?}"),
        })
        .collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..COUNT));
    let targets: Vec<IoBuf> = (0..COUNT).map(|_| IoBuf::zeroed(4096)).collect();
    for (n, into) in (0..).zip(&targets) {
        lane.read(n, &file, n * 4096, into.share());
    }
    finish(&mut *lane);
    for (n, into) in (0..COUNT).zip(&targets) {
        assert!(into.to_vec() == [(n % 255) as u8; 4096], "block {n}");
    }
}

fn misplaced_io_is_refused(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    file.write_at(0, &filled(8192, 3)).unwrap();
    let mut lane = storage.lane().unwrap();
    let mut refused = |start: &mut dyn FnMut(&mut dyn Lane)| {
        start(&mut *lane);
        assert_eq!(only(finish(&mut *lane)).1.unwrap_err().kind(), ErrorKind::InvalidInput);
    };
    refused(&mut |lane| lane.read(1, &file, 100, IoBuf::zeroed(4096)));
    refused(&mut |lane| lane.read(1, &file, 0, IoBuf::zeroed(100)));
    refused(&mut |lane| lane.write(1, &file, 100, filled(4096, 0), 0..4096));
    refused(&mut |lane| lane.write(1, &file, 0, filled(4096, 0), 0..100));
    refused(&mut |lane| lane.write(1, &file, u64::MAX - 4095, filled(4096, 0), 0..4096));
    assert_eq!(file.write_at(100, &filled(4096, 0)).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(file.read_at(0, &mut filled(100, 0)).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(read(&*file, 0, 8192), [3; 8192]);
}

fn foreign_files_are_refused(storage: &dyn Storage) {
    let mut lane = storage.lane().unwrap();
    let other = super::sim::SimDisk::new(9).open().create("foreign").unwrap();
    lane.sync(1, &other);
    let error = only(finish(&mut *lane)).1.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("foreign"), "{error}");
}

fn a_call_comes_before_the_sleep(storage: &dyn Storage) {
    let mut lane = storage.lane().unwrap();
    let waker = lane.waker();
    let mut done = Vec::new();
    waker.wake();
    waker.wake();
    lane.poll(Wait::Forever, &mut done).unwrap();
    assert!(done.is_empty());
    // Two calls before one poll are one.
    let began = Instant::now();
    lane.poll(Wait::For(Duration::from_millis(1)), &mut done).unwrap();
    assert!(done.is_empty() && began.elapsed() < Duration::from_secs(5));
}

fn waiting_ends(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    let mut lane = storage.lane().unwrap();
    let mut done = Vec::new();
    lane.poll(Wait::No, &mut done).unwrap();
    lane.poll(Wait::For(Duration::ZERO), &mut done).unwrap();
    assert!(done.is_empty());
    lane.sync(1, &file);
    lane.poll(Wait::For(Duration::from_secs(60)), &mut done).unwrap();
    assert_eq!((done.len(), lane.in_flight()), (1, 0));
    lane.sync(2, &file);
    lane.poll(Wait::For(Duration::MAX), &mut done).unwrap();
    assert_eq!((done.len(), lane.in_flight()), (2, 0));
}

fn a_dropped_lane_has_written(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    let mut lane = storage.lane().unwrap();
    for n in 0..600 {
        lane.write(n, &file, n * 4096, filled(4096, 6), 0..4096);
    }
    drop(lane);
    assert!(read(&*file, 0, 600 * 4096).iter().all(|&byte| byte == 6));
}

fn lanes_move_between_threads(storage: &dyn Storage) {
    let file = storage.create("f").unwrap();
    let mut lane = storage.lane().unwrap();
    lane.write(1, &file, 0, filled(4096, 1), 0..4096);
    lane.poll(Wait::No, &mut Vec::new()).unwrap();
    let file = std::thread::scope(|scope| {
        let moved = scope.spawn(move || {
            lane.write(2, &file, 4096, filled(4096, 2), 0..4096);
            finish(&mut *lane);
            lane.write(3, &file, 8192, filled(4096, 3), 0..4096);
            lane.poll(Wait::No, &mut Vec::new()).unwrap();
            (lane, file)
        });
        let (mut lane, file) = moved.join().unwrap();
        finish(&mut *lane);
        file
    });
    assert_eq!(read(&*file, 0, 12288), [[1; 4096], [2; 4096], [3; 4096]].concat());
}
