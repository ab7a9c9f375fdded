//! The daemon, from opening its store to closing it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use cdp_store::{ErrorKind, OpeningProgress, Store, VerifyProgress};
use cdp_types::VmControl;
use ckpt::gate::Gate;
use jiff::Timestamp;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::Config;
use crate::api::DaemonStatus;
use crate::http::{App, Listener, Listening, listen, router};
use crate::machines::{Machines, schedule};
use crate::nbd::NbdServer;
use crate::serving::Servers;
use crate::socket;
use crate::systemd::{NotifyState, notify};

/// How often sockets that could not be made are tried again.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// How often an opening that takes long says how far it has come.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// How long clients of the API get to take their answers when the daemon stops.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(5);
/// How long guests' requests in flight get. Those left are failed by closing the store; none is acknowledged
/// falsely.
const GUESTS_DEADLINE: Duration = Duration::from_secs(30);

/// A running daemon. Dropping it without [`Daemon::stop`] is like killing it: nothing acknowledged is lost.
pub struct Daemon {
    app: Arc<App>,
    stopping: watch::Sender<bool>,
    listeners: JoinSet<()>,
    retries: JoinHandle<()>,
    schedules: JoinHandle<()>,
    recovery: JoinHandle<()>,
    config: Config,
}

/// The sockets that systemd has passed on for NBD: those named `nbd`, and those without a name.
fn inherited() -> anyhow::Result<Vec<OwnedFd>> {
    let passed = sd_notify::listen_fds_with_names().context("cannot read what systemd has passed on")?;
    let ours = passed.filter(|(_, name)| matches!(name.as_str(), "nbd" | "unknown" | ""));
    // SAFETY: systemd has opened these descriptors for this process (sd_listen_fds(3)) and says so once, in the
    // environment of its start, when nothing else here can own them; this is called once.
    Ok(ours.map(|(fd, _)| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
}

impl Daemon {
    /// Opens the store, serves what it remembers as served, and answers the API.
    ///
    /// # Errors
    /// The store cannot be opened, or a socket of the API cannot be made. A volume's socket that cannot be
    /// made is no error: it is logged, shown, and tried again.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let began = Instant::now();
        let opening = config.clone();
        let store = on_thread(move || open(&opening)).await?;
        let (stopping, stop) = watch::channel(false);
        let gate = Gate::new(store.clone());
        let control = Arc::clone(&gate) as Arc<dyn VmControl>;
        let servers =
            Servers::new(store.clone(), config.store.join(socket::NAME), config.vhost_user, control);
        let callback = config.callback.clone().map(Arc::new);
        let machines = Arc::new(Machines::new(store.clone(), gate, &config.store, callback));
        let daemon = DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: Timestamp::now().to_string(),
        };
        let app = Arc::new(App::new(store, servers, machines, daemon, &config.limits, stop.clone()));
        let resuming = Arc::clone(&app);
        on_thread(move || {
            resuming.servers.resume();
            Ok(())
        })
        .await?;
        // With the disks served again: a machine that a dead daemon has stopped goes on. A QEMU that does not answer
        // must not keep the others' API waiting.
        let recovering = Arc::clone(&app);
        let recovery = tokio::spawn(async move { Machines::recover(&recovering).await });
        let on = Listening {
            router: router(Arc::clone(&app)),
            connections: Arc::new(Semaphore::new(config.limits.connections.min(Semaphore::MAX_PERMITS))),
            stopping: stop,
        };
        let mut listeners = JoinSet::new();
        for listener in bind(&config).await? {
            listeners.spawn(listen(listener, on.clone()));
        }
        let exporting = (config.nbd.clone(), Arc::clone(&app));
        let nbd = on_thread(move || NbdServer::start(&exporting.0, &exporting.1, inherited()?)).await?;
        app.set_nbd(nbd);
        let retries = tokio::spawn(retry(Arc::clone(&app)));
        let schedules = tokio::spawn(schedule::keep_to_schedules(Arc::clone(&app)));
        let (store, took_ms) = (config.store.display(), began.elapsed().as_millis() as u64);
        tracing::info!(%store, version = env!("CARGO_PKG_VERSION"), took_ms, "ready");
        Ok(Self { app, stopping, listeners, retries, schedules, recovery, config })
    }

    /// Ends once the store has shown that it is alive: that its locks can be had. For a watchdog.
    pub async fn pulse(&self) {
        let app = Arc::clone(&self.app);
        // The thread cannot fail but by a panic, which ends the process.
        let _ = on_thread(move || Ok(app.store.volumes().len())).await;
    }

    /// Stops cleanly: the guests' requests in flight end, everything is made durable, the next start has
    /// nothing to recover.
    ///
    /// # Errors
    /// The store could not be closed cleanly; the next start recovers it, as after a kill.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        // 1. Refuse new requests of the API, end long answers, give up checkpoints, wait for machines that are
        //    being put back.
        self.stopping.send_replace(true);
        self.retries.abort();
        self.schedules.abort();
        self.recovery.abort();
        self.app.machines.stop().await;
        // 2. Answer NBD clients' requests in flight, drain the guests' rings. Their machines wait for the next start.
        let app = Arc::clone(&self.app);
        let drained = on_thread(move || {
            app.stop_nbd();
            app.servers.shutdown();
            Ok(())
        });
        if tokio::time::timeout(GUESTS_DEADLINE, drained).await.is_err() {
            tracing::error!("guests' requests have not ended in {GUESTS_DEADLINE:?}; stopping without them");
        }
        // 3. Let the API's clients have their answers.
        let answered = async { while self.listeners.join_next().await.is_some() {} };
        if tokio::time::timeout(ANSWERS_DEADLINE, answered).await.is_err() {
            tracing::warn!(
                "clients have not taken their answers in {ANSWERS_DEADLINE:?}; closing their connections"
            );
            self.listeners.shutdown().await;
        }
        // 4. Close the store. Only then may another daemon's socket take the place of ours, so ours goes first.
        let app = Arc::clone(&self.app);
        let control = self.config.store.join(socket::NAME);
        on_thread(move || {
            if let Err(error) = std::fs::remove_file(&control) {
                tracing::warn!(%error, "cannot remove {}", control.display());
            }
            app.store.close().context("cannot close the store cleanly; the next start will recover it")
        })
        .await?;
        tracing::info!("stopped");
        Ok(())
    }
}

/// Runs what blocks on a thread that may.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(anyhow!("a thread has died: {error}")))
}

fn open(config: &Config) -> anyhow::Result<Store> {
    let directory = config.store.display();
    if is_vacant(&config.store).with_context(|| format!("cannot look into {directory}"))? {
        if !config.create {
            bail!(
                "there is no store in {directory} (is its file system mounted? without --no-create, one is made)"
            );
        }
        Store::create(&config.store, &config.options)
            .with_context(|| format!("cannot make a store in {directory}"))?;
        tracing::info!(store = %directory, "made a new store");
    }
    Store::open_with_progress(&config.store, config.options, tell_of_replay()).map_err(|error| {
        let advice = advice(error.kind());
        anyhow!(error).context(format!("cannot open the store in {directory}{advice}"))
    })
}

/// Says now and then, to the log and to systemd, how much of the logs an opening has read. Usually it is over before that.
fn tell_of_replay() -> OpeningProgress {
    let mut told = Instant::now();
    Box::new(move |VerifyProgress { done_bytes, total_bytes }| {
        if told.elapsed() < TELL_EVERY {
            return;
        }
        told = Instant::now();
        tracing::info!(
            read_bytes = done_bytes,
            at_most_bytes = total_bytes,
            "reading what the index lacks from the logs"
        );
        let mib = |bytes| bytes >> 20;
        let text = format!("reading the logs: {} MiB of at most {}", mib(done_bytes), mib(total_bytes));
        notify(&[NotifyState::Status(&text)]);
    })
}

/// Whether a directory is missing or empty: the only ones in which a store is made.
fn is_vacant(directory: &Path) -> io::Result<bool> {
    match std::fs::read_dir(directory) {
        // What a fresh file system brings along, and a configuration that was put there first, do not count.
        Ok(entries) => {
            let names: Vec<_> = entries.map(|e| e.map(|e| e.file_name())).collect::<io::Result<_>>()?;
            Ok(names.iter().all(|name| cdp_store::Store::tolerates(name)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// What an operator can do about a store that does not open.
fn advice(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Locked => " (stop the other cdpd, or use another directory)",
        ErrorKind::Foreign => " (choose an empty directory, or one that holds a store)",
        ErrorKind::Newer => " (use the version of cdpd that wrote it, or a newer one)",
        ErrorKind::Corrupt => {
            " (see what is damaged: cdp-tool verify; a damaged index: cdp-tool rebuild-index)"
        }
        ErrorKind::NoSpace => " (free some space on its file system)",
        _ => "",
    }
}

async fn bind(config: &Config) -> anyhow::Result<Vec<Listener>> {
    let control = socket::bind(&config.store, config.socket_mode)
        .and_then(UnixListener::from_std)
        .with_context(|| format!("cannot make the control socket {}", show(&config.store)))?;
    let mut listeners = vec![Listener::Control(control)];
    if let Some(address) = config.http {
        let network =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        tracing::info!(%address, "the API listens, without passwords");
        listeners.push(Listener::Network(network));
    }
    Ok(listeners)
}

fn show(store: &Path) -> String {
    store.join(socket::NAME).display().to_string()
}

/// Tries sockets again that could not be made.
async fn retry(app: Arc<App>) {
    loop {
        app.servers.has_failed().await;
        tokio::time::sleep(RETRY_EVERY).await;
        let app = Arc::clone(&app);
        // The thread cannot fail but by a panic, which ends the process.
        let _ = on_thread(move || {
            app.servers.retry();
            Ok(())
        })
        .await;
    }
}
