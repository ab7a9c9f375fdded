//! `vm run` and `vm clone`: machines whose QEMU is looked after from here.

use std::path::{Path, PathBuf, absolute};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use cdp_types::{VmName, VolumeName};
use cdpd::api::{
    ErrorKind, Launch, NewCheckpoint, NewVm, NewVmClone, ServeRequest, ServingStatus, Vm, VmRevert, Volume,
};
use cdpd::client::Client;
use cdpd::{DEFAULT_QUEUES, MAX_QUEUES};
use hyper::Method;
use serde_json::Value;

use super::taking;
use crate::access::online;
use crate::cli::{Running, VmCloneArgs, VmDisk, VmRunArgs};
use crate::machine::command::{Additions, Command, Disk, quoted, socket_path, version_of};
use crate::machine::supervisor::{self, Machine, Start};
use crate::output::{Output, unless_gone};

/// How long a guest that has just ended may take to be noticed.
const PARTING: Duration = Duration::from_secs(2);

/// Where a machine's sockets are.
struct Sockets {
    directory: PathBuf,
    qmp: String,
    agent: String,
}

impl Sockets {
    fn of(running: &Running, store: &Path, name: &VmName) -> anyhow::Result<Self> {
        let directory = running.sockets.as_deref().unwrap_or(store);
        let directory = absolute(directory).with_context(|| directory.display().to_string())?;
        let qmp = socket_path(&directory, &format!("vm-{name}.qmp"))?;
        let agent = socket_path(&directory, &format!("vm-{name}.agent"))?;
        Ok(Self { directory, qmp, agent })
    }

    fn volume(&self, name: &VolumeName) -> anyhow::Result<String> {
        socket_path(&self.directory, &format!("volume-{name}.sock"))
    }
}

/// Runs a machine in the foreground.
pub(super) fn run(store: &Path, args: &VmRunArgs, output: &mut Output) -> anyhow::Result<()> {
    let store = absolute(store).with_context(|| store.display().to_string())?;
    let client = online(&store)?;
    let known = existing(&client, &args.name)?;
    let sockets = Sockets::of(&args.running, &store, &args.name)?;
    let (volumes, launch) = wanted(args, known.as_ref())?;
    let command = Command::read(&launch.command)?;
    let directory = PathBuf::from(&launch.directory);
    // First: of a program that was mistyped, nothing is to be served from now on.
    let version = version_of(command.program(), &directory)?;
    let agent = args.agent || known.as_ref().is_some_and(|vm| vm.agent.is_some());
    let agent = agent.then(|| sockets.agent.clone());
    // One for each processor is best, but fewer do.
    let queues = command.vcpus().clamp(DEFAULT_QUEUES, MAX_QUEUES);
    let disks = volumes.iter().zip(&launch.disks);
    let disks: Vec<Disk> = disks
        .map(|(volume, properties)| disk(&client, &sockets, volume, properties, queues, args.print))
        .collect::<anyhow::Result<_>>()?;
    let additions = Additions {
        name: args.name.as_str(),
        disks: &disks,
        qmp: &sockets.qmp,
        agent: agent.as_deref(),
        version,
    };
    let boot = command.complete(&additions, false)?;
    if args.print {
        return if output.is_json() { output.item(&boot) } else { output.line(quoted(&boot)) };
    }
    let incoming = command.complete(&additions, true)?;
    let qmp = sockets.qmp.clone();
    let new = NewVm { name: args.name.clone(), volumes, qmp: sockets.qmp, agent, launch: Some(launch) };
    if args.boot && known.is_some_and(|vm| vm.start_from.is_some() && vm.volumes != new.volumes) {
        // First: as long as its memory counts, a clone keeps the disks to which that belongs.
        client.delete::<()>(&format!("/v1/vms/{}/start", args.name))?;
    }
    let vm: Vm = client.send(Method::PUT, &format!("/v1/vms/{}", args.name), &new)?;
    let start = start(&client, args, &vm)?;
    let machine = Machine {
        store,
        name: args.name.clone(),
        boot,
        incoming,
        directory,
        qmp: PathBuf::from(qmp),
        patience: args.running.stop_timeout.0,
    };
    // It can take weeks: what has been said so far is to be seen. The machine is run, even if nobody looks.
    unless_gone(output.finish())?;
    supervisor::run(&machine, start)
}

/// Makes a copy of a machine, and runs it.
pub(super) fn clone(store: &Path, args: &VmCloneArgs, output: &mut Output) -> anyhow::Result<()> {
    let store = absolute(store).with_context(|| store.display().to_string())?;
    let client = online(&store)?;
    let original: Vm = client.get(&format!("/v1/vms/{}", args.name))?;
    // A name that is taken had better be known before the original is saved for it.
    if existing(&client, &args.new)?.is_some() {
        bail!("there is a machine '{}' already", args.new);
    }
    let sockets = Sockets::of(&args.running, &store, &args.new)?;
    let launch = match &args.running.command[..] {
        [] => {
            if let Some(launch) = &original.launch {
                check_owner(&args.name, launch)?;
            }
            original.launch.clone()
        }
        words => {
            let plain = || vec![String::new(); original.volumes.len()];
            Some(launch_of(words, original.launch.map_or_else(plain, |launch| launch.disks))?)
        }
    };
    match &launch {
        Some(launch) => drop(Command::read(&launch.command)?),
        None if args.no_run => {}
        None => bail!(
            "nobody knows how '{0}' is started: say it, as in: vm clone {0} {1} -- qemu-system-x86_64 …",
            args.name,
            args.new
        ),
    }
    let at = match &args.at {
        Some(at) => at.clone(),
        None => checkpoint_now(&client, &store, &args.name)?,
    };
    let agent = original.agent.is_some().then_some(sockets.agent);
    let new = NewVmClone { at, name: args.new.clone(), qmp: sockets.qmp, agent, launch };
    let made: Vm = client.send(Method::POST, &format!("/v1/vms/{}/clone", args.name), &new)?;
    if output.is_json() {
        output.item(&made)?;
    } else {
        let names: Vec<&str> = made.volumes.iter().map(VolumeName::as_str).collect();
        output.line(format!("cloned {} to {}, with the disks {}", args.name, args.new, names.join(" ")))?;
        output.line("its network cards have the addresses of the original's: keep the two apart")?;
    }
    if args.no_run {
        return Ok(());
    }
    let running = Running { command: Vec::new(), ..args.running.clone() };
    run(&store, &VmRunArgs::plain(args.new.clone(), running), output)
}

/// Saves a machine as it is now, for a clone: the checkpoint's number.
fn checkpoint_now(client: &Client, store: &Path, name: &VmName) -> anyhow::Result<String> {
    let taken = taking::take(client, store, name, &NewCheckpoint::default());
    let (taken, interrupted) = taken.with_context(|| {
        format!(
            "'{name}' cannot be saved as it is now; of an earlier state a clone is made with --at CHECKPOINT"
        )
    })?;
    if interrupted {
        bail!("interrupted: '{name}' runs on, and was not cloned; checkpoint {} stays", taken.id);
    }
    Ok(taken.id.to_string())
}

fn existing(client: &Client, name: &VmName) -> anyhow::Result<Option<Vm>> {
    match client.get(&format!("/v1/vms/{name}")) {
        Ok(vm) => Ok(Some(vm)),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn launch_of(words: &[String], disks: Vec<String>) -> anyhow::Result<Launch> {
    let directory = std::env::current_dir().context("in which directory?")?;
    let directory =
        directory.into_os_string().into_string().ok().context("the directory's path is no text")?;
    Ok(Launch { command: words.to_vec(), directory, disks, owner: None })
}

/// The disks and the command line: as said now, else as said the last time.
fn wanted(args: &VmRunArgs, known: Option<&Vm>) -> anyhow::Result<(Vec<VolumeName>, Launch)> {
    let last = known.and_then(|vm| vm.launch.as_ref());
    let (volumes, disks): (Vec<VolumeName>, Vec<String>) = if args.volumes.is_empty() {
        let Some(vm) = known else {
            bail!("machine '{}' is new: which disks has it? say --volume", args.name)
        };
        // However many the API was told of: no disk is left out.
        let mut disks = last.map_or_else(Vec::new, |launch| launch.disks.clone());
        disks.resize(vm.volumes.len(), String::new());
        (vm.volumes.clone(), disks)
    } else {
        args.volumes.iter().map(|VmDisk { volume, properties }| (volume.clone(), properties.clone())).unzip()
    };
    let launch = match (&args.running.command[..], last) {
        ([], Some(last)) => {
            check_owner(&args.name, last)?;
            Launch { disks, ..last.clone() }
        }
        ([], None) => {
            bail!("how is '{0}' started? say it, as in: vm run {0} … -- qemu-system-x86_64 -m 2G", args.name)
        }
        (words, _) => launch_of(words, disks)?,
    };
    Ok((volumes, launch))
}

/// Refuses to run a command that another user has said, who may have less rights than this one.
fn check_owner(name: &VmName, launch: &Launch) -> anyhow::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let by = match launch.owner {
        Some(uid) if uid == own || uid == 0 => return Ok(()),
        Some(uid) => format!("user {uid}"),
        None => "somebody on the network".to_owned(),
    };
    bail!(
        "the command line of '{name}' was given by {by}: look at it (vm show {name}), and say it again behind --"
    )
}

/// A volume as a disk: served from now on, unless it is already, or nothing is to be changed.
fn disk(
    client: &Client,
    sockets: &Sockets,
    name: &VolumeName,
    properties: &str,
    queues: u16,
    unchanged: bool,
) -> anyhow::Result<Disk> {
    let volume = when_free(client, name, unchanged)?;
    let properties = properties.to_owned();
    let Some(serving) = volume.serving else {
        let socket = sockets.volume(name)?;
        if !unchanged {
            let request = ServeRequest { socket: socket.clone(), queues };
            client.send::<Volume>(Method::PUT, &format!("/v1/volumes/{name}/serve"), &request)?;
        }
        return Ok(Disk { socket, queues, properties });
    };
    match serving.status {
        ServingStatus::Connected if !unchanged => {
            bail!("volume '{name}' is in use: a guest is connected on {}", serving.socket)
        }
        ServingStatus::Failed(reason) => bail!("volume '{name}' cannot be served: {reason}"),
        _ => Ok(Disk { socket: serving.socket, queues: serving.queues, properties }),
    }
}

/// A volume, once the guest that has just ended has been noticed to have gone.
fn when_free(client: &Client, name: &VolumeName, at_once: bool) -> anyhow::Result<Volume> {
    let by = Instant::now() + PARTING;
    loop {
        let volume: Volume = client.get(&format!("/v1/volumes/{name}"))?;
        let status = volume.serving.as_ref().map(|serving| &serving.status);
        if at_once || status != Some(&ServingStatus::Connected) || Instant::now() >= by {
            return Ok(volume);
        }
        std::thread::sleep(PARTING / 20);
    }
}

/// How the machine comes to life.
fn start(client: &Client, args: &VmRunArgs, vm: &Vm) -> anyhow::Result<Start> {
    let path = |what: &str| format!("/v1/vms/{}/{what}", args.name);
    if let Some(to) = &args.at {
        let body = serde_json::to_value(VmRevert { to: to.clone(), disks_only: false })?;
        return Ok(Start::Memory { path: path("revert"), body });
    }
    match &vm.start_from {
        Some(_) if args.boot => {
            client.delete::<()>(&path("start"))?;
            Ok(Start::Boot)
        }
        Some(_) => Ok(Start::Memory { path: path("start"), body: Value::Null }),
        None => Ok(Start::Boot),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::cli::{Cli, VmCommand};

    #[test]
    fn no_disk_is_left_out_whatever_is_known_of_its_device() {
        let line = ["cdp-tool", "vm", "run", "web1"];
        let crate::cli::Command::Vm(VmCommand::Run(args)) = Cli::try_parse_from(line).unwrap().command else {
            panic!("another command");
        };
        let own = rustix::process::geteuid().as_raw();
        for (known, wanted_of) in [(json!([]), ["", ""]), (json!(["addr=1"]), ["addr=1", ""])] {
            let vm: Vm = serde_json::from_value(json!({
                "name": "web1", "volumes": ["a", "b"], "checkpoints": 0, "created": "",
                "launch": { "command": ["qemu"], "directory": "/", "disks": known, "owner": own },
            }))
            .unwrap();
            let (volumes, launch) = wanted(&args, Some(&vm)).unwrap();
            assert_eq!((volumes, launch.disks), (vm.volumes, wanted_of.map(str::to_owned).to_vec()));
        }
    }

    #[test]
    fn another_users_command_is_not_run() {
        let own = rustix::process::geteuid().as_raw();
        let launch = |owner| Launch { command: vec![], directory: "/".to_owned(), disks: vec![], owner };
        let name = "web1".parse().unwrap();
        for owner in [own, 0] {
            assert!(check_owner(&name, &launch(Some(owner))).is_ok());
        }
        let why = check_owner(&name, &launch(Some(own + 4711))).unwrap_err().to_string();
        assert!(why.contains("vm show web1"), "{why}");
        assert!(check_owner(&name, &launch(None)).unwrap_err().to_string().contains("network"));
    }
}
