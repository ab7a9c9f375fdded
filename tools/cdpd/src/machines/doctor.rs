//! Whether a machine can be checkpointed, from the daemon's side: its volumes, its QEMU and the host.

use std::path::{Path, PathBuf};

use cdp_store::VmInfo;
use cdp_types::VmName;
use ckpt::doctor::{self, Check, MODES};
use ckpt::gate::{DiskGuard, Unguarded};
use qmp_bridge::{Client, Error, ErrorKind as QmpError, Options, machine};

use super::{Machines, ServerGuard, Settings};
use crate::api::{ApiError, Diagnosis, ErrorKind};
use crate::http::at_work;
use crate::serving::Servers;

/// A disk that is served: its socket, and the guard of its guest's memory.
type Served = (PathBuf, ServerGuard);

impl Machines {
    /// Looks at all that a checkpoint of a machine needs, and changes nothing.
    ///
    /// # Errors
    /// There is no such machine.
    pub(crate) async fn doctor(&self, servers: &Servers, vm: &VmName) -> Result<Diagnosis, ApiError> {
        let info = self.store.vm(vm)?;
        let settings = Settings::of(&info)?;
        let (mut checks, served) = self.volumes(servers, &info)?;
        let sockets: Vec<PathBuf> = served.iter().map(|(socket, _)| socket.clone()).collect();
        checks.extend(self.qemu(&info, &sockets).await);
        let (directory, place) = (self.directory.clone(), at_work());
        let host = tokio::task::spawn_blocking(move || {
            let _place = place;
            guards(served, &directory)
        });
        checks.extend(
            host.await.map_err(|_| {
                ApiError::new(ErrorKind::Internal, "the thread that looks at the host has died")
            })?,
        );
        checks.push(agent(settings.agent.as_deref()).await);
        Ok(Diagnosis::new(info.name, checks))
    }

    /// Whether its volumes are served.
    fn volumes(&self, servers: &Servers, info: &VmInfo) -> Result<(Vec<Check>, Vec<Served>), ApiError> {
        let (mut checks, mut served) = (Vec::new(), Vec::new());
        for name in &info.volumes {
            let subject = format!("volume '{name}'");
            match servers.guard(self.store.volume(name)?.id()) {
                Some((socket, guard)) => {
                    checks.push(Check::ok(subject, format!("served on {}", socket.display())));
                    served.push((socket, ServerGuard(guard)));
                }
                None => {
                    let cure =
                        format!("cdp-tool volume serve {name} --vhost-user SOCKET, and attach QEMU to that");
                    let found = "it is not served, so the machine cannot be running on it";
                    checks.push(Check::in_the_way(&MODES, subject, found, cure));
                }
            }
        }
        Ok((checks, served))
    }

    /// What QEMU says. It takes one client at a time, and another one may wait, so that nobody else gets through to it: while
    /// something is done with the machine it is left alone.
    pub(super) async fn qemu(&self, info: &VmInfo, sockets: &[PathBuf]) -> Vec<Check> {
        if self.taking(&info.name).is_some() {
            let found = "a checkpoint is being taken, which has QEMU's socket for itself";
            return vec![Check::unknown("QMP", found, "ask again when it is complete")];
        }
        if self.is_returning(&info.name) {
            let found = "the machine is being put back to a checkpoint, which has QEMU's socket for itself";
            return vec![Check::unknown("QMP", found, "ask again when that is done")];
        }
        let Some(path) = info.qmp.as_deref() else {
            let cure = format!("cdp-tool vm register {} --qmp SOCKET …", info.name);
            return vec![Check::in_the_way(&MODES, "QMP", "the machine has no QMP socket", cure)];
        };
        let asked = async {
            let client = Client::connect(Path::new(path), Options::default()).await?;
            let described = machine::describe(&client).await?;
            Ok((doctor::of_settings(&client).await?, described))
        };
        match asked.await {
            Ok((settings, described)) => {
                let mut checks = vec![Check::ok("QMP", format!("{path} answers"))];
                checks.extend(settings);
                checks.extend(doctor::of_machine(&described, sockets));
                checks
            }
            Err(error) => vec![unanswered(path, &error)],
        }
    }
}

/// A QMP socket that is of no use.
fn unanswered(path: &str, error: &Error) -> Check {
    let cure = match error.kind() {
        QmpError::Held => {
            "close the other client, or give QEMU one more socket: -qmp unix:PATH,server=on,wait=off"
                .to_owned()
        }
        QmpError::NotQmp => "register the machine with the path of QEMU's -qmp socket".to_owned(),
        QmpError::Unreachable => format!("start QEMU with -qmp unix:{path},server=on,wait=off"),
        QmpError::CannotConnect => format!("let the user that cdpd runs as read and write {path}"),
        _ => "see whether QEMU hangs, or has just ended".to_owned(),
    };
    Check::in_the_way(&MODES, "QMP", error.to_string(), cure)
}

/// What the host says of the guards of all disks, and of the process whose memory they guard.
fn guards(served: Vec<Served>, directory: &Path) -> Vec<Check> {
    let mut process = None;
    let guard = |(socket, guard): &Served| {
        let prepared = guard.prepare();
        let pid = match &prepared {
            Ok(pid) => Some(*pid),
            Err(Unguarded { pid, .. }) => *pid,
        };
        process = process.or(pid);
        Check::of_guard(&socket.display().to_string(), &prepared)
    };
    let mut checks: Vec<Check> = served.iter().map(guard).collect();
    checks.extend(process.into_iter().flat_map(|pid| doctor::of_process(pid, directory)));
    checks
}

/// Whether file systems can be stilled.
async fn agent(socket: Option<&str>) -> Check {
    const SUBJECT: &str = "guest agent";
    let Some(socket) = socket else {
        return Check::ok(SUBJECT, "none is registered, so checkpoints cannot be taken with --quiesce");
    };
    let mut agent = qmp_bridge::Agent::new(Path::new(socket), qmp_bridge::AgentOptions::default());
    match agent.freeze_status().await {
        Ok(status) if status == "frozen" => {
            let cure = "thaw them: {\"execute\":\"guest-fsfreeze-thaw\"} on that socket";
            Check::unknown(SUBJECT, "the guest's file systems are frozen", cure)
        }
        Ok(_) => Check::ok(SUBJECT, format!("{socket} answers")),
        Err(error) => {
            let cure = "install qemu-guest-agent in the guest, or take checkpoints without --quiesce";
            Check::unknown(SUBJECT, error.to_string(), cure)
        }
    }
}
