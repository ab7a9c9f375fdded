//! Machines: their checkpoints are taken and restored here, with the store on one side and QEMU on the other.

pub(crate) mod copies;
mod doctor;
mod keeping;
pub(crate) mod schedule;
mod settings;
mod supervisor;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, CheckpointMode, CheckpointState, Store, VmInfo};
use cdp_types::{CheckpointId, Label, VmId, VmName, VolumeId, VolumeName};
use ckpt::firsts::{Ahead, Firsts};
use ckpt::gate::{DiskGuard, Gate, OnTrouble, Unguarded};
use ckpt::take::{Disk, GIVE_UP_AFTER, Hold, Machine, Order, Taking};
use qmp_bridge::{Client, Options, control};
use tokio::sync::{Notify, watch};
use vhost_blk::{FilePage, Guard, WriteCache};

use crate::api::{ApiError, ErrorKind, NewCheckpoint, Supervised};
use crate::callback::Callback;
use crate::http::App;
use crate::serving::Servers;

pub(crate) use settings::Settings;
pub(crate) use supervisor::{Place, Supervisors};

/// How long QEMU of a checkpoint that a dead daemon has left may take to answer.
const LEFT_BEHIND: Duration = Duration::from_secs(5);
/// After so many failures to put things back somebody has to look.
const FAILURES_TOLD: u32 = 12;
/// How long checkpoints that are given up because the daemon stops may take to put everything back, and machines that are
/// being put back to have their memory. What is left of checkpoints then is undone at the next start.
const GIVING_UP: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the QEMU of a supervised machine may take to make its QMP socket.
const STARTING: Duration = Duration::from_secs(30);

/// What is being done with a machine now; one thing at a time.
#[derive(Debug)]
pub(crate) enum Work {
    /// A checkpoint is being taken.
    Taking { cancel: watch::Sender<bool>, progress: watch::Receiver<Taking> },
    /// It is being put back to a checkpoint, or started from one: its disks must stay what they are until its memory has come.
    Returning,
}

/// What is being done with a machine, until this is dropped.
pub(crate) struct Working {
    machines: Arc<Machines>,
    vm: VmName,
}

impl Drop for Working {
    fn drop(&mut self) {
        self.machines.work().remove(&self.vm);
    }
}

/// The machines of a store.
pub(crate) struct Machines {
    store: Store,
    gate: Arc<Gate>,
    /// For the sockets over which memory comes and goes.
    directory: PathBuf,
    /// Who is told of each cut.
    callback: Option<Arc<Callback>>,
    work: Mutex<BTreeMap<VmName, Work>>,
    /// Turns true when the daemon stops: nothing more is begun.
    stopping: watch::Sender<bool>,
    /// Held while a machine's settings are read and written again.
    settings: Mutex<()>,
    /// Held while a checkpoint is deleted.
    deleting: Mutex<()>,
    /// What checkpoints have learned of each.
    firsts: Mutex<BTreeMap<VmName, Arc<Firsts>>>,
    /// Who can start a machine's QEMU anew.
    pub(crate) supervisors: Arc<Supervisors>,
    /// Told when a machine gets a schedule.
    pub(crate) schedules_changed: Notify,
}

/// A server's guard, as checkpoints see it.
struct ServerGuard(Arc<Guard>);

impl DiskGuard for ServerGuard {
    fn prepare(&self) -> Result<i32, Unguarded> {
        self.0.prepare().map(|target| target.pid).map_err(|refusal| Unguarded {
            why: refusal.what(),
            cure: refusal.cure().to_owned(),
            pid: refusal.pid(),
        })
    }

    fn open(&self, on_trouble: OnTrouble, ahead: &Ahead) -> Result<Box<dyn Send>, String> {
        let opened = self.0.open(move |trouble| on_trouble(trouble.to_string()));
        let window = opened.map_err(|refusal| refusal.to_string())?;
        let pages =
            ahead.pages.iter().map(|page| FilePage { file_bytes: page.block_bytes, offset: page.offset });
        window.touch_ahead(pages, &ahead.over);
        Ok(Box::new(window))
    }
}

impl Machines {
    /// Machines of this store; their sockets are made in `directory`.
    pub(crate) fn new(
        store: Store,
        gate: Arc<Gate>,
        directory: &Path,
        callback: Option<Arc<Callback>>,
    ) -> Self {
        Self {
            store,
            gate,
            directory: directory.to_owned(),
            callback,
            work: Mutex::default(),
            stopping: watch::Sender::new(false),
            settings: Mutex::default(),
            deleting: Mutex::default(),
            firsts: Mutex::default(),
            supervisors: Arc::default(),
            schedules_changed: Notify::new(),
        }
    }

    fn work(&self) -> MutexGuard<'_, BTreeMap<VmName, Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to do something with a machine.
    ///
    /// # Errors
    /// `Busy`: something else is being done with it; `Unavailable`: the daemon is stopping.
    pub(crate) fn begin(self: &Arc<Self>, vm: &VmName, work: Work) -> Result<Working, ApiError> {
        let mut all = self.work();
        if *self.stopping.borrow() {
            return Err(ends());
        }
        if let Some(other) = all.get(vm) {
            return Err(busy(vm, other));
        }
        all.insert(vm.clone(), work);
        Ok(Working { machines: Arc::clone(self), vm: vm.clone() })
    }

    /// Refuses to change volumes that are disks of a machine which is being put back to a checkpoint: its memory would come
    /// to disks that do not fit it.
    ///
    /// # Errors
    /// `Busy`, with the machine.
    pub(crate) fn check_disks<'a>(
        &self,
        mut volumes: impl Iterator<Item = &'a VolumeName>,
    ) -> Result<(), ApiError> {
        let all = self.work();
        let returning = all.iter().filter(|(_, work)| matches!(work, Work::Returning));
        let disks: Vec<_> =
            returning.filter_map(|(vm, work)| Some((vm, work, self.store.vm(vm).ok()?.volumes))).collect();
        let taken = volumes.find_map(|volume| disks.iter().find(|(_, _, disks)| disks.contains(volume)));
        taken.map_or(Ok(()), |(vm, work, _)| Err(busy(vm, work)))
    }

    /// To be held by whoever reads a machine's settings, or what is said of a checkpoint, and writes them again.
    pub(crate) fn settings(&self) -> MutexGuard<'_, ()> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn firsts(&self, vm: &VmName) -> Arc<Firsts> {
        let mut firsts = self.firsts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(firsts.entry(vm.clone()).or_default())
    }

    /// How far the checkpoint is that is being taken of a machine, in pages.
    pub(crate) fn taking(&self, vm: &VmName) -> Option<(u64, u64)> {
        match self.work().get(vm)? {
            Work::Taking { progress, .. } => {
                let Taking { received_pages, total_pages } = *progress.borrow();
                Some((received_pages, total_pages))
            }
            Work::Returning => None,
        }
    }

    /// Ends when the daemon stops.
    async fn ending(&self) {
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Whether a machine is being put back to a checkpoint, or started from one.
    pub(crate) fn is_returning(&self, vm: &VmName) -> bool {
        matches!(self.work().get(vm), Some(Work::Returning))
    }

    /// Gives up the checkpoint that is being taken.
    ///
    /// # Errors
    /// None is.
    pub(crate) fn cancel(&self, vm: &VmName) -> Result<(), ApiError> {
        match self.work().get(vm) {
            Some(Work::Taking { cancel, .. }) => {
                cancel.send_replace(true);
                Ok(())
            }
            Some(Work::Returning) | None => {
                Err(ApiError::new(ErrorKind::NotFound, format!("no checkpoint of '{vm}' is being taken")))
            }
        }
    }

    /// Gives up all checkpoints that are being taken, so that no machine stands still while no daemon runs, nor its file
    /// systems, and waits for machines that are being put back: with half of its memory one would be lost.
    /// Nothing more is begun.
    pub(crate) async fn stop(&self) {
        self.give_up();
        let given_up = async {
            while !self.work().is_empty() || qmp_bridge::thawing() > 0 {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        if tokio::time::timeout(GIVING_UP, given_up).await.is_err() {
            tracing::warn!(
                "a checkpoint is not given up after {GIVING_UP:?}, or a guest not thawed: the next start undoes what it finds; \
                 or a machine is still being put back"
            );
        }
    }

    fn give_up(&self) {
        let all = self.work();
        // With the lock held: a request that has come before begins what it is to begin before this, or not at all.
        self.stopping.send_replace(true);
        for work in all.values() {
            if let Work::Taking { cancel, .. } = work {
                cancel.send_replace(true);
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
        new: NewCheckpoint,
    ) -> Result<CheckpointInfo, ApiError> {
        let info = self.store.vm(vm)?;
        let order = self.order(&info, new)?;
        self.check_undone(&info)?;
        let disks = self.disks(servers, &info)?;
        let (cancel, cancelled) = watch::channel(false);
        let (tell, progress) = watch::channel(Taking::default());
        let working = self.begin(vm, Work::Taking { cancel, progress })?;
        let hold = Hold { cancel: cancelled, progress: tell };
        let machines = Arc::clone(&self);
        let task = tokio::spawn(async move {
            let taken = machines.take_from(info, disks, order, hold).await;
            drop(working);
            taken
        });
        task.await.unwrap_or_else(|_| {
            Err(ApiError::new(ErrorKind::Internal, "the task of the checkpoint has died"))
        })
    }

    /// Refuses a machine of which a dead daemon has left a checkpoint that is not undone yet.
    fn check_undone(&self, info: &VmInfo) -> Result<(), ApiError> {
        if !self.store.unfinished_checkpoints().iter().any(|left| left.vm == info.id) {
            return Ok(());
        }
        let text = format!(
            "the checkpoint of '{}' that was being taken when cdpd ended is still being undone; try again",
            info.name
        );
        Err(ApiError::new(ErrorKind::Busy, text))
    }

    /// Waits for that, which mostly takes no longer than a QEMU's start, but not for one that hangs.
    async fn wait_until_undone(&self, info: &VmInfo) -> Result<(), ApiError> {
        let by = Instant::now() + LEFT_BEHIND;
        loop {
            match self.check_undone(info) {
                Err(_) if Instant::now() < by => tokio::time::sleep(LOOK_EVERY).await,
                outcome => return outcome,
            }
        }
    }

    /// What a request means for a machine.
    fn order(&self, info: &VmInfo, new: NewCheckpoint) -> Result<Order, ApiError> {
        new.label.as_ref().map_or(Ok(()), |label| self.check_label(info, label))?;
        let Settings { agent, launch, .. } = Settings::of(info)?;
        if new.quiesce && agent.is_none() {
            let name = &info.name;
            let cure = match launch {
                Some(_) => {
                    format!("run it with one from the next time on, with cdp-tool vm run {name} --agent")
                }
                None => format!("say where it is, with cdp-tool vm register {name} … --agent SOCKET"),
            };
            let text =
                format!("machine '{name}' has no guest agent that could be asked to quiesce it: {cure}");
            return Err(ApiError::new(ErrorKind::Invalid, text));
        }
        Ok(Order {
            mode: new.mode.unwrap_or(CheckpointMode::Hot),
            careful: new.mode.is_none(),
            label: new.label,
            give_up_after: new.give_up_after_s.map_or(GIVE_UP_AFTER, Duration::from_secs),
            quiesce: agent.filter(|_| new.quiesce).map(PathBuf::from),
            at_cut: self.callback.as_ref().map(|callback| callback.for_machine(info)),
        })
    }

    /// Refuses a label that the store would refuse, once QEMU had been asked: whoever is told only that no checkpoint was taken
    /// would try again.
    fn check_label(&self, info: &VmInfo, label: &Label) -> Result<(), ApiError> {
        if label.as_str().bytes().all(|byte| byte.is_ascii_digit()) {
            let text = format!("'{label}' would be taken for a checkpoint's number");
            return Err(ApiError::new(ErrorKind::Invalid, text));
        }
        let lives = |one: &&CheckpointInfo| !matches!(one.state, CheckpointState::Aborted { .. });
        let all = self.store.checkpoints(&info.name)?;
        match all.iter().filter(lives).find(|one| one.label.as_ref() == Some(label)) {
            Some(other) => {
                let text = format!("checkpoint {} has the label '{label}' already", other.id);
                Err(ApiError::new(ErrorKind::Exists, text))
            }
            None => Ok(()),
        }
    }

    async fn take_from(
        self: Arc<Self>,
        info: VmInfo,
        disks: Vec<Disk>,
        mut order: Order,
        hold: Hold,
    ) -> Result<CheckpointInfo, ApiError> {
        let (machines, name) = (Arc::clone(&self), info.name.clone());
        on_thread(move || machines.end_left(&name)).await?;
        let qmp = tokio::select! {
            connected = self.connect(&info) => connected?,
            // A QEMU that is being started may take long, and nothing is begun yet.
            () = given_up(hold.cancel.clone()) => {
                return Err(ApiError::new(ErrorKind::Unavailable, "no checkpoint was taken: it was cancelled"));
            }
        };
        let machine = Machine {
            store: self.store.clone(),
            name: info.name.clone(),
            disks,
            gate: Arc::clone(&self.gate),
            qmp,
            directory: self.directory.clone(),
            firsts: self.firsts(&info.name),
        };
        let mut taken = ckpt::take::take(&machine, &order, hold.clone()).await;
        if let Err(error) = &taken
            && order.careful
            && error.is_of_hot_alone()
        {
            tracing::info!(vm = %info.name, "taken live, since it cannot be taken hot: {error}");
            order.mode = CheckpointMode::Live;
            taken = ckpt::take::take(&machine, &order, hold).await;
        }
        match taken {
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

    /// A machine's disks, as their servers have them.
    fn disks(&self, servers: &Servers, info: &VmInfo) -> Result<Vec<Disk>, ApiError> {
        let disk = |name| {
            let id = self.store.volume(name)?.id();
            let served = servers.guard(id).zip(servers.write_cache(id));
            let ((socket, guard), cache) = served.ok_or_else(|| {
                let text = format!("volume '{name}' is not served, so the machine cannot be running on it");
                ApiError::new(ErrorKind::Invalid, text)
            })?;
            let write_cache_off = Arc::new(move || cache.is_off());
            Ok(Disk { socket, guard: Arc::new(ServerGuard(guard)), write_cache_off })
        };
        info.volumes.iter().map(disk).collect()
    }

    /// The write caches of a machine's disks that the guest of a checkpoint, its own or the one that it is a copy of, had
    /// turned off.
    fn write_caches_off(
        &self,
        servers: &Servers,
        info: &VmInfo,
        at: CheckpointId,
    ) -> Result<Vec<Arc<WriteCache>>, ApiError> {
        let CheckpointState::Committed(saved) = self.store.checkpoint(at)?.state else {
            return Ok(Vec::new());
        };
        let mut off = Vec::new();
        for (name, member) in info.volumes.iter().zip(&saved.members) {
            if member.write_cache_off {
                off.extend(servers.write_cache(self.store.volume(name)?.id()));
            }
        }
        Ok(off)
    }

    /// Gives memory and devices to the QEMU that waits for them, and lets it run: how many pages.
    ///
    /// # Errors
    /// It does not wait, is another machine, or does not take them.
    pub(crate) async fn restore(
        &self,
        servers: &Servers,
        info: &VmInfo,
        to: CheckpointId,
    ) -> Result<u64, ApiError> {
        let qmp = self.connect(info).await?;
        // One that was not started from here has begun with the cache on. Before its rings run, which is when the in-flight
        // region is made that tells another process.
        self.write_caches_off(servers, info, to)?.iter().for_each(|cache| cache.restored_off());
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
    /// It is another machine, does not wait, or cannot be asked; `Busy` if a checkpoint of it that a dead daemon has left cannot
    /// be undone; `Unavailable` as soon as the daemon stops: nothing of the disks is changed yet.
    pub(crate) async fn make_ready(
        &self,
        servers: &Servers,
        info: &VmInfo,
        to: CheckpointId,
    ) -> Result<(), ApiError> {
        tokio::select! {
            ready = self.wait_until_ready(servers, info, to) => ready,
            () = self.ending() => Err(ends()),
        }
    }

    async fn wait_until_ready(
        &self,
        servers: &Servers,
        info: &VmInfo,
        to: CheckpointId,
    ) -> Result<(), ApiError> {
        // The store would not put its disks back. And what undoes the checkpoint takes any QEMU for the one that it was taken of.
        self.wait_until_undone(info).await?;
        if self.supervisors.state(&info.name) == Some(Supervised::Waiting) && self.has_gone_on(info).await {
            // It had taken longer to take its memory than it was given, and nobody was told that it has it.
            self.supervisors.runs(&info.name);
        }
        if self.supervisors.state(&info.name) == Some(Supervised::Running) {
            let qmp = self.connect(info).await?;
            let differences = ckpt::restore::differences(&self.store, to, &qmp).await.map_err(refused)?;
            check(to, &differences)?;
        }
        // A QEMU that is started reads once how the caches are, before it answers, and shows its guest that from then on.
        let off = self.write_caches_off(servers, info, to)?;
        let _expected: Vec<_> = off.iter().map(|cache| cache.expect_off()).collect();
        if self.supervisors.state(&info.name).is_some() {
            self.supervisors.restart(&info.name).await?;
        }
        let qmp = self.connect(info).await?;
        ckpt::restore::check_waiting(&qmp).await.map_err(|error| {
            let mut error = refused(error);
            let run_here = Settings::of(info).is_ok_and(|settings| settings.launch.is_some());
            if run_here && self.supervisors.state(&info.name).is_none() {
                error.message.push_str(&format!(
                    "; the cdp-tool vm run that looked after '{0}' has gone, and its QEMU runs on without: end that ('quit' in \
                     QMP), then cdp-tool vm run {0} --at {to}",
                    info.name
                ));
            }
            error
        })?;
        check(to, &ckpt::restore::differences(&self.store, to, &qmp).await.map_err(refused)?)
    }

    /// Whether a QEMU that had waited for memory does so no longer.
    async fn has_gone_on(&self, info: &VmInfo) -> bool {
        let Some(path) = &info.qmp else { return false };
        let Ok(qmp) = Client::connect(Path::new(path), Options::default()).await else { return false };
        control::run_state(&qmp).await.is_ok_and(|state| !state.is_incoming())
    }

    /// Lets file systems go that a machine's checkpoint has in its memory as stilled, now that the machine runs from
    /// it: why not, if that fails.
    pub(crate) async fn thaw(&self, info: &VmInfo, restored: CheckpointId) -> Option<String> {
        let state = self.store.checkpoint(restored).ok()?.state;
        let CheckpointState::Committed(saved) = state else { return None };
        saved.figures.get("quiesced")?;
        let thawed = match Settings::of(info).map(|settings| settings.agent) {
            Ok(Some(agent)) => ckpt::take::thaw(Path::new(&agent)).await.map_err(|error| error.to_string()),
            _ => Err("no guest agent is registered".to_owned()),
        };
        let why = thawed.err()?;
        tracing::warn!(vm = %info.name, "its file systems may still be frozen: {why}");
        Some(why)
    }

    /// Undoes what a dead daemon has left: sockets, QEMU's settings, a machine that stands still, checkpoints half
    /// taken. Until that is done for a machine, no checkpoint is taken of it.
    pub(crate) async fn recover(app: &Arc<App>) {
        app.machines.remove_sockets();
        let mut machines = tokio::task::JoinSet::new();
        for left in app.store.unfinished_checkpoints() {
            let app = Arc::clone(app);
            machines.spawn(async move { ckpt::take::unprotected(&left, recover(app, &left)).await });
        }
        while machines.join_next().await.is_some() {}
    }

    /// Removes the sockets of checkpoints and restores that a dead daemon has left; none of this one has any yet.
    fn remove_sockets(&self) {
        let left = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for path in left.map(|entry| entry.path()).filter(|path| is_transfer(path)) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// Runs what blocks on a thread that may.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let died = |_| Err(ApiError::new(ErrorKind::Internal, "a thread has died"));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(died)
}

/// Ends when a checkpoint is to be given up.
async fn given_up(mut cancel: watch::Receiver<bool>) {
    let _ = cancel.wait_for(|cancel| *cancel).await;
}

fn ends() -> ApiError {
    ApiError::new(ErrorKind::Unavailable, "cdpd is stopping")
}

fn busy(vm: &VmName, work: &Work) -> ApiError {
    let text = match work {
        Work::Taking { .. } => format!("a checkpoint of '{vm}' is being taken already"),
        Work::Returning => format!("machine '{vm}' is being put back to a checkpoint; try again when it is"),
    };
    ApiError::new(ErrorKind::Busy, text)
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

/// Whether memory comes or goes over a socket of this name.
fn is_transfer(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = name
        .strip_suffix(".sock")
        .and_then(|name| name.strip_prefix("checkpoint-").or_else(|| name.strip_prefix("restore-")));
    number.is_some_and(|number| number.parse::<u64>().is_ok())
}

/// Tries until it is done: what the dead daemon has noted is all that says how its QEMU was.
async fn recover(app: Arc<App>, left: &CheckpointInfo) {
    for failures in 1u32.. {
        let Err(error) = try_to_recover(&app, left).await else { break };
        match failures {
            1 => tracing::warn!(checkpoint = %left.id, "not aborted yet, and tried again: {error}"),
            FAILURES_TOLD => tracing::error!(checkpoint = %left.id, "still cannot be aborted: {error}"),
            _ => {}
        }
        tokio::time::sleep(LEFT_BEHIND).await;
    }
    tracing::info!(checkpoint = %left.id, "aborted: it was being taken when the daemon ended");
}

async fn try_to_recover(app: &App, left: &CheckpointInfo) -> Result<(), String> {
    let path = left.restore.get("qmp").and_then(serde_json::Value::as_str).map(PathBuf::from);
    let qmp = match path {
        Some(path) => {
            match tokio::time::timeout(LEFT_BEHIND, Client::connect(&path, Options::default())).await {
                Ok(Ok(client)) => Some(client),
                // It has ended: there is nothing to put back.
                Ok(Err(error)) if error.kind() == qmp_bridge::ErrorKind::Unreachable => None,
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) => return Err(format!("QEMU does not answer on {}", path.display())),
            }
        }
        None => None,
    };
    if qmp.is_some() {
        disks_are_back(app, left.vm).await;
    }
    ckpt::take::recover(&app.store, left, qmp.as_ref()).await.map_err(|error| error.to_string())
}

/// Waits until a machine's QEMU has begun to make its connections to its disks again, or too long. One that is continued
/// before that cannot start its disks, and QEMU 7.2 does not try again; from then on it does nothing else until they are
/// made.
async fn disks_are_back(app: &App, vm: VmId) {
    let Some(info) = app.store.vms().into_iter().find(|info| info.id == vm) else { return };
    let ids: Vec<VolumeId> =
        info.volumes.iter().filter_map(|name| Some(app.store.volume(name).ok()?.id())).collect();
    let by = Instant::now() + LEFT_BEHIND;
    while Instant::now() < by && !ids.iter().all(|id| app.servers.has_greeted(*id)) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
