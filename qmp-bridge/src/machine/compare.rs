//! Whether the memory and devices of one machine fit into another.

use std::collections::BTreeMap;
use std::fmt;

use super::{Accelerator, Machine};

/// Something that two machines do not have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What it is about, for people: `machine type`.
    pub what: String,
    /// What the first machine has.
    pub one: String,
    /// What the second machine has.
    pub other: String,
    /// Whether it alone makes a restore impossible, or wrong.
    pub fatal: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} and {}", self.what, self.one, self.other)
    }
}

impl Machine {
    /// What differs between the machine that a checkpoint was taken of (`self`) and one that is to take it in.
    ///
    /// Fatal are machine type, memory, vCPUs and the set of devices. Versions are, if the other is the older: QEMU
    /// takes streams of earlier versions of the same machine type, not of later ones. Names, UUIDs, disks and network
    /// back ends are not compared: they are the user's affair.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        let mut compare = |what: &str, one: String, other: String, fatal: bool| {
            if one != other {
                found.push(Difference { what: what.to_owned(), one, other, fatal });
            }
        };
        let release = |machine: &Self| (machine.version.major, machine.version.minor);
        let older = release(other) < release(self);
        compare("QEMU version", self.version.to_string(), other.version.to_string(), older);
        compare("machine type", self.machine_type.clone(), other.machine_type.clone(), true);
        let kvm = |machine: &Self| machine.accelerator == Accelerator::Kvm;
        let mixed = kvm(self) != kvm(other);
        compare("accelerator", self.accelerator.to_string(), other.accelerator.to_string(), mixed);
        compare("vCPUs", self.cpus.to_string(), other.cpus.to_string(), true);
        let bytes = |bytes: u64| format!("{bytes} bytes");
        compare("memory", bytes(self.memory_bytes), bytes(other.memory_bytes), true);
        compare("plugged memory", bytes(self.plugged_memory_bytes), bytes(other.plugged_memory_bytes), true);
        let (ours, theirs) = (self.kinds(), other.kinds());
        for kind in ours.keys().chain(theirs.keys().filter(|kind| !ours.contains_key(*kind))) {
            let count = |kinds: &BTreeMap<&str, usize>| kinds.get(kind).copied().unwrap_or(0).to_string();
            compare(&format!("devices '{kind}'"), count(&ours), count(&theirs), true);
        }
        found
    }

    /// How many devices there are of each kind. Their ids may differ: what the stream names is their place on a bus.
    fn kinds(&self) -> BTreeMap<&str, usize> {
        let mut kinds = BTreeMap::new();
        for device in self.devices.iter().filter(|device| device.path.starts_with("/machine/peripheral")) {
            *kinds.entry(device.kind.as_str()).or_default() += 1;
        }
        kinds
    }
}
