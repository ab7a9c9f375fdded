//! Whose the guest's memory is, when the one who has connected is another.

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use vhost::VhostBackend;
use vhost_blk::GuardRefusal;
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use crate::guard::*;
use crate::guest::*;

/// The other half of [`OtherOwner`]: maps the memory of the guest, as QEMU does for a manager that has connected.
#[test]
#[ignore = "run by tests, in a process of its own"]
fn the_process_that_maps_the_memory() {
    let Some(path) = std::env::var_os("VHOST_BLK_TEST_MEMORY") else { return };
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mapping = MmapRegion::<()>::from_file(FileOffset::new(file, 0), MEMORY_LEN as usize).unwrap();
    println!("\nmapped at {}", mapping.as_ptr() as u64);
    let _ = std::io::read_to_string(std::io::stdin());
}

/// A process that the guest's memory is said to belong to, though another has connected.
struct OtherOwner(Child);

impl OtherOwner {
    /// The guest's rings are stopped afterwards, at these positions.
    fn start(guest: &mut Guest) -> (Self, Vec<u16>) {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "owners::the_process_that_maps_the_memory"])
            .env(
                "VHOST_BLK_TEST_MEMORY",
                format!("/proc/{}/fd/{}", std::process::id(), guest.memory.file.as_raw_fd()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let address =
            lines.map_while(Result::ok).find_map(|line| line.strip_prefix("mapped at ")?.parse().ok());
        let bases = stop(guest);
        guest.memory.claim(address.unwrap());
        let region = guest.memory.region();
        guest.frontend().set_mem_table(&[region]).unwrap();
        (Self(process), bases)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for OtherOwner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_owner_is_found_though_another_process_has_connected_and_its_death_ends_the_danger() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let (owner, bases) = OtherOwner::start(&mut guest);
    guest.start_rings(Some(&bases));
    let pid = owner.pid();
    assert_eq!(bed.guard.prepare().unwrap().pid, pid);

    let troubles = bed.arm();
    let bases = stop(&mut guest);
    guest.start_rings(Some(&bases));
    assert_eq!(guest.request(IN, 0, &[], 4096).0, OK);
    let touched = bed.guard.stats().touches;
    assert!(touched >= 3, "ring, status and data: {touched}");
    drop(owner);
    guest.put(0, 5, IN, 0, &[], 4096);
    guest.rings[0].submit(1);
    guest.rings[0].wait();
    assert_eq!(guest.status(0, 5), OK, "there is no image any more that could be damaged");
    assert_eq!(troubles.try_recv().ok(), None);
    drop(bed.cutter.window.lock().unwrap().take());
    assert_eq!(bed.guard.prepare(), Err(GuardRefusal::OwnerGone { pid }));
}

/// From now on the kernel refuses this thread `process_vm_readv`, as it does where it lets a process's maps be read but
/// not its memory: Yama's ptrace_scope 1, or a container without CAP_SYS_PTRACE.
fn refuse_to_read_memory() {
    let code = |code: u32, jt, jf, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // the number of the system call
        code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_process_vm_readv as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls concern only this thread; the kernel copies the program, which outlives the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(done, 0, "seccomp filters are needed: {}", std::io::Error::last_os_error());
}

#[test]
fn an_owner_that_may_be_seen_but_not_touched_is_named_though_another_process_has_connected() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    let (owner, _) = OtherOwner::start(&mut guest);
    let refusal = std::thread::scope(|scope| {
        let refused = scope.spawn(|| {
            refuse_to_read_memory();
            bed.guard.prepare()
        });
        refused.join().unwrap()
    });
    assert_eq!(refusal, Err(GuardRefusal::NoAccess { pid: owner.pid() }));
    assert_eq!(bed.guard.prepare().unwrap().pid, owner.pid(), "a thread that is not refused");
}

#[test]
fn a_process_is_recognised_whatever_the_files_that_it_maps_are_called() {
    use std::os::unix::ffi::OsStrExt;
    let bed = Bed::new(PATIENT);
    let _guest = bed.guest(Options::default());
    let name = std::ffi::OsStr::from_bytes(b"not \xff UTF-8");
    let path = bed.directory.path().join(name);
    std::fs::write(&path, [0; 4096]).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let _mapping = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 4096).unwrap();
    assert_eq!(bed.guard.prepare().unwrap().pid, std::process::id() as i32);
}
