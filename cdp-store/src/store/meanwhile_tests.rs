//! What happens between two steps of a change of the store, and when several threads change it at once.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant as Clock};

use cdp_types::{
    BlockDevice, BranchId, Event, Generation, Instant, IoBuf, IoErrorKind, Op, Origin, RequestId, VolumeName,
    Wait,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tempfile::TempDir;

use super::branches::Turn;
use super::compare::{Written, compare_with_log};
use super::*;
use crate::clock::SystemClock;
use crate::index::{BlockState, FANOUT, Family, IndexBatch, Kv, SimKv, TimeIndex, Watermark, WriteBatch};
use crate::storage::uring::DirectoryStorage;
use crate::volume::Resolved;

const DEADLINE: Duration = Duration::from_secs(60);
const SEGMENT: u64 = 1 << 20;
/// The longest request that a store of such segments takes, in bytes.
const MOST: usize = SEGMENT as usize / 4;

/// A store of its own, with its threads, and one volume.
struct Bench {
    path: PathBuf,
    store: Store,
    name: VolumeName,
    /// Last, so that the store's threads make no more files in it when it is removed.
    directory: TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let closed = self.store.close();
        assert!(closed.is_ok() || std::thread::panicking(), "{closed:?}");
    }
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        Store::create(&path, &options()).unwrap();
        let store = Store::open(&path, options()).unwrap();
        let name: VolumeName = "web1".parse().unwrap();
        store.create_volume(&name, VolumeSpec { size_bytes: 64 << 20, logical_block_size: 4096 }).unwrap();
        Self { path, store, name, directory }
    }

    /// Copies the logs of the store, which must be closed, without its databases, and opens the copy.
    fn open_from_the_logs_alone(&self) -> Store {
        let copy = self.directory.path().join("copy");
        fs::create_dir_all(copy.join("segments")).unwrap();
        let segments = fs::read_dir(self.path.join("segments")).unwrap();
        let segments = segments.map(|entry| Path::new("segments").join(entry.unwrap().file_name()));
        for name in segments.chain([PathBuf::from("superblock")]) {
            fs::copy(self.path.join(&name), copy.join(&name)).unwrap();
        }
        Store::open(&copy, options()).unwrap()
    }

    fn head(&self) -> Resolved {
        self.store.resolve(&self.name, &Instant::Head).unwrap()
    }

    fn revert(&self, to: &Resolved) {
        self.store.revert(&[(self.name.clone(), Instant::Seq(to.seq))], false).unwrap();
    }

    fn has_branch(&self, branch: BranchId) -> bool {
        self.store.branches(&self.name).unwrap().iter().any(|b| b.id == branch)
    }
}

pub(super) fn options() -> StoreOptions {
    StoreOptions { segment_bytes: SEGMENT, pool_segments: 1, reserve_bytes: 0, ..StoreOptions::default() }
}

/// Writes so many bytes from the start of a volume.
fn write(volume: &Arc<Volume>, bytes: usize) {
    write_stepping(volume, bytes, &|| ());
}

/// The same, with a step of what a store's threads would do whenever it waits.
fn write_stepping(volume: &Arc<Volume>, bytes: usize, step: &dyn Fn()) {
    let mut queue = volume.open_queue().unwrap();
    let mut events = Vec::new();
    for offset in (0..bytes).step_by(MOST) {
        let from = IoBuf::from_bytes(&vec![7; MOST.min(bytes - offset)]);
        let write = Op::Write { offset: offset as u64, from, fua: false, origin: Origin(0) };
        queue.submit(RequestId(1), write);
        while events.is_empty() {
            queue.poll(Wait::For(Duration::from_millis(10)), &mut events).unwrap();
            step();
        }
        assert!(matches!(events[..], [Event::Completed { result: Ok(()), .. }]), "{events:?}");
        events.clear();
    }
    queue.poll(Wait::No, &mut events).unwrap();
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Clock::now();
    while !is_so() {
        assert!(begun.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reverts a volume twice to where it is, with a write in between: where that was left behind.
fn leave_a_branch(bench: &Bench, volume: &Arc<Volume>) -> Resolved {
    let kept = bench.head();
    bench.revert(&kept);
    write(volume, 8192);
    let lost = bench.head();
    bench.revert(&kept);
    lost
}

#[test]
fn nothing_is_made_of_an_instant_whose_branch_was_deleted_since_it_was_found() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let lost = leave_a_branch(&bench, &volume);
    let branches = bench.store.branches(&bench.name).unwrap().len();
    bench.store.delete_branch(&bench.name, lost.branch, false).unwrap();
    let all_is_refused = || {
        let turn = Turn { volume: Arc::clone(&volume), to: lost };
        let reverted = bench.store.go_back(&[turn], true, &|_| Ok(Vec::new())).map(drop);
        let source = [Arc::clone(&volume)];
        let cloned = bench
            .store
            .commit_clones(&mut bench.store.ledger(), &source, &[lost], [None].into_iter())
            .map(drop);
        for outcome in [reverted, cloned] {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NotFound);
        }
    };
    all_is_refused();
    wait_until("the branch is not forgotten", || !bench.has_branch(lost.branch));
    all_is_refused();
    let row = MarkRow {
        volume: volume.id(),
        label: "old".parse().unwrap(),
        branch: lost.branch,
        seq: lost.seq,
        time_ns: lost.time_ns,
        metadata: BTreeMap::new(),
    };
    bench.store.commit(&mut bench.store.ledger(), &[Change::Mark { mark: row }]).unwrap();
    let named = bench.store.resolve(&bench.name, &Instant::Mark("old".parse().unwrap()));
    assert_eq!(named.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bench.store.branches(&bench.name).unwrap().len(), branches - 1);
    // What was refused has left the volume as it was.
    write(&volume, 4096);
}

#[test]
fn what_several_threads_give_back_at_once_is_said_once() {
    let bench = Bench::new();
    write(&bench.store.volume(&bench.name).unwrap(), 4096);
    for _ in 0..12 {
        let views: Vec<Scratch> = (0..6)
            .map(|_| bench.store.scratch(&bench.store.volume(&bench.name).unwrap(), &Instant::Head).unwrap())
            .collect();
        std::thread::scope(|scope| {
            views.into_iter().for_each(|view| drop(scope.spawn(move || drop(view))));
        });
    }
    bench.store.close().unwrap();
    let store = bench.open_from_the_logs_alone();
    let names: Vec<VolumeName> = store.volumes().into_iter().map(|volume| volume.name).collect();
    assert_eq!(names, std::slice::from_ref(&bench.name));
    store.close().unwrap();
}

#[test]
fn an_import_that_was_completed_since_it_was_looked_for_is_not_taken_for_an_abandoned_one() {
    let bench = Bench::new();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let [done, abandoned] = ["done", "abandoned"].map(|name| name.parse::<VolumeName>().unwrap());
    let import = bench.store.begin_import(&done, spec).unwrap();
    let id = import.volume().id();
    import.commit().unwrap();
    bench.store.destroy_if_abandoned(id).unwrap();
    assert!(bench.store.volume(&done).is_ok());
    let import = bench.store.begin_import(&abandoned, spec).unwrap();
    let id = import.volume().id();
    bench.store.destroy_if_abandoned(id).unwrap();
    import.commit().unwrap();
    assert!(bench.store.volume(&abandoned).is_ok(), "somebody works on it");
}

#[test]
fn blank_segments_of_destroyed_volumes_are_given_back() {
    let bench = Bench::new();
    let files = |path: &Path| fs::read_dir(path.join("segments")).unwrap().count();
    for _ in 0..20 {
        let view = bench.store.scratch(&bench.store.volume(&bench.name).unwrap(), &Instant::Head).unwrap();
        write(view.volume(), SEGMENT as usize / 2);
        // More than half of a segment is full, so that the next one is ordered.
        write(view.volume(), SEGMENT as usize / 4);
        wait_until("no segment is ordered", || {
            let log = view.volume().log();
            log.wants_segment(&bench.store.inner.shared.log).is_none()
        });
    }
    // What is used, what is filled ahead for more such demand, and one that is being filled.
    let most = || bench.store.segments().unwrap().len() + 4 + 1;
    wait_until("segments are left over", || files(&bench.path) <= most());
}

#[test]
fn a_revert_of_a_volume_that_was_destroyed_meanwhile_is_refused() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let at = bench.head();
    bench.store.destroy_volume(&bench.name, true).unwrap();
    let turn = Turn { volume, to: at };
    let reverted = bench.store.commit_revert(&[turn], &[at], &|_| Ok(Vec::new()));
    assert_eq!(reverted.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_queue_is_opened_before_a_revert_or_after_it() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    assert!(volume.end_tenure(false));
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| volume.open_queue().map(drop));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!opening.is_finished(), "it was opened in the middle of a revert");
        volume.begin_tenure();
        opening.join().unwrap().unwrap();
    });
    let queue = volume.open_queue().unwrap();
    assert!(!volume.end_tenure(false), "somebody uses it");
    drop(queue);
    // None waits for a tenure that will never begin.
    bench.store.destroy_volume(&bench.name, true).unwrap();
    drop(volume.open_queue().unwrap());
}

#[test]
fn a_forced_revert_that_fails_cuts_nobody_off() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let turn = Turn { volume: Arc::clone(&volume), to: bench.head() };
    let mut stays = volume.open_queue().unwrap();
    let goes = RefCell::new(Some(volume.open_queue().unwrap()));
    let refused = bench.store.go_back(&[turn], true, &|_| {
        // One of its users leaves meanwhile.
        drop(goes.take());
        Err(Error::new(ErrorKind::Busy, "as when writes in flight do not end"))
    });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
    let from = IoBuf::from_bytes(&[8; 4096]);
    stays.submit(RequestId(1), Op::Write { offset: 0, from, fua: false, origin: Origin(0) });
    let (mut events, begun) = (Vec::new(), Clock::now());
    while events.is_empty() {
        assert!(begun.elapsed() < DEADLINE, "the write does not end");
        stays.poll(Wait::For(Duration::from_millis(10)), &mut events).unwrap();
    }
    assert!(matches!(events[..], [Event::Completed { result: Ok(()), .. }]), "{events:?}");
    assert!(!volume.end_tenure(false), "somebody uses it");
    drop(stays);
    assert!(volume.end_tenure(false), "nobody uses it any more");
    volume.begin_tenure();
    write(&volume, 4096);
}

#[test]
fn a_read_during_which_its_volume_is_reverted_returns_nothing_of_the_new_head() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let index = SimKv::new();
    let store = open_with(directory.path(), &SimKv::synced(), &index).unwrap();
    let name: VolumeName = "web1".parse().unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let volume = store.create_volume(&name, spec).unwrap();
    let step = || drop(store.pool_step());
    write_stepping(&volume, 4096, &step);
    let before = volume.head().seq;
    write_stepping(&volume, 8192, &step);
    let mut queue = volume.open_queue().unwrap();
    let (reverted, targets) = (store.clone(), [(name, Instant::Seq(before))]);
    let revert = move || drop(reverted.revert(&targets, true).unwrap());
    index.before_next_scan(revert);
    queue.submit(RequestId(1), Op::Read { offset: 0, into: IoBuf::zeroed(4096) });
    assert!(!index.awaits_scan(), "where the block lies was known already");
    let mut events = Vec::new();
    queue.poll(Wait::No, &mut events).unwrap();
    let [Event::Completed { result: Err(error), .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(error.kind(), IoErrorKind::Gone);
    drop(queue);
    store.close().unwrap();
}

#[test]
fn a_revert_during_another_one_of_the_same_volume_is_refused() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let at = bench.head();
    assert!(volume.end_tenure(false));
    for force in [false, true] {
        // The first would let queues in before the second has made its branch the head.
        let target = (bench.name.clone(), Instant::Seq(at.seq));
        let refused = bench.store.revert(&[target], force).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(volume.log().is_switching());
    }
    volume.begin_tenure();
    bench.revert(&at);
    write(&volume, 4096);
}

/// Flips a bit in every row that the index has of one number, a branch's or a volume's.
fn rot(index: &SimKv, family: Family, number: u64) {
    let mut rotten = WriteBatch::new();
    let (from, to) = (number.to_be_bytes(), (number + 1).to_be_bytes());
    let visit = &mut |key: &[u8], value: &[u8]| {
        let mut value = value.to_vec();
        value[1] ^= 1;
        rotten.put(family, key, &value);
        true
    };
    index.scan(family, &from, &to, visit).unwrap();
    assert!(!rotten.is_empty());
    index.write(&rotten).unwrap();
}

#[test]
fn a_damaged_row_of_one_volume_does_not_keep_the_others_out_of_the_index() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let index = SimKv::new();
    let store = open_with(directory.path(), &SimKv::synced(), &index).unwrap();
    let spec = VolumeSpec { size_bytes: 4 << 20, logical_block_size: 4096 };
    let volumes = ["first", "second"].map(|name| store.create_volume(&name.parse().unwrap(), spec).unwrap());
    // So many changes of a leaf that it is looked at for an image.
    let write_both = || {
        for volume in &volumes {
            write_stepping(volume, 400 * 4096, &|| drop(store.pool_step()));
        }
        store.close_chunks();
    };
    write_both();
    store.flush_index().unwrap();
    rot(&index, Family::Map, volumes[0].row().branch.0);
    write_both();
    let error = store.index_step().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(volumes.iter().all(|volume| !volume.map().has_unindexed()));
    store.close().unwrap();
}

#[test]
fn a_line_that_cannot_be_flattened_leaves_no_other_long() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let index = SimKv::new();
    let store = open_with(directory.path(), &SimKv::synced(), &index).unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let names = ["first", "second"].map(|name| name.parse::<VolumeName>().unwrap());
    let volumes = names.each_ref().map(|name| store.create_volume(name, spec).unwrap());
    for (name, volume) in names.iter().zip(&volumes) {
        for _ in 0..9 {
            write_stepping(volume, 4096, &|| drop(store.pool_step()));
            store.revert(&[(name.clone(), Instant::Head)], false).unwrap();
        }
    }
    store.flush_index().unwrap();
    let depths = || volumes.each_ref().map(|volume| volume.read_depth());
    assert_eq!(depths(), [10, 10]);
    rot(&index, Family::Map, store.branches(&names[0]).unwrap()[4].id.0);
    assert!(store.upkeep().is_err(), "the first one could be flattened");
    assert_eq!(depths(), [10, 3]);
    store.close().unwrap();
}

/// Opens a store on this catalogue, with an index of its own and without threads.
fn open_on(directory: &Path, catalogue: &SimKv) -> Result<Store> {
    open_with(directory, catalogue, &SimKv::new())
}

/// The same with this index.
pub(super) fn open_with(directory: &Path, catalogue: &SimKv, index: &SimKv) -> Result<Store> {
    let seams = Seams {
        storage: Arc::new(DirectoryStorage::open(directory).unwrap()),
        index: Arc::new(index.clone()),
        catalogue: Arc::new(catalogue.clone()),
        clock: Arc::new(SystemClock),
        secrets: || 7,
        reach: None,
    };
    Store::open_on(seams, options())
}

/// Makes a store with volumes of these names, each with one block written, and closes it. Returns their numbers, and those of
/// their branches.
fn make_with(
    directory: &Path,
    catalogue: &SimKv,
    index: &SimKv,
    names: &[&str],
) -> Vec<(VolumeId, BranchId)> {
    Store::create(directory, &options()).unwrap();
    let store = open_with(directory, catalogue, index).unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let make = |name: &&str| {
        let volume = store.create_volume(&name.parse().unwrap(), spec).unwrap();
        write_stepping(&volume, 4096, &|| drop(store.pool_step()));
        (volume.id(), volume.row().branch)
    };
    let made: Vec<(VolumeId, BranchId)> = names.iter().map(make).collect();
    store.close().unwrap();
    made
}

#[test]
fn rot_of_a_watermark_or_of_a_flattening_is_no_reason_not_to_open() {
    let directory = tempfile::tempdir().unwrap();
    let (catalogue, index) = (SimKv::synced(), SimKv::new());
    let made = make_with(directory.path(), &catalogue, &index, &["first", "second"]);
    rot(&index, Family::Watermark, made[0].0.0);
    let mut rotten = WriteBatch::new();
    rotten.put(Family::Time, &[&made[1].1.0.to_be_bytes()[..], &[2]].concat(), b"rotten");
    index.write(&rotten).unwrap();
    index.flush().unwrap();
    let store = open_with(directory.path(), &catalogue, &index).unwrap();
    store.flush_index().unwrap();
    let report = store.verify(&mut |_| ()).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
    assert_eq!(report.blocks_compared, 2);
    store.close().unwrap();
}

#[test]
fn rows_that_do_not_belong_to_the_log_go_with_the_watermark_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let (catalogue, index) = (SimKv::synced(), SimKv::new());
    let (id, branch) = make_with(directory.path(), &catalogue, &index, &["web1"])[0];
    // As if the log had been put back from a copy: it has another batch there, and nothing was zeroed.
    let rows = TimeIndex::new(Arc::new(index.clone()));
    let mark = rows.watermark(id).unwrap().unwrap();
    let mut foreign = IndexBatch::new();
    foreign.watermark(id, &Watermark { header_crc: !mark.header_crc, ..mark });
    foreign.image(branch, 0, mark.seq, &[BlockState::Zero; FANOUT]);
    rows.write(&foreign).unwrap();
    rows.flush().unwrap();
    let mut cut_short = 0;
    for operations in 0..8 {
        let index = index.fork();
        index.fail_after(operations);
        cut_short += u32::from(open_with(directory.path(), &catalogue, &index).is_err());
        index.crash(&mut SmallRng::seed_from_u64(operations));
        let store = open_with(directory.path(), &catalogue, &index).unwrap();
        store.flush_index().unwrap();
        let report = store.verify(&mut |_| ()).unwrap();
        assert!(report.findings.is_empty(), "cut short after {operations}: {report:?}");
        store.close().unwrap();
    }
    assert!(cut_short > 0);
}

#[test]
fn what_the_catalogue_could_not_be_told_is_there_after_the_next_opening() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let catalogue = SimKv::synced();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let names = ["first", "second", "third"].map(|name| name.parse::<VolumeName>().unwrap());
    let store = open_on(directory.path(), &catalogue).unwrap();
    for (number, name) in names.iter().enumerate() {
        // As when the disk is full for a while.
        if number == 1 {
            catalogue.fail_after(0);
        }
        store.create_volume(name, spec).unwrap();
        catalogue.heal();
    }
    store.close().unwrap();
    drop(store);
    let store = open_on(directory.path(), &catalogue).unwrap();
    let found: Vec<VolumeName> = store.volumes().into_iter().map(|volume| volume.name).collect();
    assert_eq!(found, names);
    store.close().unwrap();
}

#[test]
fn rot_of_the_store_logs_last_record_is_not_taken_for_a_torn_tail() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let catalogue = SimKv::synced();
    let store = open_on(directory.path(), &catalogue).unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    store.create_volume(&"web1".parse().unwrap(), spec).unwrap();
    let segments = store.segments().unwrap();
    let slot = segments.iter().rfind(|segment| segment.volume == VolumeId(0)).unwrap().slot;
    let path = directory.path().join(format!("segments/{slot:08}"));
    store.close().unwrap();
    drop(store);
    let mut bytes = fs::read(&path).unwrap();
    let header = bytes.windows(8).rposition(|magic| magic == b"HINDSITE").unwrap();
    bytes[header + 96] ^= 1;
    fs::write(&path, bytes).unwrap();
    // The catalogue knows that there was such a record, and goes on knowing it.
    for _ in 0..2 {
        let error = open_on(directory.path(), &catalogue).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("the store log is damaged"), "{error}");
    }
}

#[test]
fn numbers_of_an_opening_that_has_used_up_its_own_are_not_given_out_again() {
    let directory = tempfile::tempdir().unwrap();
    Store::create(directory.path(), &options()).unwrap();
    let catalogue = SimKv::synced();
    let store = open_on(directory.path(), &catalogue).unwrap();
    let name: VolumeName = "web1".parse().unwrap();
    let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 4096 };
    let volume = store.create_volume(&name, spec).unwrap();
    // As after a million segments, and several times a million million requests.
    let log = &store.inner.shared.log;
    let next = Generation(log.generation.0 + 1);
    log.next_seq.store(Seq::first_of(Generation(next.0 + 5)).0, Ordering::Relaxed);
    log.segments.start_generation(next);
    write_stepping(&volume, 4096, &|| drop(store.pool_step()));
    let newest = store.segments().unwrap().iter().map(|segment| segment.incarnation).max().unwrap();
    store.close().unwrap();
    drop((volume, store));
    let store = open_on(directory.path(), &catalogue).unwrap();
    let volume = store.volume(&name).unwrap();
    let before = volume.head().seq;
    write_stepping(&volume, 4096, &|| drop(store.pool_step()));
    assert!(volume.head().seq > before);
    let newer = store.segments().unwrap().iter().filter(|segment| segment.incarnation > newest).count();
    assert_eq!(newer, 2, "the store log's, and the volume's");
    assert!(store.verify(&mut |_| ()).unwrap().findings.is_empty());
    store.close().unwrap();
}

#[test]
fn what_is_written_and_deleted_while_the_index_is_compared_is_no_difference() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    let catalogue = || bench.store.ledger().catalogue().clone();
    let mut report = VerifyReport::default();
    // Before the first batch of all, which is there by the time that the log is read.
    let head = volume.head();
    assert_eq!(head.ordinal.0, 0);
    write(&volume, 4096);
    compare_with_log(&volume, head, &catalogue(), &mut report).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");

    let lost = leave_a_branch(&bench, &volume);
    bench.store.flush_index().unwrap();
    let head = volume.head();
    let written = Written::up_to(&volume, head, &catalogue()).unwrap();
    bench.store.delete_branch(&bench.name, lost.branch, false).unwrap();
    written.compare(&volume, head, &mut report).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
    assert_eq!(report.blocks_compared, 3, "one of the first branch, two of the one that was deleted");
}

#[test]
fn a_deletion_that_was_cut_short_is_no_difference_between_index_and_log() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let lost = leave_a_branch(&bench, &volume);
    bench.store.flush_index().unwrap();
    let shared = &bench.store.inner.shared;
    let held = shared.branches.get(lost.branch).unwrap();
    bench.store.delete_branch(&bench.name, lost.branch, false).unwrap();
    // As a kill leaves it: the rows have gone, and the record that says so was not made.
    shared.index.drop_branch(lost.branch).unwrap();
    let report = bench.store.verify(&mut |_| ()).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
    drop(held);
}

#[test]
fn a_store_log_that_goes_on_in_a_new_segment_meanwhile_is_not_damaged() {
    let bench = Bench::new();
    let volume = bench.store.volume(&bench.name).unwrap();
    write(&volume, 4096);
    let at = bench.head();
    let segments = || {
        let all = bench.store.segments().unwrap();
        all.iter().filter(|segment| segment.volume == VolumeId(0)).count()
    };
    let before = segments();
    let mut ledger = bench.store.ledger();
    std::thread::scope(|scope| {
        let verified = scope.spawn(|| bench.store.verify(&mut |_| ()).unwrap());
        // It comes to where it has to wait for the ledger.
        std::thread::sleep(Duration::from_millis(200));
        while segments() == before {
            let mark = MarkRow {
                volume: volume.id(),
                label: "again".parse().unwrap(),
                branch: at.branch,
                seq: at.seq,
                time_ns: at.time_ns,
                metadata: BTreeMap::new(),
            };
            bench.store.commit(&mut ledger, &[Change::Mark { mark }]).unwrap();
        }
        drop(ledger);
        let report = verified.join().unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
    });
}
