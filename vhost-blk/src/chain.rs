//! Walking a chain of descriptors that a guest has made (virtio 1.3, 2.7.5).

use crate::config::{MAX_INDIRECT, MAX_REQUEST_BYTES};
use crate::guest::{Descriptor, GuestMemory, GuestRange, Ring, RingFault};

/// The memory of one request: what the device reads, then what it writes. Reused from request to request, so that
/// taking one allocates nothing.
#[derive(Default)]
pub(crate) struct Chain {
    pub(crate) readable: Vec<GuestRange>,
    pub(crate) writable: Vec<GuestRange>,
    pub(crate) readable_len: u64,
    pub(crate) writable_len: u64,
    /// What is wrong with it. Where its status byte goes is known all the same.
    pub(crate) fault: Option<&'static str>,
}

impl Chain {
    /// Reads the whole chain at `head`.
    ///
    /// # Errors
    /// If its end cannot be found, so that there is nowhere to put a status.
    pub(crate) fn walk(
        &mut self,
        ring: &Ring,
        memory: &GuestMemory,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), RingFault> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len, self.fault) = (0, 0, None);

        let mut next = Some(head);
        // A chain that visits a descriptor twice is longer than the table.
        for _ in 0..ring.size() {
            let Some(index) = next else { return Ok(()) };
            let descriptor = ring.descriptor(index).ok_or(RingFault::Lost(head))?;
            if descriptor.indirect() {
                // An indirect descriptor ends the direct part of its chain (2.7.5.3.1).
                self.require(
                    indirect_allowed,
                    "an indirect descriptor, though the feature was not negotiated",
                );
                self.require(descriptor.next().is_none(), "an indirect descriptor that is not the last");
                return self.walk_table(memory, head, descriptor);
            }
            self.add(memory, descriptor);
            next = descriptor.next();
        }
        if next.is_some() { Err(RingFault::Endless(head)) } else { Ok(()) }
    }

    fn walk_table(&mut self, memory: &GuestMemory, head: u16, table: Descriptor) -> Result<(), RingFault> {
        self.require(
            u64::from(table.len).is_multiple_of(Descriptor::LEN),
            "an indirect table of an odd length",
        );
        let entries = table.len / Descriptor::LEN as u32;
        let mut next = Some(0);
        for _ in 0..entries.min(MAX_INDIRECT) {
            let Some(index) = next.filter(|&index| u32::from(index) < entries) else { break };
            let descriptor = memory.descriptor(table.addr, index.into()).ok_or(RingFault::Lost(head))?;
            match descriptor.indirect() {
                true => self.require(false, "an indirect descriptor inside an indirect table"),
                false => self.add(memory, descriptor),
            }
            next = descriptor.next();
        }
        match next {
            None => Ok(()),
            Some(index) if u32::from(index) >= entries => Err(RingFault::Lost(head)),
            Some(_) => Err(RingFault::Endless(head)),
        }
    }

    fn add(&mut self, memory: &GuestMemory, descriptor: Descriptor) {
        let range = GuestRange { addr: descriptor.addr, len: descriptor.len };
        self.require(range.len > 0, "an empty descriptor");
        self.require(memory.covers(range), "a buffer outside guest memory");
        if descriptor.device_writes() {
            self.writable.push(range);
            self.writable_len += u64::from(range.len);
        } else {
            self.require(self.writable.is_empty(), "a readable descriptor behind a writable one");
            self.readable.push(range);
            self.readable_len += u64::from(range.len);
        }
        self.require(self.readable_len.max(self.writable_len) <= MAX_REQUEST_BYTES + 16, "too much data");
    }

    fn require(&mut self, holds: bool, fault: &'static str) {
        if !holds {
            self.fault.get_or_insert(fault);
        }
    }

    /// The guest address of the status byte: the last byte that the device may write.
    pub(crate) fn status(&self) -> Option<u64> {
        let last = self.writable.iter().rev().find(|range| range.len > 0)?;
        last.addr.checked_add(u64::from(last.len) - 1)
    }
}
