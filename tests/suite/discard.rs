//! Discards and zeroes of a guest reach the log, and take nothing from the past.

use anyhow::{Result, ensure};
use e2e::{Cdpd, Guest, Tool, run_scene};

use crate::writers::format;

/// How many records of this kind the volume's log has.
fn count(tool: &Tool, kind: &str) -> Result<usize> {
    Ok(tool.records("web1")?.iter().filter(|record| record["kind"] == kind).count())
}

#[test]
fn discarded_and_zeroed_blocks_read_as_zeroes_and_their_past_stays() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "128M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        guest.run("yes something | head -c 32m >/dev/vda && sync")?;
        tool.run(&["mark", "web1", "written"])?;
        let written = tool.extract("web1@mark:written", "written.img")?.checksum()?;

        guest.run("/tools/blkdiscard -o 4M -l 4M /dev/vda")?;
        ensure!(count(&tool, "discard")? > 0, "the discard is not in the log");
        guest.run("/tools/blkdiscard -z -o 16M -l 4M /dev/vda && sync")?;
        ensure!(count(&tool, "zero")? > 0, "the zeroes are not in the log");
        guest.drop_caches()?;
        for mib in [4, 7, 16, 19] {
            guest.run(&format!(
                "dd if=/dev/vda bs=1M skip={mib} count=1 2>/dev/null | cmp -n 1048576 - /dev/zero"
            ))?;
        }
        for mib in [3, 8, 15, 20] {
            let line = guest
                .run(&format!("dd if=/dev/vda bs=1M skip={mib} count=1 2>/dev/null | grep -c something"))?;
            ensure!(line.trim().parse::<u32>()? > 100_000, "what lies beside is gone: {line}");
        }
        ensure!(
            tool.extract("web1@mark:written", "again.img")?.checksum()? == written,
            "the past has changed"
        );
        guest.quit()?;
        cdpd.stop()
    });
}

#[test]
fn a_trimmed_file_system_is_clean_and_its_deleted_file_is_in_the_past() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "256M", 2)?;
        let mut guest = Guest::builder().disk(&socket).queues(2).smp(2).boot(scene)?;
        format(&mut guest, "vda")?;
        guest.run("yes precious | head -c 50000000 >/mnt/vda/file && sync")?;
        tool.run(&["mark", "web1", "kept"])?;
        guest.run("rm /mnt/vda/file && sync")?;
        let discards = count(&tool, "discard")?;
        guest.run("fstrim -v /mnt/vda && sync")?;
        ensure!(count(&tool, "discard")? > discards, "fstrim did not reach the log");
        guest.run("umount /mnt/vda && e2fsck -f -n /dev/vda")?;
        guest.quit()?;
        let image = tool.extract("web1@mark:kept", "kept.img")?;
        image.replay_journal()?;
        image.must_be_clean()?;
        let file = image.cat("/file")?;
        let expected = b"precious\n".iter().cycle().take(50_000_000);
        ensure!(file.len() == 50_000_000 && file.iter().eq(expected), "the deleted file is not what it was");
        cdpd.stop()
    });
}
