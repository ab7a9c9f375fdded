//! Devices, and who serves them.

use qapi_spec::Command;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::client::Client;
use crate::error::{ErrorKind, Result};

/// Where QEMU keeps devices: with an id, without one, and of its own making.
const DEVICE_PARENTS: [&str; 3] = ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"];
/// Where QEMU keeps what was given with `-object`: a `cryptodev-vhost-user` is no device.
const OBJECTS: &str = "/objects";

/// A device of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its place in QEMU's object tree: `/machine/peripheral/ID` if it has an id.
    pub path: String,
    /// What it is: `vhost-user-blk-pci`, `virtio-net-pci`…
    pub kind: String,
    /// Who serves it.
    pub backend: Backend,
}

impl Device {
    /// Its id, or what QEMU calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// Who serves a device, and so writes what it has to say into guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// QEMU itself, or for a network card possibly its [`Network`].
    Qemu,
    /// Another process, over vhost-user.
    VhostUser {
        /// The label of the character device that leads there, if the device says.
        chardev: Option<String>,
    },
    /// A device of the host, over vDPA.
    VhostVdpa,
    /// The host's kernel.
    VhostKernel,
    /// A device of the host that was passed through, or one of another process over vfio-user.
    Vfio,
}

/// Where the packets of a network card come from. The object tree has nothing of it, so this is from the text of
/// `info network`, and empty where QEMU does not have that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The id of the `-netdev`.
    pub name: String,
    /// Who serves it.
    pub backend: NetworkBackend,
    /// What QEMU says of it.
    pub info: String,
}

/// Who serves a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkBackend {
    /// QEMU, or the kernel: of a `tap` device QEMU does not say whether `vhost=on`.
    Other,
    /// Another process, over vhost-user.
    VhostUser,
    /// A device of the host, over vDPA.
    VhostVdpa,
}

/// All devices.
pub(super) async fn devices(client: &Client) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for parent in DEVICE_PARENTS {
        devices.extend(children(client, parent).await?.into_iter().filter(|child| {
            // Of what QEMU has made for itself, most is buses, regions and interrupts.
            parent != "/machine/unattached" || child.backend != Backend::Qemu
        }));
    }
    devices
        .extend(children(client, OBJECTS).await?.into_iter().filter(|child| child.backend != Backend::Qemu));
    for device in &mut devices {
        if let Backend::VhostUser { chardev } = &mut device.backend {
            *chardev = chardev_of(client, &device.path).await?;
        }
    }
    Ok(devices)
}

async fn children(client: &Client, parent: &str) -> Result<Vec<Device>> {
    let listed = client.execute(qapi_qmp::qom_list { path: parent.to_owned() }).await?;
    Ok(listed
        .into_iter()
        .filter_map(|property| {
            let kind = property.type_.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
            let backend = backend_of(&kind);
            Some(Device { path: format!("{parent}/{}", property.name), kind, backend })
        })
        .collect())
}

fn backend_of(kind: &str) -> Backend {
    match kind {
        _ if kind.starts_with("vhost-user-") || kind == "cryptodev-vhost-user" => {
            Backend::VhostUser { chardev: None }
        }
        _ if kind.starts_with("vhost-vdpa-") => Backend::VhostVdpa,
        _ if kind.starts_with("vhost-") || kind == "cryptodev-vhost" => Backend::VhostKernel,
        _ if kind.starts_with("vfio-") || kind == "x-pci-proxy-dev" => Backend::Vfio,
        _ => Backend::Qemu,
    }
}

/// The label of a device's character device: its property `chardev`, where it has one.
async fn chardev_of(client: &Client, path: &str) -> Result<Option<String>> {
    let command = qapi_qmp::qom_get { path: path.to_owned(), property: "chardev".to_owned() };
    match client.execute(command).await {
        Ok(Value::String(label)) if !label.is_empty() => Ok(Some(label)),
        Ok(_) => Ok(None),
        // No such property.
        Err(error) if error.kind() == ErrorKind::Refused => Ok(None),
        Err(error) => Err(error),
    }
}

/// All network back ends.
pub(super) async fn networks(client: &Client) -> Result<Vec<Network>> {
    let command =
        qapi_qmp::human_monitor_command { cpu_index: None, command_line: "info network".to_owned() };
    match client.execute(command).await {
        Ok(text) => Ok(text.lines().filter_map(network).collect()),
        Err(error) if matches!(error.kind(), ErrorKind::UnknownCommand | ErrorKind::Refused) => {
            tracing::debug!(%error, command = qapi_qmp::human_monitor_command::NAME, "no list of networks");
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// One line of `info network`: ` \ ID: index=0,type=vhost-user,…`. Cards have `type=nic`.
fn network(line: &str) -> Option<Network> {
    let (name, info) = line.trim_start_matches([' ', '\\']).split_once(": ")?;
    let kind = info.split(',').find_map(|field| field.strip_prefix("type="))?;
    let backend = match kind {
        "nic" | "hubport" => return None,
        "vhost-user" => NetworkBackend::VhostUser,
        "vhost-vdpa" => NetworkBackend::VhostVdpa,
        _ => NetworkBackend::Other,
    };
    Some(Network { name: name.to_owned(), backend, info: info.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_others_are_known_by_their_names() {
        for kind in ["vhost-user-blk-pci", "vhost-user-fs-pci", "vhost-user-scsi-pci", "cryptodev-vhost-user"]
        {
            assert_eq!(backend_of(kind), Backend::VhostUser { chardev: None }, "{kind}");
        }
        assert_eq!(backend_of("vhost-vdpa-device-pci"), Backend::VhostVdpa);
        assert_eq!(backend_of("vhost-vsock-pci"), Backend::VhostKernel);
        assert_eq!(backend_of("vfio-pci"), Backend::Vfio);
        assert_eq!(backend_of("virtio-blk-pci"), Backend::Qemu);
    }

    #[test]
    fn networks_are_read_from_what_qemu_prints() {
        let text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: \
                    index=0,type=vhost-user,vhost-user0 to c0\r\nn1: index=0,type=user,net=10.0.2.0,restrict=off\r\n";
        let networks: Vec<_> = text.lines().filter_map(network).collect();
        assert_eq!(networks.len(), 2);
        assert_eq!((networks[0].name.as_str(), networks[0].backend), ("n0", NetworkBackend::VhostUser));
        assert_eq!((networks[1].name.as_str(), networks[1].backend), ("n1", NetworkBackend::Other));
    }
}
