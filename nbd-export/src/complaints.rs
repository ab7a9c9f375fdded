//! Log lines that a guest or its front end can cause.

use std::time::{Duration, Instant};

/// At most one line a second, with the number of those that were kept back: nobody can fill the log.
#[derive(Default)]
pub(crate) struct Complaints {
    last: Option<Instant>,
    kept_back: u64,
}

impl Complaints {
    /// Writes the line, which is given the number of those before it that were not written; or counts it.
    pub(crate) fn say(&mut self, line: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.kept_back += 1;
            return;
        }
        line(std::mem::take(&mut self.kept_back));
        self.last = Some(now);
    }
}
