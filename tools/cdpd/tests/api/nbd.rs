//! Volumes and their instants over NBD: what names mean to several clients, and who is connected.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cdp_store::Store;
use cdpd::api::{NbdConnection, Supervised, Volume};
use cdpd::{Config, Daemon};
use hyper::Method;
use serde_json::json;

use crate::destruction::checkpoint;
use crate::machines::wait_until;
use crate::{Bench, MIB, config};

const DEADLINE: Duration = Duration::from_secs(20);
/// For so long a relative instant means the same, as docs/operations.md has it.
const SAME_INSTANT: Duration = Duration::from_secs(10);

/// `NBD_CMD_READ`, `NBD_CMD_WRITE` and `NBD_CMD_FLUSH`.
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// A client, as small as it gets: `NBD_OPT_EXPORT_NAME` and simple replies.
pub(crate) struct NbdClient(UnixStream);

impl NbdClient {
    /// Opens an export; none if it is refused, which this handshake says by hanging up.
    fn open(socket: &Path, export: &str) -> Option<Self> {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // NBD_FLAG_C_FIXED_NEWSTYLE and NBD_FLAG_C_NO_ZEROES, then the option.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1_u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello).unwrap();
        let mut size_and_flags = [0; 10];
        match stream.read_exact(&mut size_and_flags) {
            Ok(()) => Some(Self(stream)),
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                None
            }
            Err(error) => panic!("{export}: {error}"),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.request(READ, offset, len, &[]);
        let mut bytes = vec![0; len as usize];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.request(WRITE, offset, bytes.len() as u32, bytes);
    }

    pub(crate) fn flush(&mut self) {
        self.request(FLUSH, 0, 0, &[]);
    }

    /// Sends a request, and reads what says that it has succeeded.
    fn request(&mut self, kind: u16, offset: u64, len: u32, payload: &[u8]) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(b"a cookie");
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(payload);
        self.0.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(reply[4..8], [0; 4], "the request has failed");
        assert_eq!(&reply[8..], b"a cookie");
    }
}

/// Has a daemon serve NBD, too; every head can be written to.
fn serve_nbd(config: &mut Config) {
    let address = format!("unix:{}", config.store.with_file_name("nbd.sock").display());
    config.nbd.listen = vec![address.parse().unwrap()];
    config.nbd.writable = vec!["*".to_owned()];
}

impl Bench {
    pub(crate) fn with_nbd() -> Self {
        Self::with(serve_nbd)
    }

    fn nbd_socket(&self) -> PathBuf {
        self.store().with_file_name("nbd.sock")
    }

    /// A client that has an export open.
    pub(crate) fn nbd(&self, export: &str) -> NbdClient {
        NbdClient::open(&self.nbd_socket(), export).unwrap_or_else(|| panic!("{export} is refused"))
    }

    fn connections(&self) -> Vec<NbdConnection> {
        self.client.get("/v1/nbd/connections").unwrap()
    }
}

#[test]
fn the_list_of_clients_says_what_each_has_open_and_has_done() {
    let mut bench = Bench::with_nbd();
    bench.create("web1", MIB).unwrap();
    assert!(bench.connections().is_empty());
    let mut writer = bench.nbd("web1");
    writer.write(4096, &[5; 8192]);
    let past = format!("web1@seq:{}", bench.show("web1").unwrap().head.seq);
    let mut reader = bench.nbd(&past);
    assert_eq!(reader.read(4096, 4096), [5; 4096]);
    assert_eq!(reader.read(0, 512), [0; 512]);

    let list = bench.connections();
    let done = |one: &NbdConnection| {
        let export = one.export.clone().unwrap();
        (export, one.read_bytes, one.written_bytes, one.requests)
    };
    let expected = [("web1".to_owned(), 0, 8192, 1), (past, 4608, 0, 2)];
    assert_eq!(list.iter().map(done).collect::<Vec<_>>(), expected);
    let own = format!("pid {},", std::process::id());
    assert!(list.iter().all(|one| one.peer.starts_with(&own) && !one.tls), "{list:?}");
    assert!(list[0].id < list[1].id);

    drop(writer);
    wait_until("the writer is gone", || bench.connections().len() == 1);
    assert_eq!(bench.connections()[0].id, list[1].id);
    bench.stop();
}

#[test]
fn a_scratch_view_is_one_for_all_who_have_it_open_by_its_name() {
    let mut bench = Bench::with_nbd();
    let at = bench.filled("web1");
    let name = format!("web1@seq:{at}:scratch");
    let [mut one, mut other] = [bench.nbd(&name), bench.nbd(&name)];
    one.write(0, &[9; 4096]);
    assert_eq!(other.read(0, 8192), [[9_u8; 4096], [7; 4096]].concat());
    other.write(4096, &[8; 4096]);
    assert_eq!(one.read(0, 8192), [[9_u8; 4096], [8; 4096]].concat());
    // The same instant by another name is another view.
    let mut apart = bench.nbd("web1@head:scratch");
    assert_eq!(apart.read(0, 8192), [7; 8192]);

    // It stays as long as anybody has it open, and goes with the last.
    drop(one);
    wait_until("one of three is gone", || bench.connections().len() == 2);
    let mut late = bench.nbd(&name);
    assert_eq!(late.read(0, 8192), [[9_u8; 4096], [8; 4096]].concat());
    drop((other, late));
    wait_until("only the one that is apart is left", || bench.connections().len() == 1);
    assert_eq!(bench.nbd(&name).read(0, 8192), [7; 8192]);
    assert_eq!(bench.sevens("web1", "head").len(), 4);
    bench.stop();
}

#[test]
fn a_scratch_view_is_of_the_volume_that_has_the_name_now() {
    let mut bench = Bench::with_nbd();
    bench.filled("web1");
    let mut first = bench.nbd("web1@head:scratch");
    assert_eq!(first.read(0, 4096), [7; 4096]);
    let name = json!({ "name": "web0" });
    let _: Volume = bench.client.send(Method::PATCH, "/v1/volumes/web1", &name).unwrap();
    bench.create("web1", MIB).unwrap();
    bench.nbd("web1").write(0, &[1; 4096]);
    assert_eq!(bench.nbd("web1@head:scratch").read(0, 4096), [1; 4096]);
    assert_eq!(first.read(0, 4096), [7; 4096]);
    bench.stop();
}

#[test]
fn a_head_that_is_reverted_by_force_loses_its_clients_whatever_it_was_called_when_they_came() {
    let mut bench = Bench::with_nbd();
    let at = bench.filled("web1");
    let mut cut_off = bench.nbd("web1");
    cut_off.write(0, &[1; 4096]);
    let name = json!({ "name": "web0" });
    let _: Volume = bench.client.send(Method::PATCH, "/v1/volumes/web1", &name).unwrap();
    bench.create("web1", MIB).unwrap();
    let (mut other, mut past) = (bench.nbd("web1"), bench.nbd("web0@head"));
    other.write(0, &[2; 4096]);

    bench.revert("web0", &format!("seq:{at}"), true).unwrap();
    let left: Vec<u64> = bench.connections().iter().map(|one| one.id).collect();
    assert_eq!(left, [2, 3]);
    assert_eq!(other.read(0, 4096), [2; 4096]);
    assert_eq!(past.read(0, 4096), [1; 4096]);
    drop(cut_off);
    assert_eq!(bench.nbd("web0").read(0, 4096), [7; 4096]);

    // Those who came by the new volume's name are cut off with that one.
    bench.revert("web1", "head", true).unwrap();
    wait_until("its client is gone", || bench.connections().iter().all(|one| one.id != 2));
    assert_eq!(past.read(0, 4096), [1; 4096]);
    bench.stop();
}

#[test]
fn no_qemu_is_ended_for_a_revert_that_a_client_of_its_disk_prevents() {
    let mut bench = Bench::with_nbd();
    bench.create("web1", MIB).unwrap();
    bench.register("vm", "web1");
    bench.stop();
    let mut config = config(bench.root.path());
    let store = Store::open(&config.store, config.options).unwrap();
    let to = checkpoint(&store, &"vm".parse().unwrap(), false);
    store.close().unwrap();
    drop(store);
    serve_nbd(&mut config);
    bench.daemon = Some(bench.runtime.block_on(Daemon::start(config)).unwrap());

    let supervisor = bench.supervise(|_| ());
    let client = bench.nbd("web1");
    for disks_only in [false, true] {
        let refused = bench.try_to_go_back(to, disks_only);
        assert!(refused.message.contains("volume 'web1' open over NBD"), "{refused}");
    }
    assert_eq!(bench.vm("vm").supervised, Some(Supervised::Starting));
    let past = bench.nbd("web1@head");
    drop(client);
    wait_until("only the past is open", || bench.connections().len() == 1);
    assert!(bench.try_to_go_back(to, false).message.contains("has ended"));
    supervisor.join().unwrap().unwrap();
    drop(past);
    bench.stop();
}

/// Waits until a block that was just written is in the past of a second ago, asked for in words that nobody has used.
fn wait_for_a_second(bench: &Bench, content: [u8; 4096], words: &mut u64) {
    wait_until("what was written is a second old", || {
        *words += 1;
        let at = format!("web1@-{}us", 1_000_000 + *words);
        bench.nbd(&at).read(0, 4096) == content
    });
}

#[test]
fn a_relative_instant_is_the_same_for_ten_seconds_and_then_another() {
    let mut bench = Bench::with_nbd();
    bench.create("web1", MIB).unwrap();
    let (mut head, socket, mut words) = (bench.nbd("web1"), bench.nbd_socket(), 0);
    for attempt in 1..=10_u8 {
        let name = format!("web1@-{}ms", 1000 + u32::from(attempt));
        let (mut begun, mut first) = (Instant::now(), None);
        wait_until("its history is old enough", || {
            begun = Instant::now();
            first = NbdClient::open(&socket, &name);
            first.is_some()
        });
        let mut first = first.unwrap();
        let before = first.read(0, 4096);
        let content = [attempt; 4096];
        assert_ne!(before, content);
        head.write(0, &content);
        wait_for_a_second(&bench, content, &mut words);
        let again = bench.nbd(&name).read(0, 4096);
        let view = bench.nbd(&format!("{name}:scratch")).read(0, 4096);
        if begun.elapsed() >= SAME_INSTANT {
            // This machine was too slow; nothing follows from that.
            continue;
        }
        assert_eq!(again, before, "who comes second reads another disk");
        assert_eq!(view, before, "the writable view is of another disk");
        assert_eq!(first.read(0, 4096), before, "what is open has changed");
        wait_until("it means another instant", || bench.nbd(&name).read(0, 4096) == content);
        assert_eq!(first.read(0, 4096), before, "what is open has changed");
        return bench.stop();
    }
    panic!("in none of ten attempts a second client came in time");
}
