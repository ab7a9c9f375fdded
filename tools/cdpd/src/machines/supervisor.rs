//! Those who look after a QEMU and can start it anew: `cdp-tool vm run`, each over a connection that it keeps open.
//!
//! ```text
//!  vm run ── POST …/supervisor, kept open ──► attached ◄── a revert asks for a QEMU that waits
//!     ▲                                          │ order: restart
//!     └── ends QEMU, starts it with -incoming ◄──┘
//!     └── PUT …/supervisor {"state": "waiting"} ──► the revert goes on
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cdp_types::VmName;
use tokio::sync::{mpsc, watch};

use crate::api::{ApiError, ErrorKind, Order, Supervised};

/// How long a supervisor may take to end one QEMU and start another.
const RESTART: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Attached {
    state: watch::Sender<Supervised>,
    orders: mpsc::Sender<Order>,
}

/// Who looks after which machine.
#[derive(Debug, Default)]
pub(crate) struct Supervisors {
    attached: Mutex<BTreeMap<VmName, Attached>>,
}

/// A supervisor's place; dropping it says that it has gone.
#[derive(Debug)]
pub(crate) struct Place {
    supervisors: Arc<Supervisors>,
    vm: VmName,
    orders: mpsc::Receiver<Order>,
}

impl Supervisors {
    fn attached(&self) -> MutexGuard<'_, BTreeMap<VmName, Attached>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of a machine's supervisor.
    ///
    /// # Errors
    /// `Busy`: it is taken.
    pub(crate) fn attach(self: &Arc<Self>, vm: VmName) -> Result<Place, ApiError> {
        let (send, orders) = mpsc::channel(4);
        let mut attached = self.attached();
        if attached.contains_key(&vm) {
            let text = format!("machine '{vm}' is run already, by another cdp-tool vm run");
            return Err(ApiError::new(ErrorKind::Busy, text));
        }
        let state = watch::Sender::new(Supervised::Starting);
        attached.insert(vm.clone(), Attached { state, orders: send });
        drop(attached);
        Ok(Place { supervisors: Arc::clone(self), vm, orders })
    }

    /// Notes how a supervised QEMU does.
    ///
    /// # Errors
    /// `NotFound`: nobody is attached.
    pub(crate) fn report(&self, vm: &VmName, state: Supervised) -> Result<(), ApiError> {
        match self.attached().get(vm) {
            Some(attached) => {
                attached.state.send_replace(state);
                Ok(())
            }
            None => Err(ApiError::new(ErrorKind::NotFound, format!("nobody looks after machine '{vm}'"))),
        }
    }

    /// Notes that a machine runs on from memory that it was given, and tells its supervisor, if there is one.
    pub(crate) fn runs(&self, vm: &VmName) {
        if let Some(attached) = self.attached().get(vm) {
            attached.state.send_replace(Supervised::Running);
            // It takes its orders at once; one that does not is told of a restart all the same.
            let _ = attached.orders.try_send(Order::Runs);
        }
    }

    /// How a machine's QEMU does, if somebody looks after it.
    pub(crate) fn state(&self, vm: &VmName) -> Option<Supervised> {
        self.attached().get(vm).map(|attached| *attached.state.borrow())
    }

    /// Has a machine's supervisor end its QEMU and start one that waits for memory; nothing if it has one already.
    ///
    /// # Errors
    /// Nobody looks after it (any more), or it takes too long.
    pub(crate) async fn restart(&self, vm: &VmName) -> Result<(), ApiError> {
        self.restart_within(vm, RESTART).await
    }

    async fn restart_within(&self, vm: &VmName, limit: Duration) -> Result<(), ApiError> {
        let gone = || {
            let text =
                format!("the cdp-tool vm run that looked after machine '{vm}' has ended: see what it said");
            ApiError::new(ErrorKind::Unavailable, text)
        };
        let (orders, mut state) = match self.attached().get(vm) {
            Some(attached) => (attached.orders.clone(), attached.state.subscribe()),
            None => return Err(gone()),
        };
        if *state.borrow() == Supervised::Waiting {
            return Ok(());
        }
        let restarted = async {
            // One that hangs takes no orders, and after a few there is no room for more.
            orders.send(Order::Restart).await.map_err(|_| gone())?;
            let waiting = state.wait_for(|state| *state == Supervised::Waiting).await;
            waiting.map(drop).map_err(|_| gone())
        };
        tokio::time::timeout(limit, restarted).await.unwrap_or_else(|_| {
            let text = format!(
                "QEMU of machine '{vm}' was not started anew within {limit:?}: does its cdp-tool vm run hang, or was it \
                 suspended? Once it goes on it still ends that QEMU and starts one that waits for memory"
            );
            Err(ApiError::new(ErrorKind::Unavailable, text))
        })
    }
}

impl Place {
    /// Whose it is.
    pub(crate) fn vm(&self) -> &VmName {
        &self.vm
    }

    /// The next order.
    pub(crate) async fn order(&mut self) -> Option<Order> {
        self.orders.recv().await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.supervisors.attached().remove(&self.vm);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn vm() -> VmName {
        "web1".parse().unwrap()
    }

    #[tokio::test]
    async fn a_restart_ends_when_qemu_waits() {
        let supervisors = Arc::new(Supervisors::default());
        let mut place = supervisors.attach(vm()).unwrap();
        supervisors.report(&vm(), Supervised::Running).unwrap();
        let obeying = {
            let supervisors = Arc::clone(&supervisors);
            tokio::spawn(async move {
                assert_eq!(place.order().await, Some(Order::Restart));
                supervisors.report(&vm(), Supervised::Starting).unwrap();
                supervisors.report(&vm(), Supervised::Waiting).unwrap();
                place
            })
        };
        supervisors.restart(&vm()).await.unwrap();
        let mut place = obeying.await.unwrap();
        // It waits already: there is nothing to do.
        supervisors.restart(&vm()).await.unwrap();
        assert!(place.orders.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_supervisor_that_hangs_is_not_waited_for() {
        let (supervisors, vm) = (Arc::new(Supervisors::default()), vm());
        let _place = supervisors.attach(vm.clone()).unwrap();
        supervisors.report(&vm, Supervised::Running).unwrap();
        // More often than there is room for orders.
        for _ in 0..10 {
            let restart = supervisors.restart_within(&vm, Duration::from_millis(10));
            let refused = tokio::time::timeout(RESTART / 3, restart).await.unwrap().unwrap_err();
            assert!(refused.message.contains("not started anew"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_supervisor_that_goes_away_is_said_to_have_gone() {
        let supervisors = Arc::new(Supervisors::default());
        assert!(supervisors.restart(&vm()).await.unwrap_err().message.contains("has ended"));
        let place = supervisors.attach(vm()).unwrap();
        assert_eq!(supervisors.attach(vm()).unwrap_err().kind, ErrorKind::Busy);
        let waiting = Arc::clone(&supervisors);
        let restart = tokio::spawn(async move { waiting.restart(&vm()).await });
        tokio::task::yield_now().await;
        drop(place);
        assert!(restart.await.unwrap().unwrap_err().message.contains("has ended"));
        assert_eq!(supervisors.state(&vm()), None);
        supervisors.attach(vm()).unwrap();
    }
}
