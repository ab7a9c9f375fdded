//! Many branches of one volume, and many volumes of one store.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
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
/// Writes on each of many volumes.
const ON_VOLUME: u64 = 64;

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
        let shape = Shape { queues: 1, depth: 8, request_bytes: BLOCK as usize };
        let job = plan.history(index as u64, ON_VOLUME);
        drive::run(&mut Client::connect(&place, shape)?, &job, || ())?;
        places.push(place);
        if index % 100 == 99 {
            eprintln!("{} volumes in {:.0} s", index + 1, start.elapsed().as_secs_f64());
        }
    }
    subject.write_and_kill(&plan.recent())?;

    let start = Instant::now();
    subject.ours.spawn()?;
    let pid = subject.ours.pid()?;
    let watch = MemoryWatch::new(pid);
    let elapsed_ms = || start.elapsed().as_secs_f64() * 1e3;
    read_when_served(&mut subject.ours, &places[0], 0)?;
    let (first_read_ms, rss_bytes) = (elapsed_ms(), meter::rss(pid)?);
    for place in &places[1..] {
        read_when_served(&mut subject.ours, place, 0)?;
    }
    let (all_read_ms, rss_all_bytes) = (elapsed_ms(), meter::rss(pid)?);
    eprintln!("first read after {first_read_ms:.0} ms, of all after {all_read_ms:.0} ms");
    let rss_anon_max_bytes = watch.most();
    subject.ours.destroy()?;
    Ok(Crowd { volumes, first_read_ms, all_read_ms, rss_bytes, rss_all_bytes, rss_anon_max_bytes })
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
