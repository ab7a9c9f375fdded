//! A guest that changes its memory faster than it can be saved while it runs.

use std::time::Duration;

use cdp_store::CheckpointMode::Live;
use ckpt::take::Order;

use super::{Act, Bed};

/// A live migration that sends all memory so many times, and then no end.
fn rounds(count: usize) -> Vec<Act> {
    let mut script = vec![Act::State("setup"), Act::State("active")];
    script.resize(script.len() + count, Act::SendRound);
    script
}

async fn given_up(bed: &Bed, after: Duration, script: Vec<Act>) -> String {
    let order = Order { give_up_after: after, ..Bed::order(Live) };
    let error = bed.take(&order, &[script]).await.unwrap_err();
    assert!(error.contains("faster than it can be saved") && error.contains("--mode pause"), "{error}");
    bed.assert_aborted("faster than it can be saved");
    bed.assert_put_back("given up");
    let tries = bed.qemu.state().commands.iter().filter(|name| *name == "migrate").count();
    assert_eq!(tries, 1, "another try would do no better");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_changes_faster_than_it_is_saved_is_given_up_and_runs_on() {
    let bed = Bed::new().await;
    // Enough for progress to be told within a round.
    bed.qemu.state().pages = (1..=4096).collect();
    let hour = Duration::from_secs(3600);
    let error = given_up(&bed, hour, rounds(40)).await;
    let times = error.split("sent ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let times: f64 = times.and_then(|times| times.parse().ok()).unwrap_or_else(|| panic!("{error}"));
    assert!(times >= 10.0, "{error}");
    given_up(&bed, Duration::from_millis(200), rounds(3)).await;
    bed.take(&Bed::order(Live), &[]).await.unwrap();
}
