//! Many queues, several disks, and a disk that grows under its guest.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::process::wait_for;
use e2e::workload::files_of;
use e2e::{Cdpd, Guest, Tool, run_scene};

use crate::writers::{Writer, format};

#[test]
fn four_queues_and_two_disks_keep_their_data_apart_across_a_kill() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let first = tool.create_and_serve(scene, "web1", "512M", 4)?;
        let second = tool.create_and_serve(scene, "db-1", "512M", 4)?;
        let mut guest = Guest::builder().disk(&first).disk(&second).queues(4).smp(4).boot(scene)?;
        ensure!(
            guest.run("ls /sys/block/vda/mq | wc -l")?.trim() == "4",
            "the guest does not use four queues"
        );
        let mut writers = Vec::new();
        for (seed, disk) in [(1, "vda"), (3, "vdb")] {
            format(&mut guest, disk)?;
            writers.push(Writer::synced(&mut guest, &format!("/mnt/{disk}/synced"), seed)?);
            writers.push(Writer::lazy(&mut guest, &format!("/mnt/{disk}/lazy"), seed + 1)?);
        }
        for writer in &mut writers {
            writer.wait_files(10)?;
        }
        cdpd.kill9()?;
        cdpd.start_again()?;
        for writer in &mut writers {
            writer.wait_files(10)?;
        }
        for writer in writers {
            writer.stop_and_check(&mut guest)?;
        }
        guest.run("umount /mnt/vda /mnt/vdb && e2fsck -f -n /dev/vda && e2fsck -f -n /dev/vdb")?;
        guest.quit()?;
        for volume in ["web1", "db-1"] {
            tool.extract(volume, "after.img")?.must_be_clean()?;
        }
        cdpd.stop()
    });
}

#[test]
fn a_volume_that_grows_grows_in_its_running_guest() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "128M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut guest, "vda")?;
        tool.run(&["volume", "resize", "web1", "--size", "384M"])?;
        let grown = (384 << 20).to_string();
        wait_for("the guest to see its disk grow", Duration::from_secs(120), || {
            Ok((guest.run("blockdev --getsize64 /dev/vda")?.trim() == grown).then_some(()))
        })?;
        // Online, into space that was not there before.
        guest.run("resize2fs /dev/vda 2>&1")?;
        // More than fitted on the disk before.
        guest.run("guest-agent fill /mnt/vda/files 7 200")?;
        guest.drop_caches()?;
        let count = files_of(7, 200 << 20);
        guest.run(&format!("guest-agent check /mnt/vda/files 7 {count} && umount /mnt/vda"))?;

        let said = tool.refused(&["volume", "resize", "web1", "--size", "128M"])?;
        ensure!(said.contains("shrink"), "{said}");
        guest.quit()?;
        tool.extract("web1", "after.img")?.must_be_clean()?;
        cdpd.stop()
    });
}

/// The file with which a volume's log begins (docs/operations.md, "Space").
const FIRST_FILE_BYTES: u64 = 4 << 20;

/// What a volume's log takes.
fn log_bytes(tool: &Tool, volume: &str) -> Result<u64> {
    let segments = tool.json_lines(&["inspect", "segments"])?;
    let own = segments.iter().filter(|segment| segment["volume_name"] == volume);
    Ok(own.filter_map(|segment| segment["file_bytes"].as_u64()).sum())
}

#[test]
fn a_disk_of_sixteen_tebibytes_costs_nothing_until_it_is_written() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "huge", "16T", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        ensure!(guest.run("blockdev --getsize64 /dev/vda")?.trim() == (16_u64 << 40).to_string());
        ensure!(log_bytes(&tool, "huge")? == 0, "a disk that was only looked at has a log");
        // The last block of the disk, and one in its middle.
        for block in [0, (8_u64 << 40) / 4096 + 1, (16_u64 << 40) / 4096 - 1] {
            guest.run(&format!(
                "echo here {block} | dd of=/dev/vda bs=4096 seek={block} conv=sync,fsync 2>/dev/null"
            ))?;
        }
        guest.drop_caches()?;
        for block in [0, (8_u64 << 40) / 4096 + 1, (16_u64 << 40) / 4096 - 1] {
            let read =
                guest.run(&format!("dd if=/dev/vda bs=4096 skip={block} count=1 2>/dev/null | head -n 1"))?;
            ensure!(read == format!("here {block}\n"), "{read}");
        }
        let bytes = log_bytes(&tool, "huge")?;
        ensure!((1..=FIRST_FILE_BYTES).contains(&bytes), "{bytes} bytes of log for three blocks");
        guest.quit()?;
        cdpd.stop()
    });
}
