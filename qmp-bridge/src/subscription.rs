//! Events on their way to whoever wants them: in order, bounded, and never lost without a word.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

use crate::error::Error;
use crate::event::{Event, EventKind};
use crate::message::Version;

/// What a subscriber is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// An event, exactly at its place in the order.
    Event(Event),
    /// The subscriber was too slow: this many events that belong here were dropped. Those after it are not affected.
    Missed {
        /// How many.
        count: u64,
    },
    /// A connection is up. Whatever happened before it, while there was none, nobody here has seen.
    Connected {
        /// What answers.
        version: Version,
    },
    /// The connection has ended, and this is why.
    Disconnected {
        /// The reason that everything waiting on the connection got, too.
        reason: Error,
    },
}

/// How much a subscriber may leave unread before it misses events.
#[derive(Clone, Copy, Debug)]
pub struct Backlog {
    /// Notices.
    pub count: usize,
    /// What they took on the socket.
    pub bytes: usize,
}

impl Default for Backlog {
    /// 1024 events of 4 MiB in all: a checkpoint makes a dozen, of a hundred bytes each.
    fn default() -> Self {
        Self { count: 1024, bytes: 4 << 20 }
    }
}

#[derive(Debug, Default)]
struct Waiting {
    /// Notices with their size.
    notices: VecDeque<(Notice, usize)>,
    bytes: usize,
    closed: bool,
}

#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    backlog: Backlog,
}

impl Queue {
    fn push(&self, notice: &Notice, bytes: usize) {
        {
            let mut waiting = locked(&self.waiting);
            // Connections come and go rarely, and a gap must be seen even by the slowest, so these have room of
            // their own: as much again.
            let crowded =
                waiting.notices.len() >= self.backlog.count || waiting.bytes + bytes > self.backlog.bytes;
            let full = match notice {
                Notice::Event(_) => crowded,
                _ => waiting.notices.len() >= 2 * self.backlog.count,
            };
            match waiting.notices.back_mut() {
                Some((Notice::Missed { count }, _)) if full => *count += 1,
                _ if full => waiting.notices.push_back((Notice::Missed { count: 1 }, 0)),
                _ => {
                    waiting.notices.push_back((notice.clone(), bytes));
                    waiting.bytes += bytes;
                }
            }
        }
        self.arrived.notify_one();
    }

    fn pop(&self) -> Option<Option<Notice>> {
        let mut waiting = locked(&self.waiting);
        match waiting.notices.pop_front() {
            Some((notice, bytes)) => {
                waiting.bytes -= bytes;
                Some(Some(notice))
            }
            None if waiting.closed => Some(None),
            None => None,
        }
    }
}

/// A subscriber's end: all notices from the moment of subscribing on.
///
/// What arrived before a reply is here before whoever sent that command gets the reply: after
/// `client.execute(…).await`, [`Subscription::try_next`] finds all events that came before it.
#[derive(Debug)]
pub struct Subscription {
    queue: Arc<Queue>,
}

impl Subscription {
    /// The next notice; None when nothing more can come, because the client or bridge is no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Notice> {
        loop {
            if let Some(notice) = self.queue.pop() {
                return notice;
            }
            self.queue.arrived.notified().await;
        }
    }

    /// The next notice, if one is here already.
    pub fn try_next(&mut self) -> Option<Notice> {
        self.queue.pop().flatten()
    }
}

/// Where arrivals are numbered, and from where they go to the subscribers.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    state: Mutex<HubState>,
}

#[derive(Debug, Default)]
struct HubState {
    arrivals: u64,
    queues: Vec<Weak<Queue>>,
    closed: bool,
}

impl Hub {
    pub(crate) fn subscribe(&self, backlog: Backlog) -> Subscription {
        let mut state = locked(&self.state);
        let waiting = Mutex::new(Waiting { closed: state.closed, ..Waiting::default() });
        let queue = Arc::new(Queue { waiting, arrived: Notify::new(), backlog });
        state.queues.push(Arc::downgrade(&queue));
        Subscription { queue }
    }

    /// The number of a message that is no event.
    pub(crate) fn number(&self) -> u64 {
        let mut state = locked(&self.state);
        state.arrivals += 1;
        state.arrivals
    }

    /// `bytes` is what the event took on the socket.
    pub(crate) fn event(&self, kind: EventKind, time_us: Option<u64>, bytes: usize) {
        let mut state = locked(&self.state);
        state.arrivals += 1;
        let event = Event { arrival: state.arrivals, time_us, kind };
        state.tell(&Notice::Event(event), bytes);
    }

    pub(crate) fn tell(&self, notice: &Notice) {
        locked(&self.state).tell(notice, 0);
    }

    /// Nothing more will come.
    pub(crate) fn close(&self) {
        let mut state = locked(&self.state);
        state.closed = true;
        for queue in state.queues.drain(..).filter_map(|queue| queue.upgrade()) {
            locked(&queue.waiting).closed = true;
            queue.arrived.notify_one();
        }
    }
}

impl HubState {
    /// Under the hub's lock, so that all subscribers see one order.
    fn tell(&mut self, notice: &Notice, bytes: usize) {
        self.queues.retain(|queue| {
            let queue = queue.upgrade();
            if let Some(queue) = &queue {
                queue.push(notice, bytes);
            }
            queue.is_some()
        });
    }
}

/// Nothing here panics with a lock held, and if it did: the counters and queues are valid between any two statements.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(hub: &Hub, count: usize) {
        for _ in 0..count {
            hub.event(EventKind::Stop, None, 10);
        }
    }

    fn drain(subscription: &mut Subscription) -> Vec<String> {
        std::iter::from_fn(|| subscription.try_next())
            .map(|notice| match notice {
                Notice::Event(event) => event.arrival.to_string(),
                Notice::Missed { count } => format!("missed {count}"),
                Notice::Connected { .. } => "connected".into(),
                Notice::Disconnected { .. } => "disconnected".into(),
            })
            .collect()
    }

    #[test]
    fn a_slow_subscriber_is_told_where_and_how_much_it_missed() {
        let hub = Hub::default();
        let mut slow = hub.subscribe(Backlog { count: 2, bytes: 1000 });
        let mut fast = hub.subscribe(Backlog::default());
        tell(&hub, 5);
        assert_eq!(drain(&mut slow), ["1", "2", "missed 3"]);
        tell(&hub, 1);
        assert_eq!(drain(&mut slow), ["6"]);
        assert_eq!(drain(&mut fast), ["1", "2", "3", "4", "5", "6"]);
    }

    #[test]
    fn a_backlog_is_bounded_in_bytes_too() {
        let hub = Hub::default();
        let mut subscription = hub.subscribe(Backlog { count: 100, bytes: 25 });
        tell(&hub, 4);
        assert_eq!(drain(&mut subscription), ["1", "2", "missed 2"]);
    }

    #[test]
    fn a_lost_connection_is_told_to_the_slowest_and_even_so_bounded() {
        let hub = Hub::default();
        let mut subscription = hub.subscribe(Backlog { count: 2, bytes: 1000 });
        tell(&hub, 2);
        let reason = Error::new(crate::ErrorKind::Gone, "x", "");
        for _ in 0..10 {
            hub.tell(&Notice::Disconnected { reason: reason.clone() });
        }
        assert_eq!(drain(&mut subscription), ["1", "2", "disconnected", "disconnected", "missed 8"]);
    }

    #[tokio::test]
    async fn replies_are_numbered_with_the_events_and_the_end_is_an_end() {
        let hub = Hub::default();
        let mut subscription = hub.subscribe(Backlog::default());
        tell(&hub, 1);
        assert_eq!(hub.number(), 2);
        tell(&hub, 1);
        hub.close();
        assert_eq!(drain(&mut subscription), ["1", "3"]);
        assert!(subscription.next().await.is_none());
        assert!(hub.subscribe(Backlog::default()).next().await.is_none());
    }
}
