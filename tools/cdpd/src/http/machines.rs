//! Machines and their checkpoints.

use std::str::FromStr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use cdp_store::VmSpec;
use cdp_types::VmName;
use serde::Deserialize;

use super::extract::{Body, Params, invalid};
use super::{App, blocking};
use crate::api::{
    ApiError, Checkpoint, CheckpointChange, Diagnosis, NewCheckpoint, NewVm, Reverted, Vm, VmRevert,
    VmReverted,
};
use crate::machines::Settings;

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

/// `GET /v1/vms`
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Vec<Vm>>, ApiError> {
    blocking(&app, |app| {
        let view = |info: cdp_store::VmInfo| {
            let taking = app.machines.taking(&info.name);
            Vm::new(info, taking)
        };
        app.store.vms().into_iter().map(view).collect()
    })
    .await
    .map(Json)
}

/// `GET /v1/vms/{name}`
pub(super) async fn show(State(app): State<Arc<App>>, Machine(name): Machine) -> Result<Json<Vm>, ApiError> {
    blocking(&app, move |app| Vm::new(app.store.vm(&name)?, app.machines.taking(&name))).await.map(Json)
}

/// `POST /v1/vms`
pub(super) async fn register(
    State(app): State<Arc<App>>,
    Body(new): Body<NewVm>,
) -> Result<(StatusCode, Json<Vm>), ApiError> {
    if let Some(path) =
        [Some(&new.qmp), new.agent.as_ref()].into_iter().flatten().find(|path| !path.starts_with('/'))
    {
        return Err(invalid(format!("'{path}' is no absolute path")));
    }
    if new.volumes.is_empty() {
        return Err(invalid("a machine without disks has nothing that could be put back"));
    }
    let vm = blocking(&app, move |app| {
        let settings = Settings { agent: new.agent }.to_json();
        let spec = VmSpec { volumes: new.volumes, qmp: Some(new.qmp), settings };
        let info = app.store.create_vm(&new.name, &spec)?;
        tracing::info!(vm = %new.name, "registered");
        Vm::new(info, None)
    });
    Ok((StatusCode::CREATED, Json(vm.await?)))
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
    blocking(&app, move |app| {
        app.store.remove_vm(&name, delete_checkpoints)?;
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
    let taken = Arc::clone(&app.machines).take(&app.servers, &name, new).await?;
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
        app.store.delete_checkpoint(found.id)?;
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
    if !request.disks && !request.memory {
        return Err(invalid("neither disks nor memory are to be put back"));
    }
    let (vm, to) = (name.clone(), request.to.clone());
    let (info, found) =
        blocking(&app, move |app| Ok((app.store.vm(&vm)?, app.store.find_checkpoint(&vm, &to)?))).await?;
    if request.memory {
        // Before anything is touched.
        app.machines.check(&info, found.id).await?;
    }
    let mut volumes = Vec::new();
    if request.disks {
        let id = found.id;
        volumes = blocking(&app, move |app| app.servers.revert_vm(&name, id)).await?;
    }
    let (mut pages, mut still_frozen) = (None, None);
    if request.memory {
        pages = Some(app.machines.restore(&info, found.id).await?);
        still_frozen = app.machines.thaw(&info, found.id).await;
    }
    let volumes = volumes.into_iter().map(Reverted::from).collect();
    Ok(Json(VmReverted { to: found.id, volumes, pages, still_frozen }))
}
