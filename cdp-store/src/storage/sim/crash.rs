//! The death of a process, with and without the power.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::faults::Faults;
use super::inode::Severity;
use super::names::InodeId;
use super::world::{Action, Late, Orphan, Outstanding, World};

impl World {
    pub(super) fn kill(&mut self) {
        for orphan in self.take_orphans() {
            match orphan {
                Orphan::Write(inode, write) => match self.rng.random_range(0..5) {
                    0 => self.land(inode, write),
                    1 => self.land_torn(inode, &write),
                    2 => self.late.push(Late { inode, write }),
                    3 => {
                        // The kernel hands whole blocks to the device: parts of one do not come at different times.
                        let block = u64::from(self.alignment.physical_block);
                        let parts = write.tear_into(block, &mut self.rng);
                        self.late.extend(parts.into_iter().map(|write| Late { inode, write }));
                    }
                    _ => {}
                },
                Orphan::Sync(inode, order) => self.maybe_sync(inode, order),
            }
        }
        self.next_life();
    }

    pub(super) fn cut_power(&mut self) {
        for orphan in self.take_orphans() {
            match orphan {
                // Executed or not: whether it is kept, dropped or torn is decided with the others.
                Orphan::Write(inode, write) => self.land(inode, write),
                Orphan::Sync(inode, order) => self.maybe_sync(inode, order),
            }
        }
        self.land_all();
        let severity = Severity::draw(&mut self.rng);
        let block = u64::from(self.alignment.physical_block);
        for inode in self.inodes.values_mut() {
            inode.cut_power(severity, block, &mut self.rng);
        }
        self.names.cut_power(&mut self.rng);
        self.clock.reboot();
        self.next_life();
    }

    pub(super) fn fork(&self, seed: u64) -> Self {
        let mut orphans = self.orphans.clone();
        orphans.extend(self.outstanding.iter().filter_map(orphan_of));
        Self {
            seed,
            rng: SmallRng::seed_from_u64(seed),
            clock: self.clock.fork(),
            alignment: self.alignment,
            capacity: self.capacity,
            sets_aside: self.sets_aside,
            reserved: self.reserved,
            inodes: self.inodes.clone(),
            names: self.names.clone(),
            outstanding: Vec::new(),
            orphans,
            late: self.late.clone(),
            completed: Default::default(),
            faults: Faults::default(),
            steps: self.steps,
            crash_at: None,
            crashed: true,
            life: self.life,
            order: self.order,
            next_inode: self.next_inode,
            next_lane: self.next_lane,
        }
    }

    /// What the process had not finished, in random order.
    fn take_orphans(&mut self) -> Vec<Orphan> {
        let mut orphans = std::mem::take(&mut self.orphans);
        orphans.extend(self.outstanding.drain(..).filter_map(|operation| orphan_of(&operation)));
        orphans.shuffle(&mut self.rng);
        orphans
    }

    fn maybe_sync(&mut self, inode: InodeId, order: u64) {
        let done: bool = self.rng.random();
        if let Some(inode) = self.inodes.get_mut(&inode).filter(|_| done) {
            inode.sync(order);
        }
    }

    fn next_life(&mut self) {
        let reachable = self.names.reachable();
        let late = &self.late;
        self.inodes.retain(|id, _| reachable.contains(id) || late.iter().any(|write| write.inode == *id));
        self.completed.clear();
        self.crash_at = None;
        self.crashed = false;
        self.life += 1;
    }
}

fn orphan_of(operation: &Outstanding) -> Option<Orphan> {
    match &operation.action {
        Action::Read { .. } => None,
        Action::Write { file, write, .. } => Some(Orphan::Write(file.inode, write.clone())),
        Action::Sync { file, order } => Some(Orphan::Sync(file.inode, *order)),
    }
}
