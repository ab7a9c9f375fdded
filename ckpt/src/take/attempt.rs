//! One try: QEMU is set up, the epoch armed, memory taken in, and everything put back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_store::{CheckpointInfo, EpochCut};
use qmp_bridge::migration::{self, Mode, Saved, Settings};
use qmp_bridge::{Backlog, Event, EventKind, MigrationStatus, Notice, Subscription, control};
use serde_json::json;
use tokio::sync::mpsc;

use super::patience::Patience;
use super::prepare::{Prepared, refuse_beside_another};
use super::recover::wind_down;
use super::seen::{Seen, why_ended};
use super::stillness::Stillness;
use super::told::Told;
use super::{CutNotice, Hold, Machine, Order, TakeError, Taking, on_thread, whole};
use crate::PAGE_SIZE;
use crate::doctor;
use crate::firsts::{Ahead, Watch};
use crate::gate::{Arming, GateEvent, Ticket};
use crate::receiver::{Received, Receiver, is_ours};

/// Between two looks at the receiver while nothing is told.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long QEMU may take to say that it has completed, once all memory has come.
const COMPLETION: Duration = Duration::from_secs(20);

/// How long QEMU may take to send the rest of a stream that nobody wants.
const DRAINING: Duration = Duration::from_secs(120);

/// What there is to commit.
pub(super) struct Complete {
    pub(super) cut: EpochCut,
    pub(super) image_bytes: u64,
    pub(super) figures: serde_json::Value,
}

/// What is done to QEMU and the guest, to be undone in any case.
pub(super) struct Attempt<'a> {
    machine: &'a Machine,
    order: &'a Order,
    prepared: &'a Prepared,
    begun: &'a CheckpointInfo,
    before: Settings,
    saved: Saved,
    /// Something of QEMU may have been changed.
    changed: bool,
    ticket: Option<Ticket>,
    receiver: Option<Receiver>,
    events: Subscription,
    gate: mpsc::UnboundedReceiver<GateEvent>,
    tell: mpsc::UnboundedSender<GateEvent>,
    seen: Seen,
    patience: Patience,
    stillness: Stillness,
    told: Told,
    ahead: Ahead,
}

impl<'a> Attempt<'a> {
    /// Looks at QEMU as it is now. Nothing is changed yet.
    ///
    /// # Errors
    /// QEMU cannot be asked.
    pub(super) async fn new(
        machine: &'a Machine,
        order: &'a Order,
        prepared: &'a Prepared,
        begun: &'a CheckpointInfo,
    ) -> Result<Self, TakeError> {
        let events = machine.qmp.subscribe(Backlog::default());
        let before = Settings::read(&machine.qmp).await.map_err(|e| whole(&e))?;
        let running = control::run_state(&machine.qmp).await.map_err(|e| whole(&e))?.running;
        let saved = prepared.plan.changes(&machine.qmp, &before, running).map_err(|e| whole(&e))?;
        let (tell, gate) = mpsc::unbounded_channel();
        Ok(Self {
            machine,
            order,
            prepared,
            begun,
            before,
            saved,
            changed: false,
            ticket: None,
            receiver: None,
            events,
            gate,
            tell,
            seen: Seen::new(prepared.plan.mode()),
            patience: Patience::new(order.give_up_after),
            stillness: Stillness::Never,
            told: Told::default(),
            ahead: Ahead::default(),
        })
    }

    /// Tries, and puts everything back.
    ///
    /// # Errors
    /// Why it came to nothing.
    pub(super) async fn run(mut self, hold: &mut Hold) -> Result<Complete, TakeError> {
        let outcome = match self.save(hold).await {
            Ok(()) => self.settle(hold).await,
            Err(error) => Err(error),
        };
        self.put_back(outcome).await
    }

    /// Whether the stream must be read to its end even if the checkpoint is given up: a QEMU that leaves its memory
    /// write-protected does not do so when it believes that it has succeeded.
    fn drains(&self) -> bool {
        self.mode() == Mode::Hot && doctor::leaves_protection(&self.saved.version)
    }

    fn mode(&self) -> Mode {
        self.prepared.plan.mode()
    }

    /// Everything up to the end of QEMU's migration.
    async fn save(&mut self, hold: &mut Hold) -> Result<(), TakeError> {
        let (store, id) = (self.machine.store.clone(), self.begun.id);
        let epoch = on_thread(move || store.new_epoch(id).map_err(|e| whole(&e))).await?;
        self.still(hold).await?;
        self.refuse_others().await?;
        self.changed = true;
        let applied = self.prepared.plan.apply(&self.machine.qmp, &self.before).await;
        applied.map_err(|error| TakeError { hot_alone: self.refuses_hot(&error), ..whole(&error) })?;
        // Last, since it waits for QEMU from now on, and not for as long as a guest may take to be stilled.
        let path = self.machine.directory.join(format!("checkpoint-{id}.sock"));
        self.listen(&path)?;
        self.arm(epoch);
        if self.mode() == Mode::Pause && self.saved.running {
            control::stop(&self.machine.qmp).await.map_err(|e| whole(&e))?;
        }
        migration::start(&self.machine.qmp, &path).await.map_err(|e| whole(&e))?;
        self.follow(hold).await
    }

    /// Whether QEMU does not take the settings of mode hot: only then does it look whether its host and the guest's memory can
    /// be protected (`migrate_caps_check`, migration/options.c).
    fn refuses_hot(&self, error: &qmp_bridge::Error) -> bool {
        self.mode() == Mode::Hot && error.kind() == qmp_bridge::ErrorKind::Refused
    }

    /// Waits for QEMU's connection at this path, and for what comes over it.
    fn listen(&mut self, path: &Path) -> Result<(), TakeError> {
        let (store, name) = (self.machine.store.clone(), self.machine.name.clone());
        let facts = self.prepared.facts.clone();
        let watch = (self.mode() == Mode::Hot && self.saved.running)
            .then(|| Watch::new(Arc::clone(&self.machine.firsts)));
        let receiver = Receiver::listen(path, store, name, facts, self.drains(), watch);
        self.receiver =
            Some(receiver.map_err(|error| TakeError::new(format!("{}: {error}", path.display())))?);
        Ok(())
    }

    /// Stills the guest's file systems, if they are to be.
    async fn still(&mut self, hold: &mut Hold) -> Result<(), TakeError> {
        let Some(agent) = &self.order.quiesce else { return Ok(()) };
        self.stillness = Stillness::begin(agent, self.saved.running)?;
        tokio::select! {
            frozen = self.stillness.frozen() => frozen,
            error = hold.cancelled() => Err(error),
        }
    }

    /// Refuses what somebody else has begun with the machine since it was looked at, which may be half a minute ago. It is left
    /// so, since nothing of QEMU is changed yet.
    async fn refuse_others(&self) -> Result<(), TakeError> {
        let state = control::run_state(&self.machine.qmp).await.map_err(|e| whole(&e))?;
        if self.saved.running && !state.running {
            let text = format!("somebody else has stopped the machine (it is '{}')", state.status);
            return Err(TakeError::new(text));
        }
        refuse_beside_another(self.machine).await
    }

    fn arm(&mut self, epoch: cdp_store::Epoch) {
        let disks = &self.machine.disks;
        let guards = match self.mode() {
            Mode::Hot => {
                if self.saved.running {
                    self.ahead = self.machine.firsts.expected();
                }
                disks.iter().map(|disk| Arc::clone(&disk.guard)).collect()
            }
            Mode::Live | Mode::Pause => Vec::new(),
        };
        let sockets = disks.iter().map(|disk| disk.socket.clone()).collect();
        let write_caches = disks.iter().map(|disk| Arc::clone(&disk.write_cache_off)).collect();
        let (paused, tell, ahead) = (!self.saved.running, self.tell.clone(), self.ahead.clone());
        let arming = Arming { epoch, sockets, write_caches, guards, ahead, paused, tell };
        self.ticket = Some(self.machine.gate.arm(arming));
    }

    /// Follows QEMU and the gate until the migration has ended.
    async fn follow(&mut self, hold: &mut Hold) -> Result<(), TakeError> {
        loop {
            tokio::select! {
                biased;
                event = self.gate.recv() => if let Some(event) = event { self.note_gate(event)?; },
                notice = self.events.next() => self.seen.note_qemu(&self.machine.qmp, notice).await?,
                vetoed = self.told.vetoed() => return Err(vetoed),
                error = hold.cancelled() => return Err(error),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if self.seen.has_resumed() {
                self.ahead.end();
            }
            let Some(receiver) = &self.receiver else { return Err(TakeError::new("nobody receives")) };
            let (received_pages, total_pages) = receiver.pages();
            let taking = Taking { received_pages, total_pages };
            hold.progress.send_replace(taking);
            if self.mode() == Mode::Live && !self.seen.was_stopped() {
                self.patience.look(taking, Instant::now())?;
            }
            if self.seen.completed {
                return Ok(());
            }
            if receiver.has_failed() {
                // The guest may be waiting. Why, the receiver says at its end.
                return Err(TakeError::new("what came could not be stored"));
            }
            if receiver.has_ended() {
                return tokio::select! {
                    ended = self.ended_early() => ended,
                    error = hold.cancelled() => Err(error),
                };
            }
        }
    }

    /// The memory has come, or will not: what does QEMU say?
    async fn ended_early(&self) -> Result<(), TakeError> {
        let settled = migration::settled(&self.machine.qmp, COMPLETION).await.map_err(|e| whole(&e))?;
        match settled.status {
            MigrationStatus::Completed => Ok(()),
            status => Err(why_ended(&self.machine.qmp, &status).await),
        }
    }

    fn note_gate(&mut self, event: GateEvent) -> Result<(), TakeError> {
        let before = self.seen.cut.is_some();
        self.seen.note_gate(event)?;
        match &self.seen.cut {
            Some(cut) if !before => {
                let notice = CutNotice { checkpoint: self.begun.clone(), cut: cut.clone() };
                self.told.tell(self.order.at_cut.as_ref(), notice);
                if self.mode() == Mode::Hot {
                    // It runs on by itself, and is not to wait until all of it is saved.
                    self.stillness.let_go();
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The migration has completed: the machine goes on, and what was stored and cut is looked at.
    async fn settle(&mut self, hold: &mut Hold) -> Result<Complete, TakeError> {
        // Before the machine goes on: what comes later voids nothing, and what came before must not be passed over.
        if let Some(ticket) = &self.ticket {
            ticket.cut_if_unused();
        }
        while let Some(notice) = self.events.try_next() {
            self.seen.note_qemu(&self.machine.qmp, Some(notice)).await?;
        }
        while let Ok(event) = self.gate.try_recv() {
            self.note_gate(event)?;
        }
        if self.mode() != Mode::Hot {
            self.heard(hold).await?;
        }
        let was_running = self.saved.running;
        if was_running {
            // Hot, QEMU itself has had it go on, before the first page.
            if self.mode() != Mode::Hot && !self.seen.was_paused().await {
                control::run_again(&self.machine.qmp).await.map_err(|e| whole(&e))?;
            }
            // Whoever stops it from here on wants it so.
            self.saved.running = false;
            self.note_resume().await;
        }
        self.stillness.let_go();
        let Some(receiver) = self.receiver.take() else { return Err(TakeError::new("nobody received")) };
        let received = on_thread(move || receiver.join().map_err(|e| whole(&e))).await?;
        let progress = migration::progress(&self.machine.qmp).await.map_err(|e| whole(&e))?;
        if progress.status != MigrationStatus::Completed {
            return Err(why_ended(&self.machine.qmp, &progress.status).await);
        }
        let cut = self.seen.cut_of(was_running)?;
        self.heard(hold).await?;
        Ok(Complete { cut, image_bytes: received.image_bytes, figures: self.figures(received) })
    }

    /// Waits until whoever is told of the cut has ended.
    async fn heard(&mut self, hold: &mut Hold) -> Result<(), TakeError> {
        tokio::select! {
            told = self.told.wait() => told,
            error = hold.cancelled() => Err(error),
        }
    }

    /// Learns when the machine went on, which is in the events that QEMU has sent by now.
    async fn note_resume(&mut self) {
        while !self.seen.has_resumed() {
            match tokio::time::timeout(LOOK_EVERY, self.events.next()).await {
                Ok(Some(Notice::Event(Event { kind: EventKind::Resume, time_us, .. }))) => {
                    self.seen.resumed(time_us);
                    return;
                }
                Ok(Some(_)) => {}
                // A figure is missing then, no more.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn figures(&self, received: Received) -> serde_json::Value {
        let progress = received.progress;
        let mut figures = json!({
            "pause_us": self.seen.pause_us(),
            "memory_bytes": progress.total * PAGE_SIZE as u64,
            "received_pages": progress.received,
            "zero_pages": progress.zero,
            "changed_pages": progress.changed,
            "stored_bytes": progress.stored_bytes,
        });
        if let Some(told) = self.told.figures() {
            figures["callback"] = told.clone();
        }
        figures
    }

    /// Whether QEMU has had the machine go on by itself, as it does in mode hot before it sends the first page
    /// (`bg_migration_thread`, migration/migration.c). If it stands still then, somebody else has stopped it since.
    fn went_on(&self, receiver: Option<&Receiver>) -> bool {
        self.mode() == Mode::Hot && receiver.is_some_and(|receiver| receiver.pages().0 > 0)
    }

    /// Whether somebody else has stopped the machine, live, before the migration came to that.
    async fn is_paused(&self) -> bool {
        self.mode() == Mode::Live
            && self.seen.was_stopped()
            && control::run_state(&self.machine.qmp).await.is_ok_and(|state| state.is_paused())
    }

    /// Has QEMU go on as it was, if it was changed. Whether that is so.
    async fn wind_down(&self) -> bool {
        if !self.changed {
            return true;
        }
        let wound = wind_down(&self.machine.qmp, &self.saved, self.prepared.undo.process).await;
        let Err(error) = wound else { return true };
        let vm = &self.machine.name;
        if matches!(error.kind(), qmp_bridge::ErrorKind::Gone | qmp_bridge::ErrorKind::Unreachable) {
            tracing::warn!(%vm, "QEMU has ended, so there is nothing to put back: {error}");
        } else {
            tracing::error!(%vm, "QEMU could not be put back as it was: {error}");
        }
        false
    }

    /// Whatever has come of it: the machine runs on, with its settings as they were, and nothing is held any more.
    async fn put_back(mut self, outcome: Result<Complete, TakeError>) -> Result<Complete, TakeError> {
        let mut outcome = outcome;
        let receiver = self.receiver.take();
        let ended = receiver.as_ref().is_some_and(Receiver::has_ended);
        // Before the windows close: what QEMU still protects, it must let go first.
        if let (Err(_), Some(receiver)) = (&outcome, &receiver) {
            if self.drains() {
                receiver.stop_storing();
                // If it does not get there, its protection is lifted from outside.
                let _ = migration::settled(&self.machine.qmp, DRAINING).await;
            }
            receiver.cancel();
        }
        let stays = self.seen.stopped_by_others || self.went_on(receiver.as_ref());
        if outcome.is_err() && (stays || self.is_paused().await) {
            self.saved.running = false;
        }
        if self.mode() == Mode::Hot {
            self.stillness.let_go();
        }
        if !self.wind_down().await {
            outcome = outcome.map_err(|error| TakeError { again: false, ..error });
        }
        // A machine that stands still could not have answered before.
        self.stillness.let_go();
        drop(self.ticket.take());
        if let Some(receiver) = receiver {
            let received = tokio::task::spawn_blocking(|| receiver.join()).await;
            if let (Err(error), Ok(Err(cause)), true) = (&mut outcome, received, ended)
                && is_ours(cause.kind())
            {
                *error = whole(&cause);
            }
        }
        let still = self.stillness.over(&self.machine.name).await;
        match &mut outcome {
            Ok(complete) => {
                if let Some(still) = still {
                    complete.figures["quiesced"] = still;
                }
            }
            // The next attempt's telling must not overtake this one's.
            Err(error) if error.again => drop(self.told.wait().await),
            Err(_) => {}
        }
        outcome
    }
}
