//! Counters. Each queue's thread is the only writer of its own, so counting takes no lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What one queue has done since the server was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Read requests answered.
    pub reads: u64,
    /// Write requests answered.
    pub writes: u64,
    /// Flush requests answered.
    pub flushes: u64,
    /// Discard requests answered.
    pub discards: u64,
    /// Write-zeroes requests answered.
    pub write_zeroes: u64,
    /// Requests of other types answered, unknown ones included.
    pub others: u64,
    /// Requests among them that were answered with an error.
    pub errors: u64,
    /// Bytes read into guest memory.
    pub bytes_read: u64,
    /// Bytes written from guest memory.
    pub bytes_written: u64,
    /// Requests taken from the ring and not answered yet.
    pub in_flight: u64,
    /// Interrupts sent to the guest.
    pub interrupts: u64,
    /// Times that the queue's thread went to sleep.
    pub sleeps: u64,
    /// Requests found in flight after a reconnection and in the log, so answered without being run again.
    pub recovered: u64,
    /// Requests found in flight after a reconnection and run again.
    pub resubmitted: u64,
}

/// What a server has done since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Whether a client is connected.
    pub connected: bool,
    /// Whether that client has said anything: from then on QEMU does nothing else until it has made its connection.
    pub greeted: bool,
    /// Connections accepted.
    pub connections: u64,
    /// Clients turned away, because another was connected.
    pub refused: u64,
    /// One entry for each queue.
    pub queues: Vec<QueueStats>,
}

/// A number that one thread changes and any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the one writer may call it.
    pub(crate) fn add(&self, count: u64) {
        self.set(self.get().wrapping_add(count));
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters behind a [`QueueStats`].
#[derive(Debug, Default)]
pub(crate) struct QueueCounters {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) flushes: Counter,
    pub(crate) discards: Counter,
    pub(crate) write_zeroes: Counter,
    pub(crate) others: Counter,
    pub(crate) errors: Counter,
    pub(crate) bytes_read: Counter,
    pub(crate) bytes_written: Counter,
    pub(crate) in_flight: Counter,
    pub(crate) interrupts: Counter,
    pub(crate) sleeps: Counter,
    pub(crate) recovered: Counter,
    pub(crate) resubmitted: Counter,
}

impl QueueCounters {
    fn read(&self) -> QueueStats {
        QueueStats {
            reads: self.reads.get(),
            writes: self.writes.get(),
            flushes: self.flushes.get(),
            discards: self.discards.get(),
            write_zeroes: self.write_zeroes.get(),
            others: self.others.get(),
            errors: self.errors.get(),
            bytes_read: self.bytes_read.get(),
            bytes_written: self.bytes_written.get(),
            in_flight: self.in_flight.get(),
            interrupts: self.interrupts.get(),
            sleeps: self.sleeps.get(),
            recovered: self.recovered.get(),
            resubmitted: self.resubmitted.get(),
        }
    }
}

/// The counters behind a [`ServerStats`].
#[derive(Debug)]
pub(crate) struct ServerCounters {
    pub(crate) connected: AtomicBool,
    pub(crate) greeted: AtomicBool,
    pub(crate) connections: Counter,
    pub(crate) refused: Counter,
    pub(crate) queues: Vec<std::sync::Arc<QueueCounters>>,
}

impl ServerCounters {
    pub(crate) fn new(queues: u16) -> Self {
        Self {
            connected: AtomicBool::new(false),
            greeted: AtomicBool::new(false),
            connections: Counter::default(),
            refused: Counter::default(),
            queues: (0..queues).map(|_| Default::default()).collect(),
        }
    }

    pub(crate) fn read(&self) -> ServerStats {
        ServerStats {
            connected: self.connected.load(Ordering::Relaxed),
            greeted: self.greeted.load(Ordering::Relaxed),
            connections: self.connections.get(),
            refused: self.refused.get(),
            queues: self.queues.iter().map(|queue| queue.read()).collect(),
        }
    }
}
