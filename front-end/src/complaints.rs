//! Log lines that a client, a guest or its front end can cause.

use std::time::{Duration, Instant};

/// At most one line a second, with the number of those that were kept back: nobody can fill the log.
#[derive(Debug, Default)]
pub struct Complaints {
    last: Option<Instant>,
    kept_back: u64,
}

impl Complaints {
    /// Writes the line, which is given the number of those before it that were not written; or counts it.
    pub fn say(&mut self, line: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.kept_back += 1;
            return;
        }
        line(std::mem::take(&mut self.kept_back));
        self.last = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_kept_back_are_counted_in_the_next() {
        let (mut complaints, mut said) = (Complaints::default(), Vec::new());
        for _ in 0..3 {
            complaints.say(|more| said.push(more));
        }
        assert_eq!(said, [0]);
        complaints.last = complaints.last.and_then(|last| last.checked_sub(Duration::from_secs(1)));
        complaints.say(|more| said.push(more));
        assert_eq!(said, [0, 2]);
    }
}
