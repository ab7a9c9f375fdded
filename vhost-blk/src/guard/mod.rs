//! The guest-memory guard: before the device's first write to a page, QEMU has saved that page.
//!
//! QEMU's background snapshot protects *its own mapping* of guest memory against writes and saves each page before
//! it lets a write through. We write through another mapping, where nothing is protected, so what we write would
//! enter the image though it belongs to a later instant. While a *window* is open, each page is therefore *touched*
//! before the device first writes to it: one byte that belongs to the device is written over itself through QEMU's
//! mapping. That meets the protection; QEMU saves the page, lifts the protection, and never sets it again in this
//! window. From then on all our ways of writing to that page are safe.
//!
//! - A touch blocks until QEMU's saver has come round, so it runs on a *helper* thread. A request that needs touches
//!   is parked; its ring's thread goes on and hears of the end by mail ([`Mailbox`]).
//! - A page counts as touched only after the touch has returned, and until the window is closed.
//! - What waits for touches is done when the window closes, except what a touch is still in the kernel for: such a
//!   request or ring waits for that, because two writers of one byte are one too many. So does the drain of a ring; only
//!   when the front end has gone, or this server ends, a ring is given up with a touch in the kernel.
//! - A window belongs to whoever opened it ([`Window`]) and closes with its handle.
//! - If touches stop ending, or one cannot be made, whoever opened the window is told, once. Nothing is ever written
//!   unguarded while the window is open.
//!
//! What the guest itself will write soon can be touched *ahead* ([`Window::touch_ahead`]); that is for speed alone.
//!
//! Each disk has a guard of its own. That is sound: a page that two of them touch is touched twice.

mod ahead;
mod helpers;
mod owner;
mod refusal;
mod touched;
mod window;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::eventfd::EventFd;
use crate::guest::MemoryMap;

pub use ahead::FilePage;
use owner::Owner;
pub(crate) use owner::{PAGE, Page, RegionGuard};
pub use refusal::{GuardRefusal, GuardTrouble};
pub use window::Window;

/// Whose memory a guest runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardTarget {
    /// The process.
    pub pid: i32,
    /// What it calls itself.
    pub command: String,
    /// Bytes of guest memory.
    pub bytes: u64,
}

/// What a guard has done since its server was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardStats {
    /// Whether a window is open.
    pub open: bool,
    /// Windows opened.
    pub windows: u64,
    /// Pages touched.
    pub touches: u64,
    /// Touches among them that took more than 20 µs: QEMU had to save the page first.
    pub slow_touches: u64,
    /// Requests and rings that wait for touches now.
    pub waiting: u64,
    /// The longest that one has waited, in microseconds.
    pub longest_wait_us: u64,
}

/// Called once for a window in which something has gone wrong.
type OnTrouble = Box<dyn FnOnce(GuardTrouble) + Send>;

/// The guard of one served disk.
pub struct Guard {
    /// The socket, as log lines name it.
    name: Arc<str>,
    /// How long touches may make no progress while something waits for them.
    deadline: Duration,
    /// The open window; 0 without one. Changed under the lock, together with `State::window`.
    open: AtomicU64,
    /// The server ends: what waits for touches is given up.
    abandoned: AtomicBool,
    windows: AtomicU64,
    touches: AtomicU64,
    slow_touches: AtomicU64,
    longest_wait_us: AtomicU64,
    state: Mutex<State>,
    /// There are jobs, or the window is closed.
    work: Condvar,
    /// Something waits that did not, or the window is closed.
    tick: Condvar,
}

struct State {
    memory: Arc<MemoryMap>,
    /// Whom the connection's socket names as its peer; 0 if unknown.
    peer: i32,
    /// Whose this connection's memory was when it was last looked up; 0 before. Memory that is shared anew is his too.
    last_owner: i32,
    /// Rings that have been started and not stopped.
    rings: usize,
    /// The open window.
    window: Option<u64>,
    on_trouble: Option<OnTrouble>,
    /// Waiting for a helper.
    jobs: VecDeque<Waiting>,
    /// Cannot be done in this window.
    held: Vec<Waiting>,
    /// Jobs that have not ended: those above and those in a helper's hands.
    waiting: u64,
    progress: Instant,
    mailboxes: Vec<Weak<Mailbox>>,
}

/// Pages to be touched for one request or ring.
pub(crate) struct Job {
    pub(crate) pages: Vec<Page>,
    pub(crate) mail: Arc<Mailbox>,
    /// What the mail says.
    pub(crate) token: u64,
}

struct Waiting {
    job: Job,
    since: Instant,
}

/// Where a ring's thread hears that touches have ended.
pub(crate) struct Mailbox {
    tokens: Mutex<Vec<u64>>,
    wake: EventFd,
    /// The ring has ended: its pages are the guest's again.
    dead: AtomicBool,
}

impl Mailbox {
    /// Mail wakes whoever waits for `wake`.
    pub(crate) fn new(wake: EventFd) -> Self {
        Self { tokens: Mutex::default(), wake, dead: AtomicBool::new(false) }
    }

    /// Takes what has come.
    pub(crate) fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *locked(&self.tokens))
    }

    /// Says that nobody reads the mail any more: no touch is begun for this ring from now on. One that is in the kernel
    /// may come to its end later, if the ring was given up.
    pub(crate) fn close(&self) {
        self.dead.store(true, Ordering::Release);
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    fn put(&self, token: u64) {
        locked(&self.tokens).push(token);
        self.wake.signal();
    }
}

impl Guard {
    pub(crate) fn new(name: Arc<str>, deadline: Duration) -> Self {
        let state = State {
            memory: Arc::default(),
            peer: 0,
            last_owner: 0,
            rings: 0,
            window: None,
            on_trouble: None,
            jobs: VecDeque::new(),
            held: Vec::new(),
            waiting: 0,
            progress: Instant::now(),
            mailboxes: Vec::new(),
        };
        Self {
            name,
            deadline,
            open: AtomicU64::new(0),
            abandoned: AtomicBool::new(false),
            windows: AtomicU64::new(0),
            touches: AtomicU64::new(0),
            slow_touches: AtomicU64::new(0),
            longest_wait_us: AtomicU64::new(0),
            state: Mutex::new(state),
            work: Condvar::new(),
            tick: Condvar::new(),
        }
    }

    /// Finds whose the guest's memory is, and checks that it can be touched. May look through all processes of the
    /// machine: call it before the guest is stopped.
    ///
    /// # Errors
    /// What is in the way, and what cures it.
    pub fn prepare(&self) -> Result<GuardTarget, GuardRefusal> {
        let (memory, owner) = self.own()?;
        let bytes = memory.region_guards().iter().map(|region| region.len()).sum();
        Ok(GuardTarget { pid: owner.pid(), command: owner.command(), bytes })
    }

    /// Opens a window: from now on, until the [`Window`] is dropped, no page is written that was not touched. Call it
    /// while the guest is stopped and before QEMU protects its memory, for all disks of the machine: inside
    /// [`cdp_types::VmControl::ring_stopped`]. A touch before the protection is there counts for nothing, so no ring may
    /// be started in between. Quick if [`Guard::prepare`] was called and the memory is the same, or still the same
    /// process's.
    ///
    /// `on_trouble` is called at most once, from any thread, without a lock held; see [`GuardTrouble`]. It must not
    /// block: it may be a thread that touches that calls it, or the one that stops the server.
    ///
    /// # Errors
    /// As `prepare`; and if a ring runs, or a window is open.
    pub fn open(
        self: &Arc<Self>,
        on_trouble: impl FnOnce(GuardTrouble) + Send + 'static,
    ) -> Result<Window, GuardRefusal> {
        let (memory, _) = self.own()?;
        let mut state = locked(&self.state);
        if state.window.is_some() {
            return Err(GuardRefusal::AlreadyOpen);
        }
        if state.rings > 0 {
            return Err(GuardRefusal::RingsRunning);
        }
        if !Arc::ptr_eq(&state.memory, &memory) {
            // It has just been changed, so the guest is not stopped.
            return Err(GuardRefusal::RingsRunning);
        }
        let id = self.windows.fetch_add(1, Ordering::Relaxed) + 1;
        // No ring runs, so nobody looks at these; and a helper that comes back from an earlier window sets nothing.
        memory.region_guards().iter().for_each(|region| region.touched().clear());
        state.window = Some(id);
        state.on_trouble = Some(Box::new(on_trouble));
        // A helper of an earlier window may still be in the kernel; its wait is not this window's.
        state.progress = Instant::now();
        self.open.store(id, Ordering::Release);
        drop(state);
        let window = Window::new(self, id);
        helpers::spawn(self, id)?;
        Ok(window)
    }

    /// Closes this window, if it is the open one. What waits goes on.
    fn close(&self, id: u64) {
        let mut state = locked(&self.state);
        if state.window != Some(id) {
            return;
        }
        state.window = None;
        self.open.store(0, Ordering::Release);
        let listener = state.on_trouble.take();
        let waiting = state.take_waiting();
        drop(state);
        self.work.notify_all();
        self.tick.notify_all();
        drop(listener);
        waiting.into_iter().for_each(|waiting| self.finish(&waiting));
    }

    /// Whether a window is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        // A ring starts after the window was opened, by way of the lock, so it cannot miss that. It may see the end
        // late, and then touches more than it need.
        self.open.load(Ordering::Relaxed) != 0
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> GuardStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GuardStats {
            open: self.is_open(),
            windows: read(&self.windows),
            touches: read(&self.touches),
            slow_touches: read(&self.slow_touches),
            waiting: locked(&self.state).waiting,
            longest_wait_us: read(&self.longest_wait_us),
        }
    }

    /// A front end has connected; `peer` is whom its socket names.
    pub(crate) fn connected(&self, peer: i32) {
        locked(&self.state).peer = peer;
    }

    /// The connection has ended: no ring is there any more, and there is no memory. What is not in a helper's hands is
    /// not touched any more.
    pub(crate) fn disconnected(&self) {
        let mut state = locked(&self.state);
        let memory = std::mem::take(&mut state.memory);
        (state.peer, state.last_owner, state.rings) = (0, 0, 0);
        let waiting = state.take_waiting();
        // Both may be the last to hold mappings.
        drop(state);
        drop((memory, waiting));
    }

    /// The guest's memory is another. An open window goes on: new regions begin untouched, and whose they are is
    /// found at their first touch.
    pub(crate) fn set_memory(&self, memory: &Arc<MemoryMap>) {
        locked(&self.state).memory = Arc::clone(memory);
    }

    /// A ring is about to be started: either it sees the window, or the window is refused.
    pub(crate) fn ring_starts(&self) {
        locked(&self.state).rings += 1;
    }

    /// A ring has stopped, or was not started.
    pub(crate) fn ring_stopped(&self) {
        let mut state = locked(&self.state);
        state.rings = state.rings.saturating_sub(1);
    }

    /// Has a ring's thread woken when what it waits for is given up.
    pub(crate) fn register(&self, mailbox: &Arc<Mailbox>) {
        let mut state = locked(&self.state);
        state.mailboxes.retain(|mailbox| mailbox.strong_count() > 0);
        state.mailboxes.push(Arc::downgrade(mailbox));
    }

    /// Has the pages touched; mail comes when it is done, or when the window is closed.
    pub(crate) fn touch(&self, job: Job) {
        let waiting = Waiting { job, since: Instant::now() };
        let mut state = locked(&self.state);
        if state.window.is_none() {
            drop(state);
            return self.finish(&waiting);
        }
        if state.waiting == 0 {
            state.progress = Instant::now();
            self.tick.notify_one();
        }
        state.waiting += 1;
        state.jobs.push_back(waiting);
        drop(state);
        self.work.notify_one();
    }

    /// Whether what waits for touches is given up.
    pub(crate) fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Says that the server is being stopped, if a window is open: the disk will not be there to its end.
    pub(crate) fn stopping(&self) {
        let window = locked(&self.state).window;
        if let Some(window) = window {
            self.trouble(window, GuardTrouble::Stopping);
        }
    }

    /// Gives up what waits for touches: it stays in the in-flight region for the next server. Helpers that are in the
    /// kernel are left there; they end with QEMU's protection or with this process.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        let mailboxes: Vec<_> = locked(&self.state).mailboxes.iter().filter_map(Weak::upgrade).collect();
        mailboxes.iter().for_each(|mailbox| mailbox.wake.signal());
    }

    fn trouble(&self, window: u64, trouble: GuardTrouble) {
        let listener = {
            let mut state = locked(&self.state);
            if state.window == Some(window) { state.on_trouble.take() } else { None }
        };
        if let Some(listener) = listener {
            tracing::warn!(socket = %self.name, "the checkpoint must be given up: {trouble}");
            listener(trouble);
        }
    }

    /// Tells a job's ring that it is done.
    fn finish(&self, waiting: &Waiting) {
        let waited_us = u64::try_from(waiting.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.longest_wait_us.fetch_max(waited_us, Ordering::Relaxed);
        waiting.job.mail.put(waiting.job.token);
    }

    /// The present memory, and its owner, who is found if need be.
    fn own(&self) -> Result<(Arc<MemoryMap>, Arc<Owner>), GuardRefusal> {
        let memory = Arc::clone(&locked(&self.state).memory);
        let regions = memory.region_guards();
        let known = regions.first().ok_or(GuardRefusal::NoGuest)?.owner();
        if let Some(owner) = known.filter(|_| regions.iter().all(|region| region.owner().is_some())) {
            let gone = owner.gone();
            return if gone {
                Err(GuardRefusal::OwnerGone { pid: owner.pid() })
            } else {
                Ok((memory, owner))
            };
        }
        let owner = self.find_owner(&regions)?;
        Ok((memory, owner))
    }

    /// Finds the owner of these regions and notes it with them.
    fn find_owner(&self, regions: &[Arc<RegionGuard>]) -> Result<Arc<Owner>, GuardRefusal> {
        let (last_owner, peer) = {
            let state = locked(&self.state);
            (state.last_owner, state.peer)
        };
        let owner = Owner::find(regions, last_owner, peer)?;
        regions.iter().for_each(|region| region.set_owner(&owner));
        locked(&self.state).last_owner = owner.pid();
        Ok(owner)
    }
}

impl State {
    /// Takes out all that no helper has in its hands: those finish theirs themselves.
    fn take_waiting(&mut self) -> Vec<Waiting> {
        let waiting: Vec<_> = self.jobs.drain(..).chain(self.held.drain(..)).collect();
        self.waiting -= waiting.len() as u64;
        waiting
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
