//! How a window of the guard ends, and what happens when something else ends first: its owner, the front end, the
//! device, the server.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cdp_types::RingStop;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_blk::{ErrorKind, GuardTrouble, Server, ServerConfig};
use vmm_sys_util::eventfd::EventFd;

use crate::eventually;
use crate::faulty::FaultyDisk;
use crate::guard::*;
use crate::guest::*;
use crate::saver::Saver;

/// More than there are helpers, so that some requests wait for one.
const MANY: u16 = 6;
const HELPERS: u64 = 4;

/// A window with many reads of four pages each, of which the first ones are not saved.
fn hold_many(bed: &Bed, guest: &mut Guest) -> (Saver, std::sync::mpsc::Receiver<GuardTrouble>) {
    (0..MANY).for_each(|slot| guest.put(0, slot, IN, 0, &[], 0x4000));
    let (saver, bases, troubles) = bed.cut(guest, Duration::ZERO);
    (0..MANY).for_each(|slot| saver.hold(guest.data(0, slot)));
    guest.start_rings(Some(&bases));
    guest.rings[0].submit(MANY);
    eventually("all requests wait", || bed.guard.stats().waiting == u64::from(MANY));
    eventually("the helpers are in the kernel", || saver.waiting() == HELPERS as usize);
    (saver, troubles)
}

#[test]
fn a_window_closes_with_its_owner_even_if_that_panics() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let (saver, troubles) = hold_many(&bed, &mut guest);
    let window = bed.cutter.window.lock().unwrap().take().unwrap();
    let owner = std::thread::spawn(move || {
        let _window = window;
        panic!("the checkpoint's owner dies: this is part of the test");
    });
    assert!(owner.join().is_err());
    assert!(!bed.guard.is_open());
    let mut done = Vec::new();
    while done.len() < usize::from(MANY) - HELPERS as usize {
        done.extend(guest.rings[0].wait());
    }
    eventually("only what is in the kernel waits", || bed.guard.stats().waiting == HELPERS);
    assert!(troubles.recv().is_err(), "the listener has gone with the window");
    saver.canceller()();
    while done.len() < usize::from(MANY) {
        done.extend(guest.rings[0].wait());
    }
    assert!((0..MANY).all(|slot| guest.status(0, slot) == OK));

    // The next window has nothing to do with it.
    let _troubles = bed.arm();
    stop(&mut guest);
    assert!(bed.guard.is_open());
    drop(bed.cutter.window.lock().unwrap().take());
    assert_eq!((bed.guard.is_open(), bed.guard.stats().windows), (false, 2));
}

#[test]
fn nothing_is_touched_any_more_for_a_front_end_that_has_gone() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let (saver, _troubles) = hold_many(&bed, &mut guest);
    let touches = bed.guard.stats().touches;
    guest.connection = None;
    eventually("the end of the connection", || !bed.server.stats().connected);
    assert_eq!((bed.guard.stats().waiting, bed.server.stats().queues[0].in_flight), (HELPERS, 0));
    saver.release();
    eventually("the helpers are back", || bed.guard.stats().waiting == 0);
    assert_eq!(bed.guard.stats().touches, touches + HELPERS, "those that were in the kernel");
    for slot in 0..MANY {
        assert!(!saver.has_saved(guest.data(0, slot) + 4096), "the guest may own the page by now");
    }
    assert_eq!(saver.finish(), NONE);
}

#[test]
fn a_request_that_waited_while_the_device_failed_is_answered_and_the_ring_stops() {
    let disk = Arc::new(FaultyDisk::new(1 << 20));
    // Only dropped if all goes well: a server that waits for ever for a drain must not keep this test from failing.
    let bed = ManuallyDrop::new(Bed::of(Arc::clone(&disk) as _, PATIENT));
    let mut guest = bed.guest(Options::default());
    put_read(&mut guest, 0);
    let (saver, bases, _troubles) = bed.cut(&mut guest, Duration::ZERO);
    saver.hold(guest.data(0, 0));
    guest.start_rings(Some(&bases));
    guest.rings[0].submit(1);
    eventually("the request is taken", || bed.server.stats().queues[0].in_flight == 1);
    disk.faults.poll.store(true, Ordering::Relaxed);
    guest.rings[0].kick.write(1).unwrap();
    guest.rings[0].wait_for_error();
    let frontend = guest.connection.take().unwrap();
    let stopping = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    assert!(!stopping.is_finished(), "the ring is drained first");
    saver.release();
    eventually("the stop is answered", || stopping.is_finished());
    assert_eq!(stopping.join().unwrap(), 1);
    assert_eq!((guest.rings[0].used_index(), guest.status(0, 0)), (1, IOERR));
    assert_eq!(saver.finish(), NONE);
    drop(ManuallyDrop::into_inner(bed));
}

#[test]
fn a_drain_that_is_given_up_is_no_cut_and_is_not_answered() {
    for disable in [false, true] {
        let mut bed = Bed::new(PATIENT);
        let mut guest = bed.guest(Options { inflight: true, ..Options::default() });
        put_read(&mut guest, 0);
        let (saver, bases, troubles) = bed.cut(&mut guest, Duration::ZERO);
        saver.hold(guest.data(0, 0));
        guest.start_rings(Some(&bases));
        guest.rings[0].submit(1);
        eventually("the request is taken", || bed.server.stats().queues[0].in_flight == 1);
        let mut frontend = guest.connection.take().unwrap();
        std::thread::scope(|scope| {
            let asking = scope.spawn(move || match disable {
                true => frontend.set_vring_enable(0, false),
                false => frontend.get_vring_base(0).map(drop),
            });
            std::thread::sleep(Duration::from_millis(100));
            bed.server.shutdown();
            assert!(asking.join().unwrap().is_err(), "there is no position from which all would be done");
        });
        assert_eq!(troubles.try_recv(), Ok(GuardTrouble::Stopping));
        assert_eq!(*bed.cutter.stops.lock().unwrap(), [RingStop::Asked], "only the stop before the window");
        assert_eq!((guest.rings[0].used_index(), guest.status(0, 0)), (0, 255));
        saver.finish();

        let next = Bed::new(PATIENT);
        guest.connect(&next.socket());
        guest.start_rings(None);
        guest.rings[0].wait();
        assert_eq!((guest.status(0, 0), next.server.stats().queues[0].resubmitted), (OK, 1));
    }
}

#[test]
fn a_ring_that_cannot_go_on_with_a_change_is_stopped_like_any_other() {
    let disk = Arc::new(FaultyDisk::new(1 << 20));
    let bed = Bed::of(Arc::clone(&disk) as _, PATIENT);
    let mut guest = bed.guest(Options::default());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    disk.faults.watch.store(true, Ordering::Relaxed);
    let kick = EventFd::new(0).unwrap();
    guest.frontend().set_vring_kick(0, &kick).unwrap();
    guest.rings[0].wait_for_error();
    assert_eq!(bed.guard.open(|_| {}).err(), Some(vhost_blk::GuardRefusal::RingsRunning));
    let _troubles = bed.arm();
    assert_eq!(stop(&mut guest), [1]);
    assert_eq!(*bed.cutter.stops.lock().unwrap(), [RingStop::Asked]);
    assert!(bed.guard.is_open(), "no ring is thought to run");
    drop(bed.cutter.window.lock().unwrap().take());

    put_read(&mut guest, 1);
    guest.rings[0].submit(1);
    kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.rings[0].used_index(), 1, "nothing is served after the stop was answered");
    disk.faults.watch.store(false, Ordering::Relaxed);
    guest.start_rings(Some(&[1]));
    guest.rings[0].wait();
    assert_eq!(guest.status(0, 1), OK);
}

#[test]
fn a_region_that_no_process_could_map_is_refused_and_costs_nothing() {
    use std::os::fd::AsRawFd;
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let sparse =
        std::fs::File::from(rustix::fs::memfd_create("enormous", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    sparse.set_len(1 << 62).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 62,
        memory_size: 1 << 62,
        userspace_addr: 1 << 62,
        mmap_offset: 0,
        mmap_handle: sparse.as_raw_fd(),
    };
    assert!(guest.frontend().add_mem_region(&region).is_err());
    assert!(guest.frontend().set_mem_table(&[region]).is_err());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

#[test]
fn a_guard_that_would_never_wait_is_refused() {
    let bed = Bed::new(PATIENT);
    let disk = Arc::new(FaultyDisk::new(1 << 20));
    let config = ServerConfig {
        guard_deadline: Duration::ZERO,
        ..ServerConfig::new(bed.directory.path().join("other.sock"))
    };
    let refused = Server::bind(config, disk, Arc::new(cdp_types::NoVmControl));
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::Config);
}
