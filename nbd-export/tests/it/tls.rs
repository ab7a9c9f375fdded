//! TLS: who must, who may, and who tries to cheat.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use nbd_export::{Tls, TlsCredentials, TlsMode};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tempfile::TempDir;

use crate::client::{Client, Headers, cmd, opt, option, question, rep};
use crate::fixture::{DEADLINE, Fixture, eventually};
use crate::programs::run;

/// Certificates in the files that libnbd and QEMU look for.
pub(crate) struct Papers(TempDir);

impl Papers {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| fs::write(directory.path().join(name), text).unwrap();
        let authority_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write("ca-cert.pem", params.self_signed(&authority_key).unwrap().pem());
        let authority = Issuer::new(params, authority_key);
        for who in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            write(&format!("{who}-cert.pem"), params.signed_by(&key, &authority).unwrap().pem());
            write(&format!("{who}-key.pem"), key.serialize_pem());
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn tls(&self, mode: TlsMode, ask_for_client: bool) -> Tls {
        let credentials = TlsCredentials::Certificates {
            certificates: self.path("server-cert.pem"),
            key: self.path("server-key.pem"),
            client_authorities: ask_for_client.then(|| self.path("ca-cert.pem")),
        };
        Tls { mode, credentials }
    }

    fn server(&self, mode: TlsMode, ask_for_client: bool) -> Fixture {
        Fixture::with(None, |config| config.tls = Some(self.tls(mode, ask_for_client)))
    }

    pub(crate) fn client(&self, with_certificate: bool) -> ClientConnection {
        let certificate = |name: &str| CertificateDer::from_pem_file(self.path(name)).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate("ca-cert.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let config = match with_certificate {
            true => {
                let key = PrivateKeyDer::from_pem_file(self.path("client-key.pem")).unwrap();
                builder.with_client_auth_cert(vec![certificate("client-cert.pem")], key).unwrap()
            }
            false => builder.with_no_client_auth(),
        };
        ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap()
    }
}

type Encrypted = Client<StreamOwned<ClientConnection, UnixStream>>;

fn encrypt(mut plain: Client<UnixStream>, connection: ClientConnection) -> Encrypted {
    assert_eq!(plain.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
    Client::new(StreamOwned::new(connection, plain.stream))
}

fn greeted(socket: &Path) -> Client<UnixStream> {
    Client::greeted(socket)
}

#[test]
fn with_tls_required_nothing_is_told_before() {
    let papers = Papers::new();
    let fixture = papers.server(TlsMode::Required, false);
    let mut client = greeted(&fixture.socket());
    for kind in [opt::LIST, opt::GO, opt::INFO, opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS, 77] {
        assert_eq!(client.ask(kind, &question("disk", &[]))[0].0, rep::ERR_TLS_REQD);
    }
    let mut other = greeted(&fixture.socket());
    other.send(&option(opt::EXPORT_NAME, b"disk"));
    assert!(other.is_closed());

    let mut client = encrypt(client, papers.client(false));
    assert_eq!(client.ask(opt::STARTTLS, &[])[0].0, rep::ERR_INVALID, "once is enough");
    client.agree("disk", Headers::Extended, &["base:allocation"]);
    let data: Vec<u8> = (0..3 << 20).map(|byte: u32| (byte >> 9) as u8 | 1).collect();
    assert_eq!(client.write(0, 0, &data), 0);
    assert_eq!(client.read(0, 3 << 20), data);
    assert!(fixture.server.connections().iter().any(|connection| connection.tls));
    client.start(cmd::DISC, 0, 0, 0);
    assert!(client.is_closed());
    fixture.nobody_is_left();
}

#[test]
fn what_was_agreed_on_in_the_open_is_forgotten() {
    let papers = Papers::new();
    let fixture = papers.server(TlsMode::Allowed, false);
    let mut client = greeted(&fixture.socket());
    client.ask(opt::STRUCTURED_REPLY, &[]);
    client.ask(opt::INFO, &question("past", &[]));
    let export = || fixture.server.connections()[0].export.clone();
    assert_eq!(export().as_deref(), Some("past"));
    let mut client = encrypt(client, papers.client(false));
    eventually("the export is given up", || export().is_none());
    client.agree("disk", Headers::Simple, &[]);
    assert_eq!(client.read(0, 512), [0; 512], "by a simple reply");
    // Without TLS it goes as well.
    Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]).read(0, 512);
}

#[test]
fn plain_text_behind_the_wish_for_tls_ends_it() {
    let papers = Papers::new();
    let fixture = papers.server(TlsMode::Required, false);
    let mut client = greeted(&fixture.socket());
    let mut injected = option(opt::STARTTLS, &[]);
    injected.extend(option(opt::GO, &question("disk", &[])));
    client.send(&injected);
    let mut answer = Vec::new();
    let _ = client.stream.read_to_end(&mut answer);
    assert!(answer.is_empty(), "not even an acknowledgement: {answer:?}");
    // And garbage where a TLS handshake should be.
    let mut client = greeted(&fixture.socket());
    assert_eq!(client.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
    client.stream.write_all(&[0xff; 100]).unwrap();
    assert!(client.is_closed());
    fixture.nobody_is_left();
}

#[test]
fn a_stop_does_not_wait_for_a_tls_handshake() {
    let papers = Papers::new();
    let mut fixture = papers.server(TlsMode::Required, false);
    let mut client = greeted(&fixture.socket());
    assert_eq!(client.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
    let start = Instant::now();
    assert_eq!(fixture.server.shutdown(DEADLINE), 0);
    assert!(start.elapsed() < DEADLINE / 2);
    assert!(client.is_closed());
    fixture.nobody_is_left();
}

#[test]
fn clients_show_their_certificate_where_it_is_asked_for() {
    let papers = Papers::new();
    let fixture = papers.server(TlsMode::Required, true);
    let mut known = encrypt(greeted(&fixture.socket()), papers.client(true));
    known.agree("disk", Headers::Structured, &[]);
    assert_eq!(known.read(0, 512), [0; 512]);
    for stranger in [papers.client(false), Papers::new().client(true)] {
        let mut client = encrypt(greeted(&fixture.socket()), stranger);
        let refused =
            client.stream.write_all(&option(opt::LIST, &[])).and_then(|()| client.stream.read(&mut [0]));
        assert!(refused.is_err() || refused.is_ok_and(|count| count == 0));
    }
}

#[test]
fn without_certificates_tls_is_refused() {
    let fixture = Fixture::new();
    assert_eq!(greeted(&fixture.socket()).ask(opt::STARTTLS, &[])[0].0, rep::ERR_POLICY);
}

#[test]
fn libnbd_and_qemu_come_by_tls() {
    let papers = Papers::new();
    let fixture = papers.server(TlsMode::Required, true);
    let (socket, certificates) = (fixture.socket(), papers.0.path().display().to_string());
    let uri =
        format!("nbds+unix://localhost/disk?socket={}&tls-certificates={certificates}", socket.display());
    let told = run("libnbd-bin", Command::new("nbdinfo").arg("--json").arg(&uri));
    assert!(told.contains("\"TLS\": true"), "{told}");
    let secret = format!("tls-creds-x509,id=tls,endpoint=client,dir={certificates},verify-peer=on");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls,tls-hostname=localhost",
        socket.display()
    );
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
}
