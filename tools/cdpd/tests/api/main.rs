//! The daemon in this process, asked through its socket.

#![allow(clippy::unwrap_used, missing_docs)]

mod destruction;
mod guest;
mod history;
mod machines;
mod metrics;
mod nbd;
mod space;
mod write_cache;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cdp_store::{ExtentInfo, SegmentInfo, VerifyReport};
use cdpd::api::{
    ApiError, Count, ErrorKind, MapEnd, Mark, Record, RecordsEnd, ServingStatus, StoreStatus, Volume,
};
use cdpd::client::{Client, Step};
use cdpd::frames::{ContentStart, Frame};
use cdpd::{Config, Daemon};
use hyper::Method;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;

/// A daemon over a store of its own.
struct Bench {
    runtime: Runtime,
    daemon: Option<Daemon>,
    client: Client,
    root: TempDir,
}

fn config(root: &Path) -> Config {
    let mut config = Config::new(root.join("store"));
    config.options.segment_bytes = 16 * MIB;
    config.options.pool_segments = 1;
    config.options.reserve_bytes = MIB;
    config
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut config = config(root.path());
        change(&mut config);
        let runtime = Runtime::new().unwrap();
        let store = config.store.clone();
        let daemon = runtime.block_on(Daemon::start(config)).unwrap();
        let client = Client::find(&store).unwrap().unwrap();
        Self { runtime, daemon: Some(daemon), client, root }
    }

    fn store(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn stop(&mut self) {
        self.runtime.block_on(self.daemon.take().unwrap().stop()).unwrap();
    }

    fn start_again(&mut self) {
        let config = config(self.root.path());
        self.daemon = Some(self.runtime.block_on(Daemon::start(config)).unwrap());
    }

    fn restart(&mut self) {
        self.stop();
        self.start_again();
    }

    fn create(&self, name: &str, size_bytes: u64) -> Result<Volume, ApiError> {
        self.client.send(Method::POST, "/v1/volumes", &json!({ "name": name, "size_bytes": size_bytes }))
    }

    fn show(&self, name: &str) -> Result<Volume, ApiError> {
        self.client.get(&format!("/v1/volumes/{name}"))
    }

    fn serve(&self, name: &str, socket: &Path) -> Result<Volume, ApiError> {
        let request = json!({ "socket": socket, "queues": 2 });
        self.client.send(Method::PUT, &format!("/v1/volumes/{name}/serve"), &request)
    }

    fn import(&self, name: &str, frames: Vec<Frame>) -> Result<Volume, ApiError> {
        let mut frames = frames.into_iter();
        let path = format!("/v1/volumes/{name}/import?logical_block_size=512");
        self.client.import(
            &path,
            &mut || frames.next().ok_or_else(|| ApiError::new(ErrorKind::Io, "the file has vanished")),
            &mut |_| (),
        )
    }

    fn data(&self, path: &str) -> Result<Vec<Frame>, ApiError> {
        let mut stream = self.client.content(path)?;
        let mut frames = Vec::new();
        loop {
            frames.push(Frame::read(&mut stream).unwrap());
            if matches!(frames.last(), Some(Frame::End | Frame::Error(_))) {
                return Ok(frames);
            }
        }
    }

    /// What a volume holds, by block.
    fn blocks(&self, path: &str) -> BTreeMap<u64, Vec<u8>> {
        let mut blocks = BTreeMap::new();
        for frame in self.data(path).unwrap() {
            if let Frame::Data { offset, bytes } = frame {
                let numbered = (offset / 4096..).zip(bytes.chunks(4096));
                blocks.extend(numbered.map(|(block, bytes)| (block, bytes.to_vec())));
            }
        }
        blocks
    }
}

fn start(size_bytes: u64) -> Frame {
    Frame::Start(ContentStart { size_bytes, at: None })
}

fn data(offset: u64, byte: u8, len: usize) -> Frame {
    Frame::Data { offset, bytes: vec![byte; len] }
}

/// The whole answer to a request for the metrics, sent over this connection.
fn ask_for_metrics(mut stream: impl Read + Write, host: &str) -> String {
    write!(stream, "GET /v1/metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_volume_lives_from_creation_to_destruction() {
    let mut bench = Bench::new();
    let volume = bench.create("web1", 64 * MIB).unwrap();
    assert_eq!((volume.size_bytes, volume.logical_block_size), (64 * MIB, 512));
    assert_eq!(bench.create("web1", MIB).unwrap_err().kind, ErrorKind::Exists);

    let path = "/v1/volumes/web1";
    let grown: Volume = bench.client.send(Method::PATCH, path, &json!({ "size_bytes": 65 * MIB })).unwrap();
    assert_eq!(grown.size_bytes, 65 * MIB);
    let shrunk = bench.client.send::<Volume>(Method::PATCH, path, &json!({ "size_bytes": MIB }));
    assert_eq!(shrunk.unwrap_err().kind, ErrorKind::Invalid);
    let renamed: Volume = bench.client.send(Method::PATCH, path, &json!({ "name": "web2" })).unwrap();
    assert_eq!((renamed.id, renamed.name.as_str()), (volume.id, "web2"));
    assert_eq!(bench.show("web1").unwrap_err().kind, ErrorKind::NotFound);

    let mark: Mark =
        bench.client.send(Method::POST, "/v1/volumes/web2/marks", &json!({ "label": "before" })).unwrap();
    let marks: Vec<Mark> = bench.client.get("/v1/volumes/web2/marks").unwrap();
    assert_eq!(marks, [mark]);

    bench.restart();
    let volumes: Vec<Volume> = bench.client.get("/v1/volumes").unwrap();
    assert_eq!(volumes.len(), 1);
    assert_eq!((volumes[0].name.as_str(), volumes[0].size_bytes), ("web2", 65 * MIB));
    assert_eq!(volumes[0].marks, marks);

    bench.client.delete::<()>("/v1/volumes/web2").unwrap();
    assert_eq!(bench.client.delete::<()>("/v1/volumes/web2").unwrap_err().kind, ErrorKind::NotFound);
    bench.stop();
}

#[test]
fn what_is_imported_can_be_inspected_and_extracted_at_every_instant() {
    let mut bench = Bench::new();
    let size = 8 * MIB + 4096;
    let tail = 8 * MIB;
    let frames =
        vec![start(size), data(4096, 1, 8192), data(MIB, 2, MIB as usize), data(tail, 3, 512), Frame::End];
    let volume = bench.import("img", frames).unwrap();
    assert_eq!(volume.size_bytes, size);

    let blocks = bench.blocks("/v1/volumes/img/data");
    let expected: Vec<u64> = [1, 2].into_iter().chain(256..512).chain([2048]).collect();
    assert_eq!(blocks.keys().copied().collect::<Vec<_>>(), expected);
    assert_eq!((&blocks[&1], &blocks[&300]), (&vec![1; 4096], &vec![2; 4096]));
    assert_eq!((&blocks[&2048][..512], &blocks[&2048][512..]), (&[3; 512][..], &[0; 3584][..]));

    let mut records: Vec<Record> = Vec::new();
    let end: RecordsEnd = bench
        .client
        .lines(Method::GET, "/v1/volumes/img/records", &mut |step| {
            if let Step::Item(record) = step {
                records.push(record);
            }
            true
        })
        .unwrap()
        .unwrap();
    assert_eq!((end.count, end.more, end.to.seq), (records.len() as u64, false, volume.head.seq));
    let writes: u64 = records.iter().filter(|r| r.record.kind == "write").map(|r| r.record.block_count).sum();
    assert_eq!(writes, 259);
    assert!(records.is_sorted_by_key(|r| r.record.seq));

    // Just before the first change there was nothing, just after it there is only that.
    let first = records.iter().find(|r| r.record.kind == "write").unwrap();
    let before = format!("/v1/volumes/img/data?at=seq:{}", first.record.seq.before());
    assert_eq!(bench.blocks(&before).len(), 0);
    let after = bench.blocks(&format!("/v1/volumes/img/data?at=seq:{}", first.record.seq));
    assert_eq!(after.len() as u64, first.record.block_count);

    let mut mapped = 0;
    let end: MapEnd = bench
        .client
        .lines(Method::GET, "/v1/volumes/img/map?at=head", &mut |step| {
            if let Step::Item(ExtentInfo {
                block_count, state: cdp_store::ExtentState::Mapped { .. }, ..
            }) = step
            {
                mapped += block_count;
            }
            true
        })
        .unwrap()
        .unwrap();
    assert_eq!((mapped, end.at.seq), (259, volume.head.seq));
    bench.stop();
}

#[test]
fn records_can_be_limited_and_bounded() {
    let mut bench = Bench::new();
    let frames = [start(MIB)].into_iter().chain((0..64).map(|n| data(n * 8192, 9, 4096))).chain([Frame::End]);
    bench.import("img", frames.collect()).unwrap();
    let list = |query: &str| {
        let mut records: Vec<Record> = Vec::new();
        let path = format!("/v1/volumes/img/records?{query}");
        let end: RecordsEnd = bench
            .client
            .lines(Method::GET, &path, &mut |step| {
                if let Step::Item(record) = step {
                    records.push(record);
                }
                true
            })
            .unwrap()
            .unwrap();
        (records, end)
    };
    let (all, _) = list("");
    let (some, end) = list("limit=3");
    assert_eq!((some.len(), end.count, end.more), (3, 3, true));
    let (from, to) = (all[2].record.seq, all[5].record.seq);
    let (between, end) = list(&format!("from=seq:{from}&to=seq:{to}"));
    let seqs: Vec<_> = between.iter().map(|r| r.record.seq).collect();
    assert_eq!(seqs, all[3..=5].iter().map(|r| r.record.seq).collect::<Vec<_>>());
    assert!(!end.more);
    assert_eq!(list(&format!("from=seq:{to}&to=seq:{from}")).0.len(), 0);
    bench.stop();
}

#[test]
fn an_import_that_does_not_end_leaves_nothing() {
    let mut bench = Bench::new();
    let cases: [(&str, Vec<Frame>, &str); 6] = [
        ("vanished", vec![start(MIB), data(0, 1, 4096)], "the file has vanished"),
        ("outside", vec![start(MIB), data(MIB, 1, 4096), Frame::End], "outside the device"),
        ("unaligned", vec![start(MIB), data(100, 1, 512), Frame::End], "not aligned"),
        ("backwards", vec![start(MIB), data(8192, 1, 512), data(0, 1, 512), Frame::End], "comes after"),
        ("headless", vec![data(0, 1, 512), Frame::End], "begins with its start"),
        ("twice", vec![start(MIB), start(MIB), Frame::End], "one start"),
    ];
    for (name, frames, part) in cases {
        let refusal = bench.import(name, frames).unwrap_err();
        assert!(refusal.message.contains(part), "{name}: {refusal}");
        assert_eq!(bench.show(name).unwrap_err().kind, ErrorKind::NotFound, "{name}");
    }
    // A refusal in the middle of much more than any buffer holds is read all the same.
    let endless =
        [start(1 << 40), data(0, 1, 100)].into_iter().chain((1..500).map(|n| data(n * MIB, 1, 1 << 20)));
    let refusal = bench.import("endless", endless.collect()).unwrap_err();
    assert!(refusal.message.contains("not aligned"), "{refusal}");
    let volumes: Vec<Volume> = bench.client.get("/v1/volumes").unwrap();
    assert!(volumes.is_empty());
    bench.restart();
    let volumes: Vec<Volume> = bench.client.get("/v1/volumes").unwrap();
    assert!(volumes.is_empty());
    bench.stop();
}

#[test]
fn a_served_volume_is_served_again_after_a_restart() {
    let mut bench = Bench::new();
    let socket = bench.root.path().join("web1.sock");
    bench.create("web1", MIB).unwrap();
    bench.create("web2", MIB).unwrap();
    let served = bench.serve("web1", &socket).unwrap().serving.unwrap();
    assert_eq!((served.queues, served.status), (2, ServingStatus::Listening));
    assert!(socket.exists());
    bench.serve("web1", &socket).unwrap();

    let taken = bench.serve("web2", &socket).unwrap_err();
    assert_eq!(taken.kind, ErrorKind::Busy, "{taken}");
    let moved = bench.serve("web1", &bench.root.path().join("other.sock")).unwrap_err();
    assert_eq!(moved.kind, ErrorKind::Busy, "{moved}");
    for (bad, part) in [
        (PathBuf::from("web1.sock"), "no absolute path"),
        (bench.store().join("cdpd.sock"), "control socket"),
        (bench.root.path().join("missing/web2.sock"), "missing/web2.sock"),
    ] {
        let refusal = bench.serve("web2", &bad).unwrap_err();
        assert!(refusal.message.contains(part), "{refusal}");
    }
    assert!(bench.show("web2").unwrap().serving.is_none());

    bench.restart();
    assert_eq!(bench.show("web1").unwrap().serving.unwrap().status, ServingStatus::Listening);
    let refusal = bench.client.delete::<()>("/v1/volumes/web1").unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::Busy, "{refusal}");
    let unserved: Volume = bench.client.delete("/v1/volumes/web1/serve").unwrap();
    assert!(unserved.serving.is_none() && !socket.exists());
    bench.serve("web2", &socket).unwrap();
    bench.client.delete::<()>("/v1/volumes/web2?force=true").unwrap();
    assert!(!socket.exists());
    bench.stop();
}

#[test]
fn a_socket_that_cannot_be_made_at_start_is_made_later() {
    let mut bench = Bench::new();
    let directory = bench.root.path().join("run");
    std::fs::create_dir(&directory).unwrap();
    bench.create("web1", MIB).unwrap();
    bench.serve("web1", &directory.join("web1.sock")).unwrap();
    bench.stop();
    std::fs::remove_dir_all(&directory).unwrap();
    bench.start_again();
    let status = bench.show("web1").unwrap().serving.unwrap().status;
    assert!(matches!(status, ServingStatus::Failed(_)), "{status}");
    std::fs::create_dir(&directory).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.show("web1").unwrap().serving.unwrap().status != ServingStatus::Listening {
        assert!(std::time::Instant::now() < deadline, "it was not tried again");
        std::thread::sleep(Duration::from_millis(100));
    }
    bench.stop();
}

#[test]
fn the_store_shows_itself() {
    let mut bench = Bench::new();
    bench.create("web1", MIB).unwrap();
    let status: StoreStatus = bench.client.get("/v1/store").unwrap();
    assert_eq!(status.daemon.unwrap().pid, std::process::id());
    let mut segments = 0;
    let end: Count = bench
        .client
        .lines(Method::GET, "/v1/segments", &mut |step: Step<SegmentInfo>| {
            segments += u64::from(matches!(step, Step::Item(_)));
            true
        })
        .unwrap()
        .unwrap();
    assert!(end.count == segments && segments > 0, "{segments} of {}", end.count);
    let report: VerifyReport =
        bench.client.lines(Method::POST, "/v1/verify", &mut |_: Step<()>| true).unwrap().unwrap();
    assert!(report.findings.is_empty());
    bench.stop();
}

#[test]
fn bad_requests_get_json_and_do_no_harm() {
    let mut bench = Bench::new();
    for (name, part) in
        [("a/b", "no such resource"), ("a%20b", "not a valid volume name"), ("x", "no volume 'x'")]
    {
        let refusal = bench.show(name).unwrap_err();
        assert!(refusal.message.contains(part), "{name}: {refusal}");
    }
    for body in [
        json!({}),
        json!({ "name": "x", "size_bytes": 1, "sise": 2 }),
        json!({ "name": "-", "size_bytes": 1 }),
    ] {
        let refusal = bench.client.send::<Volume>(Method::POST, "/v1/volumes", &body).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Invalid, "{body}");
    }
    let refusal = bench.client.send::<Volume>(Method::PUT, "/v1/volumes", &json!({})).unwrap_err();
    assert!(refusal.message.contains("does not take this method"), "{refusal}");
    let long = json!({ "name": "x".repeat(100_000), "size_bytes": 1 });
    assert_eq!(
        bench.client.send::<Volume>(Method::POST, "/v1/volumes", &long).unwrap_err().kind,
        ErrorKind::Invalid
    );

    bench.create("web1", MIB).unwrap();
    for (query, part) in
        [("at=-5x", "is no instant"), ("when=head", "unknown field"), ("at=mark:none", "none")]
    {
        let refusal = bench.data(&format!("/v1/volumes/web1/data?{query}")).unwrap_err();
        assert!(refusal.message.contains(part), "{query}: {refusal}");
    }
    let refusal = bench.client.send::<Volume>(Method::POST, "/v1/volumes/x/import", &json!({})).unwrap_err();
    assert!(refusal.message.contains("hindsight.content"), "{refusal}");
    bench.stop();
}

#[test]
fn too_much_at_once_is_refused() {
    let mut bench = Bench::with(|config| config.limits.streams = 1);
    let frames = vec![start(64 * MIB), data(0, 7, 1 << 20), Frame::End];
    bench.import("img", frames).unwrap();
    // Big enough to stay under way while nobody reads it.
    let frames =
        [start(64 * MIB)].into_iter().chain((0..64).map(|n| data(n * MIB, 7, 1 << 20))).chain([Frame::End]);
    bench.import("big", frames.collect()).unwrap();
    let mut stream = bench.client.content("/v1/volumes/big/data").unwrap();
    Frame::read(&mut stream).unwrap();
    let refusal = bench.data("/v1/volumes/img/data").unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::Unavailable, "{refusal}");
    assert!(bench.show("img").is_ok());
    drop(stream);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while bench.data("/v1/volumes/img/data").is_err() {
        assert!(std::time::Instant::now() < deadline, "the stream that was dropped is still counted");
        std::thread::sleep(Duration::from_millis(20));
    }
    bench.stop();
}

#[test]
fn a_stop_does_not_wait_for_a_client_that_reads_nothing() {
    let mut bench = Bench::new();
    let frames =
        [start(64 * MIB)].into_iter().chain((0..64).map(|n| data(n * MIB, 7, 1 << 20))).chain([Frame::End]);
    bench.import("big", frames.collect()).unwrap();
    let mut stream = bench.client.content("/v1/volumes/big/data").unwrap();
    Frame::read(&mut stream).unwrap();
    let begun = std::time::Instant::now();
    bench.stop();
    assert!(begun.elapsed() < Duration::from_secs(20));
    // What was on its way still comes; then the stream says, or shows by stopping, that it is incomplete.
    let last = std::iter::from_fn(|| Frame::read(&mut stream).ok()).last();
    assert_ne!(last, Some(Frame::End));
}

#[test]
fn the_api_also_answers_over_tcp() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut bench = Bench::with(|config| config.http = Some(port));
    bench.create("web1", MIB).unwrap();
    let ask = |host: &str| {
        let stream = TcpStream::connect(port).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        ask_for_metrics(stream, host)
    };
    let metrics = ask(&port.to_string());
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("cdpd_volume_size_bytes{volume=\"web1\"} 1048576\n"), "{metrics}");
    assert!(metrics.contains("# TYPE cdpd_vhost_requests_total counter\n"), "{metrics}");
    assert!(ask("evil.example").starts_with("HTTP/1.1 400"));
    bench.stop();
}

#[test]
fn both_listeners_share_what_connections_there_may_be() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut bench = Bench::with(|config| (config.http, config.limits.connections) = (Some(port), 1));
    for name in ["web1", "web2"] {
        let stream = TcpStream::connect(port).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(ask_for_metrics(stream, &port.to_string()).starts_with("HTTP/1.1 200"));
        bench.create(name, MIB).unwrap();
    }
    bench.stop();
}

#[test]
fn a_second_daemon_is_refused_and_no_store_is_made_unasked() {
    let mut bench = Bench::new();
    let second = bench.runtime.block_on(Daemon::start(config(bench.root.path()))).err().unwrap();
    let refusal = format!("{second:#}");
    assert!(refusal.contains("stop the other cdpd"), "{refusal}");
    assert!(bench.show("none").is_err_and(|e| e.kind == ErrorKind::NotFound));
    bench.stop();
    assert!(Client::find(&bench.store()).unwrap().is_none());

    let mut absent = config(bench.root.path());
    absent.store = bench.root.path().join("absent");
    absent.create = false;
    let refusal = format!("{:#}", bench.runtime.block_on(Daemon::start(absent)).err().unwrap());
    assert!(refusal.contains("there is no store") && refusal.contains("mounted?"), "{refusal}");
    assert!(!bench.root.path().join("absent").exists());
}
