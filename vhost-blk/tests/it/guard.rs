//! The guest-memory guard: what a snapshot by write protection saves is the memory of one instant.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use cdp_types::{BlockDevice, MemoryConfig, MemoryDevice, RingStop, VmControl};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_blk::{Guard, GuardRefusal, GuardTrouble, Server, ServerConfig, Window};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use crate::guest::*;
use crate::saver::Saver;
use crate::{DEADLINE, eventually, slow};

/// How long the guards of these tests wait for progress, unless a test is about that.
pub(crate) const PATIENT: Duration = Duration::from_secs(20);

/// No page of the image is of a later instant.
pub(crate) const NONE: [u64; 0] = [];

type OnTrouble = Box<dyn FnOnce(GuardTrouble) + Send>;

/// Opens the guard's window when the last ring has stopped, as the cut of an epoch does.
#[derive(Default)]
pub(crate) struct Cutter {
    guard: OnceLock<Arc<Guard>>,
    /// Called with the trouble of the next window.
    armed: Mutex<Option<OnTrouble>>,
    pub(crate) window: Mutex<Option<Window>>,
    /// Of all rings, in this order.
    pub(crate) stops: Mutex<Vec<RingStop>>,
}

impl VmControl for Cutter {
    fn ring_started(&self, _socket: &Path, _ring: u16) {}
    fn ring_stopped(&self, _socket: &Path, _ring: u16, why: RingStop, last: bool) {
        self.stops.lock().unwrap().push(why);
        if let Some(on_trouble) = self.armed.lock().unwrap().take_if(|_| last && why == RingStop::Asked) {
            let window = self.guard.get().unwrap().open(on_trouble).unwrap();
            *self.window.lock().unwrap() = Some(window);
        }
    }
    fn memory_changed(&self, _socket: &Path) {}
    fn disconnected(&self, _socket: &Path) {}
}

pub(crate) struct Bed {
    pub(crate) server: Server,
    pub(crate) guard: Arc<Guard>,
    pub(crate) cutter: Arc<Cutter>,
    pub(crate) directory: TempDir,
}

impl Bed {
    pub(crate) fn new(deadline: Duration) -> Self {
        let config = MemoryConfig { faults: Some(slow(11)), ..MemoryConfig::new(1 << 20) };
        Self::of(Arc::new(MemoryDevice::new(config).unwrap()), deadline)
    }

    pub(crate) fn of(disk: Arc<dyn BlockDevice>, deadline: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cutter = Arc::new(Cutter::default());
        let config = ServerConfig {
            queues: 4,
            guard_deadline: deadline,
            ..ServerConfig::new(directory.path().join("disk.sock"))
        };
        let server = Server::bind(config, disk, Arc::clone(&cutter) as _).unwrap();
        let guard = server.guard();
        assert!(cutter.guard.set(Arc::clone(&guard)).is_ok());
        Self { server, guard, cutter, directory }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("disk.sock")
    }

    pub(crate) fn guest(&self, options: Options) -> Guest {
        Guest::start(&self.socket(), options)
    }

    fn close(&self) {
        self.cutter.window.lock().unwrap().take().unwrap().close();
        assert!(!self.guard.is_open());
    }

    pub(crate) fn arm(&self) -> Receiver<GuardTrouble> {
        let (told, troubles) = channel();
        *self.cutter.armed.lock().unwrap() = Some(Box::new(move |trouble| drop(told.send(trouble))));
        troubles
    }

    /// Stops all rings, opens a window and protects the memory; the rings are still stopped.
    pub(crate) fn cut(
        &self,
        guest: &mut Guest,
        delay: Duration,
    ) -> (Saver, Vec<u16>, Receiver<GuardTrouble>) {
        let troubles = self.arm();
        let bases = stop(guest);
        assert!(self.guard.is_open());
        (Saver::start(&guest.memory, delay), bases, troubles)
    }
}

pub(crate) fn stop(guest: &mut Guest) -> Vec<u16> {
    let rings = 0..guest.options.rings;
    rings.map(|ring| guest.connection.as_mut().unwrap().get_vring_base(ring).unwrap() as u16).collect()
}

fn wait_for_all(guest: &mut Guest) {
    for ring in 0..guest.options.rings {
        while guest.rings[ring].seen != guest.rings[ring].added {
            guest.rings[ring].wait();
        }
    }
}

/// Puts a read of 4 KiB into a slot while its page is not protected yet; the guest shows it later.
pub(crate) fn put_read(guest: &mut Guest, slot: u16) {
    guest.put(0, slot, IN, 0, &[], 4096);
}

/// The load of one window: some requests whose memory the guest has prepared before the cut, so that the device is the
/// first to write there; then many more.
fn load(bed: &Bed, guest: &mut Guest, random: &mut SmallRng, mut meanwhile: impl FnMut(&mut Guest, u16)) {
    let request = |guest: &mut Guest, ring, slot, kind: u32| match kind {
        0 => guest.put(ring, slot, IN, u64::from(slot) * 8, &[], 0x4000),
        1 => guest.put(ring, slot, OUT, u64::from(slot) * 8, &[7; 4096], 0),
        2 => guest.put(ring, slot, GET_ID, 0, &[], 20),
        _ => guest.put(ring, slot, FLUSH, 0, &[], 0),
    };
    let rings = guest.options.rings;
    for ring in 0..rings {
        (0..8).for_each(|slot| request(guest, ring, slot, u32::from(slot) % 4));
    }
    let (saver, bases, troubles) = bed.cut(guest, Duration::from_micros(random.random_range(0..300)));
    guest.start_rings(Some(&bases));
    (0..rings).for_each(|ring| guest.rings[ring].submit(8));
    for round in 0..10 {
        meanwhile(guest, round);
        wait_for_all(guest);
        for ring in 0..rings {
            for slot in 0..8 {
                assert_eq!(guest.status(ring, slot), OK);
                request(guest, ring, slot, random.random_range(0..4));
            }
            guest.rings[ring].submit(8);
        }
    }
    wait_for_all(guest);
    for ring in 0..rings {
        assert!(
            saver.has_saved(guest.data(ring, 0)) && saver.has_saved(guest.data(ring, 2)),
            "data, and the ID"
        );
        assert!(saver.has_saved(guest.status_addr(ring, 3)) && saver.has_saved(guest.rings[ring].used()));
    }
    // What guest and device have written since the cut is not in the image, whoever wrote it.
    assert_eq!(saver.finish(), NONE, "pages of a later instant are in the image");
    assert!(bed.guard.is_open() && troubles.try_recv().is_err());
    bed.close();
}

#[test]
fn every_page_that_the_device_writes_in_a_window_was_saved_before() {
    for without in [0, F_EVENT_IDX, F_INDIRECT] {
        let bed = Bed::new(PATIENT);
        let mut guest = bed.guest(Options { without: without | F_LOG_ALL, rings: 2, ..Options::default() });
        let target = bed.guard.prepare().unwrap();
        assert_eq!((target.pid, target.bytes), (std::process::id() as i32, MEMORY_LEN));
        let mut random = SmallRng::seed_from_u64(without);
        for window in 1..=3 {
            load(&bed, &mut guest, &mut random, |_, _| {});
            let stats = bed.guard.stats();
            assert_eq!((stats.open, stats.windows, stats.waiting), (false, window, 0));
            assert!(
                stats.touches > 10 * window && stats.slow_touches > 0 && stats.longest_wait_us > 0,
                "{stats:?}"
            );
        }
        assert_eq!(guest.request(IN, 0, &[], 512).0, OK, "after all windows");
    }
}

#[test]
fn the_image_is_sound_though_the_memory_is_shared_anew_in_the_window() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options { rings: 2, ..Options::default() });
    let mut random = SmallRng::seed_from_u64(12);
    for _ in 0..3 {
        load(&bed, &mut guest, &mut random, |guest, _| {
            let region = guest.memory.region();
            guest.frontend().set_mem_table(&[region]).unwrap();
        });
    }
}

#[test]
fn the_image_is_sound_though_rings_stop_and_start_in_the_window() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options { rings: 2, ..Options::default() });
    let mut random = SmallRng::seed_from_u64(13);
    load(&bed, &mut guest, &mut random, |guest, _| {
        let bases = stop(guest);
        for (ring, &base) in bases.iter().enumerate() {
            assert_eq!(guest.rings[ring].used_index(), base, "everything that was taken is reported");
        }
        guest.start_rings(Some(&bases));
    });
}

#[test]
fn a_page_that_is_slow_to_be_saved_delays_only_the_request_that_needs_it() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    (0..8).for_each(|slot| put_read(&mut guest, slot));
    let (saver, bases, _troubles) = bed.cut(&mut guest, Duration::ZERO);
    saver.hold(guest.data(0, 3));
    guest.start_rings(Some(&bases));
    guest.rings[0].submit(8);
    let mut done = Vec::new();
    while done.len() < 7 {
        done.extend(guest.rings[0].wait());
    }
    assert!(!done.contains(&(12, 4097)));
    assert_eq!((bed.guard.stats().waiting, bed.server.stats().queues[0].in_flight), (1, 1));
    put_read(&mut guest, 0);
    guest.rings[0].submit(1);
    assert_eq!(guest.rings[0].wait(), [(0, 4097)], "the ring goes on");
    saver.release();
    assert_eq!(guest.rings[0].wait(), [(12, 4097)]);
    assert_eq!(saver.finish(), NONE);
    bed.close();
}

#[test]
fn a_ring_that_starts_in_a_window_waits_for_its_pages_and_only_its_stop_waits_for_the_ring() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    put_read(&mut guest, 0);
    let (saver, bases, _troubles) = bed.cut(&mut guest, Duration::ZERO);
    saver.hold(guest.rings[0].used());
    guest.start_rings(Some(&bases)); // answered, though the ring's page is not saved
    guest.rings[0].submit(1);
    guest.rings[0].kick.write(1).unwrap();
    for _ in 0..5 {
        let region = guest.memory.region();
        guest.frontend().set_mem_table(&[region]).unwrap();
    }
    assert_eq!(bed.guard.stats().waiting, 1, "the ring's pages are touched once at a time");
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| stop(&mut guest));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!stopping.is_finished(), "a touch that comes late would be in the guest's memory");
        saver.release();
        assert_eq!(stopping.join().unwrap(), [0], "nothing was taken");
    });
    assert_eq!((guest.rings[0].used_index(), guest.status(0, 0)), (0, 255));
    guest.start_rings(Some(&bases));
    guest.rings[0].wait();
    assert_eq!((guest.status(0, 0), saver.finish()), (OK, vec![]));
    bed.close();
}

#[test]
fn a_stop_in_the_window_waits_for_the_saver_and_if_that_hangs_for_the_end_of_the_snapshot() {
    for hangs in [false, true] {
        let bed = Bed::new(if hangs { Duration::from_millis(300) } else { PATIENT });
        let mut guest = bed.guest(Options::default());
        put_read(&mut guest, 0);
        let (saver, bases, troubles) = bed.cut(&mut guest, Duration::ZERO);
        saver.hold(guest.data(0, 0));
        guest.start_rings(Some(&bases));
        guest.rings[0].submit(1);
        eventually("the request is taken", || bed.server.stats().queues[0].in_flight == 1);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| stop(&mut guest));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!stopping.is_finished(), "the ring is drained first");
            if hangs {
                let trouble = troubles.recv_timeout(DEADLINE).unwrap();
                assert!(matches!(trouble, GuardTrouble::NoProgress { waited_ms: 300.. }), "{trouble}");
                saver.canceller()();
                bed.close();
            } else {
                saver.release();
            }
            assert_eq!(stopping.join().unwrap(), [1]);
        });
        assert!(begun.elapsed() < Duration::from_secs(15));
        assert_eq!((guest.rings[0].used_index(), guest.status(0, 0)), (1, OK));
        assert_eq!(bed.guard.is_open(), !hangs);
    }
}

#[test]
fn memory_that_is_plugged_in_the_window_is_guarded_and_memory_of_nobody_is_not_written() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let (saver, bases, troubles) = bed.cut(&mut guest, Duration::ZERO);
    guest.start_rings(Some(&bases));
    let file =
        std::fs::File::from(rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let mapping =
        MmapRegion::<()>::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 1 << 20).unwrap();
    let region = |guest_addr, user| VhostUserMemoryRegionInfo {
        guest_phys_addr: guest_addr,
        memory_size: 1 << 20,
        userspace_addr: user,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    guest.frontend().add_mem_region(&region(1 << 40, mapping.as_ptr() as u64)).unwrap();
    guest.frontend().add_mem_region(&region(1 << 41, 1 << 45)).unwrap();
    let (head, status) = (guest.data(0, 2), guest.status_addr(0, 2));
    let read_into = |guest: &mut Guest, addr| {
        guest.memory.write(head, &header(IN, 0));
        guest.memory.write(status, &[255]);
        guest.rings[0].descriptor(0, head, 16, NEXT, 1);
        guest.rings[0].descriptor(1, addr, 4096, NEXT | WRITE, 2);
        guest.rings[0].descriptor(2, status, 1, WRITE, 0);
        guest.rings[0].put(0);
        guest.rings[0].submit(1);
    };
    read_into(&mut guest, 1 << 40);
    guest.rings[0].wait();
    assert_eq!(guest.status(0, 2), OK);
    assert!(troubles.try_recv().is_err());

    read_into(&mut guest, 1 << 41);
    let trouble = troubles.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(trouble, GuardTrouble::Owner(GuardRefusal::NoOwner { .. })), "{trouble}");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.status(0, 2), 255, "nothing is written unguarded");
    assert_eq!(saver.finish(), NONE);
    bed.close();
    guest.rings[0].wait();
    assert_eq!(guest.status(0, 2), OK, "the guest does not lose the request");
}

#[test]
fn a_touch_that_hangs_does_not_keep_the_server_from_stopping() {
    let mut bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options { inflight: true, ..Options::default() });
    put_read(&mut guest, 0);
    let (saver, bases, troubles) = bed.cut(&mut guest, Duration::ZERO);
    saver.hold(guest.data(0, 0));
    guest.start_rings(Some(&bases));
    guest.rings[0].submit(1);
    eventually("the request is taken", || bed.server.stats().queues[0].in_flight == 1);
    let begun = Instant::now();
    bed.server.shutdown();
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert_eq!(troubles.try_recv(), Ok(GuardTrouble::Stopping));
    assert_eq!((guest.rings[0].used_index(), guest.status(0, 0)), (0, 255), "it is left to the next server");
    assert_eq!(bed.server.stats().queues[0].in_flight, 0);
    saver.finish();
    bed.close();

    let next = Bed::new(PATIENT);
    guest.connect(&next.directory.path().join("disk.sock"));
    guest.start_rings(None);
    guest.rings[0].wait();
    assert_eq!((guest.status(0, 0), next.server.stats().queues[0].resubmitted), (OK, 1));
}

#[test]
fn what_cannot_be_guarded_is_refused_in_words() {
    let bed = Bed::new(PATIENT);
    assert_eq!(bed.guard.prepare(), Err(GuardRefusal::NoGuest));
    let mut guest = bed.guest(Options::default());
    assert_eq!(bed.guard.open(|_| {}).err(), Some(GuardRefusal::RingsRunning));
    assert!(!bed.guard.is_open());

    // The front end's mapping is private.
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let (length, protection) = (MEMORY_LEN as usize, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: a new mapping, which stays until the process ends.
    let private = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, flags, guest.memory.file.as_raw_fd(), 0)
    };
    let bases = stop(&mut guest);
    let mut share_at = |address| {
        guest.memory.claim(address);
        let region = guest.memory.region();
        guest.frontend().set_mem_table(&[region]).unwrap();
        bed.guard.prepare().unwrap_err()
    };
    let refusal = share_at(private as u64);
    assert_eq!(refusal, GuardRefusal::Private { pid: std::process::id() as i32 });
    assert!(refusal.to_string().contains("share=on"));
    assert!(matches!(share_at(1 << 45), GuardRefusal::NoOwner { .. }));
    let refusal = GuardRefusal::NoAccess { pid: 5 }.to_string();
    assert!(
        refusal.contains("process 5")
            && refusal.contains("ptrace_scope")
            && refusal.contains("CAP_SYS_PTRACE")
    );

    let mapped = guest.memory.mapped(BASE);
    guest.memory.claim(mapped);
    let region = guest.memory.region();
    guest.frontend().set_mem_table(&[region]).unwrap();
    let window = bed.guard.open(|_| {}).unwrap();
    assert_eq!(bed.guard.open(|_| {}).err(), Some(GuardRefusal::AlreadyOpen));
    assert!(bed.guard.is_open(), "the refusal closes nothing");
    guest.start_rings(Some(&bases));
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    window.close();
    assert!(!bed.guard.is_open());
}
