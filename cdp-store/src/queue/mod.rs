//! Queues: one thread's requests on their way between a front end, the log and the kernel.

mod flush;
mod head;
mod inbox;
mod landing;
mod partial;
mod past;
mod read;
mod seeking;
#[cfg(test)]
mod testing;
mod write;

pub use head::HeadQueue;
pub use inbox::{Inbox, Mail};
pub use landing::Landings;
pub use past::{Past, PastQueue};
