//! The QEMU that is installed here.

use std::path::Path;
use std::time::Duration;

use qmp_bridge::machine::Backend;
use qmp_bridge::migration::{self, Mode, Plan, Saved, Settings};
use qmp_bridge::{
    Backlog, Backoff, Bridge, Client, ErrorKind, EventKind, MigrationStatus, Notice, Options, State, control,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use crate::qemu::{Qemu, SMALL, furnished, storage_daemon};
use crate::scenario::{checkpoint, describe};
use crate::{DEADLINE, SOON, options, timely};

const QEMU: &str = "qemu-system-x86_64";
const NONE: [&str; 3] = ["-machine", "none", "-S"];

/// Reads a machine's state: how many bytes it had.
fn sink(stream: &Path) -> JoinHandle<usize> {
    let listener = UnixListener::bind(stream).unwrap();
    tokio::spawn(async move {
        let (mut state, _) = listener.accept().await.unwrap();
        let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
        loop {
            match state.read(&mut buffer).await {
                Ok(0) | Err(_) => return total,
                Ok(count) => total += count,
            }
        }
    })
}

#[tokio::test]
async fn qemu_is_stopped_continued_reset_and_ended() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), SMALL);
    let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    assert!(client.takes_oob());
    let mut events = client.subscribe(Backlog::default());
    timely(async {
        control::stop(&client).await.unwrap();
        assert_eq!(control::run_state(&client).await.unwrap().status, "paused");
        control::run_again(&client).await.unwrap();
        control::run_again(&client).await.unwrap();
        assert!(control::run_state(&client).await.unwrap().running);
        control::system_reset(&client).await.unwrap();
        control::quit(&client).await.unwrap();
        assert_eq!(client.ended().await.kind(), ErrorKind::Gone);
    })
    .await;
    let mut told = Vec::new();
    while let Some(Notice::Event(event)) = events.try_next() {
        assert!(event.time_us.is_some());
        told.push(event.kind);
    }
    assert_eq!(told[..2], [EventKind::Stop, EventKind::Resume]);
    assert!(
        told.contains(&EventKind::Reset { guest: false, reason: "host-qmp-system-reset".into() }),
        "{told:?}"
    );
    let quit = EventKind::Shutdown { guest: false, reason: "host-qmp-quit".into() };
    assert_eq!(told.last(), Some(&quit), "{told:?}");
}

#[tokio::test]
async fn commands_side_by_side_unknown_ones_and_refused_ones() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), &NONE);
    let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.execute(qapi_qmp::query_name {}).await })
        })
        .collect();
    for call in calls {
        timely(call).await.unwrap().unwrap();
    }
    // The longest answer there is.
    let schema = timely(client.execute_raw("query-qmp-schema", Value::Null)).await.unwrap();
    assert!(schema.as_array().unwrap().len() > 500);
    let unknown = timely(client.execute_raw("make-coffee", Value::Null)).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::UnknownCommand);
    let refused = timely(client.execute_raw("device_del", json!({ "id": "none" }))).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert_eq!(refused.refusal().unwrap().class, "DeviceNotFound");
    // Out of band goes through, and is refused for its own reason only.
    let paused = timely(client.execute_oob("migrate-pause", Value::Null)).await.unwrap_err();
    assert_eq!(paused.kind(), ErrorKind::Refused, "{paused}");
}

#[tokio::test]
async fn a_second_client_is_told_that_the_socket_is_held_and_gets_it_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), &NONE);
    let first = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    let backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(50) };
    let bridge = Bridge::start(&qemu.qmp, options(SOON), backoff);
    let held =
        |state: &State| matches!(state, State::Disconnected { reason } if reason.kind() == ErrorKind::Held);
    timely(bridge.until(held)).await;
    drop(first);
    timely(bridge.connected(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn a_bridge_outlives_its_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), &NONE);
    let bridge = Bridge::start(&qemu.qmp, Options::default(), Backoff::default());
    let client = timely(bridge.connected(DEADLINE)).await.unwrap();
    drop(qemu);
    assert_eq!(timely(client.ended()).await.kind(), ErrorKind::Gone);
    std::fs::remove_file(dir.path().join("qmp")).unwrap();
    let _qemu = Qemu::start(QEMU, dir.path(), &NONE);
    timely(bridge.until(|state| matches!(state, State::Connected { connection: 2, .. }))).await;
}

#[tokio::test]
async fn a_furnished_machine_is_described() {
    let dir = tempfile::tempdir().unwrap();
    let (vhost, disk) = (dir.path().join("vhost"), dir.path().join("disk"));
    std::fs::create_dir(&disk).unwrap();
    let _daemon = storage_daemon(&vhost);
    let arguments = furnished(&vhost, &disk);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let qemu = Qemu::start(QEMU, dir.path(), &arguments);
    let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    let machine = timely(describe(&client)).await.unwrap();
    assert_eq!(machine.served_elsewhere().map(|device| device.name()).collect::<Vec<_>>(), ["blk0"]);
    assert_eq!(machine.devices[0].backend, Backend::VhostUser { chardev: Some("vu0".into()) });
    assert_eq!(machine.chardev("vu0").unwrap().socket.as_deref(), vhost.to_str());
    assert!(!machine.blockers.is_empty());
    // And QEMU does refuse, naming the device.
    let refused = timely(migration::start(&client, &dir.path().join("stream"))).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.to_string().contains("vvfat"), "{refused}");
}

#[tokio::test]
async fn a_machine_without_shared_memory_is_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), &["-machine", "q35", "-m", "64"]);
    let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    let machine = timely(describe(&client)).await.unwrap();
    assert_eq!(machine.private_memory().map(|memory| memory.size_bytes).collect::<Vec<_>>(), [64 << 20]);
    assert_eq!((machine.name, machine.uuid), (None, None));
}

#[tokio::test]
async fn a_machine_is_saved_in_every_mode_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), SMALL);
    let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    for mode in [Mode::Hot, Mode::Live, Mode::Pause, Mode::Hot] {
        let stream = dir.path().join("stream");
        let sink = sink(&stream);
        timely(checkpoint(&client, mode, &stream)).await.unwrap().verify(mode);
        assert!(timely(sink).await.unwrap() > 100_000, "{mode}");
        std::fs::remove_file(&stream).unwrap();
    }
}

/// The process that began a checkpoint dies while QEMU stands still at the switchover; another one winds it down.
#[tokio::test]
async fn a_checkpoint_whose_taker_has_died_is_wound_down_by_another() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(QEMU, dir.path(), SMALL);
    let stream = dir.path().join("stream");
    let _sink = sink(&stream);
    let first = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
    let before = Settings::read(&first).await.unwrap();
    let plan = Plan::new(Mode::Live, Duration::from_millis(20));
    let saved = serde_json::to_string(&plan.changes(&first, &before, true).unwrap()).unwrap();
    let mut events = first.subscribe(Backlog::default());
    plan.apply(&first, &before).await.unwrap();
    migration::start(&first, &stream).await.unwrap();
    let waits = EventKind::Migration { status: MigrationStatus::PreSwitchover };
    timely(async {
        while !matches!(events.next().await, Some(Notice::Event(event)) if event.kind == waits) {}
    })
    .await;
    assert!(!control::run_state(&first).await.unwrap().running);
    drop(first);

    let second = timely(Client::connect(&qemu.qmp, Options::default())).await.unwrap();
    let saved: Saved = serde_json::from_str(&saved).unwrap();
    let progress = timely(migration::wind_down(&second, &saved)).await.unwrap();
    assert_eq!(progress.status, MigrationStatus::Cancelled);
    assert!(control::run_state(&second).await.unwrap().running);
    assert_eq!(Settings::read(&second).await.unwrap(), before);
}

/// Nobody reads the stream: saving hangs, in hot mode with the guest running into protected pages.
#[tokio::test]
async fn a_checkpoint_that_hangs_is_wound_down() {
    for mode in [Mode::Hot, Mode::Live] {
        let dir = tempfile::tempdir().unwrap();
        let qemu = Qemu::start(QEMU, dir.path(), SMALL);
        let stream = dir.path().join("stream");
        let listener = UnixListener::bind(&stream).unwrap();
        let client = Client::connect(&qemu.qmp, Options::default()).await.unwrap();
        let before = Settings::read(&client).await.unwrap();
        let plan = Plan::new(mode, Duration::from_millis(20));
        let saved = plan.changes(&client, &before, true).unwrap();
        plan.apply(&client, &before).await.unwrap();
        migration::start(&client, &stream).await.unwrap();
        let (held, _) = timely(listener.accept()).await.unwrap();
        let hangs = migration::settled(&client, Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(hangs.kind(), ErrorKind::Deadline);
        // Hot, QEMU's own main thread may wait for a page that is protected until it is sent, and answers nobody: the end of
        // the connection frees it.
        let held = (mode != Mode::Hot).then_some(held);
        let progress = timely(migration::wind_down(&client, &saved)).await.unwrap();
        let ended = [MigrationStatus::Cancelled, MigrationStatus::Failed];
        assert!(ended.contains(&progress.status), "{mode}: {progress:?}");
        assert!(control::run_state(&client).await.unwrap().running);
        assert_eq!(Settings::read(&client).await.unwrap(), before);
        drop(held);
    }
}
