//! When to give up a live migration that does not come to its end: the guest changes memory faster than it is sent.

use std::time::{Duration, Instant};

use super::{TakeError, Taking};

/// How often all of a machine's memory may be sent. Whatever comes again is written again, so this also bounds what a
/// checkpoint that comes to nothing takes of the memory's log.
const MOST_TIMES: u64 = 10;

/// How long QEMU may go on sending what has changed, once all memory has come.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    /// Since all memory has come once: a large machine may take its time for that.
    since: Option<Instant>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, since: None }
    }

    /// Looks at how much has come, while the machine still runs.
    ///
    /// # Errors
    /// That is enough.
    pub(super) fn look(&mut self, taking: Taking, now: Instant) -> Result<(), TakeError> {
        let Taking { received_pages, total_pages } = taking;
        if total_pages == 0 || received_pages < total_pages {
            return Ok(());
        }
        let since = *self.since.get_or_insert(now);
        let again = now.saturating_duration_since(since);
        if received_pages < total_pages.saturating_mul(MOST_TIMES) && again < self.limit {
            return Ok(());
        }
        Err(TakeError::new(format!(
            "the guest changes its memory faster than it can be saved while it runs: all of it was sent {:.1} times in \
             {:.0} s after the first, and too much is left for a short pause; say --mode hot or --mode pause, or try \
             when it is less busy",
            received_pages as f64 / total_pages as f64,
            again.as_secs_f64(),
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_may_take_as_long_as_it_does_and_the_others_may_not() {
        let limit = Duration::from_secs(60);
        let (mut patience, start) = (Patience::new(limit), Instant::now());
        let mut look = |received_pages, after_s| {
            let taking = Taking { received_pages, total_pages: 100 };
            patience.look(taking, start + Duration::from_secs(after_s)).map_err(|error| error.to_string())
        };
        assert_eq!(look(0, 0), Ok(()));
        assert_eq!(look(99, 3600), Ok(()));
        assert_eq!(look(100, 3601), Ok(()));
        assert_eq!(look(350, 3660), Ok(()));
        let why = look(351, 3661).err().unwrap_or_default();
        assert!(why.contains("3.5 times in 60 s") && why.contains("--mode pause"), "{why}");
    }

    #[test]
    fn memory_that_comes_again_and_again_is_given_up_before_its_time() {
        let (mut patience, now) = (Patience::new(Duration::from_secs(3600)), Instant::now());
        assert!(patience.look(Taking { received_pages: 999, total_pages: 100 }, now).is_ok());
        assert!(patience.look(Taking { received_pages: 1000, total_pages: 100 }, now).is_err());
        assert!(patience.look(Taking::default(), now).is_ok(), "nothing has come");
    }
}
