//! Starting, ending, and ending others.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nbd_export::{Address, ErrorKind, Exports, Listen, Server, ServerConfig, Tls, TlsCredentials, TlsMode};

use crate::client::{Client, Headers, cmd};
use crate::fixture::{DEADLINE, Fixture, eventually, late};

#[test]
fn a_stop_carries_out_and_answers_what_was_taken() {
    let mut fixture = Fixture::with(late(Duration::from_millis(500)), |_| {});
    let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
    let mut idle = Client::greeted(&fixture.socket());
    for block in 0..50 {
        client.start_write(0, block * 512, &[7; 512]);
    }
    eventually("all are taken", || fixture.server.connections()[0].requests == 50);
    let answered = std::thread::spawn(move || {
        let errors: u32 = (0..50).map(|_| client.reply().error).sum();
        (errors, client.is_closed())
    });
    let idle = std::thread::spawn(move || idle.is_closed());
    assert_eq!(fixture.server.shutdown(DEADLINE), 0);
    assert_eq!(answered.join().unwrap(), (0, true));
    assert!(idle.join().unwrap());
    assert_eq!(fixture.content(0, 25600), [7; 25600]);
    assert!(!fixture.socket().exists());
    fixture.nobody_is_left();
    assert_eq!(fixture.server.shutdown(DEADLINE), 0, "once is enough");
}

#[test]
fn a_client_that_does_not_listen_holds_up_no_stop() {
    let mut fixture = Fixture::new();
    let mut deaf = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    assert_eq!(deaf.write(0, 0, &vec![1; 8 << 20]), 0);
    deaf.start(cmd::READ, 0, 0, 8 << 20);
    eventually("the read is taken", || fixture.server.connections()[0].requests == 2);
    let start = Instant::now();
    assert_eq!(fixture.server.shutdown(Duration::from_millis(300)), 0);
    assert!(start.elapsed() < DEADLINE / 2);
    fixture.nobody_is_left();
}

#[test]
fn who_is_disconnected_has_nothing_in_flight_any_more() {
    let fixture = Fixture::with(late(Duration::from_millis(300)), |_| {});
    let mut stays = Client::ready(&fixture.socket(), "past", Headers::Simple, &[]);
    let mut goes = Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]);
    for block in 0..20 {
        goes.start_write(0, block * 512, &[7; 512]);
    }
    eventually("all are taken", || {
        fixture.server.connections().iter().any(|connection| connection.requests == 20)
    });
    let disk = |connection: &nbd_export::ConnectionInfo| connection.export.as_deref() == Some("disk");
    assert_eq!(fixture.server.disconnect(disk, DEADLINE), 0);
    // Carried out, though nobody heard of it, and never later than now.
    assert_eq!(fixture.content(0, 20 * 512), [7; 20 * 512]);
    assert!(goes.is_closed());
    assert_eq!(stays.read(0, 512), [7; 512]);
    let left = fixture.server.connections();
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].export.as_deref(), left[0].read_bytes, left[0].tls), (Some("past"), 512, false));
    assert!(left[0].peer.starts_with("pid "));
}

#[test]
fn tcp_and_inherited_sockets_are_served_too() {
    let inherited = TcpListener::bind("127.0.0.1:0").unwrap();
    let fixture = Fixture::with(None, |config| {
        config.listen.push(Listen::Tcp("127.0.0.1:0".parse().unwrap()));
        config.listen.push(Listen::Inherited(inherited.into()));
    });
    let addresses = fixture.server.addresses();
    assert_eq!(addresses[0], Address::Unix(Some(fixture.socket())));
    for address in &addresses[1..] {
        let Address::Tcp(address) = address else { panic!("{address} is no TCP address") };
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut client = Client::new(stream);
        client.greet(3);
        client.agree("disk", Headers::Extended, &[]);
        assert_eq!(client.write(0, 0, &vec![4; 1 << 20]), 0);
        assert_eq!(client.read(0, 1 << 20), vec![4; 1 << 20]);
    }
}

#[test]
fn what_cannot_be_started_leaves_nothing() {
    let fixture = Fixture::new();
    let exports = || std::sync::Arc::clone(&fixture.exports) as std::sync::Arc<dyn Exports>;
    let start = |listen| Server::start(ServerConfig::new(listen), exports()).err().unwrap().kind();
    let unix = |path| Listen::Unix { path, mode: 0o600 };
    let other = fixture.directory.path().join("other.sock");
    assert_eq!(start(vec![unix(other.clone()), unix(fixture.socket())]), ErrorKind::InUse);
    assert!(!other.exists());
    assert_eq!(start(vec![]), ErrorKind::Config);
    let mut config = ServerConfig::new(vec![unix(other.clone())]);
    let missing = fixture.directory.path().join("missing.pem");
    let (certificates, key) = (missing.clone(), missing);
    let credentials = TlsCredentials::Certificates { certificates, key, client_authorities: None };
    config.tls = Some(Tls { mode: TlsMode::Required, credentials });
    assert_eq!(Server::start(config, exports()).err().unwrap().kind(), ErrorKind::Tls);
    let mut config = ServerConfig::new(vec![unix(other.clone())]);
    config.limits.max_request = 64 << 20;
    assert_eq!(Server::start(config, exports()).err().unwrap().kind(), ErrorKind::Config);
    assert!(!other.exists());
    assert_eq!(Client::ready(&fixture.socket(), "disk", Headers::Simple, &[]).read(0, 512), [0; 512]);
}
