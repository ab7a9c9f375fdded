//! The gate cuts when the last ring of the last disk stops, and a stop that may not have been the migration's voids it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cdp_store::{CheckpointMode, CheckpointSpec, Store, StoreOptions, VmSpec, VolumeSpec};
use cdp_types::{RingStop, VmControl};
use ckpt::firsts::Ahead;
use ckpt::gate::{Arming, DiskGuard, Gate, GateEvent, OnTrouble, Ticket, Unguarded, WriteCacheOff};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Counts the windows that are open.
#[derive(Default)]
pub struct Windows(pub Arc<AtomicUsize>);

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl DiskGuard for Windows {
    fn prepare(&self) -> Result<i32, Unguarded> {
        Ok(std::process::id() as i32)
    }

    fn open(&self, _on_trouble: OnTrouble, _ahead: &Ahead) -> Result<Box<dyn Send>, String> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Open(Arc::clone(&self.0))))
    }
}

/// Says whether a write cache is off that a test turns off.
pub fn telling(off: &Arc<AtomicBool>) -> WriteCacheOff {
    let off = Arc::clone(off);
    Arc::new(move || off.load(Ordering::SeqCst))
}

struct Bed {
    gate: Arc<Gate>,
    ticket: Option<Ticket>,
    events: UnboundedReceiver<GateEvent>,
    windows: Arc<AtomicUsize>,
    /// Whether they are off.
    write_caches: [Arc<AtomicBool>; 2],
    _directory: tempfile::TempDir,
}

fn disks() -> [PathBuf; 2] {
    ["/run/a.sock", "/run/b.sock"].map(PathBuf::from)
}

/// Two disks whose ring 0 runs, and an epoch that is armed over them.
fn armed(hot: bool) -> Bed {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("store");
    Store::create(&path, &StoreOptions::default()).unwrap();
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    let names = ["a", "b"].map(|name| name.parse().unwrap());
    for name in &names {
        store.create_volume(name, VolumeSpec { size_bytes: 1 << 20, logical_block_size: 512 }).unwrap();
    }
    let vm = "web1".parse().unwrap();
    store.create_vm(&vm, &VmSpec { volumes: names.to_vec(), ..VmSpec::default() }).unwrap();
    let spec = CheckpointSpec { mode: CheckpointMode::Hot, label: None, restore: Value::Null };
    let begun = store.begin_checkpoint(&vm, spec).unwrap();
    let epoch = store.new_epoch(begun.id).unwrap();

    let gate = Gate::new(store);
    disks().iter().for_each(|disk| gate.ring_started(disk, 0));
    let (tell, events) = unbounded_channel();
    let windows = Windows::default();
    let count = Arc::clone(&windows.0);
    let guards: Vec<Arc<dyn DiskGuard>> = if hot { vec![Arc::new(windows)] } else { Vec::new() };
    let sockets = disks().to_vec();
    let write_caches: [Arc<AtomicBool>; 2] = Default::default();
    let arming = Arming {
        epoch,
        sockets,
        write_caches: write_caches.iter().map(telling).collect(),
        guards,
        ahead: Ahead::default(),
        paused: false,
        tell,
    };
    let ticket = Some(gate.arm(arming));
    Bed { gate, ticket, events, windows: count, write_caches, _directory: directory }
}

impl Bed {
    fn stop(&self, disk: &Path) {
        self.gate.ring_stopped(disk, 0, RingStop::Asked, true);
    }

    fn was_cut(&mut self) -> bool {
        matches!(self.events.try_recv(), Ok(GateEvent::Cut { .. }))
    }

    fn was_voided(&mut self) -> bool {
        matches!(self.events.try_recv(), Ok(GateEvent::Void { .. }))
    }
}

#[test]
fn the_last_disk_s_stop_cuts_and_windows_are_open_until_the_ticket_goes() {
    let mut bed = armed(true);
    let [a, b] = disks();
    bed.stop(&a);
    assert!(bed.events.try_recv().is_err(), "the other disk still runs");
    bed.stop(&b);
    assert!(bed.was_cut());
    assert_eq!(bed.windows.load(Ordering::SeqCst), 1);
    bed.gate.ring_started(&a, 0);
    assert!(bed.events.try_recv().is_err(), "hot, the machine runs on");
    drop(bed.ticket.take());
    assert_eq!(bed.windows.load(Ordering::SeqCst), 0);
}

#[test]
fn a_cut_has_the_write_caches_as_they_were_then() {
    let mut bed = armed(true);
    let [a, b] = disks();
    bed.stop(&a);
    bed.write_caches[1].store(true, Ordering::SeqCst);
    bed.stop(&b);
    // The guest, which runs on, turns the other one off as well.
    bed.write_caches[0].store(true, Ordering::SeqCst);
    let Ok(GateEvent::Cut { cut, .. }) = bed.events.try_recv() else { panic!("it was not cut") };
    let off: Vec<bool> = cut.members.iter().map(|member| member.write_cache_off).collect();
    assert_eq!(off, [false, true]);
}

#[test]
fn disks_that_stop_twice_void_a_hot_cut() {
    let mut bed = armed(true);
    for round in 0..2 {
        disks().iter().for_each(|disk| bed.stop(disk));
        assert!(if round == 0 { bed.was_cut() } else { bed.was_voided() });
        disks().iter().for_each(|disk| bed.gate.ring_started(disk, 0));
    }
}

#[test]
fn a_machine_that_goes_on_before_it_was_saved_voids_the_cut() {
    let mut bed = armed(false);
    disks().iter().for_each(|disk| bed.stop(disk));
    assert!(bed.was_cut());
    bed.gate.ring_started(&disks()[0], 0);
    assert!(bed.was_voided());
}

#[test]
fn a_reset_or_a_lost_connection_is_no_cut() {
    let mut bed = armed(true);
    let [a, b] = disks();
    bed.stop(&a);
    bed.gate.ring_stopped(&b, 0, RingStop::Reset, true);
    assert!(bed.was_voided());
    let mut bed = armed(true);
    bed.stop(&a);
    bed.gate.disconnected(&b);
    assert!(bed.was_voided());
    assert!(bed.events.try_recv().is_err());
}
