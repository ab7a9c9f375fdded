//! What a running machine is made of, as far as a checkpoint minds: can it be taken, and does it fit another machine?

mod compare;
mod devices;
mod query;

use serde::{Deserialize, Serialize};

use crate::message::Version;

pub use compare::Difference;
pub use devices::{Backend, Device, Network, NetworkBackend};
pub use query::describe;

/// A machine, as QEMU describes it. [`describe`] asks for it; kept with a checkpoint, it is what
/// [`differences`](Machine::differences) compares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// QEMU's version.
    pub version: Version,
    /// QEMU's `RunState` when it was asked: `running`, `paused`, `prelaunch`…
    pub run_state: String,
    /// `-name`, if it has one.
    pub name: Option<String>,
    /// `-uuid`; None if it was given none.
    pub uuid: Option<String>,
    /// Versioned, as it can be given to `-machine`: `pc-q35-10.0`.
    pub machine_type: String,
    /// What runs the guest's code.
    pub accelerator: Accelerator,
    /// vCPUs that are there now.
    pub cpus: u32,
    /// The memory that the machine was started with.
    pub memory_bytes: u64,
    /// Memory that was plugged in since.
    pub plugged_memory_bytes: u64,
    /// What memory lies in. Without `-object memory-backend-…` QEMU has one of its own making, which is not shared.
    pub memory: Vec<MemoryBackend>,
    /// All devices that have an id or were given on the command line, and of QEMU's own making those that others
    /// serve.
    pub devices: Vec<Device>,
    /// Network back ends, as far as this QEMU tells of them.
    pub networks: Vec<Network>,
    /// Character devices: the sockets of vhost-user devices are among them.
    pub chardevs: Vec<Chardev>,
    /// Disks that QEMU itself reads and writes: those of vhost-user are not among them.
    pub disks: Vec<Disk>,
    /// Why QEMU would refuse to migrate, and so any checkpoint; one entry for each reason, naming the device.
    pub blockers: Vec<String>,
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
    /// Neither of these.
    Other,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Other => "another",
        })
    }
}

/// A piece of host memory that guest memory lies in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackend {
    /// Its id; QEMU's own has `pc.ram` or the like.
    pub id: Option<String>,
    /// How large it is.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// `share=on`: other processes can have it, as a vhost-user server must.
    pub share: bool,
}

/// A character device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// Where it leads, in QEMU's notation: `unix:/run/web1.sock`, with `disconnected:` in front if nobody is there. 7.2
    /// has only `unix:` for a socket to which it has connected: see `socket`.
    pub filename: String,
    /// The path of the Unix socket, if it is one.
    #[serde(default)]
    pub socket: Option<String>,
    /// Whether a device uses it.
    pub frontend_open: bool,
}

/// A disk that QEMU itself reads and writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The id of its `-drive` or `-device`, or the path of the device in QEMU's object tree.
    pub name: String,
    /// What it is: `raw`, `qcow2`…
    pub driver: String,
    /// The file, as QEMU was told.
    pub file: String,
    /// Whether the guest can change it. A checkpoint does not hold what is on it.
    pub writable: bool,
}

impl Machine {
    /// Devices that another process or the kernel serves, and that write guest memory past QEMU.
    pub fn served_elsewhere(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(|device| device.backend != Backend::Qemu)
    }

    /// Memory that a vhost-user server cannot have: it lacks `share=on`.
    pub fn private_memory(&self) -> impl Iterator<Item = &MemoryBackend> {
        self.memory.iter().filter(|memory| !memory.share)
    }

    /// The character device of this label.
    #[must_use]
    pub fn chardev(&self, label: &str) -> Option<&Chardev> {
        self.chardevs.iter().find(|chardev| chardev.label == label)
    }
}
