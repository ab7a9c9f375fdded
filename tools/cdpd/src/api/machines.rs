//! What the API says of machines and their checkpoints.

use cdp_store::{CheckpointInfo, CheckpointMode, CheckpointState, VmInfo};
use cdp_types::{CheckpointId, EpochId, Instant, Label, Seq, VmName, VolumeName};
use ckpt::doctor::{Check, MODES};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ApiError, Reverted, rfc3339};
use crate::machines::Settings;

/// A machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: VmName,
    /// Its disks, in its own order.
    pub volumes: Vec<VolumeName>,
    /// Path of its QMP socket.
    pub qmp: Option<String>,
    /// Path of the socket of its guest agent.
    #[serde(default)]
    pub agent: Option<String>,
    /// How its QEMU is started, if `cdp-tool vm run` does that.
    #[serde(default)]
    pub launch: Option<Launch>,
    /// How its QEMU does, while `cdp-tool vm run` looks after it.
    #[serde(default)]
    pub supervised: Option<Supervised>,
    /// Whether a QEMU is connected to one of its disks.
    #[serde(default)]
    pub connected: bool,
    /// The memory from which its next start goes on, instead of booting.
    #[serde(default)]
    pub start_from: Option<Origin>,
    /// When checkpoints are taken without being asked for.
    #[serde(default)]
    pub schedule: Option<Schedule>,
    /// The checkpoint from which it goes on.
    pub current: Option<CheckpointId>,
    /// How many complete checkpoints it has.
    pub checkpoints: u64,
    /// Whether one is being taken, and how far that is, in pages: those that have come, and those of the machine.
    pub taking: Option<(u64, u64)>,
    /// When it was registered, in RFC 3339.
    pub created: String,
}

impl Vm {
    pub(crate) fn new(
        info: VmInfo,
        taking: Option<(u64, u64)>,
        supervised: Option<Supervised>,
        connected: bool,
    ) -> Result<Self, ApiError> {
        let Settings { agent, launch, start_from, schedule } = Settings::of(&info)?;
        let VmInfo { name, volumes, qmp, current, checkpoints, created_ns, .. } = info;
        let created = rfc3339(created_ns);
        Ok(Self {
            name,
            volumes,
            qmp,
            agent,
            launch,
            supervised,
            connected,
            start_from,
            schedule,
            current,
            checkpoints,
            taking,
            created,
        })
    }
}

/// How a machine's QEMU is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// QEMU and its arguments, as the user gave them: without what Hindsight adds.
    pub command: Vec<String>,
    /// The directory in which it is started.
    pub directory: String,
    /// Properties of each disk's `-device`, in the disks' order: `bootindex=0,addr=0x10`, or nothing.
    pub disks: Vec<String>,
    /// The user who has said so, by the daemon's own knowledge (`SO_PEERCRED`); none if it came over the network. Nobody
    /// should run somebody else's command as himself without having looked at it.
    #[serde(default)]
    pub owner: Option<u32>,
}

impl Launch {
    pub(crate) fn said_by(self, owner: Option<u32>) -> Self {
        Self { owner, ..self }
    }
}

/// How a supervised QEMU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Supervised {
    /// It is being started, or ended to be started anew.
    Starting,
    /// It runs a machine.
    Running,
    /// It waits for a machine's memory.
    Waiting,
}

/// What a supervisor tells of its QEMU.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupervisorReport {
    /// How it does.
    pub state: Supervised,
}

/// What a supervisor is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Nothing: the first word, which says that it is heard.
    Attached,
    /// End QEMU, and start it again so that it waits for a machine's memory.
    Restart,
    /// Nothing: QEMU has got that memory, and runs the machine.
    Runs,
}

/// The checkpoint of another machine of which this one is a copy that has not run yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The machine.
    pub vm: VmName,
    /// Its checkpoint.
    pub checkpoint: CheckpointId,
    /// The newest change of each disk when it was cloned. Once a disk has a newer one, the memory does not fit it any more.
    pub heads: Vec<Seq>,
}

/// A machine that goes on from memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStarted {
    /// The checkpoint.
    pub from: CheckpointId,
    /// Pages of memory that were given to QEMU.
    pub pages: u64,
    /// Why its file systems, which were stilled for the checkpoint, may still be so.
    #[serde(default)]
    pub still_frozen: Option<String>,
}

/// When checkpoints are taken without being asked for, and how many are kept of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// From the beginning of one to that of the next, in seconds.
    pub every_s: u64,
    /// How many of them are kept; older ones are deleted, unless they are pinned or have another label by then.
    pub keep: u64,
    /// How; unless said otherwise, `hot` where that is possible, and else `live`.
    #[serde(default)]
    pub mode: Option<CheckpointMode>,
}

/// A copy of a machine to be made: its disks as clones, and its memory as of the checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVmClone {
    /// Which checkpoint: its number or its label.
    pub at: String,
    /// The name of the copy.
    pub name: VmName,
    /// Absolute path of its QMP socket.
    pub qmp: String,
    /// Absolute path of the socket of its guest agent.
    #[serde(default)]
    pub agent: Option<String>,
    /// How its QEMU is started; as that of the original unless said otherwise.
    #[serde(default)]
    pub launch: Option<Launch>,
}

/// A machine to be registered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// Its name.
    pub name: VmName,
    /// Its disks: all that it writes to.
    pub volumes: Vec<VolumeName>,
    /// Absolute path of its QMP socket.
    pub qmp: String,
    /// Absolute path of the socket of its guest agent.
    #[serde(default)]
    pub agent: Option<String>,
    /// How its QEMU is started, if `cdp-tool vm run` does that.
    #[serde(default)]
    pub launch: Option<Launch>,
}

/// A checkpoint, in whatever state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its number.
    pub id: CheckpointId,
    /// Its name.
    pub label: Option<Label>,
    /// `begun`, `committed` or `aborted`.
    pub state: String,
    /// Why it was aborted.
    pub reason: Option<String>,
    /// Whether nobody may delete it.
    pub pinned: bool,
    /// How it was taken.
    pub mode: CheckpointMode,
    /// The checkpoint from which the machine had gone on.
    pub parent: Option<CheckpointId>,
    /// The instant of all its disks: `epoch:N`.
    pub epoch: Option<String>,
    /// The same, as a change of the store.
    pub seq: Option<Seq>,
    /// Its disks.
    pub volumes: Vec<VolumeName>,
    /// When it was begun, in RFC 3339.
    pub created: String,
    /// The same, in nanoseconds since 1970.
    pub created_ns: u64,
    /// What it cost: `pause_us`, `duration_ms`, `memory_bytes`, `changed_pages`, `stored_bytes` and others.
    pub figures: Value,
}

impl From<CheckpointInfo> for Checkpoint {
    fn from(info: CheckpointInfo) -> Self {
        let CheckpointInfo { id, label, pinned, mode, parent, created_ns, epoch, state, volumes, .. } = info;
        let (state, reason, seq, figures) = match state {
            CheckpointState::Begun => ("begun", None, None, Value::Null),
            CheckpointState::Committed(saved) => ("committed", None, Some(saved.seq), saved.figures),
            CheckpointState::Aborted { reason } => ("aborted", Some(reason), None, Value::Null),
        };
        let named = |epoch: EpochId| Instant::Epoch(epoch).to_string();
        let epoch = epoch.filter(|_| seq.is_some()).map(named);
        let created = rfc3339(created_ns);
        let state = state.to_owned();
        Self {
            id,
            label,
            state,
            reason,
            pinned,
            mode,
            parent,
            epoch,
            seq,
            volumes,
            created,
            created_ns,
            figures,
        }
    }
}

/// A checkpoint to be taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewCheckpoint {
    /// How; unless said otherwise, `hot` where that is possible, and else `live`.
    #[serde(default)]
    pub mode: Option<CheckpointMode>,
    /// Its name.
    #[serde(default)]
    pub label: Option<Label>,
    /// Have the guest's agent still its file systems for the cut.
    #[serde(default)]
    pub quiesce: bool,
    /// For how many seconds a live checkpoint may send again what the guest has changed, until it is given up; unless said
    /// otherwise, ten minutes.
    #[serde(default)]
    pub give_up_after_s: Option<u64>,
}

/// What is to be changed of a checkpoint: what is not said stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointChange {
    /// Another name.
    #[serde(default)]
    pub label: Option<Label>,
    /// Whether nobody may delete it.
    #[serde(default)]
    pub pinned: Option<bool>,
}

/// Back to a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRevert {
    /// Which: its number or its label.
    pub to: String,
    /// Leave memory and devices alone: the machine is to boot from its disks. Else a QEMU must wait for them on the
    /// machine's QMP socket (`-incoming defer`), or `cdp-tool vm run` look after it, which then starts it anew.
    #[serde(default)]
    pub disks_only: bool,
}

/// What a machine's revert has done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmReverted {
    /// The checkpoint.
    pub to: CheckpointId,
    /// Its disks, if they were put back.
    pub volumes: Vec<Reverted>,
    /// Pages of memory that were given to QEMU, if they were.
    pub pages: Option<u64>,
    /// Why its file systems, which were stilled for the checkpoint, may still be so.
    #[serde(default)]
    pub still_frozen: Option<String>,
}

/// Whether a machine can be checkpointed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Diagnosis {
    /// The machine.
    pub vm: VmName,
    /// All that was looked at.
    pub checks: Vec<Check>,
    /// What follows from that, for each mode.
    pub modes: Vec<ModeVerdict>,
}

/// Whether a machine can be checkpointed in a mode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModeVerdict {
    /// The mode.
    pub mode: CheckpointMode,
    /// Whether nothing is known to be in the way.
    pub possible: bool,
    /// The subjects of the checks that are in the way.
    pub hindered_by: Vec<String>,
}

impl Diagnosis {
    /// Draws the conclusions.
    #[must_use]
    pub fn new(vm: VmName, checks: Vec<Check>) -> Self {
        let modes = MODES.map(|mode| {
            let in_the_way = checks.iter().filter(|check| check.hinders(mode));
            let hindered_by: Vec<_> = in_the_way.map(|check| check.subject.clone()).collect();
            ModeVerdict { mode, possible: hindered_by.is_empty(), hindered_by }
        });
        Self { vm, checks, modes: modes.into() }
    }

    /// Whether nothing is known to be in the way of a mode.
    #[must_use]
    pub fn allows(&self, mode: CheckpointMode) -> bool {
        self.modes.iter().any(|verdict| verdict.mode == mode && verdict.possible)
    }
}
