//! Looking at a store: what it consists of, and whether it is whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cdp_types::{Generation, Ordinal, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use super::Store;
use super::epochs::FoundEpochs;
use super::open::{CATALOGUE_DIRECTORY, INDEX_DIRECTORY};
use super::replay::OpeningProgress;
use crate::catalogue::{STORE_LOG, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::format::FORMAT_VERSION;
use crate::index::RocksKv;
use crate::log::{ChainReader, live_chain};
use crate::options::StoreOptions;
use crate::segments::Segment;
use crate::storage::uring::DirectoryStorage;

/// A store as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Its id.
    pub id: String,
    /// The present opening's generation.
    pub generation: Generation,
    /// The version of its format.
    pub format_version: u16,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Capacity of a full-sized segment, in bytes.
    pub segment_bytes: u64,
    /// Segments in use.
    pub segments: u64,
    /// Zero-filled segments at hand.
    pub pool_segments: u64,
    /// Bytes of all segment files in use.
    pub log_bytes: u64,
    /// Bytes of the time index on disk.
    pub index_bytes: u64,
    /// Bytes that the file system has left.
    pub free_bytes: u64,
    /// Number of volumes.
    pub volumes: u64,
}

/// What a segment is to its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SegmentState {
    /// The newest of its log: it may still be written.
    Open,
    /// It will never be written again.
    Sealed,
    /// A cut has superseded it: nothing in it counts.
    Dead,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// Number of its file.
    pub slot: u64,
    /// This use of the file.
    pub incarnation: u64,
    /// Whose log; 0 is the store log.
    pub volume: VolumeId,
    /// The volume's name, if it is one that can be seen.
    pub volume_name: Option<VolumeName>,
    /// Ordinal of its first batch.
    pub first_ordinal: Ordinal,
    /// The opening that took it into use.
    pub generation: Generation,
    /// The volume's term then.
    pub term: u64,
    /// Bytes that it may hold.
    pub capacity_bytes: u64,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// What it is to its log.
    pub state: SegmentState,
}

/// How far a reading of logs has come: a verification, or a rebuild.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// Bytes of log that were read.
    pub done_bytes: u64,
    /// Bytes of log in all, as an upper bound.
    pub total_bytes: u64,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whose; 0 is the store log.
    pub volume: VolumeId,
    /// The file, relative to the store.
    pub file: String,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What.
    pub what: String,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Batches whose headers were checked.
    pub batches: u64,
    /// Blocks whose checksums were checked.
    pub blocks_checked: u64,
    /// Blocks of the head whose places in the index were compared with the log.
    pub blocks_compared: u64,
    /// What is wrong; empty if nothing is.
    pub findings: Vec<Finding>,
}

/// What a rebuild of the index did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildReport {
    /// Volumes whose logs were replayed.
    pub volumes: u64,
    /// Batches in them.
    pub batches: u64,
}

impl Store {
    /// What the store consists of.
    ///
    /// # Errors
    /// If a file or the index cannot be asked for its size.
    pub fn info(&self) -> Result<StoreInfo> {
        let shared = &self.inner.shared;
        let all = shared.log.segments.all();
        let mut log_bytes = 0;
        for (_, segment) in &all {
            log_bytes += length(segment)?;
        }
        let index =
            shared.index.stats().map_err(|e| Error::new(ErrorKind::Io, "asking the index").with(e))?;
        let superblock = self.inner.superblock;
        Ok(StoreInfo {
            id: uuid::Uuid::from_bytes(superblock.store).to_string(),
            generation: superblock.generation,
            format_version: FORMAT_VERSION,
            created_ns: superblock.created_ns,
            segment_bytes: superblock.segment_bytes,
            segments: all.len() as u64,
            pool_segments: shared.log.segments.ready() as u64,
            log_bytes,
            index_bytes: index.disk_bytes,
            free_bytes: shared.storage.free_bytes().map_err(|e| Error::io("asking for free space", e))?,
            volumes: self.all_volumes().iter().filter(|v| v.row().stage == Stage::Visible).count() as u64,
        })
    }

    /// All segments in use, oldest first.
    ///
    /// # Errors
    /// If a file cannot be asked for its size.
    pub fn segments(&self) -> Result<Vec<SegmentInfo>> {
        let names: BTreeMap<VolumeId, VolumeName> = self
            .all_volumes()
            .iter()
            .map(|v| v.row())
            .filter(|r| r.stage == Stage::Visible)
            .map(|r| (r.id, r.name))
            .collect();
        let all = self.inner.shared.log.segments.all();
        let mut by_volume: BTreeMap<VolumeId, Vec<Arc<Segment>>> = BTreeMap::new();
        for (_, segment) in &all {
            by_volume.entry(segment.header.volume).or_default().push(Arc::clone(segment));
        }
        let mut states: BTreeMap<u64, SegmentState> = BTreeMap::new();
        for segments in by_volume.into_values() {
            let chain = live_chain(segments);
            let sealed = chain.iter().map(|s| (s.header.incarnation, SegmentState::Sealed));
            states.extend(sealed);
            states.extend(chain.last().map(|s| (s.header.incarnation, SegmentState::Open)));
        }
        let mut infos = Vec::with_capacity(all.len());
        for (slot, segment) in &all {
            let header = &segment.header;
            let state = states.get(&header.incarnation).copied().unwrap_or(SegmentState::Dead);
            infos.push(SegmentInfo {
                slot: *slot,
                incarnation: header.incarnation,
                volume: header.volume,
                volume_name: names.get(&header.volume).cloned(),
                first_ordinal: header.first_ordinal,
                generation: header.generation,
                term: header.term,
                capacity_bytes: header.capacity,
                file_bytes: length(segment)?,
                state,
            });
        }
        Ok(infos)
    }

    /// Checks every checksum of every log up to its acknowledged end, that the index agrees with the logs at the head,
    /// and that every checkpoint has its epoch records. Reads all data once; guests go on meanwhile.
    ///
    /// # Errors
    /// If a file or the index cannot be read. What is merely wrong is a finding.
    pub fn verify(&self, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        self.verify_while(&mut |done| {
            progress(done);
            true
        })
    }

    /// As [`verify`](Self::verify), for as long as `go_on` says yes.
    ///
    /// # Errors
    /// As `verify`; [`ErrorKind::Closed`] once `go_on` has said no.
    pub fn verify_while(&self, go_on: &mut dyn FnMut(VerifyProgress) -> bool) -> Result<VerifyReport> {
        let total_bytes = self.info()?.log_bytes;
        let mut report = VerifyReport::default();
        let mut done_bytes = 0_u64;
        let mut advance = |bytes: u64| -> Result<()> {
            done_bytes += bytes;
            if go_on(VerifyProgress { done_bytes: done_bytes.min(total_bytes), total_bytes }) {
                return Ok(());
            }
            Err(Error::new(ErrorKind::Closed, "the verification was given up"))
        };
        let of_store = |(_, s): (u64, Arc<Segment>)| (s.header.volume == STORE_LOG).then_some(s);
        // The end first: a commit that is waited for here may be the first one of a new segment.
        let end = self.ledger().end();
        let store_log = live_chain(self.inner.shared.log.segments.all().into_iter().filter_map(of_store));
        let mut epochs = FoundEpochs::default();
        // As they are now: what is committed meanwhile may lie behind what is read.
        let catalogue = self.ledger().catalogue().clone();
        verify_log(STORE_LOG, &store_log, end, &mut epochs, &mut report, &mut advance)?;
        for volume in self.all_volumes() {
            if let Some((_, what)) = volume.refusal().filter(|_| volume.is_damaged()) {
                report.findings.push(Finding { volume: volume.id(), file: String::new(), offset: 0, what });
            }
            let head = volume.head();
            if verify_log(volume.id(), &volume.chain(), head.ordinal, &mut epochs, &mut report, &mut advance)?
            {
                super::compare::compare_with_log(&volume, head, &catalogue, &mut report)?;
            }
        }
        epochs.check(&catalogue, &mut report);
        go_on(VerifyProgress { done_bytes: total_bytes, total_bytes });
        Ok(report)
    }

    /// Deletes both databases of a store that is not open, and builds them again from the logs alone.
    ///
    /// # Durability
    /// The rebuilt index, once this returns. A crash meanwhile costs nothing but the next opening's time.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn rebuild_index(
        dir: &Path,
        options: StoreOptions,
        progress: OpeningProgress,
    ) -> Result<RebuildReport> {
        {
            // Held while the databases go, so that no daemon opens them meanwhile.
            let at = dir.display();
            let _lock =
                DirectoryStorage::open(dir).map_err(|e| Error::io(format!("opening the store {at}"), e))?;
            for name in [INDEX_DIRECTORY, CATALOGUE_DIRECTORY] {
                let path = dir.join(name);
                if path.exists() {
                    RocksKv::destroy(&path).map_err(|e| {
                        Error::new(ErrorKind::Io, format!("removing {}", path.display())).with(e)
                    })?;
                }
            }
        }
        let store = Self::open_with_progress(dir, options, progress)?;
        let volumes = store.all_volumes();
        let batches = volumes.iter().map(|v| v.head().ordinal.0).sum();
        let report = RebuildReport { volumes: volumes.len() as u64, batches };
        store.close()?;
        Ok(report)
    }
}

/// Checks a log's batches up to `end`; says whether they are all there.
fn verify_log(
    volume: VolumeId,
    chain: &[Arc<Segment>],
    end: Ordinal,
    epochs: &mut FoundEpochs,
    report: &mut VerifyReport,
    advance: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<bool> {
    let mut reader = ChainReader::new(chain);
    let mut last = Ordinal(0);
    while last < end {
        let Some(batch) = reader.next()? else { break };
        last = batch.header.ordinal;
        report.batches += 1;
        epochs.note(volume, &batch, report);
        report.blocks_checked += batch.header.block_crcs.len() as u64;
        if let Some(block) = batch.first_bad_block()? {
            let offset = batch.payload_at + block as u64 * cdp_types::BLOCK_SIZE;
            let file = batch.segment.file.name().to_owned();
            let what = format!("block {block} of batch {last} does not match its checksum");
            report.findings.push(Finding { volume, file, offset, what });
        }
        advance(batch.end() - batch.header.place.offset)?;
    }
    if last < end {
        let (file, offset) =
            reader.position().map_or((String::new(), 0), |(s, at)| (s.file.name().to_owned(), at));
        let what = format!("batch {} is damaged; the log goes on to batch {end}", last.next());
        report.findings.push(Finding { volume, file, offset, what });
    }
    Ok(last >= end)
}

fn length(segment: &Segment) -> Result<u64> {
    let name = segment.file.name();
    segment.file.len().map_err(|e| Error::io(format!("asking the length of {name}"), e))
}
