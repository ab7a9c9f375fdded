//! Several loops in one task.
//!
//! The loops of a connection (read, device, write, status) hand work to each other all the time. As tasks of their own
//! they would wake each other through the scheduler; here they are polled in a fixed order, in which the work flows,
//! and again only if one of them has raised a signal for another meanwhile.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

/// Whether another round is due.
#[derive(Clone, Default)]
pub(crate) struct Rounds(Rc<Cell<bool>>);

/// Told from one loop to another of the same [`Rounds`]: there is something for you. It is remembered until taken.
pub(crate) struct Signal {
    raised: Cell<bool>,
    rounds: Rounds,
}

impl Rounds {
    pub(crate) fn signal(&self) -> Signal {
        Signal { raised: Cell::new(false), rounds: self.clone() }
    }

    /// Runs the loops until each has ended. Whatever else wakes them is up to them.
    pub(crate) async fn run(
        &self,
        first: impl Future<Output = ()>,
        second: impl Future<Output = ()>,
        third: impl Future<Output = ()>,
        fourth: impl Future<Output = ()>,
    ) {
        let (mut first, mut second, mut third, mut fourth) =
            (pin!(first), pin!(second), pin!(third), pin!(fourth));
        let mut ended = [false; 4];
        poll_fn(|context| {
            loop {
                self.0.set(false);
                ended[0] = ended[0] || first.as_mut().poll(context).is_ready();
                ended[1] = ended[1] || second.as_mut().poll(context).is_ready();
                ended[2] = ended[2] || third.as_mut().poll(context).is_ready();
                ended[3] = ended[3] || fourth.as_mut().poll(context).is_ready();
                if ended == [true; 4] {
                    return Poll::Ready(());
                }
                if !self.0.get() {
                    return Poll::Pending;
                }
            }
        })
        .await;
    }
}

impl Signal {
    pub(crate) fn raise(&self) {
        self.raised.set(true);
        self.rounds.0.set(true);
    }

    /// Whether it has been raised since it was last taken.
    pub(crate) fn take(&self) -> bool {
        self.raised.replace(false)
    }

    /// Waits until it is raised. Only inside of [`Rounds::run`].
    pub(crate) async fn wait(&self) {
        poll_fn(|_| if self.take() { Poll::Ready(()) } else { Poll::Pending }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_reach_loops_in_both_directions_without_a_waker() {
        let rounds = Rounds::default();
        let (down, up) = (rounds.signal(), rounds.signal());
        let handed = Cell::new(0);
        let there = async {
            for _ in 0..1000 {
                down.raise();
                up.wait().await;
            }
        };
        let back = async {
            for _ in 0..1000 {
                down.wait().await;
                handed.set(handed.get() + 1);
                up.raise();
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(rounds.run(there, back, async {}, async {}));
        assert_eq!(handed.get(), 1000);
    }
}
