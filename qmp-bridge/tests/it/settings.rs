//! Whatever fails during a checkpoint, QEMU's settings end as they began, and the machine runs.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qmp_bridge::fake::{Fake, Fault, Say};
use qmp_bridge::migration::{self, Mode, Plan, Saved, Settings};
use qmp_bridge::{Client, ErrorKind, MigrationStatus, control};
use serde_json::{Map, Value, json};

use crate::{patient, timely};

const MODES: [Mode; 3] = [Mode::Hot, Mode::Live, Mode::Pause];

/// A QEMU that knows settings, states, and one command at which something happens.
struct Model {
    capabilities: Map<String, Value>,
    parameters: Map<String, Value>,
    running: bool,
    migration: &'static str,
    trouble: Option<(&'static str, Trouble)>,
}

#[derive(Clone, Copy, Debug)]
enum Trouble {
    Refuse,
    HangUpBefore,
    HangUpAfter,
}

impl Model {
    /// With some settings that no plan would choose.
    fn new(trouble: Option<(&'static str, Trouble)>) -> Self {
        let capabilities = json!({ "events": false, "background-snapshot": false, "pause-before-switchover": false,
            "multifd": true, "return-path": true, "of-the-future": true, "xbzrle": false });
        let parameters =
            json!({ "max-bandwidth": 1000, "downtime-limit": 300, "tls-creds": "tls0", "cpu-throttle": 7 });
        Self {
            capabilities: capabilities.as_object().unwrap().clone(),
            parameters: parameters.as_object().unwrap().clone(),
            running: true,
            migration: "none",
            trouble,
        }
    }

    fn answer(&mut self, name: &str, arguments: &Value) -> Vec<Say> {
        let trouble = self.trouble.filter(|(at, _)| *at == name).map(|(_, trouble)| trouble);
        if trouble.is_some() {
            self.trouble = None;
        }
        match trouble {
            Some(Trouble::Refuse) => return vec![Say::Refuse("GenericError", "not today".into())],
            Some(Trouble::HangUpBefore) => return vec![Say::Fault(Fault::HangUp)],
            Some(Trouble::HangUpAfter) => {
                self.obey(name, arguments);
                return vec![Say::Fault(Fault::HangUp)];
            }
            None => {}
        }
        vec![self.obey(name, arguments)]
    }

    fn obey(&mut self, name: &str, arguments: &Value) -> Say {
        let busy = !matches!(self.migration, "none" | "completed" | "cancelled");
        let refuse = |desc: &str| Say::Refuse("GenericError", desc.to_owned());
        match name {
            "query-migrate-capabilities" => {
                let listed =
                    self.capabilities.iter().map(|(name, on)| json!({ "capability": name, "state": on }));
                return Say::Return(listed.collect());
            }
            "query-migrate-parameters" => return Say::Return(Value::Object(self.parameters.clone())),
            "query-status" => {
                let status = if self.running { "running" } else { "paused" };
                return Say::Return(json!({ "running": self.running, "status": status }));
            }
            "query-migrate" => {
                let now = json!({ "status": self.migration });
                if self.migration == "cancelling" {
                    self.migration = "cancelled";
                }
                return Say::Return(now);
            }
            "migrate-set-capabilities" if busy => return refuse("There's a migration process in progress"),
            "migrate-set-capabilities" => {
                for set in arguments["capabilities"].as_array().unwrap() {
                    let name = set["capability"].as_str().unwrap();
                    assert!(self.capabilities.insert(name.to_owned(), set["state"].clone()).is_some());
                }
            }
            "migrate-set-parameters" => {
                for (name, value) in arguments.as_object().unwrap() {
                    assert!(self.parameters.insert(name.clone(), value.clone()).is_some());
                }
            }
            "migrate" => self.migration = "active",
            "migrate_cancel" if busy => self.migration = "cancelling",
            "stop" => self.running = false,
            "cont" => self.running = true,
            _ => {}
        }
        Say::Return(json!({}))
    }
}

/// Up to the middle of a checkpoint, and no further.
async fn begin(client: &Client, mode: Mode, saved_to: &mut Option<String>) -> qmp_bridge::Result<()> {
    let plan = Plan::new(mode, Duration::from_millis(20));
    let before = Settings::read(client).await?;
    let saved = plan.changes(client, &before, control::run_state(client).await?.running)?;
    *saved_to = Some(serde_json::to_string(&saved).unwrap());
    plan.apply(client, &before).await?;
    control::stop(client).await?;
    migration::start(client, Path::new("/run/vm/stream")).await
}

async fn ends_as_it_began(mode: Mode, trouble: Option<(&'static str, Trouble)>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let model = Arc::new(Mutex::new(Model::new(trouble)));
    let (capabilities, parameters) = {
        let model = model.lock().unwrap();
        (model.capabilities.clone(), model.parameters.clone())
    };
    let plays = Arc::clone(&model);
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, arguments| {
        plays.lock().unwrap().answer(name, arguments)
    })
    .unwrap();

    let mut saved = None;
    let begun = begin(&patient(&path).await.unwrap(), mode, &mut saved).await;
    let Some(saved) = saved else {
        // Nothing had been changed yet.
        assert!(begun.is_err());
        return;
    };
    // A later process: all it has is what was written down. What fails once may be done again.
    let saved: Saved = serde_json::from_str(&saved).unwrap();
    let mut attempts = 0;
    let ended = loop {
        attempts += 1;
        match migration::wind_down(&patient(&path).await.unwrap(), &saved).await {
            Ok(progress) => break progress.status,
            Err(error) => assert!(attempts < 3, "{error}"),
        }
    };
    assert!(ended.has_ended());
    let model = model.lock().unwrap();
    assert_eq!(model.capabilities, capabilities, "{mode} {trouble:?}");
    assert_eq!(model.parameters, parameters, "{mode} {trouble:?}");
    assert!(model.running, "{mode} {trouble:?}");
    assert!(model.trouble.is_none(), "{mode} {trouble:?}: it never happened");
}

#[tokio::test]
async fn settings_are_restored_whatever_fails() {
    let commands = [
        "query-migrate-capabilities",
        "query-migrate-parameters",
        "query-status",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "stop",
        "migrate",
        "query-migrate",
        "cont",
    ];
    for mode in MODES {
        timely(ends_as_it_began(mode, None)).await;
        for command in commands {
            for trouble in [Trouble::Refuse, Trouble::HangUpBefore, Trouble::HangUpAfter] {
                timely(ends_as_it_began(mode, Some((command, trouble)))).await;
            }
        }
        for trouble in [Trouble::HangUpBefore, Trouble::HangUpAfter] {
            timely(ends_as_it_began(mode, Some(("migrate_cancel", trouble)))).await;
        }
    }
}

#[tokio::test]
async fn a_plan_turns_off_all_that_it_does_not_want_and_leaves_alone_what_somebody_else_sets_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let model = Arc::new(Mutex::new(Model::new(None)));
    let plays = Arc::clone(&model);
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, arguments| {
        plays.lock().unwrap().answer(name, arguments)
    })
    .unwrap();
    let client = patient(&path).await.unwrap();
    let mut saved = None;
    timely(begin(&client, Mode::Hot, &mut saved)).await.unwrap();
    {
        let mut model = model.lock().unwrap();
        let on = model.capabilities.iter().filter(|(_, on)| **on == true).map(|(name, _)| name.as_str());
        assert_eq!(on.collect::<Vec<_>>(), ["background-snapshot", "events"]);
        assert_eq!(model.parameters["tls-creds"], "");
        model.parameters.insert("cpu-throttle".into(), json!(9));
    }
    let saved: Saved = serde_json::from_str(&saved.unwrap()).unwrap();
    let progress = timely(migration::wind_down(&client, &saved)).await.unwrap();
    assert_eq!(progress.status, MigrationStatus::Cancelled);
    assert_eq!(model.lock().unwrap().parameters["cpu-throttle"], 9);
    assert_eq!(model.lock().unwrap().parameters["max-bandwidth"], 1000);
}

#[tokio::test]
async fn a_migration_that_somebody_else_began_with_other_settings_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let model = Arc::new(Mutex::new(Model::new(None)));
    let plays = Arc::clone(&model);
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, arguments| {
        plays.lock().unwrap().answer(name, arguments)
    })
    .unwrap();
    let client = patient(&path).await.unwrap();
    let before = Settings::read(&client).await.unwrap();
    let saved = Plan::new(Mode::Hot, Duration::ZERO).changes(&client, &before, true).unwrap();
    {
        let mut model = model.lock().unwrap();
        (model.migration, model.running) = ("active", false);
    }
    let progress = timely(migration::wind_down(&client, &saved)).await.unwrap();
    assert_eq!(progress.status, MigrationStatus::Active);
    let model = model.lock().unwrap();
    assert!(model.migration == "active" && !model.running);
}

#[tokio::test]
async fn a_qemu_that_lacks_the_capability_of_a_mode_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let mut model = Model::new(None);
    model.capabilities.remove("background-snapshot");
    let _fake =
        Fake::answering(&path, (5, 2, 0), move |name, arguments| model.answer(name, arguments)).unwrap();
    let error = timely(begin(&patient(&path).await.unwrap(), Mode::Hot, &mut None)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownCommand);
    assert!(error.to_string().contains("background-snapshot"), "{error}");
}

#[tokio::test]
async fn a_guest_that_goes_to_sleep_meanwhile_is_left_asleep_and_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let asks = Arc::clone(&asked);
    let _fake = Fake::answering(&path, (10, 0, 2), move |name, _| {
        asks.lock().unwrap().push(name.to_owned());
        vec![Say::Return(json!({ "running": false, "status": "suspended" }))]
    })
    .unwrap();
    let client = patient(&path).await.unwrap();
    timely(control::run_again(&client)).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), ["query-status"]);
}
