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
    /// Seven reads to three writes, in random order.
    Mixed,
    /// Writes, and then flushes before the next write: counted as one operation.
    WriteFlush,
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// To any block of the working set, with the same probability.
    Random,
    /// The same, but few blocks get most requests: the n-th most wanted one with a probability in proportion to
    /// n^-0.99, wherever it lies.
    Zipf,
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
    /// Whether requests are made at half the rate that qemu-storage-daemon reaches at this depth, for everybody.
    pub(crate) paced: bool,
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
        paced: false,
    }
}

const fn sequential(name: &'static str, access: Access, depth: usize) -> Workload {
    Workload { order: Order::Sequential, ..random(name, access, depth) }
}

const fn zipf(name: &'static str, access: Access, depth: usize) -> Workload {
    Workload { order: Order::Zipf, ..random(name, access, depth) }
}

const fn large(workload: Workload) -> Workload {
    Workload { bytes: 128 * KIB, ..workload }
}

const fn scattered(workload: Workload) -> Workload {
    Workload { layout: Layout::Scattered, ..workload }
}

const fn at_half_load(workload: Workload) -> Workload {
    Workload { paced: true, ..workload }
}

const fn on_four_queues(workload: Workload) -> Workload {
    Workload { queues: 4, ..workload }
}

/// Reads first: writes use up what a store was filled with.
pub(crate) const ALL: [Workload; 36] = [
    random("rand-read-4k-d1", Access::Read, 1),
    random("rand-read-4k-d32", Access::Read, 32),
    random("rand-read-4k-d128", Access::Read, 128),
    on_four_queues(random("rand-read-4k-d32x4", Access::Read, 32)),
    zipf("zipf-read-4k-d32", Access::Read, 32),
    large(random("rand-read-128k-d1", Access::Read, 1)),
    large(random("rand-read-128k-d32", Access::Read, 32)),
    large(random("rand-read-128k-d128", Access::Read, 128)),
    sequential("seq-read-4k-d1", Access::Read, 1),
    sequential("seq-read-4k-d32", Access::Read, 32),
    sequential("seq-read-4k-d128", Access::Read, 128),
    large(sequential("seq-read-128k-d1", Access::Read, 1)),
    large(sequential("seq-read-128k-d32", Access::Read, 32)),
    large(sequential("seq-read-128k-d128", Access::Read, 128)),
    at_half_load(random("rand-read-4k-half-load", Access::Read, 32)),
    scattered(random("rand-read-4k-d32-scattered", Access::Read, 32)),
    scattered(large(sequential("seq-read-128k-d32-scattered", Access::Read, 32))),
    random("rand-mixed-4k-d32", Access::Mixed, 32),
    at_half_load(random("rand-mixed-4k-half-load", Access::Mixed, 32)),
    random("rand-write-4k-d1", Access::Write, 1),
    random("rand-write-4k-d32", Access::Write, 32),
    random("rand-write-4k-d128", Access::Write, 128),
    on_four_queues(random("rand-write-4k-d32x4", Access::Write, 32)),
    at_half_load(random("rand-write-4k-half-load", Access::Write, 32)),
    zipf("zipf-write-4k-d32", Access::Write, 32),
    random("write-flush-4k-d1", Access::WriteFlush, 1),
    large(random("rand-write-128k-d1", Access::Write, 1)),
    large(random("rand-write-128k-d32", Access::Write, 32)),
    large(random("rand-write-128k-d128", Access::Write, 128)),
    sequential("seq-write-4k-d1", Access::Write, 1),
    sequential("seq-write-4k-d32", Access::Write, 32),
    sequential("seq-write-4k-d128", Access::Write, 128),
    large(sequential("seq-write-128k-d1", Access::Write, 1)),
    large(sequential("seq-write-128k-d32", Access::Write, 32)),
    large(sequential("seq-write-128k-d128", Access::Write, 128)),
    Workload { sustained: true, ..random("rand-write-4k-d32-sustained", Access::Write, 32) },
];

/// Those of a quick run.
pub(crate) const QUICK: [&str; 9] = [
    "rand-read-4k-d1",
    "rand-read-4k-d32",
    "seq-read-128k-d32",
    "rand-mixed-4k-d32",
    "rand-write-4k-d1",
    "rand-write-4k-d32",
    "rand-write-4k-d128",
    "write-flush-4k-d1",
    "seq-write-128k-d32",
];

impl Workload {
    /// Whether it changes the disk.
    pub(crate) fn writes(&self) -> bool {
        self.access != Access::Read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_runs_are_a_part_of_the_full_ones() {
        assert!(QUICK.iter().all(|name| ALL.iter().any(|workload| workload.name == *name)));
    }
}
