//! The channel on which we tell the front end that the disk has changed (vhost-user, "Back-end communication").
//!
//! The `vhost` crate's `Backend` can neither send CONFIG_CHANGE_MSG nor give its socket away, so the one message that
//! brings the socket is received here, before the crate sees it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq, VhostUserHeaderFlag};

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER_LEN: usize = 12;
/// The version of the protocol, in the lowest bits of the flags.
const VERSION: u32 = 1;

/// A message's header, in the machine's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = bytes;
        Self {
            request: u32::from_ne_bytes([r0, r1, r2, r3]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            size: u32::from_ne_bytes([s0, s1, s2, s3]),
        }
    }

    fn bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (at, word) in [self.request, self.flags, self.size].into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// Whether the front end waits for an acknowledgement, if that was negotiated.
    pub(crate) fn needs_reply(self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    /// Whether it brings the socket of the back channel.
    pub(crate) fn brings_channel(self) -> bool {
        self.request == FrontendReq::SET_BACKEND_REQ_FD as u32
    }

    /// Whether a refusal of this message is acknowledged as such. The others have answers of their own, and none
    /// that says no: to them the only refusal is to end the connection.
    pub(crate) fn refusal_is_heard(self) -> bool {
        let answered = [
            FrontendReq::GET_FEATURES,
            FrontendReq::GET_PROTOCOL_FEATURES,
            FrontendReq::GET_VRING_BASE,
            FrontendReq::GET_QUEUE_NUM,
            FrontendReq::GET_INFLIGHT_FD,
            FrontendReq::GET_MAX_MEM_SLOTS,
            FrontendReq::SET_LOG_BASE,
        ];
        self.needs_reply() && answered.iter().all(|&request| self.request != request as u32)
    }
}

/// Looks at the header of the next message and leaves it where it is; none if not all of it has arrived.
pub(crate) fn peek(stream: &UnixStream) -> Option<Header> {
    let mut bytes = [0; HEADER_LEN];
    let (_, len) = recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
    (len == HEADER_LEN).then(|| Header::parse(bytes))
}

/// The front end's end of the back channel.
pub(crate) struct BackChannel(OwnedFd);

impl BackChannel {
    /// Receives the message that brings it. `acknowledge` says whether acknowledgements were negotiated.
    pub(crate) fn receive(stream: &UnixStream, acknowledge: bool) -> io::Result<Self> {
        let mut bytes = [0; HEADER_LEN];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received =
            recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL)?;
        let header = Header::parse(bytes);
        let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if received.bytes != HEADER_LEN || header.size > 8 {
            return Err(broken("the message that brings the back channel is malformed"));
        }
        // The specification has no payload for it; a front end may send a number all the same. Receiving nothing
        // would wait for the next message.
        if header.size > 0 {
            let mut payload = [0; 8];
            let (_, len) = recv(stream, &mut payload[..header.size as usize], RecvFlags::WAITALL)?;
            if len != header.size as usize {
                return Err(broken("the message that brings the back channel is cut short"));
            }
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if acknowledge && header.needs_reply() {
            let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
            let mut reply = Header { flags, size: 8, ..header }.bytes().to_vec();
            reply.extend_from_slice(&u64::from(fd.is_none()).to_ne_bytes());
            send(stream, &reply, SendFlags::NOSIGNAL)?;
        }
        fd.map(Self).ok_or_else(|| broken("the back channel comes without a socket"))
    }

    /// Tells the front end to read the configuration space again. Never waits: the front end asks for it on the
    /// connection that our caller serves.
    pub(crate) fn config_changed(&self) -> io::Result<()> {
        let header = Header { request: BackendReq::CONFIG_CHANGE_MSG as u32, flags: VERSION, size: 0 };
        send(&self.0, &header.bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }
}
