//! Machines: their checkpoints are taken and restored here, with the store on one side and QEMU on the other.

pub(crate) mod copies;
pub(crate) mod schedule;
mod settings;
mod supervisor;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, CheckpointMode, Store, VmInfo};
use cdp_types::{CheckpointId, Label, VmName};
use ckpt::gate::{DiskGuard, Gate, OnTrouble};
use ckpt::take::{Disk, Hold, Machine, Taking};
use qmp_bridge::{Client, Options};
use tokio::sync::watch;
use vhost_blk::Guard;

use crate::api::{ApiError, ErrorKind, Supervised};
use crate::serving::Servers;

pub(crate) use settings::Settings;
pub(crate) use supervisor::{Place, Supervisors};

/// How long QEMU of a checkpoint that a dead daemon has left may take to answer.
const LEFT_BEHIND: Duration = Duration::from_secs(5);

/// How long the QEMU of a supervised machine may take to make its QMP socket.
const STARTING: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What is being taken now, by machine.
#[derive(Debug)]
struct Running {
    cancel: watch::Sender<bool>,
    progress: watch::Receiver<Taking>,
}

/// The machines of a store.
pub(crate) struct Machines {
    store: Store,
    gate: Arc<Gate>,
    /// For the sockets over which memory comes and goes.
    directory: PathBuf,
    running: Mutex<BTreeMap<VmName, Running>>,
    /// Who can start a machine's QEMU anew.
    pub(crate) supervisors: Arc<Supervisors>,
}

/// A server's guard, as checkpoints see it.
struct ServerGuard(Arc<Guard>);

impl DiskGuard for ServerGuard {
    fn prepare(&self) -> Result<(), String> {
        self.0.prepare().map(drop).map_err(|refusal| refusal.to_string())
    }

    fn open(&self, on_trouble: OnTrouble) -> Result<Box<dyn Send>, String> {
        let opened = self.0.open(move |trouble| on_trouble(trouble.to_string()));
        opened.map(|window| Box::new(window) as Box<dyn Send>).map_err(|refusal| refusal.to_string())
    }
}

impl Machines {
    /// Machines of this store; their sockets are made in `directory`.
    pub(crate) fn new(store: Store, gate: Arc<Gate>, directory: &Path) -> Self {
        let directory = directory.to_owned();
        Self { store, gate, directory, running: Mutex::default(), supervisors: Arc::default() }
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<VmName, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the checkpoint is that is being taken of a machine, in pages.
    pub(crate) fn taking(&self, vm: &VmName) -> Option<(u64, u64)> {
        let Taking { received_pages, total_pages } = *self.running().get(vm)?.progress.borrow();
        Some((received_pages, total_pages))
    }

    /// Gives up the checkpoint that is being taken.
    ///
    /// # Errors
    /// None is.
    pub(crate) fn cancel(&self, vm: &VmName) -> Result<(), ApiError> {
        match self.running().get(vm) {
            Some(running) => {
                running.cancel.send_replace(true);
                Ok(())
            }
            None => {
                Err(ApiError::new(ErrorKind::NotFound, format!("no checkpoint of '{vm}' is being taken")))
            }
        }
    }

    /// A connection to a machine's QEMU.
    pub(crate) async fn connect(&self, vm: &VmInfo) -> Result<Client, ApiError> {
        let path = vm.qmp.as_deref().ok_or_else(|| {
            ApiError::new(ErrorKind::Invalid, format!("machine '{}' has no QMP socket", vm.name))
        })?;
        let by = Instant::now()
            + if self.supervisors.state(&vm.name).is_some() { STARTING } else { Duration::ZERO };
        loop {
            match Client::connect(Path::new(path), Options::default()).await {
                Ok(client) => return Ok(client),
                // One that is being started.
                Err(error) if error.kind() == qmp_bridge::ErrorKind::Unreachable && Instant::now() < by => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(error) => return Err(ApiError::new(ErrorKind::Unavailable, error.to_string())),
            }
        }
    }

    /// Takes a checkpoint. It goes on to its end even if the caller does not wait for that.
    ///
    /// # Errors
    /// Why there is none; the machine runs on.
    pub(crate) async fn take(
        self: Arc<Self>,
        servers: &Servers,
        vm: &VmName,
        mode: CheckpointMode,
        label: Option<Label>,
    ) -> Result<CheckpointInfo, ApiError> {
        let info = self.store.vm(vm)?;
        let disks = self.disks(servers, &info)?;
        let (cancel, cancelled) = watch::channel(false);
        let (tell, progress) = watch::channel(Taking::default());
        {
            let mut running = self.running();
            if running.contains_key(vm) {
                let text = format!("a checkpoint of '{vm}' is being taken already");
                return Err(ApiError::new(ErrorKind::Busy, text));
            }
            running.insert(vm.clone(), Running { cancel, progress });
        }
        let hold = Hold { cancel: cancelled, progress: tell };
        let (machines, name) = (Arc::clone(&self), vm.clone());
        let task = tokio::spawn(async move {
            let taken = machines.take_from(info, disks, mode, label, hold).await;
            machines.running().remove(&name);
            taken
        });
        task.await.unwrap_or_else(|_| {
            Err(ApiError::new(ErrorKind::Internal, "the task of the checkpoint has died"))
        })
    }

    async fn take_from(
        &self,
        info: VmInfo,
        disks: Vec<Disk>,
        mode: CheckpointMode,
        label: Option<Label>,
        hold: Hold,
    ) -> Result<CheckpointInfo, ApiError> {
        let qmp = self.connect(&info).await?;
        let machine = Machine {
            store: self.store.clone(),
            name: info.name.clone(),
            disks,
            gate: Arc::clone(&self.gate),
            qmp,
            directory: self.directory.clone(),
        };
        match ckpt::take::take(&machine, mode, label, hold).await {
            Ok(taken) => {
                tracing::info!(vm = %info.name, checkpoint = %taken.id, "checkpoint taken");
                Ok(taken)
            }
            Err(error) => {
                tracing::warn!(vm = %info.name, "no checkpoint: {error}");
                Err(ApiError::new(ErrorKind::Unavailable, format!("no checkpoint was taken: {error}")))
            }
        }
    }

    /// The sockets and guards of a machine's disks.
    fn disks(&self, servers: &Servers, info: &VmInfo) -> Result<Vec<Disk>, ApiError> {
        let disk = |name| {
            let id = self.store.volume(name)?.id();
            let (socket, guard) = servers.guard(id).ok_or_else(|| {
                let text = format!("volume '{name}' is not served, so the machine cannot be running on it");
                ApiError::new(ErrorKind::Invalid, text)
            })?;
            Ok(Disk { socket, guard: Arc::new(ServerGuard(guard)) })
        };
        info.volumes.iter().map(disk).collect()
    }

    /// Gives memory and devices to the QEMU that waits for them, and lets it run: how many pages.
    ///
    /// # Errors
    /// It does not wait, is another machine, or does not take them.
    pub(crate) async fn restore(&self, info: &VmInfo, to: CheckpointId) -> Result<u64, ApiError> {
        let qmp = self.connect(info).await?;
        let restoring = ckpt::restore::restore(&self.store, to, &qmp, &self.directory, true);
        let progress = restoring.await.map_err(refused)?;
        self.supervisors.runs(&info.name);
        tracing::info!(vm = %info.name, checkpoint = %to, "machine restored");
        Ok(progress.received)
    }

    /// Sees to it that a QEMU waits for a checkpoint's memory, if somebody looks after it, and refuses one that is
    /// another machine than the checkpoint's, with both values. A running QEMU is ended only if it is the same machine.
    ///
    /// # Errors
    /// It is another machine, does not wait, or cannot be asked.
    pub(crate) async fn make_ready(&self, info: &VmInfo, to: CheckpointId) -> Result<(), ApiError> {
        if self.supervisors.state(&info.name) == Some(Supervised::Running) {
            let qmp = self.connect(info).await?;
            let differences = ckpt::restore::differences(&self.store, to, &qmp).await.map_err(refused)?;
            check(to, &differences)?;
        }
        if self.supervisors.state(&info.name).is_some() {
            self.supervisors.restart(&info.name).await?;
        }
        let qmp = self.connect(info).await?;
        ckpt::restore::check_waiting(&qmp).await.map_err(refused)?;
        check(to, &ckpt::restore::differences(&self.store, to, &qmp).await.map_err(refused)?)
    }

    /// Undoes what a dead daemon has left: QEMU's settings, a machine that stands still, checkpoints half taken.
    pub(crate) async fn recover(&self) {
        for left in self.store.unfinished_checkpoints() {
            let path = left.restore.get("qmp").and_then(serde_json::Value::as_str).map(PathBuf::from);
            let qmp = match path {
                Some(path) => {
                    let connecting = Client::connect(&path, Options::default());
                    tokio::time::timeout(LEFT_BEHIND, connecting).await.ok().and_then(Result::ok)
                }
                None => None,
            };
            match ckpt::take::recover(&self.store, &left, qmp.as_ref()).await {
                Ok(()) => {
                    tracing::info!(checkpoint = %left.id, "aborted: it was being taken when the daemon ended")
                }
                Err(error) => tracing::error!(checkpoint = %left.id, "cannot be aborted: {error}"),
            }
        }
    }
}

fn refused(error: ckpt::restore::RestoreError) -> ApiError {
    ApiError::new(ErrorKind::Unavailable, error.to_string())
}

fn check(to: CheckpointId, differences: &[String]) -> Result<(), ApiError> {
    if differences.is_empty() {
        return Ok(());
    }
    let text = format!("this QEMU is another machine than at checkpoint {to}: {}", differences.join("; "));
    Err(ApiError::new(ErrorKind::Invalid, text))
}
