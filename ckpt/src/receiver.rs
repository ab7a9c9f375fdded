//! The socket that a machine's memory arrives on, and the thread that stores it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cdp_store::Store;
use cdp_types::{BlockDevice, VmName};

use crate::firsts::Watch;
use crate::memory::{Control, MachineFacts, Progress, QueueStore, capacity_for, save_stream};
use crate::stream::{Limits, StreamReader};
use crate::{Error, ErrorKind, Place};

/// How long QEMU may take to connect once it was told to migrate.
const CONNECT: Duration = Duration::from_secs(20);
/// Between two looks for a connection.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long QEMU may send nothing. Memory is saved in one go; a live migration sends at least its rounds.
const SILENCE: Duration = Duration::from_secs(30);
/// The same before the first page: for a hot checkpoint QEMU first touches all of the guest's memory, so that there is
/// something everywhere that can be write-protected. The guest runs meanwhile, and the checkpoint can be cancelled.
const SETUP: Duration = Duration::from_secs(600);

/// What was stored.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Pages and bytes.
    pub progress: Progress,
    /// How much of the memory volume the image may take, in bytes.
    pub image_bytes: u64,
}

/// What all sides of a receiver share.
#[derive(Debug, Default)]
struct Shared {
    cancel: AtomicBool,
    /// What came could not be taken in, whatever QEMU says of it.
    failed: AtomicBool,
    received_pages: AtomicU64,
    total_pages: AtomicU64,
    stream: Mutex<Option<UnixStream>>,
}

impl Shared {
    fn stream(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Receives one machine's memory. Dropping it ends that: QEMU's migration fails, and what it has write-protected is free.
#[derive(Debug)]
pub struct Receiver {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Received, Error>>>,
}

impl Receiver {
    /// Listens at `path`, which must not be there, for this process's user alone, and stores what comes on the memory
    /// volume of `vm`. One that drains reads to the end of the stream, whatever becomes of what it has read. `watch` sees the
    /// first pages.
    ///
    /// # Errors
    /// If the socket or the thread cannot be made.
    pub fn listen(
        path: &Path,
        store: Store,
        vm: VmName,
        facts: MachineFacts,
        drains: bool,
        watch: Option<Watch>,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let shared = Arc::new(Shared::default());
        let mut receiver = Self { path: path.to_owned(), shared: Arc::clone(&shared), thread: None };
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let thread = std::thread::Builder::new().name("ckpt".to_owned());
        receiver.thread =
            Some(thread.spawn(move || receive(&listener, &shared, &store, &vm, facts, drains, watch))?);
        Ok(receiver)
    }

    /// Pages that have come, and pages of the machine; both zero before the first.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.shared.received_pages), read(&self.shared.total_pages))
    }

    /// Whether it has ended, well or not; or is about to, having failed.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_failed() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Whether it has failed by itself, so that there is nothing to wait for. One that drains has not.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// Stores nothing more.
    pub fn stop_storing(&self) {
        self.shared.cancel.store(true, Ordering::Relaxed);
    }

    /// Ends the connection: QEMU's migration fails, and nothing more is stored.
    pub fn cancel(&self) {
        self.stop_storing();
        if let Some(stream) = &*self.shared.stream() {
            // It may have ended by itself.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Waits for the end. Blocks.
    ///
    /// # Errors
    /// Those of [`save_stream`].
    pub fn join(mut self) -> Result<Received, Error> {
        let Some(thread) = self.thread.take() else { return Err(Error::cancelled()) };
        thread.join().unwrap_or_else(|_| {
            let what = "the thread that stores memory has died";
            Err(Error::new(ErrorKind::Store, Place::Nowhere, what))
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.cancel();
        }
        // QEMU may have removed nothing, and the next checkpoint has another name.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive(
    listener: &UnixListener,
    shared: &Shared,
    store: &Store,
    vm: &VmName,
    facts: MachineFacts,
    drains: bool,
    watch: Option<Watch>,
) -> Result<Received, Error> {
    let failed = |error: io::Error| {
        Error::new(ErrorKind::Stream, Place::Nowhere, "QEMU did not connect").because(error)
    };
    let stream = accept(listener, shared).map_err(failed)?;
    stream.set_nonblocking(false).map_err(failed)?;
    stream.set_read_timeout(Some(SETUP)).map_err(failed)?;
    *shared.stream() = Some(stream.try_clone().map_err(failed)?);
    let stored = save(&stream, shared, store, vm, facts, watch);
    match &stored {
        Ok(_) => {}
        Err(_) if drains => {
            // What it says does not matter any more, nor that it breaks off.
            let _ = io::copy(&mut &stream, &mut io::sink());
        }
        Err(error) => {
            // First, so that whoever hears of QEMU's failure finds the cause of it.
            shared.failed.store(is_ours(error.kind()), Ordering::Release);
            // `Shared` keeps the socket open, and nobody reads: QEMU would wait for room in it, and the guest for QEMU.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
    stored
}

/// Whether a receiver that failed so is the cause, rather than a witness of what QEMU did.
pub(crate) fn is_ours(kind: ErrorKind) -> bool {
    !matches!(kind, ErrorKind::Truncated | ErrorKind::Stream | ErrorKind::Cancelled)
}

/// Stores what comes over a connection.
fn save(
    stream: &UnixStream,
    shared: &Shared,
    store: &Store,
    vm: &VmName,
    facts: MachineFacts,
    watch: Option<Watch>,
) -> Result<Received, Error> {
    if shared.cancel.load(Ordering::Relaxed) {
        return Err(Error::cancelled());
    }
    let limits = Limits::default();
    let reader = StreamReader::open(stream, limits)?;
    let reader = match watch {
        Some(watch) => reader.watched(watch),
        None => reader,
    };
    // Slots that earlier images have left stay where they are, so there is room for all of it once more.
    let wanted = capacity_for(reader.blocks(), limits.device_bytes as u64).saturating_mul(2);
    let full = |error: cdp_store::Error| {
        Error::new(ErrorKind::Store, Place::Nowhere, "making room for the memory").because(error)
    };
    let memory = store.memory_volume(vm, wanted).map_err(full)?;
    let image_bytes = memory.info().capacity;
    let pages = QueueStore::open(memory as Arc<dyn BlockDevice>)?;
    let mut begun = false;
    let mut tell = |progress: &Progress| {
        if !begun && progress.received > 0 {
            begun = true;
            // One that cannot be shortened only makes a QEMU that hangs be noticed later.
            let _ = stream.set_read_timeout(Some(SILENCE));
        }
        shared.received_pages.store(progress.received, Ordering::Relaxed);
        shared.total_pages.store(progress.total, Ordering::Relaxed);
    };
    let mut control = Control { cancel: &shared.cancel, progress: &mut tell };
    let (pages, progress) = save_stream(reader, pages, facts, &mut control)?;
    // Its queue must be closed before the checkpoint is committed.
    drop(pages);
    Ok(Received { progress, image_bytes })
}

fn accept(listener: &UnixListener, shared: &Shared) -> io::Result<UnixStream> {
    let by = Instant::now() + CONNECT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if shared.cancel.load(Ordering::Relaxed) => {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "given up"));
            }
            Err(_) if Instant::now() >= by => {
                let text = format!("no connection within {CONNECT:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}
