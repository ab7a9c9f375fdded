//! A volume's part in an epoch: getting its log ready for a record that must not wait, and appending that.

use std::io;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering as Memory;

use cdp_types::{BranchId, IoErrorKind, Ordinal};

use super::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{EpochRecord, Record, RecordKind};
use crate::log::{Append, Draft, LogState, Placement};
use crate::queue::Inbox;
use crate::storage::AlignedBuf;

/// With so much left in its segment when an epoch is armed, a log has the next segment at hand before that is full.
const ROOM_BYTES: u64 = 1 << 20;

/// An epoch record that has its place in the log and must be written there.
#[derive(Debug)]
pub(crate) struct PlacedEpoch {
    placement: Placement,
    bytes: AlignedBuf,
}

impl PlacedEpoch {
    /// The batch.
    pub fn ordinal(&self) -> Ordinal {
        self.placement.ordinal
    }
}

impl Volume {
    /// Gets the log ready for an epoch record, until [`Volume::disarm`]: whatever an append may have to wait for is
    /// done now, and the background appends nothing of its own. Returns the head branch.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] if the volume takes no writes, [`ErrorKind::NoSpace`] if there is none for a segment,
    /// [`ErrorKind::Busy`] if writes that failed are still being sorted out.
    pub(crate) fn arm(&self) -> Result<BranchId> {
        self.armed.fetch_add(1, Memory::AcqRel);
        let ready = self.prepare();
        if ready.is_err() {
            self.disarm();
        }
        ready
    }

    /// Ends what [`Volume::arm`] began.
    pub(crate) fn disarm(&self) {
        self.armed.fetch_sub(1, Memory::AcqRel);
    }

    /// Whether an epoch is armed: whoever holds the log's lock for long holds up a guest then.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed.load(Memory::Acquire) > 0
    }

    fn prepare(&self) -> Result<BranchId> {
        let context = &self.shared().log;
        let mut log = self.log();
        if let Some((_, why)) = self.read_only_reason().or_else(|| Self::poison_of(&log)) {
            let text = format!("volume '{}' takes no writes: {why}", self.row().name);
            return Err(Error::new(ErrorKind::ReadOnly, text));
        }
        // One for the cut, if that is due, and one behind it, in case that the open one is full by then.
        for _ in 0..2 {
            if log.lacks_room(ROOM_BYTES) {
                let blank = context.segments.create_small(self.id())?;
                self.take_over(&mut log, blank);
            }
            self.cut_if_due(&mut log, None);
        }
        if log.needs_cut() {
            let text = format!("volume '{}' is sorting out writes that failed", self.row().name);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        drop(log);
        Ok(self.row().branch)
    }

    fn poison_of(log: &LogState) -> Option<(IoErrorKind, String)> {
        log.poisoned().map(|why| (IoErrorKind::Device, why.to_owned()))
    }

    /// Why an epoch of a branch cannot be cut now, if that is so. `log` is this volume's.
    pub(crate) fn epoch_obstacle(&self, log: &LogState, branch: BranchId) -> Option<Error> {
        let (kind, why) = match self.read_only_reason().or_else(|| Self::poison_of(log)) {
            Some((_, why)) => (ErrorKind::ReadOnly, format!("takes no writes: {why}")),
            None => log.epoch_obstacle(branch)?,
        };
        Some(Error::new(kind, format!("volume {} {why}", self.id())))
    }

    /// Gives an epoch record its place. `log` is this volume's.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if no segment is at hand for it.
    pub(crate) fn place_epoch(
        &self,
        log: &mut MutexGuard<'_, LogState>,
        record: &EpochRecord,
    ) -> Result<PlacedEpoch> {
        let event = Record::event(RecordKind::Epoch, record.epoch.0);
        let draft = Draft::event(event, record.encode(), self.shared().log.segments.alignment());
        match self.append_locked(log, draft, &Inbox::nobody()) {
            Append::Placed(placement, buffer) => {
                let mut bytes = AlignedBuf::zeroed(placement.range.len());
                bytes.copy_from_slice(&buffer[placement.range.clone()]);
                Ok(PlacedEpoch { placement, bytes })
            }
            Append::Blocked(_) => {
                let text = format!("volume {} has no segment at hand for the epoch", self.id());
                Err(Error::new(ErrorKind::Busy, text))
            }
        }
    }

    /// Writes a record that was placed, and has it acknowledged.
    ///
    /// # Durability
    /// None.
    ///
    /// # Errors
    /// If it cannot be written: the record is cut off.
    pub(crate) fn write_epoch(&self, placed: &PlacedEpoch) -> Result<()> {
        let Placement { file, offset, ordinal, .. } = &placed.placement;
        let written = file.write_at(*offset, &placed.bytes);
        let told = match &written {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(IoErrorKind::NoSpace),
            Err(_) => Err(IoErrorKind::Device),
        };
        self.complete(*ordinal, told, &Inbox::nobody());
        written.map_err(|e| Error::io(format!("writing {}, byte {offset}", file.name()), e))
    }
}
