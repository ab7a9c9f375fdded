//! One opening of a store: finding its segments, recovering its logs, and taking it over.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use cdp_types::{BranchId, Generation, Ordinal, Origin, Seq, VolumeId};

use super::inspect::VerifyProgress;
use super::open::{SUPERBLOCK, Seams, read_superblock, write_slot};
use super::{Inner, Store};
use crate::catalogue::{BranchRow, BranchState, Catalogue, Change, Ledger, STORE_LOG, Stage, VolumeRow};
use crate::clock::StoreClock;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BatchPlace, RecordKind, Superblock};
use crate::index::{IndexBatch, LogPos, TimeIndex, Watermark, WriteBatch};
use crate::leaves::LeafBudget;
use crate::lineage::{Branches, Flattening, flattened};
use crate::log::{BatchAt, Fence, LogContext, LogEnd, LogState, Recovery, live_chain, recover};
use crate::map::HeadMap;
use crate::options::StoreOptions;
use crate::segments::{self, Segment, Segments};
use crate::shared::{Bell, Shared};
use crate::volume::{Recovered, Volume, first_origin};

/// How much of the logs is read between two words of how far an opening has come.
const TELL_EVERY_BYTES: u64 = 16 << 20;
/// Fences in one record of the store log.
const FENCES_PER_RECORD: usize = 4096;

/// Whether an opening may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// It takes the store over.
    Write,
    /// It only looks.
    Read,
}

/// One opening, step by step.
pub(super) struct Opening {
    seams: Seams,
    options: StoreOptions,
    mode: Mode,
    superblock: Superblock,
    segments: Arc<Segments>,
    /// By volume, oldest first; not yet sorted out which of them live.
    found: BTreeMap<VolumeId, Vec<(u64, Arc<Segment>)>>,
    newest_seq: Seq,
    newest_time_ns: u64,
    leaf_budget: Arc<LeafBudget>,
    progress: OpeningProgress,
    /// Bytes of volumes' logs read so far, and in all, as an upper bound.
    read_bytes: u64,
    total_bytes: u64,
}

/// Told how much of the logs an opening has read.
pub type OpeningProgress = Box<dyn FnMut(VerifyProgress)>;

impl Opening {
    /// 1. Find the segments, and claim a new generation in the older superblock slot, and sync it: one that is newer
    ///    than any segment's too, in case a dead process's claim landed over a newer one. Crash: the claim is lost or
    ///    it holds; no `Seq`, origin or incarnation of this opening was given out before.
    /// 2. Remove blank slots: whoever held them last may still write to them.
    pub(super) fn new(seams: Seams, options: StoreOptions, mode: Mode) -> Result<Self> {
        let storage = &*seams.storage;
        let file = storage.open(SUPERBLOCK).map_err(|e| Error::io("opening superblock", e))?;
        let mut superblock = read_superblock(storage, &*file)?;
        let segments = Arc::new(Segments::new(
            Arc::clone(&seams.storage),
            superblock.segment_bytes,
            options.pool_segments,
            options.reserve_bytes,
        ));
        let discovered = segments.discover(superblock.store)?;
        if mode == Mode::Write {
            let written =
                discovered.iter().filter_map(|f| f.segment.as_ref()).map(|s| s.header.generation).max();
            superblock.generation = Generation(superblock.generation.max(written.unwrap_or_default()).0 + 1);
            write_slot(storage, &*file, superblock.generation.0 % 2, &superblock)?;
            file.sync().map_err(|e| Error::io("syncing superblock", e))?;
            if superblock.generation >= segments::GENERATION_LIMIT {
                let text = "the store has been opened 16 million times; copy its volumes into a new one";
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            segments.start_generation(superblock.generation);
        }
        let mut found: BTreeMap<VolumeId, Vec<(u64, Arc<Segment>)>> = BTreeMap::new();
        let mut discarded = false;
        for slot in discovered {
            match slot.segment {
                Some(segment) => found.entry(segment.header.volume).or_default().push((slot.slot, segment)),
                None if mode == Mode::Write => {
                    segments.discard_slot(slot.slot)?;
                    discarded = true;
                }
                None => {}
            }
        }
        if discarded {
            // A name that a power cut brought back could bring back what a dead process wrote under it.
            let synced = storage.sync_directory(segments::DIRECTORY);
            synced.map_err(|e| Error::io(format!("syncing {}/", segments::DIRECTORY), e))?;
        }
        for list in found.values_mut() {
            list.sort_by_key(|(_, s)| s.header.incarnation);
        }
        let (newest_seq, newest_time_ns) = (Seq::ZERO, 0);
        let leaf_budget = LeafBudget::new(options.map_budget_bytes);
        Ok(Self {
            seams,
            options,
            mode,
            superblock,
            segments,
            found,
            newest_seq,
            newest_time_ns,
            leaf_budget,
            progress: Box::new(|_| ()),
            read_bytes: 0,
            total_bytes: 0,
        })
    }

    /// The same, which tells how far it has come.
    pub(super) fn told_by(mut self, progress: OpeningProgress) -> Self {
        let segments = self.found.values().flatten().filter(|(_, s)| s.header.volume != STORE_LOG);
        // A length that cannot be had now is an error when the segment is read.
        self.total_bytes = segments.map(|(_, s)| s.file.len().unwrap_or(0)).sum();
        self.progress = progress;
        self
    }

    /// 3. Recover the store log, and from it the catalogue.
    /// 4. Recover every volume. What is acknowledged in a log's tail is synced before anything new can be.
    /// 5. Record the generation in the store log, behind a cut of its tail, and where every volume's log ends: from here
    ///    on nothing that an earlier process has written can join them any more.
    /// 6. Finish what was being given back.
    pub(super) fn run(mut self) -> Result<Store> {
        let (catalogue, end, rows) = self.recover_catalogue()?;
        let index = TimeIndex::new(Arc::clone(&self.seams.index));
        let mut recovered = Vec::new();
        let mut fences = Vec::new();
        for row in catalogue.volumes.values() {
            let fence = catalogue.fences.get(&row.id).copied().unwrap_or_default();
            let volume = self.recover_volume(&index, &catalogue, row, fence)?;
            // A damaged log goes on behind what could be read of it.
            if !volume.damaged {
                fences.push((
                    row.id,
                    Fence { last: volume.end.ordinal, generation: self.superblock.generation },
                ));
            }
            recovered.push((row.clone(), volume));
        }
        self.sort_out_leftovers(&catalogue)?;
        let shared = self.share(index, &catalogue)?;
        let state = LogState::new(STORE_LOG, cdp_types::BranchId(0), &end);
        let mut ledger = Ledger::new(state, catalogue, Arc::clone(&self.seams.catalogue));
        if self.mode == Mode::Write {
            ledger.write_rows(rows);
            let change = Change::Generation { generation: self.superblock.generation };
            ledger.commit(&shared.log, &[change])?;
            for fences in fences.chunks(FENCES_PER_RECORD) {
                ledger.commit(&shared.log, &[Change::Fence { fences: fences.to_vec() }])?;
            }
        }
        let volumes: BTreeMap<VolumeId, Arc<Volume>> = recovered
            .into_iter()
            .map(|(row, r)| (row.id, Volume::new(Arc::clone(&shared), row, r)))
            .collect();
        for volume in volumes.values() {
            shared.branches.own(volume);
            if volume.row().stage == Stage::Destroyed {
                volume.log().retire("the volume was destroyed");
            }
        }
        let inner = Inner {
            ledger: Mutex::new(ledger),
            volumes: RwLock::new(volumes),
            superblock: self.superblock,
            options: self.options,
            background: Mutex::default(),
            index_health: Mutex::default(),
            syncs_seen: AtomicU64::new(0),
            writable: self.mode == Mode::Write,
            shared,
        };
        let store = Store { inner: Arc::new(inner) };
        if self.mode == Mode::Write {
            store.reclaim()?;
        }
        Ok(store)
    }

    /// Segments of volumes that are no longer there: those of a destroyed volume are adopted, so that they can be given
    /// back; those that were given back already, and whose removal a power cut has undone, are removed again. What the
    /// store log has never heard of is left alone: then it is the store log that is not whole.
    fn sort_out_leftovers(&mut self, catalogue: &Catalogue) -> Result<()> {
        for (volume, list) in std::mem::take(&mut self.found) {
            for (slot, segment) in list {
                if catalogue.retiring.contains_key(&volume) {
                    self.segments.adopt(slot, segment);
                } else if volume < catalogue.next_volume() {
                    if self.mode == Mode::Write {
                        self.segments.discard_slot(slot)?;
                    }
                } else {
                    let name = segment.file.name();
                    tracing::error!(
                        "{name} belongs to volume {volume}, which the store log does not know; it is kept"
                    );
                }
            }
        }
        Ok(())
    }

    fn share(&self, index: TimeIndex, catalogue: &Catalogue) -> Result<Arc<Shared>> {
        let generation = self.superblock.generation;
        let branches = Branches::default();
        for row in catalogue.branches.values().filter(|row| row.state != BranchState::Gone) {
            branches.insert(*row);
            let flattening = index.flattening(row.id).map_err(|e| {
                Error::new(ErrorKind::Io, format!("reading the time index of branch {}", row.id)).with(e)
            })?;
            if let Some(numbers) = flattening {
                branches.flatten(row.id, Flattening::from_numbers(numbers));
            }
        }
        let clock = Arc::clone(&self.seams.clock);
        let tuning = self.options.tuning(self.superblock.segment_bytes);
        Ok(Arc::new(Shared {
            log: LogContext {
                store: self.superblock.store,
                generation,
                segments: Arc::clone(&self.segments),
                clock: StoreClock::new(Arc::clone(&clock), self.newest_time_ns),
                next_seq: AtomicU64::new(Seq::first_of(generation).0),
                secrets: self.seams.secrets,
                batch_bytes: tuning.batch_bytes as u64,
            },
            storage: Arc::clone(&self.seams.storage),
            index,
            clock,
            leaf_budget: Arc::clone(&self.leaf_budget),
            tuning,
            branches,
            next_origin: AtomicU64::new(first_origin(generation)),
            pool_bell: Bell::default(),
            index_bell: Bell::default(),
            index_rests: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        }))
    }

    /// Takes a volume's live segments into use. Those that a cut has superseded are left where they are until the
    /// chain that supersedes them has been walked.
    fn chain_of(&mut self, volume: VolumeId, fence: Fence) -> Vec<Arc<Segment>> {
        let list = self.found.remove(&volume).unwrap_or_default();
        let counts = |s: &&Arc<Segment>| !fence.excludes(s.header.first_ordinal, s.header.generation);
        let chain = live_chain(list.iter().map(|(_, s)| s).filter(counts).cloned());
        for (slot, segment) in list {
            self.segments.adopt(slot, segment);
        }
        chain
    }

    fn recover_catalogue(&mut self) -> Result<(Catalogue, LogEnd, WriteBatch)> {
        // The store log needs no fence: each opening appends to it before anyone sees the store.
        let chain = self.chain_of(STORE_LOG, Fence::default());
        let loaded = Catalogue::load(&*self.seams.catalogue)?;
        if let Some((catalogue, position)) = loaded {
            let place = BatchPlace { incarnation: position.incarnation, offset: position.offset };
            let watermark = LogPos::new(place.incarnation, place.offset).map(|pos| Watermark {
                ordinal: position.ordinal,
                seq: position.seq,
                pos,
                header_crc: position.crc,
                time_ns: position.time_ns,
            });
            match self.replay_store_log(&chain, catalogue, watermark.as_ref()) {
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!("{error}; the catalogue is rebuilt from the store log");
                }
                other => return other,
            }
        }
        if self.mode == Mode::Write {
            self.seams
                .catalogue
                .clear()
                .map_err(|e| Error::new(ErrorKind::Io, "clearing the catalogue").with(e))?;
        }
        self.replay_store_log(&chain, Catalogue::default(), None)
    }

    fn replay_store_log(
        &mut self,
        chain: &[Arc<Segment>],
        mut catalogue: Catalogue,
        from: Option<&Watermark>,
    ) -> Result<(Catalogue, LogEnd, WriteBatch)> {
        let mut rows = WriteBatch::new();
        let recovery = recover(chain, Fence::default(), from, Ordinal(0), &mut |batch, _| {
            if batch.header.records.first().is_some_and(|r| r.kind == RecordKind::Store) {
                let place = batch.header.place.offset;
                let at = || format!("{}, byte {place}: a store record", batch.segment.file.name());
                let changes: Vec<Change> = serde_json::from_slice(&batch.header.body)
                    .map_err(|e| Error::new(ErrorKind::Newer, at()).with(e))?;
                for change in &changes {
                    catalogue.apply(change, &mut rows)?;
                }
            }
            Ok(())
        })?;
        if let Some(damage) = recovery.damage {
            return Err(Error::new(ErrorKind::Corrupt, format!("the store log is damaged: {damage}")));
        }
        self.settle(chain, &recovery)?;
        Ok((catalogue, recovery.end, rows))
    }

    /// Makes a log's recovered tail durable: the dead process may have acknowledged it, and a flush after this opening
    /// must cover it.
    fn settle(&mut self, chain: &[Arc<Segment>], recovery: &Recovery) -> Result<()> {
        self.newest_seq = self.newest_seq.max(recovery.end.seq);
        self.newest_time_ns = self.newest_time_ns.max(recovery.end.time_ns);
        if self.mode == Mode::Read || recovery.end.ordinal <= recovery.durable {
            return Ok(());
        }
        let from = chain.partition_point(|s| s.header.first_ordinal <= recovery.durable).saturating_sub(1);
        for segment in &chain[from..] {
            segment.file.sync().map_err(|e| Error::io(format!("syncing {}", segment.file.name()), e))?;
        }
        Ok(())
    }

    fn recover_volume(
        &mut self,
        index: &TimeIndex,
        catalogue: &Catalogue,
        row: &VolumeRow,
        fence: Fence,
    ) -> Result<Recovered> {
        let branches: BTreeMap<BranchId, BranchRow> =
            catalogue.branches.values().filter(|b| b.volume == row.id).map(|b| (b.id, *b)).collect();
        let chain = self.chain_of(row.id, fence);
        let failed =
            |e| Error::new(ErrorKind::Io, format!("reading the time index of volume '{}'", row.name)).with(e);
        let watermark = index.watermark(row.id).map_err(failed)?;
        let source = Source { row, branches: &branches, chain: &chain, fence };
        match self.replay_volume(index, &source, watermark.as_ref(), Ordinal(0)) {
            Err(error) if error.kind() == ErrorKind::Corrupt && watermark.is_some() => {
                tracing::warn!(volume = %row.name, "{error}; its index is rebuilt from the log");
                // The index only ever says what was durable, so what it speaks of and the log lacks was not torn off.
                let known = watermark.map_or(Ordinal(0), |w| w.ordinal);
                if self.mode == Mode::Write {
                    self.forget_index(index, &source)?;
                    self.replay_volume(index, &source, None, known)
                } else {
                    Err(error)
                }
            }
            other => other,
        }
    }

    fn forget_index(&self, index: &TimeIndex, source: &Source<'_>) -> Result<()> {
        let failed = |e| Error::new(ErrorKind::Io, "clearing part of the time index").with(e);
        let mut batch = IndexBatch::new();
        batch.forget_watermark(source.row.id);
        index.write(&batch).map_err(failed)?;
        for branch in source.branches.keys() {
            index.drop_branch(flattened(*branch)).map_err(failed)?;
            index.drop_branch(*branch).map_err(failed)?;
        }
        Ok(())
    }

    fn replay_volume(
        &mut self,
        index: &TimeIndex,
        source: &Source<'_>,
        watermark: Option<&Watermark>,
        known_durable: Ordinal,
    ) -> Result<Recovered> {
        let Source { row, branches, chain, fence } = *source;
        let indexed = watermark.map_or(Seq::ZERO, |w| w.seq);
        let (start, created_ns) =
            branches.get(&row.branch).map_or((Seq::ZERO, 0), |b| (b.start, b.created_ns));
        let mut map = HeadMap::new(indexed, row.branch, &self.leaf_budget);
        let mut survived: Vec<Origin> = Vec::new();
        if let Some(batch) = watermark.map(|w| first_batch(chain, w)).transpose()?.flatten() {
            collect_origins(&batch, &mut survived);
        }
        let writable = self.mode == Mode::Write;
        let (progress, total_bytes) = (&mut self.progress, self.total_bytes);
        let (mut read_bytes, mut told) = (self.read_bytes, self.read_bytes);
        let recovery = recover(chain, fence, watermark, known_durable, &mut |batch, durable| {
            read_bytes += batch.end() - batch.header.place.offset;
            if read_bytes - told >= TELL_EVERY_BYTES {
                told = read_bytes;
                progress(VerifyProgress { done_bytes: read_bytes.min(total_bytes), total_bytes });
            }
            collect_origins(&batch, &mut survived);
            if branches.get(&batch.header.branch).is_some_and(|b| b.state != BranchState::Gone) {
                map.apply(&batch.header, batch.crc, batch.payload_at);
            } else {
                map.pass(&batch.header, batch.crc);
            }
            // A long replay, after the index was lost, is written to it on the way: memory stays bounded.
            while let Some(chunk) = map.oldest_closed().filter(|_| durable && writable) {
                crate::volume::write_chunk(index, row.id, &chunk)?;
                map.drop_oldest();
            }
            Ok(())
        })?;
        self.read_bytes = read_bytes;
        survived.sort_unstable();
        survived.dedup();
        self.settle(chain, &recovery)?;
        if let Some(damage) = &recovery.damage {
            tracing::error!(volume = %row.name, "{damage}; the volume is read-only");
        }
        let damaged = recovery.damage.is_some();
        let read_only = match (self.mode, recovery.damage) {
            (_, Some(damage)) => Some(damage),
            (Mode::Read, None) => Some("the store was opened for inspection".to_owned()),
            (Mode::Write, None) => None,
        };
        map.switch(row.branch, start);
        let end = recovery.end.on_branch(start, created_ns);
        Ok(Recovered { end, map, survived, read_only, damaged })
    }
}

/// What a volume is recovered from.
#[derive(Clone, Copy, Debug)]
struct Source<'a> {
    row: &'a VolumeRow,
    branches: &'a BTreeMap<BranchId, BranchRow>,
    chain: &'a [Arc<Segment>],
    fence: Fence,
}

fn first_batch(chain: &[Arc<Segment>], watermark: &Watermark) -> Result<Option<BatchAt>> {
    let place = BatchPlace { incarnation: watermark.pos.incarnation(), offset: watermark.pos.offset_bytes() };
    match crate::log::ChainReader::starting_at(chain, place) {
        Some(mut reader) => reader.next(),
        None => Ok(None),
    }
}

fn collect_origins(batch: &BatchAt, into: &mut Vec<Origin>) {
    into.extend(batch.header.records.iter().map(|r| r.origin).filter(|o| o.0 != 0));
}
