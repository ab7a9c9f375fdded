//! Marks.

use cdp_types::{Label, VolumeName};
use cdpd::api::{Mark, NewMark};
use cdpd::client::Client;
use hyper::Method;

use crate::access::Access;
use crate::output::{Column, Output};

/// Names a volume's present.
pub(super) fn mark(
    client: &Client,
    volume: &VolumeName,
    label: Label,
    output: &mut Output,
) -> anyhow::Result<()> {
    let mark: Mark = client.send(Method::POST, &format!("/v1/volumes/{volume}/marks"), &NewMark { label })?;
    if output.is_json() {
        return output.value(&mark);
    }
    let time = output.time(mark.time_ns);
    output.line(format!("{volume}@mark:{} is {volume}@seq:{}, {time}", mark.label, mark.seq))
}

/// Lists a volume's marks.
pub(super) fn list(access: &Access, volume: &VolumeName, output: &mut Output) -> anyhow::Result<()> {
    let marks = access.volume(volume)?.marks;
    if output.is_json() {
        return output.value(&marks);
    }
    table(&marks, output)
}

/// Writes marks as a table.
pub(super) fn table(marks: &[Mark], output: &mut Output) -> anyhow::Result<()> {
    let rows: Vec<_> = marks
        .iter()
        .map(|mark| vec![mark.label.to_string(), mark.seq.to_string(), output.time(mark.time_ns)])
        .collect();
    output.table(&[Column::Left("MARK"), Column::Right("SEQ"), Column::Left("TIME")], &rows)
}
