//! The server as its owner sees it.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::accept::{Acceptor, Stop};
use crate::connection::Shared;
use crate::control::{ConnectionInfo, Registry};
use crate::memory::Budget;
use crate::socket::{Address, Listener};
use crate::transport::TlsSettings;
use crate::worker::Worker;
use crate::{Error, ErrorKind, Exports, ServerConfig};

/// How long connections that were ended by force have to get to their end, if the device lets them.
const FORCED: Duration = Duration::from_secs(2);

/// Exports that are being served.
pub struct Server {
    addresses: Vec<Address>,
    registry: Arc<Registry>,
    stop: Stop,
    acceptor: Option<JoinHandle<()>>,
    workers: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens, and serves whoever connects, until [`Server::shutdown`].
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if a number is out of range, [`ErrorKind::InUse`] and [`ErrorKind::Socket`] if it cannot
    /// listen, [`ErrorKind::Tls`] if there is no using the certificates, [`ErrorKind::Resources`] if there is no
    /// thread or no io_uring. Nothing is left of it then.
    pub fn start(config: ServerConfig, exports: Arc<dyn Exports>) -> Result<Self, Error> {
        config.check()?;
        let failed = |error: std::io::Error| Error::because(ErrorKind::Resources, "nbd", error);
        let tls = config.tls.as_ref().map(TlsSettings::load).transpose()?;
        let budget = Arc::new(Budget::new(config.limits.total_bytes));
        let shared = Arc::new(Shared { exports, limits: config.limits, tls, budget });
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for index in 0..config.workers {
            let (worker, thread) = Worker::spawn(index, Arc::clone(&shared)).map_err(failed)?;
            workers.push(worker);
            threads.push(thread);
        }
        // Last, so that nobody is let in before he can be served.
        let listeners: Vec<_> = config.listen.into_iter().map(Listener::open).collect::<Result<_, _>>()?;
        let addresses = listeners.iter().map(|listener| listener.address().clone()).collect();
        let (registry, stop) = (Arc::new(Registry::default()), Stop::new().map_err(failed)?);
        let acceptor =
            Acceptor { listeners, workers, shared, registry: Arc::clone(&registry), stop: stop.clone() };
        let builder = std::thread::Builder::new().name("nbd-accept".to_owned());
        let thread = builder.spawn(move || acceptor.run()).map_err(failed)?;
        Ok(Self { addresses, registry, stop, acceptor: Some(thread), workers: threads })
    }

    /// Where it listens, in the order of the configuration.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Who is connected, in the order in which they came.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.registry.all().iter().map(|control| control.info()).collect()
    }

    /// Disconnects some clients at once, and waits until their requests in flight have ended and their exports are
    /// dropped; at most for `patience`. Returns how many of them have not come to that.
    ///
    /// Those that come while it runs are not among them: whoever wants none to be left lets [`Exports::open`] refuse
    /// them first.
    pub fn disconnect(&self, which: impl Fn(&ConnectionInfo) -> bool, patience: Duration) -> usize {
        let mut ids = Vec::new();
        for control in self.registry.all().iter().filter(|control| which(&control.info())) {
            control.kill();
            ids.push(control.id);
        }
        self.registry.wait_for_end(&ids, Instant::now() + patience)
    }

    /// Stops serving: closes and removes the sockets, takes no more requests, carries out and answers those in
    /// flight, and closes the connections. Those that have not come to their end after `patience` are ended by
    /// force. Returns how many are left all the same, because their device does not let go of them; their threads
    /// go on until it does. Calling it again does nothing.
    pub fn shutdown(&mut self, patience: Duration) -> usize {
        let Some(acceptor) = self.acceptor.take() else { return 0 };
        let deadline = Instant::now() + patience;
        self.stop.signal();
        if acceptor.join().is_err() {
            tracing::error!("the thread that accepts NBD clients has panicked");
        }
        let all = self.registry.all();
        let ids: Vec<u64> = all.iter().map(|control| control.id).collect();
        all.iter().for_each(|control| control.stop());
        let mut left = self.registry.wait_for_end(&ids, deadline);
        if left > 0 {
            tracing::warn!("{left} NBD connections have not ended in time: they are cut off");
            self.registry.all().iter().for_each(|control| control.kill());
            left = self.registry.wait_for_end(&ids, Instant::now() + FORCED);
        }
        if left > 0 {
            tracing::error!("{left} NBD connections have requests in flight that do not end");
            return left;
        }
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("a thread that serves NBD clients has panicked");
            }
        }
        0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown(FORCED);
    }
}
