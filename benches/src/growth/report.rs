//! Tables of what a long past costs.

use std::fmt::Write;

use serde::Serialize;

use super::crowd::Crowd;
use super::pair::{Cold, Rates, Rounds, Touch};
use super::subject::{BLOCK, Opening};
use super::{Branched, Figures, Plan, Point};
use crate::machine::{Machine, gib};
use crate::report::Spread;

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) plan: Plan,
    pub(super) points: Vec<Point>,
    pub(super) branched: Option<Branched>,
    pub(super) crowd: Option<Crowd>,
}

impl Point {
    /// What the history's writes take of the index, each.
    pub(super) fn index_bytes_per_write(&self) -> Option<f64> {
        (self.writes > 0).then(|| self.index_bytes as f64 / self.writes as f64)
    }
}

impl Figures {
    /// From starting the killed daemon to its first read, in milliseconds: with a past, and without.
    pub(super) fn first_read_ms(&self) -> [Spread; 2] {
        self.openings
            .each_ref()
            .map(|all| Spread::of(all.iter().map(|opening| opening.first_read_ms).collect()))
    }

    /// Bytes of log and index for each byte written, 32 in flight.
    fn bytes_per_byte(&self) -> [f64; 2] {
        [self.log.log_bytes, self.index_growth_bytes]
            .map(|bytes| bytes as f64 / self.log.payload_bytes as f64)
    }
}

impl Report {
    /// The tables.
    pub(super) fn markdown(&self) -> String {
        let mut out = self.introduction();
        let mut rows: Vec<(String, &Figures)> =
            self.points.iter().map(|point| (format!("{} writes", point.writes), &point.figures)).collect();
        let branched = self.branched.iter();
        rows.extend(branched.map(|branched| (format!("{} branches", branched.branches), &branched.figures)));
        if !rows.is_empty() {
            rates(&mut out, &rows);
            leaves(&mut out, &rows);
            openings(&mut out, &rows);
            space(&mut out, &rows);
        }
        if self.points.iter().any(|point| point.writes > 0) {
            histories(&mut out, &self.points);
        }
        if let Some(crowd) = &self.crowd {
            put(&mut out, format_args!("\n{}", crowd.describe()));
        }
        out
    }

    fn introduction(&self) -> String {
        let Machine { processor, processors, kernel, file_system, load_before, .. } = &self.machine;
        let Plan { size_bytes, spread_bytes, working_set_bytes, keep_bytes, small_budget_bytes, .. } =
            self.plan;
        format!(
            "{processor}, {processors} processors; Linux {kernel}; {file_system}; load before: {load_before}. Sparse \
             volumes of {:.0} GiB; the history is spread over {:.0} GiB, the working set of {:.2} GiB is newer and lies \
             beside it. Of a history, all that is older than its newest {:.0} GiB was given back to the disk while it was \
             written: all of the time index is there, old data is not. Each figure is measured in turn with a store \
             without a past. Ratios: with a past to without, median (least–most) of {} rounds. Past the budget: the map's \
             is {:.2} MiB. Reads and writes: random, 4 KiB, 32 in flight.\n",
            gib(size_bytes),
            gib(spread_bytes),
            gib(working_set_bytes),
            gib(keep_bytes),
            self.plan.rounds,
            mib(small_budget_bytes),
        )
    }
}

fn rates(out: &mut String, rows: &[(String, &Figures)]) {
    put(
        out,
        format_args!(
            "| past | budget | what | kIOPS, with a past and without | ratio | p50, µs | p99, µs |\n\
             | --- | --- | --- | --- | --- | --- | --- |"
        ),
    );
    for (past, figures) in rows {
        for (budget, Rates { reads, writes }) in [("within", &figures.within), ("past", &figures.past_budget)]
        {
            for (what, rounds) in [("reads", reads), ("writes", writes)] {
                put(out, format_args!("| {past} | {budget} | {what} | {}", rate(rounds)));
            }
        }
    }
    let rounds = |rates: &Rates| [&rates.reads, &rates.writes].map(Rounds::unsettled).iter().sum::<usize>();
    let cold = |figures: &Figures| figures.cold.iter().flatten().filter(|cold| !cold.settled).count();
    let unsettled: usize = rows
        .iter()
        .map(|(_, figures)| rounds(&figures.within) + rounds(&figures.past_budget) + cold(figures))
        .sum();
    if unsettled > 0 {
        put(out, format_args!("\n**{unsettled} phases began while a daemon was still busy.**"));
    }
}

fn rate(rounds: &Rounds) -> String {
    let Spread { median, min, max } = rounds.ratio();
    let [aged, young] = rounds.medians(|phase| phase.iops / 1e3);
    let [aged_p50, young_p50] = rounds.medians(|phase| phase.p50_us);
    let [aged_p99, young_p99] = rounds.medians(|phase| phase.p99_us);
    format!(
        "{aged:.1} / {young:.1} | **{median:.2}** ({min:.2}–{max:.2}) | {aged_p50:.0} / {young_p50:.0} | \
         {aged_p99:.0} / {young_p99:.0} |"
    )
}

fn leaves(out: &mut String, rows: &[(String, &Figures)]) {
    put(
        out,
        format_args!(
            "\nBlocks of leaves that were not looked up since a start, one at a time: when the daemon has become quiet and the \
             kernel holds the newest part of the index (opened), when it holds nothing of it (cold), and the same blocks \
             again: p50 / p99, µs, medians of the rounds; ratios: median (least–most).\n\n\
             | past | blocks | opened | cold | again | without a past: opened | cold | again | p99 to without: opened | cold |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        ),
    );
    for (past, figures) in rows {
        let [aged, young] = &figures.cold;
        let columns: [fn(&Cold) -> Touch; 3] = [|cold| cold.opened, |cold| cold.first, |cold| cold.again];
        let of = |rounds: &[Cold]| {
            let median = |figures: Vec<f64>| Spread::of(figures).median;
            let column = |touch: fn(&Cold) -> Touch| {
                let p50 = median(rounds.iter().map(|cold| touch(cold).p50_us).collect());
                let p99 = median(rounds.iter().map(|cold| touch(cold).p99_us).collect());
                format!("{p50:.0} / {p99:.0}")
            };
            columns.map(column).join(" | ")
        };
        let ratio = |touch: fn(&Cold) -> Touch| {
            let rounds = aged.iter().zip(young).map(|(aged, young)| touch(aged).p99_us / touch(young).p99_us);
            let Spread { median, min, max } = Spread::of(rounds.collect());
            format!("**{median:.2}** ({min:.2}–{max:.2})")
        };
        let blocks = aged.first().map_or(0, |cold| cold.blocks);
        put(
            out,
            format_args!(
                "| {past} | {blocks} | {} | {} | {} | {} |",
                of(aged),
                of(young),
                ratio(columns[0]),
                ratio(columns[1])
            ),
        );
    }
}

fn openings(out: &mut String, rows: &[(String, &Figures)]) {
    put(
        out,
        format_args!(
            "\nFrom starting a killed daemon to its first read: median (least–most).\n\n\
             | past | first read, ms | without a past | resident then, MiB | anonymous at most, MiB | anonymous under \
             load, MiB |\n| --- | --- | --- | --- | --- | --- |"
        ),
    );
    for (past, figures) in rows {
        let [aged, young] = figures
            .first_read_ms()
            .map(|Spread { median, min, max }| format!("{median:.0} ({min:.0}–{max:.0})"));
        let most = |bytes: fn(&Opening) -> u64| mib(figures.openings[0].iter().map(bytes).max().unwrap_or(0));
        put(
            out,
            format_args!(
                "| {past} | {aged} | {young} | {:.0} | {:.0} | {:.0} |",
                most(|opening| opening.rss_bytes),
                most(|opening| opening.rss_anon_max_bytes),
                mib(figures.rss_anon_max_bytes)
            ),
        );
    }
}

fn space(out: &mut String, rows: &[(String, &Figures)]) {
    put(
        out,
        format_args!(
            "\nBytes of log (headers, padding and unused ends of segments included) and of the time index (images \
             included) for each byte that was then written at random into the working set, 32 in flight.\n\n\
             | past | log | index | both |\n| --- | --- | --- | --- |"
        ),
    );
    for (past, figures) in rows {
        let [log, index] = figures.bytes_per_byte();
        put(out, format_args!("| {past} | {log:.4} | {index:.4} | {:.4} |", log + index));
    }
}

fn histories(out: &mut String, points: &[Point]) {
    put(
        out,
        format_args!(
            "\nThe history itself:\n\n| writes | index, GiB | index bytes per write | per byte written | anonymous memory \
             at most, MiB |\n| --- | --- | --- | --- | --- |"
        ),
    );
    for point in points {
        let Some(per_write) = point.index_bytes_per_write() else { continue };
        put(
            out,
            format_args!(
                "| {} | {:.2} | {per_write:.1} | {:.4} | {:.0} |",
                point.writes,
                gib(point.index_bytes),
                per_write / BLOCK as f64,
                mib(point.rss_anon_max_writing_bytes)
            ),
        );
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{line}");
}
