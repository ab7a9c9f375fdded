//! One opening of a store: finding its segments, recovering its logs, and taking it over.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use cdp_types::{BranchId, Generation, Ordinal, Seq, VolumeId};

use super::open::{SUPERBLOCK, Seams, read_superblock, write_slot};
use super::replay::{Log, OpeningProgress, Replay, Told, settle};
use super::{Inner, Store};
use crate::catalogue::{BranchRow, BranchState, Catalogue, Change, Ledger, STORE_LOG, Stage, VolumeRow};
use crate::clock::StoreClock;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BatchPlace, RecordKind, Superblock};
use crate::index::{IndexErrorKind, LogPos, TimeIndex, Watermark, WriteBatch};
use crate::leaves::LeafBudget;
use crate::lineage::{Branches, Flattening};
use crate::loaders::Loaders;
use crate::log::{Fence, LogContext, LogEnd, LogState, live_chain, recover};
use crate::options::StoreOptions;
use crate::reach::{self, ReachTable, Reached};
use crate::segments::{self, Segment, Segments};
use crate::shared::{Bell, Shared};
use crate::storage::Storage;
use crate::volume::{Recovered, Volume, first_origin};

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
    /// Slots that have been written to, and have no valid header.
    doubtful: Vec<u64>,
    newest_time_ns: u64,
    /// The highest `Seq` in any log.
    newest_seq: Seq,
    leaf_budget: Arc<LeafBudget>,
    /// Where the last process left its logs, if it was killed and the machine was not.
    reached: Reached,
    told: Told,
}

impl Opening {
    /// 1. Find the segments, and claim a new generation in a superblock slot, but not in the newest valid one, and sync
    ///    it: one that is newer than any segment's too, in case a dead process's claim landed over a newer one. Crash:
    ///    the claim is lost or it holds; no `Seq`, origin or incarnation of this opening was given out before.
    /// 2. Remove empty slots: whoever held them last may still write to them. Their space is given back later.
    pub(super) fn new(seams: Seams, options: StoreOptions, mode: Mode) -> Result<Self> {
        let storage = &*seams.storage;
        let file = storage.open(SUPERBLOCK).map_err(|e| Error::io("opening superblock", e))?;
        let (mut superblock, newest_slot) = read_superblock(storage, &*file)?;
        let segments = Arc::new(Segments::new(
            Arc::clone(&seams.storage),
            superblock.segment_bytes,
            options.pool_segments,
            options.reserve_bytes,
        ));
        let discovered = segments.discover(superblock.store)?;
        let mut reached = Reached::default();
        if mode == Mode::Write {
            if let Some(directory) = &seams.reach {
                reached = reach::take(directory, superblock.store, superblock.generation);
            }
            let written = discovered.iter().filter_map(|f| f.segment.as_ref()).map(|s| s.generation()).max();
            superblock.generation = Generation(superblock.generation.max(written.unwrap_or_default()).0 + 1);
            write_slot(storage, &*file, 1 - newest_slot, &superblock)?;
            file.sync().map_err(|e| Error::io("syncing superblock", e))?;
            if superblock.generation >= segments::GENERATION_LIMIT {
                let text = "the store has been opened 16 million times; copy its volumes into a new one";
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            segments.start_generation(superblock.generation);
        }
        let mut found: BTreeMap<VolumeId, Vec<(u64, Arc<Segment>)>> = BTreeMap::new();
        let (mut empty, mut blank, mut doubtful) = (Vec::new(), Vec::new(), Vec::new());
        for slot in discovered {
            match slot.segment {
                Some(segment) => found.entry(segment.header.volume).or_default().push((slot.slot, segment)),
                None if mode == Mode::Read => {}
                None if slot.is_doubtful => doubtful.push(slot.slot),
                None => {
                    empty.push(slot.slot);
                    blank.extend(slot.blank);
                }
            }
        }
        discard(&segments, storage, &empty)?;
        segments.retire(blank);
        for list in found.values_mut() {
            list.sort_by_key(|(_, s)| s.header.incarnation);
        }
        let leaf_budget = LeafBudget::new(options.map_budget_bytes);
        Ok(Self {
            seams,
            options,
            mode,
            superblock,
            segments,
            found,
            doubtful,
            newest_time_ns: 0,
            newest_seq: Seq::ZERO,
            leaf_budget,
            reached,
            told: Told::default(),
        })
    }

    /// The same, which tells how far it has come.
    pub(super) fn told_by(mut self, progress: OpeningProgress) -> Self {
        let segments = self.found.values().flatten().filter(|(_, s)| s.header.volume != STORE_LOG);
        // A length that cannot be had now is an error when the segment is read.
        let total_bytes = segments.map(|(_, s)| s.file.len().unwrap_or(0)).sum();
        self.told = Told::new(progress, total_bytes);
        self
    }

    /// 3. Recover the store log, and from it the catalogue.
    /// 4. Recover every volume. What is acknowledged in a log's tail is synced before anything new can be.
    /// 5. Remove slots that were written to and have no valid header: no log lacks them, so they were never part of one.
    /// 6. Record the generation in the store log, behind a cut of its tail, and where every volume's log ends: from here
    ///    on nothing that an earlier process has written can join them any more.
    /// 7. Finish what was being given back.
    pub(super) fn run(mut self) -> Result<Store> {
        let (catalogue, end, rows) = self.recover_catalogue()?;
        let index = TimeIndex::new(Arc::clone(&self.seams.index));
        let logs = self.logs(&catalogue);
        let replay = Replay::new(&index, &self.leaf_budget, self.mode, std::mem::take(&mut self.told));
        let recovered: Vec<(VolumeRow, Recovered)> =
            logs.iter().map(|log| log.row.clone()).zip(replay.all(&logs)?).collect();
        let generation = self.superblock.generation;
        let mut fences = Vec::new();
        for (log, (row, volume)) in logs.iter().zip(&recovered) {
            self.newest_time_ns = self.newest_time_ns.max(volume.end.time_ns);
            self.newest_seq = self.newest_seq.max(volume.end.seq);
            let fence = match volume.claimed {
                None => Fence { last: volume.end.ordinal, generation },
                // A damaged log goes on behind what could be read of it. How far, perhaps only the index knew.
                Some(claimed) => Fence { last: claimed.max(log.fence.last), ..log.fence },
            };
            fences.push((row.id, fence));
        }
        self.sort_out_doubtful(recovered.iter().any(|(_, volume)| volume.whole_upto.is_some()))?;
        self.sort_out_leftovers(&catalogue)?;
        let shared = self.share(index, &catalogue)?;
        let state = LogState::new(STORE_LOG, cdp_types::BranchId(0), &end, None);
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
            reclaiming: Mutex::default(),
            index_health: Mutex::default(),
            pass: Mutex::default(),
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

    /// What every volume is recovered from.
    fn logs(&mut self, catalogue: &Catalogue) -> Vec<Log> {
        let mut branches: BTreeMap<VolumeId, BTreeMap<BranchId, BranchRow>> = BTreeMap::new();
        for branch in catalogue.branches.values() {
            branches.entry(branch.volume).or_default().insert(branch.id, *branch);
        }
        let rows = catalogue.volumes.values();
        rows.map(|row| {
            let fence = catalogue.fences.get(&row.id).copied().unwrap_or_default();
            let chain = self.chain_of(row.id, fence);
            let reached = self.reached.get(&row.id).copied();
            let branches = branches.remove(&row.id).unwrap_or_default();
            Log { row: row.clone(), branches, chain, fence, reached }
        })
        .collect()
    }

    /// While a log is damaged, a file without a valid header may be what it lacks.
    fn sort_out_doubtful(&self, is_damaged: bool) -> Result<()> {
        if !is_damaged {
            return discard(&self.segments, &*self.seams.storage, &self.doubtful);
        }
        for name in self.doubtful.iter().map(|slot| segments::slot_name(*slot)) {
            tracing::error!(
                "{name} has no valid header, and may belong to a log that is damaged; it is kept"
            );
        }
        Ok(())
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
            let flattening = match index.flattening(row.id) {
                // It only makes reads shorter, and is written again where they are long.
                Err(error) if error.kind() == IndexErrorKind::Corrupt => {
                    tracing::warn!("{error}; reads of branch {} go without", row.id);
                    None
                }
                found => found.map_err(|e| {
                    Error::new(ErrorKind::Io, format!("reading the time index of branch {}", row.id)).with(e)
                })?,
            };
            if let Some(numbers) = flattening {
                branches.flatten(row.id, Flattening::from_numbers(numbers));
            }
        }
        // An opening that has used up its own has gone on with the next one's.
        let first_seq = Seq::first_of(generation).max(self.newest_seq.plus(1));
        let clock = Arc::clone(&self.seams.clock);
        let tuning = self.options.tuning(self.superblock.segment_bytes);
        let reach = self.seams.reach.as_deref().filter(|_| self.mode == Mode::Write).and_then(|directory| {
            ReachTable::create(directory, self.superblock.store, generation)
                .inspect_err(|e| {
                    tracing::info!("{}: {e}; a restart after a kill takes longer", directory.display())
                })
                .ok()
        });
        Ok(Arc::new(Shared {
            log: LogContext {
                store: self.superblock.store,
                generation,
                segments: Arc::clone(&self.segments),
                clock: StoreClock::new(Arc::clone(&clock), self.newest_time_ns),
                next_seq: AtomicU64::new(first_seq.0),
                secrets: self.seams.secrets,
                batch_bytes: tuning.batch_bytes as u64,
            },
            storage: Arc::clone(&self.seams.storage),
            index,
            clock,
            leaf_budget: Arc::clone(&self.leaf_budget),
            loaders: Loaders::default(),
            landings: Arc::default(),
            tuning,
            branches,
            next_origin: AtomicU64::new(first_origin(generation)),
            pool_bell: Bell::default(),
            index_bell: Bell::default(),
            index_rests: AtomicBool::new(false),
            reach,
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
        // Rows only ever say what was durable, so what they speak of and the log lacks was not torn off.
        let mut known_durable = Ordinal(0);
        if let Some((catalogue, position)) = loaded {
            known_durable = position.ordinal;
            let place = BatchPlace { incarnation: position.incarnation, offset: position.offset };
            let watermark = LogPos::new(place.incarnation, place.offset).map(|pos| Watermark {
                ordinal: position.ordinal,
                seq: position.seq,
                pos,
                header_crc: position.crc,
                time_ns: position.time_ns,
            });
            match self.replay_store_log(&chain, catalogue, watermark.as_ref(), known_durable) {
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!("{error}; the catalogue is rebuilt from the store log");
                }
                other => return other,
            }
        }
        let replayed = self.replay_store_log(&chain, Catalogue::default(), None, known_durable)?;
        // Not before: the next opening must find out as well that the log is damaged.
        if self.mode == Mode::Write {
            self.seams
                .catalogue
                .clear()
                .map_err(|e| Error::new(ErrorKind::Io, "clearing the catalogue").with(e))?;
        }
        Ok(replayed)
    }

    fn replay_store_log(
        &mut self,
        chain: &[Arc<Segment>],
        mut catalogue: Catalogue,
        from: Option<&Watermark>,
        known_durable: Ordinal,
    ) -> Result<(Catalogue, LogEnd, WriteBatch)> {
        let mut rows = WriteBatch::new();
        let recovery = recover(chain, Fence::default(), from, known_durable, None, &mut |batch, _| {
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
            let verb = if damage.kind == ErrorKind::Io { "cannot be read" } else { "is damaged" };
            return Err(Error::new(damage.kind, format!("the store log {verb}: {}", damage.text)));
        }
        self.newest_time_ns = self.newest_time_ns.max(recovery.end.time_ns);
        self.newest_seq = self.newest_seq.max(recovery.end.seq);
        settle(chain, &recovery, self.mode)?;
        Ok((catalogue, recovery.end, rows))
    }
}

/// Removes slots for good.
fn discard(segments: &Segments, storage: &dyn Storage, slots: &[u64]) -> Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    slots.iter().try_for_each(|slot| segments.discard_slot(*slot))?;
    // A name that a power cut brought back could bring back what a dead process wrote under it.
    let synced = storage.sync_directory(segments::DIRECTORY);
    synced.map_err(|e| Error::io(format!("syncing {}/", segments::DIRECTORY), e))
}
