//! How background work leaves processors to those whom guests wait for.
//!
//! A thread that is woken on a processor where another one works waits until the scheduler takes that one off, three or four
//! milliseconds, even if it is the queue's thread or a guest's processor and even if another processor is idle. Lower
//! priorities shorten that, but whoever has one may be left without any processor while it holds what others need. Who
//! sleeps often is not in the way for long, whatever its priority is.

use std::thread;
use std::time::{Duration, Instant};

/// Work at one go.
const WORK: Duration = Duration::from_micros(200);
/// A rest after that, as it is asked for: it is about twice as long, and longer where others want the processor.
const REST: Duration = Duration::from_micros(100);

/// The pace of one piece of work.
#[derive(Debug)]
pub struct Pace {
    /// When the last rest was over; none if there is no time for any.
    since: Option<Instant>,
}

impl Pace {
    /// Of work that others wait for, or of which there is much.
    #[must_use]
    pub fn hurried() -> Self {
        Self { since: None }
    }

    /// Of work that has time.
    #[must_use]
    pub fn gentle() -> Self {
        Self { since: Some(Instant::now()) }
    }

    /// To be called often, with no lock held: rests when it is time.
    pub fn step(&mut self) {
        let Some(since) = &mut self.since else { return };
        if since.elapsed() >= WORK {
            thread::sleep(REST);
            *since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_time_rests() {
        let rests = |mut pace: Pace, patience: Duration| {
            let begun = Instant::now();
            while begun.elapsed() < patience {
                let (before, step) = (pace.since, Instant::now());
                pace.step();
                if pace.since != before {
                    return step.elapsed() >= REST;
                }
            }
            false
        };
        assert!(rests(Pace::gentle(), Duration::from_secs(20)));
        assert!(!rests(Pace::hurried(), 10 * WORK));
    }
}
