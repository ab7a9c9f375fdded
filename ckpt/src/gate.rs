//! The cut: all disks of a machine stand still, and their epoch is cut before QEMU hears that the last ring stopped.
//!
//! One gate watches all disks that are served, since a machine can be registered while its guest runs. It knows which
//! rings run; an epoch is *armed* at it, and cut by whichever disk's thread reports the last ring's stop. What must
//! hold from the cut on begins there too: the guard of guest memory, where memory is saved while the guest runs.
//!
//! A cut is only a candidate. Whether the stop was that of the checkpoint's own migration is for
//! [`crate::take`] to say, from QEMU's events.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use cdp_store::{Epoch, EpochCut, Store};
use cdp_types::{RingStop, VmControl};
use tokio::sync::mpsc::UnboundedSender;

use crate::firsts::Ahead;

/// Says whether a disk's guest has turned its write cache off, or may have.
pub type WriteCacheOff = Arc<dyn Fn() -> bool + Send + Sync>;

/// What a guard tells of trouble, in words.
pub type OnTrouble = Box<dyn FnOnce(String) + Send>;

/// Why guest memory cannot be guarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unguarded {
    /// What is in the way.
    pub why: String,
    /// What cures it.
    pub cure: String,
    /// The process whose memory it is, as far as that is known.
    pub pid: Option<i32>,
}

impl fmt::Display for Unguarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.why, self.cure)
    }
}

/// The guest-memory guard of one disk, as its server has it.
pub trait DiskGuard: Send + Sync {
    /// Finds out whether memory can be guarded, before the guest is stopped: whose it is. May take a while.
    ///
    /// # Errors
    /// What is in the way, and what cures it.
    fn prepare(&self) -> Result<i32, Unguarded>;

    /// Opens a window, which is closed when what this returns is dropped, and has these pages touched while it is open,
    /// by others. Quick.
    ///
    /// # Errors
    /// As `prepare`.
    fn open(&self, on_trouble: OnTrouble, ahead: &Ahead) -> Result<Box<dyn Send>, String>;
}

/// What happens at the gate while an epoch is armed.
#[derive(Debug)]
pub enum GateEvent {
    /// It was cut.
    Cut {
        /// What was cut.
        cut: EpochCut,
        /// When the machine's last ring stopped, by the system's clock, in microseconds since 1970; none if it did not stop for
        /// this cut, since none has run.
        still_us: Option<u64>,
    },
    /// It cannot be cut any more, or what was cut counts for nothing.
    Void {
        /// Why.
        why: String,
        /// Nothing is wrong: another try may come through.
        passing: bool,
    },
}

impl GateEvent {
    /// Something that the guest or an operator did in the wrong moment.
    fn passing(why: impl Into<String>) -> Self {
        Self::Void { why: why.into(), passing: true }
    }

    /// Something that has failed.
    fn failed(why: impl Into<String>) -> Self {
        Self::Void { why: why.into(), passing: false }
    }
}

/// A disk, by its socket: which of its rings run.
#[derive(Debug, Default)]
struct Disk {
    rings: BTreeSet<u16>,
}

/// An epoch that waits for its cut, or has been cut and whose machine is being saved.
struct Armed {
    epoch: Epoch,
    sockets: Vec<PathBuf>,
    write_caches: Vec<WriteCacheOff>,
    /// Of all disks, if memory is saved while the guest runs.
    guards: Vec<Arc<dyn DiskGuard>>,
    ahead: Ahead,
    tell: UnboundedSender<GateEvent>,
    cut: bool,
    /// Whether a ring of the machine has run since the cut.
    went_on: bool,
    /// Whether a ring of the machine has run since.
    ran: bool,
    windows: Vec<Box<dyn Send>>,
}

#[derive(Default)]
struct State {
    disks: BTreeMap<PathBuf, Disk>,
    /// By ticket.
    armed: BTreeMap<u64, Armed>,
    next_ticket: u64,
}

/// Watches the rings of all disks that are served.
pub struct Gate {
    store: Store,
    state: Mutex<State>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

/// Holds an epoch armed, and its windows open. Dropping it ends both.
#[must_use]
pub struct Ticket {
    gate: Arc<Gate>,
    number: u64,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.number).finish()
    }
}

/// How an epoch is armed.
pub struct Arming {
    /// What is to be cut.
    pub epoch: Epoch,
    /// The sockets of the machine's disks.
    pub sockets: Vec<PathBuf>,
    /// Their write caches, in the order of the epoch's members.
    pub write_caches: Vec<WriteCacheOff>,
    /// Their guards, if memory is saved while the guest runs; else none.
    pub guards: Vec<Arc<dyn DiskGuard>>,
    /// What is touched for the guest, by one of the guards.
    pub ahead: Ahead,
    /// The machine stands still already: the cut is made at once.
    pub paused: bool,
    /// Who is told.
    pub tell: UnboundedSender<GateEvent>,
}

impl Gate {
    /// A gate at which nothing is armed.
    #[must_use]
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, state: Mutex::default() })
    }

    /// Arms an epoch: it is cut when the machine's last ring stops.
    pub fn arm(self: &Arc<Self>, arming: Arming) -> Ticket {
        let Arming { epoch, sockets, write_caches, guards, ahead, paused, tell } = arming;
        let armed = Armed {
            epoch,
            sockets,
            write_caches,
            guards,
            ahead,
            tell,
            cut: false,
            went_on: false,
            ran: false,
            windows: Vec::new(),
        };
        let mut state = self.state();
        let number = state.next_ticket;
        state.next_ticket += 1;
        state.armed.insert(number, armed);
        if paused && state.is_still(number) {
            self.cut(&mut state, number, None);
        }
        drop(state);
        Ticket { gate: Arc::clone(self), number }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last ring of a machine's last disk has stopped. A machine that stood still before, and has gone on since,
    /// does so twice: a guest's driver has reset a disk, say, and nobody knows which stop was the migration's.
    fn stands_still(&self, state: &mut State, number: u64) {
        match state.armed.get(&number) {
            Some(armed) if armed.cut && armed.went_on => {
                let why = "the disks were stopped twice while the machine was saved";
                let _ = armed.tell.send(GateEvent::passing(why));
            }
            _ => self.cut(state, number, Some(now_us())),
        }
    }

    /// Cuts, and opens the windows in the same moment: no ring runs, and none can start before this returns.
    fn cut(&self, state: &mut State, number: u64, still_us: Option<u64>) {
        let Some(armed) = state.armed.get_mut(&number).filter(|armed| !armed.cut) else { return };
        armed.cut = true;
        let event = match self.store.cut_epoch(&armed.epoch) {
            Err(error) => GateEvent::failed(error.to_string()),
            Ok(mut cut) => {
                // A guest that goes on from here, in another QEMU, does not say it again.
                for (member, is_off) in cut.members.iter_mut().zip(&armed.write_caches) {
                    member.write_cache_off = is_off();
                }
                match open_windows(armed) {
                    Ok(()) => GateEvent::Cut { cut, still_us },
                    Err(why) => {
                        armed.windows.clear();
                        GateEvent::failed(why)
                    }
                }
            }
        };
        // Nobody listens only if the checkpoint has been given up.
        let _ = armed.tell.send(event);
    }

    /// Does something to what is armed for a disk.
    fn each_armed(state: &mut State, socket: &Path, mut act: impl FnMut(&mut Armed)) {
        let concerned = state.armed.values_mut().filter(|armed| armed.sockets.iter().any(|s| s == socket));
        concerned.for_each(&mut act);
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn open_windows(armed: &mut Armed) -> Result<(), String> {
    // All disks share the guest's memory.
    let mut ahead = std::mem::take(&mut armed.ahead);
    for guard in &armed.guards {
        let tell = armed.tell.clone();
        let on_trouble: OnTrouble = Box::new(move |why| drop(tell.send(GateEvent::failed(why))));
        armed.windows.push(guard.open(on_trouble, &std::mem::take(&mut ahead))?);
    }
    Ok(())
}

impl State {
    /// Whether no ring of an armed machine runs.
    fn is_still(&self, number: u64) -> bool {
        let runs = |socket: &PathBuf| self.disks.get(socket).is_some_and(|disk| !disk.rings.is_empty());
        self.armed.get(&number).is_some_and(|armed| !armed.sockets.iter().any(runs))
    }
}

impl Ticket {
    /// Cuts an epoch that was not cut because no ring of the machine has run since it was armed: the guest uses its
    /// disks not at all, and any moment since then is as good.
    pub fn cut_if_unused(&self) {
        let mut state = self.gate.state();
        let unused = state.armed.get(&self.number).is_some_and(|armed| !armed.ran && !armed.cut);
        if unused && state.is_still(self.number) {
            self.gate.cut(&mut state, self.number, None);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let armed = self.gate.state().armed.remove(&self.number);
        // Windows close without the lock: what waits in them goes on, and may report to this gate.
        drop(armed);
    }
}

impl VmControl for Gate {
    fn ring_started(&self, socket: &Path, ring: u16) {
        let mut state = self.state();
        state.disks.entry(socket.to_owned()).or_default().rings.insert(ring);
        Self::each_armed(&mut state, socket, |armed| {
            armed.ran = true;
            armed.went_on |= armed.cut;
            if armed.cut && armed.guards.is_empty() {
                let _ = armed.tell.send(GateEvent::passing("the machine went on before it was saved"));
            }
        });
    }

    fn ring_stopped(&self, socket: &Path, ring: u16, why: RingStop, last: bool) {
        let mut state = self.state();
        let Some(disk) = state.disks.get_mut(socket) else { return };
        disk.rings.remove(&ring);
        let void: Option<fn() -> GateEvent> = match why {
            RingStop::Asked => None,
            RingStop::Reset => Some(|| GateEvent::passing("a disk was reset")),
            RingStop::Failed => Some(|| GateEvent::failed("a disk could not be used")),
        };
        if let Some(void) = void {
            Self::each_armed(&mut state, socket, |armed| drop(armed.tell.send(void())));
            return;
        }
        if !last {
            return;
        }
        let concerned = |(_, armed): &(&u64, &Armed)| armed.sockets.iter().any(|s| s == socket);
        let tickets: Vec<u64> = state.armed.iter().filter(concerned).map(|(number, _)| *number).collect();
        for number in tickets.into_iter().filter(|number| state.is_still(*number)).collect::<Vec<_>>() {
            self.stands_still(&mut state, number);
        }
    }

    fn memory_changed(&self, _socket: &Path) {
        // The guard knows its memory by itself.
    }

    fn disconnected(&self, socket: &Path) {
        let mut state = self.state();
        state.disks.remove(socket);
        Self::each_armed(&mut state, socket, |armed| {
            let _ = armed.tell.send(GateEvent::failed("the connection to a disk was lost"));
        });
    }
}
