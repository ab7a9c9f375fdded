//! What every front end needs on its side of a socket: the socket's place in the file system, who is at the other end,
//! and log lines that strangers can cause. Nothing here knows a protocol.

mod complaints;
mod peer;
mod socket;

pub use complaints::Complaints;
pub use peer::{Peer, peer_of};
pub use socket::{SocketFile, bind};
