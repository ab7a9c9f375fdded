//! A head that takes no changes over NBD while a guest has it: two who write to one file system destroy it.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cdp_types::{
    BlockDevice, DeviceIdentity, DeviceInfo, DeviceQueue, Event, IoError, IoErrorKind, Listener, Op, Origin,
    RequestId, Wait,
};

/// Tells whether a guest has the volume.
type HasGuest = Arc<dyn Fn() -> bool + Send + Sync>;

/// A device whose changes are refused at times.
pub(super) struct Guarded {
    device: Arc<dyn BlockDevice>,
    has_guest: HasGuest,
}

impl Guarded {
    /// Refuses changes of `device` whenever `has_guest` says yes.
    pub(super) fn new(device: Arc<dyn BlockDevice>, has_guest: HasGuest) -> Self {
        Self { device, has_guest }
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guarded({:?})", self.device)
    }
}

impl BlockDevice for Guarded {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn identity(&self) -> DeviceIdentity {
        self.device.identity()
    }

    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let (queue, has_guest) = (self.device.open_queue()?, Arc::clone(&self.has_guest));
        Ok(Box::new(GuardedQueue { queue, has_guest, refused: Vec::new() }))
    }

    fn new_origin(&self) -> Origin {
        self.device.new_origin()
    }

    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        self.device.survived(origins)
    }

    fn on_change(&self, notify: Listener) {
        self.device.on_change(notify);
    }
}

struct GuardedQueue {
    queue: Box<dyn DeviceQueue>,
    has_guest: HasGuest,
    /// To be reported by the next `poll`.
    refused: Vec<RequestId>,
}

impl DeviceQueue for GuardedQueue {
    fn submit(&mut self, id: RequestId, op: Op) {
        let changes = !matches!(op, Op::Read { .. } | Op::Flush);
        if changes && (self.has_guest)() {
            self.refused.push(id);
        } else {
            self.queue.submit(id, op);
        }
    }

    fn watch(&mut self, eventfd: Arc<OwnedFd>, tag: u64) -> io::Result<()> {
        self.queue.watch(eventfd, tag)
    }

    fn unwatch(&mut self, tag: u64) {
        self.queue.unwatch(tag);
    }

    fn poll(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let wait = if self.refused.is_empty() { wait } else { Wait::No };
        let refusal =
            || IoError::new(IoErrorKind::ReadOnly, "a guest has the volume: nobody else may write to it");
        let refused = self.refused.drain(..);
        events.extend(refused.map(|id| Event::Completed { id, result: Err(refusal()) }));
        self.queue.poll(wait, events)
    }

    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        self.queue.descriptor()
    }

    fn arm(&mut self) -> io::Result<Wait> {
        if self.refused.is_empty() { self.queue.arm() } else { Ok(Wait::No) }
    }

    fn in_flight(&self) -> usize {
        self.refused.len() + self.queue.in_flight()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicBool, Ordering};

    use cdp_types::{IoBuf, MemoryConfig, MemoryDevice};

    use super::*;

    #[test]
    fn changes_are_refused_only_while_a_guest_is_there_and_reads_never() {
        let guest = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&guest);
        let memory = Arc::new(MemoryDevice::new(MemoryConfig::new(1 << 20)).unwrap());
        let device = Guarded::new(memory, Arc::new(move || seen.load(Ordering::Relaxed)));
        let mut queue = device.open_queue().unwrap();
        let mut run = |op| {
            queue.submit(RequestId(1), op);
            assert_eq!(queue.in_flight(), 1);
            let mut events = Vec::new();
            queue.poll(Wait::Forever, &mut events).unwrap();
            match events.pop() {
                Some(Event::Completed { id: RequestId(1), result }) => result.map_err(|e| e.kind()),
                other => panic!("{other:?}"),
            }
        };
        let write =
            || Op::Write { offset: 0, from: IoBuf::from_bytes(&[7; 512]), origin: Origin(0), fua: false };
        let into = IoBuf::zeroed(512);
        assert_eq!(run(write()), Err(IoErrorKind::ReadOnly));
        assert_eq!(run(Op::Read { offset: 0, into: into.share() }), Ok(()));
        assert_eq!(into.to_vec(), [0; 512]);
        guest.store(false, Ordering::Relaxed);
        assert_eq!(run(write()), Ok(()));
        assert_eq!(run(Op::Read { offset: 0, into: into.share() }), Ok(()));
        assert_eq!(into.to_vec(), [7; 512]);
    }
}
