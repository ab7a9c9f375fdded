//! A virtual machine on the simulated one: its disks are cut, its memory is saved, and it goes back.

use std::collections::BTreeMap;

use cdp_store::{CheckpointMode, CheckpointSpec, CheckpointState, Epoch, EpochCut, ErrorKind, Store, VmSpec};
use cdp_types::{
    BLOCK_SIZE, BlockDevice, CheckpointId, DeviceQueue, EpochId, Event, Instant, IoError, Origin, RequestId,
    Seq, VmName, VolumeId, VolumeName, Wait,
};
use rand::Rng;

use crate::bench::{block_of, write_op};
use crate::content::Stamp;
use crate::machine::{Machine, PATIENCE, Undecided};
use crate::reference::{logged, try_logged};

const HELD: &str = "invariant 8 violated";

/// Blocks of the machine's memory.
const IMAGE_BLOCKS: u64 = 3;
/// Complete checkpoints; more, and the oldest goes.
const MOST_CHECKPOINTS: usize = 4;

/// What a machine's memory holds, by block.
pub type MemoryImage = BTreeMap<u64, Stamp>;

/// A complete checkpoint, as it must stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complete {
    /// Its epoch.
    pub epoch: EpochId,
    /// Its disks at that.
    pub disks: Vec<(VolumeName, Seq)>,
    /// Its memory.
    pub image: MemoryImage,
}

/// What must be remembered of the machine.
#[derive(Clone, Debug, Default)]
pub struct VmMemory {
    /// Its disks; empty while it is not registered.
    pub disks: Vec<VolumeName>,
    /// Its complete checkpoints.
    pub complete: BTreeMap<CheckpointId, Complete>,
    /// What its memory volume's head holds while no checkpoint is being taken.
    image: MemoryImage,
    /// Which volume that is.
    memory: Option<VolumeId>,
    /// How often a worn one was replaced.
    pub replaced: u32,
}

/// A change of the machine whose outcome nobody has heard of.
#[derive(Clone, Debug)]
pub enum VmChange {
    Register(Vec<VolumeName>),
    Remove,
    Begin,
    Commit(CheckpointId, Complete),
    Abort,
    Delete(CheckpointId),
    Revert(CheckpointId),
    Rewind(Option<CheckpointId>),
}

/// A checkpoint that is being taken.
#[derive(Debug)]
pub struct Attempt {
    id: CheckpointId,
    epoch: Option<Epoch>,
    cut: Option<EpochCut>,
    image: MemoryImage,
}

pub fn vm_name() -> VmName {
    "web1".parse().unwrap()
}

impl VmMemory {
    /// Whether the machine, or a checkpoint of it, has a disk.
    pub fn needs(&self, name: &VolumeName) -> bool {
        let named = |c: &Complete| c.disks.iter().any(|(disk, _)| disk == name);
        self.disks.contains(name) || self.complete.values().any(named)
    }

    /// The epochs of a disk.
    pub fn epochs_of(&self, name: &VolumeName) -> Vec<(EpochId, Seq)> {
        let here =
            |c: &Complete| c.disks.iter().find(|(disk, _)| disk == name).map(|(_, seq)| (c.epoch, *seq));
        self.complete.values().filter_map(here).collect()
    }
}

impl Machine {
    fn vm_change<T>(
        &mut self,
        change: VmChange,
        commit: impl FnOnce(&Store) -> Result<T, cdp_store::Error>,
    ) -> Option<T> {
        self.change(Undecided::Vm(change), commit)
    }

    fn attempt(&mut self) -> Option<&mut Attempt> {
        self.running.as_mut().and_then(|r| r.attempt.as_mut())
    }

    fn take_attempt(&mut self) -> Option<Attempt> {
        self.running.as_mut().and_then(|r| r.attempt.take())
    }

    /// Takes a first checkpoint, so that there is one to go back to.
    pub fn checkpoint_once(&mut self) {
        for _ in 0..PATIENCE {
            if !self.vm.complete.is_empty() {
                return;
            }
            self.checkpoint_step();
        }
        panic!("no checkpoint is ever complete");
    }

    /// One step of whatever is done with the machine.
    pub fn checkpoint_step(&mut self) {
        if !self.is_alive() {
            return;
        }
        if let Some(orphan) = self.store().unfinished_checkpoints().pop() {
            return self.abort(orphan.id);
        }
        if self.vm.disks.is_empty() {
            return self.register();
        }
        let Some(attempt) = self.attempt() else { return self.idle_step() };
        let (id, armed, is_cut) = (attempt.id, attempt.epoch.is_some(), attempt.cut.is_some());
        if self.rng.random_bool(0.04) {
            return self.abort(id);
        }
        match (armed, is_cut, self.rng.random_range(0..10)) {
            (false, false, _) => self.arm(id),
            (true, false, _) => self.cut(),
            (_, true, 0..5) => self.save_block(),
            (_, true, _) => self.commit(),
        }
    }

    fn idle_step(&mut self) {
        // What a fault kept from being told of is not begun again.
        let known = self.store().checkpoints(&vm_name()).unwrap();
        if let Some(begun) = known.iter().find(|c| c.state == CheckpointState::Begun) {
            return self.abort(begun.id);
        }
        let ids: Vec<CheckpointId> = self.vm.complete.keys().copied().collect();
        let some = (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())]);
        match (self.rng.random_range(0..20), some) {
            (0..3, Some(id)) => self.revert_machine(id),
            (3..5, Some(id)) => self.delete_checkpoint(id),
            (5, id) => self.rewind(id),
            (6, _) if self.rng.random_bool(0.1) => self.remove(),
            _ if ids.len() >= MOST_CHECKPOINTS => self.delete_checkpoint(ids[0]),
            _ => self.begin(),
        }
    }

    fn register(&mut self) {
        let count = self.rng.random_range(1..=2);
        let mut volumes: Vec<VolumeName> = self.volumes.keys().take(count).cloned().collect();
        volumes.reverse();
        if volumes.is_empty() {
            return;
        }
        let spec = VmSpec { volumes: volumes.clone(), ..VmSpec::default() };
        let change = VmChange::Register(volumes.clone());
        if self.vm_change(change, |store| store.create_vm(&vm_name(), &spec)).is_some() {
            self.vm.disks = volumes;
        }
    }

    fn remove(&mut self) {
        let removed = self.vm_change(VmChange::Remove, |store| store.remove_vm(&vm_name(), true));
        if removed.is_some() {
            self.vm = VmMemory::default();
        }
    }

    fn begin(&mut self) {
        let spec = CheckpointSpec {
            mode: CheckpointMode::Hot,
            label: None,
            restore: serde_json::json!({ "pause-before-switchover": false }),
        };
        let begun = self.vm_change(VmChange::Begin, |store| store.begin_checkpoint(&vm_name(), spec));
        if self.is_alive() {
            self.note_replaced_memory();
        }
        let image = self.vm.image.clone();
        if let (Some(info), Some(running)) = (begun, self.running.as_mut()) {
            running.attempt = Some(Attempt { id: info.id, epoch: None, cut: None, image });
        }
    }

    fn memory_id(&self) -> Option<VolumeId> {
        self.store().vm(&vm_name()).ok()?.memory
    }

    /// Beginning a checkpoint may have replaced a worn memory volume: the new one holds nothing.
    fn note_replaced_memory(&mut self) {
        let memory = self.memory_id();
        if self.vm.memory.is_some() && self.vm.memory != memory {
            self.vm.image = MemoryImage::new();
            self.vm.replaced += 1;
        }
        self.vm.memory = memory;
    }

    fn arm(&mut self, id: CheckpointId) {
        let armed = self.store().new_epoch(id);
        let epoch = self.expect(armed);
        if let Some(attempt) = self.attempt() {
            attempt.epoch = epoch;
        }
    }

    fn cut(&mut self) {
        let disks = self.vm.disks.clone();
        disks.iter().for_each(|disk| self.drain_volume(disk));
        if !self.is_alive() {
            return;
        }
        let Some(epoch) = self.attempt().and_then(|attempt| attempt.epoch.take()) else { return };
        match self.store().cut_epoch(&epoch) {
            Ok(cut) => {
                assert!(cut.members.iter().all(|m| m.seq <= cut.seq), "{HELD}: {cut:?}");
                self.attempt().unwrap().epoch = Some(epoch);
                self.attempt().unwrap().cut = Some(cut);
            }
            // Another one is armed.
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) if error.kind() == ErrorKind::Invalid => {
                let head = |id| self.store().volumes().iter().find(|v| v.id == id).map(|v| v.branch);
                let moved = epoch.members().iter().any(|m| head(m.volume) != Some(m.branch));
                assert!(moved, "nobody was reverted, and yet: {error:?}");
            }
            Err(error) => drop(self.expect::<(), _>(Err(error))),
        }
    }

    /// Part of the image is written.
    fn save_block(&mut self) {
        let bytes = IMAGE_BLOCKS * BLOCK_SIZE;
        let opened = self.store().memory_volume(&vm_name(), bytes);
        let Some(volume) = self.expect(opened) else { return };
        self.vm.memory = Some(volume.id());
        let Ok(mut queue) = volume.open_queue() else { return };
        let (block, stamp) = (self.rng.random_range(0..IMAGE_BLOCKS), self.number() << 16 | 1);
        match self.run_to_end(&mut *queue, cdp_types::RequestId(stamp), write_op(block, stamp, Origin(0))) {
            Some(Ok(())) => drop(self.attempt().unwrap().image.insert(block, stamp)),
            Some(Err(error)) => {
                // What it holds is not known: it is put back.
                self.expect::<(), _>(Err(error));
                let id = self.attempt().unwrap().id;
                drop(queue);
                self.abort(id);
            }
            None => {}
        }
    }

    fn run_to_end(
        &mut self,
        queue: &mut dyn DeviceQueue,
        id: RequestId,
        op: cdp_types::Op,
    ) -> Option<Result<(), IoError>> {
        queue.submit(id, op);
        let mut events = Vec::new();
        for round in 0..PATIENCE {
            let wait =
                if round % 64 == 63 { Wait::For(std::time::Duration::from_millis(20)) } else { Wait::No };
            let polled = queue.poll(wait, &mut events);
            if !self.is_alive() {
                return None;
            }
            polled.unwrap();
            if let Some(Event::Completed { result, .. }) = events.pop() {
                // Seen, so delivered.
                let _ = queue.poll(Wait::No, &mut events);
                return Some(result);
            }
            let _ = self.disk.step();
            if round % 4 == 0 {
                self.store().load_step();
                let stepped = self.store().pool_step();
                self.expect(stepped);
            }
        }
        panic!("a write of the memory never ends");
    }

    fn commit(&mut self) {
        let Some(Attempt { id, cut: Some(cut), image, .. }) = self.attempt() else { return };
        let (id, cut, image) = (*id, cut.clone(), image.clone());
        if image.is_empty() {
            return self.save_block();
        }
        // There is one thread: nobody else would end a guest's sync that the commit has to wait for.
        self.vm.disks.clone().iter().for_each(|disk| self.drain_volume(disk));
        let disks = self.vm.disks.iter().cloned().zip(cut.members.iter().map(|m| m.seq)).collect();
        let complete = Complete { epoch: cut.epoch, disks, image };
        let figures = serde_json::json!({ "pause_ms": 5 });
        let change = VmChange::Commit(id, complete.clone());
        let bytes = IMAGE_BLOCKS * BLOCK_SIZE;
        // Whether the record counts that could not be written is known at the next opening.
        let committed = self.vm_change(change, |store| store.commit_checkpoint(id, &cut, bytes, figures));
        if committed.is_some() {
            self.take_attempt();
            self.note_complete(id, complete);
        } else if self.is_alive() {
            self.abort(id);
        }
    }

    /// What a complete checkpoint names is durable.
    fn note_complete(&mut self, id: CheckpointId, complete: Complete) {
        for (name, seq) in &complete.disks {
            if self.store().volume(name).is_err() {
                continue;
            }
            let read = try_logged(&self.volume(name), Seq::ZERO);
            let Some(log) = self.expect(read) else { continue };
            let memory = self.volumes.get_mut(name).unwrap();
            let covered: Vec<_> =
                log.iter().filter(|l| memory.counts(l.seq, *seq)).map(|l| l.origin).collect();
            memory.flushed(&covered);
        }
        self.vm.image = complete.image.clone();
        self.vm.complete.insert(id, complete);
    }

    fn abort(&mut self, id: CheckpointId) {
        self.take_attempt();
        let aborted = self.vm_change(VmChange::Abort, |store| store.abort_checkpoint(id, "the test says so"));
        if aborted.is_some() {
            assert!(!is_complete(self.store(), id), "{HELD}: an aborted checkpoint is shown");
            self.check_memory_head();
        }
    }

    fn delete_checkpoint(&mut self, id: CheckpointId) {
        if self.vm_change(VmChange::Delete(id), |store| store.delete_checkpoint(id)).is_some() {
            self.vm.complete.remove(&id);
            self.check_memory_head();
        }
    }

    fn rewind(&mut self, to: Option<CheckpointId>) {
        let rewound = self.vm_change(VmChange::Rewind(to), |store| store.rewind_memory(&vm_name(), to));
        if rewound.is_some() {
            self.vm.image = to.map(|id| self.vm.complete[&id].image.clone()).unwrap_or_default();
            self.vm.memory = self.memory_id();
            self.check_memory_head();
        }
    }

    fn revert_machine(&mut self, id: CheckpointId) {
        let disks = self.vm.disks.clone();
        disks.iter().for_each(|disk| self.quiesce(disk));
        if !self.is_alive() || disks.iter().any(|disk| self.volume(disk).refusal().is_some()) {
            return;
        }
        // Before it dies, if it does.
        let complete = self.vm.complete[&id].clone();
        let mut logs = Vec::new();
        for (name, _) in &complete.disks {
            let read = try_logged(&self.volume(name), Seq::ZERO);
            let Some(log) = self.expect(read) else { return };
            logs.push(log);
        }
        let reverted = self.vm_change(VmChange::Revert(id), |store| store.revert_vm(&vm_name(), id, false));
        if reverted.is_some() {
            for ((name, seq), log) in complete.disks.iter().zip(&logs) {
                self.note_revert(name, log, *seq);
            }
            self.vm.image = complete.image;
            self.vm.memory = self.memory_id();
            self.check_memory_head();
        }
    }

    /// After a crash: what has become of a change of the machine.
    pub fn decide_vm(&mut self, change: VmChange) {
        let registered = self.store().vm(&vm_name()).is_ok();
        match change {
            VmChange::Register(disks) if registered => self.vm.disks = disks,
            VmChange::Remove if !registered => self.vm = VmMemory::default(),
            VmChange::Commit(id, complete) if is_complete(self.store(), id) => {
                self.note_complete(id, complete)
            }
            VmChange::Delete(id) if !is_complete(self.store(), id) => drop(self.vm.complete.remove(&id)),
            VmChange::Revert(id) => self.decide_machine_reverted(id),
            VmChange::Rewind(to) => {
                // Before it, the machine went on from another one, or held the same all the same.
                if self.store().vm(&vm_name()).is_ok_and(|vm| vm.current == to) {
                    self.adopt_rewound(to);
                }
            }
            VmChange::Begin if registered => self.note_replaced_memory(),
            VmChange::Register(_)
            | VmChange::Remove
            | VmChange::Begin
            | VmChange::Abort
            | VmChange::Commit(..)
            | VmChange::Delete(_) => {}
        }
    }

    /// Whether the memory was rewound before a crash shows in the branches of its volume, which nobody sees; the machine
    /// may also have had that very parent before. Either image is right; which one it is must then stay.
    fn adopt_rewound(&mut self, to: Option<CheckpointId>) {
        let image = to.map(|id| self.vm.complete[&id].image.clone()).unwrap_or_default();
        if self.memory_head().is_none_or(|head| head == image) {
            self.vm.image = image;
        }
        self.vm.memory = self.memory_id();
    }

    fn decide_machine_reverted(&mut self, id: CheckpointId) {
        let Some(complete) = self.vm.complete.get(&id).cloned() else { return };
        let moved = |name: &VolumeName| {
            let branches = self.store().branches(name).unwrap();
            let known = self.volumes[name].forks.last().map_or(branches[0].start, |f| f.start);
            branches.last().unwrap().start > known
        };
        let moved: Vec<bool> = complete.disks.iter().map(|(name, _)| moved(name)).collect();
        assert!(
            moved.iter().all(|m| *m == moved[0]),
            "{HELD}: half a machine was reverted: {moved:?} of {:?}",
            complete.disks
        );
        if moved[0] {
            for (name, seq) in &complete.disks {
                let log = logged(&self.volume(name), Seq::ZERO);
                self.note_revert(name, &log, *seq);
            }
            self.vm.image = complete.image;
            self.vm.memory = self.memory_id();
            let current = self.store().vm(&vm_name()).unwrap().current;
            assert_eq!(current, Some(id), "{HELD}: the parent of the next checkpoint");
        }
    }

    /// What the memory volume's head holds; none if there is none yet, or it cannot be read.
    fn memory_head(&self) -> Option<MemoryImage> {
        self.store().vm(&vm_name()).ok().filter(|vm| vm.memory.is_some())?;
        let opened = self.store().memory_volume(&vm_name(), IMAGE_BLOCKS * BLOCK_SIZE);
        self.image_of(&*self.expect(opened)?)
    }

    fn image_of(&self, device: &dyn BlockDevice) -> Option<MemoryImage> {
        let blocks = IMAGE_BLOCKS.min(device.info().capacity / BLOCK_SIZE);
        let mut image = MemoryImage::new();
        for block in 0..blocks {
            let stamp = self.expect(block_of(device, block))?;
            if stamp != 0 {
                image.insert(block, stamp);
            }
        }
        Some(image)
    }

    /// While no checkpoint is being taken, the memory volume holds the image from which the machine goes on.
    fn check_memory_head(&self) {
        if !self.is_alive() {
            return;
        }
        if let Some(head) = self.memory_head() {
            assert_eq!(head, self.vm.image, "{HELD}: the memory from which the machine goes on");
        }
    }

    /// The store has the machine's checkpoints as they were committed, and no others.
    pub fn check_vm(&mut self) {
        let orphans = self.store().unfinished_checkpoints();
        assert!(orphans.len() <= 1, "{HELD}: a machine takes one checkpoint at a time: {orphans:?}");
        let known = self.store().checkpoints(&vm_name()).unwrap_or_default();
        let complete: Vec<CheckpointId> =
            known.iter().filter(|c| matches!(c.state, CheckpointState::Committed(_))).map(|c| c.id).collect();
        let expected: Vec<CheckpointId> = self.vm.complete.keys().copied().collect();
        assert_eq!(complete, expected, "{HELD}: the complete checkpoints");
        for info in known.iter().filter(|c| !complete.contains(&c.id)) {
            let Some(epoch) = info.epoch else { continue };
            for name in &self.vm.disks {
                let found = self.store().resolve(name, &Instant::Epoch(epoch));
                assert!(found.is_err(), "{HELD}: {name}@epoch:{epoch} of a checkpoint that is not complete");
            }
        }
        for (id, complete) in &self.vm.complete {
            let device = self.store().checkpoint_memory(*id).unwrap();
            let image = self.image_of(&*device);
            assert_eq!(image.as_ref(), Some(&complete.image), "{HELD}: the memory of checkpoint {id}");
        }
        for orphan in orphans {
            assert!(!orphan.restore.is_null(), "{HELD}: what has to be restored is forgotten");
            self.abort(orphan.id);
        }
        if self.running.as_ref().is_some_and(|r| r.attempt.is_none()) {
            self.check_memory_head();
        }
    }
}

/// Whether a checkpoint is complete.
fn is_complete(store: &Store, id: CheckpointId) -> bool {
    store.checkpoint(id).is_ok_and(|c| matches!(c.state, CheckpointState::Committed(_)))
}
