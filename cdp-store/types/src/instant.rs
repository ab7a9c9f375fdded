//! Points of a volume's history, as users write them.
//!
//! | text | instant |
//! | --- | --- |
//! | `head` | the acknowledged present |
//! | `-5m`, `-90s`, `-1h30m`, `-2d`, `-250ms` | that long before now; `d h m s ms us ns`, largest first |
//! | `2026-11-21T10:32:05.123456789Z`, `…+01:00` | a time with its offset from UTC (RFC 3339) |
//! | `2026-11-21 10:32:05`, `2026-11-21T10:32` | a local time |
//! | `10:32:05`, `10:32` | the newest local time of day that is not in the future: today's or yesterday's |
//! | `seq:N` | everything up to and including that `Seq` |
//! | `flush:-N` | the Nth newest completed flush; `flush:-1` is the last |
//! | `mark:NAME` | a named instant |
//! | `epoch:N` | a numbered cut across the disks of a machine |
//!
//! A day is 24 hours. What is relative or local is resolved while it is parsed. The text that [`Instant`] displays
//! is canonical: it means the same whenever and wherever it is parsed again.

use std::fmt;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Timestamp, Zoned};

use crate::{EpochId, Label, Seq, VolumeName};

/// A point of a volume's history that never splits one guest request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instant {
    /// The acknowledged present.
    Head,
    /// Every change up to and including this one.
    Seq(Seq),
    /// Everything that had happened by this time: nanoseconds since 1970, UTC.
    Time(u64),
    /// A completed flush, counted back from the newest: 1 is the last.
    FlushBack(u64),
    /// A named instant.
    Mark(Label),
    /// A numbered cut across the disks of a machine.
    Epoch(EpochId),
}

/// Why a text is no instant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InstantError(pub String);

/// A volume at an instant, as in `web1@-5m`; a bare name means its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeAt {
    /// Whose history.
    pub volume: VolumeName,
    /// Which point of it.
    pub instant: Instant,
}

/// What [`Instant::parse`] takes, for messages.
const ACCEPTED: &str = "head, -5m (also -90s, -1h30m, -2d), 2026-11-21T10:32:05Z (or with +01:00), \
    local 10:32:05 or '2026-11-21 10:32:05', seq:N, flush:-N, mark:NAME or epoch:N";

/// Units of `-1h30m`, largest first, in nanoseconds.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl Instant {
    /// Reads an instant as a user writes it. `now` is what `-5m` counts from; local times are in its zone.
    ///
    /// # Errors
    /// The text has none of the forms above, names no possible time, or names a local time that does not exist
    /// or exists twice because the clocks change; the message then gives the nearest unambiguous ones.
    pub fn parse(text: &str, now: &Zoned) -> Result<Self, InstantError> {
        if text == "head" {
            return Ok(Self::Head);
        }
        if let Some(ago) = text.strip_prefix('-') {
            return before(ago, now).map_err(|why| refusal(text, &why)).map(Self::Time);
        }
        match text.split_once(':') {
            Some(("seq", number)) => counted(number).map(|n| Self::Seq(Seq(n))),
            Some(("epoch", number)) => counted(number).map(|n| Self::Epoch(EpochId(n))),
            Some(("flush", number)) => match number.strip_prefix('-').map(counted) {
                Some(Ok(count)) if count > 0 => Ok(Self::FlushBack(count)),
                _ => Err("a flush is counted back from the newest, which is flush:-1".to_owned()),
            },
            Some(("mark", label)) => label.parse().map(Self::Mark).map_err(|e| format!("{e}")),
            _ => Written::read(text).and_then(|written| written.resolve(now)).map(Self::Time),
        }
        .map_err(|why| refusal(text, &why))
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("head"),
            Self::Seq(seq) => write!(f, "seq:{seq}"),
            Self::Time(ns) => match Timestamp::from_nanosecond(i128::from(*ns)) {
                Ok(time) => write!(f, "{time:.9}"),
                // Not reached: 2⁶⁴ nanoseconds end in 2554, which the calendar knows.
                Err(_) => Err(fmt::Error),
            },
            Self::FlushBack(count) => write!(f, "flush:-{count}"),
            Self::Mark(label) => write!(f, "mark:{label}"),
            Self::Epoch(number) => write!(f, "epoch:{number}"),
        }
    }
}

impl VolumeAt {
    /// Reads `NAME` or `NAME@INSTANT`; see [`Instant::parse`].
    ///
    /// # Errors
    /// The name breaks the rule for names, or the instant is none.
    pub fn parse(text: &str, now: &Zoned) -> Result<Self, InstantError> {
        let (name, instant) = match text.split_once('@') {
            Some((name, instant)) => (name, Instant::parse(instant, now)?),
            None => (text, Instant::Head),
        };
        let volume = name.parse().map_err(|e| InstantError(format!("{e}")))?;
        Ok(Self { volume, instant })
    }
}

impl fmt::Display for VolumeAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.instant)
    }
}

/// The refusal of `text`, cut and escaped, since it may come from the network.
fn refusal(text: &str, why: &str) -> InstantError {
    let text: String = text.escape_debug().take(80).collect();
    InstantError(format!("'{text}' is no instant: {why}"))
}

/// A plain decimal number.
fn counted(text: &str) -> Result<u64, String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err("a plain number is expected after the colon".to_owned());
    }
    text.parse().map_err(|_| "its number is too large".to_owned())
}

/// Nanoseconds since 1970 of a time that a log can hold.
fn nanoseconds(time: Timestamp) -> Result<u64, String> {
    u64::try_from(time.as_nanosecond()).map_err(|_| "it lies before 1970 or after 2554".to_owned())
}

/// The time `ago` (as in `1h30m`) before `now`.
fn before(ago: &str, now: &Zoned) -> Result<u64, String> {
    let malformed = || format!("accepted are {ACCEPTED}");
    let (mut rest, mut units, mut total) = (ago, &UNITS[..], 0_u128);
    if rest.is_empty() {
        return Err(malformed());
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        let (unit, tail) = tail.split_at(letters);
        let place = units.iter().position(|(name, _)| *name == unit).ok_or_else(malformed)?;
        let count: u64 = number.parse().map_err(|_| malformed())?;
        total = total.saturating_add(u128::from(count) * units[place].1);
        units = &units[place + 1..];
        rest = tail;
    }
    let now = nanoseconds(now.timestamp())?;
    u64::try_from(total)
        .ok()
        .and_then(|total| now.checked_sub(total))
        .ok_or_else(|| "it lies before 1970".to_owned())
}

/// A time as it stands in the text.
struct Written {
    date: Option<Date>,
    time: Time,
    offset: Option<Offset>,
}

impl Written {
    fn read(text: &str) -> Result<Self, String> {
        let shape = || format!("accepted are {ACCEPTED}");
        if !text.is_ascii() {
            return Err(shape());
        }
        let (date, clock) = match text.split_at_checked(10) {
            Some((date, rest)) if date.contains('-') => {
                let clock = rest.strip_prefix(['T', 't', ' ']).ok_or_else(shape)?;
                (Some(read_date(date).ok_or_else(shape)??), clock)
            }
            _ => (None, text),
        };
        let (clock, offset) = match clock.find(['Z', 'z', '+', '-']) {
            Some(at) => (&clock[..at], Some(read_offset(&clock[at..]).ok_or_else(shape)??)),
            None => (clock, None),
        };
        let time = read_time(clock).ok_or_else(shape)??;
        if date.is_none() && offset.is_some() {
            return Err(
                "a time with an offset from UTC needs its date, as in 2026-11-21T10:32:05Z".to_owned()
            );
        }
        Ok(Self { date, time, offset })
    }

    fn resolve(&self, now: &Zoned) -> Result<u64, String> {
        let zone = now.time_zone();
        let time = match (self.date, self.offset) {
            (Some(date), Some(offset)) => {
                offset.to_timestamp(DateTime::from_parts(date, self.time)).map_err(|e| format!("{e}"))?
            }
            (Some(date), None) => Local::new(DateTime::from_parts(date, self.time), zone)?.single()?,
            (None, _) => newest(self.time, now)?,
        };
        nanoseconds(time)
    }
}

/// The newest moment that is not after `now` and at which local clocks showed `time`.
fn newest(time: Time, now: &Zoned) -> Result<Timestamp, String> {
    let today = Local::new(DateTime::from_parts(now.date(), time), now.time_zone())?;
    let latest = now.timestamp();
    if today.candidates.0 <= latest {
        // Of an hour that comes twice today, only the first may have passed.
        return if today.candidates.1 > latest && today.is_twice() {
            Ok(today.candidates.0)
        } else {
            today.single()
        };
    }
    let yesterday = now.date().yesterday().map_err(|e| format!("{e}"))?;
    Local::new(DateTime::from_parts(yesterday, time), now.time_zone())?.single()
}

/// What a local time can mean: the earlier and the later of its readings, which are mostly the same.
struct Local<'a> {
    written: DateTime,
    zone: &'a TimeZone,
    offsets: AmbiguousOffset,
    candidates: (Timestamp, Timestamp),
}

impl<'a> Local<'a> {
    fn new(written: DateTime, zone: &'a TimeZone) -> Result<Self, String> {
        let offsets = zone.to_ambiguous_timestamp(written).offset();
        let (first, second) = match offsets {
            AmbiguousOffset::Unambiguous { offset } => (offset, offset),
            AmbiguousOffset::Gap { before, after } | AmbiguousOffset::Fold { before, after } => {
                (before, after)
            }
        };
        let at = |offset: Offset| offset.to_timestamp(written).map_err(|e| format!("{e}"));
        let (first, second) = (at(first)?, at(second)?);
        Ok(Self { written, zone, offsets, candidates: (first.min(second), first.max(second)) })
    }

    fn is_twice(&self) -> bool {
        matches!(self.offsets, AmbiguousOffset::Fold { .. })
    }

    /// Its only meaning.
    fn single(&self) -> Result<Timestamp, String> {
        let (earlier, later) = self.candidates;
        match self.offsets {
            AmbiguousOffset::Unambiguous { .. } => Ok(earlier),
            AmbiguousOffset::Fold { before, after } => Err(format!(
                "the local time {} exists twice, because the clocks were set back; say {} or {}",
                self.written,
                earlier.display_with_offset(before),
                later.display_with_offset(after),
            )),
            AmbiguousOffset::Gap { before, after } => {
                // The clocks changed between the two readings: it is the last change before the later.
                let change =
                    self.zone.preceding(later).next().map_or(earlier, |transition| transition.timestamp());
                let last = Timestamp::from_nanosecond(change.as_nanosecond() - 1).unwrap_or(change);
                Err(format!(
                    "the local time {} does not exist, because the clocks were set forward; \
                     the nearest are {} and {}",
                    self.written,
                    last.display_with_offset(before),
                    change.display_with_offset(after),
                ))
            }
        }
    }
}

/// A number of exactly so many digits.
fn digits<T: std::str::FromStr>(text: &str, count: usize) -> Option<T> {
    (text.len() == count && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// `2026-11-21`; None if it is not of this shape.
fn read_date(text: &str) -> Option<Result<Date, String>> {
    let mut parts = text.split('-');
    let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
    let (year, month, day) = (digits(year, 4)?, digits(month, 2)?, digits(day, 2)?);
    parts.next().is_none().then(|| Date::new(year, month, day).map_err(|_| format!("there is no day {text}")))
}

/// `10:32`, `10:32:05` or `10:32:05.123456789`; None if it is of none of these shapes.
fn read_time(text: &str) -> Option<Result<Time, String>> {
    let (clock, fraction) = match text.split_once('.') {
        Some((clock, fraction)) => (clock, Some(fraction)),
        None => (text, None),
    };
    let mut parts = clock.split(':');
    let (hour, minute, second) = (parts.next()?, parts.next()?, parts.next());
    if parts.next().is_some() || (second.is_none() && fraction.is_some()) {
        return None;
    }
    let (hour, minute) = (digits(hour, 2)?, digits(minute, 2)?);
    let second = second.map_or(Some(0), |second| digits(second, 2))?;
    let nanosecond: i32 = match fraction {
        None => 0,
        Some(fraction) if (1..=9).contains(&fraction.len()) => digits(&format!("{fraction:0<9}"), 9)?,
        Some(_) => return None,
    };
    let time = Time::new(hour, minute, second, nanosecond);
    Some(time.map_err(|_| format!("there is no time of day {text}")))
}

/// `Z`, `+01:00` or `-05:30`; None if it is of none of these shapes.
fn read_offset(text: &str) -> Option<Result<Offset, String>> {
    if matches!(text, "Z" | "z") {
        return Some(Ok(Offset::UTC));
    }
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let (hours, minutes) = text.get(1..)?.split_once(':')?;
    let (hours, minutes): (i32, i32) = (digits(hours, 2)?, digits(minutes, 2)?);
    if hours > 23 || minutes > 59 {
        return Some(Err(format!("there is no offset {text} from UTC")));
    }
    Some(Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).map_err(|e| format!("{e}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// Its rule spelled out, so that the tests need no time-zone database.
    fn berlin() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    /// 2026-11-21, 12:00:00.5 in Berlin.
    fn noon() -> Zoned {
        at("2026-11-21T11:00:00.5Z")
    }

    fn at(time: &str) -> Zoned {
        time.parse::<Timestamp>().unwrap().to_zoned(berlin())
    }

    /// What `text` means in canonical form, or why it is refused.
    fn read(text: &str, now: &Zoned) -> String {
        Instant::parse(text, now).map_or_else(|error| error.to_string(), |instant| instant.to_string())
    }

    #[test]
    fn every_form_has_its_meaning() {
        for (text, meaning) in [
            ("head", "head"),
            ("-5m", "2026-11-21T10:55:00.500000000Z"),
            ("-90s", "2026-11-21T10:58:30.500000000Z"),
            ("-1h30m", "2026-11-21T09:30:00.500000000Z"),
            ("-2d", "2026-11-19T11:00:00.500000000Z"),
            ("-500ms", "2026-11-21T11:00:00.000000000Z"),
            ("-0s", "2026-11-21T11:00:00.500000000Z"),
            ("2026-11-21T10:32:05.123456789Z", "2026-11-21T10:32:05.123456789Z"),
            ("2026-11-21t10:32:05.1z", "2026-11-21T10:32:05.100000000Z"),
            ("2026-11-21T10:32:05+01:00", "2026-11-21T09:32:05.000000000Z"),
            ("2026-11-21 10:32:05-05:30", "2026-11-21T16:02:05.000000000Z"),
            ("2026-11-21 10:32:05", "2026-11-21T09:32:05.000000000Z"),
            ("2026-11-21T10:32", "2026-11-21T09:32:00.000000000Z"),
            ("10:32:05", "2026-11-21T09:32:05.000000000Z"),
            ("12:00:00.5", "2026-11-21T11:00:00.500000000Z"),
            ("12:00:00.500000001", "2026-11-20T11:00:00.500000001Z"),
            ("23:59", "2026-11-20T22:59:00.000000000Z"),
            ("seq:0", "seq:0"),
            ("seq:18446744073709551615", "seq:18446744073709551615"),
            ("flush:-1", "flush:-1"),
            ("mark:before-upgrade", "mark:before-upgrade"),
            ("epoch:17", "epoch:17"),
        ] {
            assert_eq!(read(text, &noon()), meaning, "{text}");
        }
    }

    #[test]
    fn a_refusal_says_what_is_accepted() {
        for text in [
            "",
            "now",
            "HEAD",
            "-",
            "-5",
            "-m",
            "-5x",
            "-5m1h",
            "-5m5m",
            "-1h-5m",
            "-1.5h",
            "5m",
            "10",
            "10:3",
            "10:32:05.",
            "10:32:05.1234567890",
            "2026-11-21",
            "2026-11-21T",
            "2026-11-21Z",
            "2026-11-21_10:32",
            "2026-11-21T10:32:05+1",
            "2026-11-21T10:32:05 UTC",
            "1T:32",
            "１０:32",
            "+10:32",
            "10:32:05:07",
        ] {
            let refusal = read(text, &noon());
            assert!(refusal.contains("is no instant: accepted are head, -5m"), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_refusal_names_what_is_wrong() {
        for (text, part) in [
            ("2026-02-29T10:00:00Z", "no day 2026-02-29"),
            ("2026-02-28T24:00:00Z", "no time of day 24:00:00"),
            ("10:60", "no time of day 10:60"),
            ("2026-02-28T10:00:00+24:00", "no offset +24:00"),
            ("1969-12-31T23:59:59Z", "before 1970"),
            ("9999-01-01T00:00:00Z", "after 2554"),
            ("-99999d", "before 1970"),
            ("-18446744073709551615d", "before 1970"),
            ("10:32Z", "needs its date"),
            ("seq:", "plain number"),
            ("seq:+1", "plain number"),
            ("seq:18446744073709551616", "too large"),
            ("flush:1", "flush:-1"),
            ("flush:-0", "flush:-1"),
            ("mark:a/b", "not a valid mark label"),
        ] {
            let refusal = read(text, &noon());
            assert!(refusal.contains("is no instant") && refusal.contains(part), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_skipped_local_time_is_refused_with_its_neighbours() {
        let refusal = read("2026-03-29 02:30", &noon());
        assert!(refusal.contains("2026-03-29T02:30:00 does not exist"), "{refusal}");
        assert!(refusal.contains("2026-03-29T01:59:59.999999999+01:00"), "{refusal}");
        assert!(refusal.contains("2026-03-29T03:00:00+02:00"), "{refusal}");
        for neighbour in ["2026-03-29T01:59:59.999999999+01:00", "2026-03-29T03:00:00+02:00"] {
            assert!(Instant::parse(neighbour, &noon()).is_ok());
        }
    }

    #[test]
    fn a_repeated_local_time_is_refused_with_both_readings() {
        let refusal = read("2026-10-25T02:30:00", &noon());
        assert!(refusal.contains("exists twice"), "{refusal}");
        assert!(refusal.contains("2026-10-25T02:30:00+02:00 or 2026-10-25T02:30:00+01:00"), "{refusal}");
    }

    #[test]
    fn a_time_of_day_is_the_newest_that_has_passed_even_when_clocks_change() {
        // In the first 02:40 of the day, 02:30 has passed only once.
        assert_eq!(read("02:30", &at("2026-10-25T00:40:00Z")), "2026-10-25T00:30:00.000000000Z");
        // In the second it has passed twice.
        assert!(read("02:30", &at("2026-10-25T01:40:00Z")).contains("exists twice"));
        // Before the first, yesterday's is meant.
        assert_eq!(read("02:30", &at("2026-10-25T00:20:00Z")), "2026-10-24T00:30:00.000000000Z");
        // 02:30 was skipped an hour ago.
        assert!(read("02:30", &at("2026-03-29T02:00:00Z")).contains("does not exist"));
        // And before it was to be skipped, yesterday's is meant.
        assert_eq!(read("02:30", &at("2026-03-29T00:00:00Z")), "2026-03-28T01:30:00.000000000Z");
    }

    #[test]
    fn a_bare_name_is_the_head() {
        assert_eq!(VolumeAt::parse("web1", &noon()).unwrap().to_string(), "web1@head");
        assert_eq!(VolumeAt::parse("web1@seq:7", &noon()).unwrap().instant, Instant::Seq(Seq(7)));
        for bad in ["", "@head", "web1@", "web1@head@head", "a b@head"] {
            assert!(VolumeAt::parse(bad, &noon()).is_err(), "{bad}");
        }
    }

    fn instants() -> impl Strategy<Value = Instant> {
        prop_oneof![
            Just(Instant::Head),
            any::<u64>().prop_map(|n| Instant::Seq(Seq(n))),
            any::<u64>().prop_map(Instant::Time),
            (1..=u64::MAX).prop_map(Instant::FlushBack),
            "[a-zA-Z0-9][a-zA-Z0-9._-]{0,20}"
                .prop_filter_map("head is no label", |label| label.parse().ok().map(Instant::Mark)),
            any::<u64>().prop_map(|n| Instant::Epoch(EpochId(n))),
        ]
    }

    proptest! {
        #[test]
        fn what_is_displayed_means_the_same_when_parsed(instant in instants(), now in 0..2_000_000_000_i64) {
            let new_york = TimeZone::posix("EST5EDT,M3.2.0,M11.1.0").unwrap();
            let now = Timestamp::from_second(now).unwrap().to_zoned(new_york);
            prop_assert_eq!(Instant::parse(&instant.to_string(), &now), Ok(instant.clone()));
            let at = VolumeAt { volume: "web1".parse().unwrap(), instant };
            prop_assert_eq!(VolumeAt::parse(&at.to_string(), &now), Ok(at));
        }

        #[test]
        fn a_local_time_that_is_taken_is_what_the_clocks_showed(
            seconds in 0..2_000_000_000_i64, hour in 0..24_i8, minute in 0..60_i8,
        ) {
            let zone = berlin();
            let now = Timestamp::from_second(seconds + 100_000).unwrap().to_zoned(zone.clone());
            if let Ok(Instant::Time(ns)) = Instant::parse(&format!("{hour:02}:{minute:02}"), &now) {
                let time = Timestamp::from_nanosecond(i128::from(ns)).unwrap().to_zoned(zone);
                prop_assert_eq!((time.hour(), time.minute(), time.second()), (hour, minute, 0));
                prop_assert!(time <= now);
                prop_assert!(now.timestamp().as_second() - time.timestamp().as_second() <= 49 * 3600);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = VolumeAt::parse(&text, &noon());
            let _ = Instant::parse(&text, &noon());
        }

        #[test]
        fn text_that_looks_like_a_time_never_panics(text in "[-+0-9:.TZz @dhmsunheadqflk]{0,40}") {
            let _ = VolumeAt::parse(&format!("v@{text}"), &noon());
        }
    }
}
