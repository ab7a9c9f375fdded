//! Machines and their checkpoints.

use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use axum::{Extension, Json};
use cdp_store::{CheckpointState, VmInfo, VmSpec};
use cdp_types::{CheckpointId, Instant, VmName, VolumeName};
use serde::Deserialize;

use super::extract::{Body, Params, invalid};
use super::stream::orders;
use super::{App, Peer, at_work, blocking};
use crate::api::{
    ApiError, Checkpoint, CheckpointChange, Diagnosis, ErrorKind, NewCheckpoint, NewVm, NewVmClone, Reverted,
    Schedule, Supervised, SupervisorReport, Vm, VmRevert, VmReverted, VmStarted,
};
use crate::machines::{Settings, Work, copies};

/// The machine in the path.
pub(super) struct Machine(VmName);

impl<S: Send + Sync> FromRequestParts<S> for Machine {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(name) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|e| invalid(e.body_text()))?;
        name.parse().map(Self).map_err(invalid)
    }
}

/// A checkpoint in the path, by its machine and its number or label.
pub(super) struct OfMachine(VmName, String);

impl<S: Send + Sync> FromRequestParts<S> for OfMachine {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path((name, which)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|e| invalid(e.body_text()))?;
        Ok(Self(VmName::from_str(&name).map_err(invalid)?, which))
    }
}

/// A machine as it is now.
fn view(app: &App, info: VmInfo) -> Result<Vm, ApiError> {
    let (taking, supervised) = (app.machines.taking(&info.name), app.machines.supervisors.state(&info.name));
    let connected = app.is_connected(&info);
    Vm::new(info, taking, supervised, connected)
}

/// `GET /v1/vms`
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Vec<Vm>>, ApiError> {
    let list = blocking(&app, |app| app.store.vms().into_iter().map(|info| view(app, info)).collect());
    list.await.map(Json)
}

/// `GET /v1/vms/{name}`
pub(super) async fn show(State(app): State<Arc<App>>, Machine(name): Machine) -> Result<Json<Vm>, ApiError> {
    blocking(&app, move |app| view(app, app.store.vm(&name)?)).await.map(Json)
}

/// `POST /v1/vms`
pub(super) async fn register(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Body(new): Body<NewVm>,
) -> Result<(StatusCode, Json<Vm>), ApiError> {
    let new = checked(new, peer)?;
    let vm = blocking(&app, move |app| {
        let settings = Settings { agent: new.agent, launch: new.launch, ..Settings::default() };
        let spec = VmSpec { volumes: new.volumes, qmp: Some(new.qmp), settings: settings.to_json() };
        let info = app.store.create_vm(&new.name, &spec)?;
        tracing::info!(vm = %new.name, "registered");
        view(app, info)
    });
    Ok((StatusCode::CREATED, Json(vm.await?)))
}

/// `PUT /v1/vms/{name}`
pub(super) async fn put(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Extension(peer): Extension<Peer>,
    Body(new): Body<NewVm>,
) -> Result<Json<Vm>, ApiError> {
    let new = checked(new, peer)?;
    if new.name != name {
        return Err(invalid(format!("'{}' is to be put where '{name}' is", new.name)));
    }
    let vm = blocking(&app, move |app| {
        let _settings = app.machines.settings();
        let Ok(old) = app.store.vm(&name) else {
            let settings = Settings { agent: new.agent, launch: new.launch, ..Settings::default() };
            let spec = VmSpec { volumes: new.volumes, qmp: Some(new.qmp), settings: settings.to_json() };
            return view(app, app.store.create_vm(&name, &spec)?);
        };
        // Not while a checkpoint is taken, of which the store does not know before QEMU has answered.
        let others = old.volumes != new.volumes;
        let working = others.then(|| app.machines.begin(&name, Work::Returning)).transpose()?;
        if working.is_some() {
            app.machines.end_left(&name)?;
        }
        // One may have been complete just before.
        let old = app.store.vm(&name)?;
        if others && old.checkpoints > 0 {
            let disks: Vec<&str> = old.volumes.iter().map(VolumeName::as_str).collect();
            let text = format!(
                "machine '{name}' has the disks {}, and {} checkpoints of them: give it the same, or remove it (vm remove)",
                disks.join(" "),
                old.checkpoints
            );
            return Err(ApiError::new(ErrorKind::Invalid, text));
        }
        if others && let Ok(origin) = copies::origin(&app.store, &old) {
            let disks: Vec<&str> = old.volumes.iter().map(VolumeName::as_str).collect();
            let text = format!(
                "machine '{name}' is a clone that has not run yet, and the memory from which it starts (checkpoint {}) belongs \
                 to the disks {}, in this order: give it the same, or have it boot (vm run {name} --boot)",
                origin.checkpoint,
                disks.join(" ")
            );
            return Err(ApiError::new(ErrorKind::Invalid, text));
        }
        let settings = Settings { agent: new.agent, launch: new.launch, ..Settings::of(&old)? };
        let spec = VmSpec { volumes: new.volumes, qmp: Some(new.qmp), settings: settings.to_json() };
        view(app, app.store.update_vm(&name, &spec)?)
    });
    vm.await.map(Json)
}

fn checked(new: NewVm, peer: Peer) -> Result<NewVm, ApiError> {
    check_paths(&new.qmp, new.agent.as_ref())?;
    if new.volumes.is_empty() {
        return Err(invalid("a machine without disks has nothing that could be put back"));
    }
    let launch = new.launch.map(|launch| launch.said_by(peer.uid()));
    Ok(NewVm { launch, ..new })
}

fn check_paths(qmp: &String, agent: Option<&String>) -> Result<(), ApiError> {
    match [Some(qmp), agent].into_iter().flatten().find(|path| !path.starts_with('/')) {
        Some(path) => Err(invalid(format!("'{path}' is no absolute path"))),
        None => Ok(()),
    }
}

/// `POST /v1/vms/{name}/clone`
pub(super) async fn clone(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Extension(peer): Extension<Peer>,
    Body(new): Body<NewVmClone>,
) -> Result<(StatusCode, Json<Vm>), ApiError> {
    check_paths(&new.qmp, new.agent.as_ref())?;
    let launch = new.launch.map(|launch| launch.said_by(peer.uid()));
    let new = NewVmClone { launch, ..new };
    let vm = blocking(&app, move |app| {
        let made = app.machines.between_deletions(|| copies::copy(&app.store, &name, new))?;
        view(app, made)
    });
    Ok((StatusCode::CREATED, Json(vm.await?)))
}

/// `POST /v1/vms/{name}/start`
pub(super) async fn start(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<Json<VmStarted>, ApiError> {
    // First: what is read before would be of a machine with which something else may be done yet.
    let working = app.machines.begin(&name, Work::Returning)?;
    let (info, origin) = blocking(&app, move |app| {
        let info = app.store.vm(&name)?;
        let origin = app.servers.between_reverts(|| copies::origin(&app.store, &info))?;
        Ok((info, origin))
    })
    .await?;
    to_its_end(async move {
        let _working = working;
        app.machines.make_ready(&app.servers, &info, origin.checkpoint).await?;
        // From here on nobody but QEMU writes to them, but that has taken a while to start.
        let machine = info.name.clone();
        blocking(&app, move |app| copies::origin(&app.store, &app.store.vm(&machine)?).map(drop)).await?;
        let pages = app.machines.restore(&app.servers, &info, origin.checkpoint).await?;
        let still_frozen = app.machines.thaw(&info, origin.checkpoint).await;
        let name = info.name;
        blocking(&app, move |app| forget_origin(app, &name)).await?;
        Ok(Json(VmStarted { from: origin.checkpoint, pages, still_frozen }))
    })
    .await
}

/// Does what must not stop halfway if the client goes away.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let died = |_| Err(ApiError::new(ErrorKind::Internal, "the task of this request has died"));
    let place = at_work();
    let worked = tokio::spawn(async move {
        let _place = place;
        work.await
    });
    worked.await.unwrap_or_else(died)
}

fn forget_origin(app: &App, name: &VmName) -> Result<(), ApiError> {
    let _settings = app.machines.settings();
    copies::forget_origin(&app.store, &app.store.vm(name)?)
}

/// `DELETE /v1/vms/{name}/start`: a clone is to boot.
pub(super) async fn boot(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<StatusCode, ApiError> {
    // Not while it is being started.
    let working = app.machines.begin(&name, Work::Returning)?;
    blocking(&app, move |app| {
        let _working = working;
        forget_origin(app, &name)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `PUT /v1/vms/{name}/schedule`
pub(super) async fn schedule(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Body(schedule): Body<Schedule>,
) -> Result<Json<Vm>, ApiError> {
    schedule.check()?;
    set_schedule(&app, name, Some(schedule)).await
}

/// `DELETE /v1/vms/{name}/schedule`
pub(super) async fn unschedule(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<Json<Vm>, ApiError> {
    set_schedule(&app, name, None).await
}

async fn set_schedule(
    app: &Arc<App>,
    name: VmName,
    schedule: Option<Schedule>,
) -> Result<Json<Vm>, ApiError> {
    let vm = blocking(app, move |app| {
        let _settings = app.machines.settings();
        let info = app.store.vm(&name)?;
        let settings = Settings { schedule, ..Settings::of(&info)? };
        let changed = Settings::write(&app.store, &info, &settings)?;
        app.machines.schedules_changed.notify_one();
        view(app, changed)
    });
    vm.await.map(Json)
}

/// `POST /v1/vms/{name}/supervisor`: orders, for as long as the connection lasts.
pub(super) async fn supervise(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<Response, ApiError> {
    let known = name.clone();
    blocking(&app, move |app| Ok(app.store.vm(&known).map(drop)?)).await?;
    let place = app.machines.supervisors.attach(name)?;
    Ok(orders(&app, place))
}

/// `PUT /v1/vms/{name}/supervisor`
pub(super) async fn report(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Body(report): Body<SupervisorReport>,
) -> Result<StatusCode, ApiError> {
    app.machines.supervisors.report(&name, report.state)?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /v1/vms/{name}/doctor`
pub(super) async fn doctor(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<Json<Diagnosis>, ApiError> {
    app.machines.doctor(&app.servers, &name).await.map(Json)
}

/// Whether a machine's checkpoints go with it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Removal {
    #[serde(default)]
    delete_checkpoints: bool,
}

/// `DELETE /v1/vms/{name}`
pub(super) async fn remove(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Params(Removal { delete_checkpoints }): Params<Removal>,
) -> Result<StatusCode, ApiError> {
    let working = app.machines.begin(&name, Work::Returning)?;
    blocking(&app, move |app| {
        let _working = working;
        app.machines.end_left(&name)?;
        app.machines.remove(&name, delete_checkpoints)?;
        tracing::info!(vm = %name, "removed");
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// `GET /v1/vms/{name}/checkpoints`
pub(super) async fn checkpoints(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<Json<Vec<Checkpoint>>, ApiError> {
    let list = blocking(&app, move |app| {
        Ok(app.store.checkpoints(&name)?.into_iter().map(Checkpoint::from).collect())
    });
    list.await.map(Json)
}

/// `POST /v1/vms/{name}/checkpoints`: answered when it is complete.
pub(super) async fn take(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Body(new): Body<NewCheckpoint>,
) -> Result<(StatusCode, Json<Checkpoint>), ApiError> {
    let taken =
        to_its_end(async move { Arc::clone(&app.machines).take(&app.servers, &name, new).await }).await?;
    Ok((StatusCode::CREATED, Json(taken.into())))
}

/// `DELETE /v1/vms/{name}/taking`
pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
) -> Result<StatusCode, ApiError> {
    app.machines.cancel(&name).map(|()| StatusCode::NO_CONTENT)
}

/// `GET /v1/vms/{name}/checkpoints/{checkpoint}`
pub(super) async fn checkpoint(
    State(app): State<Arc<App>>,
    OfMachine(vm, which): OfMachine,
) -> Result<Json<Checkpoint>, ApiError> {
    blocking(&app, move |app| Ok(app.store.find_checkpoint(&vm, &which)?.into())).await.map(Json)
}

/// `PATCH /v1/vms/{name}/checkpoints/{checkpoint}`
pub(super) async fn change(
    State(app): State<Arc<App>>,
    OfMachine(vm, which): OfMachine,
    Body(change): Body<CheckpointChange>,
) -> Result<Json<Checkpoint>, ApiError> {
    let changed = blocking(&app, move |app| {
        // What is not said is written again as it was read, which must not be what another request has just changed.
        let _settings = app.machines.settings();
        let found = app.store.find_checkpoint(&vm, &which)?;
        let label = change.label.or(found.label);
        app.store.edit_checkpoint(found.id, label, change.pinned.unwrap_or(found.pinned))?;
        Ok(app.store.checkpoint(found.id)?.into())
    });
    changed.await.map(Json)
}

/// `DELETE /v1/vms/{name}/checkpoints/{checkpoint}`
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    OfMachine(vm, which): OfMachine,
) -> Result<StatusCode, ApiError> {
    blocking(&app, move |app| {
        let found = app.store.find_checkpoint(&vm, &which)?;
        if found.state == CheckpointState::Begun
            && let Ok(_working) = app.machines.begin(&vm, Work::Returning)
        {
            // Nobody takes it.
            app.machines.end_left(&vm)?;
        }
        app.machines.delete_checkpoint(&vm, found.id)?;
        tracing::info!(vm = %vm, checkpoint = %found.id, "checkpoint deleted");
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// `POST /v1/vms/{name}/revert`
pub(super) async fn revert(
    State(app): State<Arc<App>>,
    Machine(name): Machine,
    Body(request): Body<VmRevert>,
) -> Result<Json<VmReverted>, ApiError> {
    let VmRevert { to, disks_only } = request;
    let working = app.machines.begin(&name, Work::Returning)?;
    let (info, found) = blocking(&app, move |app| {
        app.machines.end_left(&name)?;
        let found = app.machines.between_deletions(|| app.store.find_checkpoint(&name, &to))?;
        Ok((app.store.vm(&name)?, found))
    })
    .await?;
    to_its_end(async move {
        let _working = working;
        put_back(&app, info, found.id, disks_only).await.map(Json)
    })
    .await
}

async fn put_back(
    app: &Arc<App>,
    info: VmInfo,
    id: CheckpointId,
    disks_only: bool,
) -> Result<VmReverted, ApiError> {
    let disks = info.volumes.clone();
    blocking(app, move |app| check_clients(app, &disks)).await?;
    if !disks_only {
        // Before any disk is touched.
        let state = || app.machines.supervisors.state(&info.name);
        let ran = state() == Some(Supervised::Running);
        app.machines.make_ready(&app.servers, &info, id).await.map_err(|mut error| {
            if ran && state().is_some_and(|state| state != Supervised::Running) {
                error.message.push_str(&format!(
                    "; QEMU of '{0}' has been ended for this, and one waits for its memory or is about to: cdp-tool vm revert \
                     {0} again",
                    info.name
                ));
            }
            error
        })?;
    }
    let name = info.name.clone();
    let volumes = blocking(app, move |app| app.servers.revert_vm(&name, id)).await?;
    let (mut pages, mut still_frozen) = (None, None);
    if !disks_only {
        let restored = app.machines.restore(&app.servers, &info, id).await;
        pages = Some(restored.map_err(|error| with_undo(error, &volumes))?);
        still_frozen = app.machines.thaw(&info, id).await;
    }
    let volumes = volumes.into_iter().map(Reverted::from).collect();
    Ok(VmReverted { to: id, volumes, pages, still_frozen })
}

/// Refuses while somebody has a machine's disk open over NBD. The store would refuse as well, but only once the machine's
/// QEMU has been ended to take the memory.
fn check_clients(app: &App, disks: &[VolumeName]) -> Result<(), ApiError> {
    for name in disks {
        if app.nbd().has_head_open(&[app.store.volume(name)?.id()]) {
            let text = format!("a client has volume '{name}' open over NBD: disconnect it first");
            return Err(ApiError::new(ErrorKind::Busy, text));
        }
    }
    Ok(())
}

/// What undoes the revert of disks whose memory could not be put back.
fn with_undo(mut error: ApiError, volumes: &[cdp_store::Reverted]) -> ApiError {
    let undo: Vec<String> =
        volumes.iter().map(|one| format!("{}@{}", one.volume, Instant::Seq(one.undo.seq))).collect();
    error.message = format!(
        "{}; the disks have been put back already: try again, or undo that with: cdp-tool revert {}",
        error.message,
        undo.join(" ")
    );
    error
}
