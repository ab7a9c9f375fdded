//! Whatever happens while a checkpoint is taken: it is complete, or there is none and the machine is as it was.

mod elsewhere;
mod qemu;
mod quiesced;
mod restless;
mod told;
mod transitions;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, CheckpointMode, CheckpointState, Store, StoreOptions, VmSpec, VolumeSpec};
use cdp_types::{CheckpointId, VmName};
use ckpt::gate::Gate;
use ckpt::take::{Disk, GIVE_UP_AFTER, Hold, Machine, Order, TakeError, Taking, take};
use qmp_bridge::fake::Fake;
use qmp_bridge::{Client, Options};
use tokio::sync::watch;

use crate::gate::{Windows, telling};
pub(super) use qemu::{Act, Qemu, undisturbed};

/// No checkpoint of a few pages takes longer, whatever goes wrong, but for QEMU that never says that it has ended.
const LIMIT: Duration = Duration::from_secs(60);
const MODES: [CheckpointMode; 3] = [CheckpointMode::Hot, CheckpointMode::Live, CheckpointMode::Pause];

/// A machine with one disk, on a made-up QEMU.
pub(super) struct Bed {
    pub(super) store: Store,
    pub(super) qemu: Qemu,
    pub(super) vm: VmName,
    windows: Arc<AtomicUsize>,
    /// That of its disk.
    pub(super) write_cache_off: Arc<AtomicBool>,
    qmp: PathBuf,
    /// How long QEMU may take to answer whoever takes a checkpoint.
    pub(super) command_deadline: Duration,
    pub(super) directory: tempfile::TempDir,
    _fake: Fake,
}

impl Bed {
    pub(super) async fn new() -> Self {
        let options = StoreOptions { segment_bytes: 16 << 20, ..StoreOptions::default() };
        Self::with(options, options).await
    }

    /// A bed whose store was made with some options and is open with others.
    pub(super) async fn with(options: StoreOptions, then: StoreOptions) -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("store");
        Store::create(&path, &options).unwrap();
        let store = Store::open(&path, options).unwrap();
        let disk = "a".parse().unwrap();
        store.create_volume(&disk, VolumeSpec { size_bytes: 1 << 20, logical_block_size: 512 }).unwrap();
        let vm = "web1".parse().unwrap();
        store.create_vm(&vm, &VmSpec { volumes: vec![disk], ..VmSpec::default() }).unwrap();
        if then.reserve_bytes != options.reserve_bytes {
            // There will be no others.
            wait_for_blank_segments(&path, options.pool_segments).await;
        }
        store.close().unwrap();
        drop(store);
        let store = Store::open(&path, then).unwrap();

        let qmp = directory.path().join("qmp");
        let qemu = Qemu::new(Gate::new(store.clone()), directory.path().join("a.sock"));
        let answers = qemu.clone();
        let (fake, voice) =
            Fake::speaking(&qmp, (10, 0, 2), move |name, arguments| answers.answer(name, arguments)).unwrap();
        *qemu.voice.lock().unwrap() = Some(voice);
        let (windows, write_cache_off) = Default::default();
        let Options { command_deadline, .. } = Options::default();
        Self { store, qemu, vm, windows, write_cache_off, qmp, command_deadline, directory, _fake: fake }
    }

    pub(super) fn order(mode: CheckpointMode) -> Order {
        Order { mode, careful: false, label: None, quiesce: None, give_up_after: GIVE_UP_AFTER, at_cut: None }
    }

    /// Takes a checkpoint, in the order of these scripts if the migration is tried several times.
    pub(super) async fn take(&self, order: &Order, scripts: &[Vec<Act>]) -> Result<CheckpointInfo, String> {
        self.try_to_take(order, scripts).await.map_err(|error| error.to_string())
    }

    /// The same, with all that an error says.
    pub(super) async fn try_to_take(
        &self,
        order: &Order,
        scripts: &[Vec<Act>],
    ) -> Result<CheckpointInfo, TakeError> {
        let (cancel, cancelled) = watch::channel(false);
        {
            let mut state = self.qemu.state();
            state.mode = order.mode;
            state.scripts = scripts.iter().cloned().collect();
            state.migration = if state.others_migrate { "active" } else { "none" };
            state.cancel = Some(cancel);
            state.commands.clear();
        }
        let options = Options { command_deadline: self.command_deadline, ..Options::default() };
        let client = Client::connect(&self.qmp, options).await.unwrap();
        let guard = Arc::new(Windows(Arc::clone(&self.windows)));
        let machine = Machine {
            store: self.store.clone(),
            name: self.vm.clone(),
            disks: vec![Disk {
                socket: self.qemu.disk.clone(),
                guard,
                write_cache_off: telling(&self.write_cache_off),
            }],
            gate: Arc::clone(&self.qemu.gate),
            qmp: client,
            directory: self.directory.path().to_owned(),
            firsts: Arc::default(),
        };
        let (progress, _) = watch::channel(Taking::default());
        let hold = Hold { cancel: cancelled, progress };
        let taken = tokio::time::timeout(LIMIT, take(&machine, order, hold)).await;
        taken.expect("taking hangs")
    }

    /// What holds of every checkpoint, however it went: nothing is left of it but what it says.
    pub(super) fn assert_put_back(&self, what: &str) {
        let state = self.qemu.state();
        assert!(state.running, "{what}: the machine stands still");
        let fresh = Qemu::new(Gate::new(self.store.clone()), PathBuf::new());
        assert_eq!(state.capabilities, fresh.state().capabilities, "{what}");
        assert_eq!(state.parameters, fresh.state().parameters, "{what}");
        assert!(!matches!(state.migration, "setup" | "active" | "pre-switchover" | "device"), "{what}");
        assert_eq!(self.windows.load(Ordering::SeqCst), 0, "{what}: a window is open");
        let begun = |one: &CheckpointInfo| one.state == CheckpointState::Begun;
        assert!(!self.store.checkpoints(&self.vm).unwrap().iter().any(begun), "{what}: it is neither nor");
        let sockets = std::fs::read_dir(self.directory.path()).unwrap().flatten();
        let left = sockets.filter(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"));
        assert_eq!(left.count(), 0, "{what}: a socket is left");
    }

    /// The last checkpoint was aborted, and says why.
    pub(super) fn assert_aborted(&self, why: &str) {
        let last = self.store.checkpoints(&self.vm).unwrap().pop().unwrap();
        let CheckpointState::Aborted { reason } = last.state else { panic!("{:?}", last.state) };
        assert!(reason.contains(why), "{reason}, not {why}");
    }

    /// The newest checkpoint, in whatever state. Of aborted ones, the store keeps the last few.
    pub(super) fn newest(&self) -> Option<CheckpointId> {
        self.store.checkpoints(&self.vm).unwrap().last().map(|one| one.id)
    }

    /// How many checkpoints there are, in whatever state.
    pub(super) fn count(&self) -> usize {
        self.store.checkpoints(&self.vm).unwrap().len()
    }
}

/// Waits until the pool is full.
async fn wait_for_blank_segments(store: &Path, count: usize) {
    let there = || std::fs::read_dir(store.join("segments")).unwrap().count();
    let by = Instant::now() + LIMIT;
    while there() < count {
        assert!(Instant::now() < by, "only {} segments", there());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A script with something in between.
fn with(script: &[Act], at: usize, acts: &[Act]) -> Vec<Act> {
    [&script[..at], acts, &script[at..]].concat()
}
