//! Taking a checkpoint: from the machine as it runs to one record that says that all of it is there.
//!
//! ```text
//!  begun ── settings written down, epoch armed ──► QEMU migrates into our socket
//!    │        the machine stops: the last ring's stop cuts the epoch, on all disks (`gate`)
//!    │        hot: it runs on behind write protection · live, pause: it waits until all is sent
//!    ├── memory stored, migration completed, the cut was that of this migration ──► committed
//!    └── anything else: connection closed, machine runs on, settings put back ──► aborted
//! ```
//!
//! Nothing that goes wrong here stops the machine for good: whatever happens after the stop is followed by
//! [`migration::wind_down`], in this process or, from what was written down, in the next ([`recover`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, CheckpointMode, CheckpointSpec, EpochCut, Store};
use cdp_types::{Label, VmName};
use qmp_bridge::migration::{self, Mode, Plan, Saved, Settings};
use qmp_bridge::{
    Backlog, Client, Event, EventKind, MigrationStatus, Notice, Options, Subscription, control, machine,
};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use crate::gate::{Arming, DiskGuard, Gate, GateEvent, Ticket};
use crate::memory::MachineFacts;
use crate::receiver::{Received, Receiver};

/// What QEMU may take to send the rest of a live migration after the stop, by its own estimate.
const LIVE_DOWNTIME: Duration = Duration::from_millis(20);
/// Between two looks at the receiver while nothing is told.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long QEMU may take to say that it has completed, once all memory has come.
const COMPLETION: Duration = Duration::from_secs(20);

/// Why a checkpoint was not taken. The machine runs on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TakeError(String);

impl TakeError {
    fn new(why: impl std::fmt::Display) -> Self {
        Self(why.to_string())
    }
}

/// Why, with all that lies behind it.
fn whole(error: &dyn std::error::Error) -> TakeError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    TakeError(text)
}

/// A disk of a machine.
#[derive(Clone)]
pub struct Disk {
    /// The socket on which it is served.
    pub socket: PathBuf,
    /// Its guard.
    pub guard: Arc<dyn DiskGuard>,
}

/// A machine whose checkpoint is to be taken.
pub struct Machine {
    /// The store of its disks.
    pub store: Store,
    /// Its name there.
    pub name: VmName,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Where their rings are watched.
    pub gate: Arc<Gate>,
    /// Its QEMU.
    pub qmp: Client,
    /// A directory for the socket of the migration, for this user alone.
    pub directory: PathBuf,
}

/// How far it is, for whoever waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taking {
    /// Pages that have come.
    pub received_pages: u64,
    /// Pages of the machine.
    pub total_pages: u64,
}

/// The caller's hold on a checkpoint that is being taken.
#[derive(Debug)]
pub struct Hold {
    /// Turns true when the checkpoint is to be given up.
    pub cancel: watch::Receiver<bool>,
    /// Told how far it is.
    pub progress: watch::Sender<Taking>,
}

/// What has been done to QEMU and the store, to be undone or completed.
struct Attempt {
    saved: Saved,
    ticket: Option<Ticket>,
    receiver: Option<Receiver>,
    events: Subscription,
    gate: mpsc::UnboundedReceiver<GateEvent>,
    seen: Seen,
}

/// What QEMU and the gate have told.
#[derive(Debug, Default)]
struct Seen {
    cut: Option<EpochCut>,
    active: bool,
    stops: u32,
    completed: bool,
    /// By QEMU's clock.
    stopped_us: Option<u64>,
    resumed_us: Option<u64>,
}

/// Takes a checkpoint of a machine. It goes on even if nobody waits: dropping the future in the middle leaves the
/// machine to [`recover`], so run it in a task of its own.
///
/// # Durability
/// The checkpoint, once this returns.
///
/// # Errors
/// Why there is none; the machine runs on as before, with QEMU's settings as before, as far as QEMU can be reached.
pub async fn take(
    machine: &Machine,
    mode: CheckpointMode,
    label: Option<Label>,
    mut hold: Hold,
) -> Result<CheckpointInfo, TakeError> {
    let began = Instant::now();
    let plan = Plan::new(qemu_mode(mode), LIVE_DOWNTIME);
    let described = machine::describe(&machine.qmp).await.map_err(|e| whole(&e))?;
    let before = Settings::read(&machine.qmp).await.map_err(|e| whole(&e))?;
    let running = described.run_state == "running";
    let saved = plan.changes(&machine.qmp, &before, running).map_err(|e| whole(&e))?;
    prepare(machine, mode, &described).await?;

    let restore = json!({ "qmp": machine.qmp.path(), "settings": saved });
    let spec = CheckpointSpec { mode, label, restore };
    let (store, name) = (machine.store.clone(), machine.name.clone());
    let begun = on_thread(move || store.begin_checkpoint(&name, spec).map_err(|e| whole(&e))).await?;
    let (tell, gate) = mpsc::unbounded_channel();
    let mut attempt = Attempt {
        saved,
        ticket: None,
        receiver: None,
        events: machine.qmp.subscribe(Backlog::default()),
        gate,
        seen: Seen::default(),
    };
    let facts = facts_of(&described);
    let outcome = match run(machine, &begun, &plan, &before, facts, tell, &mut attempt, &mut hold).await {
        Ok(()) => settle(machine, plan.mode(), &mut attempt).await,
        Err(error) => Err(error),
    };
    // Before the windows close: what QEMU still protects, it must let go first.
    if let (Err(_), Some(receiver)) = (&outcome, &attempt.receiver) {
        receiver.cancel();
    }
    if let Err(error) = wind_down(&machine.qmp, &attempt.saved).await {
        tracing::error!(vm = %machine.name, "QEMU could not be put back as it was: {error}");
    }
    drop(attempt.ticket.take());
    let store = machine.store.clone();
    match outcome {
        Ok((cut, received)) => {
            let figures = figures(&attempt.seen, received, began);
            let id = begun.id;
            let committed = on_thread(move || {
                store.commit_checkpoint(id, &cut, received.image_bytes, figures).map_err(|e| whole(&e))
            });
            match committed.await {
                Ok(info) => Ok(info),
                Err(error) => Err(abort(machine, &begun, error).await),
            }
        }
        Err(error) => Err(abort(machine, &begun, error).await),
    }
}

fn qemu_mode(mode: CheckpointMode) -> Mode {
    match mode {
        CheckpointMode::Hot => Mode::Hot,
        CheckpointMode::Live => Mode::Live,
        CheckpointMode::Pause => Mode::Pause,
    }
}

fn facts_of(described: &machine::Machine) -> MachineFacts {
    let more = serde_json::to_value(described)
        .ok()
        .map(|value| [("machine".to_owned(), value)].into_iter().collect());
    MachineFacts {
        qemu_version: described.version.to_string(),
        machine_type: described.machine_type.clone(),
        memory_bytes: described.memory_bytes,
        more: more.unwrap_or_default(),
    }
}

/// Refuses what cannot be checkpointed, before anything is touched.
async fn prepare(
    machine: &Machine,
    mode: CheckpointMode,
    described: &machine::Machine,
) -> Result<(), TakeError> {
    if !described.blockers.is_empty() {
        return Err(TakeError(format!("QEMU cannot save this machine: {}", described.blockers.join("; "))));
    }
    if let Some(disk) = described.disks.iter().find(|disk| disk.writable) {
        let text = format!(
            "disk '{}' ({}) is writable and not of this store: a checkpoint would not hold what is on it",
            disk.name, disk.file
        );
        return Err(TakeError(text));
    }
    let ours = |device: &machine::Device| matches!(&device.backend, machine::Backend::VhostUser { chardev } if is_ours(machine, described, chardev.as_deref()));
    let stores =
        |device: &&machine::Device| ["blk", "scsi", "fs"].iter().any(|kind| device.kind.contains(kind));
    if let Some(other) = described.served_elsewhere().filter(stores).find(|device| !ours(device)) {
        let text = format!(
            "'{}' ({}) holds data that is none of the registered volumes: a checkpoint would not hold it",
            other.name(),
            other.kind
        );
        return Err(TakeError(text));
    }
    if mode != CheckpointMode::Hot {
        return Ok(());
    }
    if let Some(other) = described.served_elsewhere().find(|device| !ours(device)) {
        let text = format!(
            "device '{}' ({}) writes guest memory past QEMU and past us, so a hot checkpoint would be torn: use --mode live or pause",
            other.name(),
            other.kind
        );
        return Err(TakeError(text));
    }
    for disk in &machine.disks {
        let guard = Arc::clone(&disk.guard);
        let socket = disk.socket.display().to_string();
        on_thread(move || guard.prepare().map_err(|why| TakeError(format!("{socket}: {why}")))).await?;
    }
    Ok(())
}

fn is_ours(machine: &Machine, described: &machine::Machine, chardev: Option<&str>) -> bool {
    let socket =
        chardev.and_then(|label| described.chardev(label)).and_then(|chardev| chardev.socket.as_deref());
    socket.is_some_and(|socket| machine.disks.iter().any(|disk| disk.socket == std::path::Path::new(socket)))
}

/// Everything up to the end of QEMU's migration.
#[expect(clippy::too_many_arguments, reason = "one call site, which has just worked all of it out")]
async fn run(
    machine: &Machine,
    begun: &CheckpointInfo,
    plan: &Plan,
    before: &Settings,
    facts: MachineFacts,
    tell: mpsc::UnboundedSender<GateEvent>,
    attempt: &mut Attempt,
    hold: &mut Hold,
) -> Result<(), TakeError> {
    let (store, id) = (machine.store.clone(), begun.id);
    let epoch = on_thread(move || store.new_epoch(id).map_err(|e| whole(&e))).await?;
    let path = machine.directory.join(format!("checkpoint-{id}.sock"));
    let receiver = Receiver::listen(&path, machine.store.clone(), machine.name.clone(), facts);
    attempt.receiver = Some(receiver.map_err(|e| TakeError(format!("{}: {e}", path.display())))?);
    plan.apply(&machine.qmp, before).await.map_err(|e| whole(&e))?;

    let mode = plan.mode();
    let running = attempt.saved.running;
    let guards = if mode == Mode::Hot {
        machine.disks.iter().map(|d| Arc::clone(&d.guard)).collect()
    } else {
        Vec::new()
    };
    let sockets = machine.disks.iter().map(|disk| disk.socket.clone()).collect();
    attempt.ticket = Some(machine.gate.arm(Arming { epoch, sockets, guards, paused: !running, tell }));
    if mode == Mode::Pause && running {
        control::stop(&machine.qmp).await.map_err(|e| whole(&e))?;
    }
    migration::start(&machine.qmp, &path).await.map_err(|e| whole(&e))?;
    loop {
        tokio::select! {
            biased;
            event = attempt.gate.recv() => if let Some(event) = event { note_gate(event, &mut attempt.seen)?; },
            notice = attempt.events.next() => note_qemu(machine, notice, mode, &mut attempt.seen).await?,
            () = cancelled(&mut hold.cancel) => return Err(TakeError("it was cancelled".to_owned())),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let Some(receiver) = &attempt.receiver else { return Err(TakeError("nobody receives".to_owned())) };
        let (received_pages, total_pages) = receiver.pages();
        hold.progress.send_replace(Taking { received_pages, total_pages });
        if attempt.seen.completed {
            return Ok(());
        }
        if receiver.has_ended() {
            return ended_early(machine, attempt).await;
        }
    }
}

/// Ends when the checkpoint is to be given up.
async fn cancelled(cancel: &mut watch::Receiver<bool>) {
    let wanted = cancel.wait_for(|cancel| *cancel).await.is_ok();
    if !wanted {
        // Nobody can cancel it any more.
        std::future::pending::<()>().await;
    }
}

/// The memory has come, or will not: what does QEMU say?
async fn ended_early(machine: &Machine, attempt: &mut Attempt) -> Result<(), TakeError> {
    let settled = migration::settled(&machine.qmp, COMPLETION).await.map_err(|e| whole(&e))?;
    if settled.status == MigrationStatus::Completed {
        return Ok(());
    }
    let received = match attempt.receiver.take() {
        Some(receiver) => on_thread(move || receiver.join().map_err(|e| whole(&e))).await.err(),
        None => None,
    };
    let qemu = settled.error.unwrap_or_else(|| format!("the migration is '{}'", settled.status));
    Err(received.unwrap_or(TakeError(qemu)))
}

fn note_gate(event: GateEvent, seen: &mut Seen) -> Result<(), TakeError> {
    match event {
        GateEvent::Cut(cut) => {
            seen.cut = Some(cut);
            Ok(())
        }
        GateEvent::Void(why) => Err(TakeError(why)),
    }
}

async fn note_qemu(
    machine: &Machine,
    notice: Option<Notice>,
    mode: Mode,
    seen: &mut Seen,
) -> Result<(), TakeError> {
    let event = match notice {
        Some(Notice::Event(event)) => event,
        Some(Notice::Connected { .. }) => return Ok(()),
        Some(Notice::Missed { count }) => {
            return Err(TakeError(format!("{count} events of QEMU were missed")));
        }
        Some(Notice::Disconnected { reason }) => return Err(whole(&reason)),
        Some(_) => return Ok(()),
        None => return Err(TakeError("the connection to QEMU has ended".to_owned())),
    };
    match event.kind {
        EventKind::Stop => {
            if mode != Mode::Pause && !seen.active {
                return Err(TakeError("somebody else has stopped the machine; try again".to_owned()));
            }
            seen.stops += 1;
            seen.stopped_us = seen.stopped_us.or(event.time_us);
        }
        EventKind::Resume => {
            if mode != Mode::Hot && !seen.completed {
                return Err(TakeError(
                    "somebody else has continued the machine before it was saved".to_owned(),
                ));
            }
            seen.resumed_us = seen.resumed_us.or(event.time_us);
        }
        EventKind::Reset { .. } => return Err(TakeError("the machine was reset".to_owned())),
        EventKind::Shutdown { .. } => return Err(TakeError("the machine was switched off".to_owned())),
        EventKind::Migration { status } => match status {
            MigrationStatus::Active => seen.active = true,
            MigrationStatus::PreSwitchover => {
                migration::proceed(&machine.qmp).await.map_err(|e| whole(&e))?;
            }
            MigrationStatus::Completed => seen.completed = true,
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                let progress = migration::progress(&machine.qmp).await.map_err(|e| whole(&e))?;
                return Err(TakeError(
                    progress.error.unwrap_or_else(|| format!("QEMU's migration is '{status}'")),
                ));
            }
            _ => {}
        },
        _ => {}
    }
    Ok(())
}

/// The migration has completed: the machine goes on, and what was stored and cut is looked at.
async fn settle(
    machine: &Machine,
    mode: Mode,
    attempt: &mut Attempt,
) -> Result<(EpochCut, Received), TakeError> {
    // Before the machine goes on: what comes later voids nothing, and what came before must not be passed over.
    if let Some(ticket) = &attempt.ticket {
        ticket.cut_if_unused();
    }
    while let Some(notice) = attempt.events.try_next() {
        note_qemu(machine, Some(notice), mode, &mut attempt.seen).await?;
    }
    while let Ok(event) = attempt.gate.try_recv() {
        note_gate(event, &mut attempt.seen)?;
    }
    if attempt.saved.running {
        control::run_again(&machine.qmp).await.map_err(|e| whole(&e))?;
        note_resume(attempt).await;
    }
    let Some(receiver) = attempt.receiver.take() else { return Err(TakeError("nobody received".to_owned())) };
    let received = on_thread(move || receiver.join().map_err(|e| whole(&e))).await?;
    let progress = migration::progress(&machine.qmp).await.map_err(|e| whole(&e))?;
    if progress.status != MigrationStatus::Completed {
        return Err(TakeError(
            progress.error.unwrap_or_else(|| format!("QEMU's migration is '{}'", progress.status)),
        ));
    }
    let expected = u32::from(attempt.saved.running);
    if attempt.seen.stops != expected {
        let text =
            format!("the machine was stopped {} times while it was saved; try again", attempt.seen.stops);
        return Err(TakeError(text));
    }
    let cut = attempt.seen.cut.clone();
    let cut = cut.ok_or_else(|| TakeError("its disks were not cut: no ring of it has stopped".to_owned()))?;
    Ok((cut, received))
}

/// Has QEMU go on as it was; on a new connection if the old one has ended.
async fn wind_down(qmp: &Client, saved: &Saved) -> Result<(), qmp_bridge::Error> {
    let Err(first) = migration::wind_down(qmp, saved).await else { return Ok(()) };
    let again = Client::connect(qmp.path(), Options::default()).await.map_err(|_| first)?;
    migration::wind_down(&again, saved).await.map(drop)
}

/// Learns when the machine went on, which is in the events that QEMU has sent by now.
async fn note_resume(attempt: &mut Attempt) {
    while attempt.seen.resumed_us.is_none() {
        match tokio::time::timeout(LOOK_EVERY, attempt.events.next()).await {
            Ok(Some(Notice::Event(Event { kind: EventKind::Resume, time_us, .. }))) => {
                attempt.seen.resumed_us = time_us;
                return;
            }
            Ok(Some(_)) => {}
            // A figure is missing then, no more.
            Ok(None) | Err(_) => return,
        }
    }
}

fn figures(seen: &Seen, received: Received, began: Instant) -> serde_json::Value {
    let pause = seen.stopped_us.zip(seen.resumed_us).map(|(from, to)| to.saturating_sub(from));
    json!({
        "pause_us": pause,
        "duration_ms": u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        "memory_bytes": received.progress.total * crate::PAGE_SIZE as u64,
        "received_pages": received.progress.received,
        "zero_pages": received.progress.zero,
        "changed_pages": received.progress.changed,
        "stored_bytes": received.progress.stored_bytes,
    })
}

/// Says that there will be no such checkpoint, and returns why.
async fn abort(machine: &Machine, begun: &CheckpointInfo, error: TakeError) -> TakeError {
    let (store, id, reason) = (machine.store.clone(), begun.id, error.to_string());
    let aborted = on_thread(move || store.abort_checkpoint(id, &reason).map_err(|e| whole(&e)));
    match aborted.await {
        Ok(()) => error,
        Err(second) => TakeError(format!("{error}; and it could not be marked as aborted: {second}")),
    }
}

/// Undoes what an earlier process has left of a checkpoint that it began: QEMU's settings are put back and the machine
/// runs again, if it can be reached through `qmp`; then the checkpoint is aborted.
///
/// # Errors
/// If the store does not take the abort. A QEMU that cannot be reached is no error: it may have ended.
pub async fn recover(store: &Store, left: &CheckpointInfo, qmp: Option<&Client>) -> Result<(), TakeError> {
    let saved: Option<Saved> =
        left.restore.get("settings").cloned().and_then(|value| serde_json::from_value(value).ok());
    if let (Some(client), Some(saved)) = (qmp, &saved)
        && let Err(error) = migration::wind_down(client, saved).await
    {
        tracing::warn!(checkpoint = %left.id, "QEMU could not be put back as it was: {error}");
    }
    let (store, id) = (store.clone(), left.id);
    on_thread(move || {
        store.abort_checkpoint(id, "the daemon ended while it was taken").map_err(|e| whole(&e))
    })
    .await
}

/// Runs what blocks on a thread that may.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TakeError> + Send + 'static,
) -> Result<T, TakeError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(TakeError::new(error)))
}
