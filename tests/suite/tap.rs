//! Between the daemon and QEMU's control socket: it passes on what they say, and holds them at a chosen line, so that
//! one of them can be killed in just that state.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// Who says a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Daemon,
    Qemu,
}

/// The first line of a side with this text in it, before the other side hears it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(pub(crate) Side, pub(crate) &'static str);

/// What to do with a line that is held.
enum Verdict {
    PassOn,
    HangUp,
}

/// A line that is held. Dropping this ends its connection, and the line is lost.
pub(crate) struct Held(Sender<Verdict>);

impl Held {
    /// Lets it go on after all.
    pub(crate) fn pass_on(self) {
        // The connection may have ended meanwhile.
        let _ = self.0.send(Verdict::PassOn);
    }
}

#[derive(Default)]
struct Trap {
    armed: Option<(Moment, Sender<Held>)>,
}

/// A socket in front of QEMU's; it lives as long as this process.
pub(crate) struct Tap {
    trap: Arc<Mutex<Trap>>,
}

impl Tap {
    /// Listens at `path` for those who want to speak with the QEMU whose socket is `qemu`.
    pub(crate) fn listen(path: &Path, qemu: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(path)?;
        let trap = Arc::<Mutex<Trap>>::default();
        let ours = Arc::clone(&trap);
        std::thread::spawn(move || {
            for daemon in listener.incoming().map_while(Result::ok) {
                // Without QEMU the connection just ends.
                let Ok(qemu) = UnixStream::connect(&qemu) else { continue };
                for (side, from, to) in [(Side::Daemon, &daemon, &qemu), (Side::Qemu, &qemu, &daemon)] {
                    let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { continue };
                    let trap = Arc::clone(&ours);
                    std::thread::spawn(move || pump(side, &from, &to, &trap));
                }
            }
        });
        Ok(Self { trap })
    }

    /// Sets the trap.
    pub(crate) fn hold_at(&self, moment: Moment) -> Caught {
        let (sender, receiver) = channel();
        self.trap.lock().unwrap_or_else(PoisonError::into_inner).armed = Some((moment, sender));
        Caught { moment, receiver }
    }
}

/// A trap that was set.
pub(crate) struct Caught {
    moment: Moment,
    receiver: Receiver<Held>,
}

impl Caught {
    /// Waits for its moment.
    pub(crate) fn wait(self, limit: Duration) -> Result<Held> {
        self.receiver.recv_timeout(limit).with_context(|| format!("nobody has said {:?}", self.moment))
    }
}

/// Passes lines on until one side has gone, or a trap hangs up.
fn pump(side: Side, from: &UnixStream, mut to: &UnixStream, trap: &Mutex<Trap>) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        if matches!(held(side, &line, trap), Verdict::HangUp) || to.write_all(&line).is_err() {
            break;
        }
        line.clear();
    }
    for stream in [from, to] {
        // It may have gone by itself.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn held(side: Side, line: &[u8], trap: &Mutex<Trap>) -> Verdict {
    let mut trap = trap.lock().unwrap_or_else(PoisonError::into_inner);
    let said = |moment: &Moment| moment.0 == side && String::from_utf8_lossy(line).contains(moment.1);
    let Some((_, caught)) = trap.armed.take_if(|(moment, _)| said(moment)) else { return Verdict::PassOn };
    drop(trap);
    let (decide, verdict) = channel();
    if caught.send(Held(decide)).is_err() {
        return Verdict::PassOn;
    }
    verdict.recv().unwrap_or(Verdict::HangUp)
}
