//! Which range of the volume belongs to what.

use cdp_types::ByteRange;

use super::format::{DATA_START, MAX_SLOTS};
use crate::stream::{DEVICE_BYTES, RamBlock};
use crate::{Error, ErrorKind, PAGE_SIZE, Place};

/// What slots begin at, and their least size: one leaf of the volume's map.
const SLOT_UNIT: u64 = 2 << 20;
/// No machine has more memory, so no sum of lengths overflows.
const MAX_LENGTH: u64 = 1 << 48;
/// What is not memory is read in one piece.
const MAX_OPAQUE: u64 = DEVICE_BYTES as u64;

/// What a slot is for; the numbers are those of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SlotKind {
    Ram = 1,
    Head = 2,
    Commands = 3,
    Tail = 4,
}

impl SlotKind {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        [Self::Ram, Self::Head, Self::Commands, Self::Tail].into_iter().find(|&kind| kind as u8 == byte)
    }

    /// The most bytes that one may have.
    fn max_length(self) -> u64 {
        if self == Self::Ram { MAX_LENGTH } else { MAX_OPAQUE }
    }
}

/// A range of the volume that is reserved, and what of it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) kind: SlotKind,
    /// A RAM block's; otherwise empty.
    pub(super) name: String,
    /// Whether this image has it; else it is kept free for when it comes back.
    pub(super) present: bool,
    /// Whether its content is here. Not so for shared files that QEMU was told to leave out.
    pub(super) saved: bool,
    pub(super) address: Option<u64>,
    /// Of the content, unless it is RAM, whose blocks the volume itself has checksums of.
    pub(super) checksum: u32,
    pub(super) offset: u64,
    pub(super) reserved: u64,
    /// Bytes in use; 0 if it is not present.
    pub(super) length: u64,
    /// A RAM block's place in the list.
    pub(super) order: u32,
}

impl Slot {
    fn end(&self) -> u64 {
        self.offset + self.reserved
    }

    fn is_sound(&self) -> bool {
        let aligned = |number: u64| number.is_multiple_of(SLOT_UNIT) && number <= MAX_LENGTH;
        aligned(self.offset)
            && self.offset >= DATA_START
            && aligned(self.reserved)
            && self.length <= self.reserved.min(self.kind.max_length())
            && (self.present || self.length == 0)
            && (self.kind == SlotKind::Ram) != self.name.is_empty()
            && (self.kind != SlotKind::Ram || self.length.is_multiple_of(PAGE_SIZE as u64))
    }
}

/// All slots of a volume, by place; none overlaps another, and no two are for the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    slots: Vec<Slot>,
}

impl Layout {
    /// The slots that a header lists; nothing if they contradict each other.
    pub(super) fn from_slots(slots: Vec<Slot>) -> Option<Self> {
        // First, since only what is sound is known to have an end.
        let sound = slots.iter().all(Slot::is_sound);
        let apart = sound && slots.windows(2).all(|pair| pair[0].end() <= pair[1].offset);
        let mut keys: Vec<_> = slots.iter().map(|slot| (slot.kind, &slot.name)).collect();
        keys.sort_unstable();
        let unique = keys.windows(2).all(|pair| pair[0] != pair[1]);
        let layout = Self { slots };
        let dense = layout.ram().iter().zip(0..).all(|(slot, order)| slot.order == order);
        (apart && unique && dense).then_some(layout)
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The size of volume that it needs, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.slots.last().map_or(DATA_START, Slot::end)
    }

    /// The RAM blocks of this image, in the order of the stream.
    pub(super) fn ram(&self) -> Vec<&Slot> {
        let present = |slot: &&Slot| slot.present && slot.kind == SlotKind::Ram;
        let mut ram: Vec<_> = self.slots.iter().filter(present).collect();
        ram.sort_by_key(|slot| slot.order);
        ram
    }

    pub(super) fn find(&self, kind: SlotKind) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.present && slot.kind == kind)
    }

    /// Gives each of the blocks a slot, that of its name if there is one. Says which ranges must become zero: what is
    /// no longer used.
    ///
    /// # Errors
    /// `Limit`: more blocks than a volume has slots for.
    pub(super) fn place_ram(&mut self, blocks: &[RamBlock]) -> Result<Vec<ByteRange>, Error> {
        let mut stale = Vec::new();
        let names: std::collections::HashSet<_> = blocks.iter().map(|block| block.name.as_str()).collect();
        for slot in self.slots.iter_mut().filter(|slot| slot.kind == SlotKind::Ram) {
            if !names.contains(slot.name.as_str()) {
                stale.push(ByteRange::new(slot.offset, slot.length));
                (slot.present, slot.saved, slot.length) = (false, false, 0);
            }
        }
        for (block, order) in blocks.iter().zip(0..) {
            let slot = self.place(SlotKind::Ram, &block.name, block.length, &mut stale)?;
            (slot.order, slot.address, slot.saved) = (order, block.address, true);
        }
        stale.retain(|range| range.len > 0);
        Ok(stale)
    }

    /// Gives up the slots of RAM blocks that are not among these. Says which ranges must become zero.
    pub(super) fn give_up_others(&mut self, blocks: &[RamBlock]) -> Vec<ByteRange> {
        let names: std::collections::HashSet<_> = blocks.iter().map(|block| block.name.as_str()).collect();
        let is_other = |slot: &Slot| slot.kind == SlotKind::Ram && !names.contains(slot.name.as_str());
        let others = self.slots.iter().filter(|slot| is_other(slot));
        let stale = others.map(|slot| ByteRange::new(slot.offset, slot.reserved)).collect();
        self.slots.retain(|slot| !is_other(slot));
        stale
    }

    /// Gives one thing its slot, of at least `length` bytes.
    pub(super) fn place(
        &mut self,
        kind: SlotKind,
        name: &str,
        length: u64,
        stale: &mut Vec<ByteRange>,
    ) -> Result<&mut Slot, Error> {
        if length > kind.max_length() {
            return Err(Error::new(ErrorKind::Limit, Place::Nowhere, format!("'{name}' of {length} bytes")));
        }
        let known = self.slots.iter().position(|slot| slot.kind == kind && slot.name == name);
        let at = match known {
            Some(at) if length <= self.slots[at].reserved => {
                let slot = &mut self.slots[at];
                let used = length.next_multiple_of(PAGE_SIZE as u64);
                let before = slot.length.next_multiple_of(PAGE_SIZE as u64);
                if before > used {
                    stale.push(ByteRange::new(slot.offset + used, before - used));
                }
                at
            }
            outgrown => {
                if let Some(at) = outgrown {
                    let slot = self.slots.remove(at);
                    stale.push(ByteRange::new(slot.offset, slot.length.next_multiple_of(PAGE_SIZE as u64)));
                }
                self.reserve(kind, name, length)?
            }
        };
        let slot = &mut self.slots[at];
        (slot.present, slot.length) = (true, length);
        Ok(slot)
    }

    /// Reserves the first gap that is large enough.
    fn reserve(&mut self, kind: SlotKind, name: &str, length: u64) -> Result<usize, Error> {
        if self.slots.len() >= MAX_SLOTS {
            // What has not come back makes room; its range holds zeroes.
            self.slots.retain(|slot| slot.present);
        }
        if self.slots.len() >= MAX_SLOTS {
            let what = format!("more than {MAX_SLOTS} RAM blocks");
            return Err(Error::new(ErrorKind::Limit, Place::Nowhere, what));
        }
        let reserved = reservation(length);
        let mut offset = DATA_START;
        let mut at = 0;
        while at < self.slots.len() && self.slots[at].offset - offset < reserved {
            offset = self.slots[at].end();
            at += 1;
        }
        let name = name.to_owned();
        self.slots.insert(
            at,
            Slot {
                kind,
                name,
                present: true,
                saved: true,
                address: None,
                checksum: 0,
                offset,
                reserved,
                length,
                order: 0,
            },
        );
        Ok(at)
    }

    /// All that is reserved and not used: what an image that was never finished may have left anywhere.
    pub(super) fn unused(&self) -> Vec<ByteRange> {
        let unused = |slot: &Slot| {
            let used = slot.length.next_multiple_of(PAGE_SIZE as u64);
            ByteRange::new(slot.offset + used, slot.reserved - used)
        };
        self.slots.iter().map(unused).filter(|range| range.len > 0).collect()
    }

    pub(super) fn set_saved(&mut self, order: u32, saved: bool) {
        let is = |slot: &&mut Slot| slot.present && slot.kind == SlotKind::Ram && slot.order == order;
        self.slots.iter_mut().filter(is).for_each(|slot| slot.saved = saved);
    }
}

/// Room to grow in place: address space of a sparse volume costs nothing.
fn reservation(length: u64) -> u64 {
    length.max(SLOT_UNIT).next_power_of_two()
}

/// A size of volume, in bytes, that holds an image of this memory and of devices' state of up to `device_bytes`; if it
/// is not the volume's first image, and blocks have come, gone or grown, it may need more.
#[must_use]
pub fn capacity_for(blocks: &[RamBlock], device_bytes: u64) -> u64 {
    let lengths = blocks.iter().map(|block| block.length.min(MAX_LENGTH));
    let others = [0, 0, device_bytes.min(MAX_LENGTH)];
    lengths.chain(others).map(reservation).fold(DATA_START, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn blocks(list: &[(&str, u64)]) -> Vec<RamBlock> {
        let block = |&(name, pages): &(&str, u64)| RamBlock {
            name: name.to_owned(),
            length: pages * PAGE_SIZE as u64,
            address: None,
        };
        list.iter().map(block).collect()
    }

    fn places(layout: &Layout) -> Vec<(String, u64)> {
        layout.ram().iter().map(|slot| (slot.name.clone(), slot.offset)).collect()
    }

    #[test]
    fn a_block_keeps_its_place_when_others_come_and_go_and_it_changes_its_size() {
        let mut layout = Layout::default();
        assert_eq!(layout.place_ram(&blocks(&[("a", 3), ("b", 700), ("c", 1)])).unwrap(), []);
        let first = places(&layout);
        let stale = layout.place_ram(&blocks(&[("x", 9), ("c", 2), ("a", 2)])).unwrap();
        let second = places(&layout);
        assert_eq!(second[1..], [first[2].clone(), first[0].clone()]);
        assert_eq!(stale, [ByteRange::new(first[1].1, 700 * 4096), ByteRange::new(first[0].1 + 8192, 4096)]);
        layout.place_ram(&blocks(&[("a", 3), ("b", 700), ("c", 1)])).unwrap();
        assert_eq!(places(&layout), first, "what has gone comes back to its place");
    }

    #[test]
    fn a_block_that_outgrows_its_slot_moves_and_leaves_zeroes() {
        let mut layout = Layout::default();
        layout.place_ram(&blocks(&[("a", 512), ("b", 1)])).unwrap();
        let before = places(&layout);
        let stale = layout.place_ram(&blocks(&[("a", 513), ("b", 1)])).unwrap();
        assert_eq!(stale, [ByteRange::new(before[0].1, 512 * 4096)]);
        let after = places(&layout);
        assert_eq!(after[1], before[1]);
        assert!(after[0].1 > before[1].1);
        // The gap is used by the next that fits.
        layout.place_ram(&blocks(&[("a", 513), ("b", 1), ("new", 1)])).unwrap();
        assert_eq!(places(&layout)[2].1, before[0].1);
        assert_eq!(Layout::from_slots(layout.slots().to_vec()), Some(layout));
    }

    #[test]
    fn slots_that_overlap_are_no_layout() {
        let mut layout = Layout::default();
        layout.place_ram(&blocks(&[("a", 512), ("b", 1)])).unwrap();
        let mut slots = layout.slots().to_vec();
        slots[1].offset = slots[0].offset;
        assert_eq!(Layout::from_slots(slots.clone()), None);
        // Nor is one that has no end.
        slots[0].offset = u64::MAX - (SLOT_UNIT - 1);
        assert_eq!(Layout::from_slots(slots), None);
    }

    #[test]
    fn what_is_not_memory_is_bounded() {
        let mut layout = Layout::default();
        let length = layout.place(SlotKind::Tail, "", MAX_OPAQUE, &mut Vec::new()).unwrap().length;
        assert_eq!(Layout::from_slots(layout.slots().to_vec()), Some(layout.clone()));
        let longer = layout.place(SlotKind::Tail, "", length + 1, &mut Vec::new());
        assert_eq!(longer.unwrap_err().kind(), ErrorKind::Limit);
        let mut slots = layout.slots().to_vec();
        (slots[0].length, slots[0].reserved) = (length + 1, 1 << 40);
        assert_eq!(Layout::from_slots(slots), None);
    }

    #[test]
    fn a_volume_of_the_advised_size_is_large_enough() {
        let list = blocks(&[("a", 1 << 18), ("b", 3), ("c", 5000)]);
        let mut layout = Layout::default();
        layout.place_ram(&list).unwrap();
        for (kind, length) in [(SlotKind::Head, 100), (SlotKind::Commands, 0), (SlotKind::Tail, 3 << 20)] {
            layout.place(kind, "", length, &mut Vec::new()).unwrap();
        }
        assert!(layout.end() <= capacity_for(&list, 3 << 20));
    }
}
