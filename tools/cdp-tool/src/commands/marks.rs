//! Marks.

use std::collections::BTreeMap;

use anyhow::ensure;
use cdp_types::{Label, VolumeName};
use cdpd::api::{Mark, NewMark};
use cdpd::client::Client;
use hyper::Method;

use crate::access::Access;
use crate::cli::MarkArgs;
use crate::commands::volume_at;
use crate::output::{Column, Output};

/// Names an instant.
pub(super) fn mark(client: &Client, args: MarkArgs, output: &mut Output) -> anyhow::Result<()> {
    let what = volume_at(&args.what)?;
    let mut metadata = BTreeMap::new();
    for (key, value) in args.set {
        ensure!(!metadata.contains_key(&key), "'{key}' is set twice");
        metadata.insert(key, value);
    }
    let volume = what.volume;
    let new = NewMark { label: args.label, at: what.instant.to_string(), metadata };
    let mark: Mark = client.send(Method::POST, &format!("/v1/volumes/{volume}/marks"), &new)?;
    if output.is_json() {
        return output.value(&mark);
    }
    let time = output.time(mark.at.time_ns);
    output.line(format!("{volume}@mark:{} is {volume}@seq:{}, {time}", mark.label, mark.at.seq))
}

/// Lists a volume's marks.
pub(super) fn list(access: &Access, volume: &VolumeName, output: &mut Output) -> anyhow::Result<()> {
    let marks = access.volume(volume)?.marks;
    if output.is_json() {
        return marks.iter().try_for_each(|mark| output.item(mark));
    }
    table(&marks, output)
}

/// Forgets a mark.
pub(super) fn unmark(
    client: &Client,
    volume: &VolumeName,
    label: &Label,
    output: &mut Output,
) -> anyhow::Result<()> {
    client.delete::<()>(&format!("/v1/volumes/{volume}/marks/{label}"))?;
    if output.is_json() {
        return output.value(&serde_json::json!({ "volume": volume, "unmarked": label }));
    }
    output.line(format!("{volume} has no mark {label} any more"))
}

/// Writes marks as a table.
pub(super) fn table(marks: &[Mark], output: &mut Output) -> anyhow::Result<()> {
    let row = |mark: &Mark| {
        vec![
            mark.label.to_string(),
            mark.at.seq.to_string(),
            mark.at.branch.to_string(),
            output.time(mark.at.time_ns),
            shown(&mark.metadata),
        ]
    };
    let rows: Vec<_> = marks.iter().map(row).collect();
    let columns = [
        Column::Left("MARK"),
        Column::Right("SEQ"),
        Column::Right("BRANCH"),
        Column::Left("TIME"),
        Column::Left("METADATA"),
    ];
    output.table(&columns, &rows)
}

/// Metadata on one line. Anything can be in it, so what would move a terminal's cursor is escaped.
fn shown(metadata: &BTreeMap<String, String>) -> String {
    let plain = |text: &str| match text.contains(char::is_control) {
        true => text.escape_debug().to_string(),
        false => text.to_owned(),
    };
    let pairs: Vec<_> =
        metadata.iter().map(|(key, value)| format!("{}={}", plain(key), plain(value))).collect();
    pairs.join(" ")
}
