//! What an export's name means.
//!
//! `web1` is the head of volume web1, `web1@INSTANT` a past instant, `web1@INSTANT:scratch` a writable view of one,
//! shared by all who open it under that name at a time. The empty name is the only volume there is, if there is only
//! one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant as Clock};

use cdp_store::{ErrorKind, Resolved, Scratch, Store, Volume};
use cdp_types::{BlockDevice, Instant, VolumeAt, VolumeId, VolumeName, one_line};
use jiff::tz::TimeZone;
use nbd_export::{Export, ExportEntry, ExportError, ExportErrorKind, Exports, StatusContext};

use super::contexts::{Allocation, Changes};
use super::guarded::Guarded;
use crate::api::ServingStatus;
use crate::http::App;

/// What follows an instant of which a writable view is wanted.
const SCRATCH: &str = ":scratch";
/// The prefix of the contexts that tell what has changed since an instant, which follows it.
const SINCE: &str = "qemu:dirty-bitmap:since@";
const ALLOCATION: &str = "base:allocation";
/// For so long an instant that is relative, such as `-5m`, means the same for all who ask for it: a client that opens
/// several connections, one after the other, must see one disk.
const SAME_INSTANT: Duration = Duration::from_secs(10);
/// Instants that are remembered for that.
const MOST_REMEMBERED: usize = 1024;

/// Which volumes' heads clients may write to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heads {
    all: bool,
    names: Vec<VolumeName>,
    beside_guests: bool,
}

impl Heads {
    /// Those of these volumes; `*` means all. While a guest has one, only `beside_guests` allows it.
    pub(crate) fn new(names: &[String], beside_guests: bool) -> Self {
        let all = names.iter().any(|name| name == "*");
        Self { all, names: names.iter().filter_map(|name| name.parse().ok()).collect(), beside_guests }
    }

    fn allow(&self, name: &VolumeName) -> bool {
        self.all || self.names.contains(name)
    }
}

/// The exports of a store.
pub(crate) struct StoreExports {
    app: Arc<App>,
    heads: Heads,
    remembered: Mutex<HashMap<String, Remembered>>,
    /// Writable views that somebody has open, and of which volume.
    scratches: Mutex<HashMap<String, (VolumeId, Weak<VolumeExport>)>>,
}

struct Remembered {
    at: Resolved,
    volume: VolumeId,
    since: Clock,
}

fn refused(error: &cdp_store::Error) -> ExportError {
    let kind = match error.kind() {
        ErrorKind::NotFound => ExportErrorKind::Unknown,
        ErrorKind::Invalid => ExportErrorKind::Invalid,
        ErrorKind::Busy => ExportErrorKind::Busy,
        ErrorKind::ReadOnly => ExportErrorKind::Policy,
        ErrorKind::Closed => ExportErrorKind::Shutdown,
        _ => ExportErrorKind::Failed,
    };
    ExportError::new(kind, one_line(error))
}

/// Reads a name. The daemon does not know the client's zone, so local times are UTC, as in the HTTP API.
fn parse(text: &str) -> Result<VolumeAt, ExportError> {
    let now = jiff::Timestamp::now().to_zoned(TimeZone::UTC);
    VolumeAt::parse(text, &now).map_err(|e| ExportError::new(ExportErrorKind::Invalid, e.to_string()))
}

impl StoreExports {
    pub(crate) fn new(app: Arc<App>, heads: Heads) -> Self {
        Self { app, heads, remembered: Mutex::default(), scratches: Mutex::default() }
    }

    fn store(&self) -> &Store {
        &self.app.store
    }

    /// The only volume there is.
    fn default_name(&self) -> Result<String, ExportError> {
        match &self.store().volumes()[..] {
            [only] => Ok(only.name.to_string()),
            [] => Err(ExportError::new(ExportErrorKind::Unknown, "there are no volumes")),
            several => {
                let text =
                    format!("there are {} volumes: name one, as in {}@-5m", several.len(), several[0].name);
                Err(ExportError::new(ExportErrorKind::Unknown, text))
            }
        }
    }

    fn open_head(&self, name: &VolumeName) -> Result<VolumeExport, ExportError> {
        let volume = self.store().volume(name).map_err(|e| refused(&e))?;
        // It would be in the way of the revert, for which the machine's QEMU may have been ended already.
        self.app
            .machines
            .check_disks(std::iter::once(name))
            .map_err(|error| ExportError::new(ExportErrorKind::Busy, error.message))?;
        let may_write = self.heads.allow(name);
        let device: Arc<dyn BlockDevice> = Arc::clone(&volume) as _;
        let device = if may_write && !self.heads.beside_guests {
            let (app, id) = (Arc::clone(&self.app), volume.id());
            let has_guest = move || matches!(app.servers.status(id), ServingStatus::Connected);
            Arc::new(Guarded::new(device, Arc::new(has_guest))) as Arc<dyn BlockDevice>
        } else {
            device
        };
        Ok(VolumeExport {
            name: name.to_string(),
            description: format!("the present of volume {name}"),
            device,
            at: None,
            writable: may_write && volume.refusal().is_none(),
            volume,
            store: self.store().clone(),
            _scratch: None,
        })
    }

    fn open_past(&self, text: &str, what: &VolumeAt) -> Result<VolumeExport, ExportError> {
        let volume = self.store().volume(&what.volume).map_err(|e| refused(&e))?;
        let at = self.resolve(text, what, &volume)?;
        let device = volume.open_resolved(at).map_err(|e| refused(&e))?;
        Ok(VolumeExport {
            name: format!("{}@seq:{}", what.volume, at.seq),
            description: format!("volume {} as it was at {}", what.volume, Instant::Time(at.time_ns)),
            device,
            volume,
            at: Some(at),
            writable: false,
            store: self.store().clone(),
            _scratch: None,
        })
    }

    fn resolve(&self, text: &str, what: &VolumeAt, volume: &Volume) -> Result<Resolved, ExportError> {
        let remembered = || {
            let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
            remembered.retain(|_, one| one.since.elapsed() < SAME_INSTANT);
            remembered
        };
        let known = |remembered: &HashMap<String, Remembered>| {
            remembered.get(text).filter(|known| known.volume == volume.id()).map(|known| known.at)
        };
        let resolve = || self.store().resolve_of(volume, &what.instant).map_err(|e| refused(&e));
        if !matches!(what.instant, Instant::Head | Instant::Time(_) | Instant::FlushBack(_)) {
            // Always the same, as long as it is there.
            return resolve();
        }
        if let Some(at) = known(&remembered()) {
            return Ok(at);
        }
        // Not under the lock: it may wait for writes of this volume, and others ask for other volumes.
        let at = resolve()?;
        let mut remembered = remembered();
        if let Some(at) = known(&remembered) {
            return Ok(at);
        }
        // Whoever asks for that many has not one disk in mind.
        if remembered.len() < MOST_REMEMBERED {
            remembered.insert(text.to_owned(), Remembered { at, volume: volume.id(), since: Clock::now() });
        }
        Ok(at)
    }

    fn open_scratch(&self, text: &str, what: &VolumeAt) -> Result<Arc<VolumeExport>, ExportError> {
        let mut scratches = self.scratches.lock().unwrap_or_else(PoisonError::into_inner);
        scratches.retain(|_, (_, one)| one.strong_count() > 0);
        let source = self.store().volume(&what.volume).map_err(|e| refused(&e));
        if let Some((of, open)) = scratches.get(text)
            // Since it was opened, another volume may have got the name.
            && source.as_ref().map_or(true, |source| source.id() == *of)
            && let Some(open) = open.upgrade()
        {
            return Ok(open);
        }
        let source = source?;
        // The instant that whoever only reads it has under this name.
        let instant = Instant::Seq(self.resolve(text, what, &source)?.seq);
        let at = VolumeAt { volume: what.volume.clone(), instant };
        let scratch = self.store().scratch(&source, &at.instant).map_err(|e| refused(&e))?;
        let volume = Arc::clone(scratch.volume());
        let export = Arc::new(VolumeExport {
            name: format!("{at}{SCRATCH}"),
            description: format!("a writable view of {at}, gone with its last connection"),
            device: Arc::clone(&volume) as _,
            volume,
            at: None,
            writable: true,
            store: self.store().clone(),
            _scratch: Some(scratch),
        });
        scratches.insert(text.to_owned(), (source.id(), Arc::downgrade(&export)));
        Ok(export)
    }
}

impl Exports for StoreExports {
    fn list(&self) -> Result<Vec<ExportEntry>, ExportError> {
        let mut entries = Vec::new();
        for volume in self.store().volumes() {
            let (name, size) = (&volume.name, volume.size_bytes);
            let description = format!("the present of volume {name}, {size} bytes");
            entries.push(ExportEntry { name: name.to_string(), description });
            entries.extend(volume.marks.iter().map(|mark| ExportEntry {
                name: format!("{name}@mark:{}", mark.label),
                description: format!("volume {name} at {}", Instant::Time(mark.time_ns)),
            }));
        }
        Ok(entries)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>, ExportError> {
        let name = if name.is_empty() { self.default_name()? } else { name.to_owned() };
        if let Some(instant) = name.strip_suffix(SCRATCH) {
            return Ok(self.open_scratch(instant, &parse(instant)?)?);
        }
        let what = parse(&name)?;
        if !name.contains('@') {
            return Ok(Arc::new(self.open_head(&what.volume)?));
        }
        Ok(Arc::new(self.open_past(&name, &what)?))
    }
}

/// A volume's head, or one of its instants. What is last is dropped last.
struct VolumeExport {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    volume: Arc<Volume>,
    /// None for what can be written.
    at: Option<Resolved>,
    writable: bool,
    store: Store,
    _scratch: Option<Scratch>,
}

impl Export for VolumeExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn multi_conn(&self) -> bool {
        // A flush makes everything acknowledged durable, whichever queue it came through; an instant never changes.
        true
    }

    fn contexts(&self) -> Vec<String> {
        let marks = self.store.marks(&self.volume);
        let since = marks.iter().map(|mark| format!("{SINCE}mark:{}", mark.label));
        std::iter::once(ALLOCATION.to_owned()).chain(since).collect()
    }

    fn context(&self, query: &str) -> Result<Option<Arc<dyn StatusContext>>, ExportError> {
        if query == ALLOCATION {
            return Ok(Some(Arc::new(Allocation::new(ALLOCATION, &self.volume, self.at))));
        }
        let Some(instant) = query.strip_prefix(SINCE) else { return Ok(None) };
        let now = jiff::Timestamp::now().to_zoned(TimeZone::UTC);
        let instant = Instant::parse(instant, &now)
            .map_err(|e| ExportError::new(ExportErrorKind::Invalid, e.to_string()))?;
        let from = self.store.resolve_of(&self.volume, &instant).map_err(|e| refused(&e))?;
        let held = self.volume.open_resolved(from).map_err(|e| refused(&e))?;
        Ok(Some(Arc::new(Changes::new(query, &self.volume, (from, held), self.at))))
    }
}
