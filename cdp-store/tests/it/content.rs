//! What sectors hold: every sector that a test writes has a number of its own, from which all its bytes are made.

use cdp_types::SECTOR_SIZE;

/// Length of a sector, in bytes.
pub const SECTOR: usize = SECTOR_SIZE as usize;

/// What a sector holds: 0 stands for zeroes.
pub type Stamp = u64;

const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

fn word(stamp: Stamp, index: usize) -> u64 {
    stamp.wrapping_add((index as u64).wrapping_mul(stamp | 1).wrapping_mul(SPREAD))
}

/// Fills a sector.
pub fn fill(stamp: Stamp, sector: &mut [u8]) {
    if stamp == 0 {
        sector.fill(0);
        return;
    }
    for (index, bytes) in sector.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(stamp, index).to_le_bytes());
    }
}

/// What a sector holds; `None` if it is nothing that [`fill`] makes: torn or damaged.
pub fn stamp_of(sector: &[u8]) -> Option<Stamp> {
    let words = sector.chunks_exact(8).map(|bytes| bytes.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b)));
    let mut words = words.enumerate();
    let (_, stamp) = words.next()?;
    let whole = if stamp == 0 { words.all(|(_, w)| w == 0) } else { words.all(|(i, w)| w == word(stamp, i)) };
    whole.then_some(stamp)
}

/// The stamps of consecutive sectors.
pub fn stamps_of(bytes: &[u8]) -> Vec<Option<Stamp>> {
    bytes.chunks_exact(SECTOR).map(stamp_of).collect()
}

#[test]
fn a_sector_tells_what_it_holds_and_whether_it_is_whole() {
    let mut sector = [0; SECTOR];
    assert_eq!(stamp_of(&sector), Some(0));
    fill(77, &mut sector);
    assert_eq!(stamp_of(&sector), Some(77));
    sector[511] ^= 1;
    assert_eq!(stamp_of(&sector), None);
}
