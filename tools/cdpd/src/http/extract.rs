//! What a request says, or a refusal of it that is JSON like every other answer.

use std::fmt::Display;
use std::str::FromStr;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use cdp_types::{Instant, VolumeName};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::api::{ApiError, ErrorKind};

pub(super) fn invalid(why: impl Display) -> ApiError {
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

/// Whether to do what harms somebody.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Force {
    #[serde(default)]
    pub(super) force: bool,
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

/// A part of a volume: the volume and what follows it in the path.
pub(super) struct Part<T>(pub(super) VolumeName, pub(super) T);

impl<T, S> FromRequestParts<S> for Part<T>
where
    T: FromStr<Err: Display>,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path((name, part)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|e| invalid(e.body_text()))?;
        Ok(Self(name.parse().map_err(invalid)?, part.parse().map_err(invalid)?))
    }
}

/// What relative instants count from. A request takes it once, so that `-5m` is one instant for all that it names.
/// The daemon does not know the client's zone, so local times are UTC.
pub(super) fn now() -> Zoned {
    Timestamp::now().to_zoned(TimeZone::UTC)
}

/// An instant in a request.
pub(super) fn instant(text: &str, now: &Zoned) -> Result<Instant, ApiError> {
    Instant::parse(text, now).map_err(invalid)
}
