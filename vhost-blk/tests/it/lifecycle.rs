//! Starting, stopping, coming back.

use std::fs::File;
use std::io::Read;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cdp_types::{BlockDevice, ByteRange, MemoryConfig, NoVmControl};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_blk::{ErrorKind, Server, ServerConfig};
use vmm_sys_util::eventfd::EventFd;

use crate::faulty::FaultyDisk;
use crate::guest::*;
use crate::{Fixture, Recorder, eventually, slow};

/// Puts a write of one block into each of the first `count` slots of a ring.
fn put_writes(guest: &mut Guest, ring: usize, count: u16) {
    for slot in 0..count {
        guest.put(ring, slot, OUT, u64::from(slot) * 8, &[slot as u8 + 1; 4096], 0);
    }
    guest.rings[ring].submit(count);
}

#[test]
fn a_ring_is_drained_before_its_position_is_told() {
    let recorder = Arc::new(Recorder::default());
    let config = MemoryConfig { faults: Some(slow(2)), ..MemoryConfig::new(1 << 20) };
    let fixture = Fixture::with(config, Arc::clone(&recorder) as _);
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 2, ..Options::default() });
    for round in 1..=20u16 {
        put_writes(&mut guest, 0, 16);
        put_writes(&mut guest, 1, 16);
        let mut bases = [0; 2];
        for (ring, base) in bases.iter_mut().enumerate() {
            *base = guest.frontend().get_vring_base(ring).unwrap() as u16;
            // What had not been taken by then stays in the ring for the next start.
            assert_eq!(guest.rings[ring].used_index(), *base, "everything that was taken is reported");
        }
        assert_eq!(fixture.server.stats().queues.iter().map(|queue| queue.in_flight).sum::<u64>(), 0);
        guest.start_rings(Some(&bases));
        for ring in 0..2 {
            while guest.rings[ring].seen != round.wrapping_mul(16) {
                guest.rings[ring].wait();
            }
        }
    }
    guest.frontend().get_vring_base(0).unwrap();
    guest.frontend().get_vring_base(1).unwrap();
    drop(guest);
    eventually("the end of the connection", || recorder.0.lock().unwrap().last().unwrap() == "disconnected");
    let told = recorder.0.lock().unwrap();
    assert_eq!((told.len(), &*told[0]), (21 * 4 + 2, "memory"));
    for round in told[1..85].chunks(4) {
        assert_eq!(round, ["started 0", "started 1", "stopped 0", "stopped 1, the last"]);
    }
}

#[test]
fn a_kick_that_comes_before_the_ring_is_enabled_is_not_lost() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    guest.frontend().get_vring_base(0).unwrap();
    guest.frontend().set_vring_enable(0, false).unwrap();
    let Guest { connection, rings, .. } = &mut guest;
    start_ring(connection.as_mut().unwrap(), &rings[0], 0);
    put_writes(&mut guest, 0, 3);
    guest.rings[0].kick.write(1).unwrap();
    guest.frontend().get_queue_num().unwrap(); // the server has seen all messages by now
    assert_eq!(guest.rings[0].used_index(), 0, "not enabled");
    guest.frontend().set_vring_enable(0, true).unwrap();
    while guest.rings[0].seen != 3 {
        guest.rings[0].wait();
    }
}

/// The front end may have looked at the old one for the last time when a request was reported through it.
#[test]
fn the_guest_is_interrupted_when_there_is_another_descriptor_to_do_that() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    guest.frontend().set_vring_call(0, &call).unwrap();
    assert_eq!(call.read().unwrap(), 1);
    let config = guest.rings[0].config(None);
    guest.frontend().set_vring_addr(0, &config).unwrap();
    assert!(call.read().is_err(), "once, not with every change");
    guest.rings[0].call = call;
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

#[test]
fn a_disabled_ring_is_left_alone_and_goes_on_when_it_is_enabled() {
    let fixture = Fixture::new(1 << 20, Some(slow(3)));
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 2, ..Options::default() });
    put_writes(&mut guest, 0, 8);
    guest.frontend().set_vring_enable(0, false).unwrap();
    let before = guest.rings[0].used_index();
    guest.rings[0].reap();
    for slot in 8..16 {
        guest.put(0, slot, IN, 0, &[], 512);
    }
    guest.rings[0].submit(8);
    guest.rings[0].kick.write(1).unwrap();
    for _ in 0..10 {
        guest.put(1, 0, IN, 0, &[], 512);
        guest.rings[1].submit(1);
        guest.rings[1].wait();
    }
    assert_eq!(guest.rings[0].used_index(), before, "nothing is used after the ring was disabled");
    guest.frontend().set_vring_enable(0, true).unwrap();
    while guest.rings[0].seen != 16 {
        guest.rings[0].wait();
    }
}

/// A disk of which a queue is open is not reverted.
#[test]
fn a_ring_that_cannot_be_started_leaves_no_queue_of_the_disk_open() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let disk = Arc::new(FaultyDisk::new(1 << 20));
    let device = Arc::clone(&disk) as Arc<dyn BlockDevice>;
    let _server = Server::bind(ServerConfig::new(&socket), device, Arc::new(NoVmControl)).unwrap();
    let open = || disk.faults.queues.load(Ordering::Relaxed);
    let mut guest = Guest::start(&socket, Options::default());
    assert_eq!(open(), 1);
    guest.frontend().get_vring_base(0).unwrap();
    assert_eq!(open(), 0);

    let mut config = guest.rings[0].config(None);
    config.used_ring_addr = u64::MAX - 3;
    let Guest { connection, rings, .. } = &mut guest;
    let frontend = connection.as_mut().unwrap();
    frontend.set_vring_addr(0, &config).unwrap();
    frontend.set_vring_kick(0, &rings[0].kick).unwrap();
    rings[0].wait_for_error();
    frontend.get_vring_base(0).unwrap();
    assert_eq!(open(), 0, "nobody has stopped a ring");

    guest.start_rings(None);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(open(), 1);
}

/// The disk's queue reads the eventfd by which its thread is told, and may then not come to say so.
#[test]
fn a_stop_that_comes_just_as_the_disk_s_queue_fails_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let disk = Arc::new(FaultyDisk::new(1 << 20));
    let device = Arc::clone(&disk) as Arc<dyn BlockDevice>;
    let server = Server::bind(ServerConfig::new(&socket), device, Arc::new(NoVmControl)).unwrap();
    // Only dropped if all goes well: a server that waits for ever must not keep this test from failing.
    let server = ManuallyDrop::new(server);
    let mut guest = Guest::start(&socket, Options::default());
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    std::thread::sleep(Duration::from_millis(100)); // it sleeps by then, in the poll that will fail
    disk.faults.poll.store(true, Ordering::Relaxed);
    let frontend = guest.connection.take().unwrap();
    let stopping = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    eventually("the stop is answered", || stopping.is_finished());
    assert_eq!(stopping.join().unwrap(), 1);
    drop(ManuallyDrop::into_inner(server));
}

#[test]
fn without_protocol_features_a_ring_starts_with_its_kick() {
    let fixture = Fixture::new(1 << 20, None);
    let options = Options { without: F_PROTOCOL_FEATURES | F_LOG_ALL, ..Options::default() };
    let mut guest = Guest::start(&fixture.socket(), options);
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
}

#[test]
fn the_guest_hears_of_a_new_size() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(crate::DEADLINE)).unwrap();
    guest.frontend().set_backend_request_fd(&theirs).unwrap();
    // The first is for what may have changed while the front end was away.
    for capacity in [1u64 << 20, 2 << 20, 4 << 20] {
        if capacity > 1 << 20 {
            fixture.disk.resize(capacity);
        }
        let mut message = [0; 12];
        ours.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "CONFIG_CHANGE_MSG");
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = guest.frontend().get_config(0, 8, flags, &[0; 8]).unwrap();
        assert_eq!(config, (capacity / 512).to_le_bytes());
        assert_eq!(guest.request(IN, capacity / 512 - 1, &[], 512).0, OK);
    }
}

/// A front end does not listen while its rings stand still. What it was told before they stopped it may not have come to
/// read.
#[test]
fn the_guest_hears_of_a_new_size_that_came_while_its_rings_stood_still() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(crate::DEADLINE)).unwrap();
    guest.frontend().set_backend_request_fd(&theirs).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();

    guest.frontend().get_vring_base(0).unwrap();
    fixture.disk.resize(2 << 20);
    ours.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(ours.read(&mut message).ok(), None, "told while nobody listens");
    guest.start_rings(None);
    ours.set_read_timeout(Some(crate::DEADLINE)).unwrap();
    ours.read_exact(&mut message).unwrap();
    assert_eq!(guest.request(IN, (2 << 20) / 512 - 1, &[], 512).0, OK);

    fixture.disk.resize(4 << 20);
    ours.read_exact(&mut message).unwrap();
    guest.frontend().get_vring_base(0).unwrap();
    guest.start_rings(None);
    ours.read_exact(&mut message).unwrap();

    // Nothing has changed since.
    guest.frontend().get_vring_base(0).unwrap();
    guest.start_rings(None);
    ours.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(ours.read(&mut message).ok(), None, "told of what is known");
}

/// A MiB of more memory at this guest address.
fn more_memory(file: &File, guest_phys_addr: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr,
        memory_size: 1 << 20,
        userspace_addr: guest_phys_addr << 1,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn memory_file() -> File {
    let file = File::from(memfd_create("more", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    file
}

/// Has the first block read into memory at this guest address, and returns the status.
fn read_into(guest: &mut Guest, addr: u64) -> u8 {
    let (head, status) = (guest.data(0, 2), guest.status_addr(0, 2));
    guest.memory.write(head, &header(IN, 0));
    guest.rings[0].descriptor(0, head, 16, NEXT, 1);
    guest.rings[0].descriptor(1, addr, 4096, NEXT | WRITE, 2);
    guest.rings[0].descriptor(2, status, 1, WRITE, 0);
    guest.rings[0].put(0);
    guest.rings[0].submit(1);
    guest.rings[0].wait();
    guest.status(0, 2)
}

#[test]
fn memory_can_be_plugged_and_unplugged_while_a_ring_runs() {
    let fixture = Fixture::new(1 << 20, Some(slow(4)));
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.frontend().get_max_mem_slots().unwrap(), 509);
    assert_eq!(guest.request(OUT, 0, &[5; 4096], 0).0, OK);
    let file = memory_file();
    let region = more_memory(&file, 1 << 40);
    assert_eq!(read_into(&mut guest, 1 << 40), IOERR);
    guest.frontend().add_mem_region(&region).unwrap();
    assert_eq!(read_into(&mut guest, 1 << 40), OK);
    let mut bytes = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 4096]);
    guest.frontend().remove_mem_region(&region).unwrap();
    eventually("the end of that memory", || read_into(&mut guest, 1 << 40) == IOERR);

    // The same by a whole new table, with requests in flight.
    for _ in 0..20 {
        put_writes(&mut guest, 0, 16);
        let regions = [guest.memory.region(), region];
        guest.frontend().set_mem_table(&regions).unwrap();
        guest.frontend().set_mem_table(&regions[..1]).unwrap();
        let target = guest.rings[0].added;
        while guest.rings[0].seen != target {
            guest.rings[0].wait();
        }
    }
}

/// The rings still go on with what was unplugged, because it may be given again.
#[test]
fn memory_that_is_plugged_just_after_other_was_unplugged_can_be_used_at_once() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let (file, other_file) = (memory_file(), memory_file());
    let (old, new) = (more_memory(&file, 1 << 40), more_memory(&other_file, 1 << 42));
    guest.frontend().add_mem_region(&old).unwrap();
    guest.frontend().remove_mem_region(&old).unwrap();
    guest.frontend().add_mem_region(&new).unwrap();
    assert_eq!(read_into(&mut guest, 1 << 42), OK);
    eventually("the end of what was unplugged", || read_into(&mut guest, 1 << 40) == IOERR);
    assert_eq!(read_into(&mut guest, 1 << 42), OK);
    assert_eq!(guest.request(OUT, 0, &[7; 512], 0).0, OK);
}

/// As QEMU does it when the guest moves what lies next to its memory.
#[test]
fn memory_of_a_running_ring_can_be_taken_back_and_given_again() {
    let fixture = Fixture::new(1 << 20, Some(slow(6)));
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let region = guest.memory.region();
    for _ in 0..20 {
        put_writes(&mut guest, 0, 8);
        guest.frontend().remove_mem_region(&region).unwrap();
        // Its processors run on meanwhile.
        for slot in 8..16 {
            guest.put(0, slot, OUT, u64::from(slot) * 8, &[slot as u8 + 1; 4096], 0);
        }
        guest.rings[0].submit(8);
        guest.frontend().add_mem_region(&region).unwrap();
        let target = guest.rings[0].added;
        while guest.rings[0].seen != target {
            guest.rings[0].wait();
        }
    }
    // A busy host keeps the front end from going on.
    guest.frontend().remove_mem_region(&region).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    guest.frontend().add_mem_region(&region).unwrap();
    assert_eq!(guest.request(OUT, 0, &[6; 512], 0).0, OK);
    // In two pieces, that without the ring first.
    let half = region.memory_size / 2;
    let (mut low, mut high) = (region, region);
    low.memory_size = half;
    (high.memory_size, high.guest_phys_addr) = (half, region.guest_phys_addr + half);
    (high.userspace_addr, high.mmap_offset) = (region.userspace_addr + half, region.mmap_offset + half);
    for _ in 0..20 {
        put_writes(&mut guest, 0, 16);
        guest.frontend().remove_mem_region(&region).unwrap();
        guest.frontend().add_mem_region(&high).unwrap();
        guest.frontend().add_mem_region(&low).unwrap();
        let target = guest.rings[0].added;
        while guest.rings[0].seen != target {
            guest.rings[0].wait();
        }
        guest.frontend().remove_mem_region(&low).unwrap();
        guest.frontend().remove_mem_region(&high).unwrap();
        guest.frontend().add_mem_region(&region).unwrap();
    }
    assert_eq!(guest.request(OUT, 0, &[7; 512], 0).0, OK);
    assert_eq!(fixture.server.stats().queues[0].errors, 0);
}

#[test]
fn a_reset_device_can_be_set_up_again() {
    let fixture = Fixture::new(1 << 20, Some(slow(5)));
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 2, ..Options::default() });
    guest.frontend().set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
    put_writes(&mut guest, 1, 8);
    guest.frontend().reset_device().unwrap();
    let (_, config) = guest.frontend().get_config(32, 1, VhostUserConfigFlags::empty(), &[0]).unwrap();
    assert_eq!(config, [0], "the front end shows the guest what was set, so it holds");
    let answered = (0..8).filter(|&slot| guest.status(1, slot) != 255).count();
    assert_eq!(guest.rings[1].used_index(), answered as u16, "everything that was taken is reported");
    guest.rings.iter_mut().for_each(Ring::reset);
    guest.start_rings(Some(&[0, 0]));
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
    put_writes(&mut guest, 1, 8);
    while guest.rings[1].seen != 8 {
        guest.rings[1].wait();
    }
    assert!((0..8).all(|slot| guest.status(1, slot) == OK));
}

#[test]
fn a_second_client_is_turned_away_and_a_later_one_served() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let mut second = UnixStream::connect(fixture.socket()).unwrap();
    second.set_read_timeout(Some(crate::DEADLINE)).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0, "the connection is closed");
    eventually("the count", || fixture.server.stats().refused == 1);
    assert_eq!(guest.request(OUT, 8, &[7; 512], 0).0, OK);
    drop(guest);
    let mut later = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(later.request(IN, 8, &[], 512), (OK, vec![7; 512]));
    assert_eq!(fixture.server.stats().refused, 1);
}

const NO_DESCRIPTORS: &str = "VHOST_BLK_TEST_NO_DESCRIPTORS";

/// Takes all descriptors that the process can have.
fn all_descriptors() -> Vec<File> {
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

/// The other half of the test below, in which no descriptor is left.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn the_process_without_descriptors() {
    if std::env::var_os(NO_DESCRIPTORS).is_none() {
        return;
    }
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let fixture = Fixture::new(1 << 20, None);
    let address = SocketAddrUnix::new(fixture.socket()).unwrap();
    let client = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let (first, second) = (client(), client());
    let limit = Rlimit { current: Some(128), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();
    let taken = all_descriptors();
    connect(&first, &address).unwrap();
    std::thread::sleep(Duration::from_millis(1500)); // the server tries every 100 ms
    drop((taken, first));

    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    let taken = all_descriptors();
    connect(&second, &address).unwrap();
    let processor_ms = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec * 1000 + time.tv_nsec / 1_000_000
    };
    let before = processor_ms();
    std::thread::sleep(Duration::from_secs(1));
    assert!(processor_ms() - before < 200, "the server looks for the client all the time");
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    drop(taken);
    let mut second = UnixStream::from(second);
    second.set_read_timeout(Some(crate::DEADLINE)).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0, "turned away once there are descriptors");
}

#[test]
fn a_client_for_whom_there_is_no_descriptor_fills_no_log_and_costs_no_processor() {
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "lifecycle::the_process_without_descriptors"])
        .env(NO_DESCRIPTORS, "1")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{}{log}", String::from_utf8_lossy(&run.stdout));
    let complaints = log.matches("a client cannot be accepted").count();
    assert!((1..=5).contains(&complaints), "{log}");
}

#[test]
fn a_clean_stop_reports_what_is_in_flight_and_removes_the_socket() {
    for inflight in [false, true] {
        let mut fixture = Fixture::new(1 << 20, Some(slow(6)));
        let mut guest = Guest::start(&fixture.socket(), Options { inflight, ..Options::default() });
        for round in 1..=5 {
            put_writes(&mut guest, 0, 16);
            while guest.rings[0].seen != round * 16 {
                guest.rings[0].wait();
            }
        }
        put_writes(&mut guest, 0, 16);
        eventually("something to report", || {
            fixture.server.stats().queues[0].in_flight > 0 || guest.rings[0].used_index() > 80
        });
        fixture.server.shutdown();
        assert!(!fixture.socket().exists());
        assert!(guest.frontend().get_features().is_err(), "the connection is closed");
        // What was taken was done and reported, what was not stays in the ring.
        let done = guest.rings[0].reap();
        assert!(!done.is_empty());
        for (head, _) in &done {
            let content = fixture.disk.content(ByteRange::new(u64::from(head / 4) * 4096, 4096)).unwrap();
            assert_eq!((content, guest.status(0, head / 4)), (vec![(head / 4) as u8 + 1; 4096], OK));
        }

        let config = ServerConfig { queues: 4, ..ServerConfig::new(fixture.socket()) };
        let disk = Arc::clone(&fixture.disk) as Arc<dyn BlockDevice>;
        let next = Server::bind(config, disk, Arc::new(NoVmControl)).unwrap();
        guest.connect(&fixture.socket());
        guest.start_rings(None);
        while guest.rings[0].seen != 96 {
            guest.rings[0].wait();
        }
        assert_eq!(next.stats().queues[0].resubmitted, 0, "nothing was left to the next server");
    }
}

#[test]
fn a_client_in_the_middle_of_a_message_does_not_keep_the_server_from_stopping() {
    use std::io::Write;
    let mut fixture = Fixture::new(1 << 20, None);
    let mut stream = UnixStream::connect(fixture.socket()).unwrap();
    stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    eventually("the connection", || fixture.server.stats().connected);
    fixture.server.shutdown();
}

#[test]
fn an_idle_guest_costs_no_wake_ups() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 4, ..Options::default() });
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    let sleeps = || fixture.server.stats().queues.iter().map(|queue| queue.sleeps).sum::<u64>();
    // One that is on its way to sleep may be kept from the processor for long; who wakes again and again never stands still.
    eventually("a while without any wake-up", || {
        let before = sleeps();
        std::thread::sleep(Duration::from_millis(200));
        sleeps() == before
    });
}

#[test]
fn two_servers_cannot_share_a_socket() {
    let fixture = Fixture::new(1 << 20, None);
    let disk = Arc::clone(&fixture.disk) as Arc<dyn BlockDevice>;
    let second = Server::bind(ServerConfig::new(fixture.socket()), disk, Arc::new(NoVmControl));
    assert_eq!(second.err().unwrap().kind(), ErrorKind::InUse);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}
