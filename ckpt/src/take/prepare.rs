//! Before anything is touched: what cannot be checkpointed is refused, and what will be changed is written down.

use std::sync::Arc;
use std::time::Duration;

use cdp_store::{CheckpointInfo, CheckpointMode, CheckpointSpec};
use qmp_bridge::migration::{self, Mode, Plan, Settings};
use qmp_bridge::{control, machine};
use serde::{Deserialize, Serialize};

use super::{Machine, Order, TakeError, on_thread, whole};
use crate::doctor::{self, Check};
use crate::memory::MachineFacts;
use crate::protection::Process;

/// What QEMU may take to send the rest of a live migration after the stop, by its own estimate.
const LIVE_DOWNTIME: Duration = Duration::from_millis(20);

/// What is known of a machine before its checkpoint is begun.
pub(super) struct Prepared {
    /// What is to be changed in QEMU.
    pub(super) plan: Plan,
    /// Kept with the memory.
    pub(super) facts: MachineFacts,
    /// What another process needs to put all back.
    pub(super) undo: Undo,
}

/// What has to be undone if this process dies: it is in the store before anything is done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Undo {
    /// QEMU's settings, and whether it ran.
    pub(super) settings: qmp_bridge::migration::Saved,
    /// Path of QEMU's QMP socket.
    pub(super) qmp: std::path::PathBuf,
    /// Path of the agent's socket, if it was to still file systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) agent: Option<std::path::PathBuf>,
    /// QEMU's process, if its memory is to be write-protected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) process: Option<Process>,
}

impl Undo {
    /// What was written down with a checkpoint; none if another version has done so.
    pub(super) fn of(left: &CheckpointInfo) -> Option<Self> {
        serde_json::from_value(left.restore.clone()).ok()
    }
}

impl Prepared {
    /// Asks QEMU and the host.
    ///
    /// # Errors
    /// QEMU cannot be asked, or something is in the way of this mode: what, and what cures it.
    pub(super) async fn new(machine: &Machine, order: &Order) -> Result<Self, TakeError> {
        let plan = plan(order.mode);
        let described = machine::describe(&machine.qmp).await.map_err(|e| whole(&e))?;
        let before = Settings::read(&machine.qmp).await.map_err(|e| whole(&e))?;
        let running = control::run_state(&machine.qmp).await.map_err(|e| whole(&e))?.running;
        let settings = plan.changes(&machine.qmp, &before, running).map_err(|e| whole(&e))?;
        if order.careful && order.mode == CheckpointMode::Hot {
            doctor::hot_doubt(&described)
                .map_or(Ok(()), |doubt| Err(TakeError { hot_alone: true, ..TakeError::new(doubt) }))?;
        }
        let process = refuse(machine, order.mode, &described).await?.and_then(Process::of);
        refuse_beside_another(machine).await?;
        let (qmp, agent) = (machine.qmp.path().clone(), order.quiesce.clone());
        let undo = Undo { settings, qmp, agent, process };
        Ok(Self { plan, facts: facts(&described), undo })
    }

    /// Begins the checkpoint.
    ///
    /// # Durability
    /// That it was begun, and what has to be undone.
    ///
    /// # Errors
    /// The store's.
    pub(super) async fn begin(&self, machine: &Machine, order: &Order) -> Result<CheckpointInfo, TakeError> {
        let restore = serde_json::to_value(&self.undo).map_err(|e| whole(&e))?;
        let spec = CheckpointSpec { mode: order.mode, label: order.label.clone(), restore };
        let (store, name) = (machine.store.clone(), machine.name.clone());
        on_thread(move || store.begin_checkpoint(&name, spec).map_err(|e| whole(&e))).await
    }
}

/// QEMU's settings for a mode.
pub(crate) fn plan(mode: CheckpointMode) -> Plan {
    let mode = match mode {
        CheckpointMode::Hot => Mode::Hot,
        CheckpointMode::Live => Mode::Live,
        CheckpointMode::Pause => Mode::Pause,
    };
    Plan::new(mode, LIVE_DOWNTIME)
}

fn facts(described: &machine::Machine) -> MachineFacts {
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

/// Refuses what [`doctor`] finds in the way of a mode. If that is hot, it says which process is QEMU's.
async fn refuse(
    machine: &Machine,
    mode: CheckpointMode,
    described: &machine::Machine,
) -> Result<Option<i32>, TakeError> {
    let sockets: Vec<_> = machine.disks.iter().map(|disk| disk.socket.clone()).collect();
    refuse_one(mode, &doctor::of_machine(described, &sockets))?;
    if mode != CheckpointMode::Hot {
        return Ok(None);
    }
    let mut process = None;
    for disk in &machine.disks {
        let (guard, socket) = (Arc::clone(&disk.guard), disk.socket.display().to_string());
        let directory = machine.directory.clone();
        process = on_thread(move || {
            let prepared = guard.prepare();
            refuse_one(mode, &[Check::of_guard(&socket, &prepared)])?;
            let Ok(pid) = prepared else { return Ok(None) };
            refuse_one(mode, &doctor::of_process(pid, &directory)).map(|()| Some(pid))
        })
        .await?;
    }
    Ok(process)
}

/// Refuses a machine that somebody else migrates: QEMU does one migration at a time, and what fails of ours is put back by
/// ending the one that runs.
pub(super) async fn refuse_beside_another(machine: &Machine) -> Result<(), TakeError> {
    let status = migration::progress(&machine.qmp).await.map_err(|e| whole(&e))?.status;
    if status.has_ended() {
        return Ok(());
    }
    let text = format!(
        "somebody else migrates or saves this machine (it is '{status}'): try again when that is over"
    );
    Err(TakeError::new(text))
}

fn refuse_one(mode: CheckpointMode, checks: &[Check]) -> Result<(), TakeError> {
    let Some(check) = checks.iter().find(|check| check.hinders(mode)) else { return Ok(()) };
    // Another check may be in the way of live mode, too: then that says so.
    let hot_alone = mode == CheckpointMode::Hot && !check.hinders(CheckpointMode::Live);
    Err(TakeError { hot_alone, ..TakeError::new(check) })
}
