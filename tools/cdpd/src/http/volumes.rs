//! Volumes, and how they are served.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cdp_store::{Serving, VolumeInfo, VolumeSpec};
use cdp_types::VolumeName;

use super::extract::{Body, Force, Name, Params};
use super::{App, blocking};
use crate::api::{ApiError, NewVolume, ServeRequest, Volume, VolumeChange};
use crate::inspect;

/// A volume as it is now.
pub(super) fn view(app: &App, name: &VolumeName) -> Result<Volume, ApiError> {
    Ok(view_of(app, app.store.volume_info(name)?))
}

fn view_of(app: &App, info: VolumeInfo) -> Volume {
    let status = app.servers.status(info.id);
    inspect::volume(info, status)
}

/// `GET /v1/volumes`
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Vec<Volume>>, ApiError> {
    let volumes =
        blocking(&app, |app| Ok(app.store.volumes().into_iter().map(|info| view_of(app, info)).collect()));
    volumes.await.map(Json)
}

/// `POST /v1/volumes`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Body(new): Body<NewVolume>,
) -> Result<(StatusCode, Json<Volume>), ApiError> {
    let volume = blocking(&app, move |app| {
        let spec = VolumeSpec { size_bytes: new.size_bytes, logical_block_size: new.logical_block_size };
        app.store.create_volume(&new.name, spec)?;
        tracing::info!(volume = %new.name, size_bytes = new.size_bytes, "created");
        view(app, &new.name)
    });
    Ok((StatusCode::CREATED, Json(volume.await?)))
}

/// `GET /v1/volumes/{name}`
pub(super) async fn show(State(app): State<Arc<App>>, Name(name): Name) -> Result<Json<Volume>, ApiError> {
    blocking(&app, move |app| view(app, &name)).await.map(Json)
}

/// `PATCH /v1/volumes/{name}`
pub(super) async fn change(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Body(change): Body<VolumeChange>,
) -> Result<Json<Volume>, ApiError> {
    let volume = blocking(&app, move |app| match change {
        VolumeChange::Name(new) => {
            app.store.rename_volume(&name, &new)?;
            tracing::info!(volume = %name, %new, "renamed");
            view(app, &new)
        }
        VolumeChange::SizeBytes(size_bytes) => {
            app.store.resize_volume(&name, size_bytes)?;
            tracing::info!(volume = %name, size_bytes, "resized");
            view(app, &name)
        }
    });
    volume.await.map(Json)
}

/// `DELETE /v1/volumes/{name}`
pub(super) async fn destroy(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Params(Force { force }): Params<Force>,
) -> Result<StatusCode, ApiError> {
    blocking(&app, move |app| app.servers.destroy(&name, force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `PUT /v1/volumes/{name}/serve`
pub(super) async fn serve(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Body(request): Body<ServeRequest>,
) -> Result<Json<Volume>, ApiError> {
    let volume = blocking(&app, move |app| {
        app.servers.serve(&name, Serving { socket: request.socket, queues: request.queues })?;
        view(app, &name)
    });
    volume.await.map(Json)
}

/// `DELETE /v1/volumes/{name}/serve`
pub(super) async fn unserve(State(app): State<Arc<App>>, Name(name): Name) -> Result<Json<Volume>, ApiError> {
    let volume = blocking(&app, move |app| {
        app.servers.unserve(&name)?;
        view(app, &name)
    });
    volume.await.map(Json)
}
