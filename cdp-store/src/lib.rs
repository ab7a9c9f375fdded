//! A continuous-data-protection store: append-only logs of volumes, and a time index over them.
//!
//! A [`Store`] is a directory. Its volumes are [`cdp_types::BlockDevice`]s; every write to one goes into that volume's
//! log, so that any past instant can be opened again ([`Store::open_at`]). The logs are the truth: the time index
//! and the catalogue follow from them and can be rebuilt. `docs/architecture.md` has the map of this crate and
//! the invariants that each module keeps; `docs/format.md` the bytes on disk.

pub mod clock;
pub mod index;
pub mod storage;

mod catalogue;
mod chunk;
mod error;
mod format;
mod leaves;
mod lineage;
mod loaders;
mod log;
mod map;
mod options;
mod pace;
mod queue;
mod reach;
mod segments;
mod shared;
mod store;
mod stretch;
mod volume;

pub use catalogue::{CheckpointMode, CheckpointState, Saved, SavedMember, SavedMemory};
pub use error::{Error, ErrorKind, Result};
pub use format::{EpochMember, EpochRecord};
pub use options::StoreOptions;
pub use store::{
    CheckpointInfo, CheckpointSpec, CloneSpec, Epoch, EpochCut, Finding, Import, OpeningProgress,
    RebuildReport, Reverted, Scratch, Seams, SegmentInfo, SegmentState, Store, StoreInfo, VerifyProgress,
    VerifyReport, VmInfo, VmReverted, VmSpec, VolumeSpec,
};
pub use volume::{
    BranchInfo, ChangedRun, ExtentInfo, ExtentState, Head, MarkInfo, RecordInfo, Resolved, Serving, Volume,
    VolumeInfo, VolumeState, VolumeStats,
};
