//! Streams that begin well and go wrong somewhere.
//!
//! Each is made of one seed: a stream that would be right, of which bytes are then changed, left out, doubled or made
//! up. Whatever comes: no panic, no hang, and what is taken comes back as it was taken. `MIGRATION_FUZZ_SECONDS` says
//! for how long (2 without it); a failure prints its seed, which `MIGRATION_FUZZ_SEED` runs alone.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use ckpt::memory::{MemoryPages, PageStore, Request};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::image::{restore, save};
use crate::machine::{Machine, Pieces, hot, live, read};

fn mutate(random: &mut SmallRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(0..4) {
        if bytes.is_empty() {
            return;
        }
        // The interesting bytes are those at the beginning, and around the ends of sections.
        let near = if random.random_bool(0.5) { bytes.len().min(400) } else { bytes.len() };
        let at = random.random_range(0..near);
        let end = (at + random.random_range(1..40)).min(bytes.len());
        match random.random_range(0..7) {
            0 => bytes[at] = random.random(),
            1 => bytes[at] ^= 1 << random.random_range(0..8),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let doubled = bytes[at..end].to_vec();
                bytes.splice(at..at, doubled);
            }
            4 => {
                let number: u64 =
                    *[0, 1, 0x10, 0x28, 4096, u64::MAX, 1 << 63, 1 << 40].choose(random).unwrap();
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_be_bytes()[..end - at]);
            }
            5 => bytes[at] = random.random_range(0..9),
            _ => bytes.truncate(at),
        }
    }
}

/// Counts what became of the streams.
fn run(seed: u64, ends: &mut BTreeMap<String, u64>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let machine = Machine::random(&mut random);
    let mut bytes = if random.random_bool(0.5) { hot(&machine) } else { live(&machine, &mut random) };
    mutate(&mut random, &mut bytes);
    let whole = read(&bytes[..]);
    let pieces = read(Pieces { bytes: &bytes, random: random.clone() });
    match (&whole, &pieces) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (Err(whole), Err(pieces)) => assert_eq!(whole.to_string(), pieces.to_string()),
        _ => panic!("{whole:?} and {pieces:?}"),
    }
    let end = match whole {
        Err(error) => format!("{:?}", error.kind()),
        Ok(expected) => match save(&bytes, MemoryPages::new(1 << 34)) {
            Err(error) => format!("{:?} while saving", error.kind()),
            Ok((pages, _)) => {
                let stream = restore(pages).unwrap().1;
                assert_eq!(read(&stream[..]).unwrap(), expected);
                "taken".to_owned()
            }
        },
    };
    *ends.entry(end).or_default() += 1;
    damage(&machine, &mut random);
}

/// An image with changed bytes in its header is refused, or means what it meant.
fn damage(machine: &Machine, random: &mut SmallRng) {
    let stream = hot(machine);
    let (mut pages, _) = save(&stream, MemoryPages::new(1 << 34)).unwrap();
    if random.random_bool(0.5) {
        pages.rot(random.random_range(0..8192));
    } else {
        let noise: Vec<u8> = (0..4096).map(|_| random.random()).collect();
        let offset = random.random_range(0..3) * 4096;
        pages.submit(0, Request::Write { offset, from: cdp_types::IoBuf::from_bytes(&noise) });
        pages.completed(Duration::ZERO, &mut Vec::new()).unwrap();
    }
    if let Ok((_, restored)) = restore(pages) {
        assert_eq!(read(&restored[..]).unwrap(), read(&stream[..]).unwrap());
    }
}

#[test]
fn no_stream_and_no_image_breaks_anything() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, last) = match number("MIGRATION_FUZZ_SEED") {
        Some(seed) => (seed, seed),
        None => (0, u64::MAX),
    };
    let until = Instant::now() + Duration::from_secs(number("MIGRATION_FUZZ_SECONDS").unwrap_or(2));
    let mut ends = BTreeMap::new();
    for seed in first..=last {
        let ran = catch_unwind(AssertUnwindSafe(|| run(seed, &mut ends)));
        assert!(ran.is_ok(), "seed {seed}");
        if Instant::now() >= until && first != last {
            println!("{} streams: {ends:?}", seed + 1);
            assert!(ends.contains_key("taken") && ends.contains_key("Malformed"));
            break;
        }
    }
}
