//! A volume: its log, its head map, and the requests of its queues between the two.

mod epochs;
mod extents;
mod history;
mod indexing;
mod info;
mod supply;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering as Memory};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use cdp_types::{
    BlockDevice, BlockRange, DeviceIdentity, DeviceInfo, DeviceQueue, Generation, IoErrorKind, Listener,
    Ordinal, Origin, Seq, VolumeId,
};

use crate::catalogue::{BranchRow, VolumeRow};
use crate::error::Result;
use crate::index::FANOUT;
use crate::leaves::States;
use crate::lineage::At;
use crate::loaders::Places;
use crate::log::{Acked, Failed, LogEnd, LogState};
use crate::map::{HeadMap, apply_changes};
use crate::queue::{HeadQueue, Inbox, Mail};
use crate::reach::End;
use crate::segments::Segment;
use crate::shared::Shared;
use supply::Refused;

pub(crate) use epochs::PlacedEpoch;
pub use extents::ChangedRun;
pub use info::{
    BranchInfo, ExtentInfo, ExtentState, Head, MarkInfo, RecordInfo, Resolved, Serving, VolumeInfo,
    VolumeState, VolumeStats,
};

/// How long a queue waits for the end of a revert before it is opened: shorter than a revert waits for requests in flight, since
/// the thread that waits here may be the one that has to end them for other queues.
const ENTER_PATIENCE: Duration = Duration::from_secs(3);

/// After so many bytes the background syncs the log, in case that no guest does.
const SYNC_EVERY_BYTES: u64 = 64 << 20;

/// Counters since the store was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub reads: AtomicU64,
    pub read_bytes: AtomicU64,
    pub writes: AtomicU64,
    pub written_bytes: AtomicU64,
    pub clears: AtomicU64,
    pub flushes: AtomicU64,
    pub syncs: AtomicU64,
    pub batches: AtomicU64,
    pub errors: AtomicU64,
    pub leaf_loads: AtomicU64,
}

/// A disk with a history. It is a [`BlockDevice`]: its head, as guests and clients read and write it.
pub struct Volume {
    me: Weak<Self>,
    id: VolumeId,
    shared: Arc<Shared>,
    row: RwLock<VolumeRow>,
    /// The row's size, for the check of every request.
    size_bytes: AtomicU64,
    logical_block_size: u32,
    /// Locked before `map`, never after it.
    log: Mutex<LogState>,
    map: Mutex<HeadMap>,
    waiters: Mutex<Vec<Arc<Inbox>>>,
    /// Requests of earlier openings that are in the part of the log that was replayed; sorted.
    survived: Vec<Origin>,
    listeners: Mutex<Vec<Listener>>,
    /// The log's, for the check of every request.
    tenure: AtomicU64,
    whole_upto: Option<Seq>,
    /// Why it takes no writes: its log is damaged, or the store was opened for reading.
    read_only: OnceLock<String>,
    /// Since when a cut has lacked a segment, on the boot clock; 0 if none does.
    cut_waits_since_ns: AtomicU64,
    /// Why the segment that its log has ordered has not come. Locked after `log`.
    refused: Mutex<Option<Refused>>,
    /// Bytes acknowledged since the background was last asked to sync.
    unsynced_bytes: AtomicU64,
    /// Epochs that are armed on it.
    armed: AtomicU32,
    counters: Counters,
}

/// What recovery knows of a volume.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub end: LogEnd,
    pub map: HeadMap,
    pub survived: Vec<Origin>,
    pub read_only: Option<String>,
    /// If its log is damaged: the last request before that.
    pub whole_upto: Option<Seq>,
    /// And up to where it is known to have been durable.
    pub claimed: Option<Ordinal>,
    /// Where its log ends, if nothing was ever placed behind that.
    pub reached: Option<End>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held has already ended the daemon; tests that catch one do not go on with the volume.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    pub(crate) fn new(shared: Arc<Shared>, row: VolumeRow, recovered: Recovered) -> Arc<Self> {
        let read_only = OnceLock::new();
        if let Some(why) = recovered.read_only {
            // The lock is new, so this is its first value.
            let _ = read_only.set(why);
        }
        let reach = shared.reach.as_ref().and_then(|table| table.slot(row.id, recovered.reached));
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            id: row.id,
            size_bytes: AtomicU64::new(row.size_bytes),
            logical_block_size: row.logical_block_size,
            unsynced_bytes: AtomicU64::new(0),
            armed: AtomicU32::new(0),
            log: Mutex::new(LogState::new(row.id, row.branch, &recovered.end, reach)),
            map: Mutex::new(recovered.map),
            waiters: Mutex::default(),
            survived: recovered.survived,
            whole_upto: recovered.whole_upto,
            listeners: Mutex::default(),
            tenure: AtomicU64::new(0),
            read_only,
            cut_waits_since_ns: AtomicU64::new(0),
            refused: Mutex::default(),
            counters: Counters::default(),
            row: RwLock::new(row),
            shared,
        })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.id
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn row(&self) -> VolumeRow {
        self.row.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its size, in bytes, and what its guests address.
    pub(crate) fn geometry(&self) -> (u64, u32) {
        (self.size_bytes.load(Memory::Relaxed), self.logical_block_size)
    }

    /// Changes what the catalogue says of it, and tells its front ends.
    pub(crate) fn update_row(&self, row: VolumeRow) {
        self.size_bytes.store(row.size_bytes, Memory::Relaxed);
        *self.row.write().unwrap_or_else(PoisonError::into_inner) = row;
        lock(&self.listeners).retain(|listener| listener());
    }

    /// Counts a queue of its head, until [`Volume::leave`]; returns the head's tenure. While a revert is under way it waits
    /// for its end: whoever comes in then asks which history it is that the volume has.
    ///
    /// # Errors
    /// If that takes long.
    pub(crate) fn enter(&self) -> io::Result<u64> {
        let began = std::time::Instant::now();
        loop {
            let entered = self.log().enter();
            if let Some(tenure) = entered {
                return Ok(tenure);
            }
            if began.elapsed() > ENTER_PATIENCE {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the volume is being reverted"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A queue is closed.
    pub(crate) fn leave(&self, tenure: u64) {
        self.log().leave(tenure);
    }

    /// Which of its heads is the present one.
    pub(crate) fn tenure(&self) -> u64 {
        self.tenure.load(Memory::Acquire)
    }

    /// Refuses whatever the open queues still want, and holds new ones back until [`Volume::begin_tenure`] or
    /// [`Volume::resume_tenure`]; says no, and does nothing, if there are open queues and not `force`, or if somebody else
    /// has ended the tenure and not begun the next one: queues that are opened then must not be reverted once more.
    pub(crate) fn end_tenure(&self, force: bool) -> bool {
        let mut log = self.log();
        if log.is_switching() || (log.users() > 0 && !force) {
            return false;
        }
        log.end_tenure();
        self.tenure.store(log.tenure(), Memory::Release);
        drop(log);
        self.wake_waiters(None);
        true
    }

    /// Goes on with another branch, which the catalogue has. Nothing is in flight, and [`Volume::end_tenure`] was called.
    pub(crate) fn switch(&self, branch: &BranchRow, row: VolumeRow) {
        {
            let mut log = self.log();
            log.switch(branch.id, branch.start, branch.created_ns);
            self.map().switch(branch.id, branch.start);
        }
        self.update_row(row);
    }

    /// Lets queues write again.
    pub(crate) fn begin_tenure(&self) {
        self.log().begin_tenure();
        self.wake_waiters(None);
    }

    /// The same, also those that were open when [`Volume::end_tenure`] was called: nothing has become of the next tenure.
    pub(crate) fn resume_tenure(&self) {
        let mut log = self.log();
        log.resume_tenure();
        self.tenure.store(log.tenure(), Memory::Release);
        drop(log);
        self.wake_waiters(None);
    }

    /// Refuses every further write and flush until the store is opened again.
    pub(crate) fn stop_writes(&self, why: &str) {
        let mut log = self.log();
        log.poison(why.to_owned());
        self.cut_if_due(&mut log, None);
        drop(log);
        self.wake_waiters(None);
    }

    /// Refuses every further write and flush, because nobody needs them any more. Requests that waited for a cut end.
    pub(crate) fn retire(&self, why: &str) {
        let mut log = self.log();
        log.retire(why);
        self.cut_if_due(&mut log, None);
        drop(log);
        self.wake_waiters(None);
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, LogState> {
        lock(&self.log)
    }

    pub(crate) fn map(&self) -> MutexGuard<'_, HeadMap> {
        lock(&self.map)
    }

    /// Why it takes no writes, if it does not.
    #[must_use]
    pub fn refusal(&self) -> Option<(IoErrorKind, String)> {
        if let Some(reason) = self.read_only_reason() {
            return Some(reason);
        }
        self.log().poisoned().map(|why| (IoErrorKind::Device, why.to_owned()))
    }

    fn read_only_reason(&self) -> Option<(IoErrorKind, String)> {
        self.read_only.get().map(|why| (IoErrorKind::ReadOnly, why.clone()))
    }

    /// Whether only reads are served.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.get().is_some()
    }

    /// Whether its log is damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        self.whole_upto.is_some()
    }

    /// If its log is damaged, the last request before that: what came behind it is lost.
    pub(crate) fn whole_upto(&self) -> Option<Seq> {
        self.whole_upto
    }

    /// The segments of its log, in order.
    pub(crate) fn chain(&self) -> Vec<Arc<Segment>> {
        let all = self.shared.log.segments.all();
        crate::log::live_chain(all.into_iter().map(|(_, s)| s).filter(|s| s.header.volume == self.id))
    }

    /// Up to where its log is filled, in bytes: of all segments in use, the rest of the last one not counted.
    pub(crate) fn logged_bytes(&self) -> u64 {
        let chain = self.chain();
        let (_, end) = self.log().acked_at();
        let filled = |segment: &Arc<Segment>| {
            if segment.header.incarnation == end.incarnation { end.offset } else { segment.header.capacity }
        };
        chain.iter().take_while(|segment| segment.header.incarnation <= end.incarnation).map(filled).sum()
    }

    // -- Writing

    /// Has `inbox` told to try again when a segment comes, a cut is made or a batch is acknowledged.
    pub(crate) fn wait_for_change(&self, inbox: &Arc<Inbox>) {
        let mut waiters = lock(&self.waiters);
        if !waiters.iter().any(|w| Arc::ptr_eq(w, inbox)) {
            waiters.push(Arc::clone(inbox));
        }
    }

    fn wake_waiters(&self, from: Option<&Arc<Inbox>>) {
        for waiter in std::mem::take(&mut *lock(&self.waiters)) {
            waiter.send(Mail::Retry, from);
        }
    }

    /// Takes in how a batch's write went, and passes on the acknowledgements that this allows, in log order.
    pub(crate) fn complete(
        &self,
        ordinal: Ordinal,
        result: std::result::Result<(), IoErrorKind>,
        from: &Arc<Inbox>,
    ) {
        let mut log = self.log();
        let acked = log.complete(ordinal, result);
        self.publish(&mut log, acked, from);
        self.cut_if_due(&mut log, Some(from));
        if log.needs_cut() {
            // Nobody may come to append anything: the cut itself has to ask for its segment.
            self.order_segment(&log);
        }
        drop(log);
        self.wake_waiters(Some(from));
    }

    /// The map takes in what is acknowledged before anyone hears of it: whoever has seen a write's completion
    /// reads what it wrote. Called under the log's lock, so that two queues cannot swap their order.
    fn publish(&self, log: &mut LogState, acked: Vec<Acked>, from: &Arc<Inbox>) {
        if acked.is_empty() {
            return;
        }
        let mut map = self.map();
        let mut bytes = 0;
        for batch in &acked {
            map.apply(&batch.header, batch.crc, batch.payload_at);
            bytes += batch.header.payload_len();
        }
        let chunk_is_closed = map.has_closed();
        drop(map);
        self.shared.note_work();
        // Recovery reads what no sync has covered in full, so that must stay little even if no guest flushes.
        let unsynced = self.unsynced_bytes.fetch_add(bytes, Memory::Relaxed) + bytes;
        if unsynced >= SYNC_EVERY_BYTES || chunk_is_closed {
            if unsynced >= SYNC_EVERY_BYTES {
                self.unsynced_bytes.store(0, Memory::Relaxed);
            }
            self.shared.index_bell.ring();
        }
        self.counters.batches.fetch_add(acked.len() as u64, Memory::Relaxed);
        for batch in acked {
            if !batch.requests.is_empty() {
                let mail = Mail::Acked { ordinal: batch.header.ordinal, requests: batch.requests };
                if !batch.owner.send(mail, Some(from)) {
                    log.deliver(batch.header.ordinal);
                }
            }
        }
    }

    /// Cuts the log's tail if that is due, and tells those whose batches it removed.
    pub(crate) fn cut_if_due(&self, log: &mut LogState, from: Option<&Arc<Inbox>>) {
        if !log.can_cut() {
            return;
        }
        // If that poisons the log, the queues fail what they get back.
        let failed: Vec<Failed> = log.cut(&self.shared.log);
        for batch in failed {
            batch.owner.send(Mail::Failed { error: batch.error, requests: batch.requests }, from);
        }
        self.wake_waiters(from);
    }

    /// Gives back what its log has at hand and will not use any more.
    pub(crate) fn give_up_blank(&self) {
        let segments = &self.shared.log.segments;
        segments.forget_wishes(self.id);
        let blank = self.log().take_blank();
        if let Some(blank) = blank {
            segments.give_back(blank);
        }
    }

    // -- The head map

    /// The states of consecutive blocks at the head.
    pub(crate) fn states(&self, blocks: BlockRange) -> Result<States> {
        let mut states = States::new();
        let mut done = 0;
        loop {
            let rest = BlockRange::new(blocks.first + done, blocks.count - done);
            done += self.map().cached_run(rest, &mut states);
            if done == blocks.count {
                return Ok(states);
            }
            self.load_leaf((blocks.first + done) / FANOUT as u64)?;
        }
    }

    /// The same, if the map has them all.
    pub(crate) fn cached_states(&self, blocks: BlockRange) -> Option<States> {
        let mut states = States::new();
        (self.map().cached_run(blocks, &mut states) == blocks.count).then_some(states)
    }

    /// Brings a leaf into the head map's cache.
    fn load_leaf(&self, leaf: u64) -> Result<()> {
        self.counters.leaf_loads.fetch_add(1, Memory::Relaxed);
        loop {
            let (branch, upto) = {
                let map = self.map();
                (map.head(), map.applied())
            };
            let mut states = self.shared.lineage().leaf_at(At { branch, seq: upto }, leaf)?;
            let map = self.map();
            // Whatever came since is still pending, unless the indexer was faster than us.
            if map.indexed() <= upto && map.head() == branch {
                apply_changes(&mut states, &map.pending(branch, leaf, upto, Seq::MAX));
                map.insert(leaf, states);
                return Ok(());
            }
        }
    }
}

impl Places for Volume {
    fn states(&self, blocks: BlockRange) -> Result<States> {
        Self::states(self, blocks)
    }
}

impl BlockDevice for Volume {
    fn info(&self) -> DeviceInfo {
        let row = self.row();
        DeviceInfo {
            capacity: row.size_bytes,
            logical_block_size: row.logical_block_size,
            physical_block_size: cdp_types::BLOCK_SIZE as u32,
            max_write_bytes: self.shared.tuning.max_request_bytes,
            read_only: self.is_read_only(),
            serial: format!("cdp{:017}", row.id.0),
        }
    }

    fn identity(&self) -> DeviceIdentity {
        DeviceIdentity { store: self.shared.log.store, volume: self.id, branch: self.row().branch }
    }

    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let volume = self.me.upgrade().ok_or_else(|| io::Error::other("the volume is being dropped"))?;
        Ok(Box::new(HeadQueue::new(volume)?))
    }

    fn new_origin(&self) -> Origin {
        Origin(self.shared.next_origin.fetch_add(1, Memory::Relaxed))
    }

    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        let known = |origin: &Origin| self.survived.binary_search(origin).is_ok();
        let found: Vec<bool> = origins.iter().map(known).collect();
        self.look_further_back(origins, found)
    }

    fn on_change(&self, notify: Listener) {
        lock(&self.listeners).push(notify);
    }
}

impl Volume {
    /// Requests that were in flight through more than one crash may lie before the part of the log that the last
    /// opening replayed: they are looked for in the log itself.
    fn look_further_back(&self, origins: &[Origin], mut found: Vec<bool>) -> Vec<bool> {
        let current = self.shared.log.generation;
        let missing = |(origin, found): (&Origin, &bool)| {
            let generation = Seq(origin.0).generation();
            (!found && generation.0 + 1 < current.0).then_some(generation)
        };
        let Some(oldest) = origins.iter().zip(&found).filter_map(missing).min() else { return found };
        let (chain, until) = (self.chain(), self.log().acked());
        let from = chain.partition_point(|s| s.header.generation < oldest);
        let mut reader = crate::log::ChainReader::new(&chain[from..]);
        // Along the chain, not segment by segment: what was cut off did not survive. What cannot be read was not
        // acknowledged by this opening either; its volume says so elsewhere.
        while let Ok(Some(batch)) = reader.next() {
            if batch.header.generation >= current || batch.header.ordinal > until {
                break;
            }
            for record in &batch.header.records {
                if let Some(index) = origins.iter().position(|o| o.0 != 0 && *o == record.origin) {
                    found[index] = true;
                }
            }
        }
        found
    }
}

/// The first origin that an opening gives out: none of an earlier one is as large.
pub(crate) fn first_origin(generation: Generation) -> u64 {
    Seq::first_of(generation).0
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Volume({})", self.id)
    }
}
