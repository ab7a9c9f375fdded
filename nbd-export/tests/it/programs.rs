//! Clients that others wrote. A program that is missing is an error, and named with its Debian package.

use std::fs;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::fixture::{CAPACITY, DEADLINE, EXTENT, Fixture};

/// Runs a program to its end, which must be a good one and come in time, and returns what it has printed.
pub(crate) fn run(package: &str, command: &mut Command) -> String {
    let (status, out, err) = end(package, command);
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out
}

/// Runs a program that must fail by itself, and returns its complaint.
pub(crate) fn fails(package: &str, command: &mut Command) -> String {
    let (status, out, err) = end(package, command);
    assert!(status.code().is_some_and(|code| code != 0), "{command:?}: {status}\n{out}\n{err}");
    err
}

fn end(package: &str, command: &mut Command) -> (ExitStatus, String, String) {
    let name = command.get_program().to_string_lossy().into_owned();
    let directory = tempfile::tempdir().unwrap();
    let (out, err) = (directory.path().join("out"), directory.path().join("err"));
    command
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap());
    let mut child = match command.spawn() {
        Err(error) => panic!("{name} cannot be run ({error}): install Debian's package {package}"),
        Ok(child) => child,
    };
    let deadline = Instant::now() + 3 * DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{name} does not come to an end");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    (status, fs::read_to_string(out).unwrap(), fs::read_to_string(err).unwrap())
}

fn pattern(fixture: &Fixture) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    // Whatever the contexts call a hole is one.
    let data: Vec<u8> = (0..CAPACITY)
        .map(|at| if at / EXTENT % 2 == 1 { 0 } else { (at / 512 * 31 + at) as u8 | 1 })
        .collect();
    let path = fixture.directory.path().join("pattern.img");
    let file = fs::File::create(&path).unwrap();
    file.write_all_at(&data, 0).unwrap();
    run("libnbd-bin", Command::new("nbdcopy").arg("--flush").arg(&path).arg(fixture.uri("disk")));
    assert!(fixture.content(0, CAPACITY) == data, "nbdcopy has written what was in the file");
    data
}

#[test]
fn nbdinfo_sees_all_there_is_to_see() {
    let fixture = Fixture::new();
    let told = run("libnbd-bin", Command::new("nbdinfo").arg("--json").arg(fixture.uri("")));
    for expected in [
        "\"export-size\": 67108864",
        "\"can_fast_zero\": true",
        "\"can_multi_conn\": true",
        "base:allocation",
    ] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    let told = run("libnbd-bin", Command::new("nbdinfo").arg("--list").arg(fixture.uri("")));
    assert!(told.contains("export=\"past\"") && told.contains("description: the past"), "{told}");
    let mut map = Command::new("nbdinfo");
    map.arg("--map=qemu:dirty-bitmap:since@mark").arg(fixture.uri("past"));
    let told = run("libnbd-bin", &mut map);
    assert_eq!(told.lines().count() as u64, CAPACITY / EXTENT, "{told}");
}

#[test]
fn copies_by_nbdcopy_and_qemu_img_are_the_same() {
    let fixture = Fixture::new();
    let data = pattern(&fixture);
    let path = |name: &str| fixture.directory.path().join(name);
    run("libnbd-bin", Command::new("nbdcopy").arg(fixture.uri("past")).arg(path("nbdcopy.img")));
    assert!(fs::read(path("nbdcopy.img")).unwrap() == data);
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "raw"]).arg(fixture.uri("past")).arg(path("qemu.img"));
    run("qemu-utils", &mut convert);
    assert!(fs::read(path("qemu.img")).unwrap() == data);
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(fixture.uri("disk")).arg(path("pattern.img"));
    assert!(run("qemu-utils", &mut compare).contains("identical"));
    let told =
        run("qemu-utils", Command::new("qemu-img").args(["map", "--output=json"]).arg(fixture.uri("past")));
    assert_eq!(told.lines().count() as u64, CAPACITY / EXTENT, "{told}");
}

#[test]
fn qemu_sees_what_has_changed() {
    let fixture = Fixture::new();
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=past,x-dirty-bitmap=qemu:dirty-bitmap:since@mark",
        fixture.socket().display()
    );
    let told =
        run("qemu-utils", Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &image]));
    // QEMU shows what is dirty as holes that have no data.
    assert_eq!(told.matches("\"data\": false").count() as u64, CAPACITY / EXTENT / 2, "{told}");
}

#[test]
fn qemu_io_does_all_that_it_can() {
    let fixture = Fixture::new();
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "raw"]);
    for command in [
        "aio_write -P 1 0 1M",
        "aio_write -P 2 1M 1M",
        "aio_flush",
        "write -z -u 512k 256k",
        "write -z 1M 4k",
        "discard 64k 64k",
        "write -f -P 3 4M 512",
        "flush",
        "read -P 1 0 64k",
        "read -P 0 64k 64k",
        "read -P 0 512k 256k",
        "read -P 2 1028k 4k",
        "read -P 3 4M 512",
    ] {
        qemu.args(["-c", command]);
    }
    let told = run("qemu-utils", qemu.arg(fixture.uri("disk")));
    assert!(!told.contains("failed"), "{told}");
}

#[test]
fn nbdsh_scripts_of_ours_run() {
    let fixture = Fixture::new();
    let script = r#"
import nbd, errno
h.add_meta_context("base:allocation")
h.connect_uri(URI)
assert h.get_structured_replies_negotiated()
h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == b"x" * 4096
chunks = []
h.pread_structured(8192, 8192, lambda buf, off, status, err: chunks.append((off, len(buf), status)), nbd.CMD_FLAG_DF)
assert chunks == [(8192, 8192, nbd.READ_DATA)], chunks
extents = []
h.block_status(131072, 0, lambda context, off, entries, err: extents.extend(entries))
assert extents == [65536, 0, 65536, 3], extents
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 8192)
h.cache(1 << 20, 0)
h.flush()
h.set_strict_mode(0)
for call in [lambda: h.pread(512, 1), lambda: h.zero(512, h.get_size()), lambda: h.pread(512, h.get_size())]:
    try:
        call()
        assert False
    except nbd.Error as error:
        assert error.errnum in (errno.EINVAL, errno.ENOSPC), error
h.shutdown()
"#;
    let script = script.replace("URI", &format!("{:?}", fixture.uri("disk")));
    // It finds Python by name: Debian's, whatever other there is.
    run("python3-libnbd", Command::new("nbdsh").args(["-c", &script]).env("PATH", "/usr/bin:/bin"));
    fixture.nobody_is_left();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let fixture = Fixture::new();
    let mut fio = Command::new("fio");
    fio.current_dir(fixture.directory.path());
    fio.args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-64k", "--iodepth=32"]);
    fio.args(["--size=32M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--end_fsync=1"]);
    run("fio", fio.arg(format!("--uri={}", fixture.uri("disk"))));
    assert!(fixture.exports.disk.flushes() > 0);
}

#[test]
fn nbdkit_serves_it_on() {
    let fixture = Fixture::new();
    let data = pattern(&fixture);
    let copy = fixture.directory.path().join("copy.img");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-U", "-", "nbd"]).arg(format!("socket={}", fixture.socket().display())).arg("export=past");
    nbdkit.arg("--run").arg(format!("nbdcopy \"$uri\" {}", copy.display()));
    run("nbdkit", &mut nbdkit);
    assert!(fs::read(copy).unwrap() == data);
}
