//! What a front end tells of a guest's rings, and what it is told to do at a cut.

/// A virtual machine's say over one of its disks: the seam through which epochs are cut.
///
/// The vhost-user server calls it from its connection thread. An epoch is armed elsewhere; the server only
/// reports starts and stops, and the cut happens *inside* [`VmControl::rings_stopped`], with nothing in flight,
/// before QEMU hears that the ring has stopped.
pub trait VmControl: Send + Sync {
    /// The ring takes requests from now on.
    fn ring_started(&self, ring: u16);

    /// The ring is drained: every request taken from it has ended and been reported to the guest.
    /// `last` says that no other ring of this disk runs. Returns quickly: QEMU holds its lock while it waits.
    fn ring_stopped(&self, ring: u16, last: bool);

    /// The connection is gone, in whatever state the rings were.
    fn disconnected(&self);
}

/// For disks whose machine is not known to us: nothing is armed, so nothing is cut.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoVmControl;

impl VmControl for NoVmControl {
    fn ring_started(&self, _ring: u16) {}
    fn ring_stopped(&self, _ring: u16, _last: bool) {}
    fn disconnected(&self) {}
}
