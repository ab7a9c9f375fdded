//! A disk for trying checkpoints: `cutdisk SOCKET DATA CONTROL guarded|unguarded [QUEUES]` serves the file DATA, and takes
//! commands, a line each, on the socket CONTROL:
//!
//! - `arm COPY`: when the last ring has stopped next, DATA is copied to COPY and, if guarded, a window of the guard of
//!   guest memory is opened, before the front end hears of the stop;
//! - `close`: the window is closed. Answers with what the guard did.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cdp_types::{MemoryConfig, MemoryDevice, RingStop, VmControl};
use vhost_blk::{Guard, Server, ServerConfig, Window};

struct Cut {
    data: PathBuf,
    armed: Mutex<Option<PathBuf>>,
    /// None if the window shall not be opened, to see what happens then.
    guard: OnceLock<Arc<Guard>>,
    window: Mutex<Option<Window>>,
}

impl VmControl for Cut {
    fn ring_started(&self, _socket: &Path, _ring: u16) {}

    fn ring_stopped(&self, _socket: &Path, _ring: u16, why: RingStop, last: bool) {
        let Some(copy) = locked(&self.armed).take_if(|_| last && why == RingStop::Asked) else { return };
        if let Err(error) = std::fs::copy(&self.data, &copy) {
            tracing::error!("{}: {error}", copy.display());
        }
        let trouble = |trouble| tracing::error!("the window is in trouble: {trouble}");
        match self.guard.get().map(|guard| guard.open(trouble)) {
            None => {}
            Some(Ok(window)) => *locked(&self.window) = Some(window),
            Some(Err(refusal)) => tracing::error!("the window is not open: {refusal}"),
        }
    }

    fn memory_changed(&self, _socket: &Path) {}
    fn disconnected(&self, _socket: &Path) {}
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, data, control, mode, queues @ ..] = &arguments[..] else {
        return Err("usage: cutdisk SOCKET DATA CONTROL guarded|unguarded [QUEUES]".into());
    };
    let queues = queues.first().map_or(Ok(1), |number| number.parse())?;
    let file = OpenOptions::new().read(true).write(true).open(data)?;
    let config = MemoryConfig::new(file.metadata()?.len());
    let journal =
        File::options().read(true).write(true).create(true).truncate(true).open(format!("{data}.journal"))?;
    let disk = Arc::new(MemoryDevice::in_files(config, file, journal)?);
    let cut = Arc::new(Cut {
        data: data.into(),
        armed: Mutex::default(),
        guard: OnceLock::new(),
        window: Mutex::default(),
    });
    let config = ServerConfig { queues, ..ServerConfig::new(socket) };
    let server = Server::bind(config, disk, Arc::clone(&cut) as _)?;
    let guard = server.guard();
    if mode == "guarded" {
        let _ = cut.guard.set(Arc::clone(&guard));
    }
    for client in UnixListener::bind(control)?.incoming() {
        let mut client = client?;
        let mut line = String::new();
        BufReader::new(client.try_clone()?).read_line(&mut line)?;
        let answer = match line.trim_end().split_once(' ') {
            Some(("arm", copy)) => {
                *locked(&cut.armed) = Some(copy.into());
                guard
                    .prepare()
                    .map_or_else(|refusal| format!("refused: {refusal}"), |target| format!("{target:?}"))
            }
            _ => {
                let stats = guard.stats();
                drop(locked(&cut.window).take());
                format!("{stats:?}")
            }
        };
        writeln!(client, "{answer}")?;
    }
    Ok(())
}
