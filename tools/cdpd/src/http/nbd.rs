//! Clients of the NBD server.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use nbd_export::ConnectionInfo;

use super::{App, blocking};
use crate::api::{ApiError, NbdConnection};

/// `GET /v1/nbd/connections`
pub(super) async fn connections(State(app): State<Arc<App>>) -> Result<Json<Vec<NbdConnection>>, ApiError> {
    blocking(&app, |app| Ok(app.nbd().connections().into_iter().map(view).collect())).await.map(Json)
}

fn view(client: ConnectionInfo) -> NbdConnection {
    let ConnectionInfo { id, peer, export, device: _, read_bytes, written_bytes, requests, tls } = client;
    NbdConnection { id, peer, export, read_bytes, written_bytes, requests, tls }
}
