//! A volume's log: what is appended, in which order it is acknowledged, when it is durable, and how its tail is cut.
//!
//! [`LogState`] is passive: whichever queue's thread has requests fills a [`Draft`], has it placed, writes it through
//! its own lane and reports how that went. Ordinals are given under the volume's lock, so the log has one
//! order whichever queues write it; acknowledgements leave in that order ([`LogState::complete`]).

mod ahead;
mod draft;
mod open;
mod recover;
mod scan;
mod state;
#[cfg(test)]
mod testing;

pub use draft::{Draft, Pending};
pub use recover::{LogEnd, Recovery, recover};
pub use scan::{BatchAt, ChainReader, Fence, live_chain};
pub use state::{Acked, Append, Failed, LogContext, LogState, Placement, SyncPlan};
