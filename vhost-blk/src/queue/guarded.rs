//! The ring while a window of the guard is open: requests and reports wait until the pages that they write to are
//! touched.
//!
//! What was taken is in the in-flight region already, so a parked request is found by the next process like any other
//! in flight. The stores of a report keep their order: none of them is made before all of them may be.

use std::sync::Arc;

use cdp_types::{DeviceQueue, Op};

use super::Queue;
use crate::guard::{Job, Page};
use crate::guest::GuestRange;
use crate::request::{Action, ID_LEN, Status};

/// The mail of the ring itself; that of a request is its head.
const RING: u64 = u64::MAX;

impl Queue {
    /// The pages that must be touched before the action may be carried out. Without a window this is one load.
    pub(super) fn must_touch(&self, head: u16, action: &Action) -> Vec<Page> {
        if self.context.guard.is_open() { self.untouched(head, action) } else { Vec::new() }
    }

    /// Lets a request wait until these pages are touched.
    pub(super) fn park(&mut self, head: u16, action: Action, pages: Vec<Page>) {
        self.slots[usize::from(head)].parked = Some(Box::new(action));
        self.parked += 1;
        self.count_in_flight();
        self.ask_to_touch(pages, head.into());
    }

    /// Reports what the device has said of a request. Its pages were touched before the device got it, but the memory
    /// may have been shared anew since.
    pub(super) fn report(&mut self, head: u16, status: Status) {
        // Of a failed request it was said why; the text is for those that were refused.
        let action = Action::Answer(status, "");
        match self.must_touch(head, &action) {
            pages if pages.is_empty() => self.answer(head, status),
            pages => self.park(head, action, pages),
        }
    }

    /// Carries out what has become possible; without a device, by answering with an error.
    pub(crate) fn resume(&mut self, mut device: Option<&mut (dyn DeviceQueue + 'static)>) {
        if self.parked == 0 && self.ring_ready {
            return;
        }
        for token in self.mail.take() {
            if token == RING {
                self.look_at_ring();
                continue;
            }
            let head = token as u16;
            let Some(action) = self.slots[usize::from(head)].parked.take() else { continue };
            self.parked -= 1;
            self.count_in_flight();
            self.spin.worked();
            match (*action, device.as_deref_mut()) {
                _ if self.leaving => {}
                (action, Some(device)) => self.carry_out(device, head, action),
                (Action::Answer(status, _), None) => self.report(head, status),
                (Action::Submit(_) | Action::Identify, None) => self.report(head, Status::IoError),
            }
        }
    }

    /// The ring has come to lie elsewhere.
    pub(super) fn ring_moved(&mut self) {
        // Otherwise touches are under way, and the mail of their end leads there: one job of a ring at a time.
        if self.ring_ready {
            self.look_at_ring();
        }
    }

    /// Finds out whether the used ring may be written, and has its pages touched if not. To be called whenever the ring
    /// has come to lie elsewhere, while no touch of it is under way: a window is only opened while there is no ring.
    pub(super) fn look_at_ring(&mut self) {
        let pages = match self.context.guard.is_open() {
            true => self.wiring.addresses.untouched(self.memory.map(), self.ring.size()),
            false => Vec::new(),
        };
        self.ring_ready = pages.is_empty();
        match self.ring_ready {
            true => self.ring.say_wish(&self.memory),
            false => self.ask_to_touch(pages, RING),
        }
    }

    /// The untouched pages that are written for a request from here on.
    fn untouched(&self, head: u16, action: &Action) -> Vec<Page> {
        let slot = &self.slots[usize::from(head)];
        let mut pages = Vec::new();
        match action {
            Action::Submit(Op::Read { .. }) => self.memory.untouched(&slot.writable, u64::MAX, &mut pages),
            Action::Identify => self.memory.untouched(&slot.writable, ID_LEN as u64, &mut pages),
            // The device reads, or nothing but the status is written.
            Action::Submit(_) | Action::Answer(..) => {}
        }
        self.memory.untouched(&[GuestRange { addr: slot.status, len: 1 }], 1, &mut pages);
        pages
    }

    fn ask_to_touch(&self, pages: Vec<Page>, token: u64) {
        self.context.guard.touch(Job { pages, mail: Arc::clone(&self.mail), token });
    }
}
