//! Looking into a store.

use cdp_store::{ExtentInfo, ExtentState, SegmentInfo, SegmentState};
use cdp_types::{VolumeAt, VolumeId};
use cdpd::api::{ApiError, Record};
use cdpd::inspect::RecordsQuery;
use cdpd::size::ByteSize;

use crate::access::Access;
use crate::cli::RecordsArgs;
use crate::commands::instant;
use crate::output::{Column, Output, say};

/// Shows the store.
pub(super) fn store(access: &Access, output: &mut Output) -> anyhow::Result<()> {
    let status = access.store()?;
    if output.is_json() {
        return output.value(&status);
    }
    let store = &status.store;
    let daemon = match &status.daemon {
        Some(daemon) => {
            format!("version {}, process {}, since {}", daemon.version, daemon.pid, daemon.started)
        }
        None => "none: the store is stopped".to_owned(),
    };
    output.facts(&[
        ("id", store.id.to_string()),
        ("cdpd", daemon),
        ("format", store.format_version.to_string()),
        ("made", output.time(store.created_ns)),
        ("volumes", store.volumes.to_string()),
        ("generation", store.generation.to_string()),
        ("segments", format!("{} used, {} in the pool", store.segments, store.pool_segments)),
        ("segment size", ByteSize(store.segment_bytes).to_string()),
        ("logs", ByteSize(store.log_bytes).to_string()),
        ("index", ByteSize(store.index_bytes).to_string()),
        ("free space", ByteSize(store.free_bytes).to_string()),
    ])
}

/// Lists the segments.
pub(super) fn segments(access: &Access, output: &mut Output) -> anyhow::Result<()> {
    let mut segments: Vec<SegmentInfo> = Vec::new();
    access.segments(&mut |segment| {
        segments.push(segment);
        true
    })?;
    if output.is_json() {
        return segments.iter().try_for_each(|segment| output.item(segment));
    }
    let row = |segment: &SegmentInfo| {
        vec![
            segment.slot.to_string(),
            segment.incarnation.to_string(),
            state(segment.state).to_owned(),
            segment.volume_name.as_ref().map_or_else(|| log_of(segment.volume), ToString::to_string),
            segment.first_ordinal.to_string(),
            segment.generation.to_string(),
            ByteSize(segment.file_bytes).to_string(),
        ]
    };
    let columns = [
        Column::Right("SLOT"),
        Column::Right("INCARNATION"),
        Column::Left("STATE"),
        Column::Left("VOLUME"),
        Column::Right("FIRST BATCH"),
        Column::Right("GENERATION"),
        Column::Right("SIZE"),
    ];
    output.table(&columns, &segments.iter().map(row).collect::<Vec<_>>())
}

fn state(state: SegmentState) -> &'static str {
    match state {
        SegmentState::Open => "open",
        SegmentState::Sealed => "sealed",
        SegmentState::Dead => "dead",
    }
}

/// Whose a log is that belongs to no volume that can be seen.
fn log_of(volume: VolumeId) -> String {
    match volume {
        VolumeId(0) => "(store log)".to_owned(),
        other => format!("({other})"),
    }
}

/// Lists what `list` shows to its visitor, whose failure to write ends the list.
fn listing<T, E>(
    write: &mut dyn FnMut(T) -> anyhow::Result<()>,
    list: impl FnOnce(&mut dyn FnMut(T) -> bool) -> Result<E, ApiError>,
) -> anyhow::Result<E> {
    let mut written = Ok(());
    let listed = list(&mut |item| {
        written = write(item);
        written.is_ok()
    });
    written?;
    Ok(listed?)
}

/// Lists a volume's records, as they come.
pub(super) fn records(access: &Access, args: RecordsArgs, output: &mut Output) -> anyhow::Result<()> {
    let from = args.from.as_deref().map(instant).transpose()?;
    let query = RecordsQuery { volume: args.volume, from, to: instant(&args.to)?, limit: args.limit };
    if !output.is_json() {
        output.line(format!(
            "{:<35}  {:>20}  {:>12}  {:<10}  {:>24}  {:>10}",
            "TIME", "SEQ", "BATCH", "KIND", "BLOCKS", "GENERATION"
        ))?;
    }
    let end = listing(
        &mut |record: Record| {
            if output.is_json() {
                return output.item(&record);
            }
            let time = output.time(record.record.time_ns);
            let record = record.record;
            let blocks = match (&record.epoch, record.block_count) {
                (Some(epoch), _) => format!("epoch:{}, {} disks", epoch.epoch, epoch.members.len()),
                (None, 0) => "-".to_owned(),
                (None, count) => format!("{}+{count}", record.first_block),
            };
            output.line(format!(
                "{time:<35}  {:>20}  {:>12}  {:<10}  {blocks:>24}  {:>10}",
                record.seq.to_string(),
                record.ordinal.to_string(),
                record.kind,
                record.generation.to_string(),
            ))
        },
        |visit| access.records(&query, visit),
    )?;
    if end.is_some_and(|end| end.more) && !output.is_json() {
        say("there are more; --limit cut them off");
    }
    Ok(())
}

/// Shows where a volume's blocks are.
pub(super) fn map(access: &Access, what: &VolumeAt, output: &mut Output) -> anyhow::Result<()> {
    if !output.is_json() {
        output.line(format!("{:>24}  {:<8}  {:>12}  {:>12}", "BLOCKS", "STATE", "SEGMENT", "OFFSET"))?;
    }
    listing(
        &mut |extent: ExtentInfo| {
            if output.is_json() {
                return output.item(&extent);
            }
            let blocks = format!("{}+{}", extent.first_block, extent.block_count);
            output.line(match extent.state {
                ExtentState::Mapped { segment, offset } => {
                    format!("{blocks:>24}  {:<8}  {:>12}  {offset:>12}", "mapped", segment.to_string())
                }
                ExtentState::Zero => format!("{blocks:>24}  zero"),
                ExtentState::Unsaid => format!("{blocks:>24}  unsaid"),
            })
        },
        |visit| access.map(what, visit),
    )?;
    Ok(())
}
