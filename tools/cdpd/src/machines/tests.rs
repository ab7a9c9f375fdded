//! One thing at a time with a machine, and what may be done with it meanwhile.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixListener;

use cdp_store::{CheckpointSpec, StoreOptions, VmSpec, VolumeSpec};
use ckpt::doctor::Verdict;
use qmp_bridge::fake::{Fake, Transcript};

use super::*;
use crate::config::VhostUser;

/// The machines of a new store in a directory, and one of them, whose QMP socket would be `qmp` there.
fn one_machine(directory: &Path) -> (Store, Arc<Machines>, VmInfo) {
    let path = directory.join("store");
    let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
    Store::create(&path, &options).unwrap();
    let store = Store::open(&path, options).unwrap();
    let disk: VolumeName = "web1".parse().unwrap();
    store.create_volume(&disk, VolumeSpec { size_bytes: 4096, logical_block_size: 512 }).unwrap();
    let qmp = Some(directory.join("qmp").display().to_string());
    let spec = VmSpec { volumes: vec![disk], qmp, settings: serde_json::Value::Null };
    let info = store.create_vm(&"web1".parse().unwrap(), &spec).unwrap();
    let gate = Gate::new(store.clone());
    (store.clone(), Arc::new(Machines::new(store, gate, directory, None)), info)
}

#[test]
fn a_machine_that_is_being_put_back_and_its_disks_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, VmInfo { name: vm, .. }) = one_machine(directory.path());
    let [disk, other]: [VolumeName; 2] = ["web1", "other"].map(|name| name.parse().unwrap());

    let (cancel, _) = watch::channel(false);
    let (_, progress) = watch::channel(Taking::default());
    let taking = machines.begin(&vm, Work::Taking { cancel, progress }).unwrap();
    assert!(machines.begin(&vm, Work::Returning).is_err_and(|error| error.kind == ErrorKind::Busy));
    machines.check_disks([&disk].into_iter()).unwrap();
    drop(taking);
    let returning = machines.begin(&vm, Work::Returning).unwrap();
    assert!(machines.begin(&vm, Work::Returning).is_err_and(|error| error.kind == ErrorKind::Busy));
    let refusal = machines.check_disks([&other, &disk].into_iter()).unwrap_err();
    assert!(refusal.kind == ErrorKind::Busy && refusal.message.contains("'web1'"), "{refusal:?}");
    machines.check_disks([&other].into_iter()).unwrap();
    assert!(machines.cancel(&vm).is_err(), "there is no checkpoint to give up");
    drop(returning);
    machines.check_disks([&disk].into_iter()).unwrap();
    store.close().unwrap();
}

#[tokio::test]
async fn a_stop_gives_checkpoints_up_and_waits_for_machines_that_are_being_put_back() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, _) = one_machine(directory.path());
    let [one, other]: [VmName; 2] = ["web1", "web2"].map(|name| name.parse().unwrap());

    let returning = machines.begin(&one, Work::Returning).unwrap();
    let (cancel, cancelled) = watch::channel(false);
    let (_, progress) = watch::channel(Taking::default());
    let taking = machines.begin(&other, Work::Taking { cancel, progress }).unwrap();
    let mut stopping = std::pin::pin!(machines.stop());
    let soon = Duration::from_millis(100);
    assert!(tokio::time::timeout(soon, &mut stopping).await.is_err(), "a checkpoint is being taken");
    assert!(*cancelled.borrow());
    drop(taking);
    assert!(tokio::time::timeout(soon, &mut stopping).await.is_err(), "a machine is being put back");
    assert!(machines.begin(&other, Work::Returning).is_err_and(|e| e.kind == ErrorKind::Unavailable));
    drop(returning);
    stopping.await;
    store.close().unwrap();
}

#[tokio::test]
async fn a_checkpoint_that_waits_for_its_qemu_to_start_can_be_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, info) = one_machine(directory.path());
    let _starting = machines.supervisors.attach(info.name.clone()).unwrap();
    let order = machines.order(&info, NewCheckpoint::default()).unwrap();
    let (cancel, cancelled) = watch::channel(false);
    let hold = Hold { cancel: cancelled, progress: watch::Sender::new(Taking::default()) };
    let mut taking = std::pin::pin!(Arc::clone(&machines).take_from(info, Vec::new(), order, hold));
    let soon = Duration::from_millis(100);
    assert!(tokio::time::timeout(soon, &mut taking).await.is_err(), "its QEMU may come yet");
    cancel.send_replace(true);
    let outcome = tokio::time::timeout(STARTING / 3, taking).await.unwrap();
    assert!(outcome.unwrap_err().message.contains("cancelled"));
    store.close().unwrap();
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_qemu_that_is_to_be_given_memory() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, info) = one_machine(directory.path());
    let restore = serde_json::Value::Null;
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore };
    let to = store.begin_checkpoint(&info.name, spec).unwrap().id;
    let gate = Gate::new(store.clone());
    let servers = Servers::new(store.clone(), PathBuf::new(), VhostUser::default(), gate);
    // Its supervisor has started it, by its own word, and its socket is not there yet.
    let _place = machines.supervisors.attach(info.name.clone()).unwrap();
    machines.supervisors.report(&info.name, Supervised::Waiting).unwrap();
    let mut ready = std::pin::pin!(machines.make_ready(&servers, &info, to));
    let soon = Duration::from_millis(100);
    assert!(tokio::time::timeout(soon, &mut ready).await.is_err(), "it may come yet");
    machines.stop().await;
    let outcome = tokio::time::timeout(STARTING / 3, ready).await.unwrap();
    assert_eq!(outcome.unwrap_err().kind, ErrorKind::Unavailable);
    store.close().unwrap();
}

#[test]
fn a_checkpoint_that_could_not_be_ended_when_it_failed_is_ended_later() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, VmInfo { name: vm, .. }) = one_machine(directory.path());
    let begin = || {
        let restore = serde_json::Value::Null;
        let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore };
        store.begin_checkpoint(&vm, spec)
    };
    let left = begin().unwrap().id;
    assert_eq!(begin().unwrap_err().kind(), cdp_store::ErrorKind::Busy);
    machines.end_left(&vm).unwrap();
    assert!(matches!(store.checkpoint(left).unwrap().state, CheckpointState::Aborted { .. }));
    machines.end_left(&vm).unwrap();
    let other = begin().unwrap().id;
    store.close().unwrap();
    drop((machines, store));

    // What a dead daemon has begun has to be undone outside the store as well.
    let store = Store::open(&directory.path().join("store"), StoreOptions::default()).unwrap();
    let machines = Machines::new(store.clone(), Gate::new(store.clone()), directory.path(), None);
    machines.end_left(&vm).unwrap();
    assert_eq!(store.checkpoint(other).unwrap().state, CheckpointState::Begun);
    store.close().unwrap();
}

/// A QEMU that is asked how it does.
fn qemu_that_is(state: &str) -> Transcript {
    let text = format!(
        r#"{{"qemu": {{"QMP": {{"version": {{"qemu": {{"major": 10, "minor": 0, "micro": 2}}, "package": ""}}, "capabilities": ["oob"]}}}}}}
{{"client": {{"execute": "qmp_capabilities", "arguments": {{"enable": ["oob"]}}, "id": 0}}}}
{{"qemu": {{"return": {{}}, "id": 0}}}}
{{"client": {{"execute": "query-status", "id": 1}}}}
{{"qemu": {{"return": {{"status": "{state}", "running": false}}, "id": 1}}}}
"#
    );
    Transcript::parse(&text).unwrap()
}

#[tokio::test]
async fn a_qemu_that_has_its_memory_is_not_believed_to_wait_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, info) = one_machine(directory.path());
    assert!(!machines.has_gone_on(&info).await, "there is none");
    for (state, has_gone_on) in [("inmigrate", false), ("running", true), ("paused", true)] {
        let path = directory.path().join("qmp");
        let _qemu = Fake::replay(&path, vec![qemu_that_is(state)]).unwrap();
        assert_eq!(machines.has_gone_on(&info).await, has_gone_on, "{state}");
    }
    store.close().unwrap();
}

#[tokio::test]
async fn a_qemu_is_not_asked_while_its_machine_is_put_back() {
    let directory = tempfile::tempdir().unwrap();
    let (store, machines, info) = one_machine(directory.path());
    let qmp = UnixListener::bind(directory.path().join("qmp")).unwrap();
    qmp.set_nonblocking(true).unwrap();
    let returning = machines.begin(&info.name, Work::Returning).unwrap();
    let checks = machines.qemu(&info, &[]).await;
    assert!(matches!(&checks[..], [only] if only.verdict == Verdict::Unknown), "{checks:?}");
    assert!(qmp.accept().is_err(), "who waits for QEMU's socket is in the way of the restore");
    drop(returning);
    store.close().unwrap();
}

#[test]
fn only_sockets_of_transfers_are_removed() {
    for name in ["checkpoint-7.sock", "restore-12.sock"] {
        assert!(is_transfer(Path::new(name)), "{name}");
    }
    for name in ["cdpd.sock", "checkpoint-a.sock", "restore-1", "web1.sock", "checkpoint-.sock"] {
        assert!(!is_transfer(Path::new(name)), "{name}");
    }
}
