//! Everything that can be at the other end of a path, and what is said about it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use qmp_bridge::fake::{Fake, Fault, Say, Step, Transcript};
use qmp_bridge::{Agent, AgentOptions, Client, Error, ErrorKind, Options};
use serde_json::{Value, json};

use crate::{PATIENCE, SOON, options, patient, timely};

const GREETING: &str = r#"{"qemu": {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": ["oob"]}}}
{"client": {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 0}}
{"qemu": {"return": {}, "id": 0}}
"#;

fn says(text: &str) -> Transcript {
    let mut transcript = Transcript::default();
    transcript.push(Step::Fault(Fault::Say(text.into())));
    transcript
}

/// What comes of connecting to something that plays `transcript`.
async fn connecting(transcript: Transcript) -> Error {
    connecting_within(PATIENCE, transcript).await
}

async fn connecting_within(deadline: Duration, transcript: Transcript) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake = Fake::replay(&path, vec![transcript]).unwrap();
    timely(Client::connect(&path, options(deadline))).await.unwrap_err()
}

/// What comes of `query-status` where QEMU then does what `rest` says.
async fn asking(rest: &str) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let text = format!("{GREETING}{{\"client\": {{\"execute\": \"query-status\", \"id\": 1}}}}\n{rest}");
    let _fake = Fake::replay(&path, vec![Transcript::parse(&text).unwrap()]).unwrap();
    let client = patient(&path).await.unwrap();
    timely(client.execute_raw("query-status", Value::Null)).await.unwrap_err()
}

#[tokio::test]
async fn another_protocol_is_named_by_what_it_says() {
    for text in
        ["SSH-2.0-OpenSSH_9.2\r\n", "{\"hello\": 1}\n", "NBDMAGICIHAVEOPT", "HTTP/1.1 400 Bad Request\r\n"]
    {
        let error = connecting(says(text)).await;
        assert_eq!(error.kind(), ErrorKind::NotQmp, "{error}");
        assert!(error.to_string().contains("-qmp socket"), "{error}");
    }
    let endless = connecting(says(&"x".repeat(200_000))).await;
    assert_eq!(endless.kind(), ErrorKind::NotQmp);
    assert!(endless.to_string().len() < 400, "{endless}");
}

#[tokio::test]
async fn a_socket_that_another_client_holds_says_what_to_do() {
    let mut silent = Transcript::default();
    silent.push(Step::Fault(Fault::Silence));
    let error = connecting_within(SOON, silent).await;
    assert_eq!(error.kind(), ErrorKind::Held);
    assert!(error.to_string().contains("-qmp unix:PATH,server=on,wait=off"), "{error}");
}

#[tokio::test]
async fn a_path_where_nobody_listens_is_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let error = timely(patient(&dir.path().join("none"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
}

#[tokio::test]
async fn a_path_where_somebody_may_listen_whom_we_cannot_connect_to_is_not_said_to_be_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other");
    // Whom this process may not connect to cannot be had as root; of another type is as good.
    let _other = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let error = timely(patient(&path)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CannotConnect);
    let error = timely(Agent::new(&path, AgentOptions::default()).thaw()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CannotConnect);
}

#[tokio::test]
async fn a_qemu_that_ends_before_or_after_its_greeting_is_gone() {
    assert_eq!(connecting(Transcript::default().broken_at(0, Fault::HangUp)).await.kind(), ErrorKind::Gone);
    let greeted = Transcript::parse(GREETING).unwrap();
    assert_eq!(connecting(greeted.broken_at(2, Fault::HangUp)).await.kind(), ErrorKind::Gone);
    let silent = greeted.broken_at(2, Fault::Silence);
    assert_eq!(connecting_within(SOON, silent).await.kind(), ErrorKind::Deadline);
    assert_eq!(connecting(greeted.broken_at(2, Fault::Say(b"?\n".into()))).await.kind(), ErrorKind::Nonsense);
}

#[tokio::test]
async fn an_event_that_overtakes_the_end_of_the_negotiation_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let mut lines: Vec<&str> = GREETING.lines().collect();
    lines.insert(2, r#"{"qemu": {"event": "MIGRATION_PASS", "data": {"pass": 2}}}"#);
    lines.push(r#"{"client": {"execute": "query-status", "id": 1}}"#);
    lines.push(r#"{"qemu": {"return": {"running": true, "status": "running"}, "id": 1}}"#);
    let _fake = Fake::replay(&path, vec![Transcript::parse(&lines.join("\n")).unwrap()]).unwrap();
    let client = patient(&path).await.unwrap();
    assert!(timely(qmp_bridge::control::run_state(&client)).await.unwrap().running);
}

#[tokio::test]
async fn nonsense_instead_of_an_answer_is_called_that() {
    let long = format!("{{\"fault\": \"say\", \"text\": \"{}\"}}", "x".repeat(150_000));
    for rest in [
        r#"{"fault": "say", "text": "{\"return\": \n"}"#,
        r#"{"fault": "say", "text": "\u0000\u0001\n"}"#,
        r#"{"qemu": {"neither": 1}}"#,
        r#"{"qemu": {"return": {}, "id": 77}}"#,
        &long,
    ] {
        let error = asking(rest).await;
        assert_eq!(error.kind(), ErrorKind::Nonsense, "{error}");
        assert!(error.to_string().starts_with("query-status: "), "{error}");
    }
}

#[tokio::test]
async fn a_qemu_that_goes_in_the_middle_is_gone() {
    for rest in
        [r#"{"fault": "hang-up"}"#, "{\"fault\": \"say\", \"text\": \"{\\\"ret\"}\n{\"fault\": \"hang-up\"}"]
    {
        let error = asking(rest).await;
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
}

#[tokio::test]
async fn qemus_own_errors_keep_their_class_and_words() {
    let error =
        asking(r#"{"qemu": {"error": {"class": "GenericError", "desc": "no such luck"}, "id": 1}}"#).await;
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(error.refusal().unwrap().class, "GenericError");
    assert_eq!(error.to_string(), "query-status: refused: no such luck");
    let error = asking(r#"{"qemu": {"error": {"class": "CommandNotFound", "desc": "x"}, "id": 1}}"#).await;
    assert_eq!(error.kind(), ErrorKind::UnknownCommand);
}

#[tokio::test]
async fn a_reply_of_another_form_is_unexpected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake =
        Fake::answering(&path, (7, 2, 0), |_, _| vec![Say::Return(json!({"running": "perhaps"}))]).unwrap();
    let client = patient(&path).await.unwrap();
    let error = timely(qmp_bridge::control::run_state(&client)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unexpected);
}

#[tokio::test]
async fn a_command_past_its_deadline_fails_alone_and_its_late_answer_goes_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake = Fake::answering(&path, (10, 0, 2), |name, _| match name {
        "slow" => vec![Say::Wait(2 * SOON), Say::Return(json!("late"))],
        _ => vec![Say::Return(json!(name))],
    })
    .unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let error = timely(client.within(SOON).execute_raw("slow", Value::Null)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert_eq!(timely(client.execute_raw("quick", Value::Null)).await.unwrap(), "quick");
}

#[tokio::test]
async fn a_call_that_is_dropped_disturbs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let calls = AtomicU32::new(0);
    let _fake = Fake::answering(&path, (10, 0, 2), move |_, _| {
        vec![Say::Wait(Duration::from_millis(50)), Say::Return(json!(calls.fetch_add(1, Ordering::Relaxed)))]
    })
    .unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    for _ in 0..3 {
        let call = client.execute_raw("x", Value::Null);
        assert!(tokio::time::timeout(Duration::from_millis(10), call).await.is_err());
    }
    assert_eq!(timely(client.execute_raw("x", Value::Null)).await.unwrap(), 3);
}
