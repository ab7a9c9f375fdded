//! Words shared by the store and its front ends.
//!
//! A front end (the vhost-user server, the NBD server) sees a volume through [`BlockDevice`] and
//! [`DeviceQueue`], and tells the store about a guest's rings through [`VmControl`]. It needs no
//! RocksDB, no log and no daemon to be built or tested. What a word means is in `docs/glossary.md`.

mod aligned;
mod buffer;
mod checksum;
mod control;
mod device;
mod error;
mod ids;
mod instant;
mod memory;

mod name;
mod range;

pub use aligned::AlignedBuf;
pub use buffer::{IoBuf, IoSegment};
pub use checksum::crc32c;
pub use control::{NoVmControl, RingStop, VmControl};
pub use device::{
    BlockDevice, DeviceIdentity, DeviceInfo, DeviceQueue, Event, Listener, Op, Ranges, RequestId, Wait,
};
pub use error::{IoError, IoErrorKind, one_line};
pub use ids::{BranchId, CheckpointId, EpochId, Generation, Ordinal, Origin, Seq, VmId, VolumeId};
pub use instant::{Instant, InstantError, VolumeAt};
pub use memory::{MemoryConfig, MemoryDevice, MemoryFaults};

pub use name::{Label, NameError, VmName, VolumeName};
pub use range::{BLOCK_SIZE, BlockRange, ByteRange, RangeError, SECTOR_SIZE};
