//! The room that a log has for what is appended to it.

use super::{LogContext, LogState, Open};
use crate::error::Result;
use crate::format::{BatchHeader, data_start};
use crate::segments::{Blank, Wish, set_aside};

impl LogState {
    /// Whether a blank segment should be supplied through [`LogState::supply`], and of what kind.
    #[must_use]
    pub fn wants_segment(&self, context: &LogContext) -> Option<Wish> {
        // A cut always needs a fresh one, however little of the present one is used.
        let half_full = self.open.as_ref().is_none_or(|o| 2 * o.offset > o.segment.header.capacity);
        let full = half_full || self.outgrown;
        let growing = self.open.as_ref().is_some_and(|open| open.grows);
        let flushed = self.open.as_ref().is_some_and(Open::is_flushed);
        let streams = self.open.as_ref().is_some_and(Open::streams);
        (self.blank.is_none() && (full || self.needs_cut || (growing && flushed))).then(|| Wish {
            capacity: context.segments.capacity_after(self.opened_since_cut),
            filled: flushed || !(self.waited || streams),
            growing,
        })
    }

    /// Whether so many bytes, or a cut that is due, would have to wait for a segment.
    #[must_use]
    pub fn lacks_room(&self, bytes: u64) -> bool {
        self.blank.is_none() && (self.needs_cut || !self.open.as_ref().is_some_and(|open| open.fits(bytes)))
    }

    /// Hands over a blank segment; returns one that was at hand already.
    #[must_use]
    pub fn supply(&mut self, blank: Blank) -> Option<Blank> {
        self.blank.replace(blank)
    }

    /// Takes the blank segment that is at hand.
    pub fn take_blank(&mut self) -> Option<Blank> {
        self.blank.take()
    }

    /// Has the file system set aside what the next event takes, with a body of so many bytes: if that succeeds, its write does
    /// not fail for want of space. Where a file system cannot do that it may.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`]. Nothing has changed then.
    pub fn set_aside(&self, context: &LogContext, body: usize) -> Result<()> {
        let unit = context.segments.alignment().physical_block;
        // A flush record may come with it.
        let bytes = BatchHeader::encoded_len(2, 0, body, unit) as u64;
        match (&self.open, &self.blank) {
            (Some(open), _) if !self.needs_cut && open.fits(bytes) => match open.grows {
                true => set_aside(&open.segment.file, open.offset + bytes),
                false => Ok(()),
            },
            (_, Some(blank)) if !blank.filled => set_aside(&blank.file, data_start(unit) + bytes),
            _ => Ok(()),
        }
    }
}
