//! Numbers that name things. Each is its own type, so that none can be passed for another.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A volume of a store. Never reused; 0 is the store log.
    VolumeId
);
id!(
    /// A branch of a volume's history. Never reused; the first is 1.
    BranchId
);
id!(
    /// The fencing number of one opening of a store; it grows by one with each.
    Generation
);
id!(
    /// A volume's dense count of its batches. The first batch is 1; 0 means "none yet".
    Ordinal
);
id!(
    /// A store-unique number of one guest request, kept in the in-flight region that outlives this process
    /// and in the request's log record; 0 means "not tracked".
    Origin
);

id!(
    /// A virtual machine that is registered with a store. Never reused; the first is 1.
    VmId
);
id!(
    /// A checkpoint of a virtual machine, store-wide: one attempt to take it, whatever became of it. Never reused; the
    /// first is 1.
    CheckpointId
);
id!(
    /// A numbered cut across the disks of a machine, store-wide. Never reused; the first is 1.
    EpochId
);

impl Ordinal {
    /// The ordinal of the batch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The place of one change in the order of the whole store: generation ‖ counter, never reissued.
///
/// The generation is in the upper 24 bits, the counter in the lower 40. `Seq(0)` is before every change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// Bits of the counter part.
    pub const COUNTER_BITS: u32 = 40;
    /// Before every change.
    pub const ZERO: Self = Self(0);
    /// After every change that can ever be.
    pub const MAX: Self = Self(u64::MAX);

    /// The first `Seq` of a generation.
    #[must_use]
    pub fn first_of(generation: Generation) -> Self {
        Self(generation.0 << Self::COUNTER_BITS | 1)
    }

    /// The generation that issued it.
    #[must_use]
    pub fn generation(self) -> Generation {
        Generation(self.0 >> Self::COUNTER_BITS)
    }

    /// The `Seq` that many places on.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }

    /// The instant just before this one.
    #[must_use]
    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_generation_is_after_every_counter_of_an_earlier_one() {
        let last = Seq(Seq::first_of(Generation(8)).0 - 1);
        assert!(last < Seq::first_of(Generation(8)));
        assert_eq!(Seq::first_of(Generation(7)).plus((1 << 40) - 2).generation(), Generation(7));
        assert!(Seq::first_of(Generation(7)).plus((1 << 40) - 2) < Seq::first_of(Generation(8)));
        assert_eq!(Seq::first_of(Generation(7)).generation(), Generation(7));
    }
}
