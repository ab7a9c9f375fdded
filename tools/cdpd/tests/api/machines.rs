//! Machines: what is remembered of them, and who looks after them. Their checkpoints need a QEMU: see the crate `e2e`.

use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cdp_store::{CheckpointMode, CheckpointSpec, Store};
use cdp_types::{CheckpointId, Label, VmName};
use cdpd::api::{ApiError, ErrorKind, Order, Schedule, Supervised, Vm};
use cdpd::client::{Client, Step};
use hyper::Method;
use serde_json::{Value, json};

use crate::destruction::checkpoint;
use crate::guest::Guest;
use crate::{Bench, MIB, config};

const LIMIT: Duration = Duration::from_secs(30);
/// Within this time the schedules have been looked at.
const LOOKED_AT: Duration = Duration::from_millis(2500);

impl Bench {
    fn put_vm(&self, name: &str, volumes: &[&str], launch: &Value) -> Result<Vm, ApiError> {
        let body = json!({ "name": name, "volumes": volumes, "qmp": "/nowhere/q", "launch": launch });
        self.client.send(Method::PUT, &format!("/v1/vms/{name}"), &body)
    }

    pub(crate) fn vm(&self, name: &str) -> Vm {
        self.client.get(&format!("/v1/vms/{name}")).unwrap()
    }

    /// Has somebody look after the machine `vm`, who is gone when he is asked to end its QEMU and has done this.
    pub(crate) fn supervise(&self, last: fn(&Client)) -> JoinHandle<Result<Option<()>, ApiError>> {
        let store = self.store();
        let supervisor = thread::spawn(move || {
            let client = Client::find(&store).unwrap().unwrap();
            let stays = &mut |step: Step<Order>| {
                let is_last = matches!(step, Step::Item(Order::Restart));
                if is_last {
                    last(&client);
                }
                !is_last
            };
            client.lines::<Order, ()>(Method::POST, "/v1/vms/vm/supervisor", stays)
        });
        wait_until("it is attached", || self.vm("vm").supervised == Some(Supervised::Starting));
        supervisor
    }

    /// A revert of the machine `vm` that cannot come to its end.
    pub(crate) fn try_to_go_back(&self, to: CheckpointId, disks_only: bool) -> ApiError {
        let body = json!({ "to": to.to_string(), "disks_only": disks_only });
        self.client.send::<Value>(Method::POST, "/v1/vms/vm/revert", &body).unwrap_err()
    }
}

/// Looks again and again, until it is so or too late.
pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let by = Instant::now() + LIMIT;
    while !reached() {
        assert!(Instant::now() < by, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_machine_is_put_and_put_again_and_its_settings_survive_a_restart() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.create("data", MIB).unwrap();
    let launch = json!({ "command": ["qemu", "-m", "1G"], "directory": "/", "disks": [""], "owner": 4711 });
    let vm = bench.put_vm("web1", &["web1"], &launch).unwrap();
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(vm.launch.unwrap().owner, Some(own), "the daemon knows better who has said so");

    let schedule: Value = json!({ "every_s": 300, "keep": 12 });
    let path = "/v1/vms/web1/schedule";
    bench.client.send::<Vm>(Method::PUT, path, &schedule).unwrap();
    for (every_s, keep) in [(1, 12), (300, 0)] {
        let refused =
            bench.client.send::<Vm>(Method::PUT, path, &json!({ "every_s": every_s, "keep": keep }));
        assert_eq!(refused.unwrap_err().kind, ErrorKind::Invalid);
    }
    // Other disks are fine as long as there are no checkpoints; the schedule stays.
    bench.put_vm("web1", &["web1", "data"], &Value::Null).unwrap();
    bench.restart();
    let vm = bench.vm("web1");
    assert_eq!(vm.volumes.len(), 2);
    assert!(vm.launch.is_none());
    assert!(matches!(vm.schedule, Some(Schedule { every_s: 300, keep: 12, .. })));
    assert!(bench.client.delete::<Vm>(path).unwrap().schedule.is_none());

    assert_eq!(bench.put_vm("web2", &["web1"], &Value::Null).unwrap_err().kind, ErrorKind::Busy);
    assert_eq!(bench.put_vm("web2", &[], &Value::Null).unwrap_err().kind, ErrorKind::Invalid);
    assert_eq!(bench.put_vm("web2", &["nosuch"], &Value::Null).unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn what_is_no_clone_is_not_started_from_memory() {
    let bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.put_vm("web1", &["web1"], &Value::Null).unwrap();
    let started = bench.client.send::<Value>(Method::POST, "/v1/vms/web1/start", &Value::Null).unwrap_err();
    assert!(started.message.contains("no clone"), "{started:?}");
    let clone = json!({ "at": "7", "name": "web2", "qmp": "/nowhere/q2" });
    let refused = bench.client.send::<Vm>(Method::POST, "/v1/vms/web1/clone", &clone).unwrap_err();
    assert!(refused.message.contains("no checkpoint '7'"), "{refused:?}");
    assert_eq!(bench.show("web2").unwrap_err().kind, ErrorKind::NotFound, "nothing was made");
}

#[test]
fn one_supervisor_at_a_time_is_heard_and_missed() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.put_vm("web1", &["web1"], &Value::Null).unwrap();
    let path = "/v1/vms/web1/supervisor";
    let report = json!({ "state": "running" });
    let early = bench.client.send::<()>(Method::PUT, path, &report).unwrap_err();
    assert_eq!(early.kind, ErrorKind::NotFound);

    // Attached for as long as its connection lasts, which is until `go_on` says no.
    let attach = |go_on: fn(Order) -> bool| {
        let store = bench.store();
        thread::spawn(move || {
            let client = Client::find(&store).unwrap().unwrap();
            client.lines::<Order, ()>(Method::POST, "/v1/vms/web1/supervisor", &mut |step| match step {
                Step::Item(order) => go_on(order),
                Step::Progress(_) => true,
            })
        })
    };
    attach(|_| false).join().unwrap().unwrap();
    wait_until("its end is noticed", || bench.vm("web1").supervised.is_none());
    let listening = attach(|_| true);
    wait_until("it is attached", || bench.vm("web1").supervised == Some(Supervised::Starting));
    bench.client.send::<()>(Method::PUT, path, &report).unwrap();
    assert_eq!(bench.vm("web1").supervised, Some(Supervised::Running));
    let second = attach(|_| true).join().unwrap().unwrap_err();
    assert_eq!(second.kind, ErrorKind::Busy);
    bench.stop();
    assert!(listening.join().unwrap().is_err(), "a daemon that stops ends the connection");
}

#[test]
fn no_qemu_is_ended_while_a_checkpoint_of_a_dead_daemon_is_undone() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.register("vm", "web1");
    bench.stop();
    // A QEMU that hangs.
    let qmp = bench.root.path().join("qmp");
    let _listener = UnixListener::bind(&qmp).unwrap();
    let config = config(bench.root.path());
    let store = Store::open(&config.store, config.options).unwrap();
    let vm: VmName = "vm".parse().unwrap();
    let to = checkpoint(&store, &vm, false);
    let restore = json!({ "qmp": qmp });
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore };
    store.begin_checkpoint(&vm, spec).unwrap();
    store.close().unwrap();
    drop(store);
    bench.start_again();

    let supervisor = bench.supervise(|_| ());
    let refused = bench.try_to_go_back(to, false);
    assert!(refused.kind == ErrorKind::Busy && refused.message.contains("still being undone"), "{refused}");
    assert_eq!(bench.vm("vm").supervised, Some(Supervised::Starting));
    bench.stop();
    assert!(supervisor.join().unwrap().is_err(), "it was asked to end its QEMU");
}

#[test]
fn a_checkpoint_is_not_deleted_while_its_machine_goes_back() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.register("vm", "web1");
    bench.stop();
    let config = config(bench.root.path());
    let store = Store::open(&config.store, config.options).unwrap();
    let to = checkpoint(&store, &"vm".parse().unwrap(), false);
    store.close().unwrap();
    drop(store);
    bench.start_again();

    let supervisor = bench.supervise(|client| {
        let refused = client.delete::<()>("/v1/vms/vm/checkpoints/1").unwrap_err();
        assert!(refused.kind == ErrorKind::Busy && refused.message.contains("being put back"), "{refused}");
    });
    assert!(bench.try_to_go_back(to, false).message.contains("has ended"));
    supervisor.join().unwrap().unwrap();
    bench.client.delete::<()>("/v1/vms/vm/checkpoints/1").unwrap();
    assert!(bench.try_to_go_back(to, false).message.contains("no checkpoint"));
    bench.stop();
}

#[test]
fn a_scheduled_checkpoint_waits_until_its_machine_runs() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    let disk = bench.serve_here("web1");
    let path = bench.root.path().join("qmp");
    let body = json!({ "name": "vm", "volumes": ["web1"], "qmp": path });
    bench.client.send::<Vm>(Method::POST, "/v1/vms", &body).unwrap();
    let qmp = UnixListener::bind(&path).unwrap();
    qmp.set_nonblocking(true).unwrap();
    let schedule = json!({ "every_s": 3600, "keep": 1 });
    bench.client.send::<Vm>(Method::PUT, "/v1/vms/vm/schedule", &schedule).unwrap();
    thread::sleep(LOOKED_AT);
    assert!(qmp.accept().is_err(), "nobody is connected to its disk");

    let supervisor = bench.supervise(|_| ());
    let guest = Guest::start(&disk);
    thread::sleep(LOOKED_AT);
    assert!(qmp.accept().is_err(), "its QEMU is being started");
    let report = json!({ "state": "running" });
    bench.client.send::<()>(Method::PUT, "/v1/vms/vm/supervisor", &report).unwrap();
    wait_until("its QEMU is asked", || qmp.accept().is_ok());
    drop(guest);
    bench.stop();
    assert!(supervisor.join().unwrap().is_err(), "the connection ends with the daemon");
}

#[test]
fn a_machine_keeps_its_disks_while_a_checkpoint_waits_for_its_qemu() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.create("data", MIB).unwrap();
    bench.put_vm("vm", &["web1"], &Value::Null).unwrap();
    bench.serve_here("web1");
    let supervisor = bench.supervise(|_| ());
    let store = bench.store();
    let taking = thread::spawn(move || {
        let client = Client::find(&store).unwrap().unwrap();
        client.send::<Value>(Method::POST, "/v1/vms/vm/checkpoints", &json!({}))
    });
    wait_until("it is being taken", || bench.vm("vm").taking.is_some());
    let others = ["web1", "data"];
    assert_eq!(bench.put_vm("vm", &others, &Value::Null).unwrap_err().kind, ErrorKind::Busy);
    bench.put_vm("vm", &["web1"], &Value::Null).unwrap();
    bench.client.delete::<()>("/v1/vms/vm/taking").unwrap();
    assert!(taking.join().unwrap().unwrap_err().message.contains("cancelled"));
    bench.put_vm("vm", &others, &Value::Null).unwrap();
    bench.stop();
    assert!(supervisor.join().unwrap().is_err(), "the connection ends with the daemon");
}

#[test]
fn a_clone_that_has_not_run_keeps_its_disks_and_its_checkpoint() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.create("data", MIB).unwrap();
    bench.put_vm("vm", &["web1", "data"], &Value::Null).unwrap();
    bench.stop();
    let config = config(bench.root.path());
    let store = Store::open(&config.store, config.options).unwrap();
    let from = checkpoint(&store, &"vm".parse().unwrap(), false);
    store.close().unwrap();
    drop(store);
    bench.start_again();

    let clone = json!({ "at": from.to_string(), "name": "ci", "qmp": "/nowhere/q2" });
    let made: Vm = bench.client.send(Method::POST, "/v1/vms/vm/clone", &clone).unwrap();
    let disks: Vec<&str> = made.volumes.iter().map(|name| name.as_str()).collect();
    let exchanged: Vec<&str> = disks.iter().rev().copied().collect();
    let refused = bench.put_vm("ci", &exchanged, &Value::Null).unwrap_err();
    assert!(refused.message.contains("in this order") && refused.message.contains("--boot"), "{refused}");
    bench.put_vm("ci", &disks, &Value::Null).unwrap();
    let one = format!("/v1/vms/vm/checkpoints/{from}");
    for path in [&one, "/v1/vms/vm?delete_checkpoints=true"] {
        let refused = bench.client.delete::<()>(path).unwrap_err();
        assert!(refused.kind == ErrorKind::Busy && refused.message.contains("machine 'ci'"), "{refused}");
    }

    // It is to boot, so neither matters any more.
    bench.client.delete::<()>("/v1/vms/ci/start").unwrap();
    bench.put_vm("ci", &exchanged, &Value::Null).unwrap();
    bench.client.delete::<()>(&one).unwrap();
    bench.stop();
}

#[test]
fn a_label_that_cannot_be_is_no_reason_to_try_again() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    bench.register("vm", "web1");
    bench.stop();
    let config = config(bench.root.path());
    let store = Store::open(&config.store, config.options).unwrap();
    let vm: VmName = "vm".parse().unwrap();
    let label = |text: &str| Some(text.parse::<Label>().unwrap());
    let first = checkpoint(&store, &vm, false);
    store.edit_checkpoint(first, label("before"), false).unwrap();
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: label("lost"), restore: Value::Null };
    let lost = store.begin_checkpoint(&vm, spec).unwrap();
    store.abort_checkpoint(lost.id, "as a test").unwrap();
    store.close().unwrap();
    drop(store);
    bench.start_again();

    for (label, kind, part) in [
        ("12", ErrorKind::Invalid, "a checkpoint's number"),
        ("before", ErrorKind::Exists, "checkpoint 1 has the label"),
        ("lost", ErrorKind::Invalid, "is not served"),
    ] {
        let body = json!({ "label": label });
        let refused = bench.client.send::<Value>(Method::POST, "/v1/vms/vm/checkpoints", &body).unwrap_err();
        assert_eq!(refused.kind, kind, "{label}: {refused}");
        assert!(refused.message.contains(part), "{label}: {refused}");
    }
    bench.stop();
}
