//! Texts that clients may send for an instant, for as long as `INSTANT_FUZZ_SECONDS` says (1 second unless told): none
//! panics, and what is accepted is written so that it means the same again. `INSTANT_FUZZ_SEED=x` replays a run.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant as Clock};

use cdp_types::{Instant, VolumeAt};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// What texts are put together of, besides single characters.
const PIECES: [&str; 38] = [
    "head",
    "-",
    "5m",
    "1h30m",
    "2d",
    "250ms",
    "90s",
    "7us",
    "3ns",
    "2026-11-21",
    "T",
    " ",
    "10:32:05",
    "10:32",
    ".123456789",
    "Z",
    "+01:00",
    "-23:59",
    "+25:61",
    "seq:",
    "flush:",
    "flush:-",
    "mark:",
    "epoch:",
    "0",
    "1",
    "18446744073709551615",
    "18446744073709551616",
    "999999999999999999999999d",
    "before-upgrade",
    "@",
    "web1",
    ":",
    "02:30:00",
    "2026-03-29",
    "2026-10-25",
    "1969-12-31",
    "2554-07-21",
];
const CHARACTERS: &[char] =
    &['0', '9', 'a', 'Z', ':', '.', '-', '+', '@', '/', ' ', '\n', '\0', 'é', '٣', '🕰'];
/// As POSIX writes them, so that no database of zones is needed: the clocks change in all but the first, in the third
/// by half an hour.
const ZONES: [&str; 4] =
    ["UTC0", "CET-1CEST,M3.5.0,M10.5.0/3", "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0", "EST5EDT,M3.2.0,M11.1.0"];

fn some_text(random: &mut SmallRng) -> String {
    let mut text = String::new();
    for _ in 0..random.random_range(0..7) {
        if random.random_bool(0.8) {
            text.push_str(PIECES.choose(random).unwrap());
        } else {
            text.push(*CHARACTERS.choose(random).unwrap());
        }
    }
    if random.random_bool(0.3) && !text.is_empty() {
        let at = random.random_range(0..text.chars().count());
        let replaced = *CHARACTERS.choose(random).unwrap();
        text = text.chars().enumerate().map(|(i, c)| if i == at { replaced } else { c }).collect();
    }
    text
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn no_text_panics_and_what_is_accepted_means_the_same_again() {
    let seed = number("INSTANT_FUZZ_SEED").unwrap_or_else(|| {
        let now = Timestamp::now().as_nanosecond();
        now as u64 ^ u64::from(std::process::id())
    });
    let time = Duration::from_secs(number("INSTANT_FUZZ_SECONDS").unwrap_or(1));
    println!("INSTANT_FUZZ_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let zones: Vec<TimeZone> = ZONES.iter().map(|name| TimeZone::posix(name).unwrap()).collect();
    let (start, mut texts, mut accepted) = (Clock::now(), 0_u64, 0_u64);
    while start.elapsed() < time {
        for _ in 0..1000 {
            texts += 1;
            let second = random.random_range(0..18_000_000_000);
            let now =
                Timestamp::from_second(second).unwrap().to_zoned(zones.choose(&mut random).unwrap().clone());
            let text = some_text(&mut random);
            match Instant::parse(&text, &now) {
                Ok(instant) => {
                    accepted += 1;
                    let written = instant.to_string();
                    // The canonical text must not depend on when and where it is read.
                    let elsewhere =
                        Timestamp::UNIX_EPOCH.to_zoned(zones.choose(&mut random).unwrap().clone());
                    assert_eq!(
                        Instant::parse(&written, &elsewhere),
                        Ok(instant),
                        "{text:?} became {written:?}"
                    );
                }
                Err(error) => assert!(error.0.len() < 1000, "{text:?}: {error}"),
            }
            if let Ok(at) = VolumeAt::parse(&text, &now) {
                assert_eq!(VolumeAt::parse(&at.to_string(), &now), Ok(at), "{text:?}");
            }
        }
    }
    println!("{texts} texts, {accepted} of them accepted");
    assert!(accepted > texts / 1000, "the texts are too wild: {accepted} of {texts} were accepted");
}
