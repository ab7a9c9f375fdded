//! The test bed itself, on QEMU's own vhost-user-blk server: where these fail, no other test means anything.

use std::fs::File;
use std::time::Duration;

use e2e::{Guest, Image, StorageDaemon, run_scene};

#[test]
fn a_guest_makes_a_file_system_and_what_it_synced_is_found_after_both_were_killed() {
    run_scene(|scene| {
        let raw = scene.path("raw.img");
        File::create(&raw)?.set_len(512 << 20)?;
        let socket = scene.path("disk.sock");
        let daemon = StorageDaemon::export(scene, &raw, &socket, 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;

        assert_eq!(guest.run("blockdev --getsize64 /dev/vda")?.trim(), (512 << 20).to_string());
        assert!(guest.run("exit 3").is_err());
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")?;
        let mut writer = guest.spawn("guest-agent write /mnt/synced 11 synced")?;
        while writer.next_line(Duration::from_secs(120))? != "synced 20" {}
        guest.kill()?;
        drop(daemon);

        let image = Image::new(&raw);
        image.replay_journal()?;
        image.must_be_clean()?;
        image.check_files("/synced", 11, 0..=20)?;
        assert!(image.check_files("/synced", 12, 0..=20).is_err());
        Ok(())
    });
}

#[test]
fn every_processor_of_a_guest_is_awake_and_its_clock_ticks() {
    run_scene(|scene| {
        let mut guest = Guest::builder().smp(4).boot(scene)?;
        for _ in 0..2 {
            assert_eq!(guest.run("nproc")?, "4\n");
            // Who sleeps on a processor is woken by that processor's own timer.
            for mask in ["1", "2", "4", "8"] {
                guest.run(&format!("taskset {mask} usleep 100000"))?;
            }
            guest.reset()?;
        }
        guest.quit()
    });
}

#[test]
fn a_reset_guest_comes_back_and_its_old_commands_end_with_an_error() {
    run_scene(|scene| {
        let raw = scene.path("raw.img");
        File::create(&raw)?.set_len(64 << 20)?;
        let socket = scene.path("disk.sock");
        let _daemon = StorageDaemon::export(scene, &raw, &socket, 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        let sleeper = guest.spawn("sleep 600")?;
        guest.reset()?;
        assert!(sleeper.finish(Duration::from_secs(1)).unwrap_err().to_string().contains("gone"));
        assert_eq!(guest.run("echo back")?, "back\n");
        assert_eq!(guest.qmp().status()?, "running");
        guest.quit()
    });
}
