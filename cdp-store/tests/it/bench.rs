//! Steps of directed tests: one request at a time on the simulated machine.

use cdp_store::RecordInfo;
use cdp_types::{
    BLOCK_SIZE, BlockDevice, BlockRange, ByteRange, DeviceQueue, Event, IoBuf, IoError, Op, Origin,
};
use cdp_types::{RequestId, Seq, VolumeName, Wait};

use crate::content::{SECTOR, Stamp, fill, stamps_of};
use crate::machine::{Crash, Machine, PATIENCE, read};

/// A machine with two volumes, and hands to work on them.
pub struct Bench {
    /// The machine.
    pub machine: Machine,
}

impl Bench {
    /// A machine with an open store of two volumes.
    pub fn new(seed: u64) -> Self {
        let mut machine = Machine::new(seed);
        machine.open().unwrap();
        machine.create();
        machine.create();
        Self { machine }
    }

    /// The name of the first volume, or of the second.
    pub fn name(&self, index: usize) -> VolumeName {
        self.machine.volumes.keys().nth(index).unwrap().clone()
    }

    /// Runs one request on a queue to its end, with the store's background work in between.
    pub fn run(&self, queue: &mut dyn DeviceQueue, op: Op) -> Result<(), IoError> {
        queue.submit(RequestId(1), op);
        self.wait(queue)
    }

    /// Waits for the next completion.
    pub fn wait(&self, queue: &mut dyn DeviceQueue) -> Result<(), IoError> {
        let mut events = Vec::new();
        for _ in 0..PATIENCE {
            queue.poll(Wait::For(std::time::Duration::from_millis(1)), &mut events).unwrap();
            if let Some(Event::Completed { result, .. }) = events.pop() {
                // Seen, so delivered.
                queue.poll(Wait::No, &mut events).unwrap();
                assert!(events.is_empty());
                return result;
            }
            self.machine.disk.clock().advance(std::time::Duration::from_millis(1));
            // Its errors are what some of these tests order.
            self.machine.store().load_step();
            let _ = self.machine.store().pool_step();
        }
        let volumes = self.machine.store().volumes();
        let states: Vec<_> = volumes.iter().map(|v| (&v.name, &v.state, v.head, v.stats)).collect();
        panic!("a request never ends: {states:?}");
    }

    /// Writes one block of a volume on a queue of its own.
    pub fn write(&self, volume: usize, block: u64, stamp: Stamp) -> Result<(), IoError> {
        let volume = self.machine.volume(&self.name(volume));
        let mut queue = volume.open_queue().unwrap();
        self.run(&mut *queue, write_op(block, stamp, Origin(0)))
    }

    /// Flushes a volume on a queue of its own.
    pub fn flush(&self, volume: usize) -> Result<(), IoError> {
        let volume = self.machine.volume(&self.name(volume));
        let mut queue = volume.open_queue().unwrap();
        self.run(&mut *queue, Op::Flush)
    }

    /// What a block of a volume's head holds: one stamp throughout.
    pub fn block(&self, volume: usize, block: u64) -> Result<Stamp, IoError> {
        block_of(&*self.machine.volume(&self.name(volume)), block)
    }

    /// The records of a volume's log that change blocks.
    pub fn records(&self, volume: usize) -> Vec<RecordInfo> {
        let mut records = Vec::new();
        let read = self.machine.volume(&self.name(volume)).records(Seq::ZERO, Seq::MAX, &mut |record| {
            if record.block_count > 0 {
                records.push(record);
            }
            true
        });
        read.unwrap();
        records
    }

    /// The file in which a record lies.
    pub fn file_of(&self, record: &RecordInfo) -> String {
        let segments = self.machine.store().segments().unwrap();
        let slot = segments.iter().find(|s| s.incarnation == record.segment).unwrap().slot;
        format!("segments/{slot:08}")
    }

    /// The process dies, and the store is opened again.
    pub fn restart(&mut self, how: Crash) {
        self.machine.crash(how);
        self.machine.open().unwrap();
    }
}

/// A write of one block.
pub fn write_op(block: u64, stamp: Stamp, origin: Origin) -> Op {
    let mut bytes = vec![0; BLOCK_SIZE as usize];
    bytes.chunks_exact_mut(SECTOR).for_each(|sector| fill(stamp, sector));
    Op::Write { offset: block * BLOCK_SIZE, from: IoBuf::from_bytes(&bytes), origin, fua: false }
}

/// What a block of a device holds.
pub fn block_of(device: &dyn BlockDevice, block: u64) -> Result<Stamp, IoError> {
    let range: ByteRange = BlockRange::new(block, 1).bytes();
    let stamps = stamps_of(&read(device, range)?);
    assert!(stamps.iter().all(|s| *s == stamps[0] && s.is_some()), "block {block} holds {stamps:?}");
    Ok(stamps[0].unwrap())
}
