//! The server is killed, and comes back: no request is lost, none is done twice.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use cdp_types::{
    BlockDevice, BranchId, ByteRange, DeviceQueue, Event, IoBuf, MemoryConfig, MemoryDevice, NoVmControl, Op,
    Origin, RequestId, Wait,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost_blk::{Server, ServerConfig};

use crate::guest::*;
use crate::{DEADLINE, Fixture, eventually, slow};

const BLOCKS: u64 = 48;
const SLOTS: u16 = 16;
const DIRECTORY: &str = "VHOST_BLK_TEST_DIRECTORY";

/// The other half of the test below: serves a disk whose content lives in two files, until it is killed.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn the_server_that_is_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let directory = Path::new(&directory);
    let open = |name: &str| {
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(directory.join(name));
        options.unwrap()
    };
    let config =
        MemoryConfig { faults: Some(slow(std::process::id().into())), ..MemoryConfig::new(BLOCKS * 4096) };
    let disk = Arc::new(MemoryDevice::in_files(config, open("data"), open("journal")).unwrap());
    let config = ServerConfig { queues: 2, ..ServerConfig::new(directory.join("disk.sock")) };
    let _server = Server::bind(config, disk as Arc<dyn BlockDevice>, Arc::new(NoVmControl)).unwrap();
    // Whoever started this closes the pipe when it ends, so that nothing is left behind if it fails.
    let _ = std::io::read_to_string(std::io::stdin());
}

fn spawn(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "inflight::the_server_that_is_killed"])
        .env(DIRECTORY, directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// A guest that never writes a block while another request on it is in flight, and so knows what every read must
/// bring and what the disk must hold.
struct Workload {
    random: SmallRng,
    version: u64,
    content: Vec<u64>,
    busy: Vec<bool>,
    /// By ring and slot: the block, and the version that a write gives it.
    running: HashMap<(usize, u16), (u64, Option<u64>)>,
    changes: usize,
}

impl Workload {
    fn fill(&mut self, guest: &mut Guest, ring: usize) {
        let mut count = 0;
        for slot in 0..SLOTS {
            if self.running.contains_key(&(ring, slot)) {
                continue;
            }
            let block = self.random.random_range(0..BLOCKS);
            if std::mem::replace(&mut self.busy[block as usize], true) {
                continue;
            }
            let version = match self.random.random_range(0..10) {
                0..6 => {
                    self.version += 1;
                    guest.put(ring, slot, OUT, block * 8, &self.version.to_le_bytes().repeat(512), 0);
                    Some(self.version)
                }
                6 => {
                    guest.put(ring, slot, WRITE_ZEROES, 0, &range(block * 8, 8, 1), 0);
                    Some(0)
                }
                _ => {
                    guest.put(ring, slot, IN, block * 8, &[], 4096);
                    None
                }
            };
            self.running.insert((ring, slot), (block, version));
            count += 1;
        }
        guest.rings[ring].submit(count);
    }

    fn finish(&mut self, guest: &Guest, ring: usize, head: u16) {
        let slot = head / 4;
        let (block, version) =
            self.running.remove(&(ring, slot)).expect("a request that was never made, or twice");
        assert_eq!(guest.status(ring, slot), OK);
        self.busy[block as usize] = false;
        match version {
            Some(version) => {
                self.content[block as usize] = version;
                self.changes += 1;
            }
            None => {
                let data = guest.memory.read(guest.data(ring, slot), 4096);
                let expected = self.content[block as usize].to_le_bytes().repeat(512);
                assert_eq!(data[..8], expected[..8], "block {block} read in slot {slot}");
                assert_eq!(data, expected);
            }
        }
    }
}

#[test]
fn a_server_that_is_killed_at_any_moment_loses_and_repeats_no_request() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let mut child = spawn(directory.path());
    let mut guest = Guest::start(&socket, Options { rings: 2, inflight: true, ..Options::default() });
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut workload = Workload {
        random: SmallRng::seed_from_u64(seed),
        version: 0,
        content: vec![0; BLOCKS as usize],
        busy: vec![false; BLOCKS as usize],
        running: HashMap::new(),
        changes: 0,
    };
    for _ in 0..40 {
        for _ in 0..workload.random.random_range(1..60) {
            for ring in 0..2 {
                workload.fill(&mut guest, ring);
                if workload.running.keys().any(|(of, _)| *of == ring) {
                    for (head, _) in guest.rings[ring].wait() {
                        workload.finish(&guest, ring, head);
                    }
                }
            }
        }
        for ring in 0..2 {
            workload.fill(&mut guest, ring);
        }
        // Some instructions further each time, so that it is killed in the midst of all that it does.
        for _ in 0..workload.random.random_range(0..20_000) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        guest.connection = None;
        child = spawn(directory.path());
        guest.connect(&socket);
        guest.start_rings(None);
    }
    for ring in 0..2 {
        while workload.running.keys().any(|(of, _)| *of == ring) {
            for (head, _) in guest.rings[ring].wait() {
                workload.finish(&guest, ring, head);
            }
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let mut journal = std::fs::read(directory.path().join("journal")).unwrap().split_off(8);
    let mut done: Vec<_> =
        journal.chunks_exact_mut(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())).collect();
    done.sort_unstable();
    assert!(done.windows(2).all(|pair| pair[0] != pair[1]), "a request was done twice");
    assert_eq!(done.len(), workload.changes, "as many changes were done as were reported");
    let data = File::open(directory.path().join("data")).unwrap();
    for (block, version) in workload.content.iter().enumerate() {
        let mut content = vec![0; 4096];
        let _ = data.read_at(&mut content, block as u64 * 4096).unwrap();
        assert_eq!(content, version.to_le_bytes().repeat(512), "block {block}");
    }
}

/// Marks a request in the region as a process that died would have left it.
fn leave_in_flight(guest: &Guest, head: u16, origin: Origin) {
    let (_, file) = guest.inflight.as_ref().unwrap();
    let entry = 16 + 16 * u64::from(head);
    file.write_all_at(&origin.0.to_ne_bytes(), entry + 8).unwrap();
    file.write_all_at(&[1], entry).unwrap();
}

fn run(queue: &mut dyn DeviceQueue, op: Op) {
    queue.submit(RequestId(0), op);
    let mut events = Vec::new();
    while events.is_empty() {
        queue.poll(Wait::For(DEADLINE), &mut events).unwrap();
    }
    assert!(matches!(events[..], [Event::Completed { result: Ok(()), .. }]));
}

#[test]
fn what_the_log_has_is_completed_and_the_rest_is_run_in_order() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { inflight: true, ..Options::default() });
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    guest.connection = None;
    eventually("the end of the connection", || !fixture.server.stats().connected);

    // Slot 1: in the log, and since then overwritten by a later, acknowledged write. Slots 3 and 2, in this order: not
    // in the log, to the same place. Slot 4: a read of what slot 1 wrote. Slot 5: added, never taken.
    let [logged, third, second, read] = std::array::from_fn(|_| fixture.disk.new_origin());
    let mut queue = fixture.disk.open_queue().unwrap();
    let write = |offset, byte, origin| Op::Write {
        offset,
        from: IoBuf::from_bytes(&[byte; 512]),
        origin,
        fua: false,
    };
    run(queue.as_mut(), write(8192, 0xaa, logged));
    run(queue.as_mut(), write(8192, 0xbb, fixture.disk.new_origin()));
    guest.put(0, 1, OUT, 16, &[0xaa; 512], 0);
    guest.put(0, 3, OUT, 24, &[3; 512], 0);
    guest.put(0, 2, OUT, 24, &[2; 512], 0);
    guest.put(0, 4, IN, 16, &[], 512);
    guest.put(0, 5, OUT, 32, &[5; 512], 0);
    guest.rings[0].submit(5);
    for (slot, origin) in [(1, logged), (3, third), (2, second), (4, read)] {
        leave_in_flight(&guest, 4 * slot, origin);
    }

    guest.connect(&fixture.socket());
    guest.start_rings(None);
    while guest.rings[0].seen != 6 {
        guest.rings[0].wait();
    }
    let content = |sector: u64| fixture.disk.content(ByteRange::new(sector * 512, 512)).unwrap()[0];
    assert_eq!(content(16), 0xbb, "what the log has is not run again");
    assert_eq!(content(24), 2, "the rest is run in the order in which it was taken");
    assert_eq!(content(32), 5);
    assert_eq!(guest.memory.read(guest.data(0, 4), 1), [0xbb]);
    for slot in 1..=5 {
        assert_eq!(guest.status(0, slot), OK, "slot {slot}");
    }
    let queue = fixture.server.stats().queues[0];
    assert_eq!((queue.recovered, queue.resubmitted), (1, 3));
}

/// A server that dies between reporting a request and interrupting the guest leaves it asleep.
#[test]
fn a_guest_that_comes_back_is_interrupted_once_for_what_it_may_have_missed() {
    for inflight in [true, false] {
        let fixture = Fixture::new(1 << 20, None);
        let mut guest = Guest::start(&fixture.socket(), Options { inflight, ..Options::default() });
        assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
        guest.connection = None;
        let _ = guest.rings[0].call.read();
        guest.connect(&fixture.socket());
        guest.start_rings(None);
        eventually("the interrupt", || guest.rings[0].call.read().is_ok());
    }
}

#[test]
fn after_a_forced_revert_the_old_guest_is_refused_until_it_resets() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { inflight: true, ..Options::default() });
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    guest.connection = None;
    eventually("the end of the connection", || !fixture.server.stats().connected);
    fixture.disk.switch_branch(BranchId(2));
    guest.put(0, 1, OUT, 0, &[2; 512], 0);
    guest.rings[0].submit(1);
    leave_in_flight(&guest, 4, fixture.disk.new_origin());
    guest.connect(&fixture.socket());
    guest.start_rings(None);
    assert_eq!(guest.rings[0].wait(), [(4, 1)]);
    assert_eq!(guest.status(0, 1), IOERR, "what was in flight belongs to the other branch");
    assert_eq!(guest.request(OUT, 0, &[3; 512], 0).0, IOERR);
    assert_eq!(guest.request(IN, 0, &[], 512).0, IOERR, "and so does all that the guest knows");
    assert_eq!(fixture.disk.content(ByteRange::new(0, 512)).unwrap(), [1; 512]);

    // The guest resets: its front end asks for a new region.
    guest.frontend().get_vring_base(0).unwrap();
    guest.connection = None;
    guest.inflight = None;
    guest.rings[0].reset();
    guest.connect(&fixture.socket());
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[4; 512], 0).0, OK);
}

#[test]
fn a_revert_after_the_region_was_claimed_and_before_the_ring_starts_is_noticed() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { inflight: true, ..Options::default() });
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    guest.connection = None;
    eventually("the end of the connection", || !fixture.server.stats().connected);
    guest.connect(&fixture.socket());
    fixture.disk.switch_branch(BranchId(2));
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[3; 512], 0).0, IOERR);
    assert_eq!(fixture.disk.content(ByteRange::new(0, 512)).unwrap(), [1; 512]);
}

/// Serves a disk again, in another process so to say.
fn serve(socket: &Path, disk: &Arc<MemoryDevice>) -> Server {
    let config = ServerConfig { queues: 4, ..ServerConfig::new(socket) };
    Server::bind(config, Arc::clone(disk) as Arc<dyn BlockDevice>, Arc::new(NoVmControl)).unwrap()
}

/// The guest's driver leaves its disk, and the front end its connection.
fn leave(guest: &mut Guest) {
    guest.frontend().get_vring_base(0).unwrap();
    (guest.connection, guest.inflight) = (None, None);
    guest.rings[0].reset();
}

/// QEMU shows the guest the configuration that it read when the machine began, through all resets of the guest.
#[test]
fn the_write_cache_stays_off_across_restarts_and_resets_until_another_machine_begins() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { inflight: true, ..Options::default() });
    let no_flags = VhostUserConfigFlags::empty();
    guest.frontend().set_config(32, no_flags, &[0]).unwrap();
    let Fixture { mut server, disk, directory } = fixture;
    let socket = directory.path().join("disk.sock");
    server.shutdown();
    let _server = serve(&socket, &disk);
    guest.connect(&socket);
    guest.start_rings(None);
    let write = |guest: &mut Guest| assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    write(&mut guest);
    assert_eq!(disk.flushes(), 1, "the guest relies on it");

    // The guest resets: the front end asks for a new region, and for nothing else.
    leave(&mut guest);
    guest.connect(&socket);
    guest.start_rings(None);
    write(&mut guest);
    assert_eq!(disk.flushes(), 2, "it relies on it still");

    // Another machine: its front end reads the configuration before there is any guest.
    leave(&mut guest);
    guest.begins = true;
    guest.connect(&socket);
    guest.start_rings(None);
    write(&mut guest);
    assert_eq!(disk.flushes(), 2);
    let (_, bytes) = guest.frontend().get_config(32, 1, no_flags, &[0]).unwrap();
    assert_eq!(bytes, [1]);
}

/// Nobody keeps an in-flight region for it meanwhile, so there is nobody to learn from what it has set.
#[test]
fn the_write_cache_stays_off_when_the_server_is_restarted_while_the_guest_resets() {
    let Fixture { mut server, disk, directory } = Fixture::new(1 << 20, None);
    let socket = directory.path().join("disk.sock");
    let mut guest = Guest::start(&socket, Options { inflight: true, ..Options::default() });
    let no_flags = VhostUserConfigFlags::empty();
    guest.frontend().set_config(32, no_flags, &[0]).unwrap();
    leave(&mut guest);
    server.shutdown();
    let mut next = serve(&socket, &disk);
    guest.connect(&socket);
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(disk.flushes(), 1, "the guest relies on it");

    // One that says that it is on is believed, by the next server too.
    guest.frontend().set_config(32, no_flags, &[1]).unwrap();
    assert_eq!(guest.request(OUT, 0, &[2; 512], 0).0, OK);
    next.shutdown();
    let _next = serve(&socket, &disk);
    guest.connect(&socket);
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[3; 512], 0).0, OK);
    assert_eq!(disk.flushes(), 1);
}

/// One that goes on from a checkpoint was told before that, and its driver says nothing of it again.
#[test]
fn a_machine_that_is_expected_with_its_write_cache_off_begins_so_and_the_next_one_does_not() {
    let Fixture { mut server, disk, directory } = Fixture::new(1 << 20, None);
    let socket = directory.path().join("disk.sock");
    let expected = server.write_cache().expect_off();
    let mut guest = Guest::start(&socket, Options { inflight: true, ..Options::default() });
    drop(expected);
    let no_flags = VhostUserConfigFlags::empty();
    let (_, shown) = guest.frontend().get_config(32, 1, no_flags, &[0]).unwrap();
    assert_eq!(shown, [0]);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(disk.flushes(), 1, "the guest relies on it");

    server.shutdown();
    let server = serve(&socket, &disk);
    guest.connect(&socket);
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[2; 512], 0).0, OK);
    assert_eq!(disk.flushes(), 2, "it relies on it still");
    assert!(server.write_cache().is_off());

    leave(&mut guest);
    guest.begins = true;
    guest.connect(&socket);
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[3; 512], 0).0, OK);
    assert_eq!(disk.flushes(), 2, "nobody expects it any more");
    assert!(!server.write_cache().is_off());
}

/// Its front end was started before anybody knew which machine it would get.
#[test]
fn a_machine_that_has_begun_and_is_put_back_to_where_its_write_cache_was_off_has_it_off() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    leave(&mut guest);
    guest.begins = true;
    guest.connect(&fixture.socket());
    assert!(!fixture.server.write_cache().is_off());
    fixture.server.write_cache().restored_off();
    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 1, "the guest relies on it");
    guest.frontend().set_config(32, VhostUserConfigFlags::empty(), &[1]).unwrap();
    assert_eq!(guest.request(OUT, 0, &[2; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 1);
}

/// Drivers may set it before they have said that they are ready.
#[test]
fn a_write_cache_that_is_turned_off_before_the_rings_start_is_off() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest =
        Guest::start(&fixture.socket(), Options { inflight: true, cache_off: true, ..Options::default() });
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(fixture.disk.flushes(), 1);
}

#[test]
fn a_region_that_does_not_fit_the_ring_stops_the_ring() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest =
        Guest::start(&fixture.socket(), Options { inflight: true, rings: 1, ..Options::default() });
    guest.connection = None;
    guest.options.size = 32;
    guest.inflight = None;
    guest.connect(&fixture.socket());
    guest.start_rings(None);
    guest.rings[0].wait_for_error();
    assert!(guest.frontend().get_queue_num().is_ok(), "the connection goes on");
}
