//! The store's segment files: which incarnation lies in which, and a pool of blank ones.
//!
//! A file is a *slot*. Slots are zero-filled ahead of their use, because appending to blocks that were written before
//! costs the file system nothing but the data (`docs/architecture.md`, "Segments"). A young log gets small slots: a
//! thousand little volumes must not take a thousand full ones. When logs take full-sized slots faster than they can be
//! filled, they get files whose blocks are only set aside: filling would take the disk away from the guests. The pool
//! grows with what is asked of it: what it lacked once, it has the next time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cdp_types::{Generation, VolumeId};
use foldhash::fast::RandomState;

use crate::error::{Error, Result};
use crate::format::{SegmentHeader, header_stride};
use crate::index::LogPos;
use crate::storage::{AlignedBuf, Alignment, File, Storage};

/// Where segment files lie, relative to the store.
pub const DIRECTORY: &str = "segments";
/// Bits of an incarnation that count within one generation.
const INCARNATION_COUNTER_BITS: u32 = 20;
/// Generations from here on have no place in an incarnation.
pub const GENERATION_LIMIT: Generation =
    Generation((LogPos::MAX_INCARNATION + 1) >> INCARNATION_COUNTER_BITS);
/// Capacity of a log's first segment, in bytes; each further one is four times as large, up to the full size.
const FIRST_CAPACITY: u64 = 4 << 20;
/// How much is zero-filled by one step, in bytes.
const PREFILL_STEP: u64 = 1 << 20;
/// What is zero-filled or set aside at once for a log when no full-sized slot is ready, in bytes. Of what was set aside the
/// log may leave a part unused.
const ORDERED_CAPACITY: u64 = 64 << 20;

/// From so many slots on their headers are read side by side. For fewer it gains nothing, and what a simulated disk does
/// follows from the order of what is asked of it.
const SIDE_BY_SIDE_FROM: usize = 64;
/// Threads that read headers: each waits for the disk most of the time.
const THREADS: usize = 8;

/// How much of a slot without a valid header is looked at, in bytes, and at least as much behind the headers' place.
const LOOK_BYTES: usize = 64 << 10;

/// With so much free above the reserve nobody lacks the space of blanks that are not given back yet, in bytes.
const AMPLE_BYTES: u64 = 1 << 30;

/// How many times its usual size the pool may grow to.
const MOST_GROWTH: usize = 4;
/// A pool that has grown leaves so many full-sized slots' worth of space free.
const LEFT_BY_GROWTH: u64 = 32;

/// A segment that holds a log's batches.
#[derive(Debug)]
pub struct Segment {
    /// Its file.
    pub file: Arc<dyn File>,
    /// Whose it is.
    pub header: SegmentHeader,
}

impl Segment {
    /// An opening of a later generation than this has newer incarnations: it is the one that opened the segment, or a later
    /// one if that had used up its own.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.header.generation.max(Generation(self.header.incarnation >> INCARNATION_COUNTER_BITS))
    }
}

/// A file that no log uses yet.
#[derive(Debug)]
pub struct Blank {
    slot: u64,
    /// The file.
    pub file: Arc<dyn File>,
    /// How far it may be written, in bytes.
    pub capacity: u64,
    /// Whether all its blocks have been written before: syncing what is written over them costs the data alone.
    pub filled: bool,
}

/// What a log wants of its next segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// How much it should hold, in bytes.
    pub capacity: u64,
    /// Whether it should lie on blocks that were written before, rather a smaller one then: each sync of other blocks
    /// costs more.
    pub filled: bool,
    /// Whether the log's present segment grows as it is written.
    pub growing: bool,
}

/// A slot found when the store was opened.
#[derive(Debug)]
pub struct Found {
    /// Its number.
    pub slot: u64,
    /// What it holds, if either header copy is valid.
    pub segment: Option<Arc<Segment>>,
    /// Neither is, but something was written to it, or cannot be read.
    pub is_doubtful: bool,
    /// Neither is, and nothing was: its file.
    pub blank: Option<Arc<dyn File>>,
}

/// A file that grows as it is written, and how far it may.
type Growing = (Arc<dyn File>, u64);

#[derive(Debug, Default)]
struct Pool {
    ready: Vec<Blank>,
    /// The slot being zero-filled, and how far that has come.
    filling: Option<(Blank, u64)>,
    wanted: VecDeque<(VolumeId, Wish)>,
    /// Whose wish is being granted: there is space for it.
    supplying: Option<VolumeId>,
    next_slot: u64,
    /// Files that were supplied without having been filled, newest first, and how far they may grow.
    growing: HashMap<VolumeId, Vec<Growing>>,
    /// Full-sized slots that were supplied since the pool last had nothing to do.
    supplied: u32,
    /// How many times its usual size the pool should have; 0 and 1 are the same.
    growth: usize,
}

/// What one step of the pool's background work did.
#[derive(Debug)]
pub enum PoolStep {
    /// A log's blank segment is there.
    Supplied(VolumeId, Blank),
    /// Part of a slot was zero-filled; there is more to do.
    Filled,
    /// The space of a blank that was removed was given back; there may be more.
    GivenBack,
    /// A log has just taken a full-sized slot: filling others can wait until that has stopped.
    Busy,
    /// Nothing to do.
    Idle,
    /// A log waits, and cannot be given its segment: there is no space, or no file can be made.
    Refused(VolumeId, Error),
}

/// All segments of a store.
#[derive(Debug)]
pub struct Segments {
    storage: Arc<dyn Storage>,
    alignment: Alignment,
    full_capacity: u64,
    pool_target: usize,
    reserve_bytes: u64,
    by_incarnation: RwLock<HashMap<u64, (u64, Arc<Segment>), RandomState>>,
    pool: Mutex<Pool>,
    /// Files that earlier processes have left blank, and that have no name any more.
    retired: Mutex<Vec<Arc<dyn File>>>,
    next_incarnation: AtomicU64,
    /// What is written ahead, one step long; every capacity is a multiple of it.
    zeroes: AlignedBuf,
}

/// A slot's file, relative to the store.
#[must_use]
pub fn slot_name(slot: u64) -> String {
    format!("{DIRECTORY}/{slot:08}")
}

/// Has the file system set aside the blocks of a file's first `len` bytes. Where it cannot do that, the file grows as it is
/// written.
///
/// # Errors
/// [`crate::ErrorKind::NoSpace`].
pub fn set_aside(file: &Arc<dyn File>, len: u64) -> Result<()> {
    match file.reserve(len) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            Err(Error::io(format!("setting space aside for {}", file.name()), error))
        }
        Err(error) => {
            tracing::debug!("{} grows as it is written: {error}", file.name());
            Ok(())
        }
    }
}

impl Segments {
    /// The segments of a store. None can be opened before [`Segments::start_generation`].
    #[must_use]
    pub fn new(
        storage: Arc<dyn Storage>,
        full_capacity: u64,
        pool_target: usize,
        reserve_bytes: u64,
    ) -> Self {
        Self {
            alignment: storage.alignment(),
            storage,
            full_capacity,
            pool_target,
            reserve_bytes,
            by_incarnation: RwLock::default(),
            pool: Mutex::default(),
            retired: Mutex::default(),
            next_incarnation: AtomicU64::new(0),
            zeroes: AlignedBuf::zeroed(PREFILL_STEP as usize),
        }
    }

    /// Has incarnations given out that no earlier opening has given out; `generation` is later than that of any segment
    /// ([`Segment::generation`]).
    pub fn start_generation(&self, generation: Generation) {
        self.next_incarnation.store(generation.0 << INCARNATION_COUNTER_BITS | 1, Ordering::Relaxed);
    }

    /// What I/O on segments must keep to.
    #[must_use]
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Reads the headers of all slots.
    ///
    /// # Errors
    /// If the directory or a file cannot be read, or a segment is of a newer format.
    pub fn discover(&self, store: [u8; 16]) -> Result<Vec<Found>> {
        let names =
            self.storage.list(DIRECTORY).map_err(|e| Error::io(format!("listing {DIRECTORY}/"), e))?;
        let mut slots: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
        slots.sort_unstable();
        self.pool().next_slot = slots.last().map_or(0, |last| last + 1);
        let look =
            |slots: &[u64]| slots.iter().map(|&slot| self.look_at(slot, store)).collect::<Result<Vec<_>>>();
        if slots.len() < SIDE_BY_SIDE_FROM {
            return look(&slots);
        }
        let found = std::thread::scope(|scope| {
            let shares = slots.chunks(slots.len().div_ceil(THREADS));
            let begin = |share| std::thread::Builder::new().spawn_scoped(scope, move || look(share));
            let threads = shares.map(begin).collect::<io::Result<Vec<_>>>();
            let threads = threads.map_err(|e| Error::io("starting threads that read segments", e))?;
            let joined = threads.into_iter().map(|thread| thread.join());
            let found = joined.map(|found| found.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            found.collect::<Result<Vec<_>>>()
        })?;
        Ok(found.into_iter().flatten().collect())
    }

    fn look_at(&self, slot: u64, store: [u8; 16]) -> Result<Found> {
        let name = slot_name(slot);
        let file = self.storage.open(&name).map_err(|e| Error::io(format!("opening {name}"), e))?;
        let Some(header) = self.read_header(&file, store)? else {
            let is_doubtful = self.is_written(&file);
            return Ok(Found { slot, segment: None, is_doubtful, blank: (!is_doubtful).then_some(file) });
        };
        let segment = Some(Arc::new(Segment { file, header }));
        Ok(Found { slot, segment, is_doubtful: false, blank: None })
    }

    /// Whether something was written to the start of a slot; also if that cannot be read.
    fn is_written(&self, file: &Arc<dyn File>) -> bool {
        let headers = 2 * header_stride(self.alignment.physical_block) as usize;
        let mut start = AlignedBuf::zeroed(LOOK_BYTES.max(2 * headers));
        file.read_at(0, &mut start).is_err() || start.iter().any(|byte| *byte != 0)
    }

    fn read_header(&self, file: &Arc<dyn File>, store: [u8; 16]) -> Result<Option<SegmentHeader>> {
        let stride = header_stride(self.alignment.physical_block) as usize;
        let mut copies = AlignedBuf::zeroed(2 * stride);
        let unread = match file.read_at(0, &mut copies) {
            Ok(()) => None,
            Err(_) => read_apart(file, &mut copies, stride),
        };
        let mut newest: Option<SegmentHeader> = None;
        for at in [0, stride] {
            match SegmentHeader::decode(&copies[at..at + SegmentHeader::LEN]) {
                Ok(header) if header.store == store => {
                    // A recycled slot whose new header was torn shows the old one in its other copy: the newer counts.
                    if newest.is_none_or(|n| n.incarnation < header.incarnation) {
                        newest = Some(header);
                    }
                }
                Err(error @ crate::format::FormatError::Newer { .. }) => {
                    return Err(Error::format(format!("{}, byte {at}", file.name()), error));
                }
                // Another store's segment holds nothing of ours; torn and blank headers neither.
                Ok(_) | Err(_) => {}
            }
        }
        match (newest, unread) {
            (None, Some(error)) => Err(Error::io(format!("reading {}", file.name()), error)),
            (newest, Some(error)) => {
                tracing::warn!("{}: one copy of its header cannot be read: {error}", file.name());
                Ok(newest)
            }
            (newest, None) => Ok(newest),
        }
    }

    /// Takes a discovered segment into use.
    pub fn adopt(&self, slot: u64, segment: Arc<Segment>) {
        let incarnation = segment.header.incarnation;
        let mut map = self.by_incarnation.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(incarnation, (slot, segment));
    }

    /// Gives up a slot for good: whoever wrote to it last may still have a write under way, so its file is
    /// unlinked, never used again.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn discard_slot(&self, slot: u64) -> Result<()> {
        let name = slot_name(slot);
        self.storage.remove(&name).map_err(|e| Error::io(format!("removing {name}"), e))
    }

    /// Takes over files whose names were removed. The file system gives the space of one back when it is closed, which can
    /// take a tenth of a second, so nobody waits for that but who needs the space.
    pub fn retire(&self, files: Vec<Arc<dyn File>>) {
        if files.is_empty() {
            return;
        }
        self.retired().extend(files);
        // Where there is less than this, at once: who needs little, and RocksDB, do not look for space before.
        if self.check_space(AMPLE_BYTES).is_err() {
            self.give_back_retired(usize::MAX);
        }
    }

    /// Closes at most so many retired files; says whether there were any. Who comes second waits for the first.
    fn give_back_retired(&self, most: usize) -> bool {
        let mut retired = self.retired();
        let left = retired.len().saturating_sub(most);
        retired.drain(left..).map(drop).count() > 0
    }

    fn retired(&self) -> MutexGuard<'_, Vec<Arc<dyn File>>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes back a blank that its log does not need: nobody has written to it but who has filled it with zeroes.
    pub fn give_back(&self, blank: Blank) {
        let mut pool = self.pool();
        if blank.filled && blank.capacity == self.full_capacity && pool.ready.len() < 2 * self.pool_target {
            pool.ready.push(blank);
            return;
        }
        for files in pool.growing.values_mut() {
            files.retain(|(file, _)| !Arc::ptr_eq(file, &blank.file));
        }
        drop(pool);
        if let Err(error) = self.discard_slot(blank.slot) {
            tracing::warn!("{error}; the next opening will try it again");
        }
    }

    /// Forgets what a log that is no more has ordered, and which of its files would have grown.
    pub fn forget_wishes(&self, volume: VolumeId) {
        let mut pool = self.pool();
        pool.wanted.retain(|(of, _)| *of != volume);
        pool.growing.remove(&volume);
    }

    /// Forgets a volume's segments. With `recycle`, full-sized ones of this generation that nobody reads go back to the
    /// pool, since their blocks have been written already: only where no write to them can be under way any more. The
    /// others are unlinked, and who reads one can go on.
    ///
    /// # Errors
    /// If a file cannot be removed; the others are.
    pub fn release(&self, volume: VolumeId, recycle: bool, generation: Generation) -> Result<()> {
        let mut gone = Vec::new();
        {
            let mut map = self.by_incarnation.write().unwrap_or_else(PoisonError::into_inner);
            let matching: Vec<u64> =
                map.iter().filter(|(_, (_, s))| s.header.volume == volume).map(|(&i, _)| i).collect();
            gone.extend(matching.iter().filter_map(|incarnation| map.remove(incarnation)));
        }
        let mut result = Ok(());
        for (slot, segment) in gone {
            let mut pool = self.pool();
            pool.growing.remove(&segment.header.volume);
            // A dead process may have left a write behind that lands late.
            let room =
                recycle && segment.header.generation == generation && pool.ready.len() < 2 * self.pool_target;
            match Arc::try_unwrap(segment) {
                Ok(segment) if room && segment.header.capacity == self.full_capacity => {
                    pool.ready.push(Blank {
                        slot,
                        file: segment.file,
                        capacity: self.full_capacity,
                        filled: true,
                    });
                }
                _ => {
                    drop(pool);
                    result = result.and(self.discard_slot(slot));
                }
            }
        }
        result
    }

    /// The segment of an incarnation, if it is still there.
    #[must_use]
    pub fn get(&self, incarnation: u64) -> Option<Arc<Segment>> {
        let map = self.by_incarnation.read().unwrap_or_else(PoisonError::into_inner);
        map.get(&incarnation).map(|(_, segment)| Arc::clone(segment))
    }

    /// All segments in use with their slots, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<(u64, Arc<Segment>)> {
        let map = self.by_incarnation.read().unwrap_or_else(PoisonError::into_inner);
        let sorted: BTreeMap<u64, (u64, Arc<Segment>)> =
            map.iter().map(|(&i, (slot, s))| (i, (*slot, Arc::clone(s)))).collect();
        sorted.into_values().collect()
    }

    /// Turns a blank into a segment of a log. Its header is not written yet: it goes out with the first batch.
    #[must_use]
    pub fn open_segment(&self, blank: Blank, mut header: SegmentHeader) -> Arc<Segment> {
        header.incarnation = self.next_incarnation.fetch_add(1, Ordering::Relaxed);
        header.capacity = blank.capacity;
        let segment = Arc::new(Segment { file: blank.file, header });
        self.adopt(blank.slot, Arc::clone(&segment));
        segment
    }

    /// The capacity of a log's next segment, `opened` segments after its last cut, in bytes.
    #[must_use]
    pub fn capacity_after(&self, opened: u32) -> u64 {
        // Bits that a shift pushes out are gone without a word, so it is bounded to what any store needs.
        (FIRST_CAPACITY << opened.saturating_mul(2).min(16)).min(self.full_capacity)
    }

    /// Orders a blank segment for a log, unless one is ordered already, which it says; [`Segments::step`] will supply it.
    pub fn order(&self, volume: VolumeId, wish: Wish) -> bool {
        let mut pool = self.pool();
        let is_new = !pool.wanted.iter().any(|(v, _)| *v == volume);
        if is_new {
            pool.wanted.push_back((volume, wish));
        }
        is_new
    }

    /// How many logs wait for a segment.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.pool().wanted.len()
    }

    /// Whether a log's segment is being made ready.
    pub(crate) fn is_supplying(&self, volume: VolumeId) -> bool {
        self.pool().supplying == Some(volume)
    }

    /// Blank full-sized slots at hand.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.pool().ready.len()
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one piece of background work: supplies a log that waits, or zero-fills ahead.
    ///
    /// # Errors
    /// If none waits, and a file cannot be made or written for another reason than space.
    pub fn step(&self) -> Result<PoolStep> {
        let wanted = self.pool().wanted.front().copied();
        if let Some((volume, wish)) = wanted {
            let supplied = self.supply(volume, wish);
            let mut pool = self.pool();
            pool.supplying = None;
            return Ok(match supplied {
                Ok(blank) => {
                    pool.wanted.retain(|(v, _)| *v != volume);
                    PoolStep::Supplied(volume, blank)
                }
                Err(error) => {
                    // Every log that waits is told in its turn, and one with a smaller wish may have it granted.
                    if pool.wanted.front().is_some_and(|(v, _)| *v == volume) {
                        pool.wanted.rotate_left(1);
                    }
                    PoolStep::Refused(volume, error)
                }
            });
        }
        if self.give_back_retired(1) {
            return Ok(PoolStep::GivenBack);
        }
        match self.prefill() {
            Err(error) if error.kind() == crate::ErrorKind::NoSpace => Ok(PoolStep::Idle),
            other => other,
        }
    }

    /// A blank as a log wishes for: if it is full-sized, from the pool; or else a new file that is zero-filled here, or
    /// whose blocks are set aside.
    fn supply(&self, volume: VolumeId, wish: Wish) -> Result<Blank> {
        let Wish { mut capacity, filled, growing } = wish;
        let full_sized = capacity == self.full_capacity;
        if full_sized {
            let mut pool = self.pool();
            pool.supplied += 1;
            if filled && !growing {
                // The log is on blocks that were written before: nothing of it grows any more.
                pool.growing.remove(&volume);
            }
            if let Some(blank) = pool.ready.pop() {
                return Ok(blank);
            }
            pool.growth = (2 * pool.growth.max(1)).min(MOST_GROWTH);
            capacity = capacity.min(ORDERED_CAPACITY);
        }
        self.check_space(capacity)?;
        let mut blank = self.create(capacity)?;
        self.pool().supplying = Some(volume);
        let fills = filled || !full_sized;
        if !fills {
            self.reserve(&blank)?;
        }
        let mut done = 0;
        while fills && done < capacity {
            match self.fill(&blank, done) {
                Ok(filled) => done = filled,
                Err(error) if error.kind() == crate::ErrorKind::NoSpace => return Err(error),
                Err(error) => {
                    // What the log writes may still succeed, or must fail with its own error.
                    tracing::warn!("{error}; the log goes on without");
                    blank = self.create(capacity)?;
                    break;
                }
            }
        }
        blank.filled = done == capacity;
        if !blank.filled {
            self.promise(volume, &blank);
        }
        Ok(blank)
    }

    /// Has the file system set a blank's blocks aside. Where it cannot, the file grows as it is written, which lets the
    /// disk have one write at a time. A blank for which there is no space is given up.
    fn reserve(&self, blank: &Blank) -> Result<()> {
        let reserved = set_aside(&blank.file, blank.capacity);
        if reserved.is_err() {
            self.discard_slot(blank.slot)?;
        }
        reserved
    }

    /// Notes that a log's blank will grow as it is written: nobody else gets that space.
    fn promise(&self, volume: VolumeId, blank: &Blank) {
        let mut pool = self.pool();
        let growing = pool.growing.entry(volume).or_default();
        // Only a log's newest segment and the blank behind it can still grow.
        growing.truncate(1);
        growing.insert(0, (Arc::clone(&blank.file), blank.capacity));
    }

    /// Zero-fills one step of a blank from `done` bytes on, and syncs it when it is full; returns how far it is filled.
    /// A blank that cannot be filled is given up.
    fn fill(&self, blank: &Blank, done: u64) -> Result<u64> {
        let step = self.zeroes.len() as u64;
        let filled = blank
            .file
            .write_at(done, &self.zeroes)
            .and_then(|()| if done + step == blank.capacity { blank.file.sync() } else { Ok(()) });
        if let Err(error) = filled {
            let name = blank.file.name().to_owned();
            self.discard_slot(blank.slot)?;
            return Err(Error::io(format!("zero-filling {name}"), error));
        }
        Ok(done + step)
    }

    /// Makes a small slot at once, for a log that cannot wait for the pool.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`], or if it cannot be made.
    pub(crate) fn create_small(&self, volume: VolumeId) -> Result<Blank> {
        let capacity = self.capacity_after(0);
        self.check_space(capacity)?;
        let blank = self.create(capacity)?;
        self.promise(volume, &blank);
        Ok(blank)
    }

    /// Makes a slot out of the space that is kept back, and has that set aside: what is written there does not fail for want
    /// of it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`] if not even that is left, or if it cannot be made.
    pub(crate) fn create_of_reserve(&self, capacity: u64) -> Result<Blank> {
        let blank = self.create(capacity)?;
        self.reserve(&blank).map(|()| blank)
    }

    /// Makes a slot; its name is durable when this returns, so no flush has to care for it.
    pub(crate) fn create(&self, capacity: u64) -> Result<Blank> {
        let slot = {
            let mut pool = self.pool();
            pool.next_slot += 1;
            pool.next_slot - 1
        };
        let name = slot_name(slot);
        let make = || -> io::Result<Arc<dyn File>> {
            let file = self.storage.create(&name)?;
            self.storage.sync_directory(DIRECTORY).inspect_err(|_| {
                // It is tried again and again, each time with another name. If it stays, the next opening removes it.
                let _ = self.storage.remove(&name);
            })?;
            Ok(file)
        };
        let file = make().map_err(|e| Error::io(format!("creating {name}"), e))?;
        Ok(Blank { slot, file, capacity, filled: false })
    }

    fn check_space(&self, capacity: u64) -> Result<()> {
        let free = || self.storage.free_bytes().map_err(|e| Error::io("asking for free space", e));
        let promised = self.promised_bytes()?;
        let wanted = self.reserve_bytes.saturating_add(promised).saturating_add(capacity);
        let mut free_bytes = free()?;
        if free_bytes < wanted && self.give_back_retired(usize::MAX) {
            free_bytes = free()?;
        }
        if free_bytes < wanted {
            let text = format!(
                "{free_bytes} bytes are free; {} are kept back, {promised} promised",
                self.reserve_bytes
            );
            return Err(Error::new(crate::ErrorKind::NoSpace, text));
        }
        Ok(())
    }

    /// What segments that grow as they are written may still take.
    fn promised_bytes(&self) -> Result<u64> {
        let growing: Vec<_> = self.pool().growing.values().flatten().cloned().collect();
        let mut promised = 0;
        for (file, capacity) in growing {
            let len =
                file.len().map_err(|e| Error::io(format!("asking the length of {}", file.name()), e))?;
            promised += capacity.saturating_sub(len);
        }
        Ok(promised)
    }

    fn prefill(&self) -> Result<PoolStep> {
        let (filling, usual) = {
            let mut pool = self.pool();
            if std::mem::take(&mut pool.supplied) > 0 {
                return Ok(PoolStep::Busy);
            }
            if pool.filling.is_none() && pool.ready.len() >= self.pool_target * pool.growth.max(1) {
                return Ok(PoolStep::Idle);
            }
            (pool.filling.take(), pool.ready.len() < self.pool_target)
        };
        let (blank, done) = match filling {
            Some(filling) => filling,
            None => {
                // Zero-filling ahead must never be what fills the disk: it leaves as much again as it takes, or more.
                self.check_space(if usual { 2 } else { LEFT_BY_GROWTH } * self.full_capacity)?;
                (self.create(self.full_capacity)?, 0)
            }
        };
        let done = self.fill(&blank, done)?;
        let mut pool = self.pool();
        if done == blank.capacity {
            pool.ready.push(Blank { filled: true, ..blank });
        } else {
            pool.filling = Some((blank, done));
        }
        Ok(PoolStep::Filled)
    }
}

/// Reads a header's two copies one by one, since a disk that does not read one may read the other; what it does not read
/// is zero. Returns why that is.
fn read_apart(file: &Arc<dyn File>, copies: &mut AlignedBuf, stride: usize) -> Option<io::Error> {
    copies.fill(0);
    let mut copy = AlignedBuf::zeroed(stride);
    let mut unread = None;
    for at in [0, stride] {
        match file.read_at(at as u64, &mut copy) {
            Ok(()) => copies[at..at + stride].copy_from_slice(&copy),
            Err(error) => unread = Some(error),
        }
    }
    unread
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::storage::sim::SimDisk;

    const FULL: u64 = 1 << 20;

    fn step_until_idle(segments: &Segments) -> usize {
        let mut supplied = 0;
        for _ in 0..1000 {
            match segments.step().unwrap() {
                PoolStep::Idle => return supplied,
                PoolStep::Supplied(..) => supplied += 1,
                PoolStep::Filled | PoolStep::GivenBack | PoolStep::Busy | PoolStep::Refused(..) => {}
            }
        }
        panic!("the pool never comes to rest");
    }

    #[test]
    fn a_pool_that_was_used_up_is_larger_the_next_time() {
        let storage = SimDisk::new(1).open();
        storage.create_directory(DIRECTORY).unwrap();
        let segments = Segments::new(Arc::new(storage), FULL, 2, 0);
        step_until_idle(&segments);
        assert_eq!(segments.ready(), 2);
        let wish = Wish { capacity: FULL, filled: true, growing: false };
        for (wanted, ready) in [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (9, 8)] {
            assert!((0..wanted).all(|volume| segments.order(VolumeId(volume), wish)));
            assert_eq!((step_until_idle(&segments) as u64, segments.ready()), (wanted, ready));
        }
    }
}
