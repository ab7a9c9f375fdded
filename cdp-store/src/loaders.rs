//! Looking up where blocks lie when no map knows: the time index may have to be read from the disk for it,
//! and the thread of a queue has other requests to move on meanwhile.

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;

use cdp_types::BlockRange;

use crate::error::{Error, ErrorKind, Result};
use crate::index::FANOUT;
use crate::leaves::States;
use crate::queue::{Inbox, Mail};

/// Threads of a store: a disk answers several reads at once sooner than one after the other.
const THREADS: usize = 4;

/// Who knows where blocks lie: a volume's head, or one of its past instants.
pub trait Places: Send + Sync {
    /// The states of these blocks. May read the time index from the disk.
    ///
    /// # Errors
    /// If the time index cannot be read.
    fn states(&self, blocks: BlockRange) -> Result<States>;
}

/// One read that waits for its places.
pub struct Errand {
    places: Weak<dyn Places>,
    blocks: BlockRange,
    to: Arc<Inbox>,
    ticket: usize,
    answered: bool,
}

impl Errand {
    /// To find the places of some blocks; the answer goes to this inbox, with the ticket.
    #[must_use]
    pub fn new(places: Weak<dyn Places>, blocks: BlockRange, to: &Arc<Inbox>, ticket: usize) -> Self {
        Self { places, blocks, to: Arc::clone(to), ticket, answered: false }
    }

    /// The ticket of a request that nobody answers: this is not an answer to it.
    #[must_use]
    pub fn withdraw(mut self) -> usize {
        self.answered = true;
        self.ticket
    }

    fn run(mut self) {
        if let Some(places) = self.places.upgrade() {
            self.answer(places.states(self.blocks).map(Box::new));
        }
    }

    fn answer(&mut self, states: Result<Box<States>>) {
        self.answered = true;
        self.to.send(Mail::Located { ticket: self.ticket, states }, None);
    }
}

/// A request must not wait for ever because a thread has panicked or a store has gone.
impl Drop for Errand {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(Err(Error::new(ErrorKind::Closed, "the lookup of its blocks was given up")));
        }
    }
}

impl fmt::Debug for Errand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Errand").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

/// Who runs errands: nobody, at first, and then every queue looks for itself.
#[derive(Debug, Default)]
pub struct Loaders {
    lines: RwLock<Vec<Sender<Errand>>>,
    by_hand: Mutex<Option<Receiver<Errand>>>,
}

impl Loaders {
    /// Has threads run them, until [`Loaders::close`]. They hold nothing of the store while they have nothing to do.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn start(&self) -> std::io::Result<Vec<JoinHandle<()>>> {
        let mut threads = Vec::new();
        for number in 0..THREADS {
            let (line, errands) = channel::<Errand>();
            let name = format!("cdp-leaf-{number}");
            let run = move || errands.into_iter().for_each(Errand::run);
            threads.push(std::thread::Builder::new().name(name).spawn(run)?);
            self.lines.write().unwrap_or_else(PoisonError::into_inner).push(line);
        }
        Ok(threads)
    }

    /// Has them wait until [`Loaders::step`] is called.
    pub fn by_hand(&self) {
        let (line, errands) = channel();
        self.lines.write().unwrap_or_else(PoisonError::into_inner).push(line);
        *self.by_hand.lock().unwrap_or_else(PoisonError::into_inner) = Some(errands);
    }

    /// Runs the oldest errand that waits for this; says whether there was one.
    pub fn step(&self) -> bool {
        let by_hand = self.by_hand.lock().unwrap_or_else(PoisonError::into_inner);
        let errand = by_hand.as_ref().and_then(|errands| errands.try_recv().ok());
        drop(by_hand);
        errand.map(Errand::run).is_some()
    }

    /// Sends somebody. All that ask for one leaf stand in one line, so that it is read once.
    ///
    /// # Errors
    /// The errand, if there is nobody.
    pub fn send(&self, errand: Errand) -> std::result::Result<(), Errand> {
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        let leaf = errand.blocks.first / FANOUT as u64;
        match lines.get((leaf % lines.len().max(1) as u64) as usize) {
            Some(line) => line.send(errand).map_err(|unsent| unsent.0),
            None => Err(errand),
        }
    }

    /// Takes no errand any more; threads end when they have run those that they have.
    pub fn close(&self) {
        self.lines.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
