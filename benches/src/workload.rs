//! What is asked of a disk.

use serde::Serialize;

/// What each request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Access {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Writes, and then flushes before the next write: counted as one operation.
    WriteFlush,
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// To any block of the working set, with the same probability.
    Random,
    /// One after the other, each queue in its own part of the working set, again from its start after the end.
    Sequential,
}

/// How the disk was written before, which a log remembers and a file does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Layout {
    /// Once, from start to end.
    Sequential,
    /// And then as many bytes again in 4 KiB blocks at random, so that neighbours lie far apart.
    Scattered,
}

/// A line of the report.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Workload {
    /// Its name.
    pub(crate) name: &'static str,
    pub(crate) access: Access,
    pub(crate) order: Order,
    pub(crate) layout: Layout,
    /// Bytes of a request.
    pub(crate) bytes: usize,
    /// Requests in flight, per queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// Whether it goes on until far more is written than any pool of prepared segments holds, rather than for a time.
    pub(crate) sustained: bool,
}

const KIB: usize = 1 << 10;

const fn random(name: &'static str, access: Access, depth: usize) -> Workload {
    Workload {
        name,
        access,
        order: Order::Random,
        layout: Layout::Sequential,
        bytes: 4 * KIB,
        depth,
        queues: 1,
        sustained: false,
    }
}

const fn sequential(name: &'static str, access: Access) -> Workload {
    Workload { order: Order::Sequential, bytes: 128 * KIB, ..random(name, access, 16) }
}

/// Reads first: writes use up what a store was filled with.
pub(crate) const ALL: [Workload; 14] = [
    random("rand-read-4k-d1", Access::Read, 1),
    random("rand-read-4k-d32", Access::Read, 32),
    random("rand-read-4k-d128", Access::Read, 128),
    Workload { queues: 4, ..random("rand-read-4k-d32x4", Access::Read, 32) },
    sequential("seq-read-128k-d16", Access::Read),
    Workload { layout: Layout::Scattered, ..random("rand-read-4k-d32-scattered", Access::Read, 32) },
    Workload { layout: Layout::Scattered, ..sequential("seq-read-128k-d16-scattered", Access::Read) },
    random("rand-write-4k-d1", Access::Write, 1),
    random("rand-write-4k-d32", Access::Write, 32),
    random("rand-write-4k-d128", Access::Write, 128),
    Workload { queues: 4, ..random("rand-write-4k-d32x4", Access::Write, 32) },
    random("write-flush-4k-d1", Access::WriteFlush, 1),
    sequential("seq-write-128k-d16", Access::Write),
    Workload { sustained: true, ..random("rand-write-4k-d32-sustained", Access::Write, 32) },
];

impl Workload {
    /// Whether it changes the disk.
    pub(crate) fn writes(&self) -> bool {
        self.access != Access::Read
    }
}
