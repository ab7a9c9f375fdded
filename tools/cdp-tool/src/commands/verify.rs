//! Is everything as it was written?

use std::path::Path;

use anyhow::Context;
use cdp_store::{Store, VerifyProgress, VerifyReport};
use cdp_types::VolumeId;
use cdpd::Config;
use cdpd::config::Overrides;

use crate::access::Access;
use crate::commands::Outcome;
use crate::output::{Output, unless_gone};
use crate::progress::Progress;

/// Checks everything.
pub(super) fn verify(access: &Access, output: &mut Output) -> anyhow::Result<Outcome> {
    let progress = Progress::new("verifying");
    let report = access.verify(&mut |done| progress.show(done))?;
    drop(progress);
    unless_gone(show(&report, output))?;
    Ok(if report.findings.is_empty() { Outcome::Good } else { Outcome::Bad })
}

fn show(report: &VerifyReport, output: &mut Output) -> anyhow::Result<()> {
    if output.is_json() {
        return output.value(report);
    }
    for finding in &report.findings {
        let log = match finding.volume {
            VolumeId(0) => "the store log".to_owned(),
            volume => format!("volume {volume}"),
        };
        output.line(format!("{log}: {}, byte {}: {}", finding.file, finding.offset, finding.what))?;
    }
    output.line(format!(
        "{} blocks in {} batches checked, {} findings",
        report.blocks_checked,
        report.batches,
        report.findings.len()
    ))
}

/// Makes the index again.
pub(super) fn rebuild_index(directory: &Path, output: &mut Output) -> anyhow::Result<()> {
    // As the daemon would open it: its configuration may lie in the store's directory.
    let options = Config::load(directory, &Overrides::default())?.options;
    let bar = Progress::new("rebuilding the index");
    let show = move |progress: VerifyProgress| bar.at(progress.done_bytes, progress.total_bytes);
    let report = Store::rebuild_index(directory, options, Box::new(show))
        .with_context(|| format!("cannot rebuild the index of the store in {}", directory.display()))?;
    if output.is_json() {
        return output.value(&report);
    }
    output.line(format!("rebuilt the index of {} volumes from {} batches", report.volumes, report.batches))
}
