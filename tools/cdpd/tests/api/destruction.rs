//! Volumes that are not destroyed are served as before.

use std::path::Path;

use cdp_store::{CheckpointMode, CheckpointSpec, Store, VmSpec};
use cdp_types::{CheckpointId, VmName};
use cdpd::api::{ErrorKind, ServingStatus, Vm};
use hyper::Method;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::{Bench, MIB, config};

impl Bench {
    pub(crate) fn register(&self, name: &str, volume: &str) {
        let body = json!({ "name": name, "volumes": [volume], "qmp": "/nowhere/q" });
        self.client.send::<Vm>(Method::POST, "/v1/vms", &body).unwrap();
    }

    /// A destruction that must be refused, and why.
    fn must_stay(&self, name: &str, force: bool) -> String {
        let refusal = self.client.delete::<()>(&format!("/v1/volumes/{name}?force={force}")).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Busy, "{refusal}");
        refusal.message
    }
}

#[test]
fn a_guest_notices_nothing_of_what_was_refused_at_once() {
    let mut bench = Bench::new();
    bench.filled("web1");
    let mut guest = Guest::start(&bench.serve_here("web1"));
    guest.zero(0, 4096);
    assert!(bench.must_stay("web1", false).contains("unserve it first"));
    guest.zero(4096, 4096);
    bench.register("vm", "web1");
    assert!(bench.must_stay("web1", true).contains("machine 'vm'"));
    guest.zero(8192, 4096);
    assert_eq!(bench.sevens("web1", "head"), [3]);
    assert_eq!(bench.show("web1").unwrap().serving.unwrap().status, ServingStatus::Connected);
    bench.stop();
}

/// A complete checkpoint without a guest, which has its disks' write caches off or on.
pub(crate) fn checkpoint(store: &Store, vm: &VmName, write_cache_off: bool) -> CheckpointId {
    store.memory_volume(vm, 4096).unwrap();
    let spec = CheckpointSpec { mode: CheckpointMode::Pause, label: None, restore: Value::Null };
    let begun = store.begin_checkpoint(vm, spec).unwrap();
    let epoch = store.new_epoch(begun.id).unwrap();
    let mut cut = store.cut_epoch(&epoch).unwrap();
    cut.members.iter_mut().for_each(|member| member.write_cache_off = write_cache_off);
    store.commit_checkpoint(begun.id, &cut, 4096, Value::Null).unwrap().id
}

/// Gives the machine `vm` a checkpoint of its only disk, and then another disk instead. No client can bring that about, but
/// the store takes it.
fn leave_checkpoint_behind(root: &Path, other: &str) {
    let config = config(root);
    let store = Store::open(&config.store, config.options).unwrap();
    let vm: VmName = "vm".parse().unwrap();
    checkpoint(&store, &vm, false);
    let info = store.vm(&vm).unwrap();
    let volumes = vec![other.parse().unwrap()];
    store.update_vm(&vm, &VmSpec { volumes, qmp: info.qmp, settings: info.settings }).unwrap();
    store.close().unwrap();
}

#[test]
fn a_volume_that_the_store_keeps_once_its_server_has_been_stopped_is_served_again() {
    let mut bench = Bench::new();
    bench.filled("web1");
    bench.create("other", MIB).unwrap();
    bench.register("vm", "web1");
    let socket = bench.serve_here("web1");
    bench.stop();
    leave_checkpoint_behind(bench.root.path(), "other");
    bench.start_again();

    let mut guest = Guest::start(&socket);
    guest.zero(0, 4096);
    let said = bench.must_stay("web1", true);
    assert!(said.contains("checkpoint 1 of machine 'vm' needs volume 'web1'"), "{said}");
    // Its server had been stopped by then: the guest has to connect again.
    assert!(guest.is_cut_off());
    drop(guest);
    assert_eq!(bench.sevens("web1", "head"), [1, 2, 3]);
    let serving = bench.show("web1").unwrap().serving.unwrap();
    assert_eq!(
        (serving.status, serving.socket.as_str()),
        (ServingStatus::Listening, socket.to_str().unwrap())
    );
    Guest::start(&socket).zero(4096, 4096);
    assert_eq!(bench.sevens("web1", "head"), [2, 3]);
    bench.restart();
    Guest::start(&socket).zero(8192, 4096);
    assert_eq!(bench.sevens("web1", "head"), [3]);

    bench.client.delete::<()>("/v1/vms/vm/checkpoints/1").unwrap();
    bench.client.delete::<()>("/v1/volumes/web1?force=true").unwrap();
    assert!(!socket.exists());
    bench.stop();
}
