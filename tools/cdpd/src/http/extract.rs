//! What a request says, or a refusal of it that is JSON like every other answer.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use cdp_types::{Instant, VolumeName};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::api::{ApiError, ErrorKind};

/// How long the JSON of a request may take to come: whoever sends only its beginning must not keep others out.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn invalid(why: impl Display) -> ApiError {
    ApiError::new(ErrorKind::Invalid, why.to_string())
}

/// The JSON of the body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        json(request, state, BODY_TIMEOUT).await.map(Self)
    }
}

async fn json<T: DeserializeOwned, S: Send + Sync>(
    request: Request,
    state: &S,
    within: Duration,
) -> Result<T, ApiError> {
    let read = async {
        let read = Json::from_request(request, state).await.map_err(|e| invalid(e.body_text()));
        read.map(|Json(value)| value)
    };
    let late = || Err(invalid(format!("the request's body has not come within {within:?}")));
    tokio::time::timeout(within, read).await.unwrap_or_else(|_| late())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use axum::http::HeaderValue;
    use axum::http::header::CONTENT_TYPE;
    use bytes::Bytes;
    use hyper::body::Frame;

    use super::*;

    /// A body of which nothing comes.
    struct Stalled;

    impl hyper::body::Body for Stalled {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        let mut request = Request::new(axum::body::Body::new(Stalled));
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let refusal = json::<u64, ()>(request, &(), Duration::from_millis(20)).await.unwrap_err();
        assert!(refusal.message.contains("has not come within 20ms"), "{refusal:?}");
    }
}
