//! The server of one disk: a socket, and one client at a time.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cdp_types::{BlockDevice, VmControl};
use front_end::{Complaints, peer_of};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError, VhostUserProtocolFeatures};

use crate::back_channel::{BackChannel, peek};
use crate::eventfd::EventFd;
use crate::guard::Guard;
use crate::session::{Disk, Session};
use crate::stats::{ServerCounters, ServerStats};
use crate::write_cache::WriteCache;
use crate::{Error, ErrorKind, ServerConfig};

/// Clients that may wait to be accepted, or turned away.
const BACKLOG: i32 = 16;
/// How long a clean stop waits for a client in the middle of a message.
const PATIENCE: Duration = Duration::from_secs(2);

/// A disk that is being served on a socket.
///
/// One client at a time; others that connect meanwhile are turned away. When a client has gone, in whatever way, the
/// next can come: what the last one had in flight has ended by then.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    ended: Mutex<Receiver<()>>,
}

struct Shared {
    disk: Arc<Disk>,
    stop: EventFd,
    stopping: AtomicBool,
    changed: EventFd,
    /// The present connection, to end it when the server is stopped in the middle of a message.
    connection: Mutex<Option<UnixStream>>,
}

impl Server {
    /// Creates the socket and serves the disk on it, until [`Server::shutdown`].
    ///
    /// `vm` is told of the guest's rings from the connection's thread.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if another server listens there, [`ErrorKind::Socket`] if the socket cannot be
    /// created, [`ErrorKind::Config`] if a number is out of range, [`ErrorKind::Resources`] if there is no thread.
    pub fn bind(
        config: ServerConfig,
        device: Arc<dyn BlockDevice>,
        vm: Arc<dyn VmControl>,
    ) -> Result<Self, Error> {
        config.check()?;
        let path = config.socket.clone();
        let failed = |error: io::Error| Error::because(ErrorKind::Resources, &path, error);
        let (socket, file) =
            front_end::bind(&path, config.mode, BACKLOG).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => Error::new(ErrorKind::InUse, &path),
                _ => Error::because(ErrorKind::Socket, &path, error),
            })?;
        let disk = Disk {
            name: config.socket.display().to_string().into(),
            counters: ServerCounters::new(config.queues),
            guard: Arc::new(Guard::new(config.socket.display().to_string().into(), config.guard_deadline)),
            config,
            device,
            vm,
            write_cache: Arc::new(WriteCache::unknown()),
        };
        let shared = Arc::new(Shared {
            disk: Arc::new(disk),
            stop: EventFd::new().map_err(failed)?,
            stopping: AtomicBool::new(false),
            changed: EventFd::new().map_err(failed)?,
            connection: Mutex::default(),
        });
        let listener = Arc::downgrade(&shared);
        shared.disk.device.on_change(Box::new(move || {
            let server = listener.upgrade();
            if let Some(server) = &server {
                server.changed.signal();
            }
            server.is_some()
        }));

        let (ending, ended) = channel();
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("vhost-blk".to_owned());
        let thread = thread.spawn(move || {
            serving.run(&socket);
            // The file first, while nobody can take it for stale.
            drop((file, socket, ending));
        });
        let thread = thread.map_err(failed)?;
        Ok(Self { shared, thread: Some(thread), ended: Mutex::new(ended) })
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.shared.disk.counters.read()
    }

    /// The guard of this guest's memory, for as long as anybody wants.
    #[must_use]
    pub fn guard(&self) -> Arc<Guard> {
        Arc::clone(&self.shared.disk.guard)
    }

    /// The disk's write cache, for as long as anybody wants.
    #[must_use]
    pub fn write_cache(&self) -> Arc<WriteCache> {
        Arc::clone(&self.shared.disk.write_cache)
    }

    /// Stops serving: takes no more requests, waits for those in flight, reports them, closes the connection and
    /// removes the socket. A front end that keeps an in-flight region can go on with the next server where this
    /// one has stopped. Blocks for as long as the device needs for what it has. Calling it again does nothing.
    ///
    /// Whoever has a window of the guard open is told to give up. Requests that still wait for touches two seconds later
    /// are left unanswered, to the next server; a touch that hangs in the kernel is not waited for.
    pub fn shutdown(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.stop.signal();
        self.shared.disk.guard.stopping();
        let waited = locked(&self.ended).recv_timeout(PATIENCE);
        if waited == Err(RecvTimeoutError::Timeout) {
            // The device is slow, requests wait for touches, or the client is in the middle of a message. Of the latter two
            // this makes an end. The client first: no answer may reach it that a ring has stopped with requests given up.
            if let Some(connection) = locked(&self.shared.connection).as_ref() {
                let _ = connection.shutdown(Shutdown::Both);
            }
            self.shared.disk.guard.abandon();
        }
        if thread.join().is_err() {
            tracing::error!(socket = %self.shared.disk.name, "the connection's thread has panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a connection was left.
enum Left {
    /// The client has gone, or was sent away.
    Client,
    /// The server is being stopped.
    Stopped,
}

impl Shared {
    fn run(&self, socket: &UnixListener) {
        let mut complaints = Complaints::default();
        while let Some(stream) = self.accept(socket, &mut complaints) {
            let counters = &self.disk.counters;
            counters.connections.add(1);
            counters.connected.store(true, Ordering::Relaxed);
            tracing::info!(socket = %self.disk.name, "a client has connected");
            let left = self.serve(socket, stream);
            *locked(&self.connection) = None;
            counters.greeted.store(false, Ordering::Relaxed);
            counters.connected.store(false, Ordering::Relaxed);
            match left {
                Ok(Left::Stopped) => return,
                Ok(Left::Client) => tracing::info!(socket = %self.disk.name, "the client has gone"),
                Err(error) => tracing::warn!(socket = %self.disk.name, "the connection has ended: {error}"),
            }
        }
    }

    /// Waits for a client; none once the server is being stopped.
    fn accept(&self, socket: &UnixListener, complaints: &mut Complaints) -> Option<UnixStream> {
        while !self.stopping.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(self.stop.fd(), PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            match socket.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    complaints.say(|more| {
                        tracing::error!(socket = %self.disk.name, more, "a client cannot be accepted: {error}");
                    });
                    // Out of descriptors, most likely: the client stays where it is, and this must not spin.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        None
    }

    fn serve(&self, socket: &UnixListener, stream: UnixStream) -> io::Result<Left> {
        *locked(&self.connection) = Some(stream.try_clone()?);
        self.disk.guard.connected(peer_of(&stream).map_or(0, |peer| peer.pid));
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(&self.disk))));
        let mut connection = Connection {
            handler: BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&session)),
            stream,
            session,
            back_channel: None,
            told: false,
            changed: false,
            complaints: Complaints::default(),
        };
        let left = self.serve_messages(socket, &mut connection);
        // In this order: what is in flight is reported while the client can still see it, then it hears the end.
        locked(&connection.session).end(matches!(left, Ok(Left::Stopped)));
        left
    }

    fn serve_messages(&self, socket: &UnixListener, connection: &mut Connection) -> io::Result<Left> {
        loop {
            let (message, client, changed) = {
                let limit = locked(&connection.session).retains_for().map(|limit| Timespec {
                    tv_sec: limit.as_secs() as i64,
                    tv_nsec: limit.subsec_nanos().into(),
                });
                let mut fds = [
                    PollFd::new(&connection.stream, PollFlags::IN),
                    PollFd::new(self.stop.fd(), PollFlags::IN),
                    PollFd::new(socket, PollFlags::IN),
                    PollFd::new(self.changed.fd(), PollFlags::IN),
                ];
                match poll(&mut fds, limit.as_ref()) {
                    Err(rustix::io::Errno::INTR) => continue,
                    result => result?,
                };
                locked(&connection.session).release_memory();
                let ready = |at: usize| !fds[at].revents().is_empty();
                (ready(0), ready(2), ready(3))
            };
            if self.stopping.load(Ordering::Acquire) {
                return Ok(Left::Stopped);
            }
            if changed {
                self.changed.clear();
                connection.disk_changed(&self.disk.name);
            }
            // The connection before the listener: a client that replaces one that has gone is not turned away.
            if message {
                if !connection.handle(&self.disk.name)? {
                    return Ok(Left::Client);
                }
                self.disk.counters.greeted.store(true, Ordering::Relaxed);
                connection.tell_of_configuration(&self.disk.name);
            }
            if client && !message {
                self.turn_away(socket);
            }
        }
    }

    fn turn_away(&self, socket: &UnixListener) {
        match socket.accept() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => {
                // Out of descriptors, most likely: the client stays where it is, and this must not spin. Messages wait as long.
                return std::thread::sleep(Duration::from_millis(10));
            }
        }
        let refused = &self.disk.counters.refused;
        refused.add(1);
        // Whoever tries again and again must not fill the log.
        if refused.get().is_power_of_two() {
            let refused = refused.get();
            tracing::warn!(socket = %self.disk.name, refused, "a second client was turned away: one is connected");
        }
    }
}

struct Connection {
    stream: UnixStream,
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    back_channel: Option<BackChannel>,
    /// Whether the front end has been told, since its rings run, to look at the configuration.
    told: bool,
    /// Whether the disk has changed since its rings were last seen standing still.
    changed: bool,
    complaints: Complaints,
}

impl Connection {
    /// Handles one message; false if there will be none any more.
    fn handle(&mut self, name: &str) -> io::Result<bool> {
        let header = peek(&self.stream);
        if header.is_some_and(|header| header.brings_channel()) {
            let (offered, acknowledge) = {
                let session = locked(&self.session);
                (session.negotiated(VhostUserProtocolFeatures::BACKEND_REQ), session.reply_ack())
            };
            let channel = BackChannel::receive(&self.stream, acknowledge)?;
            self.back_channel = offered.then_some(channel);
            return Ok(true);
        }
        match self.handler.handle_request() {
            Ok(()) => Ok(true),
            Err(VhostError::Disconnected) => Ok(false),
            Err(error) => {
                let mut session = locked(&self.session);
                let Some(refusal) = session.take_refusal() else { return Err(io::Error::other(error)) };
                // The front end has been told no and can go on; if it cannot be told, it must not go on believing.
                if session.reply_ack() && header.is_some_and(|header| header.refusal_is_heard()) {
                    drop(session);
                    self.complaints.say(|more| {
                        tracing::warn!(socket = %name, more, "a message was refused: {refusal}");
                    });
                    return Ok(true);
                }
                Err(io::Error::new(io::ErrorKind::InvalidInput, refusal))
            }
        }
    }

    /// The disk may have been resized while the front end was away, and it does not ask again when it comes back. It
    /// listens only while its rings run, and passes on to the guest only what is new.
    fn tell_of_configuration(&mut self, name: &str) {
        if !locked(&self.session).any_running() {
            // What was said while the rings were being stopped was perhaps not listened to any more.
            self.told &= !std::mem::take(&mut self.changed);
        } else if !self.told && self.back_channel.is_some() {
            self.told = true;
            self.config_changed(name);
        }
    }

    /// Says so now, if the front end listens; else, and also if it may have stopped its rings before it heard it, once
    /// they run again.
    fn disk_changed(&mut self, name: &str) {
        (self.told, self.changed) = (false, true);
        self.tell_of_configuration(name);
    }

    fn config_changed(&self, name: &str) {
        let Some(channel) = &self.back_channel else { return };
        locked(&self.session).told_of_change();
        if let Err(error) = channel.config_changed() {
            tracing::warn!(socket = %name, "the front end cannot be told that the disk has changed: {error}");
        }
    }
}
