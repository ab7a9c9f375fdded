//! What a request says, or a refusal of it that is JSON like every other answer.

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use cdp_types::{Instant, VolumeName};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::de::DeserializeOwned;

use crate::api::{ApiError, ErrorKind};

fn invalid(why: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorKind::Invalid, why.to_string())
}

/// The JSON of the body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Json(value) = Json::from_request(request, state).await.map_err(|e| invalid(e.body_text()))?;
        Ok(Self(value))
    }
}

/// The parameters after the `?`.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Query(value) =
            Query::from_request_parts(parts, state).await.map_err(|e| invalid(e.body_text()))?;
        Ok(Self(value))
    }
}

/// The volume in the path.
pub(super) struct Name(pub(super) VolumeName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(name) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|e| invalid(e.body_text()))?;
        name.parse().map(Self).map_err(invalid)
    }
}

/// An instant among the parameters. The daemon does not know the client's zone, so local times are UTC.
pub(super) fn instant(text: &str) -> Result<Instant, ApiError> {
    Instant::parse(text, &Timestamp::now().to_zoned(TimeZone::UTC)).map_err(invalid)
}
