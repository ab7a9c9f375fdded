//! What is measured: a daemon, and a machine that beats.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Cdpd, Guest, GuestBuilder, Running, Scene, Tool};
use serde_json::Value;

use super::beats::{Beats, Span, now_ns};

pub(super) const NAME: &str = "bench";
/// Filling 16 GiB of an emulated guest's memory takes a minute.
const FILL: Duration = Duration::from_secs(300);
const ANSWER: Duration = Duration::from_secs(60);

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Duty {
    /// Memory filled with what does not compress.
    pub(crate) fill_mib: u64,
    /// Of which so much changes when it is told so.
    pub(crate) dirty_mib: u64,
    /// Whether it asks its disk for something all the time.
    pub(crate) disk: bool,
}

/// Requests to the disk, by the guest's clock, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Latency {
    pub(crate) requests: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

/// A checkpoint that was taken.
pub(crate) struct Taken {
    pub(crate) id: String,
    pub(crate) figures: Value,
    /// From the request to the answer.
    pub(crate) window: Span,
    /// Between QEMU's own events.
    pub(crate) stopped: Span,
}

impl Taken {
    /// One of the figures that the checkpoint has of itself.
    pub(crate) fn figure(&self, name: &str) -> Result<u64> {
        self.figures[name].as_u64().with_context(|| format!("no '{name}' in {}", self.figures))
    }
}

/// A machine, and its daemon.
pub(crate) struct Subject<'a> {
    scene: &'a Scene,
    pub(crate) cdpd: Cdpd,
    tool: Tool,
    builder: GuestBuilder,
    port: PathBuf,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(scene: &'a Scene, memory_gib: u32, cpus: u32, huge_pages: bool) -> Result<Self> {
        let cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let disk = tool.create_and_serve(scene, NAME, "1G", cpus)?;
        let (qmp, port) = (scene.path("bench.qmp"), scene.path("beats"));
        tool.run(&["vm", "register", NAME, "--qmp", &text(&qmp), "--volume", NAME])?;
        let builder = Guest::builder().disk(&disk).queues(cpus).smp(cpus).memory_mb(memory_gib << 10);
        let builder = builder.qmp(&qmp).serial(&port);
        let builder = if huge_pages { builder.huge_pages() } else { builder };
        Ok(Self { scene, cdpd, tool, builder, port })
    }

    pub(crate) fn boot(&self) -> Result<Guest> {
        self.builder.clone().boot(self.scene)
    }

    /// Sets a guest to work, and waits until it beats. What runs on is what says what it has done.
    pub(crate) fn set_to_work(&self, guest: &mut Guest, duty: Duty) -> Result<(Beats, Running)> {
        let beats = Beats::listen(&self.port)?;
        guest.run("stty -F /dev/ttyS2 raw -echo")?;
        let Duty { fill_mib, dirty_mib, disk } = duty;
        let disk = if disk { " /dev/vda" } else { "" };
        let mut running =
            guest.spawn(&format!("exec guest-agent beat /dev/ttyS2 {fill_mib} {dirty_mib}{disk}"))?;
        let said = running.next_line(FILL)?;
        ensure!(said == "filled", "the guest said: {said}");
        beats.first_after(now_ns())?;
        Ok((beats, running))
    }

    /// Takes a checkpoint.
    pub(crate) fn take(&self, guest: &mut Guest, mode: &str) -> Result<Taken> {
        guest.qmp().take_events()?;
        let from = now_ns();
        let taken = self.tool.json(&["checkpoint", "take", NAME, "--mode", mode])?;
        let window = Span { from, to: now_ns() };
        let events = guest.qmp().take_events()?;
        let at = |name: &str| {
            // Of an attempt that came to nothing there are others before; they count among the other stalls.
            let event = events.iter().rev().find(|event| event["event"] == name);
            event.and_then(event_ns).with_context(|| format!("QEMU has not said {name}: {events:?}"))
        };
        let stopped = Span { from: at("STOP")?, to: at("RESUME")? };
        let id = taken["id"].as_u64().with_context(|| format!("no id in {taken}"))?.to_string();
        Ok(Taken { id, figures: taken["figures"].clone(), window, stopped })
    }

    /// Has another QEMU go on from a checkpoint: the time from the request to the first beat, and the guest.
    pub(crate) fn bring_back(&self, id: &str) -> Result<(Span, Guest)> {
        let guest = self.builder.clone().waiting().boot(self.scene)?;
        let beats = Beats::listen(&self.port)?;
        let from = now_ns();
        self.tool.run(&["vm", "revert", NAME, "--to", id])?;
        Ok((Span { from, to: beats.first_after(from)? }, guest))
    }
}

/// The latencies outside and inside of the windows that the guest was told of, since it was asked last.
pub(crate) fn latencies(beats: &Beats, running: &mut Running) -> Result<[Latency; 2]> {
    beats.command(b'r')?;
    let said = running.next_line(ANSWER)?;
    parse(&said).with_context(|| format!("the guest said: {said}"))
}

/// `latency outside COUNT P50 P99 MAX inside COUNT P50 P99 MAX`
fn parse(said: &str) -> Option<[Latency; 2]> {
    let numbers: Vec<u64> = said.split(' ').filter_map(|word| word.parse().ok()).collect();
    let of = |at: usize| {
        let [requests, p50_us, p99_us, max_us] = numbers.get(at..at + 4)?.try_into().ok()?;
        Some(Latency { requests, p50_us, p99_us, max_us })
    };
    Some([of(0)?, of(4)?])
}

/// Has the guest change what it was told to, and waits for that.
pub(crate) fn dirty(beats: &Beats, running: &mut Running) -> Result<()> {
    beats.command(b'd')?;
    let said = running.next_line(ANSWER)?;
    ensure!(said == "dirtied", "the guest said: {said}");
    Ok(())
}

fn event_ns(event: &Value) -> Option<u64> {
    let at = &event["timestamp"];
    Some(at["seconds"].as_u64()? * 1_000_000_000 + at["microseconds"].as_u64()? * 1000)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_the_guest_says_of_its_disk_is_read() {
        let [outside, inside] = parse("latency outside 9 1 2 3 inside 8 4 5 6").unwrap();
        assert_eq!(outside, Latency { requests: 9, p50_us: 1, p99_us: 2, max_us: 3 });
        assert_eq!(inside.p99_us, 5);
        assert!(parse("latency outside 9 1 2 3").is_none());
    }
}
