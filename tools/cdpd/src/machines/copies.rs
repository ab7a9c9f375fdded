//! Copies of machines: their disks as clones, and their memory as of a checkpoint.

use std::collections::BTreeSet;

use cdp_store::{CheckpointInfo, CloneSpec, Store, VmInfo, VmSpec};
use cdp_types::{Instant, VmName, VolumeName};

use super::Settings;
use crate::api::{ApiError, ErrorKind, NewVmClone, Origin};

/// Makes a machine that is a copy of another one at a checkpoint, without starting it.
///
/// # Errors
/// The checkpoint is not complete, or a name is taken. Nothing is made then.
pub(crate) fn copy(store: &Store, vm: &VmName, new: NewVmClone) -> Result<VmInfo, ApiError> {
    if store.vm(&new.name).is_ok() {
        let text = format!("there is a machine '{}' already", new.name);
        return Err(ApiError::new(ErrorKind::Exists, text));
    }
    let (original, at) = (store.vm(vm)?, store.find_checkpoint(vm, &new.at)?);
    let launch = new.launch.or(Settings::of(&original)?.launch);
    // 1. Clone the disks, all or none. Crash: clones that nobody uses, which can be destroyed.
    let specs = clones(&original, &at, &new.name)?;
    let volumes = store.clone_volumes(&specs)?;
    // 2. Register the machine, which then names them.
    let heads = volumes.iter().map(|volume| volume.head().seq).collect();
    let start_from = Some(Origin { vm: vm.clone(), checkpoint: at.id, heads });
    let settings = Settings { agent: new.agent, launch, start_from, schedule: None };
    let names: Vec<VolumeName> = specs.iter().map(|spec| spec.name.clone()).collect();
    let spec = VmSpec { volumes: names.clone(), qmp: Some(new.qmp), settings: settings.to_json() };
    let made = store.create_vm(&new.name, &spec).inspect_err(|_| {
        for name in &names {
            if let Err(error) = store.destroy_volume(name, false) {
                tracing::warn!(volume = %name, "a clone that is of no use cannot be destroyed: {error}");
            }
        }
    })?;
    tracing::info!(vm = %new.name, of = %vm, checkpoint = %at.id, "cloned");
    Ok(made)
}

fn clones(original: &VmInfo, at: &CheckpointInfo, name: &VmName) -> Result<Vec<CloneSpec>, ApiError> {
    let Some(epoch) = at.epoch.filter(|_| !at.volumes.is_empty()) else {
        let text = format!("checkpoint {} of '{}' is not complete", at.id, original.name);
        return Err(ApiError::new(ErrorKind::Invalid, text));
    };
    let names = clone_names(original.name.as_str(), name.as_str(), &at.volumes);
    let spec = |(source, name): (&VolumeName, String)| {
        let name = name.parse().map_err(|error| ApiError::new(ErrorKind::Invalid, format!("{error}")))?;
        Ok(CloneSpec { source: source.clone(), at: Instant::Epoch(epoch), name })
    };
    at.volumes.iter().zip(names).map(spec).collect()
}

/// What all disks of a copy are called: as [`clone_name`] has it, unless two would be called the same (of machine `web1`,
/// `web1-data` and `data`).
fn clone_names(original: &str, copy: &str, volumes: &[VolumeName]) -> Vec<String> {
    let names: Vec<String> =
        volumes.iter().map(|volume| clone_name(original, copy, volume.as_str())).collect();
    if names.iter().collect::<BTreeSet<_>>().len() == names.len() {
        return names;
    }
    volumes.iter().map(|volume| format!("{copy}-{volume}")).collect()
}

/// What a disk of a copy is called: `web1` of machine `web1` becomes `web2` of `web2`, `web1-data` becomes `web2-data`,
/// and `data` becomes `web2-data`.
fn clone_name(original: &str, copy: &str, volume: &str) -> String {
    match volume.strip_prefix(original) {
        Some(rest) if rest.is_empty() || rest.starts_with(['-', '.', '_']) => format!("{copy}{rest}"),
        _ => format!("{copy}-{volume}"),
    }
}

/// The checkpoint from which a copy's first start goes on.
///
/// # Errors
/// `Invalid`: it is no copy, has run already, or a disk has been written since.
pub(crate) fn origin(store: &Store, info: &VmInfo) -> Result<Origin, ApiError> {
    let invalid = |text| Err(ApiError::new(ErrorKind::Invalid, text));
    let Some(origin) = Settings::of(info)?.start_from else {
        return invalid(format!("machine '{}' is no clone that has never run", info.name));
    };
    for (name, head) in info.volumes.iter().zip(&origin.heads) {
        let now = store.volume(name)?.head().seq;
        if now != *head {
            return invalid(format!(
                "volume '{name}' has been written since it was cloned, so the memory of checkpoint {} does not fit it: \
                 boot the machine (vm run {} --boot), or clone again",
                origin.checkpoint, info.name
            ));
        }
    }
    Ok(origin)
}

/// Notes that a copy has memory of its own now.
///
/// # Errors
/// The store's.
pub(crate) fn forget_origin(store: &Store, info: &VmInfo) -> Result<(), ApiError> {
    let mut settings = Settings::of(info)?;
    settings.start_from = None;
    Settings::write(store, info, &settings).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_clones_disks_have_names_of_their_own() {
        for (volume, clone) in [
            ("web1", "web2"),
            ("web1-data", "web2-data"),
            ("web1.root", "web2.root"),
            ("web10", "web2-web10"),
            ("data", "web2-data"),
        ] {
            assert_eq!(clone_name("web1", "web2", volume), clone);
        }
        let names = |volumes: [&str; 2]| {
            let volumes = volumes.map(|volume| volume.parse::<VolumeName>().unwrap());
            clone_names("web1", "web2", &volumes)
        };
        assert_eq!(names(["web1", "data"]), ["web2", "web2-data"]);
        assert_eq!(names(["web1-data", "data"]), ["web2-web1-data", "web2-data"]);
    }
}
