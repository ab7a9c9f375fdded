//! File systems that are stilled for the cut always go on, whatever becomes of the checkpoint.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cdp_store::{CheckpointMode, CheckpointSpec, CheckpointState};
use ckpt::take::{Order, recover};
use qmp_bridge::fake::{AgentConduct, GuestAgent};
use qmp_bridge::migration::{Mode, Plan, Settings};
use qmp_bridge::{Client, Options};
use serde_json::json;

use super::{Act, Bed, MODES, undisturbed};

fn agent(bed: &Bed, name: &str, conduct: AgentConduct) -> (GuestAgent, PathBuf) {
    let path = bed.directory.path().join(name);
    (GuestAgent::start(&path, conduct).unwrap(), path)
}

fn order(mode: CheckpointMode, agent: &Path) -> Order {
    Order { quiesce: Some(agent.to_owned()), ..Bed::order(mode) }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_systems_are_stilled_for_the_cut_and_go_on_after_it() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::Obeys);
    for mode in MODES {
        let before = agent.thaws();
        let taken = bed.take(&order(mode, &path), &[]).await.unwrap();
        let CheckpointState::Committed(saved) = taken.state else { panic!("{:?}", taken.state) };
        let still = &saved.figures["quiesced"];
        assert_eq!(still["filesystems"], 2, "{mode:?}: {still}");
        assert!(still["frozen_us"].as_u64().unwrap() > 0 && still["thaw_error"].is_null(), "{still}");
        assert!(!agent.is_frozen() && agent.thaws() == before + 1, "{mode:?}");
        bed.assert_put_back(&format!("{mode:?}"));
    }
    let taken = bed.take(&Bed::order(CheckpointMode::Hot), &[]).await.unwrap();
    let CheckpointState::Committed(saved) = taken.state else { panic!("{:?}", taken.state) };
    assert!(saved.figures.get("quiesced").is_none(), "nobody asked for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn file_systems_go_on_wherever_the_checkpoint_fails() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::Obeys);
    for mode in MODES {
        let (script, before) = (undisturbed(mode), agent.thaws());
        for at in 0..script.len() {
            for end in [Act::Cancel, Act::HangUp, Act::Fail("x")] {
                let what = format!("{mode:?}, {end:?} at {at}");
                let cut = [&script[..at], std::slice::from_ref(&end)].concat();
                let taken = bed.take(&order(mode, &path), &[cut]).await;
                assert!(taken.is_err(), "{what}");
                assert!(!agent.is_frozen(), "{what}: frozen");
                bed.assert_put_back(&what);
            }
        }
        assert!(agent.thaws() > before, "{mode:?}: nothing was stilled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_that_is_given_up_is_over_when_the_checkpoint_is() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::FreezesSlowly(Duration::from_millis(1500)));
    let order = order(CheckpointMode::Hot, &path);
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        bed.qemu.state().cancel.as_ref().unwrap().send_replace(true);
    };
    let (taken, ()) = tokio::join!(bed.take(&order, &[]), cancel);
    assert!(taken.unwrap_err().contains("cancelled"));
    // A daemon that ends now leaves nothing behind.
    assert!(agent.thaws() > 0 && !agent.is_frozen());
    bed.assert_put_back("given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_may_take_longer_to_be_stilled_than_qemu_to_connect() {
    let bed = Bed::new().await;
    let (_agent, path) = agent(&bed, "agent", AgentConduct::FreezesSlowly(Duration::from_millis(1500)));
    let listens = || {
        let mut entries = std::fs::read_dir(bed.directory.path()).unwrap().flatten();
        entries.any(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"))
    };
    let listens_early = async {
        let by = Instant::now() + Duration::from_millis(1200);
        while Instant::now() < by && !listens() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Instant::now() < by
    };
    let order = order(CheckpointMode::Hot, &path);
    let (taken, listens_early) = tokio::join!(bed.take(&order, &[]), listens_early);
    taken.unwrap();
    assert!(!listens_early, "whoever listens waits 20 s for QEMU, and a guest may take 30 s to be stilled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_somebody_stops_while_its_guest_is_being_stilled_stays_so() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::FreezesSlowly(Duration::from_millis(1500)));
    for mode in MODES {
        for gives_up in [false, true] {
            let order = order(mode, &path);
            let others = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                bed.qemu.act(Act::OthersStop);
                tokio::time::sleep(Duration::from_millis(300)).await;
                if gives_up {
                    bed.qemu.state().cancel.as_ref().unwrap().send_replace(true);
                }
            };
            let (taken, ()) = tokio::join!(bed.take(&order, &[]), others);
            let what = format!("{mode:?}, gives up: {gives_up}: {}", taken.unwrap_err());
            assert!(!bed.qemu.state().running, "{what}: it was not we who stopped it");
            assert!(!agent.is_frozen(), "{what}");
            bed.qemu.answer("cont", &json!({}));
            bed.assert_put_back(&what);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_somebody_begins_while_the_guest_is_being_stilled_is_left_alone() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::FreezesSlowly(Duration::from_millis(1500)));
    for mode in MODES {
        let order = order(mode, &path);
        let others = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            bed.qemu.state().migration = "active";
        };
        let (taken, ()) = tokio::join!(bed.take(&order, &[]), others);
        let why = taken.unwrap_err();
        assert!(why.contains("somebody else migrates"), "{mode:?}: {why}");
        assert_eq!(bed.qemu.state().migration, "active", "{mode:?}");
        let commands = bed.qemu.state().commands.clone();
        assert!(!commands.iter().any(|name| name.starts_with("migrate")), "{mode:?}: {commands:?}");
        assert!(!agent.is_frozen(), "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_there_or_refuses_is_told_in_words() {
    let bed = Bed::new().await;
    let (refusing, path) = agent(&bed, "refuses", AgentConduct::RefusesToFreeze);
    let error = bed.take(&order(CheckpointMode::Hot, &path), &[]).await.unwrap_err();
    assert!(error.contains("failed to freeze /") && error.contains("without --quiesce"), "{error}");
    assert!(!refusing.is_frozen());
    bed.assert_put_back("refused");

    let (_absent, path) = agent(&bed, "absent", AgentConduct::Absent);
    for path in [path.clone(), bed.directory.path().join("nobody")] {
        let error = bed.take(&order(CheckpointMode::Hot, &path), &[]).await.unwrap_err();
        assert!(error.contains("is qemu-guest-agent installed"), "{error}");
        bed.assert_put_back("absent");
    }

    bed.qemu.answer("stop", &json!({}));
    let error = bed.take(&order(CheckpointMode::Pause, &path), &[]).await.unwrap_err();
    assert!(error.contains("the machine stands still"), "{error}");
    bed.qemu.answer("cont", &json!({}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thaw_that_was_not_heard_is_said_again() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::HangsUpAtThaw);
    bed.take(&order(CheckpointMode::Hot, &path), &[]).await.unwrap();
    assert!(!agent.is_frozen() && agent.thaws() == 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_process_has_stilled_and_stopped_goes_on() {
    let bed = Bed::new().await;
    let (agent, path) = agent(&bed, "agent", AgentConduct::Obeys);
    let client = Client::connect(&bed.directory.path().join("qmp"), Options::default()).await.unwrap();
    let before = Settings::read(&client).await.unwrap();
    let plan = Plan::new(Mode::Pause, Duration::from_millis(20));
    let settings = plan.changes(&client, &before, true).unwrap();
    let restore = json!({ "qmp": client.path(), "settings": settings, "agent": path });
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore };
    let left = bed.store.begin_checkpoint(&bed.vm, spec).unwrap();
    plan.apply(&client, &before).await.unwrap();
    bed.qemu.answer("stop", &json!({}));
    let frozen = tokio::task::spawn_blocking(move || {
        let mut port = BufReader::new(UnixStream::connect(path).unwrap());
        port.get_mut().write_all(b"{\"execute\":\"guest-fsfreeze-freeze\"}\n").unwrap();
        let mut answer = String::new();
        while !answer.contains("\"return\":2") {
            answer.clear();
            port.read_line(&mut answer).unwrap();
        }
    });
    frozen.await.unwrap();
    assert!(agent.is_frozen());

    recover(&bed.store, &left, Some(&client)).await.unwrap();
    assert!(!agent.is_frozen());
    bed.assert_aborted("the daemon ended");
    bed.assert_put_back("recovered");
}
