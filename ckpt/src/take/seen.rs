//! What QEMU and the gate tell while a checkpoint is taken, and what of it ends it.
//!
//! A cut counts if its stop was the migration's own: QEMU's STOP came after MIGRATION `active`, it was the only one, and the
//! last ring had stopped by then. A hot one could otherwise be cut when its guest, which used no disk at the stop, leaves
//! one that it has used since.

use cdp_store::EpochCut;
use qmp_bridge::migration::{self, Mode};
use qmp_bridge::{Client, EventKind, MigrationStatus, Notice, control};
use tokio::task::JoinHandle;

use super::{TakeError, whole};
use crate::gate::GateEvent;

/// What was told so far.
#[derive(Debug)]
pub(super) struct Seen {
    mode: Mode,
    pub(super) cut: Option<EpochCut>,
    /// When the last ring stopped for it, by the system's clock, as QEMU's is.
    still_us: Option<u64>,
    /// QEMU has said anything of this migration: before that, what it says is of an earlier one.
    begun: bool,
    active: bool,
    stops: u32,
    /// Whether somebody else stopped the machine, live: QEMU was asked when it had told of the stop.
    paused: Option<JoinHandle<bool>>,
    pub(super) completed: bool,
    /// The machine stands still, and somebody else wanted that.
    pub(super) stopped_by_others: bool,
    /// By QEMU's clock.
    stopped_us: Option<u64>,
    resumed_us: Option<u64>,
}

impl Seen {
    pub(super) fn new(mode: Mode) -> Self {
        Self {
            mode,
            cut: None,
            still_us: None,
            begun: false,
            active: false,
            stops: 0,
            paused: None,
            completed: false,
            stopped_by_others: false,
            stopped_us: None,
            resumed_us: None,
        }
    }

    /// Takes in what the gate tells.
    ///
    /// # Errors
    /// There is no cut, or it counts for nothing.
    pub(super) fn note_gate(&mut self, event: GateEvent) -> Result<(), TakeError> {
        match event {
            GateEvent::Cut { cut, still_us } => {
                (self.cut, self.still_us) = (Some(cut), still_us);
                Ok(())
            }
            GateEvent::Void { why, passing: true } => Err(TakeError::passing(why)),
            GateEvent::Void { why, passing: false } => Err(TakeError::new(why)),
        }
    }

    /// Takes in what QEMU tells, and has a migration go on that waits for that.
    ///
    /// # Errors
    /// Something has happened that ends the checkpoint.
    pub(super) async fn note_qemu(&mut self, qmp: &Client, notice: Option<Notice>) -> Result<(), TakeError> {
        let event = match notice {
            Some(Notice::Event(event)) => event,
            Some(Notice::Missed { count }) => {
                return Err(TakeError::passing(format!("{count} events of QEMU were missed")));
            }
            Some(Notice::Disconnected { reason }) => return Err(whole(&reason)),
            Some(_) => return Ok(()),
            None => return Err(TakeError::new("the connection to QEMU has ended")),
        };
        match event.kind {
            EventKind::Stop => {
                self.note_stop(event.time_us)?;
                self.ask_who_stopped_it(qmp);
                Ok(())
            }
            EventKind::Resume => self.note_resume(event.time_us),
            // As with one that sleeps from the beginning: see `doctor`.
            EventKind::Suspend if self.stops == 0 => Err(TakeError::new(
                "the guest has suspended itself to memory (S3), from which QEMU could not wake it then",
            )),
            EventKind::Reset { .. } => Err(TakeError::new("the machine was reset")),
            EventKind::Shutdown { .. } => Err(TakeError::new("the machine was switched off")),
            EventKind::Migration { status } => self.note_migration(qmp, status).await,
            _ => Ok(()),
        }
    }

    fn note_stop(&mut self, time_us: Option<u64>) -> Result<(), TakeError> {
        if self.mode != Mode::Pause && !self.active {
            self.stopped_by_others = true;
            return Err(TakeError::passing("somebody else has stopped the machine"));
        }
        self.stops += 1;
        self.stopped_us = self.stopped_us.or(time_us);
        Ok(())
    }

    /// Live, the stop may be the migration's, or come at any time before that: the machine's state says which. Nobody waits
    /// for the answer, since the machine stands still.
    fn ask_who_stopped_it(&mut self, qmp: &Client) {
        if self.mode == Mode::Live {
            let qmp = qmp.clone();
            let is_paused =
                async move { control::run_state(&qmp).await.is_ok_and(|state| state.is_paused()) };
            self.paused = Some(tokio::spawn(is_paused));
        }
    }

    /// Whether the stop, which was the only one, was somebody else's.
    pub(super) async fn was_paused(&mut self) -> bool {
        match self.paused.take() {
            Some(paused) => paused.await.unwrap_or(false),
            None => false,
        }
    }

    fn note_resume(&mut self, time_us: Option<u64>) -> Result<(), TakeError> {
        self.stopped_by_others = false;
        if self.mode != Mode::Hot && !self.completed {
            return Err(TakeError::passing("somebody else has continued the machine before it was saved"));
        }
        self.resumed_us = self.resumed_us.or(time_us);
        Ok(())
    }

    async fn note_migration(&mut self, qmp: &Client, status: MigrationStatus) -> Result<(), TakeError> {
        self.begun |= matches!(status, MigrationStatus::Setup | MigrationStatus::Active);
        match status {
            // The end of the last attempt's, told late.
            _ if !self.begun => {}
            MigrationStatus::Active => self.active = true,
            MigrationStatus::PreSwitchover => migration::proceed(qmp).await.map_err(|e| whole(&e))?,
            MigrationStatus::Completed => self.completed = true,
            MigrationStatus::Failed | MigrationStatus::Cancelled => return Err(why_ended(qmp, &status).await),
            _ => {}
        }
        Ok(())
    }

    /// The cut, once all is over: that of the only stop, if there was one to be.
    ///
    /// # Errors
    /// Nobody knows of which stop it is, or there is none.
    pub(super) fn cut_of(&self, was_running: bool) -> Result<EpochCut, TakeError> {
        if self.stops != u32::from(was_running) {
            let text = format!("the machine was stopped {} times while it was saved", self.stops);
            return Err(TakeError::passing(text));
        }
        // QEMU says that it has stopped when the rings have. In the other modes nothing runs afterwards.
        let hot = self.mode == Mode::Hot;
        if hot && self.still_us.zip(self.stopped_us).is_some_and(|(rings, machine)| rings > machine) {
            return Err(TakeError::passing("its disks stood still only after the machine had"));
        }
        let none = || TakeError::passing("its disks were not cut: no ring of it has stopped");
        self.cut.clone().ok_or_else(none)
    }

    /// Whether the machine was stopped, so that it changes nothing more.
    pub(super) fn was_stopped(&self) -> bool {
        self.stops > 0
    }

    /// Whether it is known when the machine went on.
    pub(super) fn has_resumed(&self) -> bool {
        self.resumed_us.is_some()
    }

    /// The machine has gone on, as it was told to.
    pub(super) fn resumed(&mut self, time_us: Option<u64>) {
        self.resumed_us = self.resumed_us.or(time_us);
    }

    /// How long the machine stood still, in microseconds.
    pub(super) fn pause_us(&self) -> Option<u64> {
        self.stopped_us.zip(self.resumed_us).map(|(from, to)| to.saturating_sub(from))
    }
}

/// Why a migration has not come to its end, in QEMU's words if it has any.
pub(super) async fn why_ended(qmp: &Client, status: &MigrationStatus) -> TakeError {
    match migration::progress(qmp).await {
        Ok(progress) => TakeError::new(
            progress.error.unwrap_or_else(|| format!("QEMU's migration is '{}'", progress.status)),
        ),
        Err(error) => TakeError::new(format!("QEMU's migration is '{status}': {}", whole(&error))),
    }
}
