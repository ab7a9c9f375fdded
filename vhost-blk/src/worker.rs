//! The thread of one queue. It owns the ring and the device's queue, so the path of a request takes no lock; it
//! sleeps in one place, the device's `poll`; it is told what to do through a channel and an eventfd.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use cdp_types::{DeviceQueue, Event, Wait};
use rustix::event::{PollFd, PollFlags, poll};

use crate::eventfd::EventFd;
use crate::guest::RingFault;
use crate::queue::{Context, Drain, Queue, RingStart, Wiring, complain_of_ring, tell_of_other_history};

/// What the connection's thread tells a queue's thread. Each is answered once it has been done.
pub(crate) enum Command {
    /// Start the ring.
    Start(Box<RingStart>),
    /// Go on with these, between two requests.
    Rewire(Box<Wiring>),
    /// Take no more requests. Answered when none is in flight, or with [`RingFault::GivenUp`].
    Pause,
    /// Take requests again.
    Resume,
    /// Stop the ring. Answered when nothing is in flight, with the position from which to go on, or with
    /// [`RingFault::GivenUp`].
    Stop,
    /// End the thread, because the connection has ended. Answered when nothing is in flight.
    Leave,
}

/// The position in the available ring up to which requests are taken, or why there is no ring.
type Answer = Result<u16, RingFault>;

struct Request {
    command: Command,
    answer: SyncSender<Answer>,
}

/// The connection's handle on a queue's thread. Dropping it ends the thread, without waiting for it.
pub(crate) struct Worker {
    requests: Sender<Request>,
    control: EventFd,
    thread: JoinHandle<()>,
}

impl Worker {
    pub(crate) fn spawn(context: Context) -> io::Result<Self> {
        let control = EventFd::new()?;
        let (requests, receiver) = channel();
        let name = format!("vhost-q{}", context.index);
        let thread = Thread {
            context,
            control: control.clone(),
            requests: receiver,
            device: None,
            queue: None,
            draining: None,
            events: Vec::with_capacity(256),
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.run())?;
        Ok(Self { requests, control, thread })
    }

    /// Has a command done, and waits for the answer.
    pub(crate) fn ask(&self, command: Command) -> Answer {
        self.tell(command).wait()
    }

    /// Has a command done.
    pub(crate) fn tell(&self, command: Command) -> Pending {
        let (answer, pending) = sync_channel(1);
        // A thread that is gone has dropped its end; the answer then says so.
        let _ = self.requests.send(Request { command, answer });
        self.control.signal();
        Pending(pending)
    }

    /// Waits for the thread's end, after [`Command::Leave`].
    pub(crate) fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a queue's thread has panicked");
        }
    }
}

/// An answer to come.
pub(crate) struct Pending(Receiver<Answer>);

impl Pending {
    pub(crate) fn wait(self) -> Answer {
        self.0.recv().unwrap_or(Err(RingFault::Device))
    }
}

const CONTROL: u64 = 0;
const KICK: u64 = 1;

struct Thread {
    context: Context,
    control: EventFd,
    requests: Receiver<Request>,
    /// There is one only while there is a ring; none after it has failed.
    device: Option<Box<dyn DeviceQueue>>,
    queue: Option<Queue>,
    /// To be answered once nothing is in flight.
    draining: Option<Request>,
    events: Vec<Event>,
}

impl Thread {
    fn run(mut self) {
        loop {
            let told = self.poll();
            if let Some(queue) = &mut self.queue {
                queue.publish();
            }
            if told {
                self.obey();
            }
            if let Some(queue) = &mut self.queue {
                queue.resume(self.device.as_deref_mut());
                if let Some(device) = &mut self.device {
                    queue.take(device.as_mut());
                }
                // Without a device too: what was resumed was answered with an error.
                queue.publish();
            }
            if self.end_drain() {
                return;
            }
        }
    }

    /// Waits for something to happen, and returns whether there is a command.
    fn poll(&mut self) -> bool {
        let wait = self.queue.as_mut().map_or(Wait::Forever, Queue::wait);
        let Some(device) = &mut self.device else {
            // Without a device there is nothing to do but to be told.
            let mut fds = [PollFd::new(self.control.fd(), PollFlags::IN)];
            let told = poll(&mut fds, None).is_ok();
            // If a signal came first, what is told in this moment is still to be heard.
            if told {
                self.control.clear();
            }
            return told;
        };
        let polled = device.poll(wait, &mut self.events);
        if let Some(queue) = &mut self.queue {
            queue.woke();
        }
        let mut told = false;
        for event in self.events.drain(..) {
            match (event, &mut self.queue) {
                (Event::Completed { id, result }, Some(queue)) => queue.complete(id, result),
                (Event::Ready { tag: CONTROL }, _) => told = true,
                // After a kick the ring is looked at, as after everything else.
                (Event::Ready { .. } | Event::Completed { .. }, _) => {}
            }
        }
        if let Err(error) = polled {
            let Context { index: queue, name, .. } = &self.context;
            tracing::error!(socket = %name, queue, "the disk's queue has failed: {error}");
            // It may have read our eventfd and not come to say so.
            told = true;
            self.device = None;
            if let Some(queue) = &mut self.queue {
                queue.device_failed();
            }
        }
        told
    }

    fn obey(&mut self) {
        while let Ok(Request { command, answer }) = self.requests.try_recv() {
            let done = match command {
                Command::Start(start) => self.start(*start),
                Command::Rewire(wiring) => self.rewire(*wiring),
                Command::Resume => self.with_queue(|queue| queue.pause(false)),
                Command::Pause | Command::Stop | Command::Leave => {
                    if let Some(queue) = &mut self.queue {
                        queue.pause(true);
                        if matches!(command, Command::Leave) {
                            queue.leave();
                        }
                    }
                    self.draining = Some(Request { command, answer });
                    continue;
                }
            };
            // Nobody waits for it only if the connection's thread is gone.
            let _ = answer.send(done);
        }
    }

    fn start(&mut self, mut start: RingStart) -> Answer {
        let wiring = start.wiring.clone();
        let started = self.open_device(wiring.kick.as_ref()).and_then(|()| {
            // The disk may have been reverted since the region was claimed. Whoever reverts it from here on finds that its
            // queue is open.
            let identity = self.context.disk.identity();
            if !start.refuse && start.inflight.as_ref().is_some_and(|part| !part.is_of(&identity)) {
                tell_of_other_history(&self.context.name);
                start.refuse = true;
            }
            Queue::start(start, self.context.clone(), self.control.clone())
        });
        match started {
            Ok(queue) => {
                let taken = queue.taken();
                self.queue = Some(queue);
                Ok(taken)
            }
            Err(fault) => {
                // Nobody stops a ring that was not started, so the device's queue would stay open, and keep the disk from
                // being reverted.
                self.device = None;
                complain_of_ring(&self.context, &wiring, fault);
                Err(fault)
            }
        }
    }

    fn open_device(&mut self, kick: Option<&EventFd>) -> Result<(), RingFault> {
        let open = |thread: &mut Self| -> io::Result<()> {
            let device = match &mut thread.device {
                Some(device) => device,
                None => {
                    let mut device = thread.context.disk.open_queue()?;
                    device.watch(thread.control.fd().clone(), CONTROL)?;
                    thread.device.insert(device)
                }
            };
            kick.map_or(Ok(()), |kick| device.watch(kick.fd().clone(), KICK))
        };
        open(self).map_err(|error| {
            let Context { index: queue, name, .. } = &self.context;
            tracing::error!(socket = %name, queue, "the disk's queue cannot be used: {error}");
            RingFault::Device
        })
    }

    fn unwatch_kick(&mut self) {
        if let Some(device) = &mut self.device {
            device.unwatch(KICK);
        }
    }

    fn rewire(&mut self, wiring: Wiring) -> Answer {
        let kick = |wiring: Option<&EventFd>| wiring.map(|kick| std::sync::Arc::as_ptr(kick.fd()));
        let old = self.queue.as_ref().and_then(Queue::kick);
        if kick(old) != kick(wiring.kick.as_ref()) {
            self.unwatch_kick();
            if let Err(fault) = self.open_device(wiring.kick.as_ref()) {
                // Nothing would be heard of the guest, and the front end believes that the ring has gone on.
                self.with_queue(|queue| queue.break_off(fault))?;
                return Err(fault);
            }
        }
        self.with_queue(|queue| queue.rewire(wiring))
    }

    fn with_queue(&mut self, act: impl FnOnce(&mut Queue)) -> Answer {
        let queue = self.queue.as_mut().ok_or(RingFault::Device)?;
        act(queue);
        Ok(queue.taken())
    }

    /// Answers whoever waits for nothing to be in flight, if nothing is; and says whether to end.
    fn end_drain(&mut self) -> bool {
        let drain = self.queue.as_ref().map_or(Drain::Done, Queue::drain);
        if drain == Drain::Pending {
            return false;
        }
        let Some(Request { command, answer }) = self.draining.take() else { return false };
        let taken = match drain {
            Drain::GivenUp => Err(RingFault::GivenUp),
            _ => self.queue.as_ref().map(Queue::taken).ok_or(RingFault::Device),
        };
        if !matches!(command, Command::Pause) {
            self.unwatch_kick();
            self.queue = None;
            // The device's queue is closed before the answer: who stops a guest may revert its disk next, and nothing is
            // left of a connection after its end.
            self.device = None;
        }
        let _ = answer.send(taken);
        matches!(command, Command::Leave)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Arc, OnceLock};
    use std::time::Duration;

    use cdp_types::{MemoryConfig, MemoryDevice};
    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

    use super::*;
    use crate::guard::Guard;

    /// That of the thread that the signal is sent to.
    static TOLD: OnceLock<EventFd> = OnceLock::new();

    extern "C" fn tell(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if let Some(control) = TOLD.get() {
            control.signal();
        }
    }

    #[test]
    fn a_command_that_comes_together_with_a_signal_is_heard() {
        let name: Arc<str> = "test".into();
        let context = Context {
            index: 0,
            name: Arc::clone(&name),
            disk: Arc::new(MemoryDevice::new(MemoryConfig::new(1 << 20)).unwrap()),
            counters: Arc::default(),
            busy_poll: Duration::ZERO,
            queue_bytes: 1 << 20,
            guard: Arc::new(Guard::new(name, Duration::from_secs(1))),
        };
        let worker = Worker::spawn(context).unwrap();
        TOLD.set(worker.control.clone()).unwrap();
        register_signal_handler(SIGRTMIN(), tell).unwrap();
        for _ in 0..20 {
            // It falls asleep, so that the signal interrupts that, and its handler tells of the command before the thread
            // knows that it was interrupted.
            std::thread::sleep(Duration::from_millis(5));
            let (answer, pending) = sync_channel(1);
            worker.requests.send(Request { command: Command::Resume, answer }).unwrap();
            worker.thread.kill(SIGRTMIN()).unwrap();
            let answered = pending.recv_timeout(Duration::from_secs(30));
            assert_eq!(answered, Ok(Err(RingFault::Device)), "heard, and there is no ring");
        }
        let _ = worker.ask(Command::Leave);
        worker.join();
    }
}
