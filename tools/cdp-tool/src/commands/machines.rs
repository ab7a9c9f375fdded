//! Machines and their checkpoints.

use std::path::{Path, absolute};

use anyhow::{Context, ensure};
use cdp_store::CheckpointMode;
use cdp_types::{CheckpointId, Label, VmName, VolumeName};
use cdpd::api::{
    Checkpoint, CheckpointChange, ErrorKind, NewCheckpoint, NewVm, Origin, Schedule, Supervised, Vm,
    VmRevert, VmReverted,
};
use cdpd::client::Client;
use hyper::Method;
use jiff::SignedDuration;
use serde::Serialize;
use serde_json::{Value, json};

use super::{run, taking};
use crate::access::online;
use crate::cli::{CheckpointCommand, Mode, VmCommand, VmRevertArgs};
use crate::machine::command::quoted;
use crate::machine::still_frozen;
use crate::output::{Column, Output};

/// The state of a checkpoint that is complete.
const COMMITTED: &str = "committed";

/// Does what is said of machines.
pub(super) fn vm(store: &Path, command: &VmCommand, output: &mut Output) -> anyhow::Result<()> {
    let client = || online(store);
    match command {
        VmCommand::Register { name, qmp, volumes, agent } => {
            let (qmp, agent) = (path_text(qmp)?, agent.as_deref().map(path_text).transpose()?);
            let new = NewVm { name: name.clone(), volumes: volumes.clone(), qmp, agent, launch: None };
            register(&client()?, new, output)
        }
        VmCommand::List => {
            let vms: Vec<Vm> = client()?.get("/v1/vms")?;
            list(&vms, output)
        }
        VmCommand::Show { name } => {
            let vm: Vm = client()?.get(&format!("/v1/vms/{name}"))?;
            show_vm(&vm, output)
        }
        VmCommand::Remove { name, delete_checkpoints } => {
            let path = format!("/v1/vms/{name}?delete_checkpoints={delete_checkpoints}");
            client()?.delete::<()>(&path)?;
            done(output, json!({ "removed": name }))
        }
        VmCommand::Run(args) => run::run(store, args, output),
        VmCommand::Clone(args) => run::clone(store, args, output),
        VmCommand::Revert(args) => revert(&client()?, store, args, output),
    }
}

/// Answers a program, which expects to be. A person sees that there was no complaint.
fn done(output: &mut Output, what: Value) -> anyhow::Result<()> {
    if output.is_json() { output.value(&what) } else { Ok(()) }
}

/// A path that means the same to the daemon.
fn path_text(path: &Path) -> anyhow::Result<String> {
    let whole = absolute(path).with_context(|| path.display().to_string())?;
    whole.into_os_string().into_string().ok().with_context(|| format!("{} is no text", path.display()))
}

/// Registers a machine, or changes one that is registered: the advice of `doctor` may be about either.
fn register(client: &Client, new: NewVm, output: &mut Output) -> anyhow::Result<()> {
    let (vm, done): (Vm, _) = match client.send(Method::POST, "/v1/vms", &new) {
        Ok(vm) => (vm, "registered"),
        Err(refusal) if refusal.kind == ErrorKind::Exists => (change(client, new)?, "changed"),
        Err(refusal) => return Err(refusal.into()),
    };
    if output.is_json() {
        return output.item(&vm);
    }
    output.line(format!("{done} {0}; save it with: cdp-tool checkpoint take {0}", vm.name))
}

/// Gives a machine that is known the disks and sockets of `new`. The daemon keeps those of one that has checkpoints to its
/// disks.
fn change(client: &Client, mut new: NewVm) -> anyhow::Result<Vm> {
    let path = format!("/v1/vms/{}", new.name);
    let known: Vm = client.get(&path)?;
    // How it is run would be lost, and can only be said where it is run.
    ensure!(
        known.launch.is_none(),
        "there is a machine '{0}' already, which is run by 'vm run': change it there, with cdp-tool vm run {0} --volume \
         VOLUME or --agent",
        new.name
    );
    new.agent = new.agent.or(known.agent);
    Ok(client.send(Method::PUT, &path, &new)?)
}

fn state(vm: &Vm) -> String {
    match (vm.taking, vm.supervised) {
        (Some((came, total)), _) if came > total && total > 0 => {
            format!("saving, all memory sent {:.1} times", came as f64 / total as f64)
        }
        (Some((came, total)), _) if total > 0 => format!("saving, {} %", came * 100 / total),
        (Some(_), _) => "saving".to_owned(),
        (None, Some(Supervised::Starting)) => "starting".to_owned(),
        (None, Some(Supervised::Running)) => "running".to_owned(),
        (None, Some(Supervised::Waiting)) => "waiting for its memory".to_owned(),
        (None, None) if vm.connected && vm.launch.is_some() => "running, unattended".to_owned(),
        (None, None) if vm.connected => "connected".to_owned(),
        (None, None) => "-".to_owned(),
    }
}

fn current(vm: &Vm) -> String {
    vm.current.map_or_else(|| "-".to_owned(), |id| id.to_string())
}

fn volumes(vm: &Vm) -> String {
    vm.volumes.iter().map(VolumeName::as_str).collect::<Vec<_>>().join(" ")
}

/// The same as `vm run --volume` takes them: with what is said of their devices, which whoever runs the machine has to know.
fn disks(vm: &Vm) -> String {
    let mut properties = vm.launch.iter().flat_map(|launch| &launch.disks);
    let disk = |name: &VolumeName| match properties.next() {
        Some(properties) if !properties.is_empty() => quoted(&[format!("{name},{properties}")]),
        _ => name.to_string(),
    };
    vm.volumes.iter().map(disk).collect::<Vec<_>>().join(" ")
}

fn list(vms: &[Vm], output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return vms.iter().try_for_each(|vm| output.item(vm));
    }
    let row =
        |vm: &Vm| vec![vm.name.to_string(), volumes(vm), vm.checkpoints.to_string(), current(vm), state(vm)];
    let columns = [
        Column::Left("NAME"),
        Column::Left("VOLUMES"),
        Column::Right("CHECKPOINTS"),
        Column::Right("CURRENT"),
        Column::Left("STATE"),
    ];
    output.table(&columns, &vms.iter().map(row).collect::<Vec<_>>())
}

fn show_vm(vm: &Vm, output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return output.item(vm);
    }
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let schedule = |schedule: Schedule| {
        let mode = schedule.mode.map(|mode| format!(", {mode:?}").to_lowercase()).unwrap_or_default();
        format!("every {}{mode}, the newest {} are kept", every(schedule.every_s), schedule.keep)
    };
    output.facts(&[
        ("name", vm.name.to_string()),
        ("volumes", disks(vm)),
        ("state", state(vm)),
        ("checkpoints", vm.checkpoints.to_string()),
        ("goes on from", current(vm)),
        ("starts with", or_none(vm.start_from.as_ref().map(memory_of))),
        ("schedule", or_none(vm.schedule.map(schedule))),
        ("QMP", or_none(vm.qmp.clone())),
        ("guest agent", or_none(vm.agent.clone())),
        ("run as", or_none(vm.launch.as_ref().map(|launch| quoted(&launch.command)))),
        ("registered", vm.created.clone()),
    ])?;
    if vm.taking.is_none() && vm.supervised.is_none() && vm.connected && vm.launch.is_some() {
        output.line(format!(
            "its cdp-tool vm run has gone and its QEMU runs on: it can be saved, but not put back in place; to have it \
             looked after again, end QEMU ('quit' in QMP), then cdp-tool vm run {0} [--at CHECKPOINT]",
            vm.name
        ))?;
    }
    Ok(())
}

fn memory_of(origin: &Origin) -> String {
    format!("the memory of {} at checkpoint {}", origin.vm, origin.checkpoint)
}

/// `1h 30m`.
fn every(seconds: u64) -> String {
    let span = i64::try_from(seconds).map_or(SignedDuration::MAX, SignedDuration::from_secs);
    format!("{span:#}")
}

/// What a revert has done.
#[derive(Debug, Serialize)]
struct Undoable<'a> {
    #[serde(flatten)]
    reverted: &'a VmReverted,
    /// The checkpoint that undoes it, if the machine was saved before.
    saved: Option<CheckpointId>,
}

fn revert(client: &Client, store: &Path, args: &VmRevertArgs, output: &mut Output) -> anyhow::Result<()> {
    let name = &args.name;
    let vm: Vm = client.get(&format!("/v1/vms/{name}"))?;
    let save = vm.supervised == Some(Supervised::Running) && !args.disks_only && !args.no_save;
    let mut saved = None;
    if save {
        // A number that was mistyped costs nothing then, and neither does that of a checkpoint that was given up.
        let to: Checkpoint = client.get(&format!("/v1/vms/{name}/checkpoints/{}", args.to))?;
        ensure!(to.state == COMMITTED, "machine '{name}' has no complete checkpoint {}", to.id);
        let taken = taking::take(client, store, name, &NewCheckpoint::default());
        let (taken, interrupted) = taken.context(
            "the machine cannot be saved as it is now (to put it back without that, and lose its memory: --no-save)",
        )?;
        if interrupted {
            anyhow::bail!(
                "interrupted: '{name}' runs on, and was not put back; checkpoint {} stays",
                taken.id
            );
        }
        saved = Some(taken);
    }
    let request = VmRevert { to: args.to.clone(), disks_only: args.disks_only };
    let reverted = client.send::<VmReverted>(Method::POST, &format!("/v1/vms/{name}/revert"), &request);
    let reverted = reverted.with_context(|| match &saved {
        Some(saved) => format!("it was saved before that, as checkpoint {}", saved.id),
        None => format!("'{name}' was not put back"),
    })?;
    if output.is_json() {
        return output.item(&Undoable { reverted: &reverted, saved: saved.map(|saved| saved.id) });
    }
    let undo: Vec<String> =
        reverted.volumes.iter().map(|one| format!("{}@seq:{}", one.volume, one.undo.seq)).collect();
    let what = if args.disks_only { "its disks are as they were" } else { "it goes on from there" };
    output.line(format!("{name} is back at checkpoint {}: {what}", reverted.to))?;
    if let Some(why) = &reverted.still_frozen {
        output.line(still_frozen(why))?;
    }
    match saved {
        Some(saved) => output.line(format!("to undo that: cdp-tool vm revert {name} --to {}", saved.id)),
        None => output.line(format!("the disks before: {}", undo.join(" "))),
    }
}

impl From<Mode> for CheckpointMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Hot => Self::Hot,
            Mode::Live => Self::Live,
            Mode::Pause => Self::Pause,
        }
    }
}

/// Does what is said of checkpoints.
pub(super) fn checkpoint(
    client: &Client,
    store: &Path,
    command: &CheckpointCommand,
    output: &mut Output,
) -> anyhow::Result<()> {
    let at = |vm: &VmName, which: &str| format!("/v1/vms/{vm}/checkpoints/{which}");
    let change = |vm: &VmName, which: &str, change: CheckpointChange| -> anyhow::Result<Checkpoint> {
        Ok(client.send(Method::PATCH, &at(vm, which), &change)?)
    };
    match command {
        CheckpointCommand::Take { vm, mode, label, quiesce, give_up_after } => {
            let mode = mode.map(CheckpointMode::from);
            let give_up_after_s = give_up_after.map(|after| after.0.as_secs());
            let new = NewCheckpoint { mode, label: label.clone(), quiesce: *quiesce, give_up_after_s };
            take(client, store, vm, &new, output)
        }
        CheckpointCommand::Schedule { vm, off: true, .. } => {
            show_vm(&client.delete(&format!("/v1/vms/{vm}/schedule"))?, output)
        }
        CheckpointCommand::Schedule { vm, every, keep, mode, .. } => {
            let every_s = every.map_or(0, |every| every.0.as_secs());
            let schedule = Schedule { every_s, keep: *keep, mode: mode.map(CheckpointMode::from) };
            show_vm(&client.send(Method::PUT, &format!("/v1/vms/{vm}/schedule"), &schedule)?, output)
        }
        CheckpointCommand::Cancel { vm } => {
            client.delete::<()>(&format!("/v1/vms/{vm}/taking"))?;
            done(output, json!({ "cancelled": vm }))
        }
        CheckpointCommand::List { vm } => {
            let list: Vec<Checkpoint> = client.get(&format!("/v1/vms/{vm}/checkpoints"))?;
            table(&list, output)
        }
        CheckpointCommand::Show { vm, checkpoint } => {
            let shown: Checkpoint = client.get(&at(vm, checkpoint))?;
            show(&shown, output)
        }
        CheckpointCommand::Label { vm, checkpoint, label } => {
            let label = CheckpointChange { label: Some(label.clone()), pinned: None };
            show(&change(vm, checkpoint, label)?, output)
        }
        CheckpointCommand::Pin { vm, checkpoint } => {
            show(&change(vm, checkpoint, CheckpointChange { label: None, pinned: Some(true) })?, output)
        }
        CheckpointCommand::Unpin { vm, checkpoint } => {
            show(&change(vm, checkpoint, CheckpointChange { label: None, pinned: Some(false) })?, output)
        }
        CheckpointCommand::Delete { vm, checkpoint } => {
            client.delete::<()>(&at(vm, checkpoint))?;
            done(output, json!({ "vm": vm, "deleted": checkpoint }))
        }
    }
}

fn take(
    client: &Client,
    store: &Path,
    vm: &VmName,
    new: &NewCheckpoint,
    output: &mut Output,
) -> anyhow::Result<()> {
    let (taken, _) = taking::take(client, store, vm, new)?;
    if output.is_json() {
        return output.item(&taken);
    }
    let figure = |name: &str| taken.figures.get(name).and_then(Value::as_u64).unwrap_or(0);
    output.line(format!(
        "checkpoint {} of {vm}, {}: paused for {:.1} ms, saved in {:.1} s, {:.1} MiB new of {:.0} MiB of memory",
        taken.id,
        format!("{:?}", taken.mode).to_lowercase(),
        figure("pause_us") as f64 / 1e3,
        figure("duration_ms") as f64 / 1e3,
        figure("stored_bytes") as f64 / f64::from(1 << 20),
        figure("memory_bytes") as f64 / f64::from(1 << 20),
    ))?;
    aside(&taken, output)
}

/// What else was done for a checkpoint, and whether that went well.
fn aside(taken: &Checkpoint, output: &mut Output) -> anyhow::Result<()> {
    if let Some(still) = taken.figures.get("quiesced") {
        let (systems, us) = (still["filesystems"].as_u64(), still["frozen_us"].as_u64());
        let ms = us.unwrap_or(0) as f64 / 1e3;
        output.line(format!("quiesced: {} file systems, for {ms:.1} ms", systems.unwrap_or(0)))?;
        if let Some(error) = still["thaw_error"].as_str() {
            output.line(format!("its file systems may still be frozen: {error}"))?;
        }
    }
    match taken.figures.get("callback").and_then(|callback| callback["error"].as_str()) {
        Some(error) => output.line(format!("the callback has failed: {error}")),
        None => Ok(()),
    }
}

fn table(list: &[Checkpoint], output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return list.iter().try_for_each(|one| output.item(one));
    }
    let rows: Vec<Vec<String>> = list.iter().map(|one| row(one, output)).collect();
    let columns = [
        Column::Right("ID"),
        Column::Left("LABEL"),
        Column::Left("STATE"),
        Column::Left("MODE"),
        Column::Left("TIME"),
        Column::Right("PAUSE"),
        Column::Right("NEW MIB"),
        Column::Left("INSTANT"),
    ];
    output.table(&columns, &rows)
}

fn row(one: &Checkpoint, output: &Output) -> Vec<String> {
    let figure = |name: &str| one.figures.get(name).and_then(Value::as_u64);
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let pinned = if one.pinned { " (pinned)" } else { "" };
    vec![
        one.id.to_string(),
        or_none(one.label.as_ref().map(Label::to_string)),
        format!("{}{pinned}", one.state),
        format!("{:?}", one.mode).to_lowercase(),
        output.time(one.created_ns),
        or_none(figure("pause_us").map(|us| format!("{:.1} ms", us as f64 / 1e3))),
        or_none(figure("stored_bytes").map(|bytes| format!("{:.1}", bytes as f64 / f64::from(1 << 20)))),
        or_none(one.epoch.clone()),
    ]
}

fn show(one: &Checkpoint, output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return output.item(one);
    }
    table(std::slice::from_ref(one), output)?;
    match &one.reason {
        Some(reason) => output.line(format!("aborted: {reason}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_run_of_a_machine_is_shown() {
        let vm: Vm = serde_json::from_value(json!({
            "name": "web1", "volumes": ["a", "b", "c"], "checkpoints": 0, "created": "",
            "launch": { "command": ["qemu"], "directory": "/", "disks": ["romfile=/x y", ""] },
        }))
        .unwrap();
        assert_eq!(disks(&vm), "'a,romfile=/x y' b c");
        assert_eq!(volumes(&vm), "a b c");
    }

    #[test]
    fn what_undoes_a_revert_is_in_its_json() {
        let reverted =
            VmReverted { to: CheckpointId(3), volumes: vec![], pages: Some(7), still_frozen: None };
        let said = |saved| serde_json::to_value(Undoable { reverted: &reverted, saved }).unwrap();
        let done = json!({ "to": 3, "volumes": [], "pages": 7, "still_frozen": null, "saved": 9 });
        assert_eq!(said(Some(CheckpointId(9))), done);
        assert_eq!(said(None)["saved"], Value::Null);
    }
}
