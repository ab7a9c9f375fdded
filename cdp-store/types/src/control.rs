//! What a front end tells of a guest's rings, and where a cut across all disks of a machine happens.

use std::path::Path;

/// Why a ring has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingStop {
    /// The front end has asked for the ring's position (GET_VRING_BASE). QEMU does so when the machine stops, when a
    /// migration ends, when the guest's driver resets the device and when QEMU quits, and does not say which.
    Asked,
    /// The front end has reset the device (RESET_DEVICE): the guest starts anew, so this is no cut.
    Reset,
    /// It could not be started; it never ran, so this is no cut.
    Failed,
}

/// A virtual machine's say over its disks: the seam through which epochs are cut.
///
/// The vhost-user server of each disk calls it from its connection's thread, and says by its socket which disk it is;
/// servers of several disks call at the same time. An epoch is armed elsewhere. The cut happens *inside*
/// [`VmControl::ring_stopped`], once the last ring of the machine's last disk has stopped: nothing is in flight then,
/// and the front end has not heard yet that this ring has stopped. Whatever must hold from the cut on, as the guard
/// of guest memory must, begins there too.
///
/// No method may block for long: QEMU holds its lock while it waits.
pub trait VmControl: Send + Sync {
    /// The ring takes requests from now on: for the first time, or again after it had stopped.
    fn ring_started(&self, socket: &Path, ring: u16);

    /// The ring is drained: every request taken from it has ended and been reported to the guest, and nothing is
    /// written to guest memory for it. `last` says that no other ring of this disk runs.
    fn ring_stopped(&self, socket: &Path, ring: u16, why: RingStop, last: bool);

    /// The guest's memory is another from now on: the table was sent again, or a region was plugged or unplugged.
    fn memory_changed(&self, socket: &Path);

    /// The connection is gone, in whatever state the rings were. No `ring_stopped` comes for those that ran, and
    /// without it there is no cut: what they had in flight was not reported, or not seen.
    fn disconnected(&self, socket: &Path);
}

/// For disks whose machine is not known to us: nothing is armed, so nothing is cut.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoVmControl;

impl VmControl for NoVmControl {
    fn ring_started(&self, _socket: &Path, _ring: u16) {}
    fn ring_stopped(&self, _socket: &Path, _ring: u16, _why: RingStop, _last: bool) {}
    fn memory_changed(&self, _socket: &Path) {}
    fn disconnected(&self, _socket: &Path) {}
}
