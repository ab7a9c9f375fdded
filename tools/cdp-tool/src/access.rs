//! The store: through the daemon that serves it, or directly if none does.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use cdp_store::{ExtentInfo, SegmentInfo, Store, VerifyReport};
use cdp_types::{VolumeAt, VolumeName};
use cdpd::api::{
    self, ApiError, Count, ErrorKind, MapEnd, Progress, Record, RecordsEnd, ServingStatus, StoreStatus,
};
use cdpd::client::{Client, Step};
use cdpd::content::Sink;
use cdpd::frames::Frame;
use cdpd::inspect::{self, RecordsQuery};
use hyper::Method;

/// A store that can be looked at.
pub(crate) enum Access {
    /// A daemon serves it.
    Online(Client),
    /// It is stopped, or a copy.
    Offline(Store),
}

/// A daemon that must be there.
pub(crate) fn online(directory: &Path) -> anyhow::Result<Client> {
    find(directory)?.with_context(|| {
        format!("no cdpd serves the store in {0}; start it: cdpd --store {0}", directory.display())
    })
}

/// A daemon that must not be there.
pub(crate) fn stopped(directory: &Path) -> anyhow::Result<PathBuf> {
    if find(directory)?.is_some() {
        bail!("cdpd serves the store in {}; stop it first", directory.display());
    }
    Ok(directory.to_owned())
}

fn find(directory: &Path) -> anyhow::Result<Option<Client>> {
    Client::find(directory).with_context(|| {
        format!("cannot reach cdpd through {}", directory.join(cdpd::socket::NAME).display())
    })
}

impl Access {
    /// The store in `directory`.
    pub(crate) fn open(directory: &Path) -> anyhow::Result<Self> {
        if let Some(client) = find(directory)? {
            return Ok(Self::Online(client));
        }
        let store = Store::open_read_only(directory).map_err(|error| {
            let busy = error.kind() == cdp_store::ErrorKind::Locked;
            let advice = if busy { " (a cdpd is starting or stopping: try again)" } else { "" };
            anyhow!(error).context(format!("cannot read the store in {}{advice}", directory.display()))
        })?;
        Ok(Self::Offline(store))
    }

    pub(crate) fn store(&self) -> Result<StoreStatus, ApiError> {
        match self {
            Self::Online(client) => client.get("/v1/store"),
            Self::Offline(store) => Ok(StoreStatus { daemon: None, store: store.info()? }),
        }
    }

    pub(crate) fn volumes(&self) -> Result<Vec<api::Volume>, ApiError> {
        match self {
            Self::Online(client) => client.get("/v1/volumes"),
            Self::Offline(store) => {
                let view = |info| inspect::volume(info, ServingStatus::Stopped);
                Ok(store.volumes().into_iter().map(view).collect())
            }
        }
    }

    pub(crate) fn volume(&self, name: &VolumeName) -> Result<api::Volume, ApiError> {
        match self {
            Self::Online(client) => client.get(&format!("/v1/volumes/{name}")),
            Self::Offline(store) => Ok(inspect::volume(store.volume_info(name)?, ServingStatus::Stopped)),
        }
    }

    pub(crate) fn branches(&self, name: &VolumeName) -> Result<Vec<api::Branch>, ApiError> {
        match self {
            Self::Online(client) => client.get(&format!("/v1/volumes/{name}/branches")),
            Self::Offline(store) => inspect::branches(store, name),
        }
    }

    pub(crate) fn segments(&self, visit: &mut dyn FnMut(SegmentInfo) -> bool) -> Result<(), ApiError> {
        match self {
            Self::Online(client) => {
                client.lines::<_, Count>(Method::GET, "/v1/segments", &mut items(visit)).map(drop)
            }
            Self::Offline(store) => {
                store.segments()?.into_iter().all(visit);
                Ok(())
            }
        }
    }

    /// Shows `visit` records until it returns false; `None` if it did.
    pub(crate) fn records(
        &self,
        query: &RecordsQuery,
        visit: &mut dyn FnMut(Record) -> bool,
    ) -> Result<Option<RecordsEnd>, ApiError> {
        match self {
            Self::Online(client) => {
                let mut path = format!("/v1/volumes/{}/records?to={}", query.volume, plain(&query.to));
                if let Some(from) = &query.from {
                    path.push_str(&format!("&from={}", plain(from)));
                }
                if let Some(limit) = query.limit {
                    path.push_str(&format!("&limit={limit}"));
                }
                client.lines(Method::GET, &path, &mut items(visit))
            }
            Self::Offline(store) => inspect::records(store, query, visit).map(Some),
        }
    }

    /// Shows `visit` extents until it returns false; `None` if it did.
    pub(crate) fn map(
        &self,
        what: &VolumeAt,
        visit: &mut dyn FnMut(ExtentInfo) -> bool,
    ) -> Result<Option<MapEnd>, ApiError> {
        match self {
            Self::Online(client) => {
                let path = format!("/v1/volumes/{}/map?at={}", what.volume, plain(&what.instant));
                client.lines(Method::GET, &path, &mut items(visit))
            }
            Self::Offline(store) => inspect::map(store, what, visit).map(Some),
        }
    }

    pub(crate) fn verify(&self, show: &mut dyn FnMut(Progress)) -> Result<VerifyReport, ApiError> {
        match self {
            Self::Online(client) => {
                let report = client.lines(Method::POST, "/v1/verify", &mut |step: Step<()>| {
                    if let Step::Progress(progress) = step {
                        show(progress);
                    }
                    true
                })?;
                report.ok_or_else(|| ApiError::new(ErrorKind::Internal, "the verification was given up"))
            }
            Self::Offline(store) => Ok(store.verify(&mut |progress| {
                show(Progress { done_bytes: progress.done_bytes, total_bytes: progress.total_bytes });
            })?),
        }
    }

    /// Sends a volume's content at an instant to `sink`, which gets everything up to the end or an error.
    pub(crate) fn content(&self, what: &VolumeAt, sink: &mut Sink<'_>) -> Result<(), ApiError> {
        match self {
            Self::Online(client) => {
                let path = format!("/v1/volumes/{}/data?at={}", what.volume, plain(&what.instant));
                receive(&mut client.content(&path)?, sink)
            }
            Self::Offline(store) => cdpd::content::read(store, what, sink).map(drop),
        }
    }
}

/// An instant in its canonical form, which needs no escapes in a query: it has no space, `+`, `&`, `#` or
/// `%`.
fn plain(instant: &cdp_types::Instant) -> String {
    instant.to_string()
}

fn items<'a, T>(visit: &'a mut dyn FnMut(T) -> bool) -> impl FnMut(Step<T>) -> bool + use<'a, T> {
    move |step| match step {
        Step::Item(item) => visit(item),
        Step::Progress(_) => true,
    }
}

fn receive(stream: &mut impl Read, sink: &mut Sink<'_>) -> Result<(), ApiError> {
    loop {
        let frame = Frame::read(stream).map_err(|error| {
            ApiError::new(ErrorKind::Unavailable, format!("the content from cdpd is incomplete: {error}"))
        })?;
        if let Frame::Error(error) = frame {
            return Err(error);
        }
        let last = frame == Frame::End;
        if !sink(frame)? || last {
            return Ok(());
        }
    }
}
