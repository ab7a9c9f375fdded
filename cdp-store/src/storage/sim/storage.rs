//! What a process sees of the disk: storage, files, lanes.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cdp_types::{IoBuf, Wait};

use super::SimDisk;
use super::faults::OpKind;
use super::inode::Write;
use super::names::Entry;
use super::world::{Action, FileId, LaneId, Orphan, Outstanding, World};
use crate::storage::{AlignedBuf, Alignment, Done, File, Lane, Storage, Token, Waker, check_name};

/// The storage of one process on a [`SimDisk`]. It and its files and lanes are dead after the next crash: every
/// call fails.
///
/// Watching eventfds is not supported.
#[derive(Clone)]
pub struct SimStorage {
    disk: SimDisk,
    life: u64,
}

impl SimStorage {
    pub(super) fn new(disk: SimDisk) -> Self {
        let life = disk.world().life;
        Self { disk, life }
    }

    /// The disk that it is on.
    #[must_use]
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }

    fn file(&self, name: &str, inode: u64) -> Arc<dyn File> {
        Arc::new(SimFile { storage: self.clone(), id: FileId { inode, name: name.into() } })
    }

    fn change_names<T>(
        &self,
        kind: OpKind,
        name: &str,
        change: impl FnOnce(&mut World) -> io::Result<T>,
    ) -> io::Result<T> {
        self.disk.world().change_names(self.life, kind, name, change)
    }
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimStorage(process {})", self.life)
    }
}

impl Storage for SimStorage {
    fn alignment(&self) -> Alignment {
        self.disk.world().alignment
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        check_name(name)?;
        let inode = self.change_names(OpKind::Create, name, |world| world.create_file(name))?;
        Ok(self.file(name, inode))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        check_name(name)?;
        let mut world = self.disk.world();
        world.begin_step(self.life)?;
        world.check_fault(OpKind::Open, name)?;
        match world.names.get(name) {
            Some(Entry::File(inode)) => Ok(self.file(name, inode)),
            Some(Entry::Directory) => Err(io::Error::from_raw_os_error(libc::EISDIR)),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    fn create_directory(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        self.change_names(OpKind::Create, name, |world| match world.names.get(name) {
            Some(Entry::Directory) => Ok(()),
            _ => world.names.create(name, Entry::Directory),
        })
    }

    fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let mut world = self.disk.world();
        world.begin_step(self.life)?;
        world.check_fault(OpKind::List, directory)?;
        Ok(world.names.list(directory))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        self.change_names(OpKind::Remove, name, |world| world.names.remove(name))
    }

    fn sync_directory(&self, directory: &str) -> io::Result<()> {
        self.change_names(OpKind::SyncDirectory, directory, |world| world.names.sync(directory))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let world = self.disk.world();
        world.check_alive(self.life)?;
        Ok(world.free_bytes())
    }

    fn lane(&self) -> io::Result<Box<dyn Lane>> {
        let mut world = self.disk.world();
        world.check_alive(self.life)?;
        world.next_lane += 1;
        Ok(Box::new(SimLane {
            storage: self.clone(),
            id: world.next_lane,
            waker: Arc::default(),
            refused: Vec::new(),
            in_flight: Vec::new(),
        }))
    }
}

struct SimFile {
    storage: SimStorage,
    id: FileId,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({} of process {})", self.id.name, self.storage.life)
    }
}

impl File for SimFile {
    fn name(&self) -> &str {
        &self.id.name
    }

    fn len(&self) -> io::Result<u64> {
        let mut world = self.storage.disk.world();
        world.begin_step(self.storage.life)?;
        world.check_fault(OpKind::Len, &self.id.name)?;
        Ok(world.inode(self.id.inode).volatile.len())
    }

    fn read_at(&self, offset: u64, into: &mut AlignedBuf) -> io::Result<()> {
        let mut world = self.storage.disk.world();
        world.alignment.check_place(offset, into.len())?;
        world.begin_step(self.storage.life)?;
        world.check_fault(OpKind::Read, &self.id.name)?;
        let content = &world.inode(self.id.inode).volatile;
        let there = content.len().saturating_sub(offset).min(into.len() as u64) as usize;
        content.read(offset, &mut into[..there]);
        into[there..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &AlignedBuf) -> io::Result<()> {
        let mut world = self.storage.disk.world();
        world.alignment.check_place(offset, from.len())?;
        world.check_alive(self.storage.life)?;
        let write = Write { offset, bytes: from[..].into() };
        if let Err(died) = world.begin_step(self.storage.life) {
            world.orphans.push(Orphan::Write(self.id.inode, write));
            return Err(died);
        }
        world.execute_write(self.id.inode, &self.id.name, write)
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.storage.disk.world();
        world.check_alive(self.storage.life)?;
        let order = world.order + 1;
        if let Err(died) = world.begin_step(self.storage.life) {
            world.orphans.push(Orphan::Sync(self.id.inode, order));
            return Err(died);
        }
        world.execute_sync(self.id.inode, &self.id.name, order)
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        let mut world = self.storage.disk.world();
        world.begin_step(self.storage.life)?;
        world.execute_reserve(self.id.inode, &self.id.name, len)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Default)]
struct SimWaker {
    called: AtomicBool,
}

impl Waker for SimWaker {
    fn wake(&self) {
        self.called.store(true, Ordering::SeqCst);
    }
}

struct SimLane {
    storage: SimStorage,
    id: LaneId,
    waker: Arc<SimWaker>,
    refused: Vec<Done>,
    /// The tokens of what was started and not yet reported.
    in_flight: Vec<Token>,
}

impl SimLane {
    fn begin(&mut self, token: Token) {
        assert!(!self.in_flight.contains(&token), "token {token} is in flight already");
        self.in_flight.push(token);
    }

    /// What a dead process starts goes nowhere.
    fn start(&self, world: &mut World, token: Token, action: Action) {
        if world.check_alive(self.storage.life).is_err() {
            return;
        }
        world.outstanding.push(Outstanding { lane: self.id, token, action });
    }

    fn refuse(&mut self, token: Token, error: io::Error, buffer: Option<AlignedBuf>) {
        self.refused.push(Done::Io { token, result: Err(error), buffer });
    }

    fn file(&self, file: &Arc<dyn File>) -> io::Result<FileId> {
        match file.as_any().downcast_ref::<SimFile>() {
            Some(file) if Arc::ptr_eq(&file.storage.disk.world, &self.storage.disk.world) => {
                Ok(file.id.clone())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a file of this disk", file.name()),
            )),
        }
    }

    /// Moves what has been executed to `done`.
    fn take_completed(&mut self, world: &mut World, done: &mut Vec<Done>) {
        let before = done.len();
        done.append(&mut self.refused);
        done.append(world.completed.entry(self.id).or_default());
        for event in &done[before..] {
            if let Done::Io { token, .. } = event {
                self.in_flight.retain(|other| other != token);
            }
        }
    }
}

impl Lane for SimLane {
    fn read(&mut self, token: Token, file: &Arc<dyn File>, offset: u64, into: IoBuf) {
        self.begin(token);
        let disk = self.storage.disk.clone();
        let mut world = disk.world();
        match world.alignment.check_place(offset, into.len()).and_then(|()| self.file(file)) {
            Ok(file) => self.start(&mut world, token, Action::Read { file, offset, into }),
            Err(error) => self.refuse(token, error, None),
        }
    }

    fn write(
        &mut self,
        token: Token,
        file: &Arc<dyn File>,
        offset: u64,
        from: AlignedBuf,
        range: Range<usize>,
    ) {
        self.begin(token);
        let disk = self.storage.disk.clone();
        let mut world = disk.world();
        let write = Write { offset, bytes: from[range.clone()].into() };
        let allowed =
            world.alignment.check_place(offset, range.len()).and_then(|()| world.check_memory(&range));
        match allowed.and_then(|()| self.file(file)) {
            Ok(file) => self.start(&mut world, token, Action::Write { file, write, buffer: from }),
            Err(error) => self.refuse(token, error, Some(from)),
        }
    }

    fn sync(&mut self, token: Token, file: &Arc<dyn File>) {
        self.begin(token);
        let disk = self.storage.disk.clone();
        let mut world = disk.world();
        match self.file(file) {
            Ok(file) => {
                let order = world.order + 1;
                self.start(&mut world, token, Action::Sync { file, order });
            }
            Err(error) => self.refuse(token, error, None),
        }
    }

    fn watch(&mut self, _eventfd: Arc<OwnedFd>, _tag: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a simulated lane watches no eventfds"))
    }

    fn unwatch(&mut self, _tag: u64) {}

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::clone(&self.waker) as Arc<dyn Waker>
    }

    /// # Panics
    /// If it is to wait for ever and nothing is outstanding on the whole disk: the test has a deadlock.
    fn poll(&mut self, wait: Wait, done: &mut Vec<Done>) -> io::Result<()> {
        let disk = self.storage.disk.clone();
        let mut world = disk.world();
        let before = done.len();
        loop {
            world.check_alive(self.storage.life)?;
            self.take_completed(&mut world, done);
            let woken = self.waker.called.swap(false, Ordering::SeqCst);
            if woken || done.len() > before || matches!(wait, Wait::No) {
                return Ok(());
            }
            if world.outstanding.is_empty() {
                let Wait::For(time) = wait else {
                    panic!(
                        "deadlock: nothing outstanding, and lane {} waits for ever (seed {})",
                        self.id, world.seed
                    )
                };
                world.clock.advance(time);
                return Ok(());
            }
            world.step();
        }
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a simulated lane sleeps only in `poll`"))
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.descriptor().map(|_| true)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

impl Drop for SimLane {
    fn drop(&mut self) {
        let disk = self.storage.disk.clone();
        let mut world = disk.world();
        if self.storage.life != world.life {
            return;
        }
        // Waits for its own, as a real one does, while others' may go first. If the process dies meanwhile, what is
        // left is decided by the restart.
        while world.outstanding.iter().any(|operation| operation.lane == self.id) && world.step() {}
        world.completed.remove(&self.id);
    }
}
