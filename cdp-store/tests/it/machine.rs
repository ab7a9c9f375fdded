//! A simulated machine: a disk, two databases, a store, and guests that use its volumes at random.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use cdp_store::index::SimKv;
use cdp_store::storage::sim::SimDisk;
use cdp_store::{Error, ErrorKind, Seams, Store, StoreOptions, Volume, VolumeSpec};
use cdp_types::{BlockDevice, ByteRange, DeviceQueue, Event, Instant, IoBuf, IoError, Label, Op, Origin};
use cdp_types::{RequestId, Seq, VolumeName, Wait};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use crate::branching::Reader;
use crate::checkpointing::{Attempt, VmChange, VmMemory};
use crate::content::{Stamp, stamps_of};
use crate::guest::{Fate, Memory, Tracked, VOLUME_BLOCKS, some_request, some_sectors};
use crate::reference::Sectors;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process is killed.
    Kill,
    /// The machine loses its power.
    PowerCut,
}

/// A change of the store itself whose outcome nobody has heard of.
#[derive(Clone, Debug)]
pub enum Undecided {
    /// A volume was being made, addressed in so many sectors.
    Create(VolumeName, u64),
    /// A volume was being destroyed.
    Destroy(VolumeName),
    /// A volume was growing to so many blocks.
    Resize(VolumeName, u64),
    /// An instant was being named.
    Mark(VolumeName, Label),
    /// A volume was being cloned: the clone, and what it holds.
    Clone(VolumeName, Box<Memory>),
    /// A volume was going back to an instant.
    Revert(VolumeName, Seq),
    /// The branch of a volume that begins here was being deleted.
    DeleteBranch(VolumeName, Seq),
    /// Something was done with the virtual machine.
    Vm(VmChange),
}

#[derive(Debug)]
enum Asked {
    Change(Origin),
    /// A flush, when it was submitted, and what had completed before it.
    Flush(u64, Vec<Origin>),
    /// A read, and when it was submitted.
    Read(u64, Sectors, IoBuf),
}

/// What a read returned.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Of which volume.
    pub volume: VolumeName,
    /// From where.
    pub sectors: Sectors,
    /// What they held.
    pub stamps: Vec<Stamp>,
    /// When the read was submitted.
    pub submitted: u64,
    /// When it ended.
    pub completed: u64,
}

struct Lane {
    queue: Box<dyn DeviceQueue>,
    asked: HashMap<u64, Asked>,
}

pub struct Guest {
    /// Dropped before the volume.
    lanes: Vec<Lane>,
    volume: Arc<Volume>,
}

pub struct Running {
    /// Dropped before the store.
    pub guests: BTreeMap<VolumeName, Guest>,
    /// Past instants that are held open, and what they must hold.
    pub readers: Vec<Reader>,
    /// The checkpoint that is being taken.
    pub attempt: Option<Attempt>,
    store: Store,
}

/// The machine, and what must be true of it.
pub struct Machine {
    pub disk: SimDisk,
    pub rng: SmallRng,
    /// Faults are on order: errors are no surprise.
    pub faulty: bool,
    /// What the volumes must remember.
    pub volumes: BTreeMap<VolumeName, Memory>,
    /// What must be true of the virtual machine.
    pub vm: VmMemory,
    /// What the catalogue may say as well.
    pub undecided: Vec<Undecided>,
    index: SimKv,
    catalogue: SimKv,
    /// What a process can leave in the machine's memory.
    pub memory: TempDir,
    /// What reads have returned.
    pub seen: Vec<Seen>,
    /// Flushes that have completed: of which volume, and when they were submitted.
    pub flushes: Vec<(VolumeName, u64)>,
    /// How often an opening that fails is tried.
    pub openings: u32,
    /// The disk is full, and stays it.
    pub full: bool,
    /// Sectors of the largest write.
    pub most_sectors: u64,
    next_number: u64,
    /// Counts events.
    now: u64,
    /// The power was cut since the store was last checked.
    pub power_was_cut: bool,
    pub running: Option<Running>,
}

/// Requests that one queue has in flight.
const DEPTH: usize = 6;
/// Volumes that a store has at most.
pub const MOST_VOLUMES: usize = 3;
/// Rounds after which requests that have not ended count as stuck.
pub const PATIENCE: usize = 20_000;
/// How long requests wait for space.
pub const FULL_WAIT: Duration = Duration::from_millis(200);

fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: 1 << 20,
        pool_segments: 1,
        map_budget_bytes: 0,
        index_memory_bytes: 0,
        full_wait: FULL_WAIT,
        reserve_bytes: 256 << 10,
        batch_bytes: 64 << 10,
        batches_in_flight: 2,
        index_interval: Duration::from_secs(1),
    }
}

thread_local!(static NEXT_SECRET: std::cell::Cell<u64> = const { std::cell::Cell::new(1) });

/// Different for each segment, and the same whenever a machine of the same seed is made.
fn secrets() -> u64 {
    NEXT_SECRET.with(|next| {
        next.set(next.get().wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1));
        next.get()
    })
}

/// The same files in another directory.
fn copied(directory: &TempDir) -> TempDir {
    let copy = tempfile::tempdir_in("/dev/shm").unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

impl Machine {
    /// A machine with an empty store on it.
    pub fn new(seed: u64) -> Self {
        NEXT_SECRET.set(seed | 1);
        let disk = SimDisk::new(seed);
        Store::create_on(&disk.open(), &disk.clock(), &options()).unwrap();
        Self {
            disk,
            rng: SmallRng::seed_from_u64(seed ^ 0xC4A5),
            faulty: false,
            volumes: BTreeMap::new(),
            vm: VmMemory::default(),
            undecided: Vec::new(),
            index: SimKv::new(),
            catalogue: SimKv::synced(),
            memory: tempfile::tempdir_in("/dev/shm").unwrap(),
            seen: Vec::new(),
            flushes: Vec::new(),
            most_sectors: 128,
            openings: 4,
            full: false,
            next_number: 1,
            now: 0,
            power_was_cut: false,
            running: None,
        }
    }

    /// A copy whose process has just died, with randomness of its own.
    pub fn fork(&self, seed: u64) -> Self {
        Self {
            disk: self.disk.fork(seed),
            rng: SmallRng::seed_from_u64(seed),
            faulty: self.full,
            volumes: self.volumes.clone(),
            vm: self.vm.clone(),
            undecided: self.undecided.clone(),
            index: self.index.fork(),
            catalogue: self.catalogue.fork(),
            memory: copied(&self.memory),
            seen: Vec::new(),
            flushes: Vec::new(),
            most_sectors: self.most_sectors,
            openings: self.openings,
            full: self.full,
            next_number: self.next_number,
            now: self.now,
            power_was_cut: self.power_was_cut,
            running: None,
        }
    }

    /// The same, and both databases are gone.
    pub fn fork_without_index(&self, seed: u64) -> Self {
        Self { index: SimKv::new(), catalogue: SimKv::synced(), ..self.fork(seed) }
    }

    /// Lets the time index fail, after so many writes and flushes, until the next crash.
    pub fn fail_index_after(&mut self, operations: u64) {
        self.faulty = true;
        self.index.fail_after(operations);
    }

    /// Leaves so many bytes on the disk.
    pub fn fill_disk(&mut self, left: u64) {
        self.faulty = true;
        self.full = true;
        let lengths = self.disk.files().into_iter().filter_map(|name| self.disk.contents(&name));
        let used: usize = lengths.map(|bytes| bytes.len()).sum();
        self.disk.set_capacity(Some(used as u64 + left));
    }

    /// The store, which is open.
    pub fn store(&self) -> &Store {
        &self.running.as_ref().expect("the store is open").store
    }

    /// A volume of the open store.
    pub fn volume(&self, name: &VolumeName) -> Arc<Volume> {
        self.store().volume(name).unwrap()
    }

    /// Whether the process goes on.
    pub fn is_alive(&self) -> bool {
        self.running.is_some() && !self.disk.crashed()
    }

    /// Ends the process, and what the databases had not made durable may be gone.
    pub fn crash(&mut self, how: Crash) {
        match how {
            Crash::Kill => self.disk.kill_restart(),
            Crash::PowerCut => {
                self.disk.power_cut();
                self.memory = tempfile::tempdir_in("/dev/shm").unwrap();
            }
        }
        self.power_was_cut |= how == Crash::PowerCut;
        self.running = None;
        self.seen.clear();
        self.flushes.clear();
        self.faulty = self.full;
        self.disk.clear_faults();
        self.index.crash(&mut self.rng);
        self.catalogue.crash(&mut self.rng);
        for tracked in self.volumes.values_mut().flat_map(|v| v.requests.values_mut()) {
            tracked.orphaned |= tracked.fate == Fate::InFlight;
        }
    }

    /// Opens the store; the guests come later.
    pub fn open(&mut self) -> Result<(), Error> {
        let seams = Seams {
            storage: Arc::new(self.disk.open()),
            index: Arc::new(self.index.clone()),
            catalogue: Arc::new(self.catalogue.clone()),
            clock: Arc::new(self.disk.clock()),
            secrets,
            reach: Some(self.memory.path().to_owned()),
        };
        let store = Store::open_on(seams, options())?;
        self.running = Some(Running { guests: BTreeMap::new(), readers: Vec::new(), attempt: None, store });
        Ok(())
    }

    /// Ends the store in order, and opens it again.
    pub fn reopen(&mut self) {
        self.drain();
        if !self.is_alive() {
            return;
        }
        if let Some(running) = self.running.take() {
            drop((running.guests, running.readers, running.attempt));
            let closed = running.store.close();
            self.expect(closed);
            drop(running.store);
            // A fault can keep it from opening, once or twice.
            for _ in 0..self.openings {
                if !self.disk.crashed() && self.running.is_none() {
                    let opened = self.open();
                    self.expect(opened);
                }
            }
        }
    }

    /// What only a fault or a crash explains.
    pub fn expect<T, E: Debug>(&self, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(_) if self.faulty || self.disk.crashed() => None,
            Err(error) => panic!("nothing was wrong, and yet: {error:?}"),
        }
    }

    /// One random thing that a guest, an operator or the store itself does.
    pub fn tick(&mut self) {
        match self.rng.random_range(0..1000) {
            0..290 => self.submit(),
            290..350 => self.checkpoint_step(),
            350..380 => self.submit_read(),
            380..640 => self.poll_some(),
            640..860 => drop(self.disk.step()),
            860..880 => drop(self.store().load_step()),
            880..920 => {
                let stepped = self.store().pool_step();
                self.expect(stepped);
            }
            920..930 => self.store().close_chunks(),
            930..945 => {
                let stepped = self.store().index_step();
                self.expect(stepped);
            }
            945..956 => {
                let flushed = self.store().flush_index();
                self.expect(flushed);
            }
            956..960 => {
                let written = self.store().write_presents();
                self.expect(written);
            }
            960..968 => self.mark(),
            968..971 => self.revert(),
            971..973 => drop(self.clone_some()),
            973..975 => self.delete_branch(),
            975..977 => self.open_reader(),
            977..979 => self.check_readers(),
            979 => self.upkeep(),
            980 => self.resize(),
            981..988 => self.create(),
            988..992 => self.destroy(),
            992..996 => self.drop_lane(),
            _ => self.reopen(),
        }
    }

    pub fn some_volume(&mut self) -> Option<VolumeName> {
        let index = self.rng.random_range(0..self.volumes.len().max(1));
        self.volumes.keys().nth(index).cloned()
    }

    /// Some queue of some volume, opened if need be: its volume's name and its number.
    fn some_lane(&mut self) -> Option<(VolumeName, usize)> {
        let name = self.some_volume()?;
        let number = self.rng.random_range(0..2);
        let running = self.running.as_mut()?;
        if !running.guests.contains_key(&name) {
            let volume = running.store.volume(&name).unwrap();
            running.guests.insert(name.clone(), Guest { lanes: Vec::new(), volume });
        }
        let guest = running.guests.get_mut(&name)?;
        while guest.lanes.len() <= number {
            let queue = guest.volume.open_queue().ok()?;
            guest.lanes.push(Lane { queue, asked: HashMap::new() });
        }
        Some((name, number))
    }

    /// A guest changes something, or flushes.
    pub fn submit(&mut self) {
        let Some((name, number)) = self.some_lane() else { return };
        let (Some(memory), Some(running)) = (self.volumes.get_mut(&name), self.running.as_mut()) else {
            return;
        };
        let Some(guest) = running.guests.get_mut(&name) else { return };
        let lane = &mut guest.lanes[number];
        if lane.asked.len() >= DEPTH {
            return;
        }
        let id = self.next_number;
        self.next_number += 1;
        self.now += 1;
        if self.rng.random_bool(0.12) {
            lane.asked.insert(id, Asked::Flush(self.now, memory.acknowledged()));
            lane.queue.submit(RequestId(id), Op::Flush);
            return;
        }
        let request = some_request(&mut self.rng, memory.unit, self.most_sectors, id);
        let origin = guest.volume.new_origin();
        lane.asked.insert(id, Asked::Change(origin));
        lane.queue.submit(RequestId(id), request.op(origin));
        let tracked = Tracked {
            request,
            fate: Fate::InFlight,
            submitted: self.now,
            completed: u64::MAX,
            flushed: false,
            orphaned: false,
        };
        memory.requests.insert(origin, tracked);
    }

    /// A guest reads.
    pub fn submit_read(&mut self) {
        let Some((name, number)) = self.some_lane() else { return };
        let (Some(memory), Some(running)) = (self.volumes.get(&name), self.running.as_mut()) else { return };
        let Some(guest) = running.guests.get_mut(&name) else { return };
        let lane = &mut guest.lanes[number];
        if lane.asked.len() >= DEPTH {
            return;
        }
        let id = self.next_number;
        self.next_number += 1;
        self.now += 1;
        let sectors = some_sectors(&mut self.rng, memory.unit, 64);
        let ByteRange { offset, len } = sectors.bytes();
        let into = IoBuf::zeroed(len as usize);
        lane.asked.insert(id, Asked::Read(self.now, sectors, into.share()));
        lane.queue.submit(RequestId(id), Op::Read { offset, into });
    }

    /// Some guest looks after its requests.
    pub fn poll_some(&mut self) {
        if let Some((name, number)) = self.some_lane() {
            self.poll(&name, number, Wait::No);
        }
    }

    fn poll(&mut self, name: &VolumeName, number: usize, wait: Wait) {
        let Some(guest) = self.running.as_mut().and_then(|r| r.guests.get_mut(name)) else { return };
        let lane = &mut guest.lanes[number];
        let mut events = Vec::new();
        let polled = lane.queue.poll(wait, &mut events);
        if self.disk.crashed() {
            return;
        }
        polled.unwrap();
        for event in events {
            let Event::Completed { id, result } = event else { continue };
            let guest = self.running.as_mut().and_then(|r| r.guests.get_mut(name));
            let asked = guest.and_then(|g| g.lanes[number].asked.remove(&id.0));
            self.completed(name, asked.expect("a request completes once"), result);
        }
    }

    fn completed(&mut self, name: &VolumeName, asked: Asked, result: Result<(), IoError>) {
        let done = self.expect(result).is_some();
        let guest = self.running.as_ref().and_then(|r| r.guests.get(name));
        let poisoned = guest.is_some_and(|g| g.volume.refusal().is_some());
        self.now += 1;
        let memory = self.volumes.get_mut(name).unwrap();
        match asked {
            Asked::Read(submitted, sectors, into) if done => {
                let stamps = stamps_of(&into.to_vec()).into_iter().collect::<Option<Vec<Stamp>>>();
                let stamps =
                    stamps.expect("invariant 6 violated: a read returned bytes that were never written");
                let completed = self.now;
                self.seen.push(Seen { volume: name.clone(), sectors, stamps, submitted, completed });
            }
            Asked::Flush(submitted, covered) if done => {
                memory.flushed(&covered);
                self.flushes.push((name.clone(), submitted));
            }
            Asked::Read(..) | Asked::Flush(..) => {}
            Asked::Change(origin) => {
                let tracked = memory.requests.get_mut(&origin).unwrap();
                tracked.completed = self.now;
                tracked.fate = match done {
                    true => Fate::Acknowledged,
                    false if poisoned => Fate::Undecided,
                    false => Fate::Failed,
                };
                tracked.flushed |= done && tracked.request.fua;
                if tracked.request.is_void() {
                    memory.requests.remove(&origin);
                }
            }
        }
    }

    fn in_flight(&self, name: &VolumeName) -> usize {
        let guest = self.running.as_ref().and_then(|r| r.guests.get(name));
        guest.map_or(0, |g| g.lanes.iter().map(|l| l.asked.len()).sum())
    }

    /// Waits until a volume has no request in flight.
    ///
    /// # Panics
    /// If one never ends.
    pub fn drain_volume(&mut self, name: &VolumeName) {
        for round in 0..PATIENCE {
            if !self.is_alive() || self.in_flight(name) == 0 {
                return;
            }
            let lanes = self.running.as_ref().and_then(|r| r.guests.get(name)).map_or(0, |g| g.lanes.len());
            let wait = if round % 64 == 63 { Wait::For(Duration::from_millis(20)) } else { Wait::No };
            for number in 0..lanes {
                self.poll(name, number, wait);
            }
            let _ = self.disk.step();
            if round % 4 == 0 && self.is_alive() {
                self.store().load_step();
                let stepped = self.store().pool_step();
                self.expect(stepped);
            }
        }
        let guest = self.running.as_ref().and_then(|r| r.guests.get(name)).unwrap();
        let stuck: Vec<_> = guest.lanes.iter().map(|l| &l.asked).collect();
        panic!("requests of volume {name} never end: {stuck:?}; the volume: {:?}", guest.volume.refusal());
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self) {
        let names: Vec<VolumeName> = self.volumes.keys().cloned().collect();
        names.iter().for_each(|name| self.drain_volume(name));
    }

    /// A guest goes away without waiting for its requests.
    pub fn drop_lane(&mut self) {
        let Some(name) = self.some_volume() else { return };
        let Some(guest) = self.running.as_mut().and_then(|r| r.guests.get_mut(&name)) else { return };
        if let Some(lane) = guest.lanes.pop() {
            let memory = self.volumes.get_mut(&name).unwrap();
            for asked in lane.asked.values() {
                if let Asked::Change(origin) = asked {
                    memory.requests.get_mut(origin).unwrap().fate = Fate::Abandoned;
                }
            }
        }
    }

    /// How many events there were.
    pub fn next_event(&self) -> u64 {
        self.now
    }

    pub fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Commits a change of the store; what becomes of it in a crash is not decided.
    pub fn change<T>(
        &mut self,
        change: Undecided,
        commit: impl FnOnce(&Store) -> Result<T, Error>,
    ) -> Option<T> {
        if !self.is_alive() {
            return None;
        }
        self.undecided.push(change);
        let committed = commit(self.store());
        let done = self.expect(committed);
        if done.is_some() {
            self.undecided.pop();
        }
        done
    }

    /// Makes a volume.
    pub fn create(&mut self) {
        if self.volumes.len() >= MOST_VOLUMES {
            return;
        }
        let number = self.number();
        let name: VolumeName = format!("disk{number}").parse().unwrap();
        let unit = if number.is_multiple_of(2) { 1 } else { 8 };
        let spec = VolumeSpec {
            size_bytes: VOLUME_BLOCKS * cdp_types::BLOCK_SIZE,
            logical_block_size: unit as u32 * cdp_types::SECTOR_SIZE as u32,
        };
        let change = Undecided::Create(name.clone(), unit);
        if self.change(change, |store| store.create_volume(&name, spec)).is_some() {
            self.volumes.insert(name, Memory::new(unit));
        }
    }

    /// Destroys one of several volumes.
    pub fn destroy(&mut self) {
        let Some(name) = self.some_volume().filter(|_| self.volumes.len() > 1) else { return };
        self.drain_volume(&name);
        if let Some(running) = &mut self.running {
            running.guests.remove(&name);
        }
        if self.vm.needs(&name) {
            if self.is_alive() {
                let refused = self.store().destroy_volume(&name, true).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Busy, "invariant 8 violated: {refused:?}");
            }
            return;
        }
        if self.change(Undecided::Destroy(name.clone()), |store| store.destroy_volume(&name, false)).is_some()
        {
            self.volumes.remove(&name);
        } else if self.is_alive() && self.store().volume(&name).is_err() {
            // It is gone all the same: only giving its segments back has failed.
            self.undecided.pop();
            self.volumes.remove(&name);
        }
    }

    /// Makes a volume larger.
    pub fn resize(&mut self) {
        let Some(name) = self.some_volume() else { return };
        let blocks = self.volumes[&name].blocks + self.rng.random_range(1..1000);
        let bytes = blocks * cdp_types::BLOCK_SIZE;
        let change = Undecided::Resize(name.clone(), blocks);
        if self.change(change, |store| store.resize_volume(&name, bytes)).is_some() {
            self.volumes.get_mut(&name).unwrap().blocks = blocks;
        }
    }

    /// Names an instant.
    pub fn mark(&mut self) {
        let Some(name) = self.some_volume() else { return };
        self.drain_volume(&name);
        let label: Label = format!("mark{}", self.number()).parse().unwrap();
        let change = Undecided::Mark(name.clone(), label.clone());
        if let Some(mark) =
            self.change(change, |store| store.mark(&name, &Instant::Head, &label, BTreeMap::new()))
        {
            let memory = self.volumes.get_mut(&name).unwrap();
            let covered = memory.acknowledged();
            memory.flushed(&covered);
            memory.marks.insert(label, mark.seq);
        }
    }

    /// Flushes every volume that takes flushes.
    pub fn flush_all(&mut self) {
        let names: Vec<VolumeName> = self.volumes.keys().cloned().collect();
        for name in names {
            let volume = self.volume(&name);
            let mut queue = volume.open_queue().unwrap();
            if run(&mut *queue, Op::Flush).is_ok() {
                let memory = self.volumes.get_mut(&name).unwrap();
                let covered = memory.acknowledged();
                memory.flushed(&covered);
            }
        }
    }
}

/// Runs one request to its end.
pub fn run(queue: &mut dyn DeviceQueue, op: Op) -> Result<(), IoError> {
    queue.submit(RequestId(u64::MAX), op);
    let mut events = Vec::new();
    for _ in 0..PATIENCE {
        let polled = queue.poll(Wait::For(Duration::from_millis(1)), &mut events);
        polled.map_err(|e| IoError::new(cdp_types::IoErrorKind::Device, e.to_string()))?;
        if let Some(Event::Completed { result, .. }) = events.pop() {
            return result;
        }
    }
    panic!("a request on a queue of its own never ends");
}

/// Reads a range of a device.
pub fn read(device: &dyn BlockDevice, range: ByteRange) -> Result<Vec<u8>, IoError> {
    let opened = device.open_queue();
    let mut queue = opened.map_err(|e| IoError::new(cdp_types::IoErrorKind::Device, e.to_string()))?;
    let into = IoBuf::zeroed(range.len as usize);
    run(&mut *queue, Op::Read { offset: range.offset, into: into.share() })?;
    Ok(into.to_vec())
}
