//! Pages on their way to the volume: read what is there, compare, write what differs. Several batches at once.

use cdp_types::{ByteRange, IoBuf};

use super::{Completion, Control, PATIENCE, PageStore, Progress, Request};
use crate::stream::Content;
use crate::{Error, PAGE_SIZE, ZERO_PAGE};

/// Pages of one batch, in bytes. Each batch has as much again for what the volume holds.
const BATCH_BYTES: usize = 2 << 20;
/// The most there are. One is being filled, the others are being read, compared and written.
const BATCHES: usize = 8;
/// The largest request: what a store of the smallest segments takes in one write.
const REQUEST_BYTES: usize = 256 << 10;

/// Takes pages in any order. What it holds is bounded: 32 MiB, if there is that much to hold.
#[derive(Debug)]
pub(super) struct Pipeline<S> {
    pub(super) store: S,
    batches: Vec<Batch>,
    /// The batch that is being filled.
    current: usize,
    free: Vec<usize>,
    done: Vec<Completion>,
}

#[derive(Debug)]
struct Batch {
    data: IoBuf,
    /// What the volume holds.
    held: IoBuf,
    used: usize,
    runs: Vec<Run>,
    /// Whether a page in it had been put before, so that it may be in another batch.
    repeats: bool,
    /// Requests that have not ended.
    pending: usize,
    writing: bool,
}

/// Pages that are next to each other on the volume and in the batch, all zero or all not.
#[derive(Clone, Copy, Debug)]
struct Run {
    offset: u64,
    at: usize,
    len: usize,
    zero: bool,
}

impl Run {
    fn end(&self) -> u64 {
        self.offset + self.len as u64
    }
}

impl Batch {
    fn new() -> Self {
        let (data, held) = (IoBuf::zeroed(BATCH_BYTES), IoBuf::zeroed(BATCH_BYTES));
        Self { data, held, used: 0, runs: Vec::new(), repeats: false, pending: 0, writing: false }
    }

    fn has(&self, offset: u64) -> bool {
        self.runs.iter().any(|run| (run.offset..run.end()).contains(&offset))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: &Run, b: &Run| a.offset < b.end() && b.offset < a.end();
        self.runs.iter().any(|run| other.runs.iter().any(|other| meet(run, other)))
    }

    fn put(&mut self, offset: u64, content: Content<'_>) {
        let zero = match content {
            Content::Zero => true,
            Content::Bytes(bytes) => {
                self.data.copy_in(self.used, bytes);
                false
            }
        };
        match self.runs.last_mut() {
            Some(run) if run.end() == offset && run.zero == zero => run.len += PAGE_SIZE,
            _ => self.runs.push(Run { offset, at: self.used, len: PAGE_SIZE, zero }),
        }
        self.used += PAGE_SIZE;
    }

    /// The requests that read what the volume holds; runs that touch are read together.
    fn reads(&self) -> Vec<Request> {
        let mut joined: Vec<Run> = Vec::new();
        for run in &self.runs {
            match joined.last_mut() {
                Some(last) if last.end() == run.offset => last.len += run.len,
                _ => joined.push(*run),
            }
        }
        let read = |(offset, at, len)| Request::Read { offset, into: self.held.slice(at, len) };
        joined.iter().flat_map(|run| pieces(run.offset, run.at, run.len)).map(read).collect()
    }

    /// The requests that make the volume hold what the batch does.
    fn writes(&self, progress: &mut Progress) -> Vec<Request> {
        let (mut held, mut data) = (ZERO_PAGE, ZERO_PAGE);
        let mut writes = Vec::new();
        for run in &self.runs {
            let mut differs = |at: usize| {
                self.held.copy_out(at, &mut held);
                match run.zero {
                    true => held != ZERO_PAGE,
                    false => {
                        self.data.copy_out(at, &mut data);
                        held != data
                    }
                }
            };
            let mut at = run.at;
            let end = run.at + run.len;
            while at < end {
                let same = (at..end).step_by(PAGE_SIZE).find(|&at| !differs(at)).unwrap_or(end);
                self.write(run, at, same - at, progress, &mut writes);
                at = same + PAGE_SIZE;
            }
        }
        writes
    }

    fn write(&self, run: &Run, at: usize, len: usize, progress: &mut Progress, writes: &mut Vec<Request>) {
        let offset = run.offset + (at - run.at) as u64;
        progress.changed += (len / PAGE_SIZE) as u64;
        if run.zero && len > 0 {
            writes.push(Request::Zero(ByteRange::new(offset, len as u64)));
        } else if !run.zero {
            progress.stored_bytes += len as u64;
            let write = |(offset, at, len)| Request::Write { offset, from: self.data.slice(at, len) };
            writes.extend(pieces(offset, at, len).map(write));
        }
    }
}

/// Cuts `len` bytes at `offset` of the volume and `at` in a buffer into requests.
pub(super) fn pieces(offset: u64, at: usize, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let piece = move |skip| (offset + skip as u64, at + skip, REQUEST_BYTES.min(len - skip));
    (0..len).step_by(REQUEST_BYTES).map(piece)
}

impl<S: PageStore> Pipeline<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, batches: vec![Batch::new()], current: 0, free: Vec::new(), done: Vec::new() }
    }

    /// Takes a page for `offset`; `repeated` if one for it was put before. The last one counts. Whether a batch
    /// became full.
    pub(super) fn put(
        &mut self,
        offset: u64,
        content: Content<'_>,
        repeated: bool,
        progress: &mut Progress,
        control: &Control<'_>,
    ) -> Result<bool, Error> {
        let mut full = false;
        if repeated {
            if self.batches[self.current].has(offset) {
                self.send(progress, control)?;
                full = true;
            }
            self.batches[self.current].repeats = true;
        }
        self.batches[self.current].put(offset, content);
        if self.batches[self.current].used == BATCH_BYTES {
            self.send(progress, control)?;
            full = true;
        }
        Ok(full)
    }

    /// Waits until the volume holds all that was put.
    pub(super) fn drain(&mut self, progress: &mut Progress, control: &Control<'_>) -> Result<(), Error> {
        if self.batches[self.current].used > 0 {
            self.send(progress, control)?;
        }
        self.wait_for_free(self.batches.len() - 1, progress, control)
    }

    /// Sends the batch that was being filled on its way, and makes room for another.
    fn send(&mut self, progress: &mut Progress, control: &Control<'_>) -> Result<(), Error> {
        control.check()?;
        let index = self.current;
        let batch = &self.batches[index];
        let others = self.batches.iter().enumerate().filter(|(other, _)| *other != index);
        if batch.repeats && others.clone().any(|(_, other)| other.pending > 0 && batch.overlaps(other)) {
            // An older version of a page is on its way; it must not arrive after this one.
            self.wait_for_free(self.batches.len() - 1, progress, control)?;
        }
        let reads = self.batches[index].reads();
        self.submit(index, reads, false);
        self.step(std::time::Duration::ZERO, progress)?;
        if self.free.is_empty() && self.batches.len() < BATCHES {
            self.free.push(self.batches.len());
            self.batches.push(Batch::new());
        }
        self.wait_for_free(1, progress, control)?;
        self.current = self.free.pop().unwrap_or(index);
        Ok(())
    }

    fn wait_for_free(
        &mut self,
        count: usize,
        progress: &mut Progress,
        control: &Control<'_>,
    ) -> Result<(), Error> {
        while self.free.len() < count {
            control.check()?;
            self.step(PATIENCE, progress)?;
        }
        Ok(())
    }

    fn submit(&mut self, index: usize, requests: Vec<Request>, writing: bool) {
        let batch = &mut self.batches[index];
        (batch.pending, batch.writing) = (requests.len(), writing);
        for request in requests {
            self.store.submit(index as u64, request);
        }
    }

    /// Takes note of what has ended: batches that were read are compared and written, those that were written are free.
    fn step(&mut self, patience: std::time::Duration, progress: &mut Progress) -> Result<(), Error> {
        let mut done = std::mem::take(&mut self.done);
        self.store.completed(patience, &mut done)?;
        for Completion { token, result } in done.drain(..) {
            let index = token as usize;
            let batch = &mut self.batches[index];
            let place = batch.runs.first().map_or(0, |run| run.offset);
            result.map_err(|error| Error::store(place, "a batch of pages from there on", error))?;
            batch.pending -= 1;
            if batch.pending > 0 {
                continue;
            }
            let writes = if batch.writing { Vec::new() } else { batch.writes(progress) };
            if writes.is_empty() {
                (batch.used, batch.repeats) = (0, false);
                batch.runs.clear();
                self.free.push(index);
            } else {
                self.submit(index, writes, true);
            }
        }
        self.done = done;
        Ok(())
    }
}
