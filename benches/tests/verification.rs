//! `bench-blk verify` as a test: another driver's requests with every byte checked, cut off abruptly.
//!
//! It needs `cdpd` and `cdp-tool` beside `bench-blk`, where `make build` leaves them.

use std::process::Command;
use std::time::Duration;

use e2e::process::run;

/// How long a run may take: many times what it takes. A server that says nothing on a connection would be waited for.
const LIMIT: Duration = Duration::from_secs(3600);

fn verify(args: &[&str]) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory to test in");
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench-blk"));
    command.arg("verify").arg("--dir").arg(dir.path()).args(args);
    let output = run(&mut command, LIMIT).expect("bench-blk comes to an end");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "bench-blk verify {}: {}\n{said}", args.join(" "), output.status);
}

#[test]
fn every_acknowledged_write_survives_cuts_and_kills() {
    verify(&["--cuts", "20", "--kills", "5", "--requests", "1000", "--size-mib", "32"]);
}

#[test]
#[ignore = "takes minutes: run by `make test-long`"]
fn every_acknowledged_write_survives_a_hundred_cuts() {
    verify(&["--cuts", "100", "--requests", "10000", "--size-mib", "256"]);
    verify(&["--cuts", "100", "--kills", "100", "--requests", "5000", "--size-mib", "256"]);
}

/// The client itself: where this fails, the other tests mean nothing.
#[test]
#[ignore = "tests the test: run by `make test-long`"]
fn qemu_storage_daemon_passes_too() {
    verify(&["--cuts", "20", "--requests", "2000", "--storage-daemon"]);
}
