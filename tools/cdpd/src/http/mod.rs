//! The HTTP API: its resources ([`crate::api`] has the table) and what keeps clients within bounds.

mod content;
mod extract;
mod history;
mod inspect;
mod listen;
mod machines;
mod metrics;
mod nbd;
mod stream;
mod volumes;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use cdp_store::{Store, VmInfo};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::api::{ApiError, DaemonStatus, ErrorKind, ServingStatus};
use crate::config::Limits;
use crate::machines::Machines;
use crate::nbd::NbdServer;
use crate::serving::Servers;

pub(crate) use listen::{Listener, Listening, Peer, listen};

/// The most bytes of a JSON request.
const MAX_JSON_BYTES: usize = 64 << 10;
/// How long a request waits for others to end.
const PERMIT_WAIT: Duration = Duration::from_millis(500);

/// What every request works on.
pub(crate) struct App {
    pub(crate) store: Store,
    pub(crate) servers: Servers,
    pub(crate) machines: Arc<Machines>,
    pub(crate) daemon: DaemonStatus,
    /// Set once the daemon exports; taken when it stops, since its exports hold this.
    nbd: Mutex<NbdServer>,
    requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// Turns true when the daemon stops; long answers then end.
    stopping: watch::Receiver<bool>,
}

impl App {
    pub(crate) fn new(
        store: Store,
        servers: Servers,
        machines: Arc<Machines>,
        daemon: DaemonStatus,
        limits: &Limits,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        let permits = |count: usize| Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        Self {
            store,
            servers,
            machines,
            daemon,
            nbd: Mutex::default(),
            requests: permits(limits.requests),
            streams: permits(limits.streams),
            stopping,
        }
    }

    fn nbd(&self) -> MutexGuard<'_, NbdServer> {
        self.nbd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a QEMU is connected to one of a machine's disks.
    pub(crate) fn is_connected(&self, vm: &VmInfo) -> bool {
        let status = |name| self.store.volume(name).map(|volume| self.servers.status(volume.id()));
        vm.volumes.iter().any(|name| status(name).is_ok_and(|status| status == ServingStatus::Connected))
    }

    /// Hands over the NBD server.
    pub(crate) fn set_nbd(&self, server: NbdServer) {
        *self.nbd() = server;
    }

    /// Ends the NBD server, once requests in flight have ended.
    pub(crate) fn stop_nbd(&self) {
        self.nbd().stop();
    }
}

tokio::task_local! {
    /// The place of the request that this task answers among those at work.
    static AT_WORK: Arc<OwnedSemaphorePermit>;
}

/// That place, for whatever works for the request and goes on when its client has gone: the future that answers a request
/// is dropped with its connection, and with it its own hold on the place.
pub(crate) fn at_work() -> Option<Arc<OwnedSemaphorePermit>> {
    AT_WORK.try_with(Arc::clone).ok()
}

/// One of so many. It is waited for only so long that a client can follow one request with the next, which
/// may begin before the thread of the first has ended; a queue of requests would hide the overload.
async fn permit(of: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ApiError> {
    match tokio::time::timeout(PERMIT_WAIT, Arc::clone(of).acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        _ => Err(ApiError::new(ErrorKind::Unavailable, "too many requests are at work; try again later")),
    }
}

/// Runs what may block on a thread that may.
async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let (app, place) = (Arc::clone(app), at_work());
    let worked = tokio::task::spawn_blocking(move || {
        let _place = place;
        work(&app)
    });
    worked.await.unwrap_or_else(|_| Err(thread_died()))
}

fn thread_died() -> ApiError {
    ApiError::new(ErrorKind::Internal, "the thread of this request has died")
}

/// The API over this store.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/store", get(inspect::store))
        .route("/v1/segments", get(inspect::segments))
        .route("/v1/verify", post(inspect::verify))
        .route("/v1/revert", post(history::revert))
        .route("/v1/clone", post(history::clone))
        .route("/v1/metrics", get(metrics::metrics))
        .route("/v1/nbd/connections", get(nbd::connections))
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/volumes/{name}", get(volumes::show).patch(volumes::change).delete(volumes::destroy))
        .route("/v1/volumes/{name}/marks", get(history::marks).post(history::mark))
        .route("/v1/volumes/{name}/marks/{label}", delete(history::unmark))
        .route("/v1/volumes/{name}/branches", get(history::branches))
        .route("/v1/volumes/{name}/branches/{id}", delete(history::delete_branch))
        .route("/v1/volumes/{name}/serve", delete(volumes::unserve).put(volumes::serve))
        .route("/v1/volumes/{name}/records", get(inspect::records))
        .route("/v1/volumes/{name}/map", get(inspect::map))
        .route("/v1/volumes/{name}/data", get(content::data))
        .route("/v1/volumes/{name}/import", post(content::import))
        .route("/v1/vms", get(machines::list).post(machines::register))
        .route("/v1/vms/{name}", get(machines::show).put(machines::put).delete(machines::remove))
        .route("/v1/vms/{name}/clone", post(machines::clone))
        .route("/v1/vms/{name}/doctor", get(machines::doctor))
        .route("/v1/vms/{name}/start", post(machines::start).delete(machines::boot))
        .route("/v1/vms/{name}/schedule", put(machines::schedule).delete(machines::unschedule))
        .route("/v1/vms/{name}/supervisor", post(machines::supervise).put(machines::report))
        .route("/v1/vms/{name}/revert", post(machines::revert))
        .route("/v1/vms/{name}/taking", delete(machines::cancel))
        .route("/v1/vms/{name}/checkpoints", get(machines::checkpoints).post(machines::take))
        .route(
            "/v1/vms/{name}/checkpoints/{checkpoint}",
            get(machines::checkpoint).patch(machines::change).delete(machines::delete),
        )
        .fallback(async || ApiError::new(ErrorKind::NotFound, "there is no such resource"))
        .method_not_allowed_fallback(async || {
            let refusal = ApiError::new(ErrorKind::Invalid, "this resource does not take this method");
            (StatusCode::METHOD_NOT_ALLOWED, Json(refusal))
        })
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), admit))
        .with_state(app)
}

/// Lets a request in, or not, and notes changes in the log.
async fn admit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let admitted = match listen::check_origin(peer, request.headers()) {
        Ok(()) => permit(&app.requests).await,
        Err(refusal) => Err(refusal),
    };
    let response = match admitted {
        // A long answer goes on after this; its own permit counts it.
        Ok(permit) => AT_WORK.scope(Arc::new(permit), next.run(request)).await,
        Err(refusal) => refusal.into_response(),
    };
    let (status, peer) = (response.status().as_u16(), peer.map(|peer| peer.to_string()));
    if method == Method::GET {
        tracing::debug!(%method, path, status, peer, "request");
    } else {
        tracing::info!(%method, path, status, peer, "request");
    }
    response
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Exists | ErrorKind::Busy | ErrorKind::ReadOnly => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            ErrorKind::Unavailable | ErrorKind::Locked => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::Foreign | ErrorKind::Internal => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        if status.is_server_error() {
            tracing::warn!(kind = ?self.kind, error = self.message, "request failed");
        }
        (status, Json(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use cdp_store::StoreOptions;
    use cdp_types::VmControl;
    use ckpt::gate::Gate;

    use super::*;
    use crate::config::VhostUser;

    #[tokio::test]
    async fn work_counts_until_its_end_even_if_its_client_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let options = StoreOptions { segment_bytes: 1 << 20, reserve_bytes: 0, ..StoreOptions::default() };
        Store::create(&path, &options).unwrap();
        let store = Store::open(&path, options).unwrap();
        let gate = Gate::new(store.clone());
        let control = Arc::clone(&gate) as Arc<dyn VmControl>;
        let servers = Servers::new(store.clone(), path.join("cdpd.sock"), VhostUser::default(), control);
        let machines = Arc::new(Machines::new(store.clone(), gate, directory.path(), None));
        let daemon = DaemonStatus { version: String::new(), pid: 0, started: String::new() };
        let limits = Limits { requests: 1, ..Limits::default() };
        let (_stop, stopping) = watch::channel(false);
        let app = Arc::new(App::new(store.clone(), servers, machines, daemon, &limits, stopping));

        let (end, ended) = std::sync::mpsc::channel::<()>();
        let work = blocking(&app, move |_: &App| {
            let _ = ended.recv();
            Ok(())
        });
        let place = Arc::new(permit(&app.requests).await.unwrap());
        // Whoever has asked for it goes away.
        let answer = tokio::time::timeout(Duration::from_millis(50), AT_WORK.scope(place, work)).await;
        assert!(answer.is_err(), "it has ended by itself");
        assert_eq!(permit(&app.requests).await.unwrap_err().kind, ErrorKind::Unavailable);
        end.send(()).unwrap();
        let next = Arc::clone(&app.requests).acquire_owned();
        drop(tokio::time::timeout(Duration::from_secs(20), next).await.unwrap().unwrap());
        store.close().unwrap();
    }
}
