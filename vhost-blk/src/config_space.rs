//! The configuration space of a block device (virtio 1.3, 5.2.4).

use cdp_types::{BLOCK_SIZE, DeviceInfo, SECTOR_SIZE};

use crate::config::{MAX_RANGES, SEG_MAX, SIZE_MAX};

/// Bytes of the configuration space up to the write-zeroes fields; what lies behind belongs to features that are
/// not offered, and reads as zero.
const LEN: usize = 60;
/// The one byte that a guest may write: 1 is write-back, 0 write-through.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// The `size` bytes from `offset` that a front end asks for.
pub(crate) fn read(info: &DeviceInfo, queues: u16, writeback: bool, offset: u32, size: u32) -> Vec<u8> {
    let space = build(info, queues, writeback);
    let at =
        |index: u64| usize::try_from(index).ok().and_then(|index| space.get(index)).copied().unwrap_or(0);
    (u64::from(offset)..u64::from(offset) + u64::from(size)).map(at).collect()
}

fn build(info: &DeviceInfo, queues: u16, writeback: bool) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
    let logical = info.logical_block_size.max(SECTOR_SIZE as u32);
    let physical = info.physical_block_size.max(logical);
    // One discard covers at most this; it keeps the bounds aligned to blocks.
    let max_sectors = u32::MAX / 8 * 8;
    let block_sectors = (BLOCK_SIZE / SECTOR_SIZE) as u32;

    put(0, &(info.capacity / SECTOR_SIZE).to_le_bytes());
    let (size_max, seg_max) = largest(info.max_write_bytes);
    put(8, &size_max.to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    put(20, &logical.to_le_bytes());
    put(24, &[(physical / logical).ilog2() as u8]); // logical blocks per physical one, as a power of two
    put(26, &((physical / logical) as u16).to_le_bytes()); // smallest size that costs no read, in logical blocks
    put(28, &(SIZE_MAX / logical).to_le_bytes()); // best size, in logical blocks
    put(WRITEBACK_OFFSET as usize, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &max_sectors.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &block_sectors.to_le_bytes());
    put(48, &max_sectors.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]); // write-zeroes may give space back
    space
}

/// Bytes in a segment and segments in a request, so that no request a guest can make of them is longer than a write may
/// be. A segment has 4 KiB at least: Linux refuses less than a page.
fn largest(max_write_bytes: u64) -> (u32, u32) {
    let seg_max = u64::from(SEG_MAX).min(max_write_bytes / BLOCK_SIZE).max(1);
    let size_max = u64::from(SIZE_MAX).min(max_write_bytes / seg_max / BLOCK_SIZE * BLOCK_SIZE);
    (size_max as u32, seg_max as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DeviceInfo {
        DeviceInfo {
            capacity: 10 << 30,
            logical_block_size: 512,
            physical_block_size: 4096,
            max_write_bytes: 32 << 20,
            read_only: false,
            serial: String::new(),
        }
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let space = read(&info(), 3, true, 0, 60);
        let u32_at = |at: usize| u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]]);
        assert_eq!(space[..8], (10u64 << 21).to_le_bytes());
        assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (SIZE_MAX, SEG_MAX, 512));
        assert_eq!((space[24], space[32], space[34]), (3, 1, 3));
        assert_eq!((u32_at(40), u32_at(44), u32_at(52), space[56]), (256, 8, 256, 1));
    }

    #[test]
    fn no_request_of_a_guest_is_longer_than_the_disk_takes() {
        assert_eq!(largest(32 << 20), (SIZE_MAX, SEG_MAX));
        for max_write_bytes in (18..=25).map(|bits| 1u64 << bits) {
            let (size_max, seg_max) = largest(max_write_bytes);
            let longest = u64::from(size_max) * u64::from(seg_max);
            assert!(longest <= max_write_bytes, "{size_max} bytes in {seg_max} segments");
            // Not much is given away, and pages fit.
            assert!(longest >= max_write_bytes / 2, "{size_max} bytes in {seg_max} segments");
            assert!(size_max >= 4096 && size_max.is_multiple_of(4096), "{size_max} bytes");
        }
        let space = read(&DeviceInfo { max_write_bytes: 256 << 10, ..info() }, 1, true, 8, 8);
        assert_eq!(space, [4096u32.to_le_bytes(), 64u32.to_le_bytes()].concat());
    }

    #[test]
    fn what_lies_behind_the_fields_reads_as_zero() {
        assert_eq!(read(&info(), 1, true, 58, 4), [0; 4]);
        assert_eq!(read(&info(), 1, false, u32::MAX - 1, 2), [0; 2]);
        assert_eq!(read(&info(), 1, false, WRITEBACK_OFFSET, 1), [0]);
    }
}
