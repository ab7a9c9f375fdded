//! Looking into the store.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use cdp_store::{ExtentInfo, SegmentInfo, VerifyReport};
use cdp_types::VolumeAt;
use serde::Deserialize;

use super::extract::{Name, Params, instant, now};
use super::stream::lines;
use super::{App, blocking};
use crate::api::{ApiError, Count, MapEnd, Progress, Record, RecordsEnd, StoreStatus};
use crate::inspect::{self, RecordsQuery};

/// Which instant.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InstantParam {
    #[serde(default = "crate::api::head")]
    pub(super) at: String,
}

/// Which records.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordsParams {
    from: Option<String>,
    #[serde(default = "crate::api::head")]
    to: String,
    limit: Option<u64>,
}

/// `GET /v1/store`
pub(super) async fn store(State(app): State<Arc<App>>) -> Result<Json<StoreStatus>, ApiError> {
    let status =
        blocking(&app, |app| Ok(StoreStatus { daemon: Some(app.daemon.clone()), store: app.store.info()? }));
    status.await.map(Json)
}

/// `GET /v1/segments`
pub(super) async fn segments(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    lines::<SegmentInfo, Count>(&app, |app, lines| {
        let segments = app.store.segments()?;
        let count = segments.iter().take_while(|segment| lines.item(segment)).count() as u64;
        Ok(Count { count })
    })
    .await
}

/// `POST /v1/verify`
pub(super) async fn verify(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    lines::<(), VerifyReport>(&app, |app, lines| {
        // Until nobody waits for it any more: it reads all there is.
        let report = app.store.verify_while(&mut |progress| {
            lines.progress(Progress { done_bytes: progress.done_bytes, total_bytes: progress.total_bytes })
        })?;
        Ok(report)
    })
    .await
}

/// `GET /v1/volumes/{name}/records`
pub(super) async fn records(
    State(app): State<Arc<App>>,
    Name(volume): Name,
    Params(params): Params<RecordsParams>,
) -> Result<Response, ApiError> {
    let now = now();
    let from = params.from.as_deref().map(|from| instant(from, &now)).transpose()?;
    let query = RecordsQuery { volume, from, to: instant(&params.to, &now)?, limit: params.limit };
    lines::<Record, RecordsEnd>(&app, move |app, lines| {
        inspect::records(&app.store, &query, &mut |record| lines.item(&record))
    })
    .await
}

/// `GET /v1/volumes/{name}/map`
pub(super) async fn map(
    State(app): State<Arc<App>>,
    Name(volume): Name,
    Params(params): Params<InstantParam>,
) -> Result<Response, ApiError> {
    let what = VolumeAt { volume, instant: instant(&params.at, &now())? };
    lines::<ExtentInfo, MapEnd>(&app, move |app, lines| {
        inspect::map(&app.store, &what, &mut |extent| lines.item(&extent))
    })
    .await
}
