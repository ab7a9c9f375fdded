//! Bytes of a memory image's header (`docs/format.md`, *Memory image*).

use cdp_types::crc32c;
use serde::{Deserialize, Serialize};

use super::layout::{Layout, Slot, SlotKind};
use crate::stream::RamBlock;
use crate::{Error, ErrorKind, PAGE_SIZE, Place};

const MAGIC: [u8; 8] = *b"HINDSMEM";
const VERSION: u16 = 1;
const STATE_UNFINISHED: u16 = 1;
const STATE_COMPLETE: u16 = 2;
/// Where slots begin; header, slots' entries and facts lie before it.
pub(super) const DATA_START: u64 = 2 << 20;
/// The most entries that there may be, those of vacant slots included.
pub(super) const MAX_SLOTS: usize = 4096;
/// The most bytes of JSON.
const MAX_FACTS: usize = 64 << 10;
const HEADER: usize = PAGE_SIZE;
const ENTRY: usize = 320;
/// The longest that header, entries and facts can be.
const MAX_HEADER: usize = DATA_START as usize;

/// Offsets in the header.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const STATE: usize = 10;
    pub(super) const LENGTH: usize = 12;
    pub(super) const FEATURES: usize = 16;
    pub(super) const CHECKSUM: usize = 24;
    pub(super) const SLOTS: usize = 28;
    pub(super) const FACTS: usize = 32;
    pub(super) const RAM_SECTION: usize = 36;
    pub(super) const RAM_BYTES: usize = 40;
    pub(super) const END: usize = 48;
    pub(super) const ZERO: usize = 56;
}

/// Offsets in a slot's entry.
mod entry {
    pub(super) const KIND: usize = 0;
    pub(super) const FLAGS: usize = 1;
    pub(super) const NAME_LENGTH: usize = 2;
    pub(super) const CHECKSUM: usize = 4;
    pub(super) const OFFSET: usize = 8;
    pub(super) const RESERVED: usize = 16;
    pub(super) const LENGTH: usize = 24;
    pub(super) const ADDRESS: usize = 32;
    pub(super) const ORDER: usize = 40;
    pub(super) const ZERO: usize = 44;
    pub(super) const NAME: usize = 64;
}

const FLAG_PRESENT: u8 = 1;
const FLAG_SAVED: u8 = 2;
const FLAG_ADDRESS: u8 = 4;

const _: () = {
    assert!(at::VERSION == at::MAGIC + 8 && at::STATE == at::VERSION + 2 && at::LENGTH == at::STATE + 2);
    assert!(at::FEATURES == at::LENGTH + 4 && at::CHECKSUM == at::FEATURES + 8);
    assert!(at::SLOTS == at::CHECKSUM + 4 && at::FACTS == at::SLOTS + 4 && at::RAM_SECTION == at::FACTS + 4);
    assert!(at::RAM_BYTES == at::RAM_SECTION + 4 && at::END == at::RAM_BYTES + 8 && at::ZERO == at::END + 8);
    assert!(entry::NAME_LENGTH == entry::FLAGS + 1 && entry::CHECKSUM == entry::NAME_LENGTH + 2);
    assert!(entry::OFFSET == entry::CHECKSUM + 4 && entry::RESERVED == entry::OFFSET + 8);
    assert!(entry::LENGTH == entry::RESERVED + 8 && entry::ADDRESS == entry::LENGTH + 8);
    assert!(entry::ORDER == entry::ADDRESS + 8 && entry::ZERO == entry::ORDER + 4);
    assert!(entry::NAME + 256 == ENTRY && entry::KIND == 0);
    assert!(HEADER + MAX_SLOTS * ENTRY + MAX_FACTS <= MAX_HEADER);
};

/// What must be the same where the machine is restored. At most 64 KiB of JSON, whatever the caller adds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// As `query-version` says: `10.0.2`.
    pub qemu_version: String,
    /// With version, as the stream says: `pc-i440fx-10.0`.
    pub machine_type: String,
    /// The guest's memory as it was asked for with `-m`, in bytes.
    pub memory_bytes: u64,
    /// Whatever else the caller wants to find again.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// What a memory image holds, without the memory itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Whether saving came to its end.
    pub complete: bool,
    /// The machine.
    pub facts: MachineFacts,
    /// Bytes of its memory.
    pub ram_bytes: u64,
    /// The number of the section `ram`.
    pub(super) ram_section: u32,
    pub(super) layout: Layout,
}

impl Image {
    /// The machine's memory, in the order of the stream.
    #[must_use]
    pub fn blocks(&self) -> Vec<RamBlock> {
        let block =
            |slot: &Slot| RamBlock { name: slot.name.clone(), length: slot.length, address: slot.address };
        self.layout.ram().into_iter().map(block).collect()
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        let too_large = |what: String| Error::new(ErrorKind::Limit, Place::Volume(0), what);
        let facts = serde_json::to_vec(&self.facts)
            .map_err(|error| too_large("the machine's facts are no JSON".to_owned()).because(error))?;
        if facts.len() > MAX_FACTS {
            return Err(too_large(format!("{} bytes of facts, {MAX_FACTS} are allowed", facts.len())));
        }
        let slots = self.layout.slots();
        let length = HEADER + slots.len() * ENTRY + facts.len();
        let mut bytes = vec![0; length.next_multiple_of(PAGE_SIZE)];
        let state = if self.complete { STATE_COMPLETE } else { STATE_UNFINISHED };
        put(&mut bytes, at::MAGIC, &MAGIC);
        put(&mut bytes, at::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, at::STATE, &state.to_le_bytes());
        put(&mut bytes, at::LENGTH, &(length as u32).to_le_bytes());
        put(&mut bytes, at::SLOTS, &(slots.len() as u32).to_le_bytes());
        put(&mut bytes, at::FACTS, &(facts.len() as u32).to_le_bytes());
        put(&mut bytes, at::RAM_SECTION, &self.ram_section.to_le_bytes());
        put(&mut bytes, at::RAM_BYTES, &self.ram_bytes.to_le_bytes());
        put(&mut bytes, at::END, &self.layout.end().to_le_bytes());
        for (slot, entry) in slots.iter().zip(bytes[HEADER..].chunks_exact_mut(ENTRY)) {
            encode_slot(slot, entry);
        }
        put(&mut bytes, length - facts.len(), &facts);
        let checksum = checksum(&bytes[..length]);
        put(&mut bytes, at::CHECKSUM, &checksum.to_le_bytes());
        Ok(bytes)
    }

    /// How many bytes to decode, of which these are the first 4096.
    ///
    /// # Errors
    /// `NoImage`, `Damaged`.
    pub(super) fn header_bytes(first: &[u8]) -> Result<usize, Error> {
        let error = |kind, what: &str| Err(Error::new(kind, Place::Volume(0), what));
        if !first.starts_with(&MAGIC) {
            return error(ErrorKind::NoImage, "it holds something else");
        }
        match u32::from_le_bytes(get(first, at::LENGTH)) as usize {
            length @ HEADER..=MAX_HEADER => Ok(length),
            _ => error(ErrorKind::Damaged, "its header's length"),
        }
    }

    /// Decodes what the volume begins with.
    ///
    /// # Errors
    /// `NoImage`, `Newer`, `Damaged`.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let error = |kind, what: &str| Error::new(kind, Place::Volume(0), what);
        let damaged = |what: &str| error(ErrorKind::Damaged, what);
        let length = Self::header_bytes(bytes)?;
        let covered = bytes.get(..length).ok_or_else(|| damaged("its length"))?;
        if u32::from_le_bytes(get(covered, at::CHECKSUM)) != checksum(covered) {
            return Err(damaged("its header's checksum"));
        }
        let version = u16::from_le_bytes(get(covered, at::VERSION));
        if version != VERSION || get::<8>(covered, at::FEATURES) != [0; 8] {
            return Err(error(
                ErrorKind::Newer,
                &format!("version {version}, or features that are not known"),
            ));
        }
        let slots = u32::from_le_bytes(get(covered, at::SLOTS)) as usize;
        let facts = u32::from_le_bytes(get(covered, at::FACTS)) as usize;
        if slots > MAX_SLOTS || facts > MAX_FACTS || HEADER + slots * ENTRY + facts != length {
            return Err(damaged("its header's lengths"));
        }
        let slots = covered[HEADER..length - facts].chunks_exact(ENTRY).map(decode_slot);
        let slots = slots.collect::<Option<Vec<_>>>().ok_or_else(|| damaged("a slot's entry"))?;
        let layout = Layout::from_slots(slots).ok_or_else(|| damaged("its slots"))?;
        let ram_bytes = u64::from_le_bytes(get(covered, at::RAM_BYTES));
        let state = u16::from_le_bytes(get(covered, at::STATE));
        let fits = layout.end() == u64::from_le_bytes(get(covered, at::END))
            && layout.ram().iter().map(|slot| slot.length).sum::<u64>() == ram_bytes;
        if !fits || ![STATE_UNFINISHED, STATE_COMPLETE].contains(&state) {
            return Err(damaged("its header's numbers"));
        }
        let facts = serde_json::from_slice(&covered[length - facts..])
            .map_err(|source| damaged("its facts are not what they should be").because(source))?;
        let ram_section = u32::from_le_bytes(get(covered, at::RAM_SECTION));
        Ok(Self { complete: state == STATE_COMPLETE, facts, ram_bytes, ram_section, layout })
    }
}

fn encode_slot(slot: &Slot, bytes: &mut [u8]) {
    let mut flags = if slot.present { FLAG_PRESENT } else { 0 };
    flags |= if slot.saved { FLAG_SAVED } else { 0 };
    flags |= if slot.address.is_some() { FLAG_ADDRESS } else { 0 };
    bytes[entry::KIND] = slot.kind as u8;
    bytes[entry::FLAGS] = flags;
    bytes[entry::NAME_LENGTH] = slot.name.len() as u8;
    put(bytes, entry::CHECKSUM, &slot.checksum.to_le_bytes());
    put(bytes, entry::OFFSET, &slot.offset.to_le_bytes());
    put(bytes, entry::RESERVED, &slot.reserved.to_le_bytes());
    put(bytes, entry::LENGTH, &slot.length.to_le_bytes());
    put(bytes, entry::ADDRESS, &slot.address.unwrap_or(0).to_le_bytes());
    put(bytes, entry::ORDER, &slot.order.to_le_bytes());
    put(bytes, entry::NAME, slot.name.as_bytes());
}

fn decode_slot(bytes: &[u8]) -> Option<Slot> {
    let flags = bytes[entry::FLAGS];
    let name = &bytes[entry::NAME..][..usize::from(bytes[entry::NAME_LENGTH])];
    let address = u64::from_le_bytes(get(bytes, entry::ADDRESS));
    Some(Slot {
        kind: SlotKind::from_byte(bytes[entry::KIND])?,
        name: String::from_utf8(name.to_vec()).ok()?,
        present: flags & FLAG_PRESENT != 0,
        saved: flags & FLAG_SAVED != 0,
        address: (flags & FLAG_ADDRESS != 0).then_some(address),
        checksum: u32::from_le_bytes(get(bytes, entry::CHECKSUM)),
        offset: u64::from_le_bytes(get(bytes, entry::OFFSET)),
        reserved: u64::from_le_bytes(get(bytes, entry::RESERVED)),
        length: u64::from_le_bytes(get(bytes, entry::LENGTH)),
        order: u32::from_le_bytes(get(bytes, entry::ORDER)),
    })
}

/// Of everything but the checksum itself.
fn checksum(covered: &[u8]) -> u32 {
    crc32c([&covered[..at::CHECKSUM], &covered[at::CHECKSUM + 4..]])
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&bytes[at..at + N]);
    value
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image() -> Image {
        let mut layout = Layout::default();
        let block = RamBlock { name: "pc.ram".into(), length: 5 << 20, address: Some(7) };
        layout.place_ram(&[block]).unwrap();
        let facts = MachineFacts { machine_type: "q35".into(), memory_bytes: 5 << 20, ..Default::default() };
        Image { complete: true, facts, ram_bytes: 5 << 20, ram_section: 2, layout }
    }

    #[test]
    fn a_header_decodes_to_what_was_encoded() {
        let bytes = image().encode().unwrap();
        assert_eq!(Image::decode(&bytes).unwrap(), image());
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        let good = image().encode().unwrap();
        let length = u32::from_le_bytes(get(&good, at::LENGTH)) as usize;
        for at in (0..64).chain(HEADER..length) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let kind = Image::decode(&bad).unwrap_err().kind();
            let expected = if at < 8 { ErrorKind::NoImage } else { ErrorKind::Damaged };
            assert_eq!(kind, expected, "byte {at}");
        }
    }

    #[test]
    fn what_a_newer_version_wrote_is_newer_and_not_damaged() {
        for (at, value) in [(at::VERSION, 2), (at::FEATURES, 1)] {
            let mut bytes = image().encode().unwrap();
            bytes[at] = value;
            let length = u32::from_le_bytes(get(&bytes, at::LENGTH)) as usize;
            let checksum = checksum(&bytes[..length]);
            put(&mut bytes, at::CHECKSUM, &checksum.to_le_bytes());
            assert_eq!(Image::decode(&bytes).unwrap_err().kind(), ErrorKind::Newer);
        }
    }

    #[test]
    fn facts_are_bounded() {
        let mut image = image();
        image.facts.more.insert("long".into(), "x".repeat(MAX_FACTS).into());
        assert_eq!(image.encode().unwrap_err().kind(), ErrorKind::Limit);
    }
}
