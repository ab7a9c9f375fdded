//! Real QEMUs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A machine without disk that runs its firmware, with shared memory: enough to be saved.
pub const SMALL: &[&str] = &[
    "-machine",
    "q35,memory-backend=mem",
    "-m",
    "64",
    "-object",
    "memory-backend-memfd,id=mem,size=64M,share=on",
    "-name",
    "web1",
];

const START_DEADLINE: Duration = Duration::from_secs(30);

/// A process that ends with its owner.
pub struct Process(Child);

impl Process {
    /// Starts it, and waits until it listens at `socket`.
    pub fn start(command: &mut Command, socket: &Path) -> Self {
        let program = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap_or_else(|error| {
            panic!("{program:?} does not start ({error}): install qemu-system-x86 and qemu-utils (make deps)")
        });
        let mut process = Self(child);
        let by = Instant::now() + START_DEADLINE;
        while !is_listened_at(socket) {
            assert!(matches!(process.0.try_wait(), Ok(None)), "{program:?} has ended; see above why");
            assert!(Instant::now() < by, "{program:?} does not listen at its socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        process
    }
}

/// A socket is in its directory before anybody listens there. Looking does not connect: a QMP socket takes one client.
fn is_listened_at(socket: &Path) -> bool {
    /// `__SO_ACCEPTCON`, in the column of flags.
    const LISTENS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some(LISTENS) && columns.nth(3).is_some_and(|path| Path::new(path) == socket)
    })
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU with its QMP socket.
pub struct Qemu {
    pub qmp: PathBuf,
    _process: Process,
}

impl Qemu {
    /// Starts `program` with its socket in `dir`.
    pub fn start(program: &str, dir: &Path, arguments: &[&str]) -> Self {
        let qmp = dir.join("qmp");
        let mut command = Command::new(program);
        command.args(["-accel", "tcg", "-display", "none", "-nodefaults"]).args(arguments);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let process = Process::start(&mut command, &qmp);
        Self { qmp, _process: process }
    }
}

/// A vhost-user-blk server with an empty disk at `socket`.
pub fn storage_daemon(socket: &Path) -> Process {
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", "null-co,node-name=n0,size=1048576,read-zeroes=on", "--export"]);
    let export = "vhost-user-blk,id=e0,node-name=n0,writable=on,addr.type=unix,addr.path=";
    command.arg(format!("{export}{}", socket.display()));
    Process::start(&mut command, socket)
}

/// Arguments for a machine with one of everything that [`qmp_bridge::machine`] tells: a vhost-user disk behind
/// `vhost`, a disk of QEMU's own that blocks migration, a network card, a name and a UUID.
pub fn furnished(vhost: &Path, disk: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = SMALL.iter().map(|argument| (*argument).to_owned()).collect();
    let more = [
        "-uuid".to_owned(),
        "5e0a3c0e-6f8a-4e55-9d6c-3f6f3a0f1b11".to_owned(),
        "-smp".to_owned(),
        "2".to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=vu0,path={}", vhost.display()),
        "-device".to_owned(),
        "vhost-user-blk-pci,id=blk0,chardev=vu0,num-queues=1".to_owned(),
        "-drive".to_owned(),
        format!("file=fat:rw:{},format=raw,if=none,id=fat0", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=fat0".to_owned(),
        "-netdev".to_owned(),
        "user,id=net0".to_owned(),
        "-device".to_owned(),
        "virtio-net-pci,netdev=net0,id=nic0,romfile=".to_owned(),
    ];
    arguments.extend(more);
    arguments
}
