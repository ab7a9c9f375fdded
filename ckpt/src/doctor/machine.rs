//! What QEMU says of a machine.

use std::path::{Path, PathBuf};

use cdp_store::CheckpointMode;
use qmp_bridge::machine::{Backend, Device, Machine, NetworkBackend};
use qmp_bridge::migration::Settings;
use qmp_bridge::{Client, Version};

use super::{Check, MODES};
use crate::take::prepare::plan;

/// The oldest version that this was tried with.
const OLDEST: (u32, u32) = (7, 2);
const HOT: [CheckpointMode; 1] = [CheckpointMode::Hot];
/// Before it, QEMU leaves its memory write-protected when a background snapshot fails: see `protection`.
const SAFE_HOT: (u32, u32) = (8, 1);
/// What to do about a device that writes guest memory past QEMU.
const OTHER_MODE: &str = "use --mode live or pause, or a back end of QEMU's own";

/// Looks at a machine whose registered disks are served on these sockets.
#[must_use]
pub fn of_machine(described: &Machine, sockets: &[PathBuf]) -> Vec<Check> {
    let mut checks = vec![version(described), memory(described), blockers(described)];
    checks.extend(disks(described));
    checks.extend(sockets.iter().map(|socket| attached(described, socket)));
    let others = described.served_elsewhere().filter(|device| !is_ours(described, device, sockets));
    checks.extend(others.map(served_elsewhere));
    let networks = described.networks.iter().filter(|network| network.backend != NetworkBackend::Other);
    checks.extend(networks.map(|network| {
        let found = "another process writes its packets into guest memory past QEMU and past us";
        Check::in_the_way(&HOT, format!("network '{}'", network.name), found, OTHER_MODE)
    }));
    // Last: what is in the way for ever is to be told first.
    checks.push(state(described));
    checks
}

/// Looks at the migration settings that each mode needs.
///
/// # Errors
/// QEMU cannot be asked.
pub async fn of_settings(qmp: &Client) -> qmp_bridge::Result<Vec<Check>> {
    let before = Settings::read(qmp).await?;
    let lacking = MODES.iter().filter_map(|mode| {
        let error = plan(*mode).changes(qmp, &before, true).err()?;
        let cure = format!("use QEMU {}.{} or newer", OLDEST.0, OLDEST.1);
        Some(Check::in_the_way(&[*mode], "migration settings", error.to_string(), cure))
    });
    Ok(lacking.collect())
}

/// Whether a QEMU leaves its memory write-protected when a hot checkpoint is given up.
pub(crate) fn leaves_protection(version: &Version) -> bool {
    (version.major, version.minor) < SAFE_HOT
}

/// Why a machine is better not checkpointed hot, though it can be.
pub(crate) fn hot_doubt(described: &Machine) -> Option<Check> {
    let version = &described.version;
    leaves_protection(version).then(|| {
        let found = format!(
            "version {version} does not clean up behind a hot checkpoint that fails: if cdpd is killed meanwhile, the guest \
             hangs until cdpd is back, and then only hot ones succeed until one has"
        );
        Check::unknown("QEMU", found, "use QEMU 8.1 or newer, or --mode live; or ask for --mode hot")
    })
}

fn version(described: &Machine) -> Check {
    let version = &described.version;
    if (version.major, version.minor) < OLDEST {
        let cure = format!("use QEMU {}.{} or newer", OLDEST.0, OLDEST.1);
        return Check::unknown("QEMU", format!("version {version} was never tried"), cure);
    }
    let ok = || Check::ok("QEMU", format!("version {version}, machine type {}", described.machine_type));
    hot_doubt(described).unwrap_or_else(ok)
}

/// Whether QEMU saves a machine in this state, and lets it go on afterwards.
fn state(described: &Machine) -> Check {
    let (found, cure) = match described.run_state.as_str() {
        "suspended" => (
            "the guest is suspended to memory (S3): once saved, it could not be woken up",
            "wake it first (system_wakeup in QMP)",
        ),
        "postmigrate" => (
            "QEMU has saved this machine while it stood still, and does so but once before it has run again",
            "let it run first (cont in QMP)",
        ),
        "inmigrate" => {
            ("this QEMU waits for a machine", "wait until it has one, or start it without -incoming")
        }
        state => return Check::ok("state", state),
    };
    Check::in_the_way(&MODES, "state", found, cure)
}

fn memory(described: &Machine) -> Check {
    let private: Vec<&str> =
        described.private_memory().map(|memory| memory.id.as_deref().unwrap_or("QEMU's own")).collect();
    if private.is_empty() {
        return Check::ok("memory", format!("{} MiB, shared", described.memory_bytes >> 20));
    }
    let found =
        format!("'{}' is private: the disks' server cannot reach what the guest sees", private.join("', '"));
    let cure =
        "add share=on: -object memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem";
    Check::in_the_way(&HOT, "memory", found, cure)
}

fn blockers(described: &Machine) -> Check {
    if described.blockers.is_empty() {
        return Check::ok("migration", "no device blocks it");
    }
    let found = format!("QEMU cannot save this machine: {}", described.blockers.join("; "));
    Check::in_the_way(&MODES, "migration", found, "start it without that")
}

/// Disks that QEMU reads and writes by itself.
fn disks(described: &Machine) -> Vec<Check> {
    let check = |disk: &qmp_bridge::machine::Disk| {
        let subject = format!("disk '{}'", disk.name);
        if !disk.writable {
            return Check::ok(subject, format!("{} is read only", disk.file));
        }
        let found = format!(
            "{} is writable and not of this store: a checkpoint would not hold what is on it",
            disk.file
        );
        let cure = format!(
            "attach it with readonly=on, or make it a volume (cdp-tool volume create NAME --from '{}') and register \
             the machine with it",
            disk.file
        );
        Check::in_the_way(&MODES, subject, found, cure)
    };
    described.disks.iter().map(check).collect()
}

/// Whether the machine uses a disk that it was registered with.
fn attached(described: &Machine, socket: &Path) -> Check {
    let subject = format!("disk {}", socket.display());
    let sockets = [socket.to_owned()];
    match described.served_elsewhere().find(|device| is_ours(described, device, &sockets)) {
        Some(device) => Check::ok(subject, format!("attached as '{}'", device.name())),
        None => {
            let found = "no device of this QEMU leads there, though the machine is registered with it";
            let cure = format!(
                "-chardev socket,id=d0,path={},reconnect-ms=100 -device vhost-user-blk-pci,chardev=d0, or register \
                 the machine without it",
                socket.display()
            );
            Check::in_the_way(&HOT, subject, found, cure)
        }
    }
}

/// A device of somebody else.
fn served_elsewhere(device: &Device) -> Check {
    let subject = format!("device '{}' ({})", device.name(), device.kind);
    let stores = ["blk", "scsi", "fs"].iter().any(|kind| device.kind.contains(kind));
    if stores {
        let found = "it holds data that is none of the registered volumes: a checkpoint would not hold it";
        let cure = "register the machine with all its volumes (cdp-tool vm register … --volume …)";
        return Check::in_the_way(&MODES, subject, found, cure);
    }
    let found = "it writes guest memory past QEMU and past us, so a hot checkpoint would be torn";
    Check::in_the_way(&HOT, subject, found, OTHER_MODE)
}

fn is_ours(described: &Machine, device: &Device, sockets: &[PathBuf]) -> bool {
    let Backend::VhostUser { chardev: Some(label) } = &device.backend else { return false };
    let socket = described.chardev(label).and_then(|chardev| chardev.socket.as_deref());
    socket.is_some_and(|socket| sockets.iter().any(|ours| same_path(Path::new(socket), ours)))
}

/// Whether two paths lead to one socket: by their text, or where links lead.
fn same_path(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    one == other || (one.is_absolute() && real(one).is_some_and(|one| Some(one) == real(other)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;
    use crate::doctor::Verdict;

    /// A machine as `describe` gives it, with one disk of ours.
    fn machine(change: impl FnOnce(&mut Value)) -> Machine {
        let mut value = json!({
            "version": { "major": 10, "minor": 0, "micro": 2, "package": "" },
            "run_state": "running", "name": null, "uuid": null, "machine_type": "pc-q35-10.0",
            "accelerator": "tcg", "cpus": 1, "memory_bytes": 268435456, "plugged_memory_bytes": 0,
            "memory": [{ "id": "mem", "size": 268435456, "share": true }],
            "devices": [device("d0", "vhost-user-blk-pci", json!({ "vhost-user": { "chardev": "c0" } }))],
            "networks": [], "disks": [], "blockers": [],
            "chardevs": [chardev("c0", "/run/a.sock")],
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn device(id: &str, kind: &str, backend: Value) -> Value {
        json!({ "path": format!("/machine/peripheral/{id}"), "kind": kind, "backend": backend })
    }

    fn chardev(label: &str, path: &str) -> Value {
        json!({ "label": label, "filename": format!("unix:{path}"), "socket": path, "frontend-open": true })
    }

    fn sockets() -> [PathBuf; 1] {
        [PathBuf::from("/run/a.sock")]
    }

    /// The one check that is not fine.
    fn trouble(change: impl FnOnce(&mut Value)) -> Check {
        let mut checks = of_machine(&machine(change), &sockets());
        checks.retain(|check| check.verdict != Verdict::Ok);
        assert_eq!(checks.len(), 1, "{checks:?}");
        checks.remove(0)
    }

    #[test]
    fn a_machine_as_it_should_be_has_nothing_in_the_way() {
        let checks = of_machine(&machine(|_| {}), &sockets());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
    }

    #[test]
    fn a_state_that_qemu_does_not_save_is_told_with_what_ends_it() {
        for (state, cure) in
            [("suspended", "system_wakeup"), ("postmigrate", "cont"), ("inmigrate", "-incoming")]
        {
            let check = trouble(|m| m["run_state"] = state.into());
            assert!(check.cure.as_ref().is_some_and(|told| told.contains(cure)), "{check}");
            assert_eq!(check.hinders, MODES);
        }
        let checks = of_machine(&machine(|m| m["run_state"] = "paused".into()), &sockets());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
    }

    #[test]
    fn private_memory_is_named_with_the_option_that_cures_it() {
        let check = trouble(|m| m["memory"][0]["share"] = false.into());
        assert!(check.found.contains("'mem'") && check.cure.unwrap().contains("share=on"));
        assert_eq!(check.hinders, HOT);
    }

    #[test]
    fn a_blocker_is_in_the_way_of_everything_in_qemus_words() {
        let check = trouble(|m| m["blockers"] = json!(["device 0000:00:03.0 is a peer"]));
        assert!(check.found.contains("0000:00:03.0") && check.hinders == MODES);
    }

    #[test]
    fn data_that_is_none_of_ours_is_in_the_way_of_everything() {
        let disk = json!({ "name": "cd0", "driver": "raw", "file": "/srv/x.raw", "writable": true });
        let check = trouble(|m| m["disks"] = json!([disk]));
        assert!(check.to_string().contains("/srv/x.raw") && check.hinders == MODES);
        let check = trouble(|m| {
            let other = device("d1", "vhost-user-blk-pci", json!({ "vhost-user": { "chardev": "c1" } }));
            m["devices"].as_array_mut().unwrap().push(other);
            m["chardevs"].as_array_mut().unwrap().push(chardev("c1", "/run/b.sock"));
        });
        assert!(check.subject.contains("'d1'") && check.hinders == MODES);
    }

    #[test]
    fn whoever_else_writes_guest_memory_is_in_the_way_of_hot_alone() {
        let vsock = device("v0", "vhost-user-vsock-pci", json!({ "vhost-user": { "chardev": null } }));
        let check = trouble(|m| m["devices"].as_array_mut().unwrap().push(vsock));
        assert!(check.subject.contains("'v0'") && check.hinders == HOT);
        let network = json!({ "name": "n0", "backend": "vhost-user", "info": "" });
        let check = trouble(|m| m["networks"] = json!([network]));
        assert!(check.subject.contains("'n0'") && check.hinders == HOT);
    }

    #[test]
    fn a_registered_disk_that_the_machine_does_not_use_is_named() {
        let mut sockets = sockets().to_vec();
        sockets.push("/run/c.sock".into());
        let checks = of_machine(&machine(|_| {}), &sockets);
        let check = checks.iter().find(|check| check.verdict == Verdict::InTheWay).unwrap();
        assert!(check.cure.as_ref().unwrap().contains("path=/run/c.sock"));
    }

    #[test]
    fn a_socket_is_the_same_by_another_way_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::fs::write(real.join("x.sock"), "").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(same_path(&link.join("x.sock"), &real.join("x.sock")));
        assert!(!same_path(&link.join("y.sock"), &real.join("x.sock")));
    }
}
