//! The checksum of everything that is kept.

use crc_fast::{CrcAlgorithm, Digest, crc32_iscsi};

/// CRC-32C (Castagnoli; CRC-32/ISCSI in the catalogue of CRCs) of some pieces, one after the other.
#[must_use]
pub fn crc32c<const N: usize>(pieces: [&[u8]; N]) -> u32 {
    if let [piece] = pieces[..] {
        return crc32_iscsi(piece);
    }
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    pieces.iter().for_each(|piece| digest.update(piece));
    // It has 32 bits, in the low half.
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_catalogue_s_and_pieces_make_no_difference() {
        // The check value of CRC-32/ISCSI (RFC 3720, appendix B.4, has others).
        assert_eq!(crc32c([b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c([b"1234", b"", b"56789"]), 0xe306_9283);
        let block: Vec<u8> = (0..4096_u32).map(|n| (n * 7 / 3) as u8).collect();
        assert_eq!(crc32c([&block[..1000], &block[1000..]]), crc32c([&block]));
    }
}
