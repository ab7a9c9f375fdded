//! The guest's heartbeats, timed here: a guest does not notice how long it stood still.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use e2e::process::wait_for;

const PATIENCE: Duration = Duration::from_secs(60);

/// Nanoseconds since 1970, as QEMU's events have them too.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A span of time, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Span {
    fn overlaps(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }

    pub(crate) fn ms(self) -> f64 {
        self.to.saturating_sub(self.from) as f64 / 1e6
    }
}

/// A guest's third serial port, as the host hears it.
pub(crate) struct Beats {
    port: UnixStream,
    heard_ns: Arc<Mutex<Vec<u64>>>,
}

impl Beats {
    /// Listens from now on.
    pub(crate) fn listen(socket: &Path) -> Result<Self> {
        let port = wait_for("the guest's serial port", PATIENCE, || Ok(UnixStream::connect(socket).ok()))?;
        let heard_ns = Arc::<Mutex<Vec<u64>>>::default();
        let (mut reader, heard) = (port.try_clone()?, Arc::clone(&heard_ns));
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while reader.read(&mut bytes).is_ok_and(|len| len > 0) {
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(now_ns());
            }
        });
        Ok(Self { port, heard_ns })
    }

    /// Tells the guest's program something.
    pub(crate) fn command(&self, command: u8) -> Result<()> {
        (&self.port).write_all(&[command]).context("the guest's serial port")
    }

    /// Waits for the first beat after an instant.
    pub(crate) fn first_after(&self, ns: u64) -> Result<u64> {
        wait_for("a heartbeat", PATIENCE, || {
            let heard = self.heard_ns.lock().unwrap_or_else(PoisonError::into_inner);
            let after = heard.partition_point(|&at| at <= ns);
            Ok(heard.get(after).copied())
        })
    }

    /// The time between two beats, of all that overlap a span.
    pub(crate) fn gaps(&self, span: Span) -> Vec<Span> {
        let heard = self.heard_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let gaps = heard.windows(2).map(|pair| Span { from: pair[0], to: pair[1] });
        gaps.filter(|gap| gap.overlaps(span)).collect()
    }
}

/// The longest of some gaps but those that overlap `but`, in milliseconds.
pub(crate) fn longest_ms(gaps: &[Span], but: Option<Span>) -> f64 {
    let counted = gaps.iter().filter(|gap| !but.is_some_and(|but| gap.overlaps(but)));
    counted.map(|gap| gap.ms()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_not_counted_as_a_stall() {
        let gaps = [Span { from: 0, to: 1_000_000 }, Span { from: 1_000_000, to: 9_000_000 }];
        assert_eq!(longest_ms(&gaps, None), 8.0);
        assert_eq!(longest_ms(&gaps, Some(Span { from: 2_000_000, to: 3_000_000 })), 1.0);
        assert_eq!(longest_ms(&[], None), 0.0);
    }
}
