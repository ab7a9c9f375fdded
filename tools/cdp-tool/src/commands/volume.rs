//! Volumes.

use std::io::{Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, bail};
use cdp_store::VolumeState;
use cdp_types::VolumeName;
use cdpd::api::{NewVolume, ServeRequest, Volume, VolumeChange};
use cdpd::client::Client;
use cdpd::size::ByteSize;
use hyper::Method;

use crate::access::Access;
use crate::cli::CreateArgs;
use crate::commands::{confirmed, marks};
use crate::image;
use crate::output::{Column, Output};
use crate::progress::Progress;
use crate::sparse::Source;

/// Makes a volume.
pub(super) fn create(client: &Client, args: CreateArgs, output: &mut Output) -> anyhow::Result<()> {
    let volume = match (&args.from, args.size) {
        (Some(from), _) => import(client, &args, from)?,
        (None, Some(size)) => {
            let new = NewVolume {
                name: args.name.clone(),
                size_bytes: size.0,
                logical_block_size: args.block_size,
            };
            client.send(Method::POST, "/v1/volumes", &new)?
        }
        (None, None) => bail!("how large? say --size, or --from an image"),
    };
    changed(&volume, "made", output)
}

/// Makes a volume of an image.
fn import(client: &Client, args: &CreateArgs, from: &Path) -> anyhow::Result<Volume> {
    // A name that is taken had better be known before an image is converted for it; who comes second is told
    // in any case.
    if client.get::<Volume>(&format!("/v1/volumes/{}", args.name)).is_ok() {
        bail!("volume '{}' exists already", args.name);
    }
    let mut image = image::open(from, args.format)?;
    let len = image.file.seek(SeekFrom::End(0)).with_context(|| format!("cannot read {}", from.display()))?;
    let whole = len.next_multiple_of(cdp_types::BLOCK_SIZE);
    let size = args.size.map_or(whole, |size| size.0);
    if size < whole {
        bail!("{} holds {}, more than the {} of --size", from.display(), exact(whole), exact(size));
    }
    let mut source = Source::new(from, image.file.try_clone()?, size, args.block_size)?;
    let progress = Progress::new("importing");
    let path = format!("/v1/volumes/{}/import?logical_block_size={}", args.name, args.block_size);
    Ok(client.import(&path, &mut || source.next(), &mut |done| progress.show(done))?)
}

/// Lists the volumes.
pub(super) fn list(access: &Access, output: &mut Output) -> anyhow::Result<()> {
    let volumes = access.volumes()?;
    if output.is_json() {
        return volumes.iter().try_for_each(|volume| output.item(volume));
    }
    let row = |volume: &Volume| {
        vec![
            volume.name.to_string(),
            ByteSize(volume.size_bytes).to_string(),
            state(&volume.state).to_owned(),
            volume.head.seq.to_string(),
            output.time(volume.head.time_ns),
            volume.serving.as_ref().map_or("-".to_owned(), |s| format!("{} ({})", s.socket, s.status)),
        ]
    };
    let rows: Vec<_> = volumes.iter().map(row).collect();
    let columns = [
        Column::Left("NAME"),
        Column::Right("SIZE"),
        Column::Left("STATE"),
        Column::Right("HEAD"),
        Column::Left("LAST CHANGE"),
        Column::Left("SERVED ON"),
    ];
    output.table(&columns, &rows)
}

/// Shows a volume.
pub(super) fn show(access: &Access, name: &VolumeName, output: &mut Output) -> anyhow::Result<()> {
    let volume = access.volume(name)?;
    if output.is_json() {
        return output.value(&volume);
    }
    let mut facts = vec![
        ("name", volume.name.to_string()),
        ("id", volume.id.to_string()),
        ("size", exact(volume.size_bytes)),
        ("block size", format!("{} B", volume.logical_block_size)),
        ("branch", volume.branch.to_string()),
        ("head", format!("seq:{}, batch {}", volume.head.seq, volume.head.ordinal)),
        ("last change", output.time(volume.head.time_ns)),
        ("created", output.time(volume.created_ns)),
        ("state", state(&volume.state).to_owned()),
    ];
    if let VolumeState::ReadOnly { reason } = &volume.state {
        facts.push(("why", reason.clone()));
    }
    facts.push(match &volume.serving {
        Some(s) => ("served on", format!("{}, {} queues, {}", s.socket, s.queues, s.status)),
        None => ("served on", "-".to_owned()),
    });
    output.facts(&facts)?;
    statistics(&volume, output)?;
    if !volume.marks.is_empty() {
        output.line("")?;
        marks::table(&volume.marks, output)?;
    }
    Ok(())
}

/// Writes a volume's statistics, whichever there are.
fn statistics(volume: &Volume, output: &mut Output) -> anyhow::Result<()> {
    let serde_json::Value::Object(statistics) = serde_json::to_value(volume.stats)? else { return Ok(()) };
    let numbers: Vec<_> = statistics
        .iter()
        .filter(|(_, value)| value.is_number())
        .map(|(name, value)| (name.replace('_', " "), value.to_string()))
        .collect();
    output.line("")?;
    output.facts(&numbers.iter().map(|(name, value)| (name.as_str(), value.clone())).collect::<Vec<_>>())
}

/// Makes a volume larger.
pub(super) fn resize(
    client: &Client,
    name: &VolumeName,
    size: ByteSize,
    output: &mut Output,
) -> anyhow::Result<()> {
    let change = VolumeChange::SizeBytes(size.0);
    let volume: Volume = client.send(Method::PATCH, &format!("/v1/volumes/{name}"), &change)?;
    changed(&volume, "resized", output)
}

/// Gives a volume another name.
pub(super) fn rename(
    client: &Client,
    name: &VolumeName,
    new: VolumeName,
    output: &mut Output,
) -> anyhow::Result<()> {
    let change = VolumeChange::Name(new);
    let volume: Volume = client.send(Method::PATCH, &format!("/v1/volumes/{name}"), &change)?;
    changed(&volume, "renamed", output)
}

/// Destroys a volume.
pub(super) fn destroy(
    client: &Client,
    name: &VolumeName,
    yes: bool,
    force: bool,
    output: &mut Output,
) -> anyhow::Result<()> {
    let path = format!("/v1/volumes/{name}");
    // Asked first, so that a name that was mistyped is not asked about.
    let volume: Volume = client.get(&path)?;
    let question = format!(
        "Destroy volume '{name}' ({}) with its whole history? Type its name to confirm: ",
        ByteSize(volume.size_bytes)
    );
    if !yes && !confirmed(&format!("volume '{name}'"), "destroyed", &question, name.as_str())? {
        bail!("volume '{name}' was not destroyed");
    }
    client.delete::<()>(&format!("{path}?force={force}"))?;
    if output.is_json() {
        return output.value(&serde_json::json!({ "destroyed": name }));
    }
    output.line(format!("destroyed {name}"))
}

/// Serves a volume.
pub(super) fn serve(
    client: &Client,
    name: &VolumeName,
    socket: &Path,
    queues: u16,
    output: &mut Output,
) -> anyhow::Result<()> {
    // The daemon has a working directory of its own.
    let absolute = std::path::absolute(socket)?;
    let socket = absolute.to_str().with_context(|| format!("{} is no text", absolute.display()))?.to_owned();
    let request = ServeRequest { socket, queues };
    let volume: Volume = client.send(Method::PUT, &format!("/v1/volumes/{name}/serve"), &request)?;
    changed(&volume, "serving", output)
}

/// Stops serving a volume.
pub(super) fn unserve(client: &Client, name: &VolumeName, output: &mut Output) -> anyhow::Result<()> {
    let volume: Volume = client.delete(&format!("/v1/volumes/{name}/serve"))?;
    changed(&volume, "no longer serving", output)
}

fn changed(volume: &Volume, what: &str, output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return output.value(volume);
    }
    let place = volume.serving.as_ref().map(|s| format!(", on {}", s.socket)).unwrap_or_default();
    output.line(format!("{what} {}: {}{place}", volume.name, ByteSize(volume.size_bytes)))
}

fn state(state: &VolumeState) -> &'static str {
    match state {
        VolumeState::Healthy => "healthy",
        VolumeState::ReadOnly { .. } => "read-only",
    }
}

/// A size for people, and exactly.
fn exact(bytes: u64) -> String {
    let size = ByteSize(bytes).to_string();
    if bytes < 1024 { size } else { format!("{size} ({bytes} B)") }
}
