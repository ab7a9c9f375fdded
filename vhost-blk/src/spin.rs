//! Looking for work before sleeping, for as long as it pays.
//!
//! A sleep costs two system calls, a wake-up and, with a guest, an exit: some 5 to 50 µs. If work usually comes
//! within that time it is cheaper to look for it. How long is worth it is learnt as the kernel learns it for halted
//! processors: a sleep that was shorter than the longest allowed look doubles the time, a longer one halves it, down
//! to nothing. So an idle queue sleeps at once, and stays asleep. The longest look is as KVM's (`halt_poll_ns`, 200 µs):
//! about what a disk needs for a batch, so that its end is seen without a sleep.

use std::time::{Duration, Instant};

/// The first step up from not looking at all, and below it not looking pays better.
const SHORTEST: Duration = Duration::from_micros(4);

/// The longest look while no writes are under way.
const SINGLE: Duration = Duration::from_micros(50);

/// How long one queue's thread looks for work after the last it had.
#[derive(Debug)]
pub(crate) struct Spin {
    longest: Duration,
    limit: Duration,
    /// When looking ends; none while there is work.
    until: Option<Instant>,
    slept_at: Option<Instant>,
}

impl Spin {
    pub(crate) fn new(longest: Duration) -> Self {
        Self { longest, limit: Duration::ZERO, until: None, slept_at: None }
    }

    /// There was work: looking starts anew afterwards.
    pub(crate) fn worked(&mut self) {
        self.until = None;
    }

    /// There is no work: whether to look again, rather than to sleep. `batches` says that writes are under way: many of
    /// them end at once, after a time that is worth looking for; reads end one by one, and looking only keeps
    /// the processor from whoever is to take them.
    pub(crate) fn look_on(&mut self, batches: bool) -> bool {
        let limit = if batches { self.limit } else { self.limit.min(SINGLE) };
        if limit.is_zero() {
            return false;
        }
        let now = Instant::now();
        let until = *self.until.get_or_insert_with(|| now + limit);
        now < until
    }

    pub(crate) fn going_to_sleep(&mut self) {
        if !self.longest.is_zero() {
            self.slept_at = Some(Instant::now());
        }
    }

    /// Learns from the sleep that has just ended, if there was one.
    pub(crate) fn woke(&mut self) {
        if let Some(since) = self.slept_at.take() {
            self.learn(since.elapsed());
            self.until = None;
        }
    }

    fn learn(&mut self, slept: Duration) {
        if slept <= self.longest {
            self.limit = (self.limit * 2).max(SHORTEST).min(self.longest);
        } else {
            self.limit /= 2;
            if self.limit < SHORTEST {
                self.limit = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_make_it_look_and_long_ones_stop_it() {
        let longest = Duration::from_micros(50);
        let mut spin = Spin::new(longest);
        assert!(!spin.look_on(true), "an idle queue sleeps at once");
        for _ in 0..10 {
            spin.learn(Duration::from_micros(20));
        }
        assert_eq!(spin.limit, longest);
        for _ in 0..10 {
            spin.learn(Duration::from_millis(1));
        }
        assert_eq!(spin.limit, Duration::ZERO);
    }

    #[test]
    fn zero_turns_it_off() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.going_to_sleep();
        spin.woke();
        assert!(!spin.look_on(true));
    }
}
