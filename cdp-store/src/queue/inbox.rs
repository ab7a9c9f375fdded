//! What other threads have to tell a queue.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cdp_types::{IoErrorKind, Ordinal};

use crate::error::Result;
use crate::leaves::States;
use crate::log::Pending;
use crate::storage::Waker;

/// A message for a queue.
#[derive(Debug)]
pub enum Mail {
    /// A batch of this queue is acknowledged.
    Acked {
        /// The batch.
        ordinal: Ordinal,
        /// Its requests.
        requests: Vec<Pending>,
    },
    /// A batch of this queue was cut off the log.
    Failed {
        /// Why, if it was this batch that failed; otherwise its requests can be run again.
        error: Option<IoErrorKind>,
        /// Its requests.
        requests: Vec<Pending>,
    },
    /// Where the blocks of a read lie that waits for it.
    Located {
        /// The read's ticket.
        ticket: usize,
        /// The blocks' states.
        states: Result<Box<States>>,
    },
    /// Something that this queue waits for may have come: a segment, a cut, a sync, an acknowledgement.
    Retry,
}

/// A queue's mailbox, and the bell that wakes its thread.
pub struct Inbox {
    /// `None` once nobody reads it any more.
    mail: Mutex<Option<Vec<Mail>>>,
    waker: Option<Arc<dyn Waker>>,
    /// During which of the volume's tenures the queue was opened; none if it is nobody's, or a reader's.
    tenure: Option<u64>,
}

impl Inbox {
    /// The mailbox of the queue that `waker` wakes, and that was opened during a tenure
    /// ([`crate::log::LogState::tenure`]).
    #[must_use]
    pub fn new(waker: Arc<dyn Waker>, tenure: u64) -> Arc<Self> {
        Arc::new(Self { mail: Mutex::new(Some(Vec::new())), waker: Some(waker), tenure: Some(tenure) })
    }

    /// The same of a queue that never appends anything.
    #[must_use]
    pub fn of_reader(waker: Arc<dyn Waker>) -> Arc<Self> {
        Arc::new(Self { mail: Mutex::new(Some(Vec::new())), waker: Some(waker), tenure: None })
    }

    /// A mailbox that nobody reads, for batches without requests.
    #[must_use]
    pub fn nobody() -> Arc<Self> {
        Arc::new(Self { mail: Mutex::new(None), waker: None, tenure: None })
    }

    /// Whether its owner may append during this tenure; nobody's own events always go in.
    #[must_use]
    pub fn may_append(&self, tenure: u64, switching: bool) -> bool {
        self.tenure.is_none_or(|own| own == tenure && !switching)
    }

    fn mail(&self) -> MutexGuard<'_, Option<Vec<Mail>>> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a message, and wakes the queue's thread unless it is the one that calls; says whether anybody is there
    /// to read it.
    pub fn send(self: &Arc<Self>, mail: Mail, from: Option<&Arc<Self>>) -> bool {
        match &mut *self.mail() {
            Some(list) => list.push(mail),
            None => return false,
        }
        if let Some(waker) = self.waker.as_ref().filter(|_| !from.is_some_and(|from| Arc::ptr_eq(from, self)))
        {
            waker.wake();
        }
        true
    }

    /// Whether there are messages.
    #[must_use]
    pub fn has_mail(&self) -> bool {
        self.mail().as_ref().is_some_and(|list| !list.is_empty())
    }

    /// Takes all messages, oldest first, into `out`, which is empty.
    pub fn take(&self, out: &mut Vec<Mail>) {
        if let Some(list) = &mut *self.mail() {
            std::mem::swap(list, out);
        }
    }

    /// Takes all messages, and no more after them.
    pub fn close(&self) -> Vec<Mail> {
        self.mail().take().unwrap_or_default()
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}
