//! The threads of a window: helpers that touch, and one that watches whether they get on.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::owner::{Owner, Page, Touch};
use super::{Guard, GuardRefusal, GuardTrouble, Waiting, locked};

/// Threads that touch. QEMU's saver is one thread; this many keep its queue of faults filled.
const HELPERS: usize = 4;
/// A touch that takes longer had to wait for the saver.
const SLOW: Duration = Duration::from_micros(20);

/// Starts a window's threads. They end with it, and nobody waits for that: a helper may be in the kernel.
pub(super) fn spawn(guard: &Arc<Guard>, window: u64) -> Result<(), GuardRefusal> {
    let spawn = |name: &str, run: fn(&Guard, u64)| {
        let guard = Arc::clone(guard);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&guard, window));
        thread.map(drop).map_err(|error| GuardRefusal::NoThread(error.to_string()))
    };
    (0..HELPERS).try_for_each(|_| spawn("guard-touch", help))?;
    spawn("guard-watch", watch)
}

fn help(guard: &Guard, window: u64) {
    let mut state = locked(&guard.state);
    while state.window == Some(window) {
        let Some(waiting) = state.jobs.pop_front() else {
            state = guard.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let trouble = touch_all(guard, window, &waiting).err();
        state = locked(&guard.state);
        match trouble {
            Some(trouble) if state.window == Some(window) && !waiting.job.mail.is_dead() => {
                state.held.push(waiting);
                drop(state);
                guard.trouble(window, trouble);
            }
            _ => {
                state.waiting -= 1;
                drop(state);
                guard.finish(&waiting);
            }
        }
        state = locked(&guard.state);
    }
}

/// Touches what is not touched yet, until the window is closed or nobody needs it any more.
fn touch_all(guard: &Guard, window: u64, waiting: &Waiting) -> Result<(), GuardTrouble> {
    for page in &waiting.job.pages {
        // A touch takes the page's byte and writes it back, so none is begun that might be late: the byte may be the
        // guest's by then.
        if guard.open.load(Ordering::Acquire) != window || waiting.job.mail.is_dead() {
            return Ok(());
        }
        if page.region.touched().has(page.index) {
            continue;
        }
        let owner = owner_of(guard, page)?;
        let begun = Instant::now();
        match owner.touch(page) {
            Touch::Done if begun.elapsed() > SLOW => guard.slow_touches.fetch_add(1, Ordering::Relaxed),
            // A process that is gone has no image that could be damaged.
            Touch::Done | Touch::Gone => 0,
            Touch::Failed(error) => {
                return Err(GuardTrouble::Touch { pid: owner.pid(), error: error.to_string() });
            }
        };
        guard.touches.fetch_add(1, Ordering::Relaxed);
        let mut state = locked(&guard.state);
        state.progress = Instant::now();
        // Under the lock, and only for the window in which it was made: a later one protects the page again.
        if state.window == Some(window) {
            page.region.touched().set(page.index);
        }
    }
    Ok(())
}

/// Whose the page is. A region that came in this window is looked up with its first page.
fn owner_of(guard: &Guard, page: &Page) -> Result<Arc<Owner>, GuardTrouble> {
    match page.region.owner() {
        Some(owner) => Ok(owner),
        None => guard.find_owner(std::slice::from_ref(&page.region)).map_err(GuardTrouble::Owner),
    }
}

fn watch(guard: &Guard, window: u64) {
    let mut state = locked(&guard.state);
    while state.window == Some(window) && state.on_trouble.is_some() {
        let waited = if state.waiting > 0 { state.progress.elapsed() } else { Duration::ZERO };
        if waited >= guard.deadline {
            drop(state);
            let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
            return guard.trouble(window, GuardTrouble::NoProgress { waited_ms });
        }
        let left = guard.deadline - waited;
        state = guard.tick.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}
