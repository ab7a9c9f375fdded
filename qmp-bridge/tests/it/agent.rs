//! The guest agent: whatever happens, no guest stays frozen.

use std::time::Duration;

use qmp_bridge::fake::{AgentConduct, GuestAgent};
use qmp_bridge::{Agent, AgentOptions, ErrorKind};

use crate::{PATIENCE, SOON, timely};

fn options(command_deadline: Duration, freeze_deadline: Duration) -> AgentOptions {
    AgentOptions { command_deadline, freeze_deadline, max_line_bytes: 4096 }
}

/// A guest for which no deadline is to pass.
fn guest(conduct: AgentConduct) -> (tempfile::TempDir, GuestAgent, Agent) {
    guest_within(options(PATIENCE, PATIENCE), conduct)
}

fn guest_within(options: AgentOptions, conduct: AgentConduct) -> (tempfile::TempDir, GuestAgent, Agent) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let guest = GuestAgent::start(&path, conduct).unwrap();
    let agent = Agent::new(&path, options);
    (dir, guest, agent)
}

async fn thawed(guest: &GuestAgent) {
    timely(async {
        while guest.is_frozen() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_guest_is_frozen_and_thawed_past_old_answers_in_the_port() {
    let (_dir, guest, agent) = guest(AgentConduct::Obeys);
    let frozen = timely(agent.freeze()).await.unwrap();
    assert_eq!(frozen.filesystems(), 2);
    assert!(guest.is_frozen());
    assert_eq!(timely(frozen.thaw()).await.unwrap(), 2);
    assert!(!guest.is_frozen());
    assert_eq!(guest.thaws(), 1);
    let mut agent = Agent::new(&_dir.path().join("agent"), options(PATIENCE, PATIENCE));
    assert_eq!(timely(agent.freeze_status()).await.unwrap(), "thawed");
}

#[tokio::test]
async fn a_frozen_guest_that_is_forgotten_thaws() {
    let (_dir, guest, agent) = guest(AgentConduct::Obeys);
    let frozen = timely(agent.freeze()).await.unwrap();
    assert!(guest.is_frozen());
    drop(frozen);
    thawed(&guest).await;
}

#[tokio::test]
async fn a_freeze_that_is_not_answered_is_undone() {
    let (_dir, guest, agent) = guest_within(options(PATIENCE, SOON), AgentConduct::FreezesInSilence);
    let error = timely(agent.freeze()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert_eq!(guest.thaws(), 1);
    assert!(!guest.is_frozen());
}

#[tokio::test]
async fn a_freeze_that_ends_when_nobody_waits_any_more_is_undone() {
    let (_dir, guest, agent) = guest_within(options(SOON, SOON), AgentConduct::FreezesSlowly(20 * SOON));
    let error = timely(agent.freeze()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert!(qmp_bridge::thawing() > 0, "nobody can tell that it still has to be thawed");
    timely(async {
        while guest.thaws() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(!guest.is_frozen());
}

#[tokio::test]
async fn a_freeze_that_is_given_up_is_undone() {
    let (_dir, guest, agent) = guest(AgentConduct::FreezesInSilence);
    let given_up = timely(async {
        let freezing = agent.freeze();
        tokio::pin!(freezing);
        loop {
            tokio::select! {
                done = &mut freezing => panic!("{done:?}"),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            if guest.is_frozen() {
                return true;
            }
        }
    });
    assert!(given_up.await);
    thawed(&guest).await;
}

#[tokio::test]
async fn a_guest_that_refuses_says_why_and_is_thawed_all_the_same() {
    let (_dir, guest, agent) = guest(AgentConduct::RefusesToFreeze);
    let error = timely(agent.freeze()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("failed to freeze /"), "{error}");
    assert_eq!(guest.thaws(), 1);
}

#[tokio::test]
async fn what_somebody_else_has_frozen_is_left_so() {
    for (conduct, kind) in [
        (AgentConduct::Obeys, ErrorKind::Refused),
        // Then the agent itself refuses the second freeze.
        (AgentConduct::SaysNoStatus, ErrorKind::UnknownCommand),
    ] {
        let (_dir, guest, agent) = guest(conduct);
        guest.freeze();
        let error = timely(agent.freeze()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(guest.is_frozen() && guest.thaws() == 0, "{conduct:?}");
    }
    let (_dir, guest, agent) = guest(AgentConduct::SaysNoStatus);
    let frozen = timely(agent.freeze()).await.unwrap();
    timely(frozen.thaw()).await.unwrap();
    assert!(!guest.is_frozen());
}

#[tokio::test]
async fn a_thaw_is_tried_again_on_a_new_connection() {
    let (_dir, guest, agent) = guest(AgentConduct::HangsUpAtThaw);
    let frozen = timely(agent.freeze()).await.unwrap();
    assert_eq!(timely(frozen.thaw()).await.unwrap(), 2);
    assert_eq!(guest.thaws(), 2);
    assert!(!guest.is_frozen());
}

#[tokio::test]
async fn a_guest_without_agent_is_not_asked_to_freeze() {
    let (_dir, guest, agent) = guest_within(options(SOON, SOON), AgentConduct::Absent);
    let error = timely(agent.freeze()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert!(error.to_string().contains("qemu-ga"), "{error}");
    assert_eq!(guest.thaws(), 0);
    let nobody = Agent::new(&_dir.path().join("none"), options(PATIENCE, PATIENCE));
    assert_eq!(timely(nobody.freeze()).await.unwrap_err().kind(), ErrorKind::Unreachable);
}

#[tokio::test]
async fn a_socket_that_somebody_else_holds_is_not_taken_for_one_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    // As QEMU does, which accepts nobody while it has a client; and it does not notice who gives up.
    let _listener = socket.listen(1).unwrap();
    let mut kinds = Vec::new();
    for _ in 0..4 {
        kinds.push(timely(Agent::new(&path, options(SOON, SOON)).freeze()).await.unwrap_err().kind());
    }
    assert_eq!((kinds[0], kinds[3]), (ErrorKind::Deadline, ErrorKind::Held));
}
