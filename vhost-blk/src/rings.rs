//! The rings as the connection knows them: how each is set up, whether it runs, and the thread that runs it
//! (vhost-user, "Ring states").

use std::path::PathBuf;
use std::sync::Arc;

use cdp_types::{RingStop, VmControl};
use front_end::Complaints;

use crate::eventfd::EventFd;
use crate::features::Features;
use crate::guard::Guard;
use crate::guest::{DirtyLog, MemoryMap, RingAddresses, RingFault};
use crate::inflight::{InflightQueue, InflightRegion};
use crate::queue::{Context, RingStart, Wiring, complain_of_ring};
use crate::session::Disk;
use crate::worker::{Command, Worker};
use crate::write_cache::WriteCache;

/// How the guest says that there are requests.
#[derive(Clone, Default)]
enum Kick {
    /// Not set: the ring is stopped.
    #[default]
    Unset,
    /// It does not: the ring must be looked at.
    Never,
    Eventfd(EventFd),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Stopped,
    /// Its thread takes requests from it.
    Running,
    /// It was disabled while it ran: nothing is in flight, nothing is taken.
    Paused,
    /// It could not be started, or could not go on with a change. It stays so until it is stopped.
    Broken,
}

struct Vring {
    context: Context,
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Kick,
    call: Option<EventFd>,
    err: Option<EventFd>,
    enabled: bool,
    state: State,
    /// Its thread has a queue, which must be stopped whatever the state is.
    has_queue: bool,
    worker: Option<Worker>,
}

impl Vring {
    fn new(context: Context) -> Self {
        Self {
            context,
            size: 0,
            base: 0,
            addresses: None,
            kick: Kick::Unset,
            call: None,
            err: None,
            enabled: false,
            state: State::Stopped,
            has_queue: false,
            worker: None,
        }
    }

    /// Forgets everything but its thread.
    fn reset(&mut self) {
        let worker = self.worker.take();
        *self = Self { worker, ..Self::new(self.context.clone()) };
    }
}

/// All rings of a connection, and what they have in common.
pub(crate) struct Rings {
    vrings: Vec<Vring>,
    socket: PathBuf,
    vm: Arc<dyn VmControl>,
    guard: Arc<Guard>,
    pub(crate) memory: Arc<MemoryMap>,
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) features: Features,
    pub(crate) inflight: Option<Arc<InflightRegion>>,
    pub(crate) refuse: bool,
    write_cache: Arc<WriteCache>,
    complaints: Complaints,
}

impl Rings {
    pub(crate) fn new(contexts: Vec<Context>, disk: &Disk) -> Self {
        Self {
            vrings: contexts.into_iter().map(Vring::new).collect(),
            socket: disk.config.socket.clone(),
            vm: Arc::clone(&disk.vm),
            guard: Arc::clone(&disk.guard),
            memory: Arc::default(),
            log: None,
            features: Features::default(),
            inflight: None,
            refuse: false,
            write_cache: Arc::clone(&disk.write_cache),
            complaints: Complaints::default(),
        }
    }

    fn ring(&mut self, index: u16) -> &mut Vring {
        &mut self.vrings[usize::from(index)]
    }

    /// Whether it was started and not stopped.
    pub(crate) fn running(&self, index: u16) -> bool {
        self.vrings[usize::from(index)].has_queue
    }

    pub(crate) fn any_running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.has_queue)
    }

    pub(crate) fn size(&self, index: u16) -> u16 {
        self.vrings[usize::from(index)].size
    }

    /// The first guest address behind all used rings that are logged.
    pub(crate) fn used_log_end(&self) -> u64 {
        let end = |vring: &Vring| vring.addresses.map_or(0, |addresses| addresses.used_log_end(vring.size));
        self.vrings.iter().map(end).max().unwrap_or(0)
    }

    pub(crate) fn set_size(&mut self, index: u16, size: u16) {
        self.ring(index).size = size;
    }

    pub(crate) fn set_base(&mut self, index: u16, base: u16) {
        self.ring(index).base = base;
    }

    pub(crate) fn set_addresses(&mut self, index: u16, addresses: RingAddresses) {
        self.ring(index).addresses = Some(addresses);
        self.changed(index);
    }

    pub(crate) fn set_kick(&mut self, index: u16, kick: Option<EventFd>) {
        self.ring(index).kick = kick.map_or(Kick::Never, Kick::Eventfd);
        self.changed(index);
    }

    pub(crate) fn set_call(&mut self, index: u16, call: Option<EventFd>) {
        self.ring(index).call = call;
        self.changed(index);
    }

    pub(crate) fn set_err(&mut self, index: u16, err: Option<EventFd>) {
        self.ring(index).err = err;
        self.changed(index);
    }

    /// A ring that is disabled is drained before this returns; once enabled it is looked at even without a kick,
    /// since the kick may have come before.
    ///
    /// # Errors
    /// It could not be drained: the connection must end without an answer.
    pub(crate) fn set_enabled(&mut self, index: u16, enabled: bool) -> Result<(), RingFault> {
        let vring = self.ring(index);
        vring.enabled = enabled;
        match (enabled, vring.state, &vring.worker) {
            (true, State::Paused, Some(worker)) => {
                let resumed = worker.ask(Command::Resume).is_ok();
                vring.state = if resumed { State::Running } else { State::Broken };
            }
            (false, State::Running | State::Broken, Some(worker)) if vring.has_queue => {
                worker.ask(Command::Pause)?;
                if vring.state == State::Running {
                    vring.state = State::Paused;
                }
            }
            _ => self.start_if_ready(index),
        }
        Ok(())
    }

    /// Lets every ring that runs go on with what they have in common.
    pub(crate) fn rewire(&mut self) {
        for index in 0..self.vrings.len() as u16 {
            self.changed(index);
        }
    }

    fn changed(&mut self, index: u16) {
        if matches!(self.ring(index).state, State::Stopped | State::Broken) {
            return self.start_if_ready(index);
        }
        let wiring = self.wiring(index).map(Box::new);
        let vring = self.ring(index);
        if let (Some(worker), Some(wiring)) = (&vring.worker, wiring)
            && worker.ask(Command::Rewire(wiring)).is_err()
        {
            vring.state = State::Broken;
        }
    }

    fn wiring(&self, index: u16) -> Option<Wiring> {
        let vring = &self.vrings[usize::from(index)];
        Some(Wiring {
            memory: Arc::clone(&self.memory),
            log: self.log.clone(),
            addresses: vring.addresses?,
            kick: match &vring.kick {
                Kick::Eventfd(kick) => Some(kick.clone()),
                Kick::Never | Kick::Unset => None,
            },
            call: vring.call.clone(),
            err: vring.err.clone(),
        })
    }

    /// Starts a ring that is stopped, if it is enabled and all of it is known. The kick's descriptor comes last; the
    /// ring is then looked at at once, because requests may be waiting from before a reconnection.
    fn start_if_ready(&mut self, index: u16) {
        let vring = &self.vrings[usize::from(index)];
        let enabled = vring.enabled || !self.features.protocol_features();
        let set_up = vring.size > 0 && !matches!(vring.kick, Kick::Unset) && !self.memory.is_empty();
        if vring.state != State::Stopped || !enabled || !set_up {
            return;
        }
        let Some(wiring) = self.wiring(index) else { return };
        // What the log has no bit for would be lost by the migration, without anyone noticing. It may be that of an earlier
        // one, and the front end about to send another.
        let logged_end = self.memory.end().max(self.used_log_end());
        if self.log.as_ref().is_some_and(|log| !log.covers(logged_end)) {
            let socket = &vring.context.name;
            // It is found out with each message that brings a part of each ring.
            return self.complaints.say(|more| {
                tracing::warn!(%socket, queue = index, more, "the ring waits: the dirty log is shorter than the memory");
            });
        }
        self.guard.ring_starts();
        self.vm.ring_started(&self.socket, index);
        let started = self.start(index, wiring.clone());
        let vring = self.ring(index);
        vring.has_queue = started.is_ok();
        vring.state = if started.is_ok() { State::Running } else { State::Broken };
        if started.is_err() {
            self.stopped(index, RingStop::Failed);
        }
    }

    fn start(&mut self, index: u16, wiring: Wiring) -> Result<(), RingFault> {
        let (size, base) = (self.ring(index).size, self.ring(index).base);
        let inflight = match &self.inflight {
            None => None,
            Some(region) => match InflightQueue::new(Arc::clone(region), index, size) {
                Some(queue) => Some(queue),
                None => {
                    complain_of_ring(&self.ring(index).context, &wiring, RingFault::Untracked);
                    return Err(RingFault::Untracked);
                }
            },
        };
        let (features, refuse) = (self.features, self.refuse);
        let write_cache = Arc::clone(&self.write_cache);
        let start = RingStart { size, base, features, wiring, inflight, refuse, write_cache };
        let vring = self.ring(index);
        let worker = match &vring.worker {
            Some(worker) => worker,
            None => match Worker::spawn(vring.context.clone()) {
                Ok(worker) => vring.worker.insert(worker),
                Err(error) => {
                    tracing::error!(socket = %vring.context.name, queue = index, "no thread for the ring: {error}");
                    complain_of_ring(&vring.context, &start.wiring, RingFault::Device);
                    return Err(RingFault::Device);
                }
            },
        };
        worker.ask(Command::Start(Box::new(start))).map(|_| ())
    }

    /// Stops a ring and returns the position from which to go on. Nothing is in flight when this returns.
    ///
    /// # Errors
    /// Something is in flight and will stay so, as requests that are given up, and those of a thread that is gone. Nobody
    /// has been told that the ring has stopped, and nobody may be: the connection must end without an answer.
    pub(crate) fn stop(&mut self, index: u16, why: RingStop) -> Result<u16, RingFault> {
        let vring = self.ring(index);
        if vring.has_queue {
            let worker = vring.worker.as_ref().ok_or(RingFault::Device)?;
            vring.base = worker.ask(Command::Stop)?;
            (vring.state, vring.has_queue) = (State::Stopped, false);
            self.stopped(index, why);
        }
        let vring = self.ring(index);
        (vring.state, vring.kick) = (State::Stopped, Kick::Unset);
        Ok(vring.base)
    }

    fn stopped(&self, index: u16, why: RingStop) {
        // In this order: a window can be opened from inside the second.
        self.guard.ring_stopped();
        self.vm.ring_stopped(&self.socket, index, why, !self.any_running());
    }

    /// Stops all rings and forgets how they were set up.
    ///
    /// # Errors
    /// As `stop`.
    pub(crate) fn reset(&mut self) -> Result<(), RingFault> {
        for index in 0..self.vrings.len() as u16 {
            self.stop(index, RingStop::Reset)?;
            self.ring(index).reset();
        }
        Ok(())
    }

    /// Drains all rings at once, reporting what was in flight.
    pub(crate) fn pause(&mut self) {
        self.tell_all(|| Command::Pause);
    }

    /// Ends all threads, once nothing is in flight.
    pub(crate) fn leave(&mut self) {
        self.tell_all(|| Command::Leave);
        self.vrings.iter_mut().filter_map(|vring| vring.worker.take()).for_each(Worker::join);
        self.vrings.iter_mut().for_each(Vring::reset);
    }

    /// Gives all threads a command and waits until all have done it.
    fn tell_all(&self, command: impl Fn() -> Command) {
        let workers = self.vrings.iter().filter_map(|vring| vring.worker.as_ref());
        let pending: Vec<_> = workers.map(|worker| worker.tell(command())).collect();
        for pending in pending {
            // That there is no ring, or no thread any more, makes no difference to the others.
            let _ = pending.wait();
        }
    }
}
