//! What the file system and the device under it demand of direct I/O.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, Statx, StatxFlags, statx};

use crate::storage::{AlignedBuf, Alignment};

/// Where nothing says how large a physical block is (tmpfs, overlays, network file systems).
const PHYSICAL_BLOCK: u32 = 4096;
/// What memory direct I/O can use everywhere.
const MEMORY: u32 = 4096;
/// Every file system that does not say otherwise takes multiples of a sector.
const SECTOR: u32 = 512;

/// Asks the kernel about `file`, which should be a regular one on the file system in question.
///
/// # Errors
/// What statx says; `Unsupported` if the demands exceed what [`AlignedBuf`] gives.
pub(super) fn probe(file: impl AsFd) -> io::Result<Alignment> {
    let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN)?;
    let said = StatxFlags::from_bits_retain(facts.stx_mask).contains(StatxFlags::DIOALIGN);
    // Zero in either field: the file system knows the question and has no direct I/O on this file.
    let stated = said && facts.stx_dio_mem_align != 0 && facts.stx_dio_offset_align != 0;
    let (memory, offset) = if stated {
        (facts.stx_dio_mem_align, facts.stx_dio_offset_align)
    } else {
        (MEMORY, queue_limit(&facts, "logical_block_size").unwrap_or(SECTOR))
    };
    let physical = queue_limit(&facts, "physical_block_size").unwrap_or(PHYSICAL_BLOCK);
    check(Alignment { offset, memory, physical_block: physical.max(offset) })
}

fn check(alignment: Alignment) -> io::Result<Alignment> {
    let limit = AlignedBuf::ALIGN as u32;
    let fits = |value: u32| value.is_power_of_two() && value <= limit;
    if fits(alignment.offset) && fits(alignment.memory) && alignment.physical_block.is_power_of_two() {
        return Ok(alignment);
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!("direct I/O here demands {alignment:?}; more than {limit} bytes are not supported"),
    ))
}

/// A number from the queue directory of the block device that the file lies on; a partition has its disk's.
fn queue_limit(facts: &Statx, name: &str) -> Option<u32> {
    let base = format!("/sys/dev/block/{}:{}", facts.stx_dev_major, facts.stx_dev_minor);
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| fs::read_to_string(format!("{base}/{queue}/{name}")).ok())
        .and_then(|text| text.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_regular_file_has_plausible_demands() {
        let found = probe(tempfile::tempfile().unwrap()).unwrap();
        assert!(found.offset >= 1 && found.physical_block >= found.offset, "{found:?}");
    }

    #[test]
    fn demands_beyond_a_buffers_alignment_are_refused() {
        let too_much = Alignment { offset: 65536, memory: 512, physical_block: 65536 };
        assert_eq!(check(too_much).unwrap_err().kind(), io::ErrorKind::Unsupported);
        let large_device = Alignment { offset: 512, memory: 512, physical_block: 65536 };
        assert_eq!(check(large_device).unwrap(), large_device);
    }
}
