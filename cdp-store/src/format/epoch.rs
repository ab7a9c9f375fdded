//! The body of a batch with an epoch record. `docs/format.md`, "Epoch".

use cdp_types::{BranchId, CheckpointId, EpochId, VmId, VolumeId};
use serde::{Deserialize, Serialize};

use super::FormatError;
use super::bytes::{put_u32, put_u64, u32_at, u64_at};

const EPOCH: usize = 0;
const VM: usize = 8;
const CHECKPOINT: usize = 16;
const COUNT: usize = 24;
const FIXED_LEN: usize = 32;
const MEMBER_LEN: usize = 16;

/// Disks that one machine can have: what an epoch record has room for beside everything else in a header.
pub const MAX_MEMBERS: usize = 256;

/// A disk of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochMember {
    /// Which volume.
    pub volume: VolumeId,
    /// Its head branch when the epoch was armed.
    pub branch: BranchId,
}

/// What an epoch record says, the same in the logs of all its members: alone it means nothing, because the machine's
/// other disks may lack theirs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch.
    pub epoch: EpochId,
    /// Whose disks were cut.
    pub vm: VmId,
    /// The checkpoint that it was cut for: the attempt.
    pub checkpoint: CheckpointId,
    /// All disks that were cut, in the machine's order.
    pub members: Vec<EpochMember>,
}

impl EpochRecord {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; FIXED_LEN + self.members.len() * MEMBER_LEN];
        put_u64(&mut out, EPOCH, self.epoch.0);
        put_u64(&mut out, VM, self.vm.0);
        put_u64(&mut out, CHECKPOINT, self.checkpoint.0);
        put_u32(&mut out, COUNT, self.members.len() as u32);
        for (member, at) in self.members.iter().zip((FIXED_LEN..).step_by(MEMBER_LEN)) {
            put_u64(&mut out, at, member.volume.0);
            put_u64(&mut out, at + 8, member.branch.0);
        }
        out
    }

    /// From a batch's body.
    ///
    /// # Errors
    /// If it is no epoch record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() < FIXED_LEN {
            return Err(FormatError::Field("epoch length"));
        }
        let count = u32_at(bytes, COUNT) as usize;
        if count == 0 || count > MAX_MEMBERS || bytes.len() != FIXED_LEN + count * MEMBER_LEN {
            return Err(FormatError::Field("epoch member count"));
        }
        let member = |bytes: &[u8]| EpochMember {
            volume: VolumeId(u64_at(bytes, 0)),
            branch: BranchId(u64_at(bytes, 8)),
        };
        Ok(Self {
            epoch: EpochId(u64_at(bytes, EPOCH)),
            vm: VmId(u64_at(bytes, VM)),
            checkpoint: CheckpointId(u64_at(bytes, CHECKPOINT)),
            members: bytes[FIXED_LEN..].chunks_exact(MEMBER_LEN).map(member).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn epochs() -> impl Strategy<Value = EpochRecord> {
        let member = (any::<u64>(), any::<u64>())
            .prop_map(|(v, b)| EpochMember { volume: VolumeId(v), branch: BranchId(b) });
        let members = prop::collection::vec(member, 1..=MAX_MEMBERS);
        (any::<u64>(), any::<u64>(), any::<u64>(), members).prop_map(|(epoch, vm, checkpoint, members)| {
            let (epoch, vm, checkpoint) = (EpochId(epoch), VmId(vm), CheckpointId(checkpoint));
            EpochRecord { epoch, vm, checkpoint, members }
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(epoch in epochs()) {
            prop_assert_eq!(EpochRecord::decode(&epoch.encode()), Ok(epoch));
        }

        #[test]
        fn a_body_that_was_cut_short_is_no_epoch(epoch in epochs(), cut in 1_usize..64) {
            let bytes = epoch.encode();
            prop_assert!(EpochRecord::decode(&bytes[..bytes.len().saturating_sub(cut)]).is_err());
        }

        #[test]
        fn any_bytes_are_an_epoch_or_an_error(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600),
            members in 0_usize..40,
        ) {
            // At random, next to none has a length that its count allows.
            if members > 0 {
                bytes.resize(FIXED_LEN + members * MEMBER_LEN, 0x5a);
                bytes[COUNT..COUNT + 4].copy_from_slice(&(members as u32).to_le_bytes());
            }
            let decoded = EpochRecord::decode(&bytes);
            prop_assert!(members == 0 || members > MAX_MEMBERS || decoded.is_ok());
            if let Ok(epoch) = decoded {
                prop_assert_eq!(EpochRecord::decode(&epoch.encode()), Ok(epoch));
            }
        }
    }
}
