//! The program itself, on a store that is served and on one that is stopped.

#![allow(clippy::unwrap_used, missing_docs)]

mod history;
mod interruptions;
mod machines;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cdpd::{Config, Daemon};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;

/// A store, perhaps served by a daemon in this process.
struct Bench {
    runtime: Runtime,
    daemon: Option<Daemon>,
    root: TempDir,
}

impl Bench {
    fn new() -> Self {
        let mut bench =
            Self { runtime: Runtime::new().unwrap(), daemon: None, root: tempfile::tempdir().unwrap() };
        bench.start();
        bench
    }

    fn start(&mut self) {
        let mut config = Config::new(self.store());
        config.options.segment_bytes = 16 * MIB;
        config.options.pool_segments = 1;
        config.options.reserve_bytes = MIB;
        self.daemon = Some(self.runtime.block_on(Daemon::start(config)).unwrap());
    }

    fn stop(&mut self) {
        self.runtime.block_on(self.daemon.take().unwrap().stop()).unwrap();
    }

    fn store(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-tool"));
        command
            .args(line.split_whitespace())
            .env("CDP_STORE", self.store())
            .env("TZ", "UTC")
            .current_dir(self.root.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// What a command that succeeds prints.
    fn text(&self, line: &str) -> String {
        let output = self.run(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {}: {stderr}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{line} --json"))).unwrap()
    }

    fn lines(&self, line: &str) -> Vec<Value> {
        self.text(&format!("{line} --json")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What a command that fails complains of.
    fn complaint(&self, line: &str) -> String {
        let output = self.run(line);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.starts_with("cdp-tool: "), "{stderr}");
        stderr
    }

    /// A sparse image of 64 MiB and what it holds.
    fn image(&self) -> (PathBuf, Vec<u8>) {
        let path = self.path("image.raw");
        let file = File::create(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        let noise: Vec<u8> = (0..3 * MIB).map(|n| ((n * n) >> 7) as u8 | 1).collect();
        file.write_all_at(&noise, 5 * MIB + 512).unwrap();
        file.write_all_at(&[7; 4096], 64 * MIB - 4096).unwrap();
        let content = fs::read(&path).unwrap();
        (path, content)
    }
}

fn same(file: &Path, content: &[u8]) {
    assert!(fs::read(file).unwrap() == content, "{} has other content", file.display());
}

#[test]
fn a_machine_that_is_removed_is_an_answer_in_json() {
    let mut bench = Bench::new();
    bench.json("volume create web1 --size 1M");
    assert_eq!(bench.json("vm register m --qmp m.qmp --volume web1")["name"], "m");
    assert_eq!(bench.json("vm remove m")["removed"], "m");
    bench.json("vm register m --qmp m.qmp --volume web1");
    assert_eq!(bench.text("vm remove m"), "");
    bench.stop();
}

#[test]
fn volumes_are_made_changed_and_destroyed() {
    let mut bench = Bench::new();
    let made = bench.json("volume create web1 --size 10G --block-size 4096");
    assert_eq!(
        (made["size_bytes"].as_u64(), made["logical_block_size"].as_u64()),
        (Some(10 << 30), Some(4096))
    );
    assert!(bench.complaint("volume create web1 --size 1G").contains("web1"));
    assert_eq!(bench.json("volume resize web1 20G")["size_bytes"], 20_u64 << 30);
    assert!(bench.complaint("volume resize web1 --size 1G").contains("shrink"));
    bench.text("volume rename web1 web2");
    let mark = bench.json("mark web2 before-upgrade");
    assert_eq!(bench.lines("marks web2"), std::slice::from_ref(&mark));

    let shown = bench.json("volume show web2");
    assert_eq!(shown["head"]["seq"], mark["seq"]);
    assert!(shown["head"]["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!((&shown["state"], &shown["serving"]), (&Value::from("healthy"), &Value::Null));
    assert!(bench.text("volume show web2").contains("before-upgrade"));
    assert!(bench.text("volume list").contains("20 GiB"));

    let socket = bench.path("web2.sock");
    let served = bench.json("volume serve web2 --vhost-user web2.sock --queues 3");
    assert_eq!(served["serving"]["socket"], socket.to_str().unwrap());
    assert_eq!(
        (&served["serving"]["queues"], &served["serving"]["status"]),
        (&3.into(), &"listening".into())
    );
    assert!(bench.complaint("volume destroy web2 --yes").contains("unserve it first") && socket.exists());
    assert_eq!(bench.json("volume unserve web2")["serving"], Value::Null);

    assert!(bench.complaint("volume destroy web2").contains("say --yes"));
    assert!(bench.complaint("volume destroy web1 --yes").contains("no volume 'web1'"));
    assert_eq!(bench.json("volume destroy web2 --yes")["destroyed"], "web2");
    assert_eq!(bench.text("volume list --json"), "");
    bench.stop();
}

#[test]
fn an_image_goes_in_and_comes_out_served_and_stopped() {
    let mut bench = Bench::new();
    let (image, content) = bench.image();
    let made = bench.json("volume create img --from image.raw --format raw");
    assert_eq!(made["size_bytes"], 64 * MIB);
    assert!(bench.complaint("volume create img --from image.raw --format raw").contains("exists already"));
    assert!(
        bench.complaint("volume create more --from image.raw --format raw --size 1M").contains("more than")
    );
    let served: Vec<String> =
        ["inspect records img", "inspect map img", "inspect segments"].map(|l| bench.text(l)).into();

    bench.text("extract img online.raw");
    same(&bench.path("online.raw"), &content);
    let (ours, theirs) = (fs::metadata(bench.path("online.raw")).unwrap(), fs::metadata(&image).unwrap());
    assert!(ours.blocks() <= theirs.blocks() + 64, "{} and {} blocks", ours.blocks(), theirs.blocks());
    bench.text("mark img whole");
    let records = bench.lines("inspect records img");
    let writes: u64 =
        records.iter().filter(|r| r["kind"] == "write").map(|r| r["block_count"].as_u64().unwrap()).sum();
    assert_eq!(writes, 3 * 256 + 1 + 1);
    let first = records.iter().find(|r| r["kind"] == "write").unwrap()["seq"].as_u64().unwrap();

    bench.stop();
    assert!(!bench.store().join("cdpd.sock").exists());
    assert!(bench.complaint("volume create x --size 1G").contains("no cdpd serves the store"));
    bench.text("extract img@mark:whole offline.raw");
    same(&bench.path("offline.raw"), &content);
    let empty = bench.json(&format!("extract img@seq:{} empty.raw", first - 1));
    assert_eq!((&empty["data_bytes"], &empty["size_bytes"]), (&0.into(), &(64 * MIB).into()));
    assert_eq!(fs::metadata(bench.path("empty.raw")).unwrap().len(), 64 * MIB);
    // A clean stop may add records of its own, but changes none.
    let stopped = bench.text("inspect records img");
    assert!(stopped.starts_with(&served[0]), "{stopped}\n{}", served[0]);
    assert_eq!(bench.text("inspect map img"), served[1]);
    assert!(served[2].contains("(store log)") && served[2].contains("img"), "{}", served[2]);
    assert!(bench.complaint("extract img@seq:1x never.raw").contains("is no instant"));
    assert!(bench.complaint("extract img .").contains("is no file"));
    let left: Vec<_> = fs::read_dir(bench.root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("partial")), "{left:?}");
}

#[test]
fn qcow2_goes_in_and_comes_out() {
    let mut bench = Bench::new();
    let (image, content) = bench.image();
    let qemu_img = |arguments: &[&str]| {
        let status = Command::new("qemu-img").args(arguments).current_dir(bench.root.path()).status();
        assert!(status.expect("this test needs qemu-img").success(), "{arguments:?}");
    };
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", image.to_str().unwrap(), "image.qcow2"]);

    let output = bench.run("volume create img --from image.qcow2 --json");
    assert!(output.status.success());
    let note = String::from_utf8(output.stderr).unwrap();
    assert!(note.contains("looks like qcow2 and is read as such; --format raw would"), "{note}");
    bench.text("extract img out.raw");
    same(&bench.path("out.raw"), &content);
    assert_eq!(bench.json("extract img out.qcow2")["format"], "qcow2");
    qemu_img(&["convert", "-q", "-f", "qcow2", "-O", "raw", "out.qcow2", "back.raw"]);
    same(&bench.path("back.raw"), &content);

    // Asked to, it takes the bytes as they are.
    let bytes = fs::read(bench.path("image.qcow2")).unwrap();
    bench.text("volume create bytes --from image.qcow2 --format raw");
    bench.text("extract bytes bytes.raw");
    assert!(fs::read(bench.path("bytes.raw")).unwrap().starts_with(&bytes));
    // Asked to take it for what it is not, it leaves nothing behind.
    assert!(
        bench
            .complaint("volume create bad --from image.raw --format qcow2")
            .contains("qemu-img cannot convert")
    );
    assert_eq!(bench.lines("volume list").len(), 2);
    // Without qemu-img, it does not guess.
    let output = bench.command("volume create guess --from image.raw").env("PATH", "").output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("qemu-utils") && complaint.contains("--format raw"), "{complaint}");
    bench.stop();
}

#[test]
fn verify_and_rebuild() {
    let mut bench = Bench::new();
    let (_, content) = bench.image();
    bench.text("volume create img --from image.raw --format raw");
    assert_eq!(bench.json("verify")["findings"], Value::Array(vec![]));
    assert!(bench.complaint("rebuild-index").contains("stop it first"));
    bench.stop();
    assert_eq!(bench.json("verify")["findings"], Value::Array(vec![]));
    let rebuilt = bench.json("rebuild-index");
    assert!(rebuilt["batches"].as_u64().unwrap() > 0);
    bench.text("extract img after.raw");
    same(&bench.path("after.raw"), &content);

    // A block of the image, wherever in the store it lies, gets a flipped bit.
    let needle = &content[6 * MIB as usize..6 * MIB as usize + 4096];
    let flipped = files(&bench.store()).iter().any(|path| flip(path, needle));
    assert!(flipped, "the block was not found");
    let output = bench.run("verify --json");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{report}");
    // What was found stands, even if nobody reads of it, as behind `| head -1`.
    for line in ["verify", "verify --json"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status = bench.command(line).stdout(writer).status().unwrap();
        assert_eq!(status.code(), Some(1), "{line}");
    }
    assert!(bench.complaint("extract img damaged.raw").contains("checksum"));
    assert!(!bench.path("damaged.raw").exists());
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(files(&entry.path())),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Flips a bit of a block that is aligned to 512 bytes in a file, if it is there.
fn flip(path: &Path, block: &[u8]) -> bool {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    let Some(at) = (0..bytes.len()).step_by(512).find(|&at| bytes[at..].starts_with(block)) else {
        return false;
    };
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[bytes[at + 100] ^ 4], at as u64 + 100).unwrap();
    true
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut bench = Bench::new();
    bench.image();
    bench.text("volume create img --from image.raw --format raw");
    for line in ["inspect map img", "inspect records img --json", "volume list", "completions bash", "--help"]
    {
        let mut child = bench.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{line}: {}", output.status);
        assert!(output.stderr.is_empty(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    bench.stop();
}

#[test]
fn nothing_that_is_shown_moves_the_cursor() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    let odd = "odd\u{1b}[2J\u{9b}2J";
    let registered = bench.command("vm register m --volume web1 --qmp").arg(odd).output().unwrap();
    assert!(registered.status.success());
    assert!(bench.json("vm show m")["qmp"].as_str().unwrap().ends_with(odd));
    let refused = bench.command("extract web1").arg(format!("{odd}/file")).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    for shown in [bench.text("vm show m"), String::from_utf8(refused.stderr).unwrap()] {
        assert!(shown.contains("odd\\u{1b}[2J\\u{9b}2J"), "{shown:?}");
        assert!(!shown.contains(['\u{1b}', '\u{9b}']), "{shown:?}");
    }
    bench.stop();
}

#[test]
fn a_path_that_is_no_text_is_an_answer_in_json_all_the_same() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    for (line, name, key) in
        [("extract web1 --json", b"image\xff", "file"), ("man --json", b"pages\xff", "directory")]
    {
        let output = bench.command(line).arg(OsStr::from_bytes(name)).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {}: {stderr}", output.status);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer[key], *String::from_utf8_lossy(name), "{line}");
        assert!(bench.root.path().join(OsStr::from_bytes(name)).exists(), "{line}");
    }
    bench.stop();
}

#[test]
fn a_complaint_that_nobody_reads_is_a_failure_as_any_other() {
    let mut bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = bench.command("volume show nobody").stderr(writer).status().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(2), None));
    bench.stop();
}

#[test]
fn a_missing_store_is_a_plain_complaint() {
    let bench = Bench { runtime: Runtime::new().unwrap(), daemon: None, root: tempfile::tempdir().unwrap() };
    assert!(bench.complaint("inspect store").contains("cannot read the store in"));
    assert!(bench.complaint("mark web1 x").contains("no cdpd serves the store"));
    let output = bench.command("inspect store").env_remove("CDP_STORE").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("say --store DIR, or set CDP_STORE"));
    assert!(!bench.store().exists());
}

#[test]
fn documents_come_from_the_definitions() {
    let bench = Bench { runtime: Runtime::new().unwrap(), daemon: None, root: tempfile::tempdir().unwrap() };
    bench.text("man man1");
    let page = fs::read_to_string(bench.path("man1/cdp-tool-volume-create.1")).unwrap();
    assert!(page.contains("Holes of the image stay holes"), "{page}");
    assert!(bench.path("man1/cdpd.1").exists());
    for shell in ["bash", "zsh", "fish"] {
        assert!(bench.text(&format!("completions {shell}")).contains("rebuild-index"));
    }
}
