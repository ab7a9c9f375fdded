//! Volumes' histories: marks, branches, reverts and clones.

use std::str::FromStr;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cdp_store::CloneSpec;
use cdp_types::{BranchId, Label};

use super::extract::{Body, Force, Name, Params, Part, instant, invalid, now};
use super::{App, blocking, volumes};
use crate::api::{ApiError, Branch, CloneRequest, Mark, NewMark, RevertRequest, Reverted, Volume};
use crate::inspect;

/// `GET /v1/volumes/{name}/marks`
pub(super) async fn marks(
    State(app): State<Arc<App>>,
    Name(name): Name,
) -> Result<Json<Vec<Mark>>, ApiError> {
    blocking(&app, move |app| Ok(volumes::view(app, &name)?.marks)).await.map(Json)
}

/// `POST /v1/volumes/{name}/marks`
pub(super) async fn mark(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Body(new): Body<NewMark>,
) -> Result<(StatusCode, Json<Mark>), ApiError> {
    let at = instant(&new.at, &now())?;
    if new.metadata.contains_key("") {
        return Err(invalid("a key of the metadata is empty"));
    }
    let mark = blocking(&app, move |app| {
        let mark = app.store.mark(&name, &at, &new.label, new.metadata)?;
        tracing::info!(volume = %name, label = %new.label, seq = %mark.seq, "marked");
        Ok(mark.into())
    });
    Ok((StatusCode::CREATED, Json(mark.await?)))
}

/// `DELETE /v1/volumes/{name}/marks/{label}`
pub(super) async fn unmark(
    State(app): State<Arc<App>>,
    Part(name, label): Part<Label>,
) -> Result<StatusCode, ApiError> {
    blocking(&app, move |app| {
        app.store.unmark(&name, &label)?;
        tracing::info!(volume = %name, %label, "unmarked");
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// `GET /v1/volumes/{name}/branches`
pub(super) async fn branches(
    State(app): State<Arc<App>>,
    Name(name): Name,
) -> Result<Json<Vec<Branch>>, ApiError> {
    blocking(&app, move |app| inspect::branches(&app.store, &name)).await.map(Json)
}

/// A branch in a path.
pub(super) struct BranchNumber(BranchId);

impl FromStr for BranchNumber {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(|id| Self(BranchId(id))).map_err(|_| "a branch is named by its number")
    }
}

/// `DELETE /v1/volumes/{name}/branches/{id}`
pub(super) async fn delete_branch(
    State(app): State<Arc<App>>,
    Part(name, BranchNumber(branch)): Part<BranchNumber>,
    Params(Force { force }): Params<Force>,
) -> Result<StatusCode, ApiError> {
    blocking(&app, move |app| {
        app.store.delete_branch(&name, branch, force)?;
        tracing::info!(volume = %name, %branch, "branch deleted");
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// `POST /v1/revert`
pub(super) async fn revert(
    State(app): State<Arc<App>>,
    Body(request): Body<RevertRequest>,
) -> Result<Json<Vec<Reverted>>, ApiError> {
    if request.volumes.is_empty() {
        return Err(invalid("no volume is named"));
    }
    let now = now();
    let targets = request.volumes.into_iter().map(|target| Ok((target.name, instant(&target.at, &now)?)));
    let targets = targets.collect::<Result<Vec<_>, ApiError>>()?;
    let reverted = blocking(&app, move |app| {
        let free = || app.machines.check_disks(targets.iter().map(|(name, _)| name));
        let reverted = app.servers.revert(&targets, request.force, &free)?;
        // Those that have a head open get nothing but errors from it from now on.
        let ids = reverted.iter().filter_map(|one| Some(app.store.volume(&one.volume).ok()?.id()));
        app.nbd().disconnect_heads(&ids.collect::<Vec<_>>());
        Ok(reverted.into_iter().map(Reverted::from).collect())
    });
    reverted.await.map(Json)
}

/// `POST /v1/clone`
pub(super) async fn clone(
    State(app): State<Arc<App>>,
    Body(request): Body<CloneRequest>,
) -> Result<(StatusCode, Json<Vec<Volume>>), ApiError> {
    if request.clones.is_empty() {
        return Err(invalid("no clone is named"));
    }
    let now = now();
    let specs = request.clones.into_iter().map(|new| {
        let at = instant(&new.at, &now)?;
        Ok(CloneSpec { source: new.source, at, name: new.name })
    });
    let specs = specs.collect::<Result<Vec<_>, ApiError>>()?;
    let volumes = blocking(&app, move |app| {
        app.store.clone_volumes(&specs)?;
        for spec in &specs {
            tracing::info!(volume = %spec.name, source = %spec.source, at = %spec.at, "cloned");
        }
        specs.iter().map(|spec| volumes::view(app, &spec.name)).collect()
    });
    Ok((StatusCode::CREATED, Json(volumes.await?)))
}
