//! Replies find who asked, and events keep their place among them.

use std::time::{SystemTime, UNIX_EPOCH};

use qmp_bridge::fake::{Fake, Say, Transcript};
use qmp_bridge::{Backlog, Client, EventKind, MigrationStatus, Notice, Options};
use serde_json::{Value, json};

use crate::timely;

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

#[tokio::test]
async fn of_a_hundred_commands_each_gets_its_own_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake =
        Fake::answering(&path, (10, 0, 2), |_, arguments| vec![Say::Return(arguments["n"].clone())]).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let calls: Vec<_> = (0..100)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.execute_raw("echo", json!({ "n": n })).await })
        })
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(timely(call).await.unwrap().unwrap(), n);
    }
}

#[tokio::test]
async fn answers_in_another_order_find_their_questions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let text = r#"{"qemu": {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}}
        {"client": {"execute": "qmp_capabilities", "id": 0}}
        {"qemu": {"return": {}, "id": 0}}
        {"client": {"execute": "a", "id": 1}}
        {"client": {"execute": "b", "id": 2}}
        {"qemu": {"return": "of b", "id": 2}}
        {"qemu": {"return": "of a", "id": 1}}"#;
    let fake = Fake::replay(&path, vec![Transcript::parse(text).unwrap()]).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    assert!(!client.takes_oob());
    let both = async { tokio::join!(client.ask("a", Value::Null), client.ask("b", Value::Null)) };
    let (a, b) = timely(both).await;
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.value, b.value), (json!("of a"), json!("of b")));
    assert!(b.arrival < a.arrival);
    drop(client);
    fake.finished().await.unwrap();
}

/// An operator's `stop`, then a migration with its own, then an operator's again: only the middle one is a cut.
#[tokio::test]
async fn the_stop_of_a_cut_can_be_told_from_an_operators() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let migration = |status: &str| Say::Event("MIGRATION", json!({ "status": status }));
    let bare = |name: &'static str| Say::Event(name, json!({}));
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, _| {
        let reply = Say::Return(json!({}));
        match name {
            "stop" => vec![bare("STOP"), reply],
            "cont" => vec![bare("RESUME"), reply],
            // The reply comes in the middle of the events, as it does in real recordings.
            "migrate" => vec![
                migration("setup"),
                reply,
                migration("active"),
                bare("STOP"),
                bare("RESUME"),
                migration("completed"),
            ],
            _ => vec![reply],
        }
    })
    .unwrap();
    let before_us = now_us();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let mut subscription = client.subscribe(Backlog::default());
    let mut replies = Vec::new();
    for command in ["stop", "cont", "migrate", "stop", "query-status"] {
        replies.push(timely(client.ask(command, Value::Null)).await.unwrap().arrival);
    }
    // All that came before the last reply is here now, without waiting.
    let events: Vec<_> = std::iter::from_fn(|| subscription.try_next())
        .map(|notice| match notice {
            Notice::Event(event) => event,
            other => panic!("{other:?}"),
        })
        .collect();
    let names: Vec<_> = events.iter().map(|event| event.kind.name()).collect();
    let expected = ["STOP", "RESUME", "MIGRATION", "MIGRATION", "STOP", "RESUME", "MIGRATION", "STOP"];
    assert_eq!(names, expected);
    let arrivals: Vec<_> = events.iter().map(|event| event.arrival).collect();
    assert!(arrivals.is_sorted());
    let times: Vec<u64> = events.iter().filter_map(|event| event.time_us).collect();
    assert!(times.len() == events.len() && times.is_sorted(), "{times:?}");
    assert!(before_us <= times[0] && times[times.len() - 1] <= now_us(), "{times:?}");

    let active = EventKind::Migration { status: MigrationStatus::Active };
    let begins = events.iter().position(|event| event.kind == active).unwrap();
    let cut = events[begins..].iter().find(|event| event.kind == EventKind::Stop).unwrap();
    assert_eq!(cut.arrival, arrivals[4]);
    // Replies: stop after STOP; migrate between `setup` and `active`.
    assert!(replies[0] > arrivals[0] && replies[0] < arrivals[1]);
    assert!(replies[2] > arrivals[2] && replies[2] < arrivals[3]);
}

#[tokio::test]
async fn a_subscriber_that_lags_is_told_so_and_others_are_not_held_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake = Fake::answering(&path, (10, 0, 2), |_, _| {
        let mut said = vec![Say::Event("RTC_CHANGE", json!({ "offset": 1 })); 100];
        said.push(Say::Return(json!({})));
        said
    })
    .unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let mut lazy = client.subscribe(Backlog { count: 10, ..Backlog::default() });
    let mut keen = client.subscribe(Backlog::default());
    timely(client.execute_raw("x", Value::Null)).await.unwrap();
    let told: Vec<_> = std::iter::from_fn(|| lazy.try_next()).collect();
    assert_eq!(told.len(), 11);
    assert!(matches!(told[10], Notice::Missed { count: 90 }), "{:?}", told[10]);
    assert_eq!(std::iter::from_fn(|| keen.try_next()).count(), 100);
}

#[tokio::test]
async fn a_lost_connection_is_told_after_all_that_came_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake = Fake::answering(&path, (10, 0, 2), |_, _| {
        let reason = json!({ "guest": false, "reason": "host-signal" });
        vec![Say::Event("SHUTDOWN", reason), Say::Fault(qmp_bridge::fake::Fault::HangUp)]
    })
    .unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let mut subscription = client.subscribe(Backlog::default());
    let error = timely(client.execute_raw("x", Value::Null)).await.unwrap_err();
    assert_eq!(error.kind(), qmp_bridge::ErrorKind::Gone);
    assert!(matches!(subscription.try_next(), Some(Notice::Event(event)) if event.kind.name() == "SHUTDOWN"));
    assert!(matches!(timely(subscription.next()).await, Some(Notice::Disconnected { .. })));
    drop(client);
    assert!(timely(subscription.next()).await.is_none());
}
