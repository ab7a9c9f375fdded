//! Images in other formats, by qemu-img.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::cli::ImageFormat;
use crate::interrupt::{Unfinished, directory_of, start_helper, unfinished_file};
use crate::progress::Progress;

/// A raw image to read from.
pub(crate) struct RawImage {
    pub(crate) file: File,
    /// The copy that qemu-img made, which goes when we do.
    _copy: Option<Unfinished>,
}

/// What `qemu-img info` says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    backing_filename: Option<String>,
    /// What only this format has.
    #[serde(default)]
    format_specific: serde_json::Value,
}

impl Info {
    /// The other files that it is read with, which whoever has made the image has chosen.
    fn others(&self) -> String {
        let backing = self.backing_filename.as_ref().map(|file| format!(", over the backing file {file}"));
        let data = self.format_specific["data"]["data-file"].as_str();
        let data = data.map(|file| format!(", with its data in {file}"));
        [backing, data].into_iter().flatten().collect()
    }
}

/// Opens an image as a raw one, by way of a copy if it is none. Without `format` it is what qemu-img takes it
/// for, and if that is not raw, the user is told: the first bytes of a raw image belong to a guest, which can
/// write there what it likes.
pub(crate) fn open(path: &Path, format: Option<ImageFormat>) -> anyhow::Result<RawImage> {
    // Opened first for the plainest error message, and held: an absolute path has no `nbd:` or `json:` in
    // front.
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let path = std::path::absolute(path)?;
    let (format, note) = match format {
        Some(format) => (format.name().to_owned(), None),
        None => {
            let info = info(&path)?;
            let note = format!(
                "{} looks like {}{} and is read as such; --format raw would take its bytes as they are",
                path.display(),
                info.format,
                info.others(),
            );
            (info.format, Some(note))
        }
    };
    if format == "raw" {
        return Ok(RawImage { file, _copy: None });
    }
    let copy = beside(&path)?;
    let progress = Progress::new("converting");
    if let Some(note) = &note {
        progress.note(note);
    }
    convert(&path, &format, copy.path()?, "raw", &progress)?;
    Ok(RawImage { file: File::open(copy.path()?)?, _copy: Some(copy) })
}

/// A file for the copy: beside the image, where there is room for images, unless that cannot be written to.
fn beside(image: &Path) -> anyhow::Result<Unfinished> {
    unfinished_file(directory_of(image)).or_else(|_| unfinished_file(&std::env::temp_dir()))
}

fn info(path: &Path) -> anyhow::Result<Info> {
    let advice = || {
        format!(
            "cannot find out what format {} has; install qemu-img (on Debian: qemu-utils), or say --format raw",
            path.display()
        )
    };
    let output = Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .with_context(advice)?;
    if !output.status.success() {
        bail!("qemu-img cannot read {}: {}", path.display(), complaint(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("qemu-img info says something unexpected")
}

/// Makes `to` of `from`, in another format.
pub(crate) fn convert(
    from: &Path,
    from_format: &str,
    to: &Path,
    to_format: &str,
    progress: &Progress,
) -> anyhow::Result<()> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-p", "-f", from_format, "-O", to_format])
        .args([from, to])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, _helper) = start_helper(&mut command).with_context(|| {
        format!("cannot convert {from_format} to {to_format}; install qemu-img (on Debian: qemu-utils)")
    })?;
    let size = from.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    follow(&mut child, size, progress)?;
    let output = child.wait_with_output().context("cannot wait for qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img cannot convert {}: {}", from.display(), complaint(&output.stderr));
    }
    Ok(())
}

/// Shows what qemu-img tells of its progress: `    (12.34/100%)`, again and again.
fn follow(child: &mut Child, size: u64, progress: &Progress) -> io::Result<()> {
    let Some(mut stdout) = child.stdout.take() else { return Ok(()) };
    let mut bytes = [0; 256];
    loop {
        let len = match stdout.read(&mut bytes)? {
            0 => return Ok(()),
            len => len,
        };
        if let Some(percent) = percent(&String::from_utf8_lossy(&bytes[..len])) {
            progress.at((size as f64 * percent / 100.0) as u64, size);
        }
    }
}

/// The last whole `(12.34/100%)` in a text.
fn percent(text: &str) -> Option<f64> {
    let (head, _) = text.rsplit_once("/100%)")?;
    let (_, number) = head.rsplit_once('(')?;
    number.trim().parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

fn complaint(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches("qemu-img: ").to_owned()
}

/// Whether a file's name asks for qcow2.
pub(crate) fn wants_qcow2(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("qcow2"))
}

/// A directory's unfinished file becomes `name`, as qcow2.
pub(crate) fn finish_as_qcow2(raw: &Unfinished, name: &Path) -> anyhow::Result<()> {
    let image: Unfinished = unfinished_file(directory_of(name))?;
    let path: PathBuf = image.path()?.to_owned();
    convert(raw.path()?, "raw", &path, "qcow2", &Progress::new("converting"))?;
    image.finish(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_understood() {
        assert_eq!(percent("    (0.00/100%)\r    (12.50/100%)\r    (13."), Some(12.5));
        for text in ["", "(x/100%)", "/100%)", "(101.0/100%)", "(nan/100%)"] {
            assert_eq!(percent(text), None, "{text}");
        }
    }

    #[test]
    fn all_files_that_an_image_is_read_with_are_named() {
        for (info, others) in [
            (r#"{ "format": "raw" }"#, ""),
            (r#"{ "format": "vdi", "format-specific": { "type": "vdi", "data": {} } }"#, ""),
            (
                r#"{ "format": "qcow2", "backing-filename": "/b", "format-specific": { "data": { "data-file": "/d" } } }"#,
                ", over the backing file /b, with its data in /d",
            ),
        ] {
            let info = serde_json::from_str::<Info>(info).map(|info| info.others());
            assert_eq!(info.ok().as_deref(), Some(others));
        }
    }

    #[test]
    fn the_suffix_decides() {
        assert!(wants_qcow2(Path::new("a/b.qcow2")) && wants_qcow2(Path::new("B.QCOW2")));
        assert!(!wants_qcow2(Path::new("qcow2")) && !wants_qcow2(Path::new("a.qcow2.raw")));
    }
}
