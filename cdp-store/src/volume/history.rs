//! A volume's past: finding instants, opening them, and telling what is in the log and in the map.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;

use cdp_types::{BlockDevice, DeviceIdentity, DeviceInfo, DeviceQueue, Listener, Ordinal, Origin, Seq};

use super::{Head, MarkInfo, RecordInfo, Resolved, Volume, VolumeInfo, VolumeState, VolumeStats};
use crate::catalogue::MarkRow;
use crate::error::{Error, ErrorKind, Result};
use crate::format::RecordKind;
use crate::lineage::At;
use crate::log::{BatchAt, ChainReader};
use crate::queue::{Past, PastQueue};

impl Volume {
    /// Everything there is to tell of it; `marks` are the store's.
    pub(crate) fn describe(&self, marks: Vec<MarkRow>) -> VolumeInfo {
        use std::sync::atomic::Ordering::Relaxed;
        let row = self.row();
        let counters = self.counters();
        let (cached_leaves, pending_changes) = {
            let map = self.map();
            (map.cached_leaves() as u64, map.pending_changes() as u64)
        };
        let mut marks: Vec<MarkInfo> = marks.into_iter().map(MarkInfo::from).collect();
        marks.sort_by_key(|m| m.seq);
        VolumeInfo {
            id: row.id,
            name: row.name,
            size_bytes: row.size_bytes,
            logical_block_size: row.logical_block_size,
            branch: row.branch,
            head: self.head(),
            created_ns: row.created_ns,
            serving: row.serving,
            marks,
            state: match self.refusal() {
                None => VolumeState::Healthy,
                Some((_, reason)) => VolumeState::ReadOnly { reason },
            },
            stats: VolumeStats {
                reads: counters.reads.load(Relaxed),
                read_bytes: counters.read_bytes.load(Relaxed),
                writes: counters.writes.load(Relaxed),
                written_bytes: counters.written_bytes.load(Relaxed),
                clears: counters.clears.load(Relaxed),
                flushes: counters.flushes.load(Relaxed),
                syncs: counters.syncs.load(Relaxed),
                batches: counters.batches.load(Relaxed),
                errors: counters.errors.load(Relaxed),
                leaf_loads: counters.leaf_loads.load(Relaxed),
                cached_leaves,
                pending_changes,
            },
        }
    }

    /// Its acknowledged present.
    #[must_use]
    pub fn head(&self) -> Head {
        let log = self.log();
        let (seq, time_ns) = log.head();
        Head { seq, ordinal: log.acked(), time_ns, durable_ordinal: log.durable() }
    }

    /// The flush that is `back` before the newest: from memory if it is recent, else from the log.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there are not so many.
    pub(crate) fn find_flush(&self, back: u64) -> Result<Seq> {
        let remembered = self.map().flush_back(back);
        if let Some(seq) = remembered {
            return Ok(seq);
        }
        let keep = usize::try_from(back).unwrap_or(usize::MAX);
        let mut last: VecDeque<Seq> = VecDeque::new();
        self.each_batch(Ordinal(0), &mut |batch| {
            for record in batch.header.records.iter().filter(|r| r.kind == RecordKind::Flush) {
                let seq = Seq(record.aux);
                if last.back().is_none_or(|l| *l < seq) {
                    if last.len() == keep {
                        last.pop_front();
                    }
                    last.push_back(seq);
                }
            }
            true
        })?;
        let newest = self.map().flush_back(1).filter(|seq| last.back().is_none_or(|l| l < seq));
        last.extend(newest);
        if last.len() > keep {
            last.pop_front();
        }
        last.front().filter(|_| last.len() == keep && keep > 0).copied().ok_or_else(|| {
            let text = match last.len() {
                0 => "the history has no flushes".to_owned(),
                there => format!("the history has {there} flushes, not {back}; the oldest is flush:-{there}"),
            };
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// In how many places a read of the head may have to look for a block's state: the branch itself, and what it
    /// inherits from. Bounded, however often the volume was reverted.
    #[must_use]
    pub fn read_depth(&self) -> usize {
        self.shared().lineage().depth(At { branch: self.row().branch, seq: Seq::MAX })
    }

    /// Opens a found instant for reading. It never changes, whatever is written meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if its branch was deleted since.
    pub fn open_resolved(self: &Arc<Self>, at: Resolved) -> Result<Arc<dyn BlockDevice>> {
        let branch =
            self.shared().branches.get(at.branch).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("branch {} was deleted", at.branch))
            })?;
        Ok(Arc::new(PastDevice(Past::new(Arc::clone(self), branch, at.seq))))
    }

    /// Calls `visit` with the acknowledged batches of its log from the one of ordinal `from` on, until it says no.
    pub(crate) fn each_batch(&self, from: Ordinal, visit: &mut dyn FnMut(&BatchAt) -> bool) -> Result<()> {
        let until = self.log().acked();
        let chain = self.chain();
        let mut reader = ChainReader::near(&chain, from);
        let mut last = Ordinal(0);
        while last < until {
            let Some(batch) = reader.next()? else {
                let (file, offset) = reader.position().map_or(("the log", 0), |(s, at)| (s.file.name(), at));
                let text = format!(
                    "{file}, byte {offset}: batch {} is damaged; the log goes on to {until}",
                    last.next()
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            };
            last = batch.header.ordinal;
            if last >= from && !visit(&batch) {
                break;
            }
        }
        Ok(())
    }

    /// Calls `visit` with the records of its log whose `Seq` is in `from..=to`, oldest first, until it says no.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn records(&self, from: Seq, to: Seq, visit: &mut dyn FnMut(RecordInfo) -> bool) -> Result<()> {
        self.each_batch(self.batch_before(from)?, &mut |batch| {
            let header = &batch.header;
            let mut seq = header.first_seq;
            for record in &header.records {
                if seq > to {
                    return false;
                }
                let info = RecordInfo {
                    time_ns: header.time_ns,
                    wall_ns: header.wall_ns,
                    seq,
                    ordinal: header.ordinal,
                    kind: format!("{:?}", record.kind).to_lowercase(),
                    partial: record.flags.0 & crate::format::RecordFlags::PARTIAL != 0,
                    first_block: record.first,
                    block_count: record.count,
                    origin: record.origin,
                    generation: header.generation,
                    term: header.term,
                    segment: header.place.incarnation,
                    offset: header.place.offset,
                    // One that cannot be is a finding of verify.
                    epoch: header.epoch().ok().flatten().filter(|_| record.kind == RecordKind::Epoch),
                };
                if seq >= from && !visit(info) {
                    return false;
                }
                if !record.flags.more() {
                    seq = seq.plus(1);
                }
            }
            true
        })
    }

    /// A batch of its log at or before the first that holds `seq` or anything later.
    fn batch_before(&self, seq: Seq) -> Result<Ordinal> {
        let before = seq.before();
        let mut newest = Ordinal(0);
        for branch in self.shared().branches.of_volume(self.id()) {
            if branch.row.start <= before {
                let at = At { branch: branch.row.id, seq: before };
                newest = newest.max(self.shared().lineage().time_of(at)?.map_or(Ordinal(0), |t| t.ordinal));
            }
        }
        Ok(newest)
    }
}

/// A past instant of a volume, read-only.
struct PastDevice(Arc<Past>);

impl fmt::Debug for PastDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PastDevice({:?} at seq {})", self.0.volume(), self.0.at().seq)
    }
}

impl BlockDevice for PastDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo { read_only: true, ..self.0.volume().info() }
    }

    fn identity(&self) -> DeviceIdentity {
        DeviceIdentity { branch: self.0.at().branch, ..self.0.volume().identity() }
    }

    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        Ok(Box::new(PastQueue::new(Arc::clone(&self.0))?))
    }

    fn new_origin(&self) -> Origin {
        Origin(0)
    }

    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        vec![false; origins.len()]
    }

    fn on_change(&self, _notify: Listener) {}
}
