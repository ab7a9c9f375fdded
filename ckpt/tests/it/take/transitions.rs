//! What QEMU, its operators, its guest and its disks do in the wrong moment.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cdp_store::CheckpointMode::{self, Hot, Live, Pause};
use cdp_store::CheckpointState;
use serde_json::json;

use super::{Act, Bed, MODES, undisturbed, with};

/// Where in an undisturbed script something comes.
fn after(script: &[Act], wanted: &str) -> usize {
    script.iter().position(|act| format!("{act:?}").contains(wanted)).unwrap() + 1
}

/// Takes one that is disturbed; it must be refused with these words, and leave nothing behind.
async fn refused(bed: &Bed, mode: CheckpointMode, script: Vec<Act>, why: &str) {
    let what = format!("{mode:?} {script:?}");
    let error = bed.take(&Bed::order(mode), &[script.clone(), script.clone(), script]).await.unwrap_err();
    assert!(error.contains(why), "{what}: {error}");
    bed.assert_aborted(why);
    bed.assert_put_back(&what);
}

/// Takes one that is disturbed once: it must come through, and be the only one.
async fn retried(bed: &Bed, mode: CheckpointMode, script: Vec<Act>) {
    let (what, before) = (format!("{mode:?} {script:?}"), bed.count());
    let taken = bed.take(&Bed::order(mode), &[script]).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(matches!(taken.state, CheckpointState::Committed(_)), "{what}");
    assert_eq!(bed.count(), before + 1, "{what}");
    let tries = bed.qemu.state().commands.iter().filter(|name| *name == "migrate").count();
    assert_eq!(tries, 2, "{what}");
    bed.assert_put_back(&what);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undisturbed_machine_is_saved_in_every_mode_at_the_first_try() {
    let bed = Bed::new().await;
    for mode in MODES {
        let taken = bed.take(&Bed::order(mode), &[]).await.unwrap();
        let CheckpointState::Committed(saved) = taken.state else { panic!("{:?}", taken.state) };
        assert_eq!(saved.figures["memory_bytes"], 8 * 4096, "{mode:?}");
        assert!(saved.figures["duration_ms"].is_u64());
        bed.assert_put_back(&format!("{mode:?}"));
        let tries = bed.qemu.state().commands.iter().filter(|name| *name == "migrate").count();
        assert_eq!(tries, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_keeps_whether_the_guest_has_its_write_cache_off() {
    let bed = Bed::new().await;
    for mode in MODES {
        for off in [true, false] {
            bed.write_cache_off.store(off, Ordering::SeqCst);
            let taken = bed.take(&Bed::order(mode), &[]).await.unwrap();
            let kept = bed.store.checkpoint(taken.id).unwrap().state;
            let CheckpointState::Committed(saved) = kept else { panic!("{mode:?}: {kept:?}") };
            assert_eq!(saved.members[0].write_cache_off, off, "{mode:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_may_not_have_been_the_migration_s_is_tried_again() {
    let bed = Bed::new().await;
    let hot = undisturbed(Hot);
    retried(&bed, Hot, with(&hot, after(&hot, "GoOn"), &[Act::OthersStop, Act::OthersGoOn])).await;
    retried(&bed, Hot, with(&hot, after(&hot, "active"), &[Act::OthersStop, Act::OthersGoOn])).await;
    retried(&bed, Hot, with(&hot, after(&hot, "active"), &[Act::ResetDisk])).await;
    let live = undisturbed(Live);
    retried(&bed, Live, with(&live, after(&live, "Stop"), &[Act::OthersGoOn])).await;
    retried(&bed, Live, with(&live, after(&live, "active"), &[Act::OthersStop, Act::OthersGoOn])).await;
    let pause = undisturbed(Pause);
    retried(&bed, Pause, with(&pause, after(&pause, "SendHalf"), &[Act::OthersGoOn])).await;
    // Having been saved, it may go on before we say so.
    let early = with(&pause, after(&pause, "completed"), &[Act::OthersGoOn]);
    bed.take(&Bed::order(Pause), &[early]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_stand_still_only_after_the_machine_has_are_no_cut_of_it() {
    let bed = Bed::new().await;
    // As in firmware: at the stop nothing uses the disk; later a driver does, leaves it, and the next one takes over.
    bed.qemu.use_disk(false);
    let hot = undisturbed(Hot);
    let late = [Act::UseDisk, Act::LeaveDisk, Act::UseDisk];
    retried(&bed, Hot, with(&hot, after(&hot, "GoOn"), &late)).await;
    // One that nothing uses at all is saved as it is.
    bed.qemu.use_disk(false);
    bed.take(&Bed::order(Hot), &[]).await.unwrap();
    bed.assert_put_back("unused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_stopped_again_and_again_is_given_up() {
    let bed = Bed::new().await;
    let hot = undisturbed(Hot);
    let twice = with(&hot, after(&hot, "GoOn"), &[Act::OthersStop, Act::OthersGoOn]);
    refused(&bed, Hot, twice, "(3 times); try again later").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_somebody_stops_before_us_is_saved_as_it_stands_and_stays_so() {
    let bed = Bed::new().await;
    for mode in [Hot, Live] {
        let script = with(&undisturbed(mode), 1, &[Act::OthersStop]);
        let taken = bed.take(&Bed::order(mode), &[script]).await.unwrap();
        assert!(matches!(taken.state, CheckpointState::Committed(_)));
        assert!(!bed.qemu.state().running, "{mode:?}: it was not we who stopped it");
        let taken = bed.take(&Bed::order(mode), &[]).await;
        assert!(taken.is_ok() && !bed.qemu.state().running, "{mode:?}: {taken:?}");
        bed.qemu.answer("cont", &json!({}));
        bed.assert_put_back(&format!("{mode:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_somebody_stops_while_it_is_saved_hot_is_saved_as_it_stands_and_stays_so() {
    let bed = Bed::new().await;
    // Half of it is more than a socket holds, so some of it has come.
    bed.qemu.state().pages = (1..=4096).collect();
    let hot = undisturbed(Hot);
    for uses_disk in [true, false] {
        bed.qemu.use_disk(uses_disk);
        let script = with(&hot, after(&hot, "SendHalf"), &[Act::OthersStop]);
        let taken = bed.take(&Bed::order(Hot), &[script]).await.unwrap();
        assert!(matches!(taken.state, CheckpointState::Committed(_)));
        assert!(!bed.qemu.state().running, "uses disk: {uses_disk}: it was not we who stopped it");
        bed.qemu.answer("cont", &json!({}));
        bed.assert_put_back("stopped while it was saved");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_somebody_stops_while_it_is_copied_stays_so() {
    let bed = Bed::new().await;
    let live = undisturbed(Live);
    let stopped = with(&live, after(&live, "active"), &[Act::OthersStop]);
    let taken = bed.take(&Bed::order(Live), std::slice::from_ref(&stopped)).await.unwrap();
    assert!(matches!(taken.state, CheckpointState::Committed(_)));
    assert!(!bed.qemu.state().running, "saved: it was not we who stopped it");
    bed.qemu.answer("cont", &json!({}));
    bed.assert_put_back("saved");

    let given_up = [&stopped[..=after(&stopped, "OthersStop")], &[Act::Fail("dev/x refuses")]].concat();
    let error = bed.take(&Bed::order(Live), &[given_up]).await.unwrap_err();
    assert!(error.contains("dev/x refuses"), "{error}");
    assert!(!bed.qemu.state().running, "given up: it was not we who stopped it");
    bed.qemu.answer("cont", &json!({}));
    bed.assert_put_back("given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_somebody_else_is_left_alone() {
    let bed = Bed::new().await;
    for mode in MODES {
        bed.qemu.state().others_migrate = true;
        let why = bed.take(&Bed::order(mode), &[]).await.unwrap_err();
        assert!(why.contains("somebody else migrates"), "{mode:?}: {why}");
        assert_eq!(bed.qemu.state().migration, "active", "{mode:?}");
        let commands = bed.qemu.state().commands.clone();
        let queries = ["query-", "qom-", "human-monitor-command"];
        let asks = |name: &String| queries.iter().any(|query| name.starts_with(query));
        assert!(commands.iter().all(asks), "{mode:?}: {commands:?}");
        assert_eq!(bed.count(), 0, "{mode:?}: it was begun");
    }
    bed.qemu.state().others_migrate = false;
    bed.take(&Bed::order(Hot), &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_were_missed_are_made_up_for_by_another_try() {
    let bed = Bed::new().await;
    bed.qemu.state().flood = 3000;
    let taken = bed.take(&Bed::order(Hot), &[]).await.unwrap();
    assert!(matches!(taken.state, CheckpointState::Committed(_)));
    assert_eq!(bed.count(), 1);
    let tries = bed.qemu.state().commands.iter().filter(|name| *name == "migrate").count();
    assert_eq!(tries, 2, "the first has missed events");
    bed.assert_put_back("flooded");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_a_machine_or_its_migration_ends_the_checkpoint() {
    let bed = Bed::new().await;
    for mode in MODES {
        let script = undisturbed(mode);
        for at in 1..script.len() {
            let reset = Act::Event("RESET", json!({ "guest": true, "reason": "guest-reset" }));
            refused(&bed, mode, with(&script, at, &[reset]), "the machine was reset").await;
            let off = Act::Event("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" }));
            refused(&bed, mode, with(&script, at, &[off]), "switched off").await;
            let failed = [&script[..at], &[Act::Fail("dev/x refuses")]].concat();
            refused(&bed, mode, failed, "dev/x refuses").await;
            let cancelled = [&script[..at], &[Act::State("cancelled")]].concat();
            refused(&bed, mode, cancelled, "'cancelled'").await;
            refused(&bed, mode, with(&script, at, &[Act::LoseDisk]), "disk was lost").await;
        }
        bed.take(&Bed::order(mode), &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_goes_to_sleep_before_it_was_stopped_is_not_saved() {
    let bed = Bed::new().await;
    let sleep = [Act::Event("SUSPEND", json!({}))];
    for (mode, when) in [(Hot, "setup"), (Live, "setup"), (Live, "active"), (Live, "SendHalf")] {
        let script = undisturbed(mode);
        refused(&bed, mode, with(&script, after(&script, when), &sleep), "suspended itself").await;
    }
    // Once it was cut, it may.
    let hot = undisturbed(Hot);
    bed.take(&Bed::order(Hot), &[with(&hot, after(&hot, "SendHalf"), &sleep)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_short_makes_no_checkpoint_whatever_qemu_says() {
    let bed = Bed::new().await;
    for mode in MODES {
        let script = undisturbed(mode);
        let cut = script.iter().map(|act| match act {
            Act::SendRest => Act::Close,
            act => act.clone(),
        });
        refused(&bed, mode, cut.collect(), "cut short").await;
        bed.take(&Bed::order(mode), &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_memory_cannot_be_taken_in_goes_on_at_once() {
    let bed = Bed::new().await;
    // More than there is room for in a socket that nobody reads.
    bed.qemu.state().pages = (1..=4096).collect();
    for mode in MODES {
        let script = undisturbed(mode).into_iter().map(|act| match act {
            Act::SendHalf => Act::SendNonsense,
            act => act,
        });
        let (script, began): (Vec<Act>, _) = (script.collect(), Instant::now());
        let error = bed.take(&Bed::order(mode), &[script]).await.unwrap_err();
        assert!(error.contains("QEVM"), "{mode:?}: {error}");
        assert!(began.elapsed() < Duration::from_secs(10), "{mode:?}: it took {:?}", began.elapsed());
        bed.assert_aborted("QEVM");
        bed.assert_put_back(&format!("{mode:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_cancelled_at_every_step() {
    let bed = Bed::new().await;
    for mode in MODES {
        let script = undisturbed(mode);
        for at in 0..script.len() {
            // QEMU goes no further: only the cancellation ends it.
            let script = [&script[..at], &[Act::Cancel]].concat();
            refused(&bed, mode, script, "it was cancelled").await;
        }
        bed.take(&Bed::order(mode), &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_s_connection_may_end_at_every_step_of_the_migration() {
    let bed = Bed::new().await;
    for mode in MODES {
        let script = undisturbed(mode);
        for at in 0..script.len() {
            refused(&bed, mode, with(&script, at, &[Act::HangUp]), "the connection is gone").await;
        }
        bed.take(&Bed::order(mode), &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_s_connection_may_end_at_every_command() {
    let bed = Bed::new().await;
    for mode in MODES {
        bed.take(&Bed::order(mode), &[]).await.unwrap();
        let commands = bed.qemu.state().commands.len();
        let mut aborted = 0;
        for at in 0..commands {
            for carried_out in [false, true] {
                let before = bed.newest();
                bed.qemu.state().hang_up = Some((at, carried_out));
                let taken = bed.take(&Bed::order(mode), &[]).await;
                bed.qemu.state().hang_up = None;
                let what = format!("{mode:?}, hung up at {at}, {carried_out}: {taken:?}");
                bed.assert_put_back(&what);
                if bed.newest() > before && taken.is_err() {
                    bed.assert_aborted("the connection is gone");
                    aborted += 1;
                }
            }
        }
        assert!(aborted > 10, "{mode:?}: only {aborted} of them after it was begun");
        bed.take(&Bed::order(mode), &[]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_protect_memory_is_in_the_way_of_hot_alone() {
    let bed = Bed::new().await;
    bed.qemu.state().refuses_hot = true;
    let error = bed.try_to_take(&Bed::order(Hot), &[]).await.unwrap_err();
    assert!(error.is_of_hot_alone() && error.to_string().contains("host kernel"), "{error}");
    bed.assert_aborted("host kernel");
    bed.assert_put_back("refused");
    bed.take(&Bed::order(Live), &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_hangs_is_put_back_once_it_answers() {
    let mut bed = Bed::new().await;
    bed.command_deadline = Duration::from_secs(1);
    // Longer than all that it is asked before somebody might take it for dead.
    let hang = [Act::Hang(Duration::from_secs(5)), Act::Cancel];
    let script = [&undisturbed(Pause)[..2], &hang[..]].concat();
    let error = bed.take(&Bed::order(Pause), &[script]).await.unwrap_err();
    assert!(error.contains("it was cancelled"), "{error}");
    bed.assert_aborted("it was cancelled");
    bed.assert_put_back("it has hung");
}
