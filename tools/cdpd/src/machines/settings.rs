//! What the daemon keeps of a machine beside its disks and its QMP socket.

use cdp_store::{Store, VmInfo, VmSpec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::{ApiError, ErrorKind, Launch, Origin, Schedule};

/// The settings of a machine: JSON in the store, which does not look into it. Unknown members are an error: they are of
/// a newer version, and would be lost when the settings are written again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Absolute path of the socket on which the guest agent is to be reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent: Option<String>,
    /// How its QEMU is started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) launch: Option<Launch>,
    /// The memory from which its next start goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) start_from: Option<Origin>,
    /// When checkpoints are taken without being asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) schedule: Option<Schedule>,
}

impl Settings {
    /// Those of a machine.
    ///
    /// # Errors
    /// They are of a newer version.
    pub(crate) fn of(info: &VmInfo) -> Result<Self, ApiError> {
        if info.settings.is_null() {
            return Ok(Self::default());
        }
        serde_json::from_value(info.settings.clone()).map_err(|error| {
            let text =
                format!("the settings of machine '{}' are of another version of cdpd: {error}", info.name);
            ApiError::new(ErrorKind::Invalid, text)
        })
    }

    /// As the store keeps them.
    pub(crate) fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }

    /// Gives a machine these settings instead of those it has.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// The store's.
    pub(crate) fn write(store: &Store, info: &VmInfo, settings: &Self) -> Result<VmInfo, ApiError> {
        let spec =
            VmSpec { volumes: info.volumes.clone(), qmp: info.qmp.clone(), settings: settings.to_json() };
        Ok(store.update_vm(&info.name, &spec)?)
    }
}
