//! What QEMU's background snapshot does, in small: protects the front end's mapping of guest memory against writes,
//! saves each page before it lets a write through, and the rest at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::guest::{BASE, MEMORY_LEN, Memory};

// <linux/userfaultfd.h>; the libc crate has none of it.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const FEATURES: u64 = 1 | 1 << 12; // write protection, of shared memory too
const MODE_WP: u64 = 2;
const PAGE: u64 = 4096;

/// A running snapshot of all guest memory.
pub(crate) struct Saver {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    uffd: OwnedFd,
    memory: Arc<Memory>,
    /// By guest address.
    saved: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Pages whose faults are not answered for now, by guest address.
    held: Mutex<BTreeSet<u64>>,
    /// Faults that are not answered yet.
    waiting: AtomicUsize,
    delay: Duration,
    ended: AtomicBool,
    /// All of memory as it was when the protection began.
    before: Vec<u8>,
}

impl Saver {
    /// Protects all memory; each write to a page waits until the page is saved, and `delay` longer.
    pub(crate) fn start(memory: &Arc<Memory>, delay: Duration) -> Self {
        // SAFETY: the call takes flags and returns a new descriptor, which nobody else owns.
        let uffd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            let hint =
                "userfaultfd is needed: run as root, or set /proc/sys/vm/unprivileged_userfaultfd to 1";
            assert!(fd >= 0, "{hint}: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        ioctl(&uffd, UFFDIO_API, &mut [UFFD_API, FEATURES, 0])
            .expect("write protection of shared memory, Linux 5.19");
        let (start, len) = (memory.mapped(BASE), MEMORY_LEN);
        ioctl(&uffd, UFFDIO_REGISTER, &mut [start, len, MODE_WP, 0]).unwrap();
        let before = contents(memory, BASE, MEMORY_LEN);
        ioctl(&uffd, UFFDIO_WRITEPROTECT, &mut [start, len, 1]).unwrap();
        let shared = Arc::new(Shared {
            uffd,
            memory: Arc::clone(memory),
            saved: Mutex::default(),
            held: Mutex::default(),
            waiting: AtomicUsize::new(0),
            delay,
            ended: AtomicBool::new(false),
            before,
        });
        let saving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || saving.run());
        Self { shared, thread: Some(thread) }
    }

    /// Does not answer faults of the page with this guest address, until released.
    pub(crate) fn hold(&self, addr: u64) {
        self.shared.held.lock().unwrap().insert(addr / PAGE * PAGE);
    }

    pub(crate) fn release(&self) {
        self.shared.held.lock().unwrap().clear();
    }

    /// How many faults wait to be answered: each is of somebody who stands still in the kernel.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Acquire)
    }

    /// Whether the page was saved because somebody wanted to write to it.
    pub(crate) fn has_saved(&self, addr: u64) -> bool {
        self.shared.saved.lock().unwrap().contains_key(&(addr / PAGE * PAGE))
    }

    /// A handle that lifts the protection from all memory, as QEMU does when its snapshot fails.
    pub(crate) fn canceller(&self) -> impl FnOnce() + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.unprotect_all()
    }

    /// Lifts the protection, and says which pages of the image, by guest address, are not as they were at its begin.
    pub(crate) fn finish(mut self) -> Vec<u64> {
        // What nobody has written to is saved at the end, as it is then.
        let mut image = contents(&self.shared.memory, BASE, MEMORY_LEN);
        self.end();
        for (addr, page) in &*self.shared.saved.lock().unwrap() {
            image[(addr - BASE) as usize..][..PAGE as usize].copy_from_slice(page);
        }
        let pages = image.chunks(PAGE as usize).zip(self.shared.before.chunks(PAGE as usize));
        let differ = (0..).zip(pages).filter(|(_, (image, before))| image != before);
        differ.map(|(page, _)| BASE + page * PAGE).collect()
    }

    fn end(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.shared.unprotect_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn run(&self) {
        let mut waiting = Vec::new();
        while !self.ended.load(Ordering::Acquire) {
            waiting.extend(self.faults());
            let held = self.held.lock().unwrap().clone();
            waiting.retain(|&addr| held.contains(&addr) || !self.save(addr));
            self.waiting.store(waiting.len(), Ordering::Release);
        }
    }

    /// The guest addresses of pages that somebody waits to write to.
    fn faults(&self) -> Vec<u64> {
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
        let mut faults = Vec::new();
        let mut message = [0; 32];
        while rustix::io::read(&self.uffd, &mut message) == Ok(32) {
            assert_eq!(message[0], 0x12, "a page fault");
            let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
            faults.push(address / PAGE * PAGE - self.memory.mapped(BASE) + BASE);
        }
        faults
    }

    fn save(&self, addr: u64) -> bool {
        std::thread::sleep(self.delay);
        let page = contents(&self.memory, addr, PAGE);
        self.saved.lock().unwrap().entry(addr).or_insert(page);
        let start = self.memory.mapped(addr);
        let done = ioctl(&self.uffd, UFFDIO_WRITEPROTECT, &mut [start, PAGE, 0]);
        done.is_ok() || self.ended.load(Ordering::Acquire)
    }

    fn unprotect_all(&self) {
        let (start, len) = (self.memory.mapped(BASE), MEMORY_LEN);
        // Wakes whoever waits. The second time there is nothing left to do.
        let _ = ioctl(&self.uffd, UFFDIO_WRITEPROTECT, &mut [start, len, 0]);
        let _ = ioctl(&self.uffd, UFFDIO_UNREGISTER, &mut [start, len]);
    }
}

/// Reads guest memory from its file: no mapping is involved.
fn contents(memory: &Memory, addr: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory.file.read_exact_at(&mut bytes, addr - BASE).unwrap();
    bytes
}

fn ioctl<const N: usize>(uffd: &OwnedFd, request: u64, argument: &mut [u64; N]) -> io::Result<()> {
    // SAFETY: each request's structure is as many u64 as its callers pass.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), request, argument.as_mut_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
