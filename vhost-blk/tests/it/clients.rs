//! `blkio`'s vhost-user driver, which others wrote, and fio uses. It never says goodbye: each of its ends is abrupt.

use std::mem::MaybeUninit;
use std::path::Path;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use cdp_types::MemoryFaults;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::{DEADLINE, Fixture, eventually, slow};

const BLOCK: usize = 4096;

struct Client {
    // Before the driver, which owns the memory.
    queues: Vec<Blkioq>,
    blkio: Blkio,
}

impl Client {
    fn connect(socket: &Path, queues: usize) -> Self {
        let mut connected = None;
        eventually("a connection", || {
            let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
            blkio.set_str("path", socket.to_str().unwrap()).unwrap();
            connected = blkio.connect().is_ok().then_some(blkio);
            connected.is_some()
        });
        let mut blkio = connected.unwrap();
        blkio.set_i32("num-queues", queues as i32).unwrap();
        let queues = blkio.start().unwrap().queues;
        Self { queues, blkio }
    }

    fn memory(&mut self, blocks: usize) -> MemoryRegion {
        let region = self.blkio.alloc_mem_region(blocks * BLOCK).unwrap();
        self.blkio.map_mem_region(&region).unwrap();
        region
    }
}

/// The requests of one queue, each with a block of memory; blocks of the disk are the queue's own.
struct Lane {
    memory: usize,
    first: u64,
    content: Vec<u64>,
    busy: Vec<bool>,
    /// By request: its block, and the version that it writes.
    running: Vec<Option<(usize, Option<u64>)>>,
    version: u64,
}

impl Lane {
    fn new(memory: usize, queue: usize, blocks: usize, depth: usize) -> Self {
        Self {
            memory,
            first: (queue * blocks) as u64,
            content: vec![0; blocks],
            busy: vec![false; blocks],
            running: vec![None; depth],
            version: 0,
        }
    }

    fn buffer(&self, request: usize) -> *mut u64 {
        (self.memory + request * BLOCK) as *mut u64
    }

    fn submit(&mut self, queue: &mut Blkioq, random: &mut SmallRng, request: usize) {
        let block = loop {
            let block = random.random_range(0..self.content.len());
            if !std::mem::replace(&mut self.busy[block], true) {
                break block;
            }
        };
        let start = (self.first + block as u64) * BLOCK as u64;
        let buffer = self.buffer(request);
        if random.random() {
            self.version += 1;
            for word in 0..BLOCK / 8 {
                // SAFETY: the request's block of the mapped region, which no request uses now.
                unsafe {
                    buffer.add(word).write_volatile((self.version << 20) | (self.first + block as u64))
                };
            }
            queue.write(start, buffer.cast(), BLOCK, request, ReqFlags::empty());
            self.running[request] = Some((block, Some((self.version << 20) | (self.first + block as u64))));
        } else {
            queue.read(start, buffer.cast(), BLOCK, request, ReqFlags::empty());
            self.running[request] = Some((block, None));
        }
    }

    fn finish(&mut self, done: &Completion) {
        assert_eq!(done.ret, 0);
        let (block, written) = self.running[done.user_data].take().expect("a request that was never made");
        self.busy[block] = false;
        if let Some(written) = written {
            self.content[block] = written;
            return;
        }
        for word in 0..BLOCK / 8 {
            // SAFETY: as in `submit`; the read has ended.
            let read = unsafe { self.buffer(done.user_data).add(word).read_volatile() };
            assert_eq!(read, self.content[block], "block {block}, word {word}");
        }
    }
}

fn complete(queue: &mut Blkioq, at_least: usize, mut each: impl FnMut(&Completion)) {
    let mut done: [MaybeUninit<Completion>; 128] = [const { MaybeUninit::uninit() }; 128];
    let mut timeout = DEADLINE;
    let count = queue.do_io(&mut done, at_least, Some(&mut timeout), None).unwrap();
    for done in &done[..count] {
        // SAFETY: `do_io` has filled in the first `count`.
        each(unsafe { done.assume_init_ref() });
    }
}

fn verify(client: &mut Client, depth: usize, requests: usize, seed: u64) {
    let blocks = 2 * depth;
    let region = client.memory(client.queues.len() * depth);
    let lanes = client.queues.iter_mut().enumerate().map(|(index, queue)| {
        (queue, Lane::new(region.addr + index * depth * BLOCK, index, blocks, depth), index as u64)
    });
    std::thread::scope(|scope| {
        for (queue, mut lane, index) in lanes {
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed ^ index);
                let mut submitted = 0;
                while submitted < requests || lane.running.iter().any(Option::is_some) {
                    for request in 0..depth {
                        if submitted < requests && lane.running[request].is_none() {
                            lane.submit(queue, &mut random, request);
                            submitted += 1;
                        }
                    }
                    complete(queue, 1, |done| lane.finish(done));
                }
            });
        }
    });
}

#[test]
fn random_reads_and_writes_are_right_at_every_depth_and_with_every_number_of_queues() {
    for (queues, depth) in [(1, 1), (2, 1), (1, 2), (3, 7), (1, 32), (4, 32), (1, 128), (2, 128), (4, 128)] {
        let seed = (queues * 1000 + depth) as u64;
        let delay = std::time::Duration::from_micros(300);
        let faults = MemoryFaults { max_delay: delay, ..slow(seed) };
        let fixture = Fixture::new(64 << 20, Some(faults));
        let mut client = Client::connect(&fixture.socket(), queues);
        verify(&mut client, depth, 50 * depth.min(64) + 100, seed);
        // Without delays too: then completions race with submissions.
        let fixture = Fixture::new(64 << 20, None);
        let mut client = Client::connect(&fixture.socket(), queues);
        verify(&mut client, depth, 200 * depth.min(64) + 500, seed);
    }
}

#[test]
fn a_hundred_clients_that_vanish_with_requests_in_flight_leave_nothing_behind() {
    let fixture = Fixture::new(64 << 20, Some(slow(77)));
    let mut random = SmallRng::seed_from_u64(77);
    for round in 0..100 {
        let queues = 1 + round % 4;
        let mut client = Client::connect(&fixture.socket(), queues);
        let region = client.memory(queues * 64);
        for (index, queue) in client.queues.iter_mut().enumerate() {
            for request in 0..64 {
                let buffer = region.addr + (index * 64 + request) * BLOCK;
                let start = random.random_range(0..1000) * BLOCK as u64;
                match random.random() {
                    true => queue.write(start, buffer as *const u8, BLOCK, request, ReqFlags::empty()),
                    false => queue.read(start, buffer as *mut u8, BLOCK, request, ReqFlags::empty()),
                }
            }
            // Some have ended, most have not.
            complete(queue, round % 3, |done| assert_eq!(done.ret, 0));
        }
    }
    assert_eq!(fixture.server.stats().connections, 100);
    eventually("the end of the last connection", || !fixture.server.stats().connected);
    assert_eq!(fixture.server.stats().queues.iter().map(|queue| queue.in_flight).sum::<u64>(), 0);

    let mut client = Client::connect(&fixture.socket(), 4);
    let region = client.memory(1);
    for queue in &mut client.queues {
        queue.read(0, region.addr as *mut u8, BLOCK, 0, ReqFlags::empty());
        complete(queue, 1, |done| assert_eq!(done.ret, 0));
    }
}
