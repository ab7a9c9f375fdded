//! Checkpoints that nobody asks for, every so often, and the oldest of them deleted.
//!
//! Scheduled checkpoints are told from others by their labels alone: `auto-` and the time. One that is pinned, or given
//! another label, is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cdp_store::clock::{Clock, SystemClock};
use cdp_store::{CheckpointInfo, CheckpointState, VmInfo};
use cdp_types::{Label, VmName};
use jiff::Timestamp;
use jiff::fmt::strtime;
use tokio::task::JoinSet;

use super::Settings;
use crate::api::{ApiError, ErrorKind, NewCheckpoint, Schedule, Supervised};
use crate::http::App;

/// What the labels of scheduled checkpoints begin with.
const PREFIX: &str = "auto-";
/// How often machines are looked at: how late a checkpoint may be.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// One that came to nothing is tried again after a tenth of the time between two, but not before ten times what it took, since
/// it may have sent all of the machine's memory over and over.
const TENTH: u32 = 10;
/// Nor within this time.
const RETRY: Duration = Duration::from_secs(60);
/// The shortest time between scheduled checkpoints, in seconds.
const SHORTEST_S: u64 = 10;
/// The longest: a year.
const LONGEST_S: u64 = 366 * 24 * 3600;
/// The most scheduled checkpoints that are kept of one machine.
const MOST_KEPT: u64 = 10_000;

impl Schedule {
    /// # Errors
    /// `Invalid`: it asks for too much or too little.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        let why = if !(SHORTEST_S..=LONGEST_S).contains(&self.every_s) {
            format!("every {} seconds: from {SHORTEST_S} seconds to a year is possible", self.every_s)
        } else if !(1..=MOST_KEPT).contains(&self.keep) {
            format!("keep {}: 1 to {MOST_KEPT} are possible", self.keep)
        } else {
            return Ok(());
        };
        Err(ApiError::new(ErrorKind::Invalid, why))
    }
}

/// A machine that has a schedule.
struct Scheduled {
    info: VmInfo,
    schedule: Schedule,
    runs: bool,
}

/// The last attempt at a scheduled checkpoint of a machine.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    /// Since boot, time in which the host was suspended included.
    began: Duration,
    /// How long it took, if it came to nothing.
    failed_after: Option<Duration>,
}

impl Attempt {
    /// How long after its beginning the next one is due.
    fn pause(&self, every: Duration) -> Duration {
        let Some(took) = self.failed_after else { return every };
        let rest = RETRY.max(every / TENTH).max(took.saturating_mul(TENTH));
        every.min(took.saturating_add(rest))
    }
}

/// Takes scheduled checkpoints until it is dropped.
pub(crate) async fn keep_to_schedules(app: Arc<App>) {
    let mut taking: JoinSet<(VmName, bool)> = JoinSet::new();
    let mut attempts: BTreeMap<VmName, Attempt> = BTreeMap::new();
    let mut busy = BTreeSet::new();
    loop {
        while let Some(done) = taking.try_join_next() {
            let Ok((vm, taken)) = done else { continue };
            if let Some(attempt) = attempts.get_mut(&vm).filter(|_| !taken) {
                attempt.failed_after = Some(since_boot().saturating_sub(attempt.began));
            }
            busy.remove(&vm);
        }
        let scheduled = scheduled(&app).await;
        if scheduled.is_empty() && busy.is_empty() {
            // Nothing wakes up for machines that have none.
            app.machines.schedules_changed.notified().await;
            continue;
        }
        for Scheduled { info, schedule, runs } in scheduled {
            let last = attempts.get(&info.name).copied();
            if !runs || busy.contains(&info.name) || !is_due(&app, &info, &schedule, last) {
                continue;
            }
            attempts.insert(info.name.clone(), Attempt { began: since_boot(), failed_after: None });
            busy.insert(info.name.clone());
            let (app, vm) = (Arc::clone(&app), info.name);
            taking.spawn(async move {
                let taken = take(&app, &vm, &schedule).await;
                (vm, taken)
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The machines that have a schedule. Reading them takes the store's lock, so not on the runtime's thread.
async fn scheduled(app: &Arc<App>) -> Vec<Scheduled> {
    let app = Arc::clone(app);
    let read = move || {
        let schedule = |info: VmInfo| {
            let schedule = Settings::of(&info).ok()?.schedule?;
            Some(Scheduled { runs: runs(&app, &info), info, schedule })
        };
        app.store.vms().into_iter().filter_map(schedule).collect()
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_default()
}

/// Whether a machine runs, as far as can be told from here. While it does not, for weeks perhaps, nothing is tried, so that
/// what is due is taken once it does. Nor is a QEMU disturbed that is being started, or waits for memory: whoever is about
/// to give it that would be refused.
fn runs(app: &App, info: &VmInfo) -> bool {
    let looked_after = app.machines.supervisors.state(&info.name);
    looked_after.is_none_or(|state| state == Supervised::Running) && app.is_connected(info)
}

/// Whether it is time, by the last attempt at a scheduled checkpoint, or after a start of the daemon by the last one that was
/// taken: as if it had not been away.
fn is_due(app: &App, info: &VmInfo, schedule: &Schedule, last: Option<Attempt>) -> bool {
    let every = Duration::from_secs(schedule.every_s);
    match last {
        Some(last) => since_boot().saturating_sub(last.began) >= last.pause(every),
        None => {
            let newest = complete(app, &info.name).iter().map(|one| one.created_ns).max();
            newest.is_none_or(|newest| has_passed(every, newest, SystemClock.wall_ns()))
        }
    }
}

/// Whether so long has passed since a time, by clocks that may have been set back meanwhile: nobody knows then.
fn has_passed(every: Duration, since_ns: u64, now_ns: u64) -> bool {
    now_ns.checked_sub(since_ns).is_none_or(|ns| Duration::from_nanos(ns) >= every)
}

/// Takes one, and says whether there is one.
async fn take(app: &Arc<App>, vm: &VmName, schedule: &Schedule) -> bool {
    let (mode, label) = (schedule.mode, label_of(SystemClock.wall_ns()));
    let new = NewCheckpoint { mode, label, ..NewCheckpoint::default() };
    let taken = Arc::clone(&app.machines).take(&app.servers, vm, new).await;
    if let Err(error) = taken {
        tracing::info!(%vm, "no scheduled checkpoint: {}", error.message);
        return false;
    }
    let (app, vm, keep) = (Arc::clone(app), vm.clone(), schedule.keep);
    // The thread cannot fail but by a panic, which ends the process.
    let _ = tokio::task::spawn_blocking(move || thin_out(&app, &vm, keep)).await;
    true
}

/// Deletes the oldest scheduled checkpoints of a machine. One from which a clone starts that has not run yet stays for as long,
/// and does not count.
fn thin_out(app: &App, vm: &VmName, keep: u64) {
    let origins = app.machines.origins();
    let free = complete(app, vm).into_iter().filter(|one| !origins.contains_key(&one.id));
    for old in surplus(free.collect(), keep) {
        match app.machines.delete_checkpoint(vm, old.id) {
            Ok(()) => tracing::info!(%vm, checkpoint = %old.id, "scheduled checkpoint deleted"),
            Err(error) => tracing::warn!(%vm, checkpoint = %old.id, "cannot be deleted: {error}"),
        }
    }
}

/// The complete scheduled checkpoints of a machine.
fn complete(app: &App, vm: &VmName) -> Vec<CheckpointInfo> {
    let all = app.store.checkpoints(vm).unwrap_or_default();
    all.into_iter()
        .filter(|one| matches!(one.state, CheckpointState::Committed(_)) && is_scheduled(one))
        .collect()
}

fn is_scheduled(one: &CheckpointInfo) -> bool {
    let time = one.label.as_ref().and_then(|label| label.as_str().strip_prefix(PREFIX));
    time.is_some_and(is_time)
}

/// Whether a label goes on as [`label_of`] has it: somebody may give other labels that begin so.
fn is_time(text: &str) -> bool {
    let fits = |(place, byte): (usize, u8)| match place {
        8 => byte == b'T',
        15 => byte == b'Z',
        _ => byte.is_ascii_digit(),
    };
    text.len() == 16 && text.bytes().enumerate().all(fits)
}

/// Those beyond the newest `keep`. A pinned one stays and does not count.
fn surplus(mut all: Vec<CheckpointInfo>, keep: u64) -> Vec<CheckpointInfo> {
    all.retain(|one| !one.pinned);
    all.sort_by_key(|one| std::cmp::Reverse(one.created_ns));
    all.split_off(all.len().min(usize::try_from(keep).unwrap_or(usize::MAX)))
}

/// `auto-20261122T104500Z`.
fn label_of(time_ns: u64) -> Option<Label> {
    let time = Timestamp::from_nanosecond(i128::from(time_ns)).ok()?;
    let text = strtime::format("%Y%m%dT%H%M%SZ", time).ok()?;
    format!("{PREFIX}{text}").parse().ok()
}

/// The time since boot by a clock that goes on while the host is suspended: "every day" is one of a person's days.
fn since_boot() -> Duration {
    Duration::from_nanos(SystemClock.boot_ns())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use cdp_store::CheckpointMode;
    use cdp_types::{CheckpointId, VmId};

    use super::*;

    fn checkpoint(id: u64, pinned: bool) -> CheckpointInfo {
        CheckpointInfo {
            id: CheckpointId(id),
            vm: VmId(1),
            label: label_of(id * 1_000_000_000),
            pinned,
            mode: CheckpointMode::Hot,
            parent: None,
            created_ns: id * 1_000_000_000,
            epoch: None,
            restore: serde_json::Value::Null,
            state: CheckpointState::Begun,
            volumes: Vec::new(),
        }
    }

    #[test]
    fn the_newest_are_kept_and_pinned_ones_do_not_count() {
        let all = (1..=6).map(|id| checkpoint(id, id == 2 || id == 6)).collect();
        let gone: Vec<u64> = surplus(all, 2).iter().map(|one| one.id.0).collect();
        assert_eq!(gone, [3, 1]);
        assert!(surplus(vec![checkpoint(1, false)], 1).is_empty());
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_end_a_schedule() {
        let minute = Duration::from_secs(60);
        let second = 1_000_000_000;
        assert!(!has_passed(minute, 100 * second, 159 * second));
        assert!(has_passed(minute, 100 * second, 160 * second));
        assert!(has_passed(minute, 100 * second, 40 * second), "the last one lies in the future");
    }

    #[test]
    fn one_that_came_to_nothing_is_tried_again_sooner_but_not_all_the_time() {
        let [minute, hour] = [60, 3600].map(Duration::from_secs);
        let pause = |every, failed_after| Attempt { began: Duration::ZERO, failed_after }.pause(every);
        assert_eq!(pause(24 * hour, None), 24 * hour);
        assert_eq!(pause(24 * hour, Some(Duration::ZERO)), 24 * hour / 10);
        assert_eq!(pause(5 * minute, Some(Duration::ZERO)), minute);
        assert_eq!(pause(minute / 6, Some(Duration::ZERO)), minute / 6);
        assert_eq!(pause(24 * hour, Some(hour)), 11 * hour);
        assert_eq!(pause(hour, Some(Duration::MAX)), hour);
    }

    #[test]
    fn labels_say_when_and_are_names() {
        assert_eq!(label_of(1_793_357_100_000_000_000).unwrap().as_str(), "auto-20261030T104500Z");
        assert!(is_scheduled(&checkpoint(7, false)));
        for label in
            ["before-upgrade", "auto-before-upgrade", "auto-20261030T104500", "auto-20261030-104500Z"]
        {
            let renamed = CheckpointInfo { label: Some(label.parse().unwrap()), ..checkpoint(7, false) };
            assert!(!is_scheduled(&renamed), "{label}");
        }
    }

    #[test]
    fn a_schedule_that_asks_too_much_is_refused() {
        let schedule = |every_s, keep| Schedule { every_s, keep, mode: None };
        assert!(schedule(300, 12).check().is_ok());
        for (every_s, keep, part) in [(9, 1, "10 seconds"), (u64::MAX, 1, "a year"), (60, 0, "keep 0")] {
            let why = schedule(every_s, keep).check().unwrap_err().message;
            assert!(why.contains(part), "{why}");
        }
    }
}
