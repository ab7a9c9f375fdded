//! The bytes of one file, sparse, and cheap to copy as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: usize = 4096;

type Page = [u8; PAGE];

#[derive(Clone, Default)]
pub(super) struct Content {
    /// Pages that are not all zeroes, by number; shared with copies until one of them changes.
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Grows to at least `len`, with zeroes.
    pub(super) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Fills `into` from `offset`; what is past the end is zeroes.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        for_each_page(offset, into.len(), |page, start, range| {
            let part = &mut into[range];
            match self.pages.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[start..start + part.len()]),
                None => part.fill(0),
            }
        });
    }

    pub(super) fn write(&mut self, offset: u64, from: &[u8]) {
        for_each_page(offset, from.len(), |page, start, range| {
            let part = &from[range];
            let zeroes = part.iter().all(|&byte| byte == 0);
            if zeroes && part.len() == PAGE {
                self.pages.remove(&page);
            } else if !zeroes || self.pages.contains_key(&page) {
                let bytes = Arc::make_mut(self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE])));
                bytes[start..start + part.len()].copy_from_slice(part);
            }
        });
        self.grow(offset + from.len() as u64);
    }

    pub(super) fn flip_bit(&mut self, offset: u64, bit: u8) {
        if offset < self.len {
            let mut byte = [0];
            self.read(offset, &mut byte);
            self.write(offset, &[byte[0] ^ (1 << bit)]);
        }
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes);
        bytes
    }
}

/// Calls `f(page, start within it, range of the bytes done)` for each page of `len` bytes from `offset`.
fn for_each_page(offset: u64, len: usize, mut f: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let start = (at % PAGE as u64) as usize;
        let part = (PAGE - start).min(len - done);
        f(at / PAGE as u64, start, done..done + part);
        done += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_does_not_see_later_writes() {
        let mut content = Content::default();
        content.write(4000, &[7; 200]);
        let copy = content.clone();
        content.write(4090, &[8; 10]);
        let mut bytes = [0; 12];
        content.read(4089, &mut bytes);
        assert_eq!(bytes, [7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]);
        copy.read(4089, &mut bytes);
        assert_eq!((bytes, copy.len()), ([7; 12], 4200));
    }

    #[test]
    fn zeroes_take_no_room_and_count_all_the_same() {
        let mut content = Content::default();
        content.write(0, &[1; 8192]);
        content.write(0, &[0; 1 << 20]);
        assert_eq!((content.pages.len(), content.len()), (0, 1 << 20));
    }
}
