//! What QEMU tells without being asked.

use serde::Deserialize;
use serde_json::{Map, Value};

/// One event, as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When it arrived among all messages, events and replies alike: larger is later. Numbers go on over
    /// reconnections, and [`Reply::arrival`](crate::Reply::arrival) counts along, so each event is either before or
    /// after each reply.
    pub arrival: u64,
    /// QEMU's own time of it: microseconds since 1970, by the host's wall clock. None if QEMU could not tell.
    pub time_us: Option<u64>,
    /// What happened.
    pub kind: EventKind,
}

/// What happened. Names and fields are those of QEMU's schema.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The machine has stopped: its vCPUs stand still, and vhost-user rings have been stopped.
    Stop,
    /// The machine runs again.
    Resume,
    /// The machine has been reset.
    Reset {
        /// Whether the guest did it.
        guest: bool,
        /// QEMU's `ShutdownCause`: `guest-reset`, `host-qmp-system-reset`…
        reason: String,
    },
    /// The machine goes off; QEMU ends unless it was started with `-no-shutdown`.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// QEMU's `ShutdownCause`: `guest-shutdown`, `host-qmp-quit`, `host-signal`…
        reason: String,
    },
    /// The guest has been asked to switch itself off.
    Powerdown,
    /// The guest sleeps.
    Suspend,
    /// The guest has woken.
    Wakeup,
    /// The watchdog of the machine has fired.
    Watchdog {
        /// What QEMU does about it: `reset`, `pause`…
        action: String,
    },
    /// The guest's kernel has panicked.
    GuestPanicked {
        /// What QEMU does about it: `pause`, `poweroff`, `run`.
        action: String,
    },
    /// A migration has gone on to its next state. Needs the capability `events`.
    Migration {
        /// The state that it is in now.
        status: MigrationStatus,
    },
    /// A round over the guest's memory begins.
    MigrationPass {
        /// Which one, from 1.
        pass: u64,
    },
    /// A device is gone for good.
    DeviceDeleted {
        /// Its id, if it had one.
        device: Option<String>,
        /// Its place in QEMU's object tree.
        path: String,
    },
    /// The guest has changed how much of a memory device (virtio-mem) it uses.
    MemoryDeviceSizeChange {
        /// The device's id, if it has one.
        id: Option<String>,
        /// In bytes.
        size_bytes: u64,
    },
    /// A disk of QEMU's own has failed.
    BlockIoError {
        /// The disk's name.
        device: String,
        /// What QEMU does about it: `report`, `ignore`, `stop`.
        action: String,
    },
    /// Anything else, also an event of a name above whose fields are not as expected.
    Other {
        /// Its name in QEMU's schema.
        name: String,
        /// All that it says.
        data: Map<String, Value>,
    },
}

/// The states of a migration. The names are QEMU's (`MigrationStatus`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MigrationStatus {
    /// There has been none.
    None,
    /// It is being prepared.
    Setup,
    /// Memory goes over.
    Active,
    /// The machine has stopped, and QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// Devices go over.
    Device,
    /// All has been sent.
    Completed,
    /// It has failed; [`Progress::error`](crate::migration::Progress::error) says why.
    Failed,
    /// It has been asked to end.
    Cancelling,
    /// It has ended because it was asked to.
    Cancelled,
    /// A state that plays no part here: postcopy, COLO, and what later versions may have.
    Other(String),
}

impl MigrationStatus {
    /// The state of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether a migration in this state has ended, so that another may begin and settings may be changed.
    /// Unknown states have not.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl std::fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Other(name) => name,
        })
    }
}

/// The `timestamp` of an event: both fields are -1 if the host's clock could not be read.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct WireTime {
    seconds: i64,
    microseconds: i64,
}

impl WireTime {
    pub(crate) fn micros(self) -> Option<u64> {
        let seconds = u64::try_from(self.seconds).ok()?;
        let micros = u64::try_from(self.microseconds).ok()?;
        seconds.checked_mul(1_000_000)?.checked_add(micros)
    }
}

impl EventKind {
    pub(crate) fn parse(name: String, data: Map<String, Value>) -> Self {
        Self::known(&name, &data).unwrap_or(Self::Other { name, data })
    }

    /// The event's name in QEMU's schema.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Stop => "STOP",
            Self::Resume => "RESUME",
            Self::Reset { .. } => "RESET",
            Self::Shutdown { .. } => "SHUTDOWN",
            Self::Powerdown => "POWERDOWN",
            Self::Suspend => "SUSPEND",
            Self::Wakeup => "WAKEUP",
            Self::Watchdog { .. } => "WATCHDOG",
            Self::GuestPanicked { .. } => "GUEST_PANICKED",
            Self::Migration { .. } => "MIGRATION",
            Self::MigrationPass { .. } => "MIGRATION_PASS",
            Self::DeviceDeleted { .. } => "DEVICE_DELETED",
            Self::MemoryDeviceSizeChange { .. } => "MEMORY_DEVICE_SIZE_CHANGE",
            Self::BlockIoError { .. } => "BLOCK_IO_ERROR",
            Self::Other { name, .. } => name,
        }
    }

    fn known(name: &str, data: &Map<String, Value>) -> Option<Self> {
        let text = |field: &str| data.get(field).and_then(Value::as_str).map(str::to_owned);
        let number = |field: &str| data.get(field).and_then(Value::as_u64);
        let flag = |field: &str| data.get(field).and_then(Value::as_bool);
        Some(match name {
            "STOP" => Self::Stop,
            "RESUME" => Self::Resume,
            "RESET" => Self::Reset { guest: flag("guest")?, reason: text("reason")? },
            "SHUTDOWN" => Self::Shutdown { guest: flag("guest")?, reason: text("reason")? },
            "POWERDOWN" => Self::Powerdown,
            "SUSPEND" => Self::Suspend,
            "WAKEUP" => Self::Wakeup,
            "WATCHDOG" => Self::Watchdog { action: text("action")? },
            "GUEST_PANICKED" => Self::GuestPanicked { action: text("action")? },
            "MIGRATION" => Self::Migration { status: MigrationStatus::from_name(&text("status")?) },
            "MIGRATION_PASS" => Self::MigrationPass { pass: number("pass")? },
            "DEVICE_DELETED" => Self::DeviceDeleted { device: text("device"), path: text("path")? },
            "MEMORY_DEVICE_SIZE_CHANGE" => {
                Self::MemoryDeviceSizeChange { id: text("id"), size_bytes: number("size")? }
            }
            "BLOCK_IO_ERROR" => Self::BlockIoError { device: text("device")?, action: text("action")? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(name: &str, data: Value) -> EventKind {
        EventKind::parse(name.into(), data.as_object().cloned().unwrap_or_default())
    }

    #[test]
    fn events_that_checkpoints_need_are_typed() {
        assert_eq!(parsed("STOP", json!({})), EventKind::Stop);
        let shutdown = parsed("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}));
        assert_eq!(shutdown, EventKind::Shutdown { guest: true, reason: "guest-shutdown".into() });
        let migration = parsed("MIGRATION", json!({"status": "pre-switchover"}));
        assert_eq!(migration, EventKind::Migration { status: MigrationStatus::PreSwitchover });
        let size = parsed("MEMORY_DEVICE_SIZE_CHANGE", json!({"id": "vm0", "size": 4096, "qom-path": "/x"}));
        assert_eq!(size, EventKind::MemoryDeviceSizeChange { id: Some("vm0".into()), size_bytes: 4096 });
        assert_eq!(size.name(), "MEMORY_DEVICE_SIZE_CHANGE");
    }

    #[test]
    fn an_event_in_an_unknown_form_is_kept_as_it_is() {
        let event = parsed("SHUTDOWN", json!({"guest": "perhaps"}));
        assert!(matches!(&event, EventKind::Other { name, data } if name == "SHUTDOWN" && data.len() == 1));
        assert_eq!(parsed("NEWS", json!({})).name(), "NEWS");
    }

    #[test]
    fn a_state_that_is_not_known_has_not_ended() {
        assert!(!MigrationStatus::from_name("wait-unplug").has_ended());
        assert!(MigrationStatus::from_name("cancelled").has_ended());
        for name in ["none", "setup", "active", "pre-switchover", "device", "completed", "failed", "colo"] {
            assert_eq!(MigrationStatus::from_name(name).to_string(), name);
        }
    }

    #[test]
    fn a_clock_that_could_not_be_read_is_no_time() {
        assert_eq!(WireTime { seconds: -1, microseconds: -1 }.micros(), None);
        assert_eq!(WireTime { seconds: 2, microseconds: 5 }.micros(), Some(2_000_005));
    }
}
