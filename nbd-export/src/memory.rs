//! Memory for payloads: counted, bounded, and used again.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cdp_types::IoBuf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The unit in which memory is counted, and the smallest buffer, in bytes.
const UNIT: usize = 4096;
/// Sizes of buffers: powers of two from [`UNIT`] to the longest request.
const CLASSES: usize = 14;
/// Buffers up to this size are cut from pieces of it: in huge pages, direct I/O has fewer pieces to hand to the disk.
const SLAB: usize = 2 << 20;
/// What one thread keeps of buffers that are not in use, in bytes.
const KEPT_BYTES: usize = 16 << 20;

const _: () = assert!(UNIT << (CLASSES - 1) == 32 << 20);

/// The memory that all connections together may use for payloads.
#[derive(Debug)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { units: Arc::new(Semaphore::new(bytes / UNIT)), waiting: AtomicUsize::new(0) }
    }

    /// Whether somebody waits for memory.
    pub(crate) fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Waits for its turn.
    async fn take(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.units).try_acquire_many_owned(units) {
            return Some(permit);
        }
        let _waiting = Waiting::new(&self.waiting);
        // It is never closed.
        Arc::clone(&self.units).acquire_many_owned(units).await.ok()
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One thread's buffers that are not in use, by size.
pub(crate) struct Pool {
    budget: Arc<Budget>,
    free: RefCell<[Vec<IoBuf>; CLASSES]>,
    kept_bytes: Cell<usize>,
}

impl Pool {
    pub(crate) fn new(budget: Arc<Budget>) -> Rc<Self> {
        Rc::new(Self { budget, free: RefCell::default(), kept_bytes: Cell::new(0) })
    }

    fn class(len: usize) -> usize {
        len.div_ceil(UNIT).next_power_of_two().trailing_zeros() as usize
    }

    /// What a buffer for `len` bytes counts for, in bytes.
    pub(crate) fn cost(len: usize) -> usize {
        UNIT << Self::class(len)
    }

    /// A buffer of `len` bytes, at most 32 MiB, once there is memory for it. What is in it may be anything that went
    /// through this server: it must be filled before anybody sees it. `held` grows by what it counts for, until it
    /// is dropped.
    pub(crate) async fn take(self: &Rc<Self>, len: usize, held: &Rc<Cell<usize>>) -> Option<Buffer> {
        let class = Self::class(len);
        let permit = self.budget.take(1 << class).await?;
        let kept = self.free.borrow_mut()[class].pop();
        let memory = match kept {
            Some(memory) => {
                self.kept_bytes.set(self.kept_bytes.get() - (UNIT << class));
                memory
            }
            None => self.cut(class),
        };
        held.set(held.get() + (UNIT << class));
        let base = memory.segments().first()?.base;
        let (held, pool) = (Rc::clone(held), Rc::clone(self));
        Some(Buffer { memory: Some(memory), base, len, class, held, pool, _permit: permit })
    }

    /// New memory of a class; of a small one a slab's worth, of which the rest is kept. Where that cannot be kept there is no
    /// slab: one slice of it would hold all of it, and count for no more than itself.
    fn cut(&self, class: usize) -> IoBuf {
        let size = UNIT << class;
        if size >= SLAB || self.kept_bytes.get() + SLAB > KEPT_BYTES {
            return IoBuf::zeroed(size);
        }
        let slab = IoBuf::zeroed(SLAB);
        (1..slab.len() / size).for_each(|nth| self.put(class, slab.slice(nth * size, size)));
        slab.slice(0, size)
    }

    /// Keeps memory that is not in use, rather than larger pieces, which are soon had again.
    fn put(&self, class: usize, memory: IoBuf) {
        let mut free = self.free.borrow_mut();
        while self.kept_bytes.get() + (UNIT << class) > KEPT_BYTES {
            let Some(larger) = (class + 1..CLASSES).rev().find(|&larger| !free[larger].is_empty()) else {
                return;
            };
            drop(free[larger].pop());
            self.kept_bytes.set(self.kept_bytes.get() - (UNIT << larger));
        }
        self.kept_bytes.set(self.kept_bytes.get() + (UNIT << class));
        free[class].push(memory);
    }
}

/// Memory for one payload, on a 4096-byte boundary. It belongs to one request: filled by the client or the device, and
/// then read by the other; never by both at once.
pub(crate) struct Buffer {
    /// None only while it is dropped.
    memory: Option<IoBuf>,
    base: *mut u8,
    len: usize,
    class: usize,
    held: Rc<Cell<usize>>,
    pool: Rc<Pool>,
    _permit: OwnedSemaphorePermit,
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Its first byte. It stays where it is for as long as the buffer lives.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// The same memory, for the device. The buffer must live until that request has ended, and not be touched.
    pub(crate) fn io(&self) -> IoBuf {
        match &self.memory {
            Some(memory) => memory.slice(0, self.len),
            None => IoBuf::zeroed(0),
        }
    }

    /// Copies to its start, or to `at`. What does not fit is left out.
    pub(crate) fn fill(&mut self, at: usize, from: &[u8]) {
        if let Some(memory) = &self.memory {
            memory.copy_in(at, &from[..from.len().min(self.len - at)]);
        }
    }

    /// Its bytes, while no request has them.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `base..base + len` is mapped for as long as `memory` lives, which `self` owns, and was initialised by
        // `IoBuf::zeroed`. Whoever holds a `Buffer` outside of the table of pending requests has it back from the
        // device, which by `Op`'s contract does not touch it after the request's completion, or has not given it away
        // yet; so nobody writes to it while this borrow lasts.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }

    /// Whether every byte is zero. Returns at the first that is not.
    pub(crate) fn is_zero(&self) -> bool {
        let (chunks, rest) = self.bytes().as_chunks::<64>();
        chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.held.set(self.held.get() - (UNIT << self.class));
        if let Some(memory) = self.memory.take() {
            self.pool.put(self.class, memory);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn sizes_are_rounded_up_to_powers_of_two() {
        assert_eq!([1, 4096, 4097, 32 << 20].map(Pool::cost), [4096, 4096, 8192, 32 << 20]);
    }

    #[test]
    fn memory_is_used_again_and_counted_until_dropped() {
        let pool = Pool::new(Arc::new(Budget::new(1 << 20)));
        let held = Rc::new(Cell::new(0));
        let mut first = block_on(pool.take(5000, &held)).unwrap();
        first.fill(0, &[7; 5000]);
        assert!(!first.is_zero());
        let base = first.base();
        assert_eq!((first.len(), held.get()), (5000, 8192));
        drop(first);
        assert_eq!(held.get(), 0);
        assert_eq!(block_on(pool.take(8192, &held)).unwrap().base(), base);
    }

    #[test]
    fn where_nothing_more_is_kept_a_small_buffer_is_no_piece_of_a_slab() {
        let pool = Pool::new(Arc::new(Budget::new(64 << 20)));
        let held = Rc::new(Cell::new(0));
        drop(block_on(pool.take(KEPT_BYTES, &held)).unwrap());
        assert_eq!(pool.kept_bytes.get(), KEPT_BYTES);
        let small: Vec<_> = (0..8).map(|_| block_on(pool.take(4096, &held)).unwrap()).collect();
        let begins_a_slab = |buffer: &Buffer| (buffer.base() as usize).is_multiple_of(SLAB);
        assert!(!small.iter().all(begins_a_slab), "each has a slab of its own");
        // Small ones that come back take the place of the large one.
        drop(small);
        assert_eq!(pool.kept_bytes.get(), 8 * 4096);
        let free = |class: usize| pool.free.borrow()[class].len();
        assert_eq!((free(0), free(Pool::class(KEPT_BYTES))), (8, 0));
        drop(block_on(pool.take(32 << 20, &held)).unwrap());
        assert_eq!(pool.kept_bytes.get(), 8 * 4096, "too large to be kept");
    }

    #[test]
    fn whoever_finds_none_left_waits_and_is_seen_waiting() {
        let budget = Arc::new(Budget::new(8192));
        let pool = Pool::new(Arc::clone(&budget));
        let held = Rc::new(Cell::new(0));
        block_on(async {
            let first = pool.take(8192, &held).await.unwrap();
            let mut second = std::pin::pin!(pool.take(1, &held));
            let soon = std::time::Duration::from_millis(1);
            assert!(tokio::time::timeout(soon, second.as_mut()).await.is_err());
            assert!(budget.is_short());
            drop(first);
            assert!(second.await.is_some());
            assert!(!budget.is_short());
        });
    }

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        let pool = Pool::new(Arc::new(Budget::new(1 << 20)));
        let held = Rc::new(Cell::new(0));
        let mut buffer = block_on(pool.take(200, &held)).unwrap();
        assert!(buffer.is_zero());
        for at in [0, 63, 64, 191, 192, 199] {
            buffer.fill(at, &[1]);
            assert!(!buffer.is_zero(), "{at}");
            buffer.fill(at, &[0]);
        }
    }
}
