#![allow(clippy::unwrap_used)]

use std::env;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cdp_types::{IoBuf, Wait};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FlockOperation, flock};
use tempfile::{TempDir, tempdir};

use super::DirectoryStorage;
use crate::storage::{AlignedBuf, Done, Lane, Storage, conformance};

/// Long enough for any machine, short enough to notice.
const SOON: Duration = Duration::from_secs(20);

fn store() -> (TempDir, DirectoryStorage) {
    let directory = tempdir().unwrap();
    let storage = DirectoryStorage::open(directory.path()).unwrap();
    (directory, storage)
}

#[test]
fn it_is_a_storage() {
    for (name, check) in conformance::CHECKS {
        println!("{name}");
        let (_directory, storage) = store();
        check(&storage);
    }
}

#[test]
fn it_is_a_storage_without_direct_io_alignment() {
    // tmpfs takes O_DIRECT (since Linux 6.6) and demands nothing; before that it is the page cache's turn.
    for (name, check) in conformance::CHECKS {
        println!("{name}");
        let directory = TempDir::new_in("/dev/shm").unwrap();
        check(&DirectoryStorage::open(directory.path()).unwrap());
    }
}

#[test]
fn what_is_set_aside_reads_as_zeroes_and_keeps_what_was_written() {
    let (_dir, storage) = store();
    let file = storage.create("f").unwrap();
    let written = AlignedBuf::zeroed(4096);
    file.write_at(0, &written).unwrap();
    match file.reserve(1 << 20) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        Ok(()) => assert_eq!(file.len().unwrap(), 1 << 20),
    }
    let mut read = AlignedBuf::zeroed(8192);
    read.fill(7);
    file.read_at(0, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0));
}

#[test]
fn reads_are_handed_over_without_a_poll() {
    let (_directory, storage) = store();
    let file = storage.create("f").unwrap();
    file.write_at(0, &AlignedBuf::zeroed(16 * 4096)).unwrap();
    let ready = |lane: &dyn Lane, patience: Duration| {
        let mut fds = [PollFd::from_borrowed_fd(lane.descriptor().unwrap(), PollFlags::IN)];
        poll(&mut fds, Some(&patience.try_into().unwrap())).unwrap() == 1
    };
    let mut lane = storage.lane().unwrap();
    lane.read(0, &file, 0, IoBuf::zeroed(4096));
    assert!(!ready(&*lane, Duration::from_millis(50)), "one waits for another");
    (1..16).for_each(|nth| lane.read(nth, &file, nth * 4096, IoBuf::zeroed(4096)));
    assert!(ready(&*lane, SOON), "many do not");
    let mut done = Vec::new();
    while done.len() < 16 {
        lane.poll(Wait::Forever, &mut done).unwrap();
    }
}

#[test]
fn alignment_is_that_of_the_file_system() {
    let (_directory, storage) = store();
    let alignment = storage.alignment();
    assert!(alignment.offset >= 512 && alignment.physical_block >= alignment.offset, "{alignment:?}");
}

mod locking {
    use super::*;

    #[test]
    fn a_second_owner_is_told_who_the_first_is() {
        let (directory, first) = store();
        let began = Instant::now();
        let error = DirectoryStorage::open_within(directory.path(), SOON).unwrap_err();
        assert!(began.elapsed() < SOON / 2, "it waited for a process that is alive");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let (path, pid) = (directory.path().display(), std::process::id());
        assert_eq!(error.to_string(), format!("the store {path} is in use by process {pid}"));
        let error = DirectoryStorage::open_read_only(directory.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        drop(first);
        DirectoryStorage::open_within(directory.path(), Duration::ZERO).unwrap();
    }

    #[test]
    fn the_store_stays_locked_while_a_file_or_lane_is_in_use() {
        let (directory, storage) = store();
        let try_again = || DirectoryStorage::open_within(directory.path(), Duration::ZERO);
        let (file, lane) = (storage.create("f").unwrap(), storage.lane().unwrap());
        drop(storage);
        assert_eq!(try_again().unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(file);
        assert_eq!(try_again().unwrap_err().kind(), ErrorKind::WouldBlock);
        // The ring itself is gone only later, and must not count.
        drop(lane);
        try_again().unwrap();
    }

    #[test]
    fn a_dead_owner_is_waited_for() {
        let (directory, storage) = store();
        drop(storage);
        let lock = fs::OpenOptions::new().write(true).read(true).open(directory.path().join("lock")).unwrap();
        // Our own number, but the start of another process: one that has ended, and whose number we were given.
        fs::write(directory.path().join("lock"), format!("{} 1\n", std::process::id())).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let error = DirectoryStorage::open_within(directory.path(), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(error.to_string().contains("has ended"), "{error}");
        let began = Instant::now();
        let last_writes = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            drop(lock);
        });
        DirectoryStorage::open_within(directory.path(), SOON).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(100));
        last_writes.join().unwrap();
    }

    #[test]
    fn readers_share_and_keep_a_writer_out() {
        let (directory, storage) = store();
        storage.create("f").unwrap().write_at(0, &AlignedBuf::zeroed(4096)).unwrap();
        drop(storage);
        let readers = [(), ()].map(|()| DirectoryStorage::open_read_only(directory.path()).unwrap());
        let error = DirectoryStorage::open_within(directory.path(), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let [reader, _] = &readers;
        assert_eq!(reader.list("").unwrap(), ["f"]);
        let file = reader.open("f").unwrap();
        file.read_at(0, &mut AlignedBuf::zeroed(4096)).unwrap();
        let mut lane = reader.lane().unwrap();
        lane.read(1, &file, 0, IoBuf::zeroed(4096));
        assert!(matches!(poll_one(&mut *lane), Done::Io { result: Ok(()), .. }));
        file.write_at(0, &AlignedBuf::zeroed(4096)).unwrap_err();
        let read_only =
            |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        read_only(reader.create("g").map(drop));
        read_only(reader.remove("f"));
        read_only(reader.create_directory("d"));
        read_only(reader.sync_directory(""));
    }

    #[test]
    fn a_copy_without_a_lock_file_can_be_read() {
        let directory = tempdir().unwrap();
        fs::write(directory.path().join("f"), [5; 700]).unwrap();
        let storage = DirectoryStorage::open_read_only(directory.path()).unwrap();
        let mut bytes = AlignedBuf::zeroed(4096);
        storage.open("f").unwrap().read_at(0, &mut bytes).unwrap();
        assert!(bytes[..700] == [5; 700] && bytes[700..].iter().all(|&byte| byte == 0));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing may be created");
    }

    const CHILDS_STORE: &str = "STORAGE_TEST_CHILDS_STORE";

    /// Not a test of its own: the process that the next one kills.
    #[test]
    fn a_process_that_writes_for_ever() {
        let Some(path) = env::var_os(CHILDS_STORE) else { return };
        let storage = DirectoryStorage::open(Path::new(&path)).unwrap();
        let file = storage.create("f").unwrap();
        let mut lane = storage.lane().unwrap();
        let mut done = Vec::new();
        // A test run that ends without having killed this process leaves it to another parent.
        let parent = parent_id();
        for n in (0..).take_while(|_| parent_id() == parent) {
            let mut buffer = AlignedBuf::zeroed(1 << 18);
            buffer.fill(n as u8);
            lane.write(n, &file, (n % 64) << 18, buffer, 0..1 << 18);
            while lane.in_flight() > 16 {
                lane.poll(Wait::Forever, &mut done).unwrap();
            }
        }
    }

    #[test]
    fn nothing_lands_once_the_store_of_a_killed_process_is_open() {
        let directory = tempdir().unwrap();
        let module = module_path!().split_once("::").unwrap().1;
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::a_process_that_writes_for_ever")])
            .env(CHILDS_STORE, directory.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let file = directory.path().join("f");
        let began = Instant::now();
        while fs::metadata(&file).map_or(0, |facts| facts.len()) < 16 << 20 {
            assert!(began.elapsed() < SOON, "the child does not write");
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let storage = DirectoryStorage::open_within(directory.path(), SOON).unwrap();
        let contents = || {
            let mut bytes = AlignedBuf::zeroed(16 << 20);
            storage.open("f").unwrap().read_at(0, &mut bytes).unwrap();
            bytes
        };
        let at_first = contents();
        thread::sleep(Duration::from_millis(100));
        assert!(at_first[..] == contents()[..]);
    }
}

/// Waits for something, and fails if it is more than one thing or none.
fn poll_one(lane: &mut dyn Lane) -> Done {
    let mut done = Vec::new();
    lane.poll(Wait::For(SOON), &mut done).unwrap();
    assert_eq!(done.len(), 1, "{done:?}");
    done.remove(0)
}

mod watching {
    use super::*;

    fn new_eventfd(flags: EventfdFlags) -> Arc<OwnedFd> {
        Arc::new(eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap())
    }

    fn write_to(eventfd: &OwnedFd, count: u64) {
        rustix::io::write(eventfd, &count.to_ne_bytes()).unwrap();
    }

    fn tag(done: &Done) -> u64 {
        match done {
            Done::Ready { tag } => *tag,
            Done::Io { .. } => panic!("{done:?}"),
        }
    }

    fn assert_silent(lane: &mut dyn Lane) {
        let mut done = Vec::new();
        lane.poll(Wait::For(Duration::from_millis(20)), &mut done).unwrap();
        assert!(done.is_empty(), "{done:?}");
    }

    #[test]
    fn every_write_is_noticed_and_read_back() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (_directory, storage) = store();
            let mut lane = storage.lane().unwrap();
            let (early, late) = (new_eventfd(flags), new_eventfd(flags));
            write_to(&early, 3);
            lane.watch(Arc::clone(&early), 10).unwrap();
            lane.watch(Arc::clone(&late), 11).unwrap();
            assert_eq!(tag(&poll_one(&mut *lane)), 10);
            assert_silent(&mut *lane);
            for _ in 0..3 {
                let other = Arc::clone(&late);
                let writer = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(5));
                    write_to(&other, 1);
                });
                assert_eq!(tag(&poll_one(&mut *lane)), 11);
                writer.join().unwrap();
            }
            assert_silent(&mut *lane);
        }
    }

    #[test]
    fn an_unwatched_tag_is_never_reported_and_its_signal_not_lost() {
        let (_directory, storage) = store();
        let mut lane = storage.lane().unwrap();
        let watched = new_eventfd(EventfdFlags::NONBLOCK);
        for round in 0..200 {
            lane.watch(Arc::clone(&watched), 1).unwrap();
            if round % 2 == 0 {
                lane.poll(Wait::No, &mut Vec::new()).unwrap();
            }
            // The read may have consumed it by the time that it is cancelled.
            write_to(&watched, 5);
            lane.unwatch(1);
            assert_silent_soon(&mut *lane);
            let mut count = [0; 8];
            let began = Instant::now();
            while rustix::io::read(&watched, &mut count).is_err() {
                assert!(began.elapsed() < SOON, "the signal is lost");
                assert_silent_soon(&mut *lane);
            }
            assert_eq!(u64::from_ne_bytes(count), 5);
        }
        // A lane that is dropped puts back what it has read as well.
        lane.watch(Arc::clone(&watched), 1).unwrap();
        lane.poll(Wait::No, &mut Vec::new()).unwrap();
        write_to(&watched, 7);
        drop(lane);
        let mut count = [0; 8];
        rustix::io::read(&watched, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7);
    }

    fn assert_silent_soon(lane: &mut dyn Lane) {
        let mut done = Vec::new();
        lane.poll(Wait::No, &mut done).unwrap();
        assert!(done.is_empty(), "{done:?}");
    }

    #[test]
    fn a_tag_can_be_watched_again_but_not_twice() {
        let (_directory, storage) = store();
        let mut lane = storage.lane().unwrap();
        let (first, second) = (new_eventfd(EventfdFlags::empty()), new_eventfd(EventfdFlags::empty()));
        lane.watch(Arc::clone(&first), 1).unwrap();
        assert_eq!(lane.watch(Arc::clone(&second), 1).unwrap_err().kind(), ErrorKind::AlreadyExists);
        lane.unwatch(1);
        lane.unwatch(1);
        lane.watch(Arc::clone(&second), 1).unwrap();
        write_to(&first, 1);
        assert_silent(&mut *lane);
        write_to(&second, 1);
        assert_eq!(tag(&poll_one(&mut *lane)), 1);
        assert_eq!(lane.in_flight(), 0);
    }

    #[test]
    fn there_is_a_limit() {
        let (_directory, storage) = store();
        let mut lane = storage.lane().unwrap();
        let watched = new_eventfd(EventfdFlags::empty());
        let error = (0..).find_map(|tag| lane.watch(Arc::clone(&watched), tag).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::QuotaExceeded);
        write_to(&watched, 1);
        poll_one(&mut *lane);
    }
}

#[test]
fn no_call_is_lost() {
    const CALLS: u64 = 30_000;
    let (_directory, storage) = store();
    let mut lane = storage.lane().unwrap();
    let waker = lane.waker();
    let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let caller = {
        let (asked, answered) = (Arc::clone(&asked), Arc::clone(&answered));
        thread::spawn(move || {
            for n in 1..=CALLS {
                asked.store(n, Ordering::Relaxed);
                waker.wake();
                while answered.load(Ordering::Relaxed) < n {
                    std::hint::spin_loop();
                }
                // Meets the lane at any point of its way back to sleep.
                for _ in 0..n % 997 {
                    std::hint::spin_loop();
                }
            }
        })
    };
    let mut done = Vec::new();
    while answered.load(Ordering::Relaxed) < CALLS {
        let began = Instant::now();
        lane.poll(Wait::For(SOON), &mut done).unwrap();
        assert!(began.elapsed() < SOON / 2, "a call was lost");
        answered.store(asked.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    caller.join().unwrap();
    assert!(done.is_empty());
}
