//! Going back into another QEMU.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cdp_store::{CheckpointMode, CheckpointSpec};
use ckpt::restore::{check_waiting, differences, restore};
use ckpt::take::recover;
use qmp_bridge::fake::{AgentConduct, Fake, GuestAgent, Say};
use qmp_bridge::migration::{Mode, Plan, Settings};
use qmp_bridge::{Client, Options};
use serde_json::{Value, json};

use super::Bed;

/// What a QEMU of this version, machine type and memory that waits for a machine has that the checkpoint's had not.
async fn found(
    bed: &Bed,
    version: (u32, u32, u32),
    machine: &str,
    memory: u64,
    state: &str,
) -> Result<String, String> {
    let id = bed.store.checkpoints(&bed.vm).unwrap().pop().unwrap().id;
    let path = bed.directory.path().join(format!("other-{}-{machine}-{memory}-{state}", version.1));
    let (qemu, machine, state) = (bed.qemu.clone(), format!("{machine}-machine"), state.to_owned());
    let answer = move |name: &str, arguments: &serde_json::Value| match name {
        "query-status" => vec![Say::Return(json!({ "running": false, "status": state }))],
        "query-memory-size-summary" => vec![Say::Return(json!({ "base-memory": memory }))],
        "qom-get" if arguments["path"] == "/machine" => vec![Say::Return(json!(machine))],
        _ => qemu.answer(name, arguments),
    };
    let _fake = Fake::answering(&path, version, answer).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let found = async {
        check_waiting(&client).await?;
        differences(&bed.store, id, &client).await
    };
    found.await.map(|all| all.join("; ")).map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_is_refused_with_both_values_before_anything_is_touched() {
    let bed = Bed::new().await;
    bed.take(&Bed::order(CheckpointMode::Pause), &[]).await.unwrap();
    bed.qemu.state().commands.clear();
    let (version, machine, memory) = ((10, 0, 2), "pc-1.0", 1 << 20);
    assert_eq!(found(&bed, version, machine, memory, "inmigrate").await.unwrap(), "");
    assert_eq!(
        found(&bed, (10, 1, 0), machine, memory, "inmigrate").await.unwrap(),
        "",
        "a later one takes it"
    );
    let older = found(&bed, (9, 2, 0), machine, memory, "inmigrate").await.unwrap();
    assert!(older.contains("10.0.2") && older.contains("9.2.0"), "{older}");
    let other = found(&bed, version, "pc-2.0", memory, "inmigrate").await.unwrap();
    assert!(other.contains("pc-1.0") && other.contains("pc-2.0"), "{other}");
    let larger = found(&bed, version, machine, 2 << 20, "inmigrate").await.unwrap();
    assert!(larger.contains("1048576 bytes") && larger.contains("2097152 bytes"), "{larger}");
    let running = found(&bed, version, machine, memory, "running").await.unwrap_err();
    assert!(running.contains("-incoming defer"), "{running}");
    let touched = ["migrate-incoming", "cont", "migrate-set-capabilities"];
    let commands = bed.qemu.state().commands.clone();
    assert!(!commands.iter().any(|name| touched.contains(&name.as_str())), "{commands:?}");
}

/// Where a QEMU that waits for the newest checkpoint is told to listen, which it does not do.
async fn told_to_listen(bed: &Bed, name: &str) -> String {
    let id = bed.newest().unwrap();
    let path = bed.directory.path().join(name);
    let (qemu, told) = (bed.qemu.clone(), Arc::new(Mutex::new(String::new())));
    let hears = Arc::clone(&told);
    let answer = move |name: &str, arguments: &serde_json::Value| match name {
        "query-status" => vec![Say::Return(json!({ "running": false, "status": "inmigrate" }))],
        "query-migrate" => vec![Say::Return(json!({ "status": "none" }))],
        "migrate-incoming" => {
            *hears.lock().unwrap() = arguments["uri"].as_str().unwrap_or_default().to_owned();
            vec![Say::Return(json!({}))]
        }
        _ => qemu.answer(name, arguments),
    };
    let _fake = Fake::answering(&path, (10, 0, 2), answer).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let restored = restore(&bed.store, id, &client, bed.directory.path(), true).await;
    assert!(restored.is_err(), "nobody has taken it");
    told.lock().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_are_given_one_checkpoint_at_a_time_do_not_share_a_socket() {
    let bed = Bed::new().await;
    bed.take(&Bed::order(CheckpointMode::Pause), &[]).await.unwrap();
    let (one, other) = (told_to_listen(&bed, "one").await, told_to_listen(&bed, "other").await);
    assert!(one.starts_with("unix:") && one.ends_with(".sock"), "{one}");
    assert_ne!(one, other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_does_not_take_the_memory_is_told_of_with_all_that_is_known() {
    let bed = Bed::new().await;
    // More than there is room for in a socket that nobody reads.
    bed.qemu.state().pages = (1..=4096).collect();
    let id = bed.take(&Bed::order(CheckpointMode::Pause), &[]).await.unwrap().id;
    let path = bed.directory.path().join("picky");
    let answer = move |name: &str, arguments: &Value| match name {
        "query-status" => vec![Say::Return(json!({ "running": false, "status": "inmigrate" }))],
        "query-migrate" => {
            vec![Say::Return(json!({ "status": "failed", "error-desc": "Unknown section 'x'" }))]
        }
        "migrate-incoming" => {
            let uri = arguments["uri"].as_str().unwrap_or_default();
            let listener = UnixListener::bind(uri.trim_start_matches("unix:")).unwrap();
            std::thread::spawn(move || drop(listener.accept()));
            vec![Say::Return(json!({}))]
        }
        _ => vec![Say::Return(json!({}))],
    };
    let _fake = Fake::answering(&path, (10, 0, 2), answer).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let restored = restore(&bed.store, id, &client, bed.directory.path(), true).await;
    let error = restored.unwrap_err().to_string();
    assert!(error.contains("standard error") && error.contains("Unknown section 'x'"), "{error}");
    assert!(error.contains("sending: "), "what the socket said is missing: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_waits_for_a_machine_is_not_put_back_as_the_one_before_it_was() {
    let bed = Bed::new().await;
    let client = Client::connect(&bed.directory.path().join("qmp"), Options::default()).await.unwrap();
    let before = Settings::read(&client).await.unwrap();
    let plan = Plan::new(Mode::Pause, Duration::from_millis(20));
    let settings = plan.changes(&client, &before, true).unwrap();
    let (path, port) = (bed.directory.path().join("waiting"), bed.directory.path().join("agent"));
    let agent = GuestAgent::start(&port, AgentConduct::Obeys).unwrap();
    let restore = json!({ "qmp": path, "settings": settings, "agent": port });
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore };
    let left = bed.store.begin_checkpoint(&bed.vm, spec).unwrap();

    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let answer = move |name: &str, _: &Value| {
        hears.lock().unwrap().push(name.to_owned());
        match name {
            "query-status" => vec![Say::Return(json!({ "running": false, "status": "inmigrate" }))],
            _ => vec![Say::Return(json!({}))],
        }
    };
    let _fake = Fake::answering(&path, (10, 0, 2), answer).unwrap();
    let waiting = Client::connect(&path, Options::default()).await.unwrap();
    recover(&bed.store, &left, Some(&waiting)).await.unwrap();
    assert_eq!(*heard.lock().unwrap(), ["query-status"]);
    assert_eq!(agent.thaws(), 0, "there is no guest yet");
    bed.assert_aborted("the daemon ended");
}
