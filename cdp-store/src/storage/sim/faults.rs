//! Faults to order.

/// What can be made to fail. Blocking calls and those of lanes count together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reading from a file.
    Read,
    /// Writing to a file.
    Write,
    /// Setting a file's blocks aside.
    Reserve,
    /// Syncing a file.
    Sync,
    /// Asking for a file's length.
    Len,
    /// Opening a file.
    Open,
    /// Creating a file or a directory.
    Create,
    /// Removing a file.
    Remove,
    /// Listing a directory.
    List,
    /// Syncing a directory.
    SyncDirectory,
}

/// How often a fault happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Once, after so many operations that could have had it.
    Nth(u64),
    /// Always, after so many operations that could have had it.
    From(u64),
    /// With a probability, each time.
    Rate(f64),
}

/// A fault to order with [`SimDisk::fail`](super::SimDisk::fail).
///
/// A write that fails with ENOSPC has landed up to some sector. With any other error it has not landed, or wholly, or
/// in part, or lands late. A sync that fails has lost some of what it covered. All else fails without effect.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What fails.
    pub kind: OpKind,
    /// Which file or directory it must concern; `None`: any.
    pub file: Option<String>,
    /// How often.
    pub when: When,
    /// With which error number of libc.
    pub errno: i32,
}

/// Where a misdirected write lands.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Astray {
    Nowhere,
    Somewhere,
    At(String, u64),
}

#[derive(Default)]
pub(super) struct Faults {
    ordered: Vec<Fault>,
    /// How many writes are still to come before each, and what happens then.
    astray: Vec<(u64, Astray)>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.ordered.push(fault);
    }

    pub(super) fn lose(&mut self, n: u64) {
        self.astray.push((n, Astray::Nowhere));
    }

    pub(super) fn misdirect(&mut self, n: u64, to: Option<(&str, u64)>) {
        self.astray
            .push((n, to.map_or(Astray::Somewhere, |(name, offset)| Astray::At(name.to_owned(), offset))));
    }

    /// Whether an operation fails, and with what. `chance` draws with a probability.
    pub(super) fn draw(
        &mut self,
        kind: OpKind,
        name: &str,
        mut chance: impl FnMut(f64) -> bool,
    ) -> Option<i32> {
        let mut failed = None;
        self.ordered.retain_mut(|fault| {
            let concerned = fault.kind == kind && fault.file.as_ref().is_none_or(|file| file == name);
            if !concerned {
                return true;
            }
            let happens = match &mut fault.when {
                When::Nth(0) | When::From(0) => true,
                When::Nth(left) | When::From(left) => {
                    *left -= 1;
                    false
                }
                When::Rate(probability) => chance(*probability),
            };
            // One that comes at the same time as another, and is to happen once, is due at the next operation.
            let taken = happens && failed.is_none();
            if taken {
                failed = Some(fault.errno);
            }
            !(taken && fault.when == When::Nth(0))
        });
        failed
    }

    /// Whether a write that succeeds lands where it should not.
    pub(super) fn draw_astray(&mut self) -> Option<Astray> {
        let mut found = None;
        self.astray.retain_mut(|(left, how)| {
            if *left > 0 {
                *left -= 1;
                return true;
            }
            let taken = found.is_none();
            if taken {
                found = Some(how.clone());
            }
            !taken
        });
        found
    }
}
