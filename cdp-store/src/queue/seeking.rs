//! Reads that wait for where their blocks lie, while somebody else finds out.

use std::sync::{Arc, Weak};

use cdp_types::{BlockRange, IoBuf, RequestId};
use slab::Slab;

use super::inbox::Inbox;
use crate::loaders::{Errand, Loaders, Places};

/// One of them.
#[derive(Debug)]
pub(super) struct Sought {
    pub(super) id: RequestId,
    pub(super) offset: u64,
    pub(super) into: IoBuf,
}

/// Those of one queue.
#[derive(Debug, Default)]
pub(super) struct Seeking(pub(super) Slab<Sought>);

impl Seeking {
    /// Sends somebody to find out where `blocks` lie, which `sought` is to read; the answer comes to the queue's inbox.
    /// Says whether there was anybody: not in a store that is being closed.
    pub(super) fn send(
        &mut self,
        sought: Sought,
        blocks: BlockRange,
        places: Weak<dyn Places>,
        inbox: &Arc<Inbox>,
        loaders: &Loaders,
    ) -> bool {
        let ticket = self.0.insert(sought);
        let unsent = loaders.send(Errand::new(places, blocks, inbox, ticket)).err();
        if let Some(errand) = unsent {
            self.0.remove(errand.withdraw());
            return false;
        }
        true
    }

    /// The read that an answer is for, which waits no longer.
    pub(super) fn found(&mut self, ticket: usize) -> Option<Sought> {
        self.0.try_remove(ticket)
    }
}
