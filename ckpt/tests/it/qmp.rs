//! A QEMU without disks, whose guest counts in memory, and its control socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Nothing here takes longer, on a busy machine without KVM.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The guest counts here, from 1 on.
pub const COUNTER: u64 = 0x30_0000;
/// For each number that it counts it writes the number into the next of these pages, round and round.
pub const STAMPS: u64 = 0x40_0000;
pub const STAMP_PAGES: u64 = 4096;
/// Guest memory that is looked at as a whole.
pub const MEMORY: u64 = 64 << 20;

/// A kernel by the Multiboot specification 0.6.96 (3.1, its addresses given in the header): QEMU loads it at 1 MiB and
/// starts it in 32-bit mode.
fn kernel() -> Vec<u8> {
    let (magic, flags, load) = (0x1bad_b002_u32, 0x0001_0000_u32, 0x10_0000_u32);
    let entry = load + 32;
    let end = load + 4096;
    let header = [magic, flags, 0_u32.wrapping_sub(magic).wrapping_sub(flags), load, load, end, end, entry];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    let first = STAMPS as u32;
    let last = (STAMPS + STAMP_PAGES * 4096) as u32;
    image.extend([0xbf].into_iter().chain(first.to_le_bytes())); // mov edi, first
    let again = image.len();
    image.extend([0xff, 0x05].into_iter().chain((COUNTER as u32).to_le_bytes())); // inc dword [counter]
    image.extend([0xa1].into_iter().chain((COUNTER as u32).to_le_bytes())); // mov eax, [counter]
    image.extend([0x89, 0x07]); // mov [edi], eax
    image.extend([0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]); // add edi, 4096
    image.extend([0x81, 0xff].into_iter().chain(last.to_le_bytes())); // cmp edi, last
    let back = |image: &Vec<u8>, to: usize| (to as isize - (image.len() as isize + 2)) as i8 as u8;
    image.extend([0x72, back(&image, again)]); // jb again
    image.extend([0xeb, back(&image, 32)]); // jmp entry
    image.resize(4096, 0x90);
    image
}

/// A running QEMU; killed when it is dropped.
#[derive(Debug)]
pub struct Qemu {
    process: Child,
    qmp: BufReader<UnixStream>,
    dir: PathBuf,
}

impl Qemu {
    /// The program that `CKPT_QEMU` names, or Debian's; `CKPT_QEMU_DATA` names its directories of firmware, separated
    /// by colons.
    pub fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let program = std::env::var("CKPT_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let (socket, kernel_file) = (dir.join(format!("{name}.qmp")), dir.join("kernel"));
        std::fs::write(&kernel_file, kernel()).unwrap();
        let mut command = Command::new(&program);
        if let Ok(data) = std::env::var("CKPT_QEMU_DATA") {
            for directory in data.split(':') {
                command.args(["-L", directory]);
            }
        }
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "64"])
            .args(["-vga", "std"])
            .arg("-kernel")
            .arg(kernel_file)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(arguments)
            .stdin(Stdio::null());
        let mut process = match command.spawn() {
            Ok(process) => process,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("{program} is missing: install Debian's qemu-system-x86")
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    // Nobody else would end it.
                    let _ = process.kill();
                    let _ = process.wait();
                    panic!("{}: {error}", socket.display());
                }
                Err(error) => {
                    let ended = process.try_wait().unwrap();
                    assert!(ended.is_none(), "{program}: {ended:?}, {}: {error}", socket.display());
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qemu = Self { process, qmp: BufReader::new(stream), dir: dir.to_owned() };
        assert!(qemu.receive().get("QMP").is_some());
        qemu.run("qmp_capabilities", json!({}));
        qemu
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.qmp.read_line(&mut line).unwrap() > 0, "QEMU closed its control socket");
        serde_json::from_str(&line).unwrap()
    }

    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.qmp.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let mut answer = self.receive();
            assert!(answer.get("error").is_none(), "QMP {command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    /// Waits until `query` answers with this status.
    pub fn wait_for(&mut self, query: &str, status: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.run(query, json!({}));
            if answer["status"] == status {
                return;
            }
            assert!(
                answer["status"] != "failed" && Instant::now() < deadline,
                "{query}, not {status}: {answer}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Guest memory, physical.
    pub fn memory(&mut self, from: u64, size: u64) -> Vec<u8> {
        let file = self.dir.join("memory");
        self.run("pmemsave", json!({ "val": from, "size": size, "filename": file }));
        std::fs::read(&file).unwrap()
    }

    pub fn counter(&mut self) -> u32 {
        u32::from_le_bytes(self.memory(COUNTER, 4).try_into().unwrap())
    }

    /// Waits until the guest has counted that far.
    pub fn count_to(&mut self, number: u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.counter() < number {
            assert!(Instant::now() < deadline, "the guest does not count");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn capability(&mut self, name: &str) {
        let capabilities = json!([{ "capability": name, "state": true }]);
        self.run("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    }

    /// Begins a migration to a socket of ours; returns our end of it.
    pub fn migrate(&mut self) -> UnixStream {
        let socket = self.dir.join("stream");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.run("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    return stream;
                }
                Err(error) => assert!(Instant::now() < deadline, "QEMU does not connect: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen or does not mind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
