//! Where a memory image lies, as saver and restorer see it.

use std::time::Duration;

use cdp_types::{ByteRange, IoBuf, IoError};

use super::{Control, PATIENCE};
use crate::Error;

/// One request. Offsets and lengths are multiples of 4096.
#[derive(Debug)]
pub enum Request {
    /// Fill `into` from `offset`. What was never written reads as zeroes.
    Read {
        /// First byte.
        offset: u64,
        /// Where to; its length is the request's.
        into: IoBuf,
    },
    /// Write `from` at `offset`. The memory must not change before the request has ended.
    Write {
        /// First byte.
        offset: u64,
        /// Where from; its length is the request's.
        from: IoBuf,
    },
    /// Make the range read as zeroes, and give its space back.
    Zero(ByteRange),
    /// Everything that had ended when this was submitted is durable once it ends.
    Flush,
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion {
    /// As submitted.
    pub token: u64,
    /// How it went.
    pub result: Result<(), IoError>,
}

/// A volume's content, with many requests in flight.
///
/// Requests end in any order, and those in flight may be carried out in any order: who needs an order waits.
pub trait PageStore: Send {
    /// Its size, in bytes.
    fn capacity(&self) -> u64;

    /// Takes a request. Does not wait for it.
    fn submit(&mut self, token: u64, request: Request);

    /// Appends what has ended to `done`; waits at most `patience` while there is nothing to append.
    ///
    /// # Errors
    /// `Store` when it cannot be used any further.
    fn completed(&mut self, patience: Duration, done: &mut Vec<Completion>) -> Result<(), Error>;

    /// Requests whose end `completed` has not told yet.
    fn in_flight(&self) -> usize;
}

/// Carries requests out, all of them together, while nothing else is in flight.
pub(super) fn carry_out<S: PageStore>(
    store: &mut S,
    requests: Vec<Request>,
    control: &Control<'_>,
) -> Result<(), Error> {
    let places: Vec<u64> = requests.iter().map(Request::place).collect();
    for (request, token) in requests.into_iter().zip(0..) {
        store.submit(token, request);
    }
    let mut done = Vec::new();
    while store.in_flight() > 0 {
        control.check()?;
        store.completed(PATIENCE, &mut done)?;
        for Completion { token, result } in done.drain(..) {
            let place = places.get(token as usize).copied().unwrap_or_default();
            result.map_err(|error| Error::store(place, "reading or writing it", error))?;
        }
    }
    Ok(())
}

impl Request {
    fn place(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => *offset,
            Self::Zero(range) => range.offset,
            Self::Flush => 0,
        }
    }
}
