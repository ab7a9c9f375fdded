//! QEMU and the daemon are killed together: what is left is a prefix that holds everything the guest had synced.

use anyhow::Result;
use e2e::workload::must_survive;
use e2e::{Cdpd, Guest, Scene, run_scene};

use crate::writers::{Writer, format, mount};

const ROUNDS: u64 = 3;

#[test]
fn after_qemu_and_the_daemon_were_killed_together_the_disk_is_clean_and_has_what_was_synced() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let mut socket = cdpd.tool().create_and_serve(scene, "web1", "1G", 2)?;
        for round in 0..ROUNDS {
            let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
            if round == 0 {
                format(&mut guest, "vda")?;
            } else {
                mount(&mut guest, "vda")?;
            }
            crash_and_look(scene, &mut cdpd, guest, round)?;
            cdpd.start_again()?;
            // What the daemon recovers is what was read without it.
            let offline = e2e::Image::new(&scene.path("offline.img")).checksum()?;
            assert_eq!(cdpd.tool().extract("web1@head", "online.img")?.checksum()?, offline);
            socket = scene.path("web1.sock");
        }
        cdpd.stop()?;
        cdpd.tool().run(&["verify"]).map(drop)
    });
}

/// Writes, pulls both plugs, and reads the store with nobody running.
fn crash_and_look(scene: &Scene, cdpd: &mut Cdpd, mut guest: Guest, round: u64) -> Result<()> {
    let dir = format!("/synced{round}");
    let mut synced = Writer::synced(&mut guest, &format!("/mnt/vda{dir}"), round)?;
    let mut lazy = Writer::lazy(&mut guest, &format!("/mnt/vda/lazy{round}"), 100 + round)?;
    lazy.wait_files(20)?;
    synced.wait_files(30)?;
    if round.is_multiple_of(2) {
        guest.kill()?;
        cdpd.kill9()?;
    } else {
        cdpd.kill9()?;
        guest.kill()?;
    }
    let survivors = must_survive(&synced.progress_of_the_dead()?);
    assert!(survivors.len() >= 30, "the writer had synced {survivors:?}");

    cdpd.tool().extract("web1@head", "offline.img")?;
    let image = cdpd.tool().extract("web1@head", "checked.img")?;
    image.replay_journal()?;
    image.must_be_clean()?;
    image.check_files(&dir, round, survivors)?;
    scene.judge_logs()
}
