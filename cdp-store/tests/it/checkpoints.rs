//! Machines, epochs and checkpoints, one step at a time: invariant 8.

use cdp_store::storage::sim::OpKind;
use cdp_store::{
    CheckpointInfo, CheckpointMode, CheckpointSpec, CheckpointState, CloneSpec, EpochCut, ErrorKind,
};
use cdp_store::{RecordInfo, VmSpec};
use cdp_types::{
    BLOCK_SIZE, BlockDevice, CheckpointId, EpochId, Instant, Label, Origin, Seq, VmName, VolumeName,
};
use serde_json::{Value, json};

use crate::bench::{Bench, block_of, write_op};
use crate::checkpointing::vm_name;
use crate::machine::Crash;

const HELD: &str = "invariant 8 violated";
const IMAGE_BYTES: u64 = 8 * BLOCK_SIZE;

/// A machine with both volumes of a bench.
fn bench(seed: u64) -> (Bench, VmName) {
    let bench = Bench::new(seed);
    let spec = VmSpec { volumes: vec![bench.name(0), bench.name(1)], ..VmSpec::default() };
    bench.machine.store().create_vm(&vm_name(), &spec).unwrap();
    (bench, vm_name())
}

fn begin(bench: &Bench, vm: &VmName) -> CheckpointId {
    let restore = json!({ "max-bandwidth": 7 });
    let spec = CheckpointSpec { mode: CheckpointMode::Hot, label: None, restore };
    bench.machine.store().begin_checkpoint(vm, spec).unwrap().id
}

fn cut(bench: &Bench, id: CheckpointId) -> EpochCut {
    let store = bench.machine.store();
    store.cut_epoch(&store.new_epoch(id).unwrap()).unwrap()
}

fn save(bench: &Bench, vm: &VmName, block: u64, stamp: u64) {
    let volume = bench.machine.store().memory_volume(vm, IMAGE_BYTES).unwrap();
    let mut queue = volume.open_queue().unwrap();
    bench.run(&mut *queue, write_op(block, stamp, Origin(0))).unwrap();
}

fn commit(bench: &Bench, id: CheckpointId, cut: &EpochCut) -> CheckpointInfo {
    bench.machine.store().commit_checkpoint(id, cut, IMAGE_BYTES, json!({ "pause_ms": 5 })).unwrap()
}

/// Takes a checkpoint whose memory has a stamp in its first block.
fn take(bench: &Bench, vm: &VmName, stamp: u64) -> (CheckpointId, EpochId) {
    let id = begin(bench, vm);
    let cut = cut(bench, id);
    save(bench, vm, 0, stamp);
    commit(bench, id, &cut);
    (id, cut.epoch)
}

fn memory_head(bench: &Bench, vm: &VmName) -> [u64; 2] {
    let volume = bench.machine.store().memory_volume(vm, IMAGE_BYTES).unwrap();
    [0, 1].map(|block| block_of(&*volume, block).unwrap())
}

fn memory_of(bench: &Bench, id: CheckpointId) -> [u64; 2] {
    let device = bench.machine.store().checkpoint_memory(id).unwrap();
    [0, 1].map(|block| block_of(&*device, block).unwrap())
}

fn at(bench: &Bench, name: &VolumeName, instant: Instant) -> [u64; 2] {
    let device = bench.machine.store().open_at(name, &instant).unwrap();
    [0, 1].map(|block| block_of(&*device, block).unwrap())
}

fn write(bench: &Bench, stamp: u64) {
    [0, 1].into_iter().for_each(|volume| bench.write(volume, 0, stamp).unwrap());
}

fn records(bench: &Bench, name: &VolumeName) -> Vec<RecordInfo> {
    let mut records = Vec::new();
    let told = bench.machine.volume(name).records(Seq::ZERO, Seq::MAX, &mut |record| {
        records.push(record);
        true
    });
    told.unwrap();
    records
}

fn label(text: &str) -> Label {
    text.parse().unwrap()
}

#[test]
fn an_epoch_is_one_instant_of_all_disks_whatever_comes_after() {
    let (mut bench, vm) = bench(1);
    let names = [bench.name(0), bench.name(1)];
    write(&bench, 10);
    let id = begin(&bench, &vm);
    let cut = cut(&bench, id);
    write(&bench, 20);
    save(&bench, &vm, 0, 77);
    let epoch = cut.epoch;
    for name in &names {
        let refused = bench.machine.store().resolve(name, &Instant::Epoch(epoch)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound, "{HELD}: an epoch whose checkpoint is not complete");
    }
    let info = commit(&bench, id, &cut);
    let CheckpointState::Committed(saved) = info.state else { panic!("{info:?}") };
    assert_eq!((saved.seq, saved.members.len()), (cut.seq, 2));
    assert_eq!(saved.figures, json!({ "pause_ms": 5 }));

    let check = |bench: &Bench| {
        for name in &names {
            assert_eq!(at(bench, name, Instant::Epoch(epoch)), [10, 0], "{HELD}: {name}");
            assert_eq!(
                at(bench, name, Instant::Seq(cut.seq)),
                [10, 0],
                "{HELD}: {name} at the store's instant"
            );
        }
        assert_eq!(memory_of(bench, id), [77, 0], "{HELD}: the memory");
    };
    check(&bench);
    let copy: VolumeName = "copy".parse().unwrap();
    let at_epoch = || Instant::Epoch(epoch);
    let spec = CloneSpec { source: names[1].clone(), at: at_epoch(), name: copy.clone() };
    bench.machine.store().clone_volumes(&[spec]).unwrap();
    assert_eq!(at(&bench, &copy, Instant::Head), [10, 0], "{HELD}: a clone of an epoch");
    let targets = names.clone().map(|name| (name, at_epoch()));
    bench.machine.store().revert(&targets, false).unwrap();
    write(&bench, 30);
    check(&bench);
    bench.machine.store().flush_index().unwrap();
    check(&bench);
    for how in [Crash::Kill, Crash::PowerCut] {
        bench.restart(how);
        check(&bench);
    }
    let mut rebuilt = Bench { machine: bench.machine.fork_without_index(9) };
    rebuilt.restart(Crash::Kill);
    check(&rebuilt);
    let known =
        |bench: &Bench| (bench.machine.store().vms(), bench.machine.store().checkpoints(&vm).unwrap());
    assert_eq!(known(&rebuilt), known(&bench), "{HELD}: without its databases the store has others");
    let report = rebuilt.machine.store().verify(&mut |_| ()).unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
}

#[test]
fn an_epoch_record_names_all_members_and_cutting_syncs_nothing() {
    let (bench, vm) = bench(2);
    write(&bench, 10);
    let id = begin(&bench, &vm);
    let epoch = bench.machine.store().new_epoch(id).unwrap();
    // Were anything synced, that would fail.
    bench.machine.disk.fail_nth(OpKind::Sync, 0, libc::EIO);
    let cut = bench.machine.store().cut_epoch(&epoch).unwrap();
    bench.machine.disk.clear_faults();
    let mut last = Vec::new();
    for (index, member) in cut.members.iter().enumerate() {
        let records = records(&bench, &bench.name(index));
        let found = records.iter().find(|r| r.kind == "epoch").unwrap();
        let said = found.epoch.as_ref().unwrap();
        assert_eq!((said.epoch, said.checkpoint, said.vm), (cut.epoch, id, cut.vm));
        assert_eq!(said.members, epoch.members());
        assert_eq!(found.ordinal, member.ordinal);
        let after = records.iter().filter(|r| r.seq > found.seq && r.seq <= cut.seq && r.block_count > 0);
        assert_eq!(after.count(), 0, "{HELD}: something lies between the record and the instant");
        last.push(said.clone());
    }
    assert_eq!(last[0], last[1]);
    let again = bench.machine.store().cut_epoch(&epoch).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Invalid, "an epoch is cut once");
}

#[test]
fn half_an_epoch_is_void_and_the_next_one_counts() {
    let (bench, vm) = bench(3);
    write(&bench, 10);
    for failing in 0..2 {
        let id = begin(&bench, &vm);
        let epoch = bench.machine.store().new_epoch(id).unwrap();
        bench.machine.disk.fail_nth(OpKind::Write, failing, libc::EIO);
        bench.machine.store().cut_epoch(&epoch).expect_err("half an epoch was cut");
        bench.machine.disk.clear_faults();
        write(&bench, 20 + failing);
        let second = cut(&bench, id);
        assert!(second.epoch > epoch.id(), "numbers are not given out again");
        save(&bench, &vm, 0, 5);
        let mut half = second.clone();
        half.epoch = epoch.id();
        let refused = bench.machine.store().commit_checkpoint(id, &half, IMAGE_BYTES, Value::Null);
        let refused = refused.expect_err("invariant 8 violated: half an epoch was committed");
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        commit(&bench, id, &second);
        for name in [bench.name(0), bench.name(1)] {
            assert_eq!(at(&bench, &name, Instant::Epoch(second.epoch)), [20 + failing, 0], "{HELD}");
            let refused = bench.machine.store().resolve(&name, &Instant::Epoch(epoch.id()));
            let refused = refused.expect_err("invariant 8 violated: half an epoch is visible");
            assert!(refused.to_string().contains("nearest is epoch:2"), "{refused}");
        }
    }
}

#[test]
fn an_epoch_is_not_cut_over_writes_in_flight_or_another_head() {
    let (bench, vm) = bench(4);
    write(&bench, 10);
    let id = begin(&bench, &vm);
    let store = bench.machine.store();
    let volume = bench.machine.volume(&bench.name(1));
    let mut queue = volume.open_queue().unwrap();
    bench.run(&mut *queue, write_op(1, 5, Origin(0))).unwrap();
    let epoch = store.new_epoch(id).unwrap();
    queue.submit(cdp_types::RequestId(7), write_op(1, 6, Origin(0)));
    queue.poll(cdp_types::Wait::No, &mut Vec::new()).unwrap();
    let refused = store.cut_epoch(&epoch).expect_err("invariant 8 violated: cut over a write in flight");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    bench.wait(&mut *queue).unwrap();
    drop(queue);

    let epoch = store.new_epoch(id).unwrap();
    let head = store.volume_info(&bench.name(0)).unwrap().head.seq;
    store.revert(&[(bench.name(0), Instant::Seq(head))], false).unwrap();
    let refused = store.cut_epoch(&epoch).expect_err("invariant 8 violated: cut on a head that was reverted");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(records(&bench, &bench.name(1)).iter().all(|r| r.kind != "epoch"), "nothing is placed then");

    let third = store.new_epoch(id).unwrap();
    bench.write(0, 1, 9).unwrap();
    bench.machine.disk.fail_nth(OpKind::Sync, 0, libc::EIO);
    bench.flush(0).unwrap_err();
    bench.machine.disk.clear_faults();
    assert_eq!(store.cut_epoch(&third).unwrap_err().kind(), ErrorKind::ReadOnly, "a poisoned disk");
    assert_eq!(store.new_epoch(id).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn what_a_crash_leaves_unfinished_is_found_and_its_memory_put_back() {
    for (seed, how) in [(5, Crash::Kill), (6, Crash::PowerCut)] {
        let (mut bench, vm) = bench(seed);
        write(&bench, 10);
        let (first, _) = take(&bench, &vm, 100);
        let second = begin(&bench, &vm);
        let cut = cut(&bench, second);
        save(&bench, &vm, 0, 200);
        save(&bench, &vm, 1, 200);
        assert_eq!(
            bench.machine.store().unfinished_checkpoints(),
            [],
            "it is not unfinished, it is under way"
        );
        bench.restart(how);
        let store = bench.machine.store();
        let found = store.unfinished_checkpoints();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id, &found[0].restore), (second, &json!({ "max-bandwidth": 7 })));
        let late = store.commit_checkpoint(second, &cut, IMAGE_BYTES, Value::Null);
        let late = late.expect_err("invariant 8 violated: an epoch of a dead process was committed");
        assert_eq!(late.kind(), ErrorKind::Invalid);
        let spec = CheckpointSpec { mode: CheckpointMode::Live, label: None, restore: Value::Null };
        assert_eq!(store.begin_checkpoint(&vm, spec).unwrap_err().kind(), ErrorKind::Busy);
        store.abort_checkpoint(second, "cdpd was killed").unwrap();
        assert_eq!(memory_head(&bench, &vm), [100, 0], "{HELD}: the memory was not put back");
        assert_eq!(store.unfinished_checkpoints(), []);
        let refused = store.resolve(&bench.name(0), &Instant::Epoch(cut.epoch)).unwrap_err().to_string();
        assert!(refused.contains("cdpd was killed") && refused.contains("epoch:1"), "{refused}");
        let (third, _) = take(&bench, &vm, 300);
        assert_eq!(bench.machine.store().checkpoint(third).unwrap().parent, Some(first));
        assert_eq!((memory_of(&bench, first), memory_of(&bench, third)), ([100, 0], [300, 0]), "{HELD}");
    }
}

#[test]
fn a_first_save_that_is_aborted_leaves_an_empty_memory() {
    let (bench, vm) = bench(7);
    let id = begin(&bench, &vm);
    save(&bench, &vm, 1, 9);
    bench.machine.store().abort_checkpoint(id, "cancelled").unwrap();
    assert_eq!(memory_head(&bench, &vm), [0, 0], "{HELD}: the memory was not put back");
    let again = bench.machine.store().abort_checkpoint(id, "cancelled").unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Invalid);
}

#[test]
fn a_machine_goes_back_as_a_whole_and_its_next_checkpoint_knows_from_where() {
    let (mut bench, vm) = bench(8);
    write(&bench, 10);
    let (first, epoch) = take(&bench, &vm, 100);
    write(&bench, 20);
    let (second, _) = take(&bench, &vm, 200);
    write(&bench, 30);
    let undo = bench.machine.store().revert_vm(&vm, first, false).unwrap();
    assert_eq!((undo.volumes.len(), undo.previous), (2, Some(second)));
    for how in [None, Some(Crash::Kill), Some(Crash::PowerCut)] {
        how.into_iter().for_each(|how| bench.restart(how));
        assert_eq!([0, 1].map(|v| bench.block(v, 0).unwrap()), [10, 10], "{HELD}: the disks");
        assert_eq!(memory_head(&bench, &vm), [100, 0], "{HELD}: the memory");
        assert_eq!(bench.machine.store().vm(&vm).unwrap().current, Some(first));
        assert_eq!(at(&bench, &bench.name(0), Instant::Epoch(epoch)), [10, 0]);
    }
    let third = begin(&bench, &vm);
    let busy = bench.machine.store().revert_vm(&vm, second, true).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "not while one is being taken");
    let cut = cut(&bench, third);
    save(&bench, &vm, 1, 300);
    commit(&bench, third, &cut);
    assert_eq!(bench.machine.store().checkpoint(third).unwrap().parent, Some(first));
    let images = [first, second, third].map(|id| memory_of(&bench, id));
    assert_eq!(images, [[100, 0], [200, 0], [100, 300]], "{HELD}: each has its own memory");
    bench.machine.store().revert_vm(&vm, second, false).unwrap();
    assert_eq!(bench.block(0, 0).unwrap(), 20);
    bench.machine.store().rewind_memory(&vm, None).unwrap();
    assert_eq!(memory_head(&bench, &vm), [0, 0]);
    assert_eq!(bench.machine.store().vm(&vm).unwrap().current, None);
}

#[test]
fn a_checkpoint_pins_what_it_names_until_it_is_deleted() {
    let (bench, vm) = bench(9);
    let store = bench.machine.store();
    let name = bench.name(0);
    write(&bench, 10);
    let (first, _) = take(&bench, &vm, 100);
    write(&bench, 20);
    let (second, _) = take(&bench, &vm, 200);
    store.revert_vm(&vm, first, false).unwrap();
    let left = store.branches(&name).unwrap()[0].id;
    let refused =
        store.delete_branch(&name, left, true).expect_err("invariant 8 violated: a pinned branch went");
    assert!(refused.to_string().contains(&format!("checkpoint {second}")), "{refused}");
    let refused =
        store.destroy_volume(&name, true).expect_err("invariant 8 violated: a member was destroyed");
    assert!(refused.to_string().contains("'web1'"), "{refused}");
    let other = VmSpec { volumes: vec![bench.name(1)], ..VmSpec::default() };
    store.update_vm(&vm, &other).unwrap();
    let refused =
        store.destroy_volume(&name, true).expect_err("invariant 8 violated: a pinned disk was destroyed");
    assert!(refused.to_string().contains(&format!("checkpoint {first}")), "{refused}");
    assert_eq!(store.revert_vm(&vm, first, false).unwrap_err().kind(), ErrorKind::Invalid, "other disks");

    store.edit_checkpoint(second, Some(label("good")), true).unwrap();
    assert_eq!(store.find_checkpoint(&vm, "good").unwrap().id, second);
    assert_eq!(store.find_checkpoint(&vm, &second.to_string()).unwrap().id, second);
    assert_eq!(
        store.edit_checkpoint(first, Some(label("good")), false).unwrap_err().kind(),
        ErrorKind::Exists
    );
    assert_eq!(store.edit_checkpoint(first, Some(label("2")), false).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.delete_checkpoint(second).unwrap_err().kind(), ErrorKind::Busy, "it is pinned");
    assert_eq!(store.remove_vm(&vm, true).unwrap_err().kind(), ErrorKind::Busy, "one is pinned");
    store.edit_checkpoint(second, None, false).unwrap();
    store.delete_checkpoint(second).unwrap();
    store.delete_branch(&name, left, true).expect("what a later branch inherits of it stays");
    assert_eq!(memory_of(&bench, first), [100, 0], "{HELD}: another checkpoint's memory went with it");
    assert_eq!(at(&bench, &name, Instant::Epoch(EpochId(1))), [10, 0], "{HELD}: and its disk");
    store.delete_checkpoint(first).unwrap();
    store.destroy_volume(&name, false).unwrap();
}

#[test]
fn the_label_of_a_checkpoint_that_came_to_nothing_names_the_one_that_has_it_now() {
    let (bench, vm) = bench(9);
    let store = bench.machine.store();
    write(&bench, 10);
    let (good, _) = take(&bench, &vm, 100);
    let mode = CheckpointMode::Pause;
    let spec = CheckpointSpec { mode, label: Some(label("golden")), restore: Value::Null };
    let failed = store.begin_checkpoint(&vm, spec).unwrap().id;
    store.abort_checkpoint(failed, "no room").unwrap();
    assert_eq!(store.find_checkpoint(&vm, "golden").unwrap().id, failed, "nobody else has it");

    store.edit_checkpoint(good, Some(label("golden")), true).unwrap();
    assert_eq!(store.find_checkpoint(&vm, "golden").unwrap().id, good);
    assert_eq!(store.find_checkpoint(&vm, &failed.to_string()).unwrap().id, failed);
    for (label, pinned) in [(Some(label("other")), false), (Some(label("golden")), true), (None, true)] {
        let refused = store.edit_checkpoint(failed, label, pinned).unwrap_err();
        assert!(
            refused.kind() == ErrorKind::Invalid && refused.to_string().contains("was aborted"),
            "{refused}"
        );
    }
    store.edit_checkpoint(failed, None, false).unwrap();
    assert_eq!(store.find_checkpoint(&vm, "golden").unwrap().id, good);
}

#[test]
fn machines_are_kept_with_what_belongs_to_them() {
    let (mut bench, vm) = bench(10);
    let names = [bench.name(0), bench.name(1)];
    let spec = |volumes: &[VolumeName], settings: Value| VmSpec {
        volumes: volumes.to_vec(),
        qmp: Some("/run/web1.qmp".to_owned()),
        settings,
    };
    let store = bench.machine.store();
    let settings = json!({ "argv": ["qemu-system-x86_64", "-m", "1G"], "every_s": 300 });
    store.update_vm(&vm, &spec(&names[1..], settings.clone())).unwrap();
    let other: VmName = "web2".parse().unwrap();
    assert_eq!(store.create_vm(&vm, &spec(&names[..1], Value::Null)).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(store.create_vm(&other, &spec(&names, Value::Null)).unwrap_err().kind(), ErrorKind::Busy);
    let twice = [names[0].clone(), names[0].clone()];
    assert_eq!(store.create_vm(&other, &spec(&twice, Value::Null)).unwrap_err().kind(), ErrorKind::Invalid);
    let large = Value::from("x".repeat(70_000));
    assert_eq!(store.create_vm(&other, &spec(&names[..1], large)).unwrap_err().kind(), ErrorKind::Invalid);
    let deep = (0..200).fold(Value::Null, |inner, _| Value::from(vec![inner]));
    assert_eq!(store.create_vm(&other, &spec(&names[..1], deep)).unwrap_err().kind(), ErrorKind::Invalid);
    let gone: VolumeName = "gone".parse().unwrap();
    assert_eq!(store.create_vm(&other, &spec(&[gone], Value::Null)).unwrap_err().kind(), ErrorKind::NotFound);
    store.create_vm(&other, &spec(&names[..1], Value::Null)).unwrap();
    assert_eq!(store.rename_vm(&other, &vm).unwrap_err().kind(), ErrorKind::Exists);
    store.rename_vm(&other, &"db1".parse().unwrap()).unwrap();

    save(&bench, &vm, 0, 5);
    let grown = store.memory_volume(&vm, 100 << 20).unwrap();
    assert_eq!(grown.info().capacity, 100 << 20);
    let hidden: VolumeName = "memory-1".parse().unwrap();
    assert_eq!(store.volumes().len(), 2, "nobody sees the memory");
    assert_eq!(store.volume(&hidden).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.destroy_volume(&hidden, true).unwrap_err().kind(), ErrorKind::NotFound);
    drop(grown);

    bench.restart(Crash::PowerCut);
    let store = bench.machine.store();
    let seen: Vec<_> = store.vms().into_iter().map(|vm| (vm.name, vm.volumes, vm.settings)).collect();
    let expected = [
        ("db1".parse().unwrap(), vec![names[0].clone()], Value::Null),
        (vm.clone(), vec![names[1].clone()], settings),
    ];
    assert_eq!(seen, expected);
    let (first, _) = take(&bench, &vm, 7);
    let refused = store.remove_vm(&vm, false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "it has a checkpoint");
    assert!(refused.to_string().contains("--delete-checkpoints"), "{refused}");
    let segments = || bench.machine.store().segments().unwrap().len();
    let before = segments();
    store.remove_vm(&vm, true).unwrap();
    assert!(segments() < before, "its memory is given back");
    assert_eq!(store.checkpoint(first).unwrap_err().kind(), ErrorKind::NotFound);
    store.create_vm(&vm, &spec(&names[1..], Value::Null)).unwrap();
    let ids: Vec<u64> = store.vms().iter().map(|vm| vm.id.0).collect();
    assert_eq!(ids, [2, 3], "numbers are not given out again");
}

#[test]
fn a_worn_memory_volume_is_replaced_and_goes_with_its_last_checkpoint() {
    let (mut bench, vm) = bench(11);
    let memory = |bench: &Bench| bench.machine.store().vm(&vm).unwrap().memory;
    let (first, _) = take(&bench, &vm, 1);
    let worn = memory(&bench).unwrap();
    let mut last = first;
    for stamp in 2.. {
        assert!(stamp < 100, "it is never replaced");
        last = take(&bench, &vm, stamp).0;
        if memory(&bench) != Some(worn) {
            // A whole image, of what was written since alone.
            assert_eq!(memory_of(&bench, last), [stamp, 0]);
            break;
        }
        bench.machine.store().delete_checkpoint(last).unwrap();
    }
    assert_eq!(memory_of(&bench, first), [1, 0], "{HELD}: a checkpoint in the old volume");
    for how in [Crash::Kill, Crash::PowerCut] {
        bench.restart(how);
        assert_eq!(memory_of(&bench, first), [1, 0], "{HELD}: after a crash");
    }
    let fresh = memory(&bench).unwrap();
    let segments_of = |bench: &Bench, id| {
        bench.machine.store().segments().unwrap().into_iter().filter(|s| s.volume == id).count()
    };

    // Back to the old one: the machine goes on there, and the next checkpoint begins in a new one again.
    bench.machine.store().rewind_memory(&vm, Some(first)).unwrap();
    assert_eq!(memory(&bench), Some(worn));
    assert_eq!(memory_head(&bench, &vm), [1, 0]);
    bench.machine.store().revert_vm(&vm, last, false).unwrap();
    assert_eq!((memory(&bench), memory_head(&bench, &vm)), (Some(fresh), memory_of(&bench, last)));

    assert_ne!(segments_of(&bench, worn), 0);
    bench.machine.store().delete_checkpoint(first).unwrap();
    bench.restart(Crash::Kill);
    assert_eq!(segments_of(&bench, worn), 0, "nothing names it, and it is still there");
    assert_eq!(memory_of(&bench, last)[1], 0);
    // The one in use stays, though nothing names it either.
    bench.machine.store().delete_checkpoint(last).unwrap();
    assert_eq!(memory(&bench), Some(fresh));
    bench.machine.store().remove_vm(&vm, false).unwrap();
    bench.restart(Crash::Kill);
    assert_eq!(segments_of(&bench, fresh), 0);
}
