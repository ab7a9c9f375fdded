//! SIGINT and SIGTERM.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use crate::Bench;

/// SIGINT among the signals of a process (proc_pid_status(5)): signal N is bit N - 1.
const SIGINT_BIT: u64 = 1 << 1;

/// Whether SIGINT does not just end a program.
fn catches_interruptions(child: &Child) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() & SIGINT_BIT != 0
}

#[test]
fn a_daemon_that_hangs_does_not_keep_a_second_interruption_waiting() {
    let bench = Bench { runtime: Runtime::new().unwrap(), daemon: None, root: tempfile::tempdir().unwrap() };
    fs::create_dir(bench.store()).unwrap();
    // It takes connections, and answers nothing.
    let _daemon = cdpd::socket::bind(&bench.store(), 0o600).unwrap();
    let mut child = bench.command("checkpoint take web1").stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            panic!("it waits on: {}", child.wait().unwrap());
        }
        // With time for each to be heard of: those that come together are one.
        std::thread::sleep(Duration::from_millis(100));
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if catches_interruptions(&child) => {
                kill_process(Pid::from_child(&child), Signal::INT).unwrap();
            }
            None => {}
        }
    };
    assert_eq!((status.code(), status.signal()), (Some(2), None));
}

/// Whether a process is there, and not only its end.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn an_interruption_leaves_no_file_and_nobody_who_writes_one() {
    let mut bench = Bench::new();
    // A qemu-img that does not come to an end in time stands for a long conversion.
    let (directory, pid) = (bench.path("bin"), bench.path("pid"));
    fs::create_dir(&directory).unwrap();
    let script = directory.join("qemu-img");
    let mut file = File::create(&script).unwrap();
    writeln!(file, "#!/bin/sh\necho $$ >{}\nexec sleep 60", pid.display()).unwrap();
    drop(file);
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    bench.image();
    bench.text("volume create img --from image.raw --format raw");
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap());
    let mut child =
        bench.command("extract img out.qcow2").env("PATH", path).stderr(Stdio::piped()).spawn().unwrap();
    let partial = || {
        let entries = fs::read_dir(bench.root.path()).unwrap().map(|e| e.unwrap().file_name());
        entries.filter(|name| name.to_string_lossy().ends_with(".partial")).count()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let converting: u32 = loop {
        if let Ok(pid) = fs::read_to_string(&pid).unwrap_or_default().trim().parse() {
            break pid;
        }
        assert!(Instant::now() < deadline, "it has not begun");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(partial() == 2 && is_alive(converting));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(2), None));
    assert_eq!(partial(), 0);
    assert!(!bench.path("out.qcow2").exists());
    while is_alive(converting) {
        assert!(Instant::now() < deadline, "the conversion goes on for nobody");
        std::thread::sleep(Duration::from_millis(20));
    }
    bench.stop();
}
