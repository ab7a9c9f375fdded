//! With the QEMU that is installed: a counting guest is saved in each mode, restored, and goes on.
//!
//! `CKPT_QEMU` and `CKPT_QEMU_DATA` have another QEMU tested.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Instant;

use cdp_types::{MemoryConfig, MemoryDevice};
use ckpt::memory::{Control, MachineFacts, Progress, QueueStore, Restorer, save_stream};
use ckpt::stream::{Limits, StreamReader};
use serde_json::json;

use crate::qmp::{COUNTER, MEMORY, PATIENCE, Qemu, STAMP_PAGES, STAMPS};

/// Every stamp is that of the last round in which its page was reached before the counter stood where it stands: then
/// memory is of one instant. The page of the counter's own number may not have been reached yet.
fn assert_one_instant(memory: &[u8], counter: u32) {
    assert!(u64::from(counter) > STAMP_PAGES, "the guest has not been round once");
    let newest = u64::from(counter);
    for page in 0..STAMP_PAGES {
        let at = (STAMPS + page * 4096) as usize;
        let stamp = u64::from(u32::from_le_bytes(memory[at..at + 4].try_into().unwrap()));
        let expected = newest - (newest - 1 + STAMP_PAGES - page) % STAMP_PAGES;
        let late = expected == newest && stamp == newest - STAMP_PAGES;
        assert!(
            stamp == expected || late,
            "page {page} has {stamp}, {expected} belongs to counter {counter}"
        );
    }
}

fn counter_in(memory: &[u8]) -> u32 {
    u32::from_le_bytes(memory[COUNTER as usize..][..4].try_into().unwrap())
}

fn device() -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(MemoryConfig::new(1 << 40)).unwrap())
}

/// Stores what comes from the socket, on a thread of its own.
fn save(stream: UnixStream, device: &Arc<MemoryDevice>) -> JoinHandle<Progress> {
    let device = Arc::clone(device);
    std::thread::spawn(move || {
        let store = QueueStore::open(device).unwrap();
        let reader = StreamReader::open(stream, Limits::default()).unwrap();
        let facts = MachineFacts {
            machine_type: reader.configuration().machine.clone(),
            memory_bytes: MEMORY,
            ..MachineFacts::default()
        };
        let (cancel, mut progress) = (AtomicBool::new(false), |_: &Progress| {});
        let mut control = Control { cancel: &cancel, progress: &mut progress };
        save_stream(reader, store, facts, &mut control).unwrap().1
    })
}

/// A stopped QEMU with what the volume holds, and how long that took to get there.
fn restore(dir: &Path, name: &str, device: &Arc<MemoryDevice>) -> Qemu {
    let incoming = dir.join(format!("{name}.in"));
    let uri = format!("unix:{}", incoming.display());
    let mut qemu = Qemu::start(dir, name, &["-S", "-incoming", &uri]);
    let began = Instant::now();
    let stream = UnixStream::connect(&incoming).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let (cancel, mut progress) = (AtomicBool::new(false), |_: &Progress| {});
    let mut control = Control { cancel: &cancel, progress: &mut progress };
    let restorer = Restorer::open(QueueStore::open(Arc::clone(device) as _).unwrap(), &mut control).unwrap();
    assert!(restorer.image().facts.machine_type.starts_with("pc-"));
    let (_, progress) = restorer.stream_to(stream, &mut control).unwrap();
    assert_eq!(progress.received, progress.total);
    qemu.wait_for("query-migrate", "completed");
    println!("{name}: restored in {:?}", began.elapsed());
    qemu
}

fn goes_on(mut qemu: Qemu) {
    let before = qemu.counter();
    qemu.run("cont", json!({}));
    qemu.count_to(before + 2 * STAMP_PAGES as u32);
    qemu.run("stop", json!({}));
    let memory = qemu.memory(0, MEMORY);
    assert_one_instant(&memory, counter_in(&memory));
}

#[test]
fn a_stopped_guest_has_the_same_memory_once_restored() {
    let dir = tempfile::tempdir().unwrap();
    let mut qemu = Qemu::start(dir.path(), "source", &[]);
    qemu.count_to(3 * STAMP_PAGES as u32);
    qemu.run("stop", json!({}));
    let memory = qemu.memory(0, MEMORY);
    assert_one_instant(&memory, counter_in(&memory));
    let device = device();
    let saving = save(qemu.migrate(), &device);
    qemu.wait_for("query-migrate", "completed");
    let first = saving.join().unwrap();
    println!("first: {first:?}");
    assert!(first.received >= first.total && first.stored_bytes >= STAMP_PAGES * 4096);

    let mut restored = restore(dir.path(), "restored", &device);
    assert!(restored.memory(0, MEMORY) == memory, "memory differs");

    // The same machine once more, on the same volume: next to nothing differs.
    let saving = save(restored.migrate(), &device);
    restored.wait_for("query-migrate", "completed");
    let second = saving.join().unwrap();
    println!("second: {second:?}");
    assert!(second.changed < 10 && second.stored_bytes < 1 << 20, "{second:?}");
    drop(restored);
    let mut restored = restore(dir.path(), "again", &device);
    assert!(restored.memory(0, MEMORY) == memory, "memory differs after the second time");
    goes_on(restored);
}

#[test]
fn a_live_migration_is_saved_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut qemu = Qemu::start(dir.path(), "source", &[]);
    qemu.capability("pause-before-switchover");
    qemu.count_to(2 * STAMP_PAGES as u32);
    let device = device();
    let saving = save(qemu.migrate(), &device);
    // A guest that writes all the time is never through.
    let patient = json!({ "downtime-limit": 20_000, "max-bandwidth": 1_u64 << 34 });
    qemu.run("migrate-set-parameters", patient);
    qemu.wait_for("query-migrate", "pre-switchover");
    let memory = qemu.memory(0, MEMORY);
    qemu.run("migrate-continue", json!({ "state": "pre-switchover" }));
    qemu.wait_for("query-migrate", "completed");
    let progress = saving.join().unwrap();
    println!("live: {progress:?}");
    assert!(progress.received > progress.total, "no page came twice, so this test shows nothing");
    // The source was stopped at the switchover and goes on as well.
    qemu.run("cont", json!({}));
    qemu.count_to(counter_in(&memory) + 1000);

    let mut restored = restore(dir.path(), "restored", &device);
    let again = restored.memory(0, MEMORY);
    assert!(again == memory, "memory differs");
    assert_one_instant(&again, counter_in(&again));
    goes_on(restored);
}

#[test]
fn a_background_snapshot_is_of_one_instant_while_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut qemu = Qemu::start(dir.path(), "source", &[]);
    qemu.capability("background-snapshot");
    qemu.count_to(2 * STAMP_PAGES as u32);
    let (device, before) = (device(), qemu.counter());
    for round in 1..=2 {
        let saving = save(qemu.migrate(), &device);
        qemu.wait_for("query-migrate", "completed");
        let progress = saving.join().unwrap();
        println!("hot, {round}: {progress:?}");
        assert_eq!(progress.received, progress.total, "every page comes once");
        qemu.wait_for("query-status", "running");
    }
    let after = qemu.counter();
    let mut restored = restore(dir.path(), "restored", &device);
    let memory = restored.memory(0, MEMORY);
    let counter = counter_in(&memory);
    assert!((before..=after).contains(&counter), "{before} {counter} {after}");
    assert_one_instant(&memory, counter);
    goes_on(restored);
}

#[test]
fn a_restored_guest_can_be_saved_and_restored_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut qemu = Qemu::start(dir.path(), "first", &[]);
    qemu.capability("background-snapshot");
    qemu.count_to(2 * STAMP_PAGES as u32);
    let device = device();
    let saving = save(qemu.migrate(), &device);
    qemu.wait_for("query-migrate", "completed");
    saving.join().unwrap();
    drop(qemu);

    let mut second = restore(dir.path(), "second", &device);
    let counter = second.counter();
    second.run("cont", json!({}));
    second.capability("background-snapshot");
    second.count_to(counter + 100);
    let saving = save(second.migrate(), &device);
    second.wait_for("query-migrate", "completed");
    println!("again: {:?}", saving.join().unwrap());
    drop(second);

    let mut third = restore(dir.path(), "third", &device);
    let memory = third.memory(0, MEMORY);
    assert!(counter_in(&memory) >= counter + 100);
    assert_one_instant(&memory, counter_in(&memory));
    goes_on(third);
}

#[test]
fn a_qemu_that_dies_while_it_sends_leaves_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let mut qemu = Qemu::start(dir.path(), "source", &[]);
    qemu.capability("background-snapshot");
    qemu.count_to(1);
    let stream = qemu.migrate();
    let reader = StreamReader::open(stream, Limits::default()).unwrap();
    drop(qemu);
    let device = device();
    let (cancel, mut progress) = (AtomicBool::new(false), |_: &Progress| {});
    let mut control = Control { cancel: &cancel, progress: &mut progress };
    let store = QueueStore::open(Arc::clone(&device) as _).unwrap();
    let error = save_stream(reader, store, MachineFacts::default(), &mut control).unwrap_err();
    assert!(matches!(error.kind(), ckpt::ErrorKind::Truncated | ckpt::ErrorKind::Stream), "{error}");
    let error = Restorer::open(QueueStore::open(device).unwrap(), &mut control).unwrap_err();
    assert_eq!(error.kind(), ckpt::ErrorKind::Unfinished);
}
