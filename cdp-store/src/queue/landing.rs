//! Memory of our own in which large reads land, in huge pages.
//!
//! A guest's memory may be in pages of 4096 bytes, wherever the host has put them, and a disk takes each as a piece by
//! itself: it may have room for few such requests at a time. Each block is looked at before its reader hears of it, so
//! landing elsewhere costs only that what was looked at is written once more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cdp_types::IoBuf;

/// Shorter reads have so few pieces that it is not worth it.
pub const WORTH_BYTES: usize = 32 << 10;
/// What memory is lent in, in bytes.
const PIECE: usize = 128 << 10;
/// What is asked of the system at a time: a huge page.
const SLAB: usize = 2 << 20;
/// The most that all queues of a store have together. What does not fit lands in the request's own memory.
const MOST_BYTES: usize = 16 << 20;

/// What all queues of a store share.
#[derive(Debug, Default)]
pub struct Landings(Mutex<Free>);

#[derive(Debug, Default)]
struct Free {
    pieces: Vec<IoBuf>,
    made_bytes: usize,
}

/// Pieces that are lent: they are given back when nothing can be written to them any more.
struct Loan {
    pieces: Vec<IoBuf>,
    home: Arc<Landings>,
}

impl Landings {
    fn take(&self, wanted: usize) -> Option<Vec<IoBuf>> {
        let mut free = self.free();
        let lacking = wanted.saturating_sub(free.pieces.len()).div_ceil(SLAB / PIECE);
        if free.made_bytes + lacking * SLAB > MOST_BYTES {
            return None;
        }
        free.made_bytes += lacking * SLAB;
        let taken = wanted.min(free.pieces.len());
        let rest = free.pieces.len() - taken;
        let mut pieces = free.pieces.split_off(rest);
        drop(free);
        // Without the lock: a huge page takes a while to be had.
        for slab in (0..lacking).map(|_| IoBuf::zeroed(SLAB)) {
            pieces.extend((0..SLAB / PIECE).map(|nth| slab.slice(nth * PIECE, PIECE)));
        }
        let left_over = pieces.split_off(wanted);
        if !left_over.is_empty() {
            self.free().pieces.extend(left_over);
        }
        Some(pieces)
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` bytes, unless so much is not left; what is in them may be anything that was read before. They are lent until
    /// the last handle on them goes.
    pub fn lend(self: &Arc<Self>, len: usize) -> Option<IoBuf> {
        let pieces = self.take(len.div_ceil(PIECE))?;
        let handles: Vec<IoBuf> = pieces.iter().map(IoBuf::share).collect();
        let loan = Loan { pieces, home: Arc::clone(self) };
        Some(IoBuf::gathered(handles, Arc::new(loan)).slice(0, len))
    }
}

#[cfg(test)]
impl Landings {
    /// What was made so far, in bytes.
    pub fn made_bytes(&self) -> usize {
        self.free().made_bytes
    }

    /// What of it is not lent, in bytes.
    pub fn free_bytes(&self) -> usize {
        self.free().pieces.len() * PIECE
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.home.free().pieces.append(&mut self.pieces);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_lent_is_nobody_elses_and_comes_back_with_its_last_handle() {
        let landings = Arc::new(Landings::default());
        let mut lent: Vec<IoBuf> = Vec::new();
        while let Some(one) = landings.lend(PIECE + 4096) {
            assert_eq!(one.len(), PIECE + 4096);
            one.copy_in(0, &vec![lent.len() as u8; one.len()]);
            lent.push(one);
        }
        assert_eq!(lent.len(), MOST_BYTES / (2 * PIECE));
        for (nth, one) in lent.iter().enumerate() {
            assert!(one.to_vec().iter().all(|byte| *byte == nth as u8), "{nth} was lent twice");
        }
        let handle = lent.pop().unwrap().share();
        let part = handle.slice(0, 4096);
        drop(handle);
        assert!(landings.lend(1).is_none(), "a part of it is still in use");
        drop(part);
        assert!(landings.lend(2 * PIECE).is_some());
        drop(lent);
        assert!(landings.lend(MOST_BYTES + 1).is_none());
        assert_eq!(landings.lend(MOST_BYTES).unwrap().len(), MOST_BYTES);
        let new = Arc::new(Landings::default());
        assert!(new.lend(MOST_BYTES + 1).is_none());
        assert_eq!(new.made_bytes(), 0, "nothing is made for what cannot be had");
    }
}
