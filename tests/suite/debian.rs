//! A real operating system, imported, boots from a volume.

use std::time::Duration;

use anyhow::ensure;
use e2e::debian::{HOST_NAME, root_image};
use e2e::{Boot, Cdpd, Guest, run_scene};

/// systemd under an emulator on a busy machine.
const BOOT: Duration = Duration::from_secs(420);

#[test]
fn an_imported_debian_boots_to_a_login_prompt_and_its_changes_are_history() {
    run_scene(|scene| {
        let image = root_image()?;
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        tool.run(&["volume", "create", "debian", "--from", &image.to_string_lossy()])?;
        tool.run(&["mark", "debian", "imported"])?;
        let socket = tool.serve(scene, "debian", 2)?;
        let mut guest =
            Guest::builder().disk(&socket).queues(2).smp(2).memory_mb(512).into(Boot::Disk).boot(scene)?;
        guest.wait_console(&format!("{HOST_NAME} login: "), BOOT)?;
        guest.type_console("root\n")?;
        guest.wait_console(&format!("root@{HOST_NAME}"), Duration::from_secs(120))?;
        guest.type_console("echo was $((6 * 7)) here >/root/note; sync; echo done $((1 + 1))\n")?;
        guest.wait_console("done 2", Duration::from_secs(120))?;
        guest.kill()?;

        let now = tool.extract("debian@head", "now.img")?;
        now.replay_journal()?;
        now.must_be_clean()?;
        ensure!(now.cat("/root/note")? == b"was 42 here\n");
        let then = tool.extract("debian@mark:imported", "then.img")?;
        ensure!(then.cat("/root/note").is_err(), "the note is in the past");
        cdpd.stop()
    });
}
