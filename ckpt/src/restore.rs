//! Putting a machine's memory and devices back: into a QEMU that was started with `-incoming defer`.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cdp_store::Store;
use cdp_types::{CheckpointId, one_line};
use qmp_bridge::machine::{self, Machine};
use qmp_bridge::{Client, MigrationStatus, control, migration};
use serde_json::json;

use crate::ErrorKind;
use crate::memory::{Control, Progress, QueueStore, Restorer};

/// How long QEMU may take nothing, and how long to end once it has everything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Counts restores, for the names of their sockets.
static RESTORES: AtomicU64 = AtomicU64::new(1);

/// Why a machine was not restored.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RestoreError(String);

fn error(what: impl std::error::Error) -> RestoreError {
    RestoreError(one_line(&what))
}

/// What the machine was when a checkpoint was taken, and how it differs from the QEMU that is to take it over: nothing
/// if it fits. Nothing is touched.
///
/// # Errors
/// The checkpoint's image cannot be read, or QEMU cannot be asked.
pub async fn differences(store: &Store, id: CheckpointId, qmp: &Client) -> Result<Vec<String>, RestoreError> {
    let (store, now) = (store.clone(), machine::describe(qmp).await.map_err(error)?);
    let facts = on_thread(move || {
        let opened = open(&store, id)?;
        Ok(opened.image().facts.clone())
    })
    .await?;
    let then: Option<Machine> =
        facts.more.get("machine").cloned().and_then(|v| serde_json::from_value(v).ok());
    let Some(then) = then else { return Ok(Vec::new()) };
    let fatal = then.differences(&now).into_iter().filter(|difference| difference.fatal);
    Ok(fatal.map(|difference| difference.to_string()).collect())
}

/// Streams a checkpoint's memory and devices into a QEMU that waits for it (`-incoming defer`), and lets the machine
/// run. Its disks must have been put back to the checkpoint's epoch before. `directory` is for the socket.
///
/// # Errors
/// The QEMU does not wait, the image cannot be read, or QEMU refuses it. The machine must not be continued then.
pub async fn restore(
    store: &Store,
    id: CheckpointId,
    qmp: &Client,
    directory: &Path,
    run: bool,
) -> Result<Progress, RestoreError> {
    check_waiting(qmp).await?;
    let (opening, at) = (store.clone(), id);
    let restorer = on_thread(move || open(&opening, at)).await?;
    let path = socket_of_its_own(directory);
    // One of a process that was killed.
    let _ = std::fs::remove_file(&path);
    let uri = format!("unix:{}", path.display());
    // QEMU listens there from now on, for one connection.
    qmp.execute_raw("migrate-incoming", json!({ "uri": uri })).await.map_err(error)?;
    let socket = path.clone();
    let sent = on_thread(move || send(restorer, &socket)).await;
    let _ = std::fs::remove_file(&path);
    let ended = migration::settled(qmp, PATIENCE).await;
    // What could not be read is the reason for whatever QEMU says or does not say after it. Of what it did not take, it may say
    // why, if it is still there.
    let progress = sent.map_err(|sent| match ended.as_ref().ok().and_then(|ended| ended.error.as_ref()) {
        Some(why) => RestoreError(format!("{sent}; QEMU says: {why}")),
        None => sent,
    })?;
    let ended = ended.map_err(error)?;
    if ended.status != MigrationStatus::Completed {
        let why = ended.error.unwrap_or_else(|| format!("its migration is '{}'", ended.status));
        return Err(RestoreError(format!("QEMU has not taken the machine over: {why}")));
    }
    if run {
        control::run_again(qmp).await.map_err(error)?;
    }
    Ok(progress)
}

/// Where a QEMU is to listen. Each on a socket of its own: several machines can be given one checkpoint at a time.
fn socket_of_its_own(directory: &Path) -> PathBuf {
    directory.join(format!("restore-{}.sock", RESTORES.fetch_add(1, Ordering::Relaxed)))
}

/// Refuses a QEMU that was not started with `-incoming defer`.
///
/// # Errors
/// It was not, or cannot be asked.
pub async fn check_waiting(qmp: &Client) -> Result<(), RestoreError> {
    let state = control::run_state(qmp).await.map_err(error)?;
    if state.is_incoming() {
        return Ok(());
    }
    let status = state.status;
    let why = format!("QEMU does not wait for a machine (it is '{status}'): start it with -incoming defer");
    Err(RestoreError(why))
}

fn open(store: &Store, id: CheckpointId) -> Result<Restorer<QueueStore>, RestoreError> {
    let memory = store.checkpoint_memory(id).map_err(error)?;
    let never = AtomicBool::new(false);
    let mut control = Control { cancel: &never, progress: &mut |_| {} };
    let pages = QueueStore::open(Arc::clone(&memory)).map_err(error)?;
    Restorer::open(pages, &mut control).map_err(error)
}

fn send(restorer: Restorer<QueueStore>, path: &Path) -> Result<Progress, RestoreError> {
    let stream = UnixStream::connect(path).map_err(|e| RestoreError(format!("{}: {e}", path.display())))?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(error)?;
    let never = AtomicBool::new(false);
    let mut control = Control { cancel: &never, progress: &mut |_| {} };
    let sent = restorer.stream_to(stream, &mut control).map(|(_, progress)| progress);
    sent.map_err(|e| match e.kind() {
        ErrorKind::Stream => {
            let text = "QEMU does not take the machine over, and may have said why on its standard error";
            RestoreError(format!("{text}: {}", one_line(&e)))
        }
        _ => error(e),
    })
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(error(e)))
}
