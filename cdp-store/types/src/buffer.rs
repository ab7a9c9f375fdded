//! Memory that a request reads from or writes to.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use crate::AlignedBuf;

/// One contiguous piece of a request's memory.
#[derive(Clone, Copy, Debug)]
pub struct IoSegment {
    /// Its first byte.
    pub base: *mut u8,
    /// Its length, in bytes.
    pub len: usize,
}

/// The memory of one request: pieces in order, and the owner that keeps them mapped.
///
/// It may be guest memory, so it is never seen as a slice: another processor can change it at any moment. All
/// access is by copying through raw pointers, or by the kernel.
pub struct IoBuf {
    segments: SmallVec<[IoSegment; 4]>,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

/// What keeps gathered buffers.
struct Gathered {
    parts: Vec<IoBuf>,
    _keeper: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are only used through copies whose soundness `IoBuf::new`'s contract gives to any
// thread; `owner` is itself Send and Sync.
unsafe impl Send for IoBuf {}
// SAFETY: as above; no method hands out a reference into the memory.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A buffer over memory that `owner` keeps alive, and that somebody else may change: see [`IoBuf::is_foreign`].
    ///
    /// # Safety
    /// For as long as any clone of `owner` lives, every segment must be mapped, readable and writable, and no
    /// Rust reference to any byte of it may exist while this buffer is used. The bytes may change at any time.
    #[must_use]
    pub unsafe fn new(segments: SmallVec<[IoSegment; 4]>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let len = segments.iter().map(|s| s.len).sum();
        Self { segments, len, owner }
    }

    /// A buffer of its own, `bytes` long and zeroed, aligned to 4096 bytes; for tests, NBD and inspection.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let memory = Arc::new(AlignedBuf::zeroed(len));
        let segment = IoSegment { base: memory.base(), len };
        // Nobody takes a reference to the memory out of there.
        Self { segments: smallvec![segment], len, owner: memory }
    }

    /// These buffers, one behind the other. `keeper` is dropped when the last handle on what comes of it goes.
    #[must_use]
    pub fn gathered(parts: Vec<Self>, keeper: Arc<dyn Any + Send + Sync>) -> Self {
        let segments: SmallVec<_> = parts.iter().flat_map(|part| part.segments.iter().copied()).collect();
        let len = parts.iter().map(Self::len).sum();
        Self { segments, len, owner: Arc::new(Gathered { parts, _keeper: keeper }) }
    }

    /// A buffer of its own with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buffer = Self::zeroed(bytes.len());
        buffer.copy_in(0, bytes);
        buffer
    }

    /// A second handle on the same memory, to read it after a request has consumed the first.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { segments: self.segments.clone(), len: self.len, owner: Arc::clone(&self.owner) }
    }

    /// Its length, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is zero bytes long.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it is somebody else's memory, such as a guest's: it may change at any moment, and lies in pages of any size.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        // By its owner, because a buffer is moved about with each request and should stay small.
        match self.owner.downcast_ref::<Gathered>() {
            Some(Gathered { parts, .. }) => parts.iter().any(Self::is_foreign),
            None => !self.owner.is::<AlignedBuf>(),
        }
    }

    /// Its pieces, in order.
    #[must_use]
    pub fn segments(&self) -> &[IoSegment] {
        &self.segments
    }

    /// The part of `len` bytes from `offset`, over the same memory.
    ///
    /// # Panics
    /// If the part does not lie inside the buffer: a caller's bug, since lengths are checked on entry.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let mut segments = SmallVec::new();
        self.for_each(offset, len, |base, len, _| segments.push(IoSegment { base, len }));
        Self { segments, len, owner: Arc::clone(&self.owner) }
    }

    /// Copies from `offset` into `to`.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        let target = to.as_mut_ptr();
        self.for_each(offset, to.len(), |base, len, at| {
            // SAFETY: `base..base+len` is mapped by `new`'s contract; `at + len <= to.len()` by `for_each`; the
            // two cannot overlap, since no Rust reference to buffer memory exists (`new`).
            unsafe { std::ptr::copy_nonoverlapping(base, target.add(at), len) }
        });
    }

    /// Copies `from` in at `offset`.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        let source = from.as_ptr();
        self.for_each(offset, from.len(), |base, len, at| {
            // SAFETY: as in `copy_out`, in the other direction.
            unsafe { std::ptr::copy_nonoverlapping(source.add(at), base, len) }
        });
    }

    /// Zeroes `len` bytes from `offset`.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    pub fn fill_zero(&self, offset: usize, len: usize) {
        self.for_each(offset, len, |base, len, _| {
            // SAFETY: `base..base+len` is mapped and writable by `new`'s contract.
            unsafe { std::ptr::write_bytes(base, 0, len) }
        });
    }

    /// All its bytes, copied.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_out(0, &mut bytes);
        bytes
    }

    /// Calls `f(base, len, bytes done before)` for each piece of `offset..offset+len`.
    fn for_each(&self, offset: usize, len: usize, mut f: impl FnMut(*mut u8, usize, usize)) {
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        assert!(end.is_some(), "{offset}+{len} is outside a buffer of {} bytes", self.len);
        let (mut skip, mut done) = (offset, 0);
        for segment in &self.segments {
            if done == len {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let part = (segment.len - skip).min(len - done);
            // SAFETY: `skip < segment.len`, so the pointer stays inside the segment.
            f(unsafe { segment.base.add(skip) }, part, done);
            done += part;
            skip = 0;
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes in {})", self.len, self.segments.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_copies_cross_segment_edges() {
        let memory = IoBuf::from_bytes(&(0..=255).collect::<Vec<u8>>());
        let base = memory.segments()[0].base;
        // SAFETY: both pieces lie in `memory`, which is the owner.
        let scattered = unsafe {
            IoBuf::new(
                smallvec![
                    IoSegment { base: base.add(100), len: 10 },
                    IoSegment { base, len: 3 },
                    IoSegment { base: base.add(200), len: 20 },
                ],
                Arc::new(memory.share()),
            )
        };
        let part = scattered.slice(8, 6);
        assert_eq!(part.to_vec(), [108, 109, 0, 1, 2, 200]);
        part.copy_in(1, &[7, 7, 7, 7]);
        assert_eq!(scattered.slice(8, 6).to_vec(), [108, 7, 7, 7, 7, 200]);
        part.fill_zero(4, 2);
        assert_eq!(part.to_vec(), [108, 7, 7, 7, 0, 0]);
    }

    #[test]
    fn gathered_buffers_are_one_and_keep_their_keeper() {
        let (first, second) = (IoBuf::from_bytes(&[1, 2, 3]), IoBuf::from_bytes(&[4, 5]));
        let keeper = Arc::new(());
        let both = IoBuf::gathered(vec![first.slice(1, 2), second], keeper.clone());
        assert_eq!((both.to_vec(), both.is_foreign()), (vec![2, 3, 4, 5], false));
        let part = both.slice(1, 2);
        drop(both);
        assert_eq!((part.to_vec(), Arc::strong_count(&keeper)), (vec![3, 4], 2));
        drop(part);
        assert_eq!(Arc::strong_count(&keeper), 1);
    }

    #[test]
    #[should_panic(expected = "outside a buffer")]
    fn a_slice_past_the_end_is_a_bug() {
        let _ = IoBuf::zeroed(8).slice(4, 5);
    }
}
