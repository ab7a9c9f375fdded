//! The machine's state, and the execution of operations on it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use cdp_types::IoBuf;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::SECTOR;
use super::clock::SimClock;
use super::faults::{Astray, Faults, OpKind};
use super::inode::{Inode, Write};
use super::names::{Entry, InodeId, Names};
use crate::storage::{AlignedBuf, Alignment, Done, Token};

/// How likely it is that a late write lands before an I/O step.
const LANDING: f64 = 0.125;

pub(super) type LaneId = u64;

/// The free space without a limit, in bytes.
const UNLIMITED: u64 = 1 << 50;

/// An operation that was started and not yet executed.
pub(super) struct Outstanding {
    pub(super) lane: LaneId,
    pub(super) token: Token,
    pub(super) action: Action,
}

pub(super) enum Action {
    Read {
        file: FileId,
        offset: u64,
        into: IoBuf,
    },
    /// The buffer goes back to its owner; the bytes were copied when the write was started.
    Write {
        file: FileId,
        write: Write,
        buffer: AlignedBuf,
    },
    /// Covers what was executed before `order`.
    Sync {
        file: FileId,
        order: u64,
    },
}

/// A file, and the name that it was opened by, for faults and messages.
#[derive(Clone)]
pub(super) struct FileId {
    pub(super) inode: InodeId,
    pub(super) name: Arc<str>,
}

/// What a dead process leaves undone.
#[derive(Clone)]
pub(super) enum Orphan {
    Write(InodeId, Write),
    Sync(InodeId, u64),
}

/// A write that lands some time.
#[derive(Clone)]
pub(super) struct Late {
    pub(super) inode: InodeId,
    pub(super) write: Write,
}

pub(super) struct World {
    pub(super) seed: u64,
    pub(super) rng: SmallRng,
    pub(super) clock: SimClock,
    pub(super) alignment: Alignment,
    pub(super) capacity: Option<u64>,
    /// Whether its file system can set blocks aside.
    pub(super) sets_aside: bool,
    /// How often it has.
    pub(super) reserved: u64,
    pub(super) inodes: BTreeMap<InodeId, Inode>,
    pub(super) names: Names,
    pub(super) outstanding: Vec<Outstanding>,
    /// Blocking calls that the process died in.
    pub(super) orphans: Vec<Orphan>,
    pub(super) late: Vec<Late>,
    /// Executed, and not yet reported by the lane.
    pub(super) completed: BTreeMap<LaneId, Vec<Done>>,
    pub(super) faults: Faults,
    pub(super) steps: u64,
    pub(super) crash_at: Option<u64>,
    pub(super) crashed: bool,
    /// Which process is running; handles of others are dead.
    pub(super) life: u64,
    /// The order of executions of writes.
    pub(super) order: u64,
    pub(super) next_inode: InodeId,
    pub(super) next_lane: LaneId,
}

/// What a call of a dead process gets.
pub(super) fn dead() -> io::Error {
    io::Error::other("simulated crash")
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let clock = SimClock::new(rng.random());
        Self {
            seed,
            rng,
            clock,
            alignment: Alignment { offset: 512, memory: 512, physical_block: 4096 },
            capacity: None,
            sets_aside: seed.is_multiple_of(2),
            reserved: 0,
            inodes: BTreeMap::new(),
            names: Names::default(),
            outstanding: Vec::new(),
            orphans: Vec::new(),
            late: Vec::new(),
            completed: BTreeMap::new(),
            faults: Faults::default(),
            steps: 0,
            crash_at: None,
            crashed: false,
            life: 0,
            order: 0,
            next_inode: 0,
            next_lane: 0,
        }
    }

    pub(super) fn check_alive(&self, life: u64) -> io::Result<()> {
        if self.crashed || life != self.life { Err(dead()) } else { Ok(()) }
    }

    /// Begins an I/O step of the process `life`; fails if it is dead, or dies here.
    pub(super) fn begin_step(&mut self, life: u64) -> io::Result<()> {
        self.check_alive(life)?;
        if self.crash_at.is_some_and(|at| self.steps >= at) {
            self.crashed = true;
            return Err(dead());
        }
        self.steps += 1;
        if !self.late.is_empty() && self.rng.random_bool(LANDING) {
            let index = self.rng.random_range(0..self.late.len());
            let Late { inode, write } = self.late.swap_remove(index);
            self.land(inode, write);
        }
        Ok(())
    }

    /// The error that an operation is to fail with, if any.
    pub(super) fn draw_fault(&mut self, kind: OpKind, name: &str) -> Option<i32> {
        let rng = &mut self.rng;
        self.faults.draw(kind, name, |probability| rng.random_bool(probability))
    }

    pub(super) fn check_fault(&mut self, kind: OpKind, name: &str) -> io::Result<()> {
        self.draw_fault(kind, name).map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// A blocking call that changes names. It happens, or not, if the process dies in it.
    pub(super) fn change_names<T>(
        &mut self,
        life: u64,
        kind: OpKind,
        name: &str,
        change: impl FnOnce(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        self.check_alive(life)?;
        if let Err(died) = self.begin_step(life) {
            if self.rng.random() {
                let _ = change(self);
            }
            return Err(died);
        }
        self.check_fault(kind, name)?;
        change(self)
    }

    pub(super) fn create_file(&mut self, name: &str) -> io::Result<InodeId> {
        let inode = self.next_inode;
        self.names.create(name, Entry::File(inode))?;
        self.next_inode += 1;
        self.inodes.insert(inode, Inode::default());
        Ok(inode)
    }

    pub(super) fn inode_named(&mut self, name: &str) -> Option<&mut Inode> {
        match self.names.get(name)? {
            Entry::File(inode) => self.inodes.get_mut(&inode),
            Entry::Directory => None,
        }
    }

    /// A file that somebody has open is never dropped while that process lives.
    pub(super) fn inode(&mut self, inode: InodeId) -> &mut Inode {
        self.inodes.entry(inode).or_default()
    }

    pub(super) fn flip_bit(&mut self, name: &str, offset: u64, bit: u8) {
        let inode = self.inode_named(name).unwrap_or_else(|| panic!("there is no file {name:?}"));
        let len = inode.volatile.len();
        assert!(
            offset < len && bit < 8,
            "{name:?} has {len} bytes of 8 bits; asked for bit {bit} of byte {offset}"
        );
        inode.flip_bit(offset, bit);
    }

    pub(super) fn free_bytes(&self) -> u64 {
        let used: u64 =
            self.names.linked().iter().filter_map(|id| self.inodes.get(id)).map(|i| i.volatile.len()).sum();
        self.capacity.unwrap_or(UNLIMITED).saturating_sub(used)
    }

    /// Executes a write, without faults.
    pub(super) fn land(&mut self, inode: InodeId, write: Write) {
        self.order += 1;
        let order = self.order;
        if let Some(inode) = self.inodes.get_mut(&inode) {
            inode.execute(order, write);
        }
    }

    pub(super) fn land_torn(&mut self, inode: InodeId, write: &Write) {
        for part in write.tear(&mut self.rng) {
            self.land(inode, part);
        }
    }

    pub(super) fn land_all(&mut self) {
        while !self.late.is_empty() {
            let index = self.rng.random_range(0..self.late.len());
            let Late { inode, write } = self.late.swap_remove(index);
            self.land(inode, write);
        }
    }

    /// Executes a write of the running process, with the faults that were ordered.
    pub(super) fn execute_write(&mut self, inode: InodeId, name: &str, write: Write) -> io::Result<()> {
        if let Some(errno) = self.draw_fault(OpKind::Write, name) {
            return Err(self.fail_write(inode, write, errno));
        }
        let growth = write.end().saturating_sub(self.inode(inode).volatile.len());
        if self.capacity.is_some() && growth > self.free_bytes() {
            return Err(self.fail_write(inode, write, libc::ENOSPC));
        }
        match self.faults.draw_astray() {
            None => self.land(inode, write),
            Some(Astray::Nowhere) => {}
            Some(Astray::Somewhere) => {
                let blocks = self.inode(inode).volatile.len() / u64::from(self.alignment.offset);
                let offset = self.rng.random_range(0..=blocks) * u64::from(self.alignment.offset);
                self.land(inode, Write { offset, ..write });
            }
            Some(Astray::At(other, offset)) => match self.names.get(&other) {
                Some(Entry::File(other)) => self.land(other, Write { offset, ..write }),
                Some(Entry::Directory) | None => {}
            },
        }
        Ok(())
    }

    /// Sets blocks aside: the file is as long as that at once, but after a power cut only if it was synced, or by chance.
    pub(super) fn execute_reserve(&mut self, inode: InodeId, name: &str, len: u64) -> io::Result<()> {
        if let Some(errno) = self.draw_fault(OpKind::Reserve, name) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if !self.sets_aside {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let growth = len.saturating_sub(self.inode(inode).volatile.len());
        if self.capacity.is_some() && growth > self.free_bytes() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if growth > 0 {
            self.land(inode, Write { offset: len, bytes: Arc::new([]) });
            self.reserved += 1;
        }
        Ok(())
    }

    /// What a failed write does all the same.
    fn fail_write(&mut self, inode: InodeId, write: Write, errno: i32) -> io::Error {
        if errno == libc::ENOSPC {
            self.land_what_fits(inode, &write);
        } else {
            match self.rng.random_range(0..4) {
                0 => self.land(inode, write),
                1 => self.land_torn(inode, &write),
                2 => self.late.push(Late { inode, write }),
                _ => {}
            }
        }
        io::Error::from_raw_os_error(errno)
    }

    fn land_what_fits(&mut self, inode: InodeId, write: &Write) {
        let fits = (self.inode(inode).volatile.len() + self.free_bytes()).saturating_sub(write.offset);
        let sectors = (fits as usize).min(write.bytes.len()) / SECTOR;
        let landed = self.rng.random_range(0..=sectors) * SECTOR;
        if landed > 0 {
            self.land(inode, write.part(0..landed));
        }
    }

    pub(super) fn execute_sync(&mut self, inode: InodeId, name: &str, order: u64) -> io::Result<()> {
        let fault = self.draw_fault(OpKind::Sync, name);
        let Some(inode) = self.inodes.get_mut(&inode) else { return Ok(()) };
        match fault {
            None => inode.sync(order),
            Some(_) => inode.fail_sync(order, &mut self.rng),
        }
        fault.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    fn execute_read(&mut self, inode: InodeId, name: &str, offset: u64, into: &IoBuf) -> io::Result<()> {
        self.check_fault(OpKind::Read, name)?;
        let content = &self.inode(inode).volatile;
        let there = content.len().saturating_sub(offset).min(into.len() as u64) as usize;
        let mut bytes = vec![0; there];
        content.read(offset, &mut bytes);
        into.copy_in(0, &bytes);
        if there < into.len() {
            let text = format!("only {there} of {} bytes at {offset} of {name} could be read", into.len());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        Ok(())
    }

    /// Executes an outstanding operation, any. False if there is none, or the process is dead.
    pub(super) fn step(&mut self) -> bool {
        if self.outstanding.is_empty() || self.begin_step(self.life).is_err() {
            return false;
        }
        let index = self.rng.random_range(0..self.outstanding.len());
        let Outstanding { lane, token, action } = self.outstanding.swap_remove(index);
        let (result, buffer) = match action {
            Action::Read { file, offset, into } => {
                (self.execute_read(file.inode, &file.name, offset, &into), None)
            }
            Action::Write { file, write, buffer } => {
                (self.execute_write(file.inode, &file.name, write), Some(buffer))
            }
            Action::Sync { file, order } => (self.execute_sync(file.inode, &file.name, order), None),
        };
        self.completed.entry(lane).or_default().push(Done::Io { token, result, buffer });
        true
    }

    pub(super) fn check_memory(&self, range: &Range<usize>) -> io::Result<()> {
        if range.start.is_multiple_of(self.alignment.memory as usize) {
            return Ok(());
        }
        let text = format!("a write from byte {} of a buffer: direct I/O cannot", range.start);
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}
