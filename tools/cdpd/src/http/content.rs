//! Content of volumes, out and in, as [`crate::frames`].

use std::io;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::response::Response;
use cdp_store::VolumeSpec;
use cdp_types::{VolumeAt, VolumeName};
use serde::Deserialize;

use super::extract::{Name, Params, instant, now};
use super::inspect::InstantParam;
use super::stream::{Inlet, lines, stream};
use super::{App, volumes};
use crate::api::{self, ApiError, ErrorKind, Progress, default_block_size};
use crate::content::{self, Writer};
use crate::frames::{CONTENT_TYPE, Frame};

/// `GET /v1/volumes/{name}/data`
pub(super) async fn data(
    State(app): State<Arc<App>>,
    Name(volume): Name,
    Params(params): Params<InstantParam>,
) -> Result<Response, ApiError> {
    let what = VolumeAt { volume, instant: instant(&params.at, &now())? };
    let last = |error| Frame::Error(error).encode();
    stream(&app, CONTENT_TYPE, last, move |app, outlet| {
        content::read(&app.store, &what, &mut |frame| Ok(outlet.send(frame.encode()))).map(drop)
    })
    .await
}

/// What a new volume is to be, besides its content.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImportParams {
    #[serde(default = "default_block_size")]
    logical_block_size: u32,
}

/// `POST /v1/volumes/{name}/import`. The answer begins while the request is still being sent.
pub(super) async fn import(
    State(app): State<Arc<App>>,
    Name(name): Name,
    Params(params): Params<ImportParams>,
    request: Request,
) -> Result<Response, ApiError> {
    if request.headers().get(header::CONTENT_TYPE).is_none_or(|kind| kind != CONTENT_TYPE) {
        return Err(ApiError::new(ErrorKind::Invalid, format!("a body of type {CONTENT_TYPE} is expected")));
    }
    let mut inlet = Inlet::new(&app, request.into_body());
    lines::<(), api::Volume>(&app, move |app, lines| {
        import_from(app, &name, params.logical_block_size, &mut inlet, &mut |progress| {
            lines.progress(progress)
        })?;
        volumes::view(app, &name)
    })
    .await
}

/// Makes a volume of what `inlet` says, wholly or not at all.
fn import_from(
    app: &App,
    name: &VolumeName,
    logical_block_size: u32,
    inlet: &mut Inlet,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<(), ApiError> {
    let malformed = |why: &str| Err(ApiError::new(ErrorKind::Invalid, why));
    let Frame::Start(start) = Frame::read(inlet).map_err(|e| broken(&e))? else {
        return malformed("a content stream begins with its start");
    };
    let total_bytes = start.size_bytes;
    let import = app.store.begin_import(name, VolumeSpec { size_bytes: total_bytes, logical_block_size })?;
    let mut writer = Writer::new(import)?;
    loop {
        match Frame::read(inlet).map_err(|e| broken(&e))? {
            Frame::Data { offset, bytes } => {
                writer.write(offset, &bytes)?;
                if !progress(Progress { done_bytes: offset + bytes.len() as u64, total_bytes }) {
                    return Err(ApiError::new(ErrorKind::Unavailable, "the import was interrupted"));
                }
            }
            Frame::End => break,
            Frame::Error(error) => return Err(error),
            Frame::Start(_) => return malformed("a content stream has one start"),
        }
    }
    writer.commit()?;
    tracing::info!(volume = %name, size_bytes = total_bytes, "imported");
    Ok(())
}

fn broken(error: &io::Error) -> ApiError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            ApiError::new(ErrorKind::Invalid, "the content stream stopped before its end")
        }
        io::ErrorKind::InvalidData => ApiError::new(ErrorKind::Invalid, error.to_string()),
        _ => ApiError::new(ErrorKind::Unavailable, error.to_string()),
    }
}
