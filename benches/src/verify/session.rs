//! One connection, on which everything that is read is compared with the model.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::SmallRng;

use super::content::SECTOR;
use super::model::{Change, Model};
use crate::client::{Client, Shape};

/// A server that ends no request for so long is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one queue is waited for before the others are looked at again.
const LOOK: Duration = Duration::from_millis(1);
/// The longest request.
const MAX_REQUEST: usize = 128 << 10;

/// How the client of a session connects.
pub(crate) fn shape(queues: usize, depth: usize) -> Shape {
    Shape { queues, depth, request_bytes: MAX_REQUEST }
}

/// Which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mix {
    /// Everything that virtio-blk has, from one sector to [`MAX_REQUEST`], aligned to nothing but sectors.
    Everything,
    /// Writes of 4 KiB blocks.
    BlockWrites,
    /// Reads of 4 KiB blocks.
    BlockReads,
}

#[derive(Clone, Debug)]
enum Action {
    Read,
    Change(Change),
    Flush,
}

/// A request in flight.
#[derive(Clone, Debug)]
struct Request {
    action: Action,
    sectors: Range<u64>,
}

/// A connection and the model of what is behind it.
pub(crate) struct Session<'a> {
    client: Client,
    model: &'a mut Model,
    random: &'a mut SmallRng,
    /// By queue and slot.
    requests: Vec<Vec<Option<Request>>>,
    can_zero: bool,
    buffer: Vec<u8>,
    progress: Instant,
}

impl<'a> Session<'a> {
    /// Goes on with a connection that has been made in the [`shape`] of a session.
    ///
    /// # Errors
    /// The disk has another size than the model.
    pub(crate) fn new(mut client: Client, model: &'a mut Model, random: &'a mut SmallRng) -> Result<Self> {
        let (capacity, expected) = (client.capacity()?, model.sectors() * SECTOR as u64);
        ensure!(capacity == expected, "the disk has {capacity} bytes instead of {expected}");
        let can_zero = client.can_zero()?;
        let requests = client.lanes().iter().map(|lane| vec![None; lane.shape().depth]).collect();
        Ok(Self {
            client,
            model,
            random,
            requests,
            can_zero,
            buffer: vec![0; MAX_REQUEST],
            progress: Instant::now(),
        })
    }

    /// Makes so many random requests, and returns when the last of them is in flight.
    ///
    /// # Errors
    /// The disk has not what it must have, a request failed, or none ends.
    pub(crate) fn make(&mut self, mix: Mix, mut count: u64) -> Result<()> {
        while count > 0 {
            for queue in 0..self.requests.len() {
                while count > 0
                    && let Some(slot) = self.free_slot(queue)
                    && let Some(request) = self.propose(mix)
                {
                    self.begin(queue, slot, request);
                    count -= 1;
                }
            }
            // Those last made stay in flight.
            if count > 0 {
                self.reap()?;
            }
        }
        self.tell()
    }

    /// Waits for all requests in flight.
    ///
    /// # Errors
    /// As [`Session::make`].
    pub(crate) fn finish(&mut self) -> Result<()> {
        while self.in_flight() > 0 {
            self.reap()?;
        }
        Ok(())
    }

    /// Reads the whole disk.
    ///
    /// # Errors
    /// As [`Session::make`].
    pub(crate) fn check_everything(&mut self) -> Result<()> {
        let step = (MAX_REQUEST / SECTOR) as u64;
        let mut next = 0;
        while next < self.model.sectors() {
            for queue in 0..self.requests.len() {
                while next < self.model.sectors()
                    && let Some(slot) = self.free_slot(queue)
                {
                    let sectors = next..(next + step).min(self.model.sectors());
                    ensure!(self.model.claim(&sectors), "requests of this session overlap");
                    self.begin(queue, slot, Request { action: Action::Read, sectors: sectors.clone() });
                    next = sectors.end;
                }
            }
            self.reap()?;
        }
        self.finish()
    }

    /// Ends the connection as a killed guest does: without a word. Returns how many requests were in flight.
    pub(crate) fn cut(mut self) -> usize {
        let in_flight = self.in_flight();
        for request in self.requests.iter_mut().flatten().filter_map(Option::take) {
            self.model.release(&request.sectors);
            if let Action::Change(change) = request.action {
                self.model.cut_off(&request.sectors, change);
            }
        }
        in_flight
    }

    fn in_flight(&self) -> usize {
        self.requests.iter().flatten().flatten().count()
    }

    fn free_slot(&self, queue: usize) -> Option<usize> {
        self.requests[queue].iter().position(Option::is_none)
    }

    /// A request whose sectors no other has; `None` if that is hard to find.
    fn propose(&mut self, mix: Mix) -> Option<Request> {
        for _ in 0..16 {
            let action = self.action(mix);
            let sectors = self.sectors(mix);
            if matches!(action, Action::Flush) {
                return Some(Request { action, sectors: 0..0 });
            }
            if self.model.claim(&sectors) {
                return Some(Request { action, sectors });
            }
        }
        None
    }

    fn action(&mut self, mix: Mix) -> Action {
        // The version is set when the write begins.
        let write = Action::Change(Change::Write(0));
        match mix {
            Mix::BlockWrites => return write,
            Mix::BlockReads => return Action::Read,
            Mix::Everything => {}
        }
        match self.random.random_range(0..100) {
            0..40 => Action::Read,
            90..94 if self.can_zero => Action::Change(Change::Zero),
            94..97 if self.can_zero => Action::Change(Change::Discard),
            97..100 => Action::Flush,
            _ => write,
        }
    }

    fn sectors(&mut self, mix: Mix) -> Range<u64> {
        const BLOCK: u64 = 8;
        let (align, len) = match self.random.random_range(0..100) {
            _ if mix != Mix::Everything => (BLOCK, BLOCK),
            // Parts of a block, so that several requests meet in one.
            0..25 => (1, self.random.random_range(1..BLOCK)),
            25..70 => (BLOCK, BLOCK),
            70..90 => (BLOCK, BLOCK * self.random.random_range(2..=(MAX_REQUEST / SECTOR) as u64 / BLOCK)),
            _ => (1, self.random.random_range(1..=(MAX_REQUEST / SECTOR) as u64)),
        };
        let places = (self.model.sectors() - len) / align + 1;
        let start = self.random.random_range(0..places) * align;
        start..start + len
    }

    fn begin(&mut self, queue: usize, slot: usize, mut request: Request) {
        let lane = &mut self.client.lanes()[queue];
        let offset = request.sectors.start * SECTOR as u64;
        let len = (request.sectors.end - request.sectors.start) as usize * SECTOR;
        match &mut request.action {
            Action::Read => lane.read(slot, offset, len),
            Action::Change(Change::Write(version)) => {
                let content = &mut self.buffer[..len];
                *version = self.model.next_version(&request.sectors, content);
                lane.fill(slot, content);
                lane.write(slot, offset, len);
            }
            Action::Change(Change::Zero) => lane.write_zeroes(slot, offset, len),
            Action::Change(Change::Discard) => lane.discard(slot, offset, len),
            Action::Flush => lane.flush(slot),
        }
        self.requests[queue][slot] = Some(request);
    }

    /// Tells the server of everything that is queued, and takes what has ended.
    fn tell(&mut self) -> Result<()> {
        for queue in 0..self.requests.len() {
            self.take(queue, 0, Duration::ZERO)?;
        }
        Ok(())
    }

    /// Takes what has ended on any queue, and waits a little if that is nothing.
    fn reap(&mut self) -> Result<()> {
        let before = self.in_flight();
        self.tell()?;
        if before > 0 && self.in_flight() == before {
            let busy =
                (0..self.requests.len()).find(|&queue| self.requests[queue].iter().any(Option::is_some));
            self.take(busy.context("requests in flight on no queue")?, 1, LOOK)?;
        }
        if self.in_flight() < before || before == 0 {
            self.progress = Instant::now();
        } else if self.progress.elapsed() > PATIENCE {
            bail!("{before} requests are in flight, and none has ended for {PATIENCE:?}");
        }
        Ok(())
    }

    fn take(&mut self, queue: usize, least: usize, patience: Duration) -> Result<()> {
        let ended = self.client.lanes()[queue].reap(least, patience)?.to_vec();
        for done in ended {
            let request = self.requests[queue][done.slot].take().context("an answer to no request")?;
            ensure!(done.ok, "a request failed: {request:?}");
            self.model.release(&request.sectors);
            match request.action {
                Action::Read => {
                    let len = (request.sectors.end - request.sectors.start) as usize * SECTOR;
                    self.client.lanes()[queue].copy(done.slot, &mut self.buffer[..len]);
                    self.model.check(&request.sectors, &self.buffer[..len])?;
                }
                Action::Change(change) => self.model.answered(&request.sectors, change),
                Action::Flush => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use rand::SeedableRng;

    use super::*;
    use crate::client::Place;
    use crate::verify::Wrong;

    const BYTES: u64 = 4 << 20;

    /// Runs a session on a file, as if it were a disk.
    fn on_a_file(body: impl FnOnce(&mut dyn FnMut(&mut dyn FnMut(Session<'_>)), &File)) {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(BYTES).unwrap();
        let mut model = Model::new(5, BYTES);
        let mut random = SmallRng::seed_from_u64(5);
        let mut connect = |work: &mut dyn FnMut(Session<'_>)| {
            let client = Client::connect(&Place::File(file.path().to_owned()), shape(2, 8)).unwrap();
            work(Session::new(client, &mut model, &mut random).unwrap());
        };
        body(&mut connect, file.as_file());
    }

    #[test]
    fn a_good_disk_passes_and_a_flipped_bit_is_found() {
        on_a_file(|connect, file| {
            connect(&mut |mut session| {
                session.make(Mix::Everything, 500).unwrap();
                session.finish().unwrap();
                session.check_everything().unwrap();
            });
            let mut byte = [0];
            file.read_exact_at(&mut byte, 70_000).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 70_000).unwrap();
            connect(&mut |mut session| {
                let wrong = session.check_everything().unwrap_err();
                assert!(wrong.is::<Wrong>() && wrong.to_string().contains("sector 136 "), "{wrong:#}");
            });
        });
    }

    #[test]
    fn a_write_that_is_lost_at_a_cut_is_found() {
        on_a_file(|connect, file| {
            connect(&mut |mut session| {
                session.make(Mix::BlockWrites, 16_000).unwrap();
                session.finish().unwrap();
                assert_eq!(session.cut(), 0);
            });
            // As if the server had kept the last write of a block to itself.
            file.write_all_at(&[0; 4096], 8 * 4096).unwrap();
            connect(&mut |mut session| assert!(session.check_everything().unwrap_err().is::<Wrong>()));
        });
    }
}
