//! A file read at the instant before the guest overwrote it has its old bytes, whatever happened since.

use anyhow::{Result, ensure};
use e2e::{Cdpd, Guest, Tool, run_scene};

use crate::writers::format;

const BYTES: usize = 300_000;

/// `yes WORD`, cut off.
fn letter(word: &str) -> Vec<u8> {
    format!("{word}\n").into_bytes().into_iter().cycle().take(BYTES).collect()
}

/// Reads the letter out of the volume at an instant, from a file system that must be sound then.
fn read_letter(tool: &Tool, at: &str) -> Result<Vec<u8>> {
    let image = tool.extract(at, "past.img")?;
    image.replay_journal()?;
    image.must_be_clean()?;
    image.cat("/letter")
}

#[test]
fn an_overwritten_file_has_its_old_bytes_at_every_name_of_the_instant_before() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "256M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut guest, "vda")?;
        guest.run(&format!("yes old | head -c {BYTES} >/mnt/vda/letter && sync"))?;
        let before = tool.head("web1")?;
        tool.run(&["mark", "web1", "before-the-mistake"])?;
        // Another clock tick at least, so that the time names this instant and not the next.
        std::thread::sleep(std::time::Duration::from_millis(20));
        // In place, so that nothing but the log still has the old bytes.
        let overwrite = "dd of=/mnt/vda/letter bs=64k conv=notrunc,fsync 2>/dev/null";
        guest.run(&format!("yes new | head -c {BYTES} | {overwrite}"))?;

        let names = [
            "web1@mark:before-the-mistake".to_owned(),
            format!("web1@seq:{}", before.seq),
            format!("web1@{}", before.time),
        ];
        let look = |tool: &Tool, when: &str| -> Result<()> {
            for name in &names {
                ensure!(read_letter(tool, name)? == letter("old"), "{when}: {name} is not the old letter");
            }
            for name in ["web1@head", "web1@flush:-1", "web1"] {
                ensure!(read_letter(tool, name)? == letter("new"), "{when}: {name} is not the new letter");
            }
            Ok(())
        };
        look(&tool, "with the guest running")?;
        guest.quit()?;
        cdpd.kill9()?;
        look(&tool, "offline after kill -9")?;
        cdpd.start_again()?;
        look(&tool, "after kill -9 and a restart")?;
        cdpd.stop()?;
        look(&tool, "offline after a clean stop")?;
        tool.run(&["rebuild-index"])?;
        look(&tool, "with the index rebuilt")
    });
}
