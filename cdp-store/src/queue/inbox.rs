//! What other threads have to tell a queue.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cdp_types::{IoErrorKind, Ordinal};

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
    /// Something that this queue waits for may have come: a segment, a cut, a sync, an acknowledgement.
    Retry,
}

/// A queue's mailbox, and the bell that wakes its thread.
pub struct Inbox {
    mail: Mutex<Vec<Mail>>,
    waker: Option<Arc<dyn Waker>>,
}

impl Inbox {
    /// The mailbox of the queue that `waker` wakes.
    #[must_use]
    pub fn new(waker: Arc<dyn Waker>) -> Arc<Self> {
        Arc::new(Self { mail: Mutex::default(), waker: Some(waker) })
    }

    /// A mailbox that nobody reads, for batches without requests.
    #[must_use]
    pub fn nobody() -> Arc<Self> {
        Arc::new(Self { mail: Mutex::default(), waker: None })
    }

    /// Leaves a message, and wakes the queue's thread unless it is the one that calls.
    pub fn send(self: &Arc<Self>, mail: Mail, from: Option<&Arc<Self>>) {
        let Some(waker) = &self.waker else { return };
        self.mail.lock().unwrap_or_else(PoisonError::into_inner).push(mail);
        if !from.is_some_and(|from| Arc::ptr_eq(from, self)) {
            waker.wake();
        }
    }

    /// Takes all messages, oldest first, into `out`, which is empty.
    pub fn take(&self, out: &mut Vec<Mail>) {
        std::mem::swap(&mut *self.mail.lock().unwrap_or_else(PoisonError::into_inner), out);
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}
