//! Random requests of several connections, against an array.

use std::collections::HashMap;
use std::time::Duration;

use cdp_types::MemoryFaults;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::client::{Client, Headers, cmd, flag};
use crate::fixture::Fixture;

/// What each connection has for itself.
const SHARE: u64 = 4 << 20;
const SLOT: u64 = 128 << 10;
const ROUNDS: usize = 30;

enum Change {
    Write(Vec<u8>),
    Zero,
    /// Whole blocks only.
    Trim,
    Read,
}

/// Batches of requests that do not touch each other, all in flight at once.
fn client_against_model(fixture: &Fixture, headers: Headers, share: u64, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut client = Client::ready(&fixture.socket(), "disk", headers, &[]);
    let mut model = vec![0_u8; SHARE as usize];
    for _ in 0..ROUNDS {
        let mut slots: Vec<u64> = (0..SHARE / SLOT).collect();
        slots.shuffle(&mut random);
        let mut started = HashMap::new();
        for slot in slots.into_iter().take(random.random_range(1..=32)) {
            let sectors = random.random_range(1..=SLOT / 512);
            let from = slot * SLOT + random.random_range(0..=SLOT / 512 - sectors) * 512;
            let (offset, length) = (share * SHARE + from, sectors * 512);
            let fua = if random.random_ratio(1, 4) { flag::FUA } else { 0 };
            let (cookie, change) = match random.random_range(0..6) {
                0 | 1 => {
                    let data: Vec<u8> = (0..length).map(|_| random.random()).collect();
                    (client.start_write(fua, offset, &data), Change::Write(data))
                }
                2 => {
                    let hole = if random.random() { flag::NO_HOLE } else { 0 };
                    (client.start(cmd::WRITE_ZEROES, fua | hole, offset, length), Change::Zero)
                }
                3 => (client.start(cmd::TRIM, fua, offset, length), Change::Trim),
                _ => (client.start(cmd::READ, 0, offset, length), Change::Read),
            };
            started.insert(cookie, (from as usize, length as usize, change));
        }
        for _ in 0..started.len() {
            let reply = client.reply();
            let (from, length, change) = started.remove(&reply.cookie).expect("each is answered once");
            if reply.error != 0 {
                assert_eq!(reply.error, 5, "only the device fails");
                // The flush behind a trim may have failed, and not the trim.
                if matches!(change, Change::Trim) {
                    model[from..from + length]
                        .copy_from_slice(&fixture.content(share * SHARE + from as u64, length as u64));
                }
                continue;
            }
            let place = &mut model[from..from + length];
            match change {
                Change::Write(data) => place.copy_from_slice(&data),
                Change::Zero => place.fill(0),
                Change::Read => assert!(reply.data == place, "seed {seed}: a read of {length} at {from}"),
                Change::Trim => {
                    let (first, end) = (from.next_multiple_of(4096), (from + length) / 4096 * 4096);
                    if first < end {
                        model[first..end].fill(0);
                    }
                }
            }
        }
    }
    assert!(fixture.content(share * SHARE, SHARE) == model, "seed {seed}");
}

#[test]
fn random_requests_of_several_connections_do_what_an_array_does() {
    for seed in 0..4 {
        let faults = MemoryFaults { seed, max_delay: Duration::from_millis(2), errors_per_million: 30_000 };
        let fixture = Fixture::with(Some(faults), |_| {});
        let kinds = [Headers::Simple, Headers::Structured, Headers::Extended, Headers::Extended];
        std::thread::scope(|scope| {
            for (share, headers) in kinds.into_iter().enumerate() {
                let fixture = &fixture;
                scope.spawn(move || {
                    client_against_model(fixture, headers, share as u64, seed << 8 | share as u64)
                });
            }
        });
        fixture.nobody_is_left();
    }
}
