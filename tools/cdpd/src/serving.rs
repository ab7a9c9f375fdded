//! The volumes that are served to guests, each by a vhost-user server on a socket of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cdp_store::{Reverted, Serving, Store};
use cdp_types::{CheckpointId, Instant, VmControl, VmName, VolumeId, VolumeName, one_line};
use tokio::sync::Notify;
use vhost_blk::{Guard, Server, ServerConfig, ServerStats, WriteCache};

use crate::api::{ApiError, ErrorKind, ServingStatus};
use crate::config::VhostUser;

/// Queues that a volume offers unless told otherwise: QEMU asks for one per virtual processor and refuses to
/// start if there are fewer. One that is not started costs nothing.
pub const DEFAULT_QUEUES: u16 = 16;
/// The most queues that a volume can offer.
pub const MAX_QUEUES: u16 = 256;

/// How long a guest that has just ended may take to be noticed: whoever waits for its end reverts its disk next.
const PARTING: Duration = Duration::from_millis(400);

/// The servers of one store.
///
/// What is served is remembered in the store; this is what runs of it. A socket that cannot be made when the
/// daemon starts (its directory may come later) is kept as failed and tried again by [`Servers::retry`].
pub(crate) struct Servers {
    store: Store,
    /// The control socket, which no volume may take.
    reserved: PathBuf,
    settings: VhostUser,
    /// Told of every ring.
    control: Arc<dyn VmControl>,
    running: Mutex<BTreeMap<VolumeId, Entry>>,
    /// Held while a volume's serving changes, so that the store and `running` change together.
    changing: Mutex<()>,
    /// Told when a socket could not be made.
    failed: Notify,
    /// No server is started any more.
    stopped: AtomicBool,
}

struct Entry {
    serving: Serving,
    outcome: Result<Server, String>,
}

/// A volume that a guest is connected to.
struct Connected {
    id: VolumeId,
    name: VolumeName,
    serving: Serving,
}

impl Servers {
    pub(crate) fn new(
        store: Store,
        reserved: PathBuf,
        settings: VhostUser,
        control: Arc<dyn VmControl>,
    ) -> Self {
        let (running, changing, failed) = (Mutex::default(), Mutex::default(), Notify::new());
        let stopped = AtomicBool::new(false);
        Self { store, reserved, settings, control, running, changing, failed, stopped }
    }

    /// Serves every volume that the store remembers as served.
    pub(crate) fn resume(&self) {
        let _changing = lock(&self.changing);
        for volume in self.store.volumes() {
            let Some(serving) = volume.serving else { continue };
            let outcome = self.start(&volume.name, volume.id, &serving).map_err(|error| error.message);
            let (name, socket) = (&volume.name, &serving.socket);
            match &outcome {
                Ok(_) => tracing::info!(volume = %name, socket, "serving"),
                Err(error) => tracing::error!(volume = %name, socket, error, "cannot serve; will retry"),
            }
            self.note(volume.id, Entry { serving, outcome });
        }
    }

    /// Notes how a volume is served, or that it is not, which [`Servers::has_failed`] tells.
    fn note(&self, id: VolumeId, entry: Entry) {
        let failed = entry.outcome.is_err();
        lock(&self.running).insert(id, entry);
        if failed {
            self.failed.notify_one();
        }
    }

    /// Tries again what has failed.
    pub(crate) fn retry(&self) {
        let _changing = lock(&self.changing);
        for volume in self.store.volumes() {
            let failed = lock(&self.running).get(&volume.id).is_some_and(|entry| entry.outcome.is_err());
            let Some(serving) = volume.serving.filter(|_| failed) else { continue };
            let outcome = self.start(&volume.name, volume.id, &serving).map_err(|error| error.message);
            if outcome.is_ok() {
                tracing::info!(volume = %volume.name, socket = serving.socket, "serving after all");
            }
            // What is in the way now may be something else than before.
            self.note(volume.id, Entry { serving, outcome });
        }
    }

    /// Serves a volume from now on, and again whenever the daemon starts.
    ///
    /// # Errors
    /// No such volume, a socket that cannot be made or belongs to another volume, or one that is served
    /// differently.
    pub(crate) fn serve(&self, name: &VolumeName, serving: Serving) -> Result<(), ApiError> {
        let _changing = lock(&self.changing);
        let id = self.store.volume(name)?.id();
        check(&serving, &self.reserved)?;
        if let Some(entry) = lock(&self.running).get(&id) {
            if entry.serving != serving {
                let message =
                    format!("volume '{name}' is served on {}: unserve it first", entry.serving.socket);
                return Err(ApiError::new(ErrorKind::Busy, message));
            }
            if entry.outcome.is_ok() {
                return Ok(());
            }
        }
        // 1. Make the socket. Crash: a stale socket, which the next `serve` replaces.
        let mut server = self.start(name, id, &serving)?;
        // 2. Remember it. Only now may it be reported as served.
        if let Err(error) = self.store.set_serving(name, Some(serving.clone())) {
            server.shutdown();
            return Err(error.into());
        }
        tracing::info!(volume = %name, socket = serving.socket, queues = serving.queues, "serving");
        lock(&self.running).insert(id, Entry { serving, outcome: Ok(server) });
        Ok(())
    }

    /// Stops serving a volume, once the requests in flight have ended.
    ///
    /// # Errors
    /// No such volume, or the store cannot forget that it is served; it is served on then.
    pub(crate) fn unserve(&self, name: &VolumeName) -> Result<(), ApiError> {
        let _changing = lock(&self.changing);
        let id = self.store.volume(name)?.id();
        // 1. Forget it. Crash: the next start does not serve it.
        self.store.set_serving(name, None)?;
        // 2. Let its guest go.
        self.stop(id);
        tracing::info!(volume = %name, "no longer served");
        Ok(())
    }

    /// Destroys a volume; one that is served only if `force` says so.
    ///
    /// # Errors
    /// No such volume, or it is served.
    pub(crate) fn destroy(&self, name: &VolumeName, force: bool) -> Result<(), ApiError> {
        let _changing = lock(&self.changing);
        let info = self.store.volume_info(name)?;
        if let Some(vm) = self.store.vms().into_iter().find(|vm| vm.volumes.contains(name)) {
            let message =
                format!("volume '{name}' is a disk of machine '{0}': cdp-tool vm remove {0}", vm.name);
            return Err(ApiError::new(ErrorKind::Busy, message));
        }
        if let Some(serving) = info.serving.as_ref().filter(|_| !force) {
            let message =
                format!("volume '{name}' is served on {}: unserve it first, or use --force", serving.socket);
            return Err(ApiError::new(ErrorKind::Busy, message));
        }
        let serving = info.serving;
        self.stop(info.id);
        if let Err(error) = self.store.destroy_volume(name, force) {
            // It is there still, and so is its guest.
            if let Some(serving) = serving {
                self.serve_again(info.id, name, serving);
            }
            return Err(error.into());
        }
        tracing::info!(volume = %name, "destroyed");
        Ok(())
    }

    /// Serves a volume again whose server was stopped.
    fn serve_again(&self, id: VolumeId, name: &VolumeName, serving: Serving) {
        let outcome = self.start(name, id, &serving).map_err(|error| error.message);
        if let Err(error) = &outcome {
            tracing::error!(volume = %name, socket = serving.socket, error, "cannot serve; will retry");
        }
        self.note(id, Entry { serving, outcome });
    }

    /// Puts volumes back to earlier instants, all of them or none. With `force`, guests that run on them are
    /// disconnected; their monitors may connect again afterwards, and find the disk reverted.
    ///
    /// # Errors
    /// As [`Store::revert`]; without `force`, that a guest runs on one of them. Nothing is changed then, and no
    /// guest disconnected for a request that could not be met anyhow.
    pub(crate) fn revert(
        &self,
        targets: &[(VolumeName, Instant)],
        force: bool,
        may_be: &dyn Fn() -> Result<(), ApiError>,
    ) -> Result<Vec<Reverted>, ApiError> {
        let _changing = lock(&self.changing);
        // Under the lock: a machine is put back, its disks first, before or after this.
        may_be()?;
        let patience = if force { Duration::ZERO } else { PARTING };
        let reverted = match self.revert_idle(targets, patience) {
            Err(error) if error.kind() == cdp_store::ErrorKind::Busy => {
                let connected = self.connected(targets.iter().map(|(name, _)| name));
                if !force {
                    return Err(refuse_under_guests(&connected).unwrap_or_else(|| error.into()));
                }
                self.revert_without_guests(targets, connected)?
            }
            outcome => outcome?,
        };
        for Reverted { volume, at, branch, undo, .. } in &reverted {
            tracing::info!(%volume, to = %at.seq, undo = %undo.seq, %branch, "reverted");
        }
        Ok(reverted)
    }

    /// Looks at disks of a machine that has been taken for putting it back: a revert of theirs that was under way has
    /// ended by then, and another one is refused.
    pub(crate) fn between_reverts<T>(&self, look: impl FnOnce() -> T) -> T {
        let _changing = lock(&self.changing);
        look()
    }

    /// Reverts volumes that nobody uses, or will not in a moment.
    fn revert_idle(
        &self,
        targets: &[(VolumeName, Instant)],
        patience: Duration,
    ) -> cdp_store::Result<Vec<Reverted>> {
        let began = std::time::Instant::now();
        loop {
            match self.store.revert(targets, false) {
                Err(error) if error.kind() == cdp_store::ErrorKind::Busy && began.elapsed() < patience => {
                    std::thread::sleep(PARTING / 8);
                }
                outcome => return outcome,
            }
        }
    }

    /// Reverts volumes with the servers of their guests stopped meanwhile.
    ///
    /// 1. Stop the servers: requests in flight end, none comes after them.
    /// 2. Revert, or fail to.
    /// 3. Serve again in either case. Crash at any point: the next start serves what the store remembers.
    fn revert_without_guests(
        &self,
        targets: &[(VolumeName, Instant)],
        connected: Vec<Connected>,
    ) -> Result<Vec<Reverted>, ApiError> {
        for guest in &connected {
            tracing::warn!(volume = %guest.name, socket = guest.serving.socket, "disconnecting the guest");
            self.stop(guest.id);
        }
        let reverted = self.store.revert(targets, true);
        for Connected { id, name, serving } in connected {
            self.serve_again(id, &name, serving);
        }
        Ok(reverted?)
    }

    /// Those of some volumes whose guests are connected.
    fn connected<'a>(&self, names: impl Iterator<Item = &'a VolumeName>) -> Vec<Connected> {
        let running = lock(&self.running);
        let connected = |name: &VolumeName| {
            let id = self.store.volume(name).ok()?.id();
            let entry = running.get(&id)?;
            let is_connected = entry.outcome.as_ref().is_ok_and(|server| server.stats().connected);
            is_connected.then(|| Connected { id, name: name.clone(), serving: entry.serving.clone() })
        };
        names.filter_map(connected).collect()
    }

    /// Puts the disks of a machine back to one of its checkpoints, all of them or none.
    ///
    /// # Errors
    /// As [`Store::revert_vm`]; that its guest runs.
    pub(crate) fn revert_vm(&self, vm: &VmName, to: CheckpointId) -> Result<Vec<Reverted>, ApiError> {
        let _changing = lock(&self.changing);
        let began = std::time::Instant::now();
        let reverted = loop {
            match self.store.revert_vm(vm, to, false) {
                Err(error) if error.kind() == cdp_store::ErrorKind::Busy && began.elapsed() < PARTING => {
                    std::thread::sleep(PARTING / 8);
                }
                Err(error) if error.kind() == cdp_store::ErrorKind::Busy => {
                    // A checkpoint that is being taken is Busy as well, and somebody else's writes are.
                    let has_guest = !self.connected(self.store.vm(vm)?.volumes.iter()).is_empty();
                    let mut error = ApiError::from(error);
                    if has_guest {
                        error
                            .message
                            .push_str("; end its QEMU first, and start it again with -incoming defer");
                    }
                    return Err(error);
                }
                outcome => break outcome?,
            }
        };
        tracing::info!(%vm, checkpoint = %to, "disks reverted");
        Ok(reverted.volumes)
    }

    /// The socket of a volume that is served, and the guard of its guest's memory.
    pub(crate) fn guard(&self, id: VolumeId) -> Option<(PathBuf, Arc<Guard>)> {
        let running = lock(&self.running);
        let entry = running.get(&id)?;
        let server = entry.outcome.as_ref().ok()?;
        Some((PathBuf::from(&entry.serving.socket), server.guard()))
    }

    /// The write cache of a volume that is served.
    pub(crate) fn write_cache(&self, id: VolumeId) -> Option<Arc<WriteCache>> {
        let running = lock(&self.running);
        let server = running.get(&id)?.outcome.as_ref().ok()?;
        Some(server.write_cache())
    }

    /// How a volume's socket does.
    pub(crate) fn status(&self, id: VolumeId) -> ServingStatus {
        match lock(&self.running).get(&id).map(|entry| &entry.outcome) {
            None => ServingStatus::Stopped,
            Some(Err(reason)) => ServingStatus::Failed(reason.clone()),
            Some(Ok(server)) if server.stats().connected => ServingStatus::Connected,
            Some(Ok(_)) => ServingStatus::Listening,
        }
    }

    /// Whether a client has connected to a volume's socket and said something.
    pub(crate) fn has_greeted(&self, id: VolumeId) -> bool {
        let running = lock(&self.running);
        running
            .get(&id)
            .is_some_and(|entry| entry.outcome.as_ref().is_ok_and(|server| server.stats().greeted))
    }

    /// Waits until some volume waits for [`Servers::retry`]. One caller at a time.
    pub(crate) async fn has_failed(&self) {
        while lock(&self.running).values().all(|entry| entry.outcome.is_ok()) {
            self.failed.notified().await;
        }
    }

    /// What the servers have done: nothing, and nobody is connected, where the socket could not be made. Whoever waits for a
    /// machine to be connected must not miss that.
    pub(crate) fn stats(&self) -> BTreeMap<VolumeId, ServerStats> {
        let running = lock(&self.running);
        let stats = |entry: &Entry| entry.outcome.as_ref().map(Server::stats).unwrap_or_default();
        running.iter().map(|(id, entry)| (*id, stats(entry))).collect()
    }

    /// Stops every server, side by side: each waits for its own guest's requests. None is started after that: a guest
    /// that connected to it would get errors once the store is closed, instead of waiting for the next daemon.
    pub(crate) fn shutdown(&self) {
        let _changing = lock(&self.changing);
        self.stopped.store(true, Ordering::Relaxed);
        let all = std::mem::take(&mut *lock(&self.running));
        std::thread::scope(|scope| {
            for mut server in all.into_values().filter_map(|entry| entry.outcome.ok()) {
                scope.spawn(move || server.shutdown());
            }
        });
    }

    fn stop(&self, id: VolumeId) {
        // The guard must be gone before the server is waited for, or `status` would wait with it.
        let entry = lock(&self.running).remove(&id);
        if let Some(Ok(mut server)) = entry.map(|entry| entry.outcome) {
            server.shutdown();
        }
    }

    /// With `changing` held.
    fn start(&self, name: &VolumeName, id: VolumeId, serving: &Serving) -> Result<Server, ApiError> {
        if self.stopped.load(Ordering::Relaxed) {
            return Err(ApiError::new(ErrorKind::Unavailable, "cdpd is stopping"));
        }
        let taken = lock(&self.running)
            .iter()
            .any(|(other, entry)| *other != id && entry.serving.socket == serving.socket);
        if taken {
            let message = format!("{} already belongs to another volume", serving.socket);
            return Err(ApiError::new(ErrorKind::Busy, message));
        }
        let volume = self.store.volume(name)?;
        let mut config = ServerConfig::new(&serving.socket);
        config.queues = serving.queues;
        config.mode = self.settings.mode.map_or(config.mode, |mode| mode.0);
        config.busy_poll = self.settings.busy_poll_us.map_or(config.busy_poll, Duration::from_micros);
        Server::bind(config, volume, Arc::clone(&self.control)).map_err(|error| {
            let kind = match error.kind() {
                vhost_blk::ErrorKind::InUse => ErrorKind::Busy,
                vhost_blk::ErrorKind::Resources => ErrorKind::Io,
                vhost_blk::ErrorKind::Socket | vhost_blk::ErrorKind::Config => ErrorKind::Invalid,
            };
            ApiError::new(kind, format!("cannot serve volume '{name}' on {}", one_line(&error)))
        })
    }
}

/// Why volumes are not reverted, if it is for these guests.
fn refuse_under_guests(connected: &[Connected]) -> Option<ApiError> {
    let names: Vec<_> = connected.iter().map(|guest| format!("'{}'", guest.name)).collect();
    let sockets: Vec<_> = connected.iter().map(|guest| guest.serving.socket.as_str()).collect();
    let (names, sockets) = (names.join(", "), sockets.join(", "));
    let message = match connected.len() {
        0 => return None,
        1 => format!(
            "volume {names} is in use: the guest connected on {sockets} is running: stop it (QMP `stop`, or \
             shut it down), or use --force, which disconnects it"
        ),
        _ => format!(
            "volumes {names} are in use: of the guests connected on {sockets} at least one is running: stop \
             them (QMP `stop`, or shut them down), or use --force, which disconnects them"
        ),
    };
    Some(ApiError::new(ErrorKind::Busy, message))
}

fn check(serving: &Serving, reserved: &Path) -> Result<(), ApiError> {
    let path = Path::new(&serving.socket);
    let why = if !path.is_absolute() {
        format!("'{}' is no absolute path", serving.socket)
    } else if path == reserved {
        format!("{} is the daemon's own control socket", serving.socket)
    } else if serving.queues == 0 || serving.queues > MAX_QUEUES {
        format!("{} queues: 1 to {MAX_QUEUES} are possible", serving.queues)
    } else {
        return Ok(());
    };
    Err(ApiError::new(ErrorKind::Invalid, why))
}

/// The data behind these locks is whole between any two statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use cdp_store::{StoreOptions, VolumeSpec};
    use ckpt::gate::Gate;

    use super::*;

    /// The servers of a new store in a directory, and a volume that they serve.
    fn serving_one(directory: &Path) -> (Store, Servers, VolumeName, Serving) {
        let path = directory.join("store");
        let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
        Store::create(&path, &options).unwrap();
        let store = Store::open(&path, options).unwrap();
        let name: VolumeName = "web1".parse().unwrap();
        store.create_volume(&name, VolumeSpec { size_bytes: 4096, logical_block_size: 512 }).unwrap();
        let reserved = path.join("cdpd.sock");
        let servers = Servers::new(store.clone(), reserved, VhostUser::default(), Gate::new(store.clone()));
        let serving = Serving { socket: directory.join("web1.sock").display().to_string(), queues: 1 };
        servers.serve(&name, serving.clone()).unwrap();
        assert!(Path::new(&serving.socket).exists());
        (store, servers, name, serving)
    }

    #[test]
    fn what_is_in_the_way_of_a_socket_is_said_as_of_the_last_attempt() {
        let directory = tempfile::tempdir().unwrap();
        let (store, servers, name, _) = serving_one(directory.path());
        servers.unserve(&name).unwrap();
        let run = directory.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let serving = Serving { socket: run.join("web1.sock").display().to_string(), queues: 1 };
        servers.serve(&name, serving).unwrap();
        servers.shutdown();
        std::fs::remove_dir_all(&run).unwrap();

        let gate = Gate::new(store.clone());
        let servers = Servers::new(store.clone(), PathBuf::new(), VhostUser::default(), gate);
        servers.resume();
        let reason = || match servers.status(store.volume(&name).unwrap().id()) {
            ServingStatus::Failed(reason) => reason,
            status => panic!("{status}"),
        };
        assert!(reason().contains("No such file"), "{}", reason());
        std::fs::write(&run, "").unwrap();
        servers.retry();
        assert!(reason().contains("Not a directory"), "{}", reason());
        std::fs::remove_file(&run).unwrap();
        std::fs::create_dir(&run).unwrap();
        servers.retry();
        assert_eq!(servers.status(store.volume(&name).unwrap().id()), ServingStatus::Listening);
        servers.shutdown();
        store.close().unwrap();
    }

    #[test]
    fn what_cannot_be_forgotten_is_served_on() {
        let directory = tempfile::tempdir().unwrap();
        let (store, servers, name, serving) = serving_one(directory.path());
        store.close().unwrap();
        assert_eq!(servers.unserve(&name).unwrap_err().kind, ErrorKind::Unavailable);
        let id = store.volume(&name).unwrap().id();
        assert_eq!(servers.status(id), ServingStatus::Listening);
        assert!(Path::new(&serving.socket).exists());
        servers.shutdown();
    }

    #[test]
    fn what_comes_after_the_shutdown_is_not_served() {
        let directory = tempfile::tempdir().unwrap();
        let (store, servers, name, serving) = serving_one(directory.path());
        let socket = PathBuf::from(&serving.socket);
        servers.shutdown();
        let refusal = servers.serve(&name, serving).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Unavailable, "{refusal}");
        assert!(!socket.exists());
        store.close().unwrap();
    }
}
