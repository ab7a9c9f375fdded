//! TLS with keys that server and client share.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use foreign_types::ForeignTypeRef;
use nbd_export::{ErrorKind, Exports, Listen, Server, ServerConfig, Tls, TlsCredentials, TlsMode};
use openssl::ssl::{Ssl, SslContextBuilder, SslMethod, SslStream, SslVersion};
use tempfile::TempDir;

use crate::client::{Client, Headers, cmd, opt, option, question, rep};
use crate::fixture::{CAPACITY, Fixture};
use crate::programs::{fails, run};
use crate::tls::Papers;

const ALICES: [u8; 32] = [0xa1; 32];
const BOBS: [u8; 16] = [0xb0; 16];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory with the server's file of keys, and those of clients, each in a directory as QEMU wants it.
pub(crate) struct Keys(TempDir);

impl Keys {
    pub(crate) fn new() -> Self {
        let keys = Self(tempfile::tempdir().unwrap());
        keys.write("server", &format!("alice:{}\nbob:{}\n", hex(&ALICES), hex(&BOBS)));
        keys.write("right", &format!("alice:{}\n", hex(&ALICES)));
        keys.write("wrong", &format!("alice:{}\n", hex(&[0xa2; 32])));
        keys.write("mallory", &format!("mallory:{}\n", hex(&ALICES)));
        keys
    }

    fn write(&self, whose: &str, text: &str) {
        fs::create_dir(self.directory(whose)).unwrap();
        let file = self.file(whose);
        fs::write(&file, text).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn directory(&self, whose: &str) -> PathBuf {
        self.0.path().join(whose)
    }

    fn file(&self, whose: &str) -> PathBuf {
        self.directory(whose).join("keys.psk")
    }

    pub(crate) fn tls(&self, mode: TlsMode) -> Tls {
        Tls { mode, credentials: TlsCredentials::PreSharedKeys { file: self.file("server") } }
    }

    fn server(&self, mode: TlsMode) -> Fixture {
        Fixture::with(None, |config| config.tls = Some(self.tls(mode)))
    }

    /// For libnbd, of that user with the key in that file.
    fn uri(&self, fixture: &Fixture, export: &str, user: &str, whose: &str) -> String {
        let (socket, file) = (fixture.socket(), self.file(whose));
        format!("nbds+unix://{user}@/{export}?socket={}&tls-psk-file={}", socket.display(), file.display())
    }

    /// QEMU's options for an image and its secret.
    fn qemu(&self, fixture: &Fixture, user: &str, whose: &str) -> [String; 2] {
        let (socket, directory) = (fixture.socket(), self.directory(whose));
        let (socket, directory) = (socket.display(), directory.display());
        [
            format!("tls-creds-psk,id=tls0,endpoint=client,dir={directory},username={user}"),
            format!("driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=tls0"),
        ]
    }
}

/// How a client goes about it.
#[derive(Clone, Copy)]
struct Manner {
    user: &'static str,
    key: &'static [u8],
    version: SslVersion,
    /// Of TLS 1.2 and before.
    suites: &'static str,
}

const MODERN: Manner =
    Manner { user: "alice", key: &ALICES, version: SslVersion::TLS1_3, suites: "PSK:@SECLEVEL=0" };
const OLDER: Manner = Manner { version: SslVersion::TLS1_2, suites: "ECDHE-PSK-CHACHA20-POLY1305", ..MODERN };

fn greeted(fixture: &Fixture) -> Client<UnixStream> {
    Client::greeted(&fixture.socket())
}

/// A client that speaks TLS over `stream`, before its handshake.
fn client<S: Read + Write>(stream: S, manner: Manner) -> SslStream<S> {
    let mut builder = SslContextBuilder::new(SslMethod::tls_client()).unwrap();
    builder.set_min_proto_version(Some(manner.version)).unwrap();
    builder.set_max_proto_version(Some(manner.version)).unwrap();
    builder.set_cipher_list(manner.suites).unwrap();
    builder.set_psk_client_callback(move |_, _, user, key| {
        user[..manner.user.len()].copy_from_slice(manner.user.as_bytes());
        user[manner.user.len()] = 0;
        key[..manner.key.len()].copy_from_slice(manner.key);
        Ok(manner.key.len())
    });
    SslStream::new(Ssl::new(&builder.build()).unwrap(), stream).unwrap()
}

/// The first message of a client's handshake.
pub(crate) fn hello(older: bool) -> Vec<u8> {
    /// Takes everything, and has no answer.
    #[derive(Default)]
    struct Sink(Vec<u8>);
    impl Read for Sink {
        fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut stream = client(Sink::default(), if older { OLDER } else { MODERN });
    assert_eq!(stream.connect().unwrap_err().code(), openssl::ssl::ErrorCode::WANT_READ);
    std::mem::take(&mut stream.get_mut().0)
}

/// Starts TLS; or tells how it has failed, on the first use at the latest.
fn encrypt(mut plain: Client<UnixStream>, manner: Manner) -> Result<Client<SslStream<UnixStream>>, String> {
    assert_eq!(plain.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
    let mut stream = client(plain.stream, manner);
    stream.connect().map_err(|e| e.to_string())?;
    // In TLS 1.3 it is only then that a client hears of a refusal of what it has sent last.
    stream.ssl_write(&option(opt::STARTTLS, &[])).map_err(|e| e.to_string())?;
    let mut reply = [0; 20];
    stream.ssl_read(&mut reply).map_err(|e| e.to_string())?;
    assert_eq!(reply[12..16], rep::ERR_INVALID.to_be_bytes(), "TLS is on already");
    let rest = u32::from_be_bytes(reply[16..].try_into().unwrap());
    let mut encrypted = Client::new(stream);
    encrypted.take(rest as usize);
    Ok(encrypted)
}

#[test]
fn with_the_key_all_is_as_without_tls() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let bob = Manner { user: "bob", key: &BOBS, ..MODERN };
    for (number, manner) in [MODERN, OLDER, bob].into_iter().enumerate() {
        let mut client = encrypt(greeted(&fixture), manner).unwrap();
        client.agree("disk", Headers::Extended, &["base:allocation"]);
        let data: Vec<u8> = (0..3 << 20).map(|byte: u32| (byte >> 9) as u8 ^ number as u8 | 1).collect();
        assert_eq!(client.write(0, 512, &data), 0);
        assert!(client.read(512, 3 << 20) == data);
        assert!(fixture.content(512, 3 << 20) == data);
        assert!(fixture.server.connections().iter().all(|connection| connection.tls));
        client.start(cmd::DISC, 0, 0, 0);
        let end = client.stream.ssl_read(&mut [0]).unwrap_err();
        assert_eq!(end.code(), openssl::ssl::ErrorCode::ZERO_RETURN, "TLS is ended properly: {end}");
    }
    fixture.nobody_is_left();
}

#[test]
fn long_replies_and_requests_side_by_side_are_kept_apart() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let mut client = encrypt(greeted(&fixture), MODERN).unwrap();
    client.agree("disk", Headers::Structured, &[]);
    let data: Vec<u8> = (0..32 << 20).map(|byte: u32| (byte >> 12) as u8 | 1).collect();
    assert_eq!(client.write(0, 0, &data), 0);
    let lengths: Vec<usize> = (0..12).map(|power| 512 << power).collect();
    let asked: Vec<u64> =
        lengths.iter().map(|length| client.start(cmd::READ, 0, 4096, *length as u64)).collect();
    for _ in &asked {
        let reply = client.reply();
        let length = lengths[asked.iter().position(|cookie| *cookie == reply.cookie).unwrap()];
        assert!(reply.data == data[4096..4096 + length], "{length}");
    }
    assert!(client.read(0, 32 << 20) == data);
}

#[test]
fn an_unknown_user_and_a_wrong_key_look_the_same() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    for manner in [MODERN, OLDER] {
        let refusal = |user, key| encrypt(greeted(&fixture), Manner { user, key, ..manner }).err().unwrap();
        let wrong = refusal("alice", &BOBS);
        assert!(wrong.contains("alert"), "{wrong}");
        assert_eq!(refusal("mallory", &ALICES), wrong);
        assert_eq!(refusal("alice\n\x1b[0m", &ALICES), wrong);
        assert_eq!(refusal("bob", &ALICES), wrong);
    }
    fixture.nobody_is_left();
}

#[test]
fn weak_and_foreign_ways_are_refused() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    for (version, suites) in [
        (SslVersion::TLS1_1, "PSK:@SECLEVEL=0"),
        (SslVersion::TLS1_2, "PSK-AES128-GCM-SHA256:PSK-AES256-CBC-SHA"),
        (SslVersion::TLS1_2, "ECDHE-PSK-AES128-CBC-SHA256"),
        (SslVersion::TLS1_2, "aNULL:@SECLEVEL=0"),
        (SslVersion::TLS1_2, "ECDHE-RSA-AES128-GCM-SHA256"),
    ] {
        let refused = encrypt(greeted(&fixture), Manner { version, suites, ..MODERN }).err();
        assert!(refused.is_some(), "{suites}");
    }
    // With certificates.
    let papers = Papers::new();
    for with_certificate in [false, true] {
        let mut plain = greeted(&fixture);
        assert_eq!(plain.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
        let mut stream = rustls::StreamOwned::new(papers.client(with_certificate), plain.stream);
        let refused = stream.write_all(&option(opt::LIST, &[])).and_then(|()| stream.read(&mut [0]));
        assert!(refused.is_err(), "{refused:?}");
    }
    // And with a key where the server has certificates.
    let other = Fixture::with(None, |config| config.tls = Some(papers.tls(TlsMode::Required, false)));
    let uri = keys.uri(&other, "disk", "alice", "right");
    assert!(fails("libnbd-bin", Command::new("nbdinfo").arg(uri)).contains("gnutls_handshake"));
    other.nobody_is_left();
    fixture.nobody_is_left();
}

#[test]
fn nothing_is_told_and_nothing_agreed_on_in_the_open() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let mut client = greeted(&fixture);
    for kind in [opt::LIST, opt::GO, opt::INFO, opt::STRUCTURED_REPLY] {
        assert_eq!(client.ask(kind, &question("disk", &[]))[0].0, rep::ERR_TLS_REQD);
    }
    let mut injected = option(opt::STARTTLS, &[]);
    injected.extend(option(opt::GO, &question("disk", &[])));
    client.send(&injected);
    let mut answer = Vec::new();
    let _ = client.stream.read_to_end(&mut answer);
    assert!(answer.is_empty(), "not even an acknowledgement: {answer:?}");
    for garbage in [&[0xff; 100][..], &[0x16, 3, 1, 0xff, 0xff], b""] {
        let mut client = greeted(&fixture);
        assert_eq!(client.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
        client.stream.write_all(garbage).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.is_closed());
    }
    fixture.nobody_is_left();

    let fixture = keys.server(TlsMode::Allowed);
    let mut client = greeted(&fixture);
    client.ask(opt::STRUCTURED_REPLY, &[]);
    client.ask(opt::INFO, &question("past", &[]));
    let mut client = encrypt(client, MODERN).unwrap();
    client.agree("disk", Headers::Simple, &[]);
    assert_eq!(client.read(0, 512), [0; 512], "by a simple reply");
    Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]).read(0, 512);
}

/// A socket with somebody in between, who at some time flips a bit.
struct Tampered {
    socket: UnixStream,
    flip: bool,
}

impl Read for Tampered {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.read(into)
    }
}

impl Write for Tampered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut bytes = bytes.to_vec();
        if self.flip {
            *bytes.last_mut().unwrap() ^= 1;
        }
        self.socket.write_all(&bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_was_tampered_with_is_not_carried_out() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    for manner in [MODERN, OLDER] {
        let mut plain = greeted(&fixture);
        assert_eq!(plain.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
        let mut stream = client(Tampered { socket: plain.stream, flip: false }, manner);
        stream.connect().unwrap();
        let mut client = Client::new(stream);
        client.agree("disk", Headers::Structured, &[]);
        assert_eq!(client.write(0, 0, &[1; 512]), 0);
        client.stream.get_mut().flip = true;
        client.start_write(0, 0, &[2; 512]);
        let alert = client.stream.ssl_read(&mut [0]).unwrap_err().to_string();
        assert!(alert.contains("bad record mac"), "{alert}");
        assert_eq!(fixture.content(0, 512), [1; 512]);
    }
    fixture.nobody_is_left();
}

unsafe extern "C" {
    /// Of OpenSSL; the crate has no name for it.
    fn SSL_key_update(ssl: *mut std::ffi::c_void, kind: std::ffi::c_int) -> std::ffi::c_int;
}

#[test]
fn fresh_keys_are_to_be_had_but_not_without_end() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let mut client = encrypt(greeted(&fixture), MODERN).unwrap();
    client.agree("disk", Headers::Structured, &[]);
    let update = |client: &mut Client<SslStream<UnixStream>>| {
        // SAFETY: the connection lives while it is borrowed, and nobody else uses it; 1 is SSL_KEY_UPDATE_REQUESTED.
        assert_eq!(unsafe { SSL_key_update(client.stream.ssl().as_ptr().cast(), 1) }, 1);
        client.stream.do_handshake()
    };
    for round in 0..2000 {
        update(&mut client).unwrap();
        assert_eq!(client.write(0, 0, &[round as u8; 512]), 0, "after update {round}");
    }
    let refused = (0..1_000_000).any(|_| update(&mut client).is_err());
    assert!(refused, "a client that only updates is left");
    fixture.nobody_is_left();
}

#[test]
fn a_server_without_usable_keys_does_not_start() {
    let keys = Keys::new();
    let fixture = Fixture::new();
    let start = |file: PathBuf| {
        let listen = Listen::Unix { path: fixture.directory.path().join("other.sock"), mode: 0o600 };
        let mut config = ServerConfig::new(vec![listen]);
        let credentials = TlsCredentials::PreSharedKeys { file };
        config.tls = Some(Tls { mode: TlsMode::Required, credentials });
        Server::start(config, std::sync::Arc::clone(&fixture.exports) as std::sync::Arc<dyn Exports>)
    };
    let file = keys.file("server");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    for file in [file.clone(), keys.0.path().join("missing")] {
        let error = start(file.clone()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Tls);
        assert!(error.to_string().contains(&file.display().to_string()));
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(start(file).is_ok());
}

#[test]
fn libnbd_copies_a_whole_disk_and_back() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let uri = keys.uri(&fixture, "disk", "alice", "right");
    let told = run("libnbd-bin", Command::new("nbdinfo").arg("--json").arg(&uri));
    assert!(told.contains("\"TLS\": true"), "{told}");
    let (from, to) = (fixture.directory.path().join("from.img"), fixture.directory.path().join("to.img"));
    let data: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 * 31 + at) as u8 | 1).collect();
    fs::write(&from, &data).unwrap();
    run("libnbd-bin", Command::new("nbdcopy").arg("--flush").arg(&from).arg(&uri));
    assert!(fixture.content(0, CAPACITY) == data);
    run("libnbd-bin", Command::new("nbdcopy").arg(&uri).arg(&to));
    assert!(fs::read(&to).unwrap() == data);
    fixture.nobody_is_left();
}

#[test]
fn libnbd_is_refused_without_its_key() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    for (user, whose) in [("alice", "wrong"), ("mallory", "mallory")] {
        let uri = keys.uri(&fixture, "disk", user, whose);
        let told = fails("libnbd-bin", Command::new("nbdinfo").arg(uri));
        assert!(told.contains("gnutls_handshake"), "{told}");
    }
    // Without TLS it is told that it needs some, in a message that this libnbd keeps to itself.
    let told = fails("libnbd-bin", Command::new("nbdinfo").arg(fixture.uri("disk")));
    assert!(told.contains("nbd_opt_go"), "{told}");
    let socket = fixture.socket();
    let with_certificates = format!("nbds+unix://localhost/disk?socket={}", socket.display());
    let told = fails("libnbd-bin", Command::new("nbdinfo").arg(with_certificates));
    assert!(told.contains("gnutls_handshake"), "{told}");
    fixture.nobody_is_left();
}

#[test]
fn qemu_comes_with_its_key() {
    let keys = Keys::new();
    let fixture = keys.server(TlsMode::Required);
    let [secret, image] = keys.qemu(&fixture, "alice", "right");
    let mut info = Command::new("qemu-img");
    info.args(["info", "--output=json", "--object", &secret, "--image-opts", &image]);
    let told = run("qemu-utils", &mut info);
    assert!(told.contains("\"virtual-size\": 67108864"), "{told}");
    let mut qemu = Command::new("qemu-io");
    qemu.args([
        "--object",
        &secret,
        "--image-opts",
        "-c",
        "write -P 7 64k 1M",
        "-c",
        "read -P 7 64k 1M",
        &image,
    ]);
    let told = run("qemu-utils", &mut qemu);
    assert!(!told.contains("verification failed"), "{told}");
    assert_eq!(fixture.content(65536, 4096), [7; 4096]);
    for (user, whose) in [("alice", "wrong"), ("mallory", "mallory")] {
        let [secret, image] = keys.qemu(&fixture, user, whose);
        let mut info = Command::new("qemu-img");
        info.args(["info", "--object", &secret, "--image-opts", &image]);
        let told = fails("qemu-utils", &mut info);
        assert!(told.contains("TLS"), "{told}");
    }
    fixture.nobody_is_left();
}
