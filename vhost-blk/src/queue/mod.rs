//! A running ring: requests are taken from it, given to the device, and reported back, many at a time.

mod guarded;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use cdp_types::{BlockDevice, DeviceQueue, IoError, IoErrorKind, Op, Origin, RequestId, Wait};
use front_end::Complaints;

use crate::chain::Chain;
use crate::eventfd::EventFd;
use crate::features::Features;
use crate::guard::{Guard, Mailbox};
use crate::guest::{DirtyLog, GuestMemory, GuestRange, MemoryMap, Ring, RingAddresses, RingFault};
use crate::inflight::{Found, InflightQueue, Unfinished};
use crate::request::{Action, Durability, Kind, Status, identify, parse};
use crate::spin::Spin;
use crate::stats::QueueCounters;
use crate::write_cache::WriteCache;

/// How often a ring is looked at whose front end wants no kicks.
const UNKICKED: Duration = Duration::from_micros(100);

/// What stays the same for a queue, whoever is connected.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) index: u16,
    /// The socket, as log lines name it.
    pub(crate) name: Arc<str>,
    pub(crate) disk: Arc<dyn BlockDevice>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) busy_poll: Duration,
    pub(crate) queue_bytes: u64,
    pub(crate) guard: Arc<Guard>,
}

/// What can be changed while the ring runs.
#[derive(Clone)]
pub(crate) struct Wiring {
    pub(crate) memory: Arc<MemoryMap>,
    /// Where writes to guest memory are logged, while they are.
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) addresses: RingAddresses,
    /// Written to by the guest when it adds requests; without it the ring is looked at again and again.
    pub(crate) kick: Option<EventFd>,
    /// Written to when requests are done; without it the guest looks by itself.
    pub(crate) call: Option<EventFd>,
    /// Written to when the ring is broken.
    pub(crate) err: Option<EventFd>,
}

/// What a ring is started with.
pub(crate) struct RingStart {
    pub(crate) size: u16,
    /// The position in the available ring from which requests are taken.
    pub(crate) base: u16,
    pub(crate) features: Features,
    pub(crate) wiring: Wiring,
    pub(crate) inflight: Option<InflightQueue>,
    /// The guest belongs to another history of the disk: all its requests fail.
    pub(crate) refuse: bool,
    pub(crate) write_cache: Arc<WriteCache>,
}

/// A request between being taken and being reported, by its head.
#[derive(Default)]
struct Slot {
    /// Taken, and not yet reported.
    busy: bool,
    /// With the device.
    submitted: bool,
    /// What is to be done with it once its pages are touched.
    parked: Option<Box<Action>>,
    kind: Kind,
    /// Where its status goes.
    status: u64,
    /// What the device writes, the status included.
    writable: Vec<GuestRange>,
    writable_len: u32,
    /// Bytes of data.
    bytes: u64,
}

/// How far a queue's drain has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// Something that was taken is left to be done.
    Pending,
    /// Nothing is; or the queue leaves, and what is left is the next one's.
    Done,
    /// Only what waits for touches, and what waits for that; and the server ends.
    GivenUp,
}

/// A running ring and the requests taken from it.
pub(crate) struct Queue {
    context: Context,
    ring: Ring,
    memory: GuestMemory,
    wiring: Wiring,
    features: Features,
    inflight: Option<InflightQueue>,
    refuse: bool,
    write_cache: Arc<WriteCache>,
    slots: Vec<Slot>,
    /// Left in flight by a dead process, in the order in which they were taken; and whether the log has them.
    unfinished: VecDeque<(Unfinished, bool)>,
    submitted: usize,
    /// Of those submitted, writes.
    writes: usize,
    parked: usize,
    bytes: u64,
    /// Where touches that have ended are told.
    mail: Arc<Mailbox>,
    /// Whether the used ring may be written: its pages are touched, or no window is open. Nothing is taken before. If not,
    /// touches of it are under way.
    ring_ready: bool,
    /// Answered, and not yet reported to the guest.
    answered: Vec<u16>,
    /// The device has just ended something. It may have more to say, which it does in portions.
    talking: bool,
    chain: Chain,
    spin: Spin,
    complaints: Complaints,
    paused: bool,
    leaving: bool,
    broken: bool,
}

impl Queue {
    /// Starts a ring, with what a dead process left in flight on it.
    ///
    /// `wake` wakes the thread that runs it.
    pub(crate) fn start(start: RingStart, context: Context, wake: EventFd) -> Result<Self, RingFault> {
        let RingStart { size, base, features, wiring, inflight, refuse, write_cache } = start;
        let memory = GuestMemory::new(Arc::clone(&wiring.memory), wiring.log.clone());
        let ring = Ring::new(&memory, &wiring.addresses, size, base, features.event_idx())?;
        let mail = Arc::new(Mailbox::new(wake));
        context.guard.register(&mail);
        let mut queue = Self {
            mail,
            ring_ready: false,
            parked: 0,
            spin: Spin::new(context.busy_poll),
            ring,
            memory,
            wiring,
            features,
            inflight,
            refuse,
            write_cache,
            slots: (0..size).map(|_| Slot::default()).collect(),
            unfinished: VecDeque::new(),
            submitted: 0,
            writes: 0,
            bytes: 0,
            answered: Vec::with_capacity(size.into()),
            talking: false,
            chain: Chain::default(),
            complaints: Complaints::default(),
            paused: false,
            leaving: false,
            broken: false,
            context,
        };
        if queue.ring.used() != 0 {
            queue.remind();
        }
        queue.recover();
        queue.look_at_ring();
        Ok(queue)
    }

    /// Whoever served this ring before may have reported requests and not come to the interrupt; without it the guest would
    /// wait for ever. One too many does no harm.
    fn remind(&self) {
        if let Some(call) = &self.wiring.call {
            call.signal();
        }
    }

    /// Finds what a dead process had taken and not reported. The front end does not know it: when a connection is
    /// lost it goes back to the used index. Everything taken is either reported or found, and requests are taken
    /// in ring order, so the next one to take follows from the two counts.
    fn recover(&mut self) {
        let Some(inflight) = &self.inflight else { return };
        let Context { index: queue, name, disk, .. } = &self.context;
        let requests = match inflight.recover(self.ring.used()) {
            Found::New => return,
            Found::Stale => {
                tracing::warn!(socket = %name, queue, "the in-flight region is older than the ring: not used");
                return;
            }
            Found::Requests(requests) => requests,
        };
        // The index of the used ring may have come round to 0.
        self.remind();
        self.ring.set_taken(self.ring.used().wrapping_add(requests.len() as u16));
        if requests.is_empty() {
            return;
        }
        let origins: Vec<Origin> = requests.iter().map(|request| request.origin).collect();
        let survived = if self.refuse { vec![false; origins.len()] } else { disk.survived(&origins) };
        let logged = survived.iter().filter(|&&survived| survived).count();
        let found = requests.len();
        tracing::info!(socket = %name, queue, found, logged, "requests were in flight when the connection was lost");
        self.unfinished = requests.into_iter().zip(survived).collect();
    }

    pub(crate) fn taken(&self) -> u16 {
        self.ring.taken()
    }

    pub(crate) fn kick(&self) -> Option<&EventFd> {
        self.wiring.kick.as_ref()
    }

    /// Takes no new request until resumed; what is taken goes on.
    pub(crate) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// As `pause`, for ever. The front end may be gone, and may look at the used ring to learn where to go on:
    /// without an in-flight region nothing may be reported behind its back. With one, everything may, except for
    /// requests that failed only because the device was taken away: they are left for whoever comes next.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    /// How far the drain has got. What waits for touches is given up only when the front end or this server goes: it stays
    /// in the in-flight region.
    pub(crate) fn drain(&self) -> Drain {
        // A touch of the ring itself counts too: when the ring has stopped, its pages are the guest's.
        let touching = self.parked > 0 || !self.ring_ready;
        let finished = self.answered.is_empty() && (self.unfinished.is_empty() || self.broken);
        match () {
            () if self.submitted > 0 => Drain::Pending,
            () if finished && !touching => Drain::Done,
            () if self.leaving => Drain::Done,
            // Whatever else is left could not go on without these touches.
            () if touching && self.context.guard.abandoned() => Drain::GivenUp,
            () => Drain::Pending,
        }
    }

    /// Goes on with other memory, addresses, logging or descriptors, between two requests.
    pub(crate) fn rewire(&mut self, wiring: Wiring) {
        let memory = GuestMemory::new(Arc::clone(&wiring.memory), wiring.log.clone());
        if let Err(fault) = self.ring.move_to(&memory, &wiring.addresses) {
            // The old memory is kept: the ring still points into it.
            return self.break_off(fault);
        }
        let same = |old: &EventFd, new: &EventFd| Arc::ptr_eq(old.fd(), new.fd());
        if let Some(call) = &wiring.call
            && self.wiring.call.as_ref().is_none_or(|old| !same(old, call))
        {
            // What was reported before must not stay unseen: there was nothing to interrupt with, or the front end had looked
            // at it for the last time.
            call.signal();
        }
        (self.memory, self.wiring) = (memory, wiring);
        self.ring_moved();
    }

    /// Stops taking requests until the ring is started anew. What is in flight ends as usual.
    pub(crate) fn break_off(&mut self, fault: RingFault) {
        if !self.broken {
            self.broken = true;
            complain_of_ring(&self.context, &self.wiring, fault);
        }
    }

    /// How long the device may sleep. Asks the guest for kicks before it may.
    pub(crate) fn wait(&mut self) -> Wait {
        if self.broken || self.paused || self.leaving || !self.ring_ready || self.full() {
            return Wait::Forever;
        }
        // A kick costs the guest an exit, so none is asked for before there is nothing else to do.
        if std::mem::take(&mut self.talking) && self.submitted > 1 {
            return Wait::No;
        }
        if self.spin.look_on(self.writes > 0) {
            self.ring.decline_kicks(&self.memory);
            return Wait::No;
        }
        match self.ring.ask_for_kicks(&self.memory) {
            Ok(true) => return Wait::No,
            Ok(false) => {}
            Err(fault) => self.break_off(fault),
        }
        self.spin.going_to_sleep(self.writes > 0);
        self.context.counters.sleeps.add(1);
        if self.wiring.kick.is_some() { Wait::Forever } else { Wait::For(UNKICKED) }
    }

    pub(crate) fn woke(&mut self) {
        self.spin.woke();
    }

    /// Takes everything that there is to take.
    pub(crate) fn take(&mut self, device: &mut dyn DeviceQueue) {
        if self.broken || self.leaving || !self.ring_ready {
            return;
        }
        if let Err(fault) = self.take_all(device) {
            self.break_off(fault);
        }
    }

    fn take_all(&mut self, device: &mut dyn DeviceQueue) -> Result<(), RingFault> {
        while let Some(&(Unfinished { origin, head }, survived)) = self.unfinished.front() {
            if self.full() {
                return Ok(());
            }
            self.accept(device, head, Some((origin, survived)))?;
            self.unfinished.pop_front();
        }
        if self.paused {
            return Ok(());
        }
        // A head is not accepted twice before it is reported, so this ends after at most a ring's worth.
        loop {
            let available = self.ring.available()?;
            if available == 0 {
                return Ok(());
            }
            for _ in 0..available {
                if self.full() {
                    return Ok(());
                }
                let head = self.ring.head()?;
                self.accept(device, head, None)?;
                self.ring.take();
            }
        }
    }

    fn full(&self) -> bool {
        self.bytes >= self.context.queue_bytes
    }

    /// Takes one request: a new one, or one with the number that it had before, and whether the log has it.
    fn accept(
        &mut self,
        device: &mut dyn DeviceQueue,
        head: u16,
        before: Option<(Origin, bool)>,
    ) -> Result<(), RingFault> {
        let durability = Durability { write_through: self.write_through() };
        let slot = self.slots.get_mut(usize::from(head)).ok_or(RingFault::HeadOutside(head))?;
        if slot.busy {
            return Err(RingFault::HeadBusy(head));
        }
        self.chain.walk(&self.ring, &self.memory, head, self.features.indirect())?;
        let status = self.chain.status().filter(|&addr| self.memory.covers(GuestRange { addr, len: 1 }));
        slot.status = status.ok_or(RingFault::NoStatus(head))?;
        slot.busy = true;
        self.spin.worked();

        let origin = match (before, &self.inflight) {
            (Some((origin, _)), _) => origin,
            (None, None) => Origin(0),
            (None, Some(inflight)) => {
                let origin = self.context.disk.new_origin();
                inflight.begin(head, origin);
                origin
            }
        };
        let (kind, action) = match before {
            Some((_, true)) => {
                self.context.counters.recovered.add(1);
                (Kind::Unknown, Action::Answer(Status::Ok, ""))
            }
            _ if self.refuse => {
                (Kind::Unknown, Action::Answer(Status::IoError, "the disk was reverted under the guest"))
            }
            _ => parse(&self.chain, &self.memory, durability, origin),
        };
        slot.kind = kind;
        slot.writable_len = u32::try_from(self.chain.writable_len).unwrap_or(u32::MAX);
        if let Action::Answer(..) = action {
            // Nothing else is written, whatever a request that is refused says of its length: a log of written pages must
            // not be marked for all that a guest can claim.
            slot.writable.clear();
            slot.writable.push(GuestRange { addr: slot.status, len: 1 });
        } else {
            std::mem::swap(&mut slot.writable, &mut self.chain.writable);
        }
        if let Action::Submit(Op::Read { into: data, .. } | Op::Write { from: data, .. }) = &action {
            slot.bytes = data.len() as u64;
        } else {
            slot.bytes = 0;
        }
        self.bytes += slot.bytes;
        if before.is_some() && matches!(action, Action::Submit(_)) {
            self.context.counters.resubmitted.add(1);
        }
        self.carry_out(device, head, action);
        Ok(())
    }

    /// Does what a request asks for, once nothing that is written to guest memory for it lies in an untouched page.
    fn carry_out(&mut self, device: &mut dyn DeviceQueue, head: u16, action: Action) {
        let pages = self.must_touch(head, &action);
        if !pages.is_empty() {
            return self.park(head, action, pages);
        }
        let slot = &mut self.slots[usize::from(head)];
        match action {
            Action::Answer(status, why) => {
                let kind = slot.kind;
                if status != Status::Ok {
                    let Context { index: queue, name, .. } = &self.context;
                    self.complaints.say(|more| {
                        tracing::warn!(socket = %name, queue, ?kind, more, "request refused: {why}");
                    });
                }
                self.answer(head, status);
            }
            Action::Identify => {
                let status = identify(&slot.writable, slot.writable_len, &self.memory, &*self.context.disk);
                self.answer(head, status);
            }
            Action::Submit(op) => {
                slot.submitted = true;
                self.submitted += 1;
                self.writes += usize::from(slot.kind == Kind::Write);
                self.count_in_flight();
                device.submit(RequestId(head.into()), op);
            }
        }
    }

    fn count_in_flight(&self) {
        self.context.counters.in_flight.set((self.submitted + self.parked) as u64);
    }

    /// Whether writes must be durable before they are answered (virtio 1.3, 5.2.5.2).
    fn write_through(&self) -> bool {
        !self.features.flush() || self.features.config_wce() && self.write_cache.is_off()
    }

    /// A request of the device has ended.
    pub(crate) fn complete(&mut self, id: RequestId, result: Result<(), IoError>) {
        let Context { index: queue, name, .. } = &self.context;
        let slot = usize::try_from(id.0)
            .ok()
            .and_then(|head| self.slots.get_mut(head))
            .filter(|slot| slot.submitted);
        let Some(slot) = slot else {
            tracing::error!(socket = %name, queue, id = id.0, "the disk completed a request that it does not have");
            return;
        };
        slot.submitted = false;
        self.submitted -= 1;
        self.talking = true;
        self.writes -= usize::from(slot.kind == Kind::Write);
        self.spin.worked();
        if let Err(error) = &result {
            let kind = slot.kind;
            self.complaints
                .say(|more| tracing::warn!(socket = %name, queue, ?kind, more, "request failed: {error}"));
        }
        self.count_in_flight();
        let gone = matches!(&result, Err(error) if error.kind() == IoErrorKind::Gone);
        if self.leaving && (self.inflight.is_none() || gone) {
            return;
        }
        self.report(id.0 as u16, Status::from(&result));
    }

    /// Fails everything that the device has, because it will not answer any more.
    pub(crate) fn device_failed(&mut self) {
        for head in 0..self.slots.len() as u64 {
            if self.slots[head as usize].submitted {
                self.complete(
                    RequestId(head),
                    Err(IoError::new(IoErrorKind::Device, "the disk's queue has failed")),
                );
            }
        }
        self.break_off(RingFault::Device);
    }

    /// Writes a request's status. Its page is touched.
    fn answer(&mut self, head: u16, status: Status) {
        let slot = &self.slots[usize::from(head)];
        if !self.memory.write_status(slot.status, status.byte()) {
            // Its memory was taken away while it was in flight.
            return self.break_off(RingFault::NoStatus(head));
        }
        self.memory.written(&slot.writable);
        self.answered.push(head);
        self.bytes -= slot.bytes;
        let counters = &self.context.counters;
        let (count, bytes) = match slot.kind {
            Kind::Read => (&counters.reads, Some(&counters.bytes_read)),
            Kind::Write => (&counters.writes, Some(&counters.bytes_written)),
            Kind::Flush => (&counters.flushes, None),
            Kind::Discard => (&counters.discards, None),
            Kind::WriteZeroes => (&counters.write_zeroes, None),
            Kind::GetId | Kind::Unknown => (&counters.others, None),
        };
        count.add(1);
        match bytes {
            _ if status != Status::Ok => counters.errors.add(1),
            Some(bytes) => bytes.add(slot.bytes),
            None => {}
        }
    }

    /// Reports everything that was answered: entries, index and in-flight region in the order that `inflight`
    /// explains, then at most one interrupt.
    pub(crate) fn publish(&mut self) {
        let count = self.answered.len() as u16;
        if count == 0 || !self.ring_ready {
            return;
        }
        for (nth, &head) in (0..).zip(&self.answered) {
            self.ring.put_used(&self.memory, nth, head, self.slots[usize::from(head)].writable_len);
        }
        if let Some(inflight) = &self.inflight {
            self.answered.iter().for_each(|&head| inflight.link(head));
        }
        self.ring.publish_used(&self.memory, count);
        if let Some(inflight) = &self.inflight {
            inflight.end(self.answered.iter().copied(), self.ring.used());
        }
        for head in self.answered.drain(..) {
            self.slots[usize::from(head)].busy = false;
        }
        if let Some(call) = self.wiring.call.as_ref().filter(|_| self.ring.wants_interrupt(count)) {
            call.signal();
            self.context.counters.interrupts.add(1);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.mail.close();
        self.context.counters.in_flight.set(0);
    }
}

/// Tells the operator and the front end that a ring cannot be used, once.
pub(crate) fn complain_of_ring(context: &Context, wiring: &Wiring, fault: RingFault) {
    let Context { index: queue, name, .. } = context;
    tracing::error!(socket = %name, queue, "the ring is stopped until the guest resets: {fault}");
    if let Some(err) = &wiring.err {
        err.signal();
    }
}

/// Tells the operator that a guest remembers what the disk no longer is.
pub(crate) fn tell_of_other_history(socket: &str) {
    tracing::error!(
        socket,
        "the guest was using another history of this disk: its requests fail until it resets"
    );
}
