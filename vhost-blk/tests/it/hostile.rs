//! A guest, or its front end, that does what it must not. Each time: an error to whoever did it, and the server alive.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use crate::guest::*;
use crate::{Fixture, slow};

const OUTSIDE: u64 = BASE + MEMORY_LEN;

/// Makes a chain of hand-made descriptors available, `(addr, len, flags)` each, linked in order.
fn chain(guest: &mut Guest, parts: &[(u64, u32, u16)]) {
    let last = parts.len() - 1;
    for (index, &(addr, len, flags)) in parts.iter().enumerate() {
        let next = if index < last { NEXT } else { 0 };
        guest.rings[0].descriptor(index as u16, addr, len, flags | next, index as u16 + 1);
    }
    guest.memory.write(guest.status_addr(0, 0), &[255]);
    guest.rings[0].put(0);
    guest.rings[0].submit(1);
}

/// The chain is answered with an I/O error, and a good request after it works.
fn refused(guest: &mut Guest, what: &str, parts: &[(u64, u32, u16)]) {
    chain(guest, parts);
    assert_eq!(guest.rings[0].wait().len(), 1, "{what}");
    assert_eq!(guest.status(0, 0), IOERR, "{what}");
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK, "after {what}");
}

#[test]
fn malformed_chains_with_a_status_byte_are_answered_with_an_error() {
    let fixture = Fixture::new(64 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let (data, status) = (guest.data(0, 1), guest.status_addr(0, 0));
    let head = guest.data(0, 2);
    guest.memory.write(head, &header(IN, 0));
    let g = &mut guest;
    refused(g, "a short header", &[(head, 15, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    refused(g, "no header", &[(data, 512, WRITE), (status, 1, WRITE)]);
    refused(g, "only a status", &[(status, 1, WRITE)]);
    refused(g, "data outside memory", &[(head, 16, 0), (OUTSIDE, 512, WRITE), (status, 1, WRITE)]);
    refused(
        g,
        "data across the end of memory",
        &[(head, 16, 0), (OUTSIDE - 256, 512, WRITE), (status, 1, WRITE)],
    );
    refused(
        g,
        "data past the end of everything",
        &[(head, 16, 0), (u64::MAX - 10, 512, WRITE), (status, 1, WRITE)],
    );
    refused(g, "a header outside memory", &[(0, 16, 0), (data, 512, WRITE), (status, 1, WRITE)]);
    refused(
        g,
        "readable behind writable",
        &[(head, 16, 0), (data, 512, WRITE), (head, 16, 0), (status, 1, WRITE)],
    );
    refused(g, "an empty descriptor", &[(head, 16, 0), (data, 0, WRITE), (status, 1, WRITE)]);
    refused(g, "a length of almost 2^32", &[(head, 16, 0), (BASE, u32::MAX, WRITE), (status, 1, WRITE)]);
    let part = (BASE + (16 << 20), 30 << 20, WRITE);
    refused(g, "more data than a request may have", &[(head, 16, 0), part, part, (status, 1, WRITE)]);
    guest.memory.write(head, &header(OUT, 0));
    let part = (BASE + (16 << 20), 30 << 20, 0);
    refused(&mut guest, "more data to write", &[(head, 16, 0), part, part, (status, 1, WRITE)]);
}

#[test]
fn malformed_indirect_tables_with_a_status_byte_are_answered_with_an_error() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let (data, status, head, table) =
        (guest.data(0, 1), guest.status_addr(0, 0), guest.data(0, 2), guest.data(0, 3));
    guest.memory.write(head, &header(IN, 0));
    let good = [
        descriptor(head, 16, NEXT, 1),
        descriptor(data, 512, WRITE | NEXT, 2),
        descriptor(status, 1, WRITE, 0),
    ];
    guest.memory.write(table, &good.concat());
    chain(&mut guest, &[(table, 48, INDIRECT)]);
    assert_eq!((guest.rings[0].wait().len(), guest.status(0, 0)), (1, OK));

    refused(&mut guest, "a table of an odd length", &[(table, 50, INDIRECT)]);
    guest.rings[0].descriptor(1, status, 1, WRITE, 0);
    refused(&mut guest, "an indirect descriptor in the middle", &[(table, 48, INDIRECT), (status, 1, WRITE)]);
    let nested = [
        descriptor(head, 16, NEXT, 1),
        descriptor(table, 48, INDIRECT | NEXT, 2),
        descriptor(status, 1, WRITE, 0),
    ];
    guest.memory.write(table, &nested.concat());
    refused(&mut guest, "a table inside a table", &[(table, 48, INDIRECT)]);

    drop(guest);
    let options = Options { without: F_INDIRECT | F_LOG_ALL, ..Options::default() };
    let mut guest = Guest::start(&fixture.socket(), options);
    guest.memory.write(head, &header(IN, 0));
    guest.memory.write(table, &good.concat());
    refused(&mut guest, "a table that was not negotiated", &[(table, 48, INDIRECT)]);
}

/// The ring is declared broken, a second disk's server and this one live, and after a reset the ring works.
fn breaks(what: &str, fixture: &Fixture, misbehave: impl FnOnce(&mut Guest)) {
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    misbehave(&mut guest);
    guest.rings[0].wait_for_error();
    guest.frontend().set_vring_enable(0, false).unwrap();
    guest.frontend().get_vring_base(0).unwrap_or_else(|error| panic!("{what}: {error}"));
    guest.rings[0].reset();
    guest.start_rings(Some(&[0]));
    assert_eq!(guest.request(OUT, 0, &[3; 512], 0).0, OK, "after {what} and a reset");
}

#[test]
fn chains_that_cannot_be_answered_stop_the_ring_until_it_is_reset() {
    let fixture = Fixture::new(1 << 20, None);
    let read = header(IN, 0);
    let two = |guest: &Guest| (guest.data(0, 2), guest.data(0, 3));
    breaks("a chain without a status", &fixture, |guest| {
        let (head, _) = two(guest);
        chain(guest, &[(head, 16, 0)]);
    });
    breaks("a status outside memory", &fixture, |guest| {
        let (head, _) = two(guest);
        guest.memory.write(head, &read);
        chain(guest, &[(head, 16, 0), (OUTSIDE, 1, WRITE)]);
    });
    breaks("a loop", &fixture, |guest| {
        let (head, _) = two(guest);
        guest.rings[0].descriptor(0, head, 16, NEXT, 1);
        guest.rings[0].descriptor(1, head, 16, NEXT, 0);
        guest.rings[0].put(0);
        guest.rings[0].submit(1);
    });
    breaks("a loop in a table", &fixture, |guest| {
        let (head, table) = two(guest);
        guest.memory.write(table, &[descriptor(head, 16, NEXT, 1), descriptor(head, 16, NEXT, 0)].concat());
        chain(guest, &[(table, 32, INDIRECT)]);
    });
    breaks("a table that goes on behind its end", &fixture, |guest| {
        let (head, table) = two(guest);
        guest.memory.write(table, &descriptor(head, 16, NEXT, 7));
        chain(guest, &[(table, 16, INDIRECT)]);
    });
    breaks("an empty table", &fixture, |guest| chain(guest, &[(BASE, 0, INDIRECT)]));
    breaks("an endless table", &fixture, |guest| {
        let (head, _) = two(guest);
        let table = BASE + (40 << 20);
        let entries: Vec<_> = (0..2000).map(|index| descriptor(head, 16, NEXT, index + 1)).collect();
        guest.memory.write(table, &entries.concat());
        chain(guest, &[(table, 32000, INDIRECT)]);
    });
    breaks("a table outside memory", &fixture, |guest| chain(guest, &[(OUTSIDE, 48, INDIRECT)]));
    breaks("a chain that leaves the table", &fixture, |guest| {
        let (head, _) = two(guest);
        guest.rings[0].descriptor(0, head, 16, NEXT, 64);
        guest.rings[0].put(0);
        guest.rings[0].submit(1);
    });
    breaks("a head outside the table", &fixture, |guest| {
        guest.rings[0].put(64);
        guest.rings[0].submit(1);
    });
    breaks("an index that jumps", &fixture, |guest| {
        guest.rings[0].added = guest.rings[0].added.wrapping_add(65);
        guest.rings[0].submit(65);
    });
    breaks("an index that goes back", &fixture, |guest| {
        guest.rings[0].added = guest.rings[0].added.wrapping_sub(1);
        guest.memory.u16(guest.rings[0].available() + 2).store(guest.rings[0].added, Ordering::Release);
        guest.rings[0].kick.write(1).unwrap();
    });
    breaks("a head that is in flight already", &fixture, |guest| {
        guest.put(0, 0, 99, 0, &[], 0);
        guest.rings[0].put(0);
        guest.rings[0].submit(2);
    });
    breaks("a ring that is no longer in memory", &fixture, |guest| {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE << 10,
            userspace_addr: 4096,
            ..guest.memory.region()
        };
        guest.frontend().set_mem_table(&[region]).unwrap();
        let region = guest.memory.region();
        guest.frontend().set_mem_table(&[region]).unwrap();
    });
}

#[test]
fn a_ring_outside_memory_is_an_error_of_that_ring_only() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { rings: 2, ..Options::default() });
    for part in 0..4 {
        guest.frontend().get_vring_base(1).unwrap();
        let mut config = guest.rings[1].config(None);
        match part {
            0 => config.desc_table_addr = 0x1000,
            1 => config.avail_ring_addr = guest.memory.user(OUTSIDE - 2),
            2 => config.used_ring_addr = guest.memory.user(OUTSIDE - 8),
            _ => config.used_ring_addr = u64::MAX - 3,
        }
        guest.rings[1].reset();
        let Guest { connection, rings, .. } = &mut guest;
        let frontend = connection.as_mut().unwrap();
        start_ring(frontend, &rings[1], 0);
        frontend.get_vring_base(1).unwrap();
        let _ = rings[1].err.read();
        frontend.set_vring_addr(1, &config).unwrap();
        frontend.set_vring_kick(1, &rings[1].kick).unwrap();
        rings[1].wait_for_error();
        assert_eq!(guest.request(IN, 0, &[], 512).0, OK, "the other ring");
    }
}

#[test]
fn messages_that_make_no_sense_are_refused_and_the_connection_goes_on() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options { inflight: true, ..Options::default() });
    let region = guest.memory.region();
    let (inflight, _) = guest.inflight.as_ref().unwrap();
    let inflight = *inflight;
    let file = guest.inflight.as_ref().unwrap().1.try_clone().unwrap();
    let features = guest.features;
    let frontend = guest.frontend();
    assert!(frontend.set_vring_num(0, 64).is_err(), "while it runs");
    assert!(frontend.set_vring_base(0, 1).is_err(), "while it runs");
    assert!(frontend.set_inflight_fd(&inflight, file.as_raw_fd()).is_err(), "while a ring runs");
    assert!(frontend.set_features(features & !F_EVENT_IDX).is_err(), "while a ring runs");
    for size in [0, 3, 48, 2048, 0x8000] {
        assert!(frontend.set_vring_num(1, size).is_err(), "a ring of {size}");
    }
    for index in [4, 15] {
        assert!(frontend.set_vring_num(index, 64).is_err(), "ring {index}");
    }
    let overlap =
        VhostUserMemoryRegionInfo { guest_phys_addr: BASE + 4096, userspace_addr: 0x1000, ..region };
    assert!(frontend.add_mem_region(&overlap).is_err());
    let too_long = VhostUserMemoryRegionInfo {
        guest_phys_addr: BASE << 12,
        userspace_addr: 0x1000,
        memory_size: MEMORY_LEN + 1,
        ..region
    };
    assert!(frontend.add_mem_region(&too_long).is_err());
    assert!(frontend.set_mem_table(&[region, overlap]).is_err());
    assert!(frontend.remove_mem_region(&overlap).is_err());
    assert_eq!(guest.request(OUT, 0, &[1; 512], 0).0, OK);
}

#[test]
fn a_descriptor_that_is_no_eventfd_is_refused() {
    let fixture = Fixture::new(1 << 20, None);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    let file = std::fs::File::open("/dev/zero").unwrap();
    // SAFETY: the descriptor is owned by the clone alone; the wrapper only passes it on.
    let fake = unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
    assert!(guest.frontend().set_vring_kick(1, &fake).is_err());
    assert!(guest.frontend().set_vring_call(1, &fake).is_err());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

/// Bytes that are no message, and messages that are cut off: only that connection ends.
#[test]
fn garbage_on_the_socket_ends_only_that_connection() {
    use std::io::{ErrorKind, Read, Write};
    let fixture = Fixture::new(1 << 20, Some(slow(5)));
    for seed in 0..50u8 {
        let mut stream = std::os::unix::net::UnixStream::connect(fixture.socket()).unwrap();
        stream.set_read_timeout(Some(crate::DEADLINE)).unwrap();
        let garbage: Vec<u8> = match seed % 3 {
            0 => (0..200).map(|byte: u32| (byte as u8).wrapping_mul(seed).wrapping_add(seed)).collect(),
            1 => vec![21, 0, 0, 0, 1, 0, 0, 0, 200 + seed, 0, 0, 0, 7],
            _ => vec![seed; usize::from(seed % 14)],
        };
        stream.write_all(&garbage).unwrap();
        // What is no header yet may become one, until whoever has sent it goes.
        if garbage.len() >= 12 {
            let ended = match stream.read(&mut [0]) {
                Ok(count) => count == 0,
                // It left without having read all.
                Err(error) => error.kind() == ErrorKind::ConnectionReset,
            };
            assert!(ended, "the server does not leave after {garbage:?}");
        }
    }
    assert_eq!(fixture.server.stats().connections, 50, "each of them was heard");
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
}

/// Rings full of nonsense, whose buffers lie anywhere, over the rings themselves too.
#[test]
fn random_rings_neither_end_nor_hang_the_server() {
    let fixture = Fixture::new(1 << 20, None);
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut guest = Guest::start(&fixture.socket(), Options::default());
    for _ in 0..1000 {
        for index in 0..64 {
            let addr = match random.random_range(0..10) {
                0 => random.random(),
                1 => OUTSIDE - random.random_range(0..600),
                2 => BASE + random.random_range(0..0x2_0000),
                _ => BASE + (20 << 20) + random.random_range(0..4096) * 16,
            };
            let len =
                [0, 1, 15, 16, 17, 48, 512, 4096, 1 << 20, 64 << 20, u32::MAX][random.random_range(0..11)];
            let flags = if random.random_ratio(1, 50) { random.random() } else { random.random_range(0..8) };
            let next = if random.random_ratio(1, 20) { random.random() } else { random.random_range(0..64) };
            guest.rings[0].descriptor(index, addr, len, flags, next);
            let table = BASE + (20 << 20) + random.random_range(0..4096) * 16;
            guest.memory.write(table, &descriptor(addr, len, flags, next));
            let kind = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99][random.random_range(0..7)];
            let other = BASE + (20 << 20) + random.random_range(0..4096) * 16;
            guest.memory.write(other, &header(kind, random.random_range(0..2100)));
        }
        for _ in 0..random.random_range(1..64) {
            let head = if random.random_ratio(1, 100) { random.random() } else { random.random_range(0..64) };
            guest.rings[0].put(head);
        }
        guest.rings[0].submit(64);
        guest.rings[0].kick.write(1).unwrap();
        if random.random() {
            guest.frontend().set_vring_enable(0, false).unwrap();
        }
        guest.frontend().get_vring_base(0).unwrap();
        guest.rings[0].reset();
        guest.start_rings(Some(&[0]));
    }
    assert_eq!(guest.request(IN, 0, &[], 512).0, OK);
    assert_eq!(fixture.server.stats().connections, 1, "the connection has held");
}
