//! Medians, spreads and ratios; JSON with everything, Markdown with what matters.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::drive::{Outcome, SLICE};
use crate::machine::{Machine, gib};
use crate::workload::Workload;

/// What our store has prepared at most: 4 segments of 256 MiB, and four times as many once guests have used them up, filled
/// with zeroes ahead.
const POOL_BYTES: u64 = 16 * (256 << 20);

/// How everything was measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Settings {
    /// The working set.
    pub(crate) size_bytes: u64,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) warmup_ms: u64,
    /// The most that one workload may write into our store.
    pub(crate) store_budget_bytes: u64,
}

/// One run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) workloads: Vec<WorkloadReport>,
}

/// One server, one workload, one round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Phase {
    /// Operations per second.
    pub(crate) iops: f64,
    pub(crate) mib_per_s: f64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// CPU time of the server. For raw `io_uring`, of the client, which does the server's work.
    pub(crate) cpu_seconds: f64,
    pub(crate) cpu_us_per_operation: f64,
    /// Which part of it our daemon spent on the time index, RocksDB's threads included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index_cpu_share: Option<f64>,
    /// Whether our daemon had become quiet before.
    pub(crate) settled: bool,
    /// Operations in each tenth of a second, warm-up included.
    pub(crate) slices: Vec<u64>,
    /// For a sustained workload: IOPS while our pool of prepared segments can last, and afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) around_the_pool: Option<AroundThePool>,
}

/// A sustained phase, cut where as many bytes were written as the pool holds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct AroundThePool {
    pub(crate) iops_within: f64,
    /// None if it ended before, as where there is little space.
    pub(crate) iops_past: Option<f64>,
    /// The slowest full second past it, if there was one.
    pub(crate) slowest_second_past: Option<u64>,
    pub(crate) bytes: u64,
}

impl Phase {
    pub(crate) fn new(outcome: &Outcome, workload: &Workload, cpu_seconds: f64, settled: bool) -> Self {
        let iops = outcome.operations as f64 / outcome.seconds;
        let us = |quantile| outcome.latency.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            iops,
            mib_per_s: iops * workload.bytes as f64 / f64::from(1 << 20),
            seconds: outcome.seconds,
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
            cpu_seconds,
            cpu_us_per_operation: cpu_seconds * 1e6 / outcome.operations as f64,
            index_cpu_share: None,
            settled,
            slices: outcome.slices.clone(),
            around_the_pool: workload
                .sustained
                .then(|| around_the_pool(&outcome.slices, workload.bytes as u64)),
        }
    }
}

fn around_the_pool(slices: &[u64], bytes: u64) -> AroundThePool {
    let mut within = 0;
    let mut sum = 0;
    while within < slices.len() && (sum + slices[within]) * bytes <= POOL_BYTES {
        sum += slices[within];
        within += 1;
    }
    // The last slice is not a whole one.
    let past = slices.get(within..slices.len().saturating_sub(1)).unwrap_or_default();
    let rate =
        |operations: u64, slices: usize| operations as f64 / (slices.max(1) as f64 * SLICE.as_secs_f64());
    let seconds = past.windows(10).map(|second| second.iter().sum::<u64>());
    AroundThePool {
        iops_within: rate(sum, within),
        iops_past: (!past.is_empty()).then(|| rate(past.iter().sum(), past.len())),
        slowest_second_past: seconds.min(),
        bytes: slices.iter().sum::<u64>() * bytes,
    }
}

/// One server's rounds.
#[derive(Debug, Serialize)]
pub(crate) struct TargetReport {
    pub(crate) name: &'static str,
    pub(crate) phases: Vec<Phase>,
}

impl TargetReport {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, phases: Vec::new() }
    }

    fn spread(&self, figure: impl Fn(&Phase) -> f64) -> Spread {
        Spread::of(self.phases.iter().map(figure).collect())
    }
}

/// A median and the extremes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one figure.
    pub(crate) fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (figures.first(), figures.last()) else {
            return Self { median: f64::NAN, min: f64::NAN, max: f64::NAN };
        };
        let (low, high) = (figures[(figures.len() - 1) / 2], figures[figures.len() / 2]);
        Self { median: f64::midpoint(low, high), min, max }
    }
}

/// The figure that so many percent are no higher than; 0 of none.
pub(crate) fn percentile(figures: &[f64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
}

/// One workload: all servers, and the first of them (ours, if it was measured) against each of the others.
#[derive(Debug, Serialize)]
pub(crate) struct WorkloadReport {
    pub(crate) workload: Workload,
    pub(crate) targets: Vec<TargetReport>,
    pub(crate) iops: Vec<Spread>,
    pub(crate) ratios: Vec<Ratio>,
    /// The most anonymous memory that our daemon has had since its store was made.
    pub(crate) our_rss_anon_max_bytes: Option<u64>,
}

/// The first server's IOPS divided by another's, round by round; of a paced workload, its p99.9.
#[derive(Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) to: &'static str,
    #[serde(flatten)]
    pub(crate) spread: Spread,
}

impl WorkloadReport {
    pub(crate) fn new(workload: Workload, targets: Vec<TargetReport>, rss: Option<u64>) -> Self {
        let figure = |phase: &Phase| if workload.paced { phase.p999_us } else { phase.iops };
        let ratio = |other: &TargetReport| {
            let pairs = targets[0].phases.iter().zip(&other.phases);
            let ratios = pairs.map(|(own, other)| figure(own) / figure(other));
            Ratio { to: other.name, spread: Spread::of(ratios.collect()) }
        };
        let ratios = targets[1..].iter().map(ratio).collect();
        let iops = targets.iter().map(|target| target.spread(|phase| phase.iops)).collect();
        Self { workload, targets, iops, ratios, our_rss_anon_max_bytes: rss }
    }

    fn rows(&self, out: &mut String) {
        for (index, target) in self.targets.iter().enumerate() {
            let iops = self.iops[index];
            let ratio = match index.checked_sub(1).map(|other| self.ratios[other].spread) {
                Some(Spread { median, min, max }) => {
                    let of = if self.workload.paced { " of p99.9" } else { "" };
                    format!("**{median:.2}**{of} ({min:.2}–{max:.2})")
                }
                None => String::new(),
            };
            let name = if index == 0 { self.workload.name } else { "" };
            let median = |figure: fn(&Phase) -> f64| target.spread(figure).median;
            put(
                out,
                format_args!(
                    "| {name} | {} | {:.1} ({:.1}–{:.1}) | {:.0} | {ratio} | {:.0} / {:.0} / {:.0} | {:.2} |",
                    target.name,
                    iops.median / 1e3,
                    iops.min / 1e3,
                    iops.max / 1e3,
                    median(|phase| phase.mib_per_s),
                    median(|phase| phase.p50_us),
                    median(|phase| phase.p99_us),
                    median(|phase| phase.p999_us),
                    median(|phase| phase.cpu_us_per_operation),
                ),
            );
        }
    }

    fn pool_rows(&self, out: &mut String) {
        for target in &self.targets {
            for (round, phase) in (1..).zip(&target.phases) {
                let Some(pool) = phase.around_the_pool else { continue };
                let past = |iops: Option<f64>| {
                    iops.map_or_else(|| "–".to_owned(), |iops| format!("{:.1}", iops / 1e3))
                };
                put(
                    out,
                    format_args!(
                        "| {} | {round} | {:.1} | {:.1} | {} | {} |",
                        target.name,
                        gib(pool.bytes),
                        pool.iops_within / 1e3,
                        past(pool.iops_past),
                        past(pool.slowest_second_past.map(|second| second as f64)),
                    ),
                );
            }
        }
    }
}

impl Report {
    /// The tables.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        let machine = &self.machine;
        put(
            &mut out,
            format_args!(
                "{}, {} processors, {:.0} GiB; Linux {}; {}; {}; load before: {}. {}.\n",
                machine.processor,
                machine.processors,
                gib(machine.memory_bytes),
                machine.kernel,
                machine.file_system,
                machine.storage_daemon,
                machine.load_before,
                self.settings.describe()
            ),
        );
        let first =
            self.workloads.first().and_then(|report| report.targets.first()).map_or("", |target| target.name);
        put(
            &mut out,
            format_args!(
                "kIOPS and ratios: median (least–most) of the rounds. A row's ratio is that of {first} to its server; \
                 at half load, which is half of what qemu-storage-daemon can do, it is that of their p99.9, and less is \
                 better.\n\n\
                 | workload | server | kIOPS | MiB/s | ratio | p50 / p99 / p99.9, µs | server CPU, µs per operation |\n\
                 | --- | --- | --- | --- | --- | --- | --- |"
            ),
        );
        self.workloads.iter().for_each(|report| report.rows(&mut out));
        if self.workloads.iter().any(|report| report.workload.sustained) {
            put(
                &mut out,
                format_args!(
                    "\nkIOPS of the sustained writes, within the first {:.0} GiB (what our pool of prepared segments \
                     holds) and past them:\n\n\
                     | server | round | GiB | within | past | slowest second past |\n\
                     | --- | --- | --- | --- | --- | --- |",
                    gib(POOL_BYTES)
                ),
            );
            self.workloads.iter().for_each(|report| report.pool_rows(&mut out));
        }
        if let Some(most) = self.workloads.iter().filter_map(|report| report.our_rss_anon_max_bytes).max() {
            put(
                &mut out,
                format_args!(
                    "\nOur daemon's anonymous memory, at most: {:.0} MiB.",
                    most as f64 / f64::from(1 << 20)
                ),
            );
        }
        let written = self.workloads.iter().filter(|report| report.workload.writes());
        let shares: Vec<f64> = written
            .flat_map(|report| report.targets[0].phases.iter().filter_map(|phase| phase.index_cpu_share))
            .collect();
        if !shares.is_empty() {
            let Spread { median, min, max } = Spread::of(shares);
            put(
                &mut out,
                format_args!(
                    "\nOf our daemon's CPU time in phases that write, {:.0} % ({:.0}–{:.0}) went into the time index, RocksDB's \
                     threads included.",
                    median * 100.0,
                    min * 100.0,
                    max * 100.0
                ),
            );
        }
        let phases =
            self.workloads.iter().flat_map(|report| &report.targets).flat_map(|target| &target.phases);
        let unsettled = phases.filter(|phase| !phase.settled).count();
        if unsettled > 0 {
            put(&mut out, format_args!("\n**{unsettled} phases began while our daemon was still busy.**"));
        }
        out
    }
}

fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
    }

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let figures: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&figures, percent)), [100.0, 198.0, 200.0]);
        assert_eq!(percentile(&figures[..1], 99), 200.0);
    }

    #[test]
    fn a_sustained_phase_is_cut_where_the_pool_ends() {
        // 4 GiB are 32,768 requests of 128 KiB: twenty slices of 1600, then as many slower ones and a rest.
        let mut slices = vec![1600; 20];
        slices.extend([800; 20]);
        slices.push(3);
        let pool = around_the_pool(&slices, 128 << 10);
        let figures = |pool: AroundThePool| (pool.iops_within, pool.iops_past, pool.slowest_second_past);
        assert_eq!(figures(pool), (16000.0, Some(8000.0), Some(8000)));
        assert_eq!(pool.bytes, (32000 + 16000 + 3) * (128 << 10));
        slices.truncate(20);
        assert_eq!(figures(around_the_pool(&slices, 128 << 10)), (16000.0, None, None));
    }
}
