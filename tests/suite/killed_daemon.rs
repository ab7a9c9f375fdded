//! Invariant 1: a guest lives through `kill -9` of its server, without an error and without a lost write.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::workload::mix;
use e2e::{Cdpd, Guest, Scene, run_scene};

use crate::writers::{Writer, format};

const KILLS: u64 = 10;
/// The most kills until one has met requests under way.
const MOST_KILLS: u64 = 40;

#[test]
fn a_guest_goes_on_while_its_server_is_killed_ten_times_in_the_middle_of_writes() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "1G", 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        format(&mut guest, "vda")?;
        let mut synced = Writer::synced(&mut guest, "/mnt/vda/synced", 1)?;
        let mut lazy = Writer::lazy(&mut guest, "/mnt/vda/lazy", 2)?;
        for round in 0.. {
            // Some work first, then a moment that is another one each time.
            synced.wait_files(3)?;
            lazy.wait_files(3)?;
            pause(mix(round) % 200);
            cdpd.kill9()?;
            // The guest finds its server gone for a while, or back at once.
            pause(mix(round + KILLS) % 600);
            cdpd.start_again()?;
            // One at least must have met requests under way.
            if round + 1 >= KILLS && some_kill_met_requests(scene)? {
                break;
            }
            ensure!(round < MOST_KILLS, "every kill met an idle disk");
        }
        synced.wait_files(1)?;
        lazy.wait_files(1)?;
        synced.stop_and_check(&mut guest)?;
        lazy.stop_and_check(&mut guest)?;
        unmount_and_fsck(&mut guest)?;
        guest.quit()?;
        cdpd.tool().run(&["verify"])?;
        cdpd.stop()?;
        cdpd.tool().run(&["verify"]).map(drop)
    });
}

#[test]
fn reads_in_flight_when_the_server_is_killed_are_answered_by_the_next_one() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "256M", 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        guest.run("head -c 32m /dev/urandom >/dev/vda && sync")?;
        let sum = "dd if=/dev/vda bs=1M count=32 iflag=direct 2>/dev/null | md5sum";
        let before = guest.run(sum)?;
        for round in 0.. {
            let reader = guest.spawn(sum)?;
            pause(50 + mix(round) % 200);
            cdpd.kill9()?;
            cdpd.start_again()?;
            let (status, after) = reader.finish(Duration::from_secs(120))?;
            assert_eq!((status, &after), (0, &before));
            if round >= 2 && some_kill_met_requests(scene)? {
                break;
            }
            ensure!(round < MOST_KILLS, "every kill met an idle disk");
        }
        guest.quit()?;
        cdpd.stop()
    });
}

/// Whether a daemon has found requests that the one before, which was killed, had not answered.
fn some_kill_met_requests(scene: &Scene) -> Result<bool> {
    let log = std::fs::read_to_string(scene.path("cdpd.log"))?;
    Ok(log.contains("requests were in flight when the connection was lost"))
}

fn unmount_and_fsck(guest: &mut Guest) -> Result<()> {
    guest.run("umount /mnt/vda && e2fsck -f -n /dev/vda").map(drop)
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}
