//! Conversations that begin well and go wrong somewhere.
//!
//! Each is made of one seed: a handshake and requests that would be right, of which bytes are then changed, left out,
//! doubled or made up. Whatever comes: no panic, no hang, and the next client is served. `NBD_FUZZ_SECONDS` says for how
//! long (2 without it); a failure prints its seed, which `NBD_FUZZ_SEED` runs alone.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nbd_export::{Limits, TlsMode};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::client::{Client, Headers, cmd, connect, flag, opt, option, queries, question, rep};
use crate::fixture::{CAPACITY, Fixture};
use crate::psk::{Keys, hello};
use crate::tls::Papers;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// A number of the kind at which things break.
fn number(random: &mut SmallRng) -> u64 {
    let edges = [0, 1, 7, 511, 512, 4096, 65535, 1 << 16, 32 << 20, (32 << 20) + 1, CAPACITY - 512, CAPACITY];
    let high = [u64::from(u32::MAX), 1 << 32, 1 << 63, u64::MAX, u64::MAX - 511];
    match random.random_range(0..4) {
        0 => *high.choose(random).unwrap(),
        1 => random.random::<u64>() >> random.random_range(0..64),
        _ => *edges.choose(random).unwrap(),
    }
}

fn handshake(random: &mut SmallRng, bytes: &mut Vec<u8>) -> Headers {
    let mut headers = Headers::Simple;
    let names = ["", "disk", "past", "busy", "nothing", "\0", "ü"];
    let contexts =
        ["base:allocation", "base:", "qemu:", "qemu:dirty-bitmap:since@mark", "", "x:y", "nocolon"];
    for _ in 0..random.random_range(0..8) {
        let name = *names.choose(random).unwrap();
        match random.random_range(0..10) {
            0 => bytes.extend(option(opt::LIST, &[])),
            1 | 2 => {
                bytes.extend(option(opt::STRUCTURED_REPLY, &[]));
                headers = if headers == Headers::Simple { Headers::Structured } else { headers };
            }
            3 => {
                bytes.extend(option(opt::EXTENDED_HEADERS, &[]));
                headers = Headers::Extended;
            }
            4 | 5 => {
                let kind = *[opt::SET_META_CONTEXT, opt::LIST_META_CONTEXT].choose(random).unwrap();
                let wanted: Vec<&str> =
                    (0..random.random_range(0..20)).map(|_| *contexts.choose(random).unwrap()).collect();
                bytes.extend(option(kind, &queries(name, &wanted)));
            }
            6 | 7 => bytes.extend(option(opt::INFO, &question(name, &[0, 1, 2, 3, 999]))),
            8 => bytes.extend(option(opt::STARTTLS, &[])),
            _ => {
                let length = random.random_range(0..100);
                let noise: Vec<u8> = (0..length).map(|_| random.random()).collect();
                bytes.extend(option(random.random_range(0..20), &noise));
            }
        }
    }
    match random.random_range(0..4) {
        0 => bytes.extend(option(opt::EXPORT_NAME, b"disk")),
        _ => {
            bytes.extend(option(opt::SET_META_CONTEXT, &queries("disk", &contexts[..1])));
            bytes.extend(option(opt::GO, &question("disk", &[])));
        }
    }
    headers
}

fn requests(random: &mut SmallRng, headers: Headers, bytes: &mut Vec<u8>) {
    let mut client = Client::new(std::io::empty());
    client.headers = headers;
    for _ in 0..random.random_range(0..30) {
        let command = random.random_range(0..9);
        let flags = match random.random_range(0..4) {
            0 => random.random::<u16>() & random.random::<u16>(),
            1 => flag::FUA,
            _ => 0,
        };
        let wild = random.random_ratio(1, 5);
        let offset = if wild { number(random) } else { random.random_range(0..CAPACITY / 512) * 512 };
        let mut length = if wild { number(random) } else { random.random_range(0..64) * 512 };
        let payload = command == cmd::WRITE || flags & flag::PAYLOAD_LEN != 0;
        let flags = if command == cmd::WRITE && headers == Headers::Extended {
            flags | flag::PAYLOAD_LEN
        } else {
            flags
        };
        if payload && random.random_ratio(9, 10) {
            length = length.min(65536);
        }
        bytes.extend(client.header(command, flags, offset, length));
        if payload {
            bytes.extend((0..length.min(65536)).map(|at| at as u8));
        }
    }
}

fn mutate(random: &mut SmallRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(0..4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.random_range(0..bytes.len());
        let end = (at + random.random_range(1..40)).min(bytes.len());
        match random.random_range(0..6) {
            0 => bytes[at] = random.random(),
            1 => bytes[at] ^= 1 << random.random_range(0..8),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let doubled = bytes[at..end].to_vec();
                bytes.splice(at..at, doubled);
            }
            4 => {
                let raw = number(random).to_be_bytes();
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&raw[..end - at]);
            }
            _ => bytes.truncate(at),
        }
    }
}

/// One conversation; whoever waits for an answer in it gets one, or is left.
fn converse(fixture: &Fixture, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let headers = handshake(&mut random, &mut bytes);
    requests(&mut random, headers, &mut bytes);
    mutate(&mut random, &mut bytes);
    let stream = connect(&fixture.socket());
    stream.set_nonblocking(false).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let reading = random.random_ratio(9, 10);
    let pieces = *[1, 1, 1, 3, 50].choose(&mut random).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut answer = Vec::new();
            if reading {
                // However it ends: it must end.
                let ended = (&mut reader).take(256 << 20).read_to_end(&mut answer);
                let hangs = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
                assert!(!hangs, "seed {seed}: the server neither answers nor leaves");
            }
        });
        let mut stream = &stream;
        for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
            if stream.write_all(piece).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(if reading { Shutdown::Write } else { Shutdown::Both });
    });
}

/// A number from the environment.
fn told(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// The seeds to run: the one that was asked for, or all.
fn seeds() -> std::ops::RangeInclusive<u64> {
    told("NBD_FUZZ_SEED").map_or(0..=u64::MAX, |seed| seed..=seed)
}

/// When a fuzzer ends that has no end.
fn until() -> Instant {
    Instant::now() + Duration::from_secs(told("NBD_FUZZ_SECONDS").unwrap_or(2))
}

/// Counts panics of the server's threads; a test's own are its failures anyway.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name().is_some_and(|name| name.starts_with("nbd-")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            hook(info);
        }));
    });
}

#[test]
fn no_tls_handshake_breaks_the_server() {
    count_panics();
    let (papers, keys) = (Papers::new(), Keys::new());
    let servers = [papers.tls(TlsMode::Required, true), keys.tls(TlsMode::Required)]
        .map(|tls| Fixture::with(None, |config| config.tls = Some(tls)));
    let until = until();
    for seed in seeds() {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bytes = hello(random.random());
        mutate(&mut random, &mut bytes);
        for fixture in &servers {
            let mut client = Client::greeted(&fixture.socket());
            assert_eq!(client.ask(opt::STARTTLS, &[])[0].0, rep::ACK);
            // It may leave in the middle.
            let _ = client.stream.write_all(&bytes);
            let _ = client.stream.shutdown(Shutdown::Write);
            assert!(client.is_closed(), "seed {seed}");
        }
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}");
        if Instant::now() >= until {
            println!("{} handshakes", seed + 1);
            break;
        }
    }
    servers.iter().for_each(Fixture::nobody_is_left);
}

#[test]
fn no_conversation_breaks_the_server() {
    count_panics();
    let limits = Limits { total_bytes: 64 << 20, handshake: Duration::from_secs(3), ..Limits::default() };
    let papers = Papers::new();
    let fixture = Fixture::with(None, |config| {
        config.limits = limits;
        config.tls = Some(papers.tls(TlsMode::Allowed, false));
    });
    let (seeds, until) = (seeds(), until());
    let last = *seeds.end();
    for seed in seeds {
        converse(&fixture, seed);
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}");
        if seed % 50 == 0 || seed == last {
            let mut client = Client::ready(&fixture.socket(), "disk", Headers::Structured, &[]);
            assert_eq!(client.write(0, 0, &[seed as u8; 512]), 0, "seed {seed}");
            assert_eq!(client.read(0, 512), [seed as u8; 512], "seed {seed}");
        }
        if Instant::now() >= until {
            println!("{} conversations", seed + 1);
            break;
        }
    }
    fixture.nobody_is_left();
}
