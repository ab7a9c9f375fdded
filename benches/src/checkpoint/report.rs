//! Percentiles, JSON and Markdown.

use std::fmt::Write;

use serde::Serialize;

use super::subject::Latency;
use crate::machine::{Machine, gib};
use crate::report::{Spread, percentile};

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) filled_percent: u64,
    pub(super) huge_pages: bool,
    pub(super) machines: Vec<MachineReport>,
}

/// One size of memory.
#[derive(Debug, Default, Serialize)]
pub(super) struct MachineReport {
    pub(super) memory_gib: u32,
    /// Of a guest that has just booted and does nothing.
    pub(super) first_stored_bytes: u64,
    pub(super) first_duration_ms: u64,
    /// By its second checkpoint, some seconds later.
    pub(super) idle_stored_bytes: u64,
    pub(super) series: Vec<Series>,
    /// From the request to the restored guest's first beat.
    pub(super) restore_ms: Vec<f64>,
    pub(super) ledger: Option<Ledger>,
}

/// Checkpoints with 5 % of the memory changed between them.
#[derive(Debug, Serialize)]
pub(super) struct Ledger {
    pub(super) stored_bytes: Vec<u64>,
}

/// Checkpoints of one mode.
#[derive(Debug, Serialize)]
pub(super) struct Series {
    pub(super) mode: String,
    /// If the guest used its disk.
    pub(super) disk: Option<Disk>,
    pub(super) figures: Figures,
}

/// Requests to the disk, one at a time.
#[derive(Debug, Serialize)]
pub(super) struct Disk {
    pub(super) outside: Latency,
    pub(super) inside: Latency,
    /// Writes in the second after each checkpoint, divided by those in the second before it.
    pub(super) after: Spread,
}

/// An entry for each checkpoint.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    /// Between two beats, over the time that the machine stood still.
    pub(super) pause_ms: Vec<f64>,
    /// Between QEMU's STOP and RESUME.
    pub(super) qemu_pause_ms: Vec<f64>,
    /// From RESUME to the first beat.
    pub(super) first_beat_ms: Vec<f64>,
    /// The longest time between two other beats, from the request to the answer.
    pub(super) stall_ms: Vec<f64>,
    /// The longest time between two beats just before.
    pub(super) outside_ms: Vec<f64>,
    pub(super) duration_ms: Vec<f64>,
    pub(super) stored_bytes: Vec<u64>,
}

const HEAD: &str = "\
| memory, GiB | mode | guest | pause, ms | STOP to RESUME | RESUME to the first beat | longest other stall | outside | duration, ms | stored, MiB | disk p99 outside → inside, ms | writes after / before |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

/// Median, 99th percentile and most.
fn three(figures: &[f64]) -> String {
    let [p50, p99, max] = [50, 99, 100].map(|percent| percentile(figures, percent));
    format!("{p50:.1} / {p99:.1} / {max:.1}")
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Series {
    /// A row of the table.
    pub(super) fn row(&self, memory_gib: u32) -> String {
        let Figures {
            pause_ms,
            qemu_pause_ms,
            first_beat_ms,
            stall_ms,
            outside_ms,
            duration_ms,
            stored_bytes,
        } = &self.figures;
        let stored: Vec<f64> = stored_bytes.iter().map(|&bytes| mib(bytes)).collect();
        let guest = if self.disk.is_some() { "asks its disk" } else { "beats" };
        let disk = self.disk.as_ref().map_or_else(
            || "– | –".to_owned(),
            |Disk { outside, inside, after }| {
                let ms = |latency: &Latency| latency.p99_us as f64 / 1e3;
                let (outside, inside) = (ms(outside), ms(inside));
                let Spread { median, min, max } = after;
                let ratio = inside / outside;
                format!("{outside:.2} → {inside:.2} (× {ratio:.1}) | {median:.2} ({min:.2}–{max:.2})")
            },
        );
        format!(
            "| {memory_gib} | {} | {guest} | **{}** | {} | {} | {} | {} | {:.0} | {:.1} | {disk} |",
            self.mode,
            three(pause_ms),
            three(qemu_pause_ms),
            three(first_beat_ms),
            three(stall_ms),
            three(outside_ms),
            percentile(duration_ms, 50),
            percentile(&stored, 50),
        )
    }
}

impl MachineReport {
    fn rest(&self) -> String {
        let memory_bytes = f64::from(self.memory_gib) * f64::from(1 << 30);
        let share = self.idle_stored_bytes as f64 / memory_bytes * 100.0;
        let mut out = format!(
            "- {} GiB: an idle guest's first checkpoint stored {:.0} MiB in {:.1} s, its second {:.1} MiB ({share:.2} % of its memory).",
            self.memory_gib,
            mib(self.first_stored_bytes),
            self.first_duration_ms as f64 / 1e3,
            mib(self.idle_stored_bytes)
        );
        if !self.restore_ms.is_empty() {
            let all: Vec<String> = self.restore_ms.iter().map(|ms| format!("{ms:.0}")).collect();
            out += &format!(" From `vm revert` to the first beat: {} ms.", all.join(", "));
        }
        if let Some(Ledger { stored_bytes }) = &self.ledger {
            let all: Vec<String> = stored_bytes.iter().map(|&bytes| format!("{:.0}", mib(bytes))).collect();
            let sum = gib(stored_bytes.iter().sum());
            out += &format!(
                " {} checkpoints with 5 % of the memory changed between them stored {sum:.2} GiB: {} MiB.",
                stored_bytes.len(),
                all.join(", ")
            );
        }
        out
    }
}

impl Report {
    /// The tables.
    pub(super) fn markdown(&self) -> String {
        let Machine { processor, processors, memory_bytes, kernel, file_system, load_before, .. } =
            &self.machine;
        let mut out = format!(
            "{processor}, {processors} processors, {:.0} GiB; Linux {kernel}; {file_system}; load before: {load_before}. {} % of \
             the guests' memory was filled; it lay in {} pages. Milliseconds: median / 99th percentile / most.\n\n{HEAD}\n",
            gib(*memory_bytes),
            self.filled_percent,
            if self.huge_pages { "huge" } else { "ordinary" }
        );
        for machine in &self.machines {
            for series in &machine.series {
                out += &series.row(machine.memory_gib);
                out.push('\n');
            }
        }
        for machine in &self.machines {
            // Writing to a String cannot fail.
            let _ = write!(out, "\n{}", machine.rest());
        }
        out
    }
}
