//! Two stores in turn: one with a past, and one without.

use std::time::Instant;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::Plan;
use super::subject::{LEAF_BYTES, Subject};
use crate::client::{Client, Shape};
use crate::drive;
use crate::meter;
use crate::report::Spread;
use crate::workload::Access;

const DEPTH: usize = 32;
/// So few reads are slow that one round says little of how slow they are.
const COLD_ROUNDS: usize = 5;
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// One store, one round.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Phase {
    pub(super) iops: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// Whether both daemons had become quiet before.
    pub(super) settled: bool,
}

/// All rounds of both.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Rounds {
    pub(super) aged: Vec<Phase>,
    pub(super) young: Vec<Phase>,
}

impl Rounds {
    /// What the past leaves of the rate, round by round.
    pub(super) fn ratio(&self) -> Spread {
        Spread::of(self.aged.iter().zip(&self.young).map(|(aged, young)| aged.iops / young.iops).collect())
    }

    /// Phases that began too early.
    pub(super) fn unsettled(&self) -> usize {
        self.aged.iter().chain(&self.young).filter(|phase| !phase.settled).count()
    }

    /// Medians of a figure, of the store with a past and of the one without.
    pub(super) fn medians(&self, figure: fn(&Phase) -> f64) -> [f64; 2] {
        [&self.aged, &self.young].map(|phases| Spread::of(phases.iter().map(figure).collect()).median)
    }
}

/// Random reads and writes of the working set, 32 in flight.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Rates {
    pub(super) reads: Rounds,
    pub(super) writes: Rounds,
}

/// Microseconds for one block at a time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Touch {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

/// Blocks of leaves that the daemon has not looked up since it was started, read one after the other.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Cold {
    pub(super) blocks: usize,
    /// Whether the daemon had become quiet before.
    pub(super) settled: bool,
    /// As soon as it is quiet, so that the kernel holds the newest part of the index.
    pub(super) opened: Touch,
    /// Of another start, when the kernel holds nothing of the index either.
    pub(super) first: Touch,
    /// The same blocks again.
    pub(super) again: Touch,
}

/// A store with a past, and one without.
pub(super) struct Pair {
    pub(super) aged: Subject,
    pub(super) young: Subject,
}

impl Pair {
    fn both(&mut self) -> [&mut Subject; 2] {
        [&mut self.aged, &mut self.young]
    }

    /// Measures both in turn, round by round; each round begins with the other one.
    ///
    /// # Errors
    /// A request fails.
    pub(super) fn rates(&mut self, plan: &Plan, what: &str) -> Result<Rates> {
        let mut rates = Rates::default();
        for round in 0..plan.rounds {
            for (access, rounds) in [(Access::Read, &mut rates.reads), (Access::Write, &mut rates.writes)] {
                let first_is_aged = round % 2 == 0;
                for is_aged in [first_is_aged, !first_is_aged] {
                    let phase = self.phase(plan, is_aged, access, round)?;
                    let phases = if is_aged { &mut rounds.aged } else { &mut rounds.young };
                    phases.push(phase);
                }
                let rate = |phases: &[Phase]| phases.last().map_or(0.0, |phase| phase.iops / 1e3);
                let (aged, young) = (rate(&rounds.aged), rate(&rounds.young));
                eprintln!("{what}, round {}: {access:?} {aged:.1} k/s, empty {young:.1} k/s", round + 1);
            }
        }
        Ok(rates)
    }

    fn phase(&mut self, plan: &Plan, aged: bool, access: Access, round: usize) -> Result<Phase> {
        let mut settled = true;
        for subject in self.both() {
            settled &= meter::settle(subject.ours.pid()?)?;
        }
        let subject = if aged { &mut self.aged } else { &mut self.young };
        let job = plan.inside(access, 1000 * (round as u64 + 1));
        let shape = Shape { queues: 1, depth: DEPTH, request_bytes: job.bytes };
        let outcome = drive::run(&mut Client::connect(&subject.ours.place(), shape)?, &job, || ())?;
        if access == Access::Write {
            subject.logged += outcome.slices.iter().sum::<u64>();
        }
        let us = |quantile| outcome.latency.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Phase {
            iops: outcome.operations as f64 / outcome.seconds,
            p50_us: us(0.5),
            p99_us: us(0.99),
            settled,
        })
    }

    /// Opens both stores anew, twice, and touches leaves of each; in turn, each round beginning with the other one.
    ///
    /// # Errors
    /// A daemon does not start, or a read fails.
    pub(super) fn cold(&mut self, plan: &Plan) -> Result<[Vec<Cold>; 2]> {
        let mut offsets: Vec<u64> =
            drive::places(&plan.recent())?.take(plan.recent_writes as usize).collect();
        let mut seen = std::collections::HashSet::new();
        offsets.retain(|offset| seen.insert(offset / LEAF_BYTES));
        offsets.truncate(plan.cold);
        let mut rounds = [Vec::new(), Vec::new()];
        for round in 0..COLD_ROUNDS {
            for which in [round % 2, 1 - round % 2] {
                let cold = touch_cold(self.both()[which], &offsets)?;
                let who = ["with the past", "without"][which];
                eprintln!(
                    "leaves, {who}, after an opening: {:?}, cold: {:?}, the same again: {:?}",
                    cold.opened, cold.first, cold.again
                );
                rounds[which].push(cold);
            }
        }
        Ok(rounds)
    }
}

fn touch_cold(subject: &mut Subject, offsets: &[u64]) -> Result<Cold> {
    let (mut client, quiet) = quiet_again(subject)?;
    let opened = touch(&mut client, offsets)?;
    drop(client);
    let (mut client, settled) = quiet_again(subject)?;
    subject.drop_cached_index()?;
    let first = touch(&mut client, offsets)?;
    let again = touch(&mut client, offsets)?;
    Ok(Cold { blocks: offsets.len(), settled: settled && quiet, opened, first, again })
}

/// Opens a store anew, and connects to it when it is quiet; says whether it has become so.
fn quiet_again(subject: &mut Subject) -> Result<(Client, bool)> {
    subject.open_anew(None)?;
    let settled = meter::settle(subject.ours.pid()?)?;
    let shape = Shape { queues: 1, depth: 1, request_bytes: super::subject::BLOCK as usize };
    Ok((Client::connect(&subject.ours.place(), shape)?, settled))
}

fn touch(client: &mut Client, offsets: &[u64]) -> Result<Touch> {
    let mut latency = Histogram::<u64>::new(3)?;
    let lane = &mut client.lanes()[0];
    let bytes = lane.shape().request_bytes;
    let mut block = vec![0; bytes];
    for &offset in offsets {
        let start = Instant::now();
        lane.read(0, offset, bytes);
        let done = lane.reap(1, PATIENCE)?;
        ensure!(matches!(done, [done] if done.ok), "reading byte {offset}: {done:?}");
        latency.record(start.elapsed().as_nanos() as u64)?;
        lane.copy(0, &mut block);
        ensure!(block.iter().any(|byte| *byte != 0), "byte {offset} was written, and reads as zeroes");
    }
    let us = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    Ok(Touch { p50_us: us(0.5), p99_us: us(0.99) })
}
