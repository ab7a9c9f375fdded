//! Numbers of bytes, as people write and read them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// Suffixes and how far they shift. All are binary: a disk is bought in other units, but never divided in
/// them.
const SUFFIXES: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

/// A number of bytes: `4096`, `512M`, `10G`, `1TiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SizeError(String);

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' is no size: a number of bytes is expected, or one with K, M, G, T, P or E", self.0)?;
        f.write_str(" (powers of 1024), as in 10G")
    }
}

impl std::error::Error for SizeError {}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let refusal = || SizeError(text.escape_debug().take(80).collect());
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let suffix = &text[digits.len()..];
        // `10GB` is refused: to some it means powers of 1000.
        let letter = suffix.strip_suffix("iB").unwrap_or(suffix);
        let shift = match letter.chars().next() {
            None if suffix.is_empty() => 0,
            Some(letter_char) if letter.len() == 1 => SUFFIXES
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(&letter_char))
                .map(|(_, shift)| *shift)
                .ok_or_else(refusal)?,
            _ => return Err(refusal()),
        };
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refusal());
        }
        let number: u64 = digits.parse().map_err(|_| refusal())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refusal)
    }
}

/// The largest unit in which it is at least 1, with two decimals unless it is a whole number of them.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((suffix, shift)) = SUFFIXES.iter().rev().find(|(_, shift)| self.0 >> shift > 0) else {
            return write!(f, "{} B", self.0);
        };
        let unit = 1_u64 << shift;
        if self.0.is_multiple_of(unit) {
            write!(f, "{} {suffix}iB", self.0 / unit)
        } else {
            write!(f, "{:.2} {suffix}iB", self.0 as f64 / unit as f64)
        }
    }
}

/// From a string as above or from a plain number of bytes.
impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size, as in \"256M\" or 268435456")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("10G", 10 << 30), ("1TiB", 1 << 40), ("15E", 15 << 60)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        for text in ["", "G", "iB", "10GB", "1.5G", "-1", "+1", "1 G", "10X", "10GG", "16E", "1é", "٣"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn display_is_short() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (10 << 30, "10 GiB"), (1_610_612_737, "1.50 GiB")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
