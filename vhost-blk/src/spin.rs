//! Looking for work before sleeping, for as long as it pays.
//!
//! A sleep costs two system calls, a wake-up and, with a guest, an exit: some 5 to 50 µs. If work usually comes
//! within that time it is cheaper to look for it. How long is worth it is learnt as the kernel learns it for halted
//! processors: when there was nothing to do for less than the longest allowed look, the time doubles, after a longer
//! pause it halves, down to nothing. So an idle queue sleeps at once, and stays asleep. The longest look is as KVM's
//! (`halt_poll_ns`, 200 µs): about what a disk needs for a batch, so that its end is seen without a sleep.
//!
//! The whole pause counts, what was spent looking included: a look that always ends in a sleep is given up.

use std::time::{Duration, Instant};

/// The first step up from not looking at all, and below it not looking pays better.
const SHORTEST: Duration = Duration::from_micros(4);

/// The longest look while no writes are under way: a little more than fast disks need for one read or sync. If it ends just
/// before they do it is a cost without a gain.
const SINGLE: Duration = Duration::from_micros(100);

/// How long one queue's thread looks for work after the last it had.
#[derive(Debug)]
pub(crate) struct Spin {
    /// While writes are under way: many of them end at once, after a time that is worth looking for.
    batches: Look,
    /// While none are: reads end one by one, and looking for long only keeps the processor from whoever is to take them.
    singles: Look,
    /// Since when there has been no work, as far as anybody looked.
    idle_since: Option<Instant>,
    /// Whether it sleeps, and whether writes were under way when it fell asleep.
    asleep: Option<bool>,
}

/// How long a look may be, and how long it is worth at present.
#[derive(Debug)]
struct Look {
    longest: Duration,
    limit: Duration,
}

impl Spin {
    pub(crate) fn new(longest: Duration) -> Self {
        let look = |longest| Look { longest, limit: Duration::ZERO };
        Self { batches: look(longest), singles: look(longest.min(SINGLE)), idle_since: None, asleep: None }
    }

    /// There was work: looking starts anew afterwards.
    pub(crate) fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There is no work: whether to look again, rather than to sleep. `batches` says that writes are under way.
    pub(crate) fn look_on(&mut self, batches: bool) -> bool {
        let limit = self.look(batches).limit;
        if limit.is_zero() {
            return false;
        }
        let now = Instant::now();
        now < *self.idle_since.get_or_insert(now) + limit
    }

    fn look(&mut self, batches: bool) -> &mut Look {
        if batches { &mut self.batches } else { &mut self.singles }
    }

    /// It sleeps from here on; `batches` as above.
    pub(crate) fn going_to_sleep(&mut self, batches: bool) {
        if !self.look(batches).longest.is_zero() {
            self.idle_since.get_or_insert_with(Instant::now);
            self.asleep = Some(batches);
        }
    }

    /// Learns from the pause that has just ended, if it ended with a sleep.
    pub(crate) fn woke(&mut self) {
        if let Some(batches) = self.asleep.take()
            && let Some(since) = self.idle_since.take()
        {
            self.look(batches).learn(since.elapsed());
        }
    }
}

impl Look {
    fn learn(&mut self, pause: Duration) {
        if pause <= self.longest {
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
    fn short_pauses_make_it_look_and_long_ones_stop_it() {
        let longest = Duration::from_micros(50);
        let mut spin = Spin::new(longest);
        assert!(!spin.look_on(true), "an idle queue sleeps at once");
        for _ in 0..10 {
            spin.batches.learn(Duration::from_micros(20));
        }
        assert_eq!((spin.batches.limit, spin.singles.limit), (longest, Duration::ZERO));
        for _ in 0..10 {
            spin.batches.learn(Duration::from_millis(1));
        }
        assert_eq!(spin.batches.limit, Duration::ZERO);
    }

    #[test]
    fn a_look_that_always_ends_in_a_sleep_is_given_up() {
        let longest = Duration::from_millis(5);
        let mut spin = Spin::new(longest);
        spin.batches.limit = longest;
        for _ in 0..20 {
            // The sleep is a short one, but what it waited for came too late for any look.
            let comes_at = Instant::now() + longest + Duration::from_millis(1);
            while spin.look_on(true) {
                std::thread::yield_now();
            }
            spin.going_to_sleep(true);
            std::thread::sleep(comes_at.saturating_duration_since(Instant::now()));
            spin.woke();
        }
        assert_eq!(spin.batches.limit, Duration::ZERO);
    }

    #[test]
    fn zero_turns_it_off() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.going_to_sleep(true);
        spin.woke();
        assert!(!spin.look_on(true));
    }
}
