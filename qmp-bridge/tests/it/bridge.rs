//! Reconnecting.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use qmp_bridge::fake::{Fake, Fault, Say};
use qmp_bridge::{Backlog, Backoff, Bridge, ErrorKind, Notice, State};
use serde_json::{Value, json};

use crate::{DEADLINE, PATIENCE, options, timely};

const FAST: Backoff = Backoff { first: Duration::from_millis(10), longest: Duration::from_millis(50) };

#[tokio::test]
async fn a_bridge_comes_back_and_repeats_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, _| {
        hears.lock().unwrap().push(name.to_owned());
        match name {
            "stop" => vec![Say::Event("STOP", json!({})), Say::Fault(Fault::HangUp)],
            _ => vec![Say::Event("RESUME", json!({})), Say::Return(json!({}))],
        }
    })
    .unwrap();
    let bridge = Bridge::start(&path, options(PATIENCE), FAST);
    let mut subscription = bridge.subscribe(Backlog::default());
    let client = timely(bridge.connected(DEADLINE)).await.unwrap();
    let error = timely(client.execute_raw("stop", Value::Null)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);

    let second = |state: &State| matches!(state, State::Connected { connection: 2, .. });
    timely(bridge.until(second)).await;
    let again = bridge.client().unwrap();
    assert_eq!(again.version().to_string(), "10.0.2");
    timely(again.execute_raw("cont", Value::Null)).await.unwrap();
    assert_eq!(*heard.lock().unwrap(), ["stop", "cont"]);
    // The old connection stays what it is.
    assert_eq!(timely(client.execute_raw("x", Value::Null)).await.unwrap_err().kind(), ErrorKind::Gone);

    let mut told = Vec::new();
    while let Some(notice) = subscription.try_next() {
        told.push(match notice {
            Notice::Event(event) => format!("{} {}", event.arrival, event.kind.name()),
            Notice::Connected { version } => format!("connected {version}"),
            Notice::Disconnected { reason } => reason.kind().to_string(),
            other => format!("{other:?}"),
        });
    }
    let expected = ["connected 10.0.2", "1 STOP", "the connection is gone", "connected 10.0.2", "2 RESUME"];
    assert_eq!(told, expected);
    drop(bridge);
}

#[tokio::test]
async fn a_bridge_says_why_it_is_not_connected_and_connects_once_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let bridge = Bridge::start(&path, options(PATIENCE), FAST);
    let error = timely(bridge.connected(Duration::from_millis(100))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(
        matches!(bridge.state(), State::Disconnected { reason } if reason.kind() == ErrorKind::Unreachable)
    );
    let _fake = Fake::answering(&path, (7, 2, 22), |_, _| vec![Say::Return(json!({}))]).unwrap();
    let client = timely(bridge.connected(DEADLINE)).await.unwrap();
    assert_eq!(client.version().to_string(), "7.2.22");
}

#[tokio::test]
async fn subscriptions_end_with_their_bridge() {
    let dir = tempfile::tempdir().unwrap();
    let bridge = Bridge::start(&dir.path().join("qmp"), options(PATIENCE), FAST);
    let mut subscription = bridge.subscribe(Backlog::default());
    drop(bridge);
    assert!(timely(subscription.next()).await.is_none());
}
