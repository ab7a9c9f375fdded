#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::index::{RocksKv, SimKv};
use crate::volume::Serving;
use cdp_types::{EpochId, Generation, VolumeName};

fn volume(id: u64, stage: Stage) -> Change {
    let (id, branch) = (VolumeId(id), BranchId(id));
    let name: VolumeName = format!("disk{id}").parse().unwrap();
    let row = VolumeRow {
        id,
        name,
        size_bytes: 4096,
        logical_block_size: 4096,
        branch,
        created_ns: 1,
        serving: None,
        stage,
    };
    let (parent, start, state) = (None, Seq::ZERO, BranchState::Kept);
    let branch = BranchRow { id: branch, volume: id, parent, start, created_ns: 1, state };
    Change::Create { volume: row, branch }
}

fn vm(id: u64, settings: Value) -> VmRow {
    VmRow {
        id: VmId(id),
        name: format!("vm{id}").parse().unwrap(),
        volumes: vec![VolumeId(1), VolumeId(2)],
        qmp: (!id.is_multiple_of(2)).then(|| "/run/qmp".to_owned()),
        settings,
        memory: Some(VolumeId(3)),
        current: None,
        created_ns: id,
    }
}

fn begun(id: u64, vm: u64) -> CheckpointRow {
    CheckpointRow {
        id: CheckpointId(id),
        vm: VmId(vm),
        label: (!id.is_multiple_of(3)).then(|| format!("c{id}").parse().unwrap()),
        pinned: false,
        mode: CheckpointMode::Hot,
        parent: None,
        created_ns: id,
        generation: Generation(1),
        epoch: None,
        base: Some((BranchId(3), Seq(id))),
        restore: json!({"capabilities": ["background-snapshot"]}),
        state: CheckpointState::Begun,
    }
}

fn saved(id: u64) -> Saved {
    let at = |volume, branch| SavedMember {
        volume: VolumeId(volume),
        branch: BranchId(branch),
        seq: Seq(10 + id),
        ordinal: Ordinal(id),
        write_cache_off: volume == 2,
    };
    let (volume, branch) = (VolumeId(3), BranchId(3));
    let memory = SavedMemory { volume, branch, seq: Seq(id), image_bytes: 4096 };
    Saved {
        seq: Seq(11 + id),
        time_ns: 7,
        members: vec![at(1, 1), at(2, 2)],
        memory,
        figures: json!({"pause_ms": 4}),
    }
}

fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z\"\\\\]{0,6}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// Pointers to all that is in a value (RFC 6901), itself first.
fn members(value: &Value, at: &str) -> Vec<String> {
    let mut all = vec![at.to_owned()];
    match value {
        Value::Object(object) => {
            for (name, member) in object {
                let name = name.replace('~', "~0").replace('/', "~1");
                all.extend(members(member, &format!("{at}/{name}")));
            }
        }
        Value::Array(array) => {
            for (nth, member) in array.iter().enumerate() {
                all.extend(members(member, &format!("{at}/{nth}")));
            }
        }
        _ => {}
    }
    all
}

/// Changes that can follow one another in any order, on two machines and four checkpoints.
fn changes() -> impl Strategy<Value = Change> {
    let (machine, number) = (1..=2_u64, 1..=4_u64);
    prop_oneof![
        (machine, json_values()).prop_map(|(id, settings)| Change::Vm { vm: vm(id, settings) }),
        (1..=2_u64).prop_map(|id| Change::RemoveVm { vm: VmId(id) }),
        (1..=2_u64, prop::option::of(1..=4_u64))
            .prop_map(|(id, c)| Change::VmCurrent { vm: VmId(id), checkpoint: c.map(CheckpointId) }),
        (number, 1..=2_u64).prop_map(|(id, of)| Change::BeginCheckpoint { checkpoint: begun(id, of) }),
        (1..=4_u64, 1..=99_u64)
            .prop_map(|(id, n)| Change::ArmEpoch { checkpoint: CheckpointId(id), epoch: EpochId(n) }),
        (1..=4_u64, 1..=2_u64).prop_map(|(id, of)| {
            let state = CheckpointState::Committed(saved(id));
            Change::Checkpoint { checkpoint: CheckpointRow { state, ..begun(id, of) } }
        }),
        (1..=4_u64, ".{0,9}")
            .prop_map(|(id, reason)| { Change::AbortCheckpoint { checkpoint: CheckpointId(id), reason } }),
        (1..=4_u64, any::<bool>()).prop_map(|(id, pinned)| {
            Change::EditCheckpoint { checkpoint: CheckpointId(id), label: None, pinned }
        }),
        (1..=4_u64).prop_map(|id| Change::DeleteCheckpoint { checkpoint: CheckpointId(id) }),
    ]
}

/// Changes of three volumes, and of what is theirs, that can follow one another in any order.
fn volume_changes() -> impl Strategy<Value = Change> {
    let volume = || (1..=3_u64).prop_map(VolumeId);
    let branch = || (1..=8_u64).prop_map(BranchId);
    let label = || (1..=3_u64).prop_map(|number| format!("mark{number}").parse::<Label>().unwrap());
    let seq = || (0..=9_u64).prop_map(Seq);
    prop_oneof![
        (branch(), volume(), prop::option::of((branch(), seq())), seq()).prop_map(
            |(id, volume, parent, start)| {
                let state = BranchState::Kept;
                Change::Revert { branch: BranchRow { id, volume, parent, start, created_ns: 1, state } }
            }
        ),
        branch().prop_map(|branch| Change::DeleteBranch { branch }),
        branch().prop_map(|branch| Change::ForgetBranch { branch }),
        (volume(), label(), branch(), seq()).prop_map(|(volume, label, branch, seq)| {
            let metadata = BTreeMap::from([("why".to_owned(), "a \"test\"".to_owned())]);
            Change::Mark { mark: MarkRow { volume, label, branch, seq, time_ns: 2, metadata } }
        }),
        (volume(), label()).prop_map(|(volume, label)| Change::Unmark { volume, label }),
        volume().prop_map(|volume| Change::Destroy { volume }),
        volume().prop_map(|volume| Change::Reclaim { volume }),
        volume().prop_map(|volume| Change::Retire { volume }),
        (volume(), 1..=9_u64).prop_map(|(volume, n)| Change::Resize { volume, size_bytes: n * 4096 }),
    ]
}

fn applied(changes: &[Change]) -> (Catalogue, WriteBatch) {
    let (mut catalogue, mut rows) = (Catalogue::default(), WriteBatch::new());
    for change in changes {
        // Some speak of what is not there: rows and memory agree all the same.
        let _ = catalogue.apply(change, &mut rows);
    }
    (catalogue, rows)
}

/// The same, and the rows are as the database has them.
fn stored(changes: &[Change]) -> (Catalogue, WriteBatch) {
    let (catalogue, mut rows) = applied(changes);
    let place = Position { ordinal: Ordinal(1), crc: 0, incarnation: 0, offset: 0, time_ns: 0, seq: Seq(1) };
    put(&mut rows, POSITION_KEY, &(place, catalogue.last));
    (catalogue, rows)
}

fn base() -> Vec<Change> {
    vec![volume(1, Stage::Visible), volume(2, Stage::Visible), volume(3, Stage::Memory)]
}

proptest! {
    #[test]
    fn a_record_of_machines_is_read_back_as_it_was_written(changes in prop::collection::vec(changes(), 0..20)) {
        let body = serde_json::to_vec(&changes).unwrap();
        let read: Vec<Change> = serde_json::from_slice(&body).unwrap();
        prop_assert_eq!(read, changes);
    }

    #[test]
    fn rows_say_what_the_log_says(
        changes in prop::collection::vec(prop_oneof![changes(), volume_changes()], 0..60)
    ) {
        let changes: Vec<Change> = base().into_iter().chain(changes).collect();
        let (catalogue, rows) = stored(&changes);
        let kv = SimKv::synced();
        kv.write(&rows).unwrap();
        let (loaded, _) = Catalogue::load(&kv).unwrap().unwrap();
        prop_assert_eq!(loaded, catalogue);
    }

    #[test]
    fn any_json_is_a_record_or_an_error(change in changes(), at in any::<prop::sample::Index>(), with in json_values()) {
        // One member of a record that would be one, somewhere in it, is something else.
        let mut record = serde_json::to_value(&change).unwrap();
        let places = members(&record, "");
        let place = at.get(&places);
        *record.pointer_mut(place).unwrap() = with;
        if let Ok(read) = serde_json::from_value::<Change>(record) {
            let again = serde_json::to_value(&read).unwrap();
            prop_assert_eq!(serde_json::from_value::<Change>(again).unwrap(), read);
        }
    }
}

#[test]
fn of_a_write_cache_only_that_it_is_off_is_said() {
    let told = serde_json::to_value(saved(1)).unwrap();
    assert!(
        told["members"][0].get("write_cache_off").is_none(),
        "as in stores from before there was that member"
    );
    assert_eq!(told["members"][1]["write_cache_off"], true);
    assert_eq!(serde_json::from_value::<Saved>(told).unwrap(), saved(1));
}

#[test]
fn a_member_from_a_newer_program_is_refused_wherever_it_stands() {
    let Change::Create { volume: mut served, branch } = volume(1, Stage::Visible) else { unreachable!() };
    served.serving = Some(Serving { socket: "/run/disk1.sock".to_owned(), queues: 1 });
    let (label, metadata) = ("before".parse().unwrap(), BTreeMap::new());
    let mark = MarkRow { volume: VolumeId(1), label, branch: branch.id, seq: Seq(1), time_ns: 2, metadata };
    let state = CheckpointState::Committed(saved(1));
    let records = [
        Change::Create { volume: served, branch },
        Change::Fence { fences: vec![(VolumeId(1), Fence { last: Ordinal(1), generation: Generation(1) })] },
        Change::Mark { mark },
        Change::Vm { vm: vm(1, Value::Null) },
        Change::Checkpoint { checkpoint: CheckpointRow { state, ..begun(1, 1) } },
    ];
    // What is in these belongs to whoever made the record.
    let free = ["/mark/metadata", "/checkpoint/restore", "/figures"];
    let mut refused = 0;
    for record in &records {
        let told = serde_json::to_value(record).unwrap();
        for place in members(&told, "") {
            let mut newer = told.clone();
            let Some(object) = newer.pointer_mut(&place).unwrap().as_object_mut() else { continue };
            object.insert("newer".to_owned(), json!("text"));
            let read = serde_json::from_value::<Change>(newer);
            assert_eq!(read.is_ok(), free.iter().any(|end| place.ends_with(end)), "{place} of {told}");
            refused += usize::from(read.is_err());
        }
    }
    assert!(refused > 12, "only {refused} objects");
}

#[test]
fn numbers_are_not_given_out_again() {
    let mut changes = base();
    changes.push(Change::Vm { vm: vm(1, Value::Null) });
    changes.push(Change::BeginCheckpoint { checkpoint: begun(1, 1) });
    changes.push(Change::ArmEpoch { checkpoint: CheckpointId(1), epoch: EpochId(5) });
    changes.push(Change::RemoveVm { vm: VmId(1) });
    let (catalogue, _) = applied(&changes);
    assert!(catalogue.checkpoints.is_empty(), "a machine's checkpoints go with it");
    let next = (catalogue.next_vm(), catalogue.next_checkpoint(), catalogue.next_epoch());
    assert_eq!(next, (VmId(2), CheckpointId(2), EpochId(6)));
}

#[test]
fn a_checkpoint_pins_its_disks_and_its_memory_once_it_is_complete() {
    let mut changes = base();
    changes.push(Change::Vm { vm: vm(1, Value::Null) });
    changes.push(Change::BeginCheckpoint { checkpoint: begun(1, 1) });
    let (catalogue, _) = applied(&changes);
    assert!(!catalogue.is_needed(BranchId(1)), "it is not complete");
    let state = CheckpointState::Committed(saved(1));
    changes.push(Change::Checkpoint { checkpoint: CheckpointRow { state, ..begun(1, 1) } });
    let (catalogue, _) = applied(&changes);
    assert!((1..=3).all(|branch| catalogue.is_needed(BranchId(branch))));
    assert_eq!(catalogue.vms[&VmId(1)].current, Some(CheckpointId(1)));
    changes.push(Change::DeleteCheckpoint { checkpoint: CheckpointId(1) });
    let (catalogue, _) = applied(&changes);
    assert!((1..=3).all(|branch| !catalogue.is_needed(BranchId(branch))));
    assert_eq!(catalogue.vms[&VmId(1)].current, None);
}

#[test]
fn only_the_newest_failures_are_remembered() {
    let mut changes = base();
    changes.push(Change::Vm { vm: vm(1, Value::Null) });
    for id in 1..=40 {
        changes.push(Change::BeginCheckpoint { checkpoint: begun(id, 1) });
        let reason = "no space".to_owned();
        changes.push(Change::AbortCheckpoint { checkpoint: CheckpointId(id), reason });
    }
    let (catalogue, _) = applied(&changes);
    let kept: Vec<u64> = catalogue.checkpoints.keys().map(|id| id.0).collect();
    assert_eq!(kept, (25..=40).collect::<Vec<_>>());
}

#[test]
fn nothing_is_said_that_could_not_be_taken_in_and_what_was_said_twice_does_no_harm() {
    let mut rows = WriteBatch::new();
    let mut catalogue = Catalogue::default();
    let (id, branch) = (VolumeId(1), BranchId(1));
    assert!(catalogue.check(&[Change::Destroy { volume: id }]).is_err());
    let create = volume(1, Stage::Visible);
    catalogue.check(&[create.clone(), Change::Destroy { volume: id }]).unwrap();
    catalogue.apply(&create, &mut rows).unwrap();
    for change in
        [Change::Destroy { volume: id }, Change::ForgetBranch { branch }, Change::Reclaim { volume: id }]
    {
        catalogue.check(std::slice::from_ref(&change)).unwrap();
        catalogue.apply(&change, &mut rows).unwrap();
    }
    catalogue.apply(&Change::Retire { volume: id }, &mut rows).unwrap();
    let before = catalogue.clone();
    for change in
        [Change::Destroy { volume: id }, Change::ForgetBranch { branch }, Change::Reclaim { volume: id }]
    {
        let refused = catalogue.check(std::slice::from_ref(&change)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound);
        catalogue.apply(&change, &mut rows).unwrap();
    }
    assert!(catalogue == before);
    // Of what was never made the log cannot speak.
    assert!(catalogue.apply(&Change::Reclaim { volume: VolumeId(2) }, &mut rows).is_err());
    assert!(catalogue.apply(&Change::Rename { volume: id, name: "x".parse().unwrap() }, &mut rows).is_err());
}

/// A clone, volume 3, whose branch 4 went on from volume 2 and has been forgotten, and whose branch 5 goes on from volume 1.
fn gone_back_behind_its_source() -> Vec<Change> {
    let begin = |id, of, parent| {
        let (id, volume, parent) = (BranchId(id), VolumeId(of), Some((BranchId(parent), Seq(9))));
        let state = BranchState::Kept;
        Change::Revert { branch: BranchRow { id, volume, parent, start: Seq(10), created_ns: 1, state } }
    };
    let mut changes: Vec<Change> = (1..=3).map(|id| volume(id, Stage::Visible)).collect();
    changes.extend([begin(4, 3, 2), begin(5, 3, 1)]);
    changes.push(Change::DeleteBranch { branch: BranchId(4) });
    changes.push(Change::ForgetBranch { branch: BranchId(4) });
    changes
}

#[test]
fn a_clones_mark_keeps_the_source_whose_instant_it_names() {
    let mut changes = gone_back_behind_its_source();
    let (catalogue, _) = applied(&changes);
    assert!(catalogue.is_shared(VolumeId(1)) && !catalogue.is_shared(VolumeId(2)));
    let label: Label = "old".parse().unwrap();
    let mark = MarkRow {
        volume: VolumeId(3),
        label: label.clone(),
        branch: BranchId(2),
        seq: Seq(7),
        time_ns: 2,
        metadata: BTreeMap::new(),
    };
    changes.push(Change::Mark { mark });
    changes.push(Change::Destroy { volume: VolumeId(2) });
    let (catalogue, _) = applied(&changes);
    assert!(catalogue.is_shared(VolumeId(2)), "the mark names an instant of it");
    changes.push(Change::Unmark { volume: VolumeId(3), label });
    let (catalogue, _) = applied(&changes);
    assert!(!catalogue.is_shared(VolumeId(2)));
}

#[test]
fn what_is_forgotten_of_a_volume_is_not_there_again_once_it_is_destroyed() {
    let mut changes = gone_back_behind_its_source();
    changes.push(Change::Destroy { volume: VolumeId(3) });
    let (catalogue, _) = applied(&changes);
    let state = |branch| catalogue.branches[&BranchId(branch)].state;
    assert_eq!([3, 4, 5].map(state), [BranchState::Deleted, BranchState::Gone, BranchState::Deleted]);
    assert!(!catalogue.is_shared(VolumeId(2)), "nothing that is left inherits from it");
}

#[test]
fn a_database_that_has_rotted_counts_as_none() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open_synced(directory.path()).unwrap();
    kv.write(&stored(&base()).1).unwrap();
    kv.flush().unwrap();
    assert!(Catalogue::load(&kv).unwrap().is_some());
    drop(kv);
    let mut files = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let table = files.find(|path| path.extension().is_some_and(|e| e == "sst")).unwrap();
    let mut bytes = std::fs::read(&table).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&table, bytes).unwrap();
    let kv = RocksKv::open_synced(directory.path()).unwrap();
    assert!(Catalogue::load(&kv).unwrap().is_none());
}

#[test]
fn a_row_of_an_unknown_kind_has_the_log_asked() {
    let kv = SimKv::synced();
    kv.write(&stored(&base()).1).unwrap();
    assert!(Catalogue::load(&kv).unwrap().is_some());
    let mut newer = WriteBatch::new();
    put(&mut newer, b"policy/00000000000000000001", &json!({"id": 1}));
    kv.write(&newer).unwrap();
    assert!(Catalogue::load(&kv).unwrap().is_none());
}
