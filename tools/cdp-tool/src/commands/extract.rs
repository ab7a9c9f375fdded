//! A volume's content as a file.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use cdp_types::VolumeAt;
use cdpd::api::{ApiError, At, ErrorKind};
use cdpd::frames::Frame;
use cdpd::size::ByteSize;
use serde::Serialize;

use crate::access::Access;
use crate::image::{finish_as_qcow2, wants_qcow2};
use crate::interrupt::{directory_of, unfinished_file};
use crate::output::Output;
use crate::progress::Progress;
use crate::sparse::Target;

/// What was extracted.
#[derive(Debug, Serialize)]
struct Extracted<'a> {
    volume: &'a str,
    at: Option<At>,
    /// As text, which a path need not be.
    file: Cow<'a, str>,
    format: &'static str,
    size_bytes: u64,
    data_bytes: u64,
}

/// Writes a volume, as it was at an instant, to a file.
pub(super) fn extract(
    access: &Access,
    what: &VolumeAt,
    file: &Path,
    output: &mut Output,
) -> anyhow::Result<()> {
    match fs::metadata(file) {
        // A device would be replaced by a file, which nobody can want.
        Ok(metadata) if !metadata.is_file() => bail!("{} exists and is no file", file.display()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot write {}", file.display()));
        }
        _ => {}
    }
    let raw = unfinished_file(directory_of(file))?;
    let (at, size_bytes, data_bytes) = receive(access, what, raw.file()?)?;
    let format = if wants_qcow2(file) {
        finish_as_qcow2(&raw, file)?;
        "qcow2"
    } else {
        raw.finish(file)?;
        "raw"
    };
    let volume = what.volume.as_str();
    if output.is_json() {
        let file = file.to_string_lossy();
        return output.value(&Extracted { volume, at, file, format, size_bytes, data_bytes });
    }
    let instant = at.map(|at| format!("@seq:{}, {}", at.seq, output.time(at.time_ns))).unwrap_or_default();
    output.line(format!(
        "{}: {volume}{instant}, {}, of which {} are data",
        file.display(),
        ByteSize(size_bytes),
        ByteSize(data_bytes)
    ))
}

/// Fills `file`; the instant, the size and the data in it.
fn receive(access: &Access, what: &VolumeAt, file: &fs::File) -> anyhow::Result<(Option<At>, u64, u64)> {
    let progress = Progress::new("extracting");
    let mut begun: Option<(Option<At>, u64, Target<'_>)> = None;
    let mut complete = false;
    access.content(what, &mut |frame| {
        match (frame, &mut begun) {
            (Frame::Start(start), None) => {
                let target = Target::new(file, start.size_bytes).map_err(|e| unwritten(&e))?;
                begun = Some((start.at, start.size_bytes, target));
            }
            (Frame::Data { offset, bytes }, Some((_, size_bytes, target))) => {
                let end = offset.saturating_add(bytes.len() as u64);
                if end > *size_bytes {
                    return Err(ApiError::new(
                        ErrorKind::Internal,
                        format!("data up to byte {end} is too long"),
                    ));
                }
                target.write(offset, &bytes).map_err(|e| unwritten(&e))?;
                progress.at(end, *size_bytes);
            }
            (Frame::End, Some(_)) => complete = true,
            _ => return Err(ApiError::new(ErrorKind::Internal, "the content is out of order")),
        }
        Ok(true)
    })?;
    match begun {
        Some((at, size_bytes, target)) if complete => Ok((at, size_bytes, target.data_bytes)),
        _ => bail!("the content is incomplete"),
    }
}

fn unwritten(error: &io::Error) -> ApiError {
    ApiError::new(ErrorKind::Io, format!("cannot write the file: {error}"))
}
