//! What can be seen of a store, served by a daemon or stopped.

use std::collections::BTreeMap;

use cdp_store::{BranchInfo, ExtentInfo, Store, VolumeInfo};
use cdp_types::{Instant, Seq, VolumeAt, VolumeName};

use crate::api::{self, ApiError, At, MapEnd, Record, RecordsEnd, ServingStatus, rfc3339};

/// Which records of a volume are wanted.
#[derive(Clone, Debug)]
pub struct RecordsQuery {
    /// Whose.
    pub volume: VolumeName,
    /// Those after this instant; from the beginning if none.
    pub from: Option<Instant>,
    /// Those up to and including this instant.
    pub to: Instant,
    /// At most so many, the oldest first.
    pub limit: Option<u64>,
}

/// A volume as the API shows it. `status` is how its socket does, if it has one.
#[must_use]
pub fn volume(info: VolumeInfo, status: ServingStatus) -> api::Volume {
    let serving = info.serving.map(|s| api::Serving { socket: s.socket, queues: s.queues, status });
    api::Volume {
        id: info.id,
        name: info.name,
        size_bytes: info.size_bytes,
        logical_block_size: info.logical_block_size,
        branch: info.branch,
        head: api::Head {
            seq: info.head.seq,
            ordinal: info.head.ordinal,
            time: rfc3339(info.head.time_ns),
            time_ns: info.head.time_ns,
            durable_ordinal: info.head.durable_ordinal,
        },
        state: info.state,
        serving,
        marks: info.marks.into_iter().map(api::Mark::from).collect(),
        created: rfc3339(info.created_ns),
        created_ns: info.created_ns,
        stats: info.stats,
    }
}

/// A volume's branches as the API shows them, oldest first. Blocks.
///
/// # Errors
/// No such volume, or a damaged index.
pub fn branches(store: &Store, name: &VolumeName) -> Result<Vec<api::Branch>, ApiError> {
    let branches = store.branches(name)?;
    let names: BTreeMap<_, _> = store.volumes().into_iter().map(|v| (v.id, v.name)).collect();
    let show = |info: BranchInfo| {
        let inherited = info.from.zip(info.from_volume);
        let inherited = inherited.map(|(at, volume)| api::Inherited {
            volume,
            name: names.get(&volume).cloned(),
            at: at.into(),
        });
        api::Branch {
            id: info.id,
            head: info.head,
            from: inherited,
            start: info.start,
            created: rfc3339(info.created_ns),
            created_ns: info.created_ns,
            end: info.end.into(),
            deleted: info.deleted,
        }
    };
    Ok(branches.into_iter().map(show).collect())
}

/// Shows `visit` a volume's records, oldest first, until it returns false. Blocks.
///
/// # Errors
/// No such volume or instant, or a damaged log.
pub fn records(
    store: &Store,
    query: &RecordsQuery,
    visit: &mut dyn FnMut(Record) -> bool,
) -> Result<RecordsEnd, ApiError> {
    // Once: what an instant means can take a while to find, and another volume may have got the name meanwhile.
    let volume = store.volume(&query.volume)?;
    let from = query.from.as_ref().map(|from| store.resolve_of(&volume, from)).transpose()?;
    let to = store.resolve_of(&volume, &query.to)?;
    let first = from.map_or(Seq::ZERO, |from| from.seq).0.saturating_add(1);
    let (mut count, mut more) = (0, false);
    if first <= to.seq.0 {
        volume.records(Seq(first), to.seq, &mut |record| {
            if query.limit.is_some_and(|limit| count >= limit) {
                more = true;
                return false;
            }
            count += 1;
            visit(Record { time: rfc3339(record.time_ns), record })
        })?;
    }
    Ok(RecordsEnd { from: from.map(At::from), to: to.into(), count, more })
}

/// Shows `visit` where a volume's blocks were at an instant, in order, until it returns false. Blocks.
///
/// # Errors
/// No such volume or instant, or a damaged index.
pub fn map(
    store: &Store,
    what: &VolumeAt,
    visit: &mut dyn FnMut(ExtentInfo) -> bool,
) -> Result<MapEnd, ApiError> {
    let volume = store.volume(&what.volume)?;
    let at = store.resolve_of(&volume, &what.instant)?;
    let mut count = 0;
    // Its branch may be deleted meanwhile, but not taken out of the index.
    let _held = volume.open_resolved(at)?;
    volume.extents(at, volume.blocks(), &mut |extent| {
        count += 1;
        visit(extent)
    })?;
    Ok(MapEnd { at: at.into(), count })
}
