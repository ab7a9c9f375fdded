//! What is in a sector: it follows from the run, the sector and the write that put it there.

use e2e::workload::mix;

/// The smallest unit that a disk changes.
pub(crate) const SECTOR: usize = 512;
const WORDS: usize = SECTOR / 8;

/// The version of a sector that holds zeroes.
pub(crate) const ZEROES: u32 = 0;

/// Makes the content of a sector.
pub(crate) fn make(sector: &mut [u8], seed: u64, number: u64, version: u32) {
    if version == ZEROES {
        sector.fill(0);
        return;
    }
    for (index, bytes) in sector.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(index, seed, number, version).to_le_bytes());
    }
}

/// Whether a sector has this content.
pub(crate) fn is(sector: &[u8], seed: u64, number: u64, version: u32) -> bool {
    if version == ZEROES {
        return sector.iter().all(|byte| *byte == 0);
    }
    let same = |(index, bytes): (usize, &[u8])| *bytes == word(index, seed, number, version).to_le_bytes();
    sector.len() == SECTOR && sector.chunks_exact(8).enumerate().all(same)
}

/// The first words say in the clear what it is, so that what is found in the wrong place can be named.
fn word(index: usize, seed: u64, number: u64, version: u32) -> u64 {
    match index {
        0 => seed,
        1 => number,
        2 => version.into(),
        _ => mix(seed ^ mix(number << 32 ^ u64::from(version)) ^ index as u64),
    }
}

/// Says what a sector holds instead of what it should.
pub(crate) fn describe(sector: &[u8], seed: u64) -> String {
    if sector.iter().all(|byte| *byte == 0) {
        return "zeroes".to_owned();
    }
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(sector.chunks_exact(8)) {
        *word = bytes.try_into().map_or(0, u64::from_le_bytes);
    }
    let (number, version) = (words[1], words[2] as u32);
    if is(sector, seed, number, version) {
        return format!("sector {number}, version {version}");
    }
    if words[0] == seed {
        let good = (0..WORDS).take_while(|&index| words[index] == word(index, seed, number, version)).count();
        return format!("sector {number}, version {version}, torn or garbled from byte {} on", good * 8);
    }
    if is(sector, words[0], number, version) {
        return format!("sector {number} of another run, version {version}");
    }
    "bytes that nobody has written".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(number: u64, version: u32) -> Vec<u8> {
        let mut bytes = vec![1; SECTOR];
        make(&mut bytes, 7, number, version);
        bytes
    }

    #[test]
    fn every_sector_and_version_differs_and_is_recognised() {
        assert!(is(&sector(5, 2), 7, 5, 2));
        for other in [sector(5, 3), sector(4, 2), sector(5, ZEROES)] {
            assert!(!is(&other, 7, 5, 2));
        }
        assert!(is(&sector(5, ZEROES), 7, 9, ZEROES));
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        for byte in 0..SECTOR {
            let mut bytes = sector(5, 2);
            bytes[byte] ^= 1;
            assert!(!is(&bytes, 7, 5, 2), "byte {byte}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut torn = sector(5, 2);
        torn[256..].copy_from_slice(&sector(5, 1)[256..]);
        assert_eq!(describe(&torn, 7), "sector 5, version 2, torn or garbled from byte 256 on");
        assert_eq!(describe(&sector(6, 2), 7), "sector 6, version 2");
        assert_eq!(describe(&sector(6, 2), 8), "sector 6 of another run, version 2");
        assert_eq!(describe(&sector(6, ZEROES), 7), "zeroes");
        assert_eq!(describe(&[9; SECTOR], 7), "bytes that nobody has written");
    }
}
