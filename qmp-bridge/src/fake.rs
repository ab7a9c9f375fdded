//! A QEMU for tests: one that says what a recorded one said ([`Fake::replay`]), or what a test makes it say
//! ([`Fake::answering`]); a tap that records ([`tap`]); and a guest agent ([`GuestAgent`]).
//!
//! A transcript is text, one JSON object for each line:
//!
//! | line | means |
//! | --- | --- |
//! | `{"note": "…"}` | for people |
//! | `{"qemu": {…}}` | QEMU says this; the `id` of a reply is replaced with that of the command it answers |
//! | `{"client": {…}}` | a command is waited for, with this name and these arguments; its `id` may be another |
//! | `{"fault": "silence"}` | nothing more is said on this connection |
//! | `{"fault": "hang-up"}` | the connection is closed |
//! | `{"fault": "say", "text": "…"}` | these bytes are sent as they are |
//!
//! Behind the last line the client is expected to close the connection.

mod agent;
mod server;
mod tap;
mod transcript;

pub use agent::{AgentConduct, GuestAgent};
pub use server::{Fake, Say, Voice};
pub use tap::tap;
pub use transcript::{Fault, Step, Transcript};
