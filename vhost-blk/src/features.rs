//! Which virtio and vhost-user features are offered, and what follows from those that were accepted.

use cdp_types::DeviceInfo;
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Log every page that the device writes (vhost-user, "Migration"); not a virtio feature.
const VHOST_F_LOG_ALL: u32 = 26;
/// The protocol features below can be negotiated; not a virtio feature.
const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// The features that a front end is offered for this disk (virtio 1.3, 5.2.3 and 6).
pub(crate) fn offered(info: &DeviceInfo) -> u64 {
    let always = [
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
        VHOST_F_LOG_ALL,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VHOST_USER_F_PROTOCOL_FEATURES,
        VIRTIO_F_VERSION_1,
    ];
    let writable = [VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    let more = if info.read_only { &[VIRTIO_BLK_F_RO][..] } else { &writable[..] };
    always.iter().chain(more).fold(0, |bits, bit| bits | 1 << bit)
}

/// The protocol features that a front end is offered. Never STATUS: the `vhost` crate ends the connection at the
/// first SET_STATUS.
pub(crate) fn offered_protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::RESET_DEVICE
}

/// The features that a front end has accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    pub(crate) fn event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    pub(crate) fn indirect(self) -> bool {
        self.has(VIRTIO_RING_F_INDIRECT_DESC)
    }

    pub(crate) fn log_all(self) -> bool {
        self.has(VHOST_F_LOG_ALL)
    }

    /// Without it, a ring is enabled as soon as it is started (vhost-user, "Ring states").
    pub(crate) fn protocol_features(self) -> bool {
        self.has(VHOST_USER_F_PROTOCOL_FEATURES)
    }

    /// Whether the guest can flush: if not, every write must be durable before it is answered.
    pub(crate) fn flush(self) -> bool {
        self.has(VIRTIO_BLK_F_FLUSH)
    }

    pub(crate) fn config_wce(self) -> bool {
        self.has(VIRTIO_BLK_F_CONFIG_WCE)
    }

    /// These without what may be switched while rings run.
    pub(crate) fn fixed(self) -> u64 {
        self.0 & !(1 << VHOST_F_LOG_ALL)
    }
}
