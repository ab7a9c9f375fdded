//! Many branches of one volume, and many volumes of one store.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::Plan;
use super::subject::{BLOCK, Subject};
use crate::api::Api;
use crate::client::{Client, Place, Shape};
use crate::drive::{self, Job};
use crate::home::Home;
use crate::meter::{self, MemoryWatch};
use crate::recovery::read_when_served;
use crate::server::VOLUME;
use crate::workload::Access;

/// Writes on a branch before the next one begins.
const ON_BRANCH: u64 = 64;
/// Writes on each of many volumes, and on each once more shortly before the kill.
const ON_VOLUME: u64 = 64;
const AT_LAST: u64 = 4;
/// Writes on one of them during which the daemon is killed.
const BEFORE_KILL: u64 = 20_000;

/// A store with many volumes.
#[derive(Debug, Serialize)]
pub(super) struct Crowd {
    volumes: usize,
    /// From starting the killed daemon to the end of the first read, of one volume.
    pub(super) first_read_ms: f64,
    /// To the end of the first read of the last of them, one after the other.
    pub(super) all_read_ms: f64,
    /// When one had been read.
    pub(super) rss_bytes: u64,
    /// When all had been read.
    pub(super) rss_all_bytes: u64,
    /// The most, until all had been read.
    pub(super) rss_anon_max_bytes: u64,
}

/// Gives a volume so many branches: one half are clones of it, the other half are its own, each of which begins at the end
/// of the one before.
///
/// # Errors
/// The daemon refuses.
pub(super) fn branch(subject: &mut Subject, plan: &Plan, branches: usize) -> Result<()> {
    let api = Api::of(&subject.ours);
    let start = Instant::now();
    for index in 0..branches / 2 {
        let body = json!({"clones": [{"source": VOLUME, "name": format!("clone{index}")}]});
        api.timed("POST", "/v1/clone", &body)?;
    }
    for index in branches / 2..branches {
        let job = Job {
            warmup: Duration::ZERO,
            limit_bytes: ON_BRANCH * BLOCK,
            ..plan.inside(Access::Write, index as u64)
        };
        subject.write(&job, 1)?;
        let body = json!({"volumes": [{"name": VOLUME, "at": format!("seq:{}", api.head()?)}]});
        api.retrying(|api| api.timed("POST", "/v1/revert", &body))?;
        if index % 100 == 99 {
            eprintln!("{} branches in {:.0} s", index + 1, start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// Kills a daemon that serves so many volumes, each with some writes, while one is written, and starts it again.
///
/// # Errors
/// The daemon refuses, or does not come back.
pub(super) fn volumes(home: &Home, plan: &Plan, volumes: usize) -> Result<Crowd> {
    eprintln!("a store with {volumes} volumes");
    let dir = home.dir().join("crowd");
    let mut subject = Subject::new(&dir, plan)?;
    let api = Api::of(&subject.ours);
    let mut places = vec![subject.ours.place()];
    let start = Instant::now();
    for index in 1..volumes {
        let name = format!("volume{index}");
        let socket: PathBuf = dir.join(format!("{index}.sock"));
        let new = json!({"name": name, "size_bytes": plan.size_bytes});
        api.timed("POST", "/v1/volumes", &new)?;
        let serve = json!({"socket": socket, "queues": 1});
        api.timed("PUT", &format!("/v1/volumes/{name}/serve"), &serve)?;
        let place = Place::VhostUser(socket);
        write(plan, &place, index, ON_VOLUME)?;
        places.push(place);
        if index % 100 == 99 {
            eprintln!("{} volumes in {:.0} s", index + 1, start.elapsed().as_secs_f64());
        }
    }
    // A volume that nobody has written for two seconds is as after a clean stop.
    let start = Instant::now();
    for (index, place) in places.iter().enumerate().skip(1) {
        write(plan, place, index, AT_LAST)?;
    }
    eprintln!("each written once more in {:.1} s", start.elapsed().as_secs_f64());
    let last = plan.history(0, BEFORE_KILL);
    subject.write_and_kill(&last)?;

    let start = Instant::now();
    subject.ours.spawn()?;
    let pid = subject.ours.pid()?;
    let watch = MemoryWatch::new(pid);
    let elapsed_ms = || start.elapsed().as_secs_f64() * 1e3;
    read_written(&mut subject, &places[0], &last)?;
    let (first_read_ms, rss_bytes) = (elapsed_ms(), meter::rss(pid)?);
    for (index, place) in places.iter().enumerate().skip(1) {
        read_written(&mut subject, place, &plan.history(index as u64, AT_LAST))?;
    }
    let (all_read_ms, rss_all_bytes) = (elapsed_ms(), meter::rss(pid)?);
    eprintln!("first read after {first_read_ms:.0} ms, of all after {all_read_ms:.0} ms");
    let rss_anon_max_bytes = watch.most();
    subject.ours.destroy()?;
    Ok(Crowd { volumes, first_read_ms, all_read_ms, rss_bytes, rss_all_bytes, rss_anon_max_bytes })
}

fn write(plan: &Plan, place: &Place, index: usize, count: u64) -> Result<()> {
    let shape = Shape { queues: 1, depth: 8, request_bytes: BLOCK as usize };
    drive::run(&mut Client::connect(place, shape)?, &plan.history(index as u64, count), || ()).map(drop)
}

/// Reads the first block that a job has written, and sees that it was.
fn read_written(subject: &mut Subject, place: &Place, job: &Job) -> Result<()> {
    let offset = drive::places(job)?.next().context("the job writes nothing")?;
    let mut client = read_when_served(&mut subject.ours, place, offset)?;
    let mut block = [0; BLOCK as usize];
    client.lanes()[0].copy(0, &mut block);
    ensure!(block.iter().any(|byte| *byte != 0), "byte {offset} was written, and reads as zeroes");
    Ok(())
}

impl Crowd {
    /// One paragraph for people.
    pub(super) fn describe(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{} volumes, killed: first read after {:.0} ms, the first of each after {:.0} ms in all. Resident memory: \
             {:.0} MiB after the first read, {:.0} MiB after all; anonymous at most {:.0} MiB.",
            self.volumes,
            self.first_read_ms,
            self.all_read_ms,
            mib(self.rss_bytes),
            mib(self.rss_all_bytes),
            mib(self.rss_anon_max_bytes)
        )
    }
}
