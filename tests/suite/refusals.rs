//! What must not be done is refused, in words, and harms nothing.

use anyhow::ensure;
use e2e::{Cdpd, Guest, run_scene};

#[test]
fn a_second_daemon_on_the_same_store_is_refused_and_the_first_serves_on() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let socket = cdpd.tool().create_and_serve(scene, "web1", "64M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        let said = cdpd.start_second()?;
        ensure!(said.contains(&*cdpd.store().to_string_lossy()), "it does not name the store: {said}");
        ensure!(!said.contains("panicked"), "{said}");
        let before = cdpd.tool().head("web1")?.seq;
        guest.run("echo still here | dd of=/dev/vda conv=fsync 2>/dev/null")?;
        ensure!(cdpd.tool().head("web1")?.seq > before, "the write is not in the log");
        guest.quit()?;
        cdpd.stop()
    });
}

#[test]
fn a_served_volume_is_not_destroyed_and_a_bad_command_is_an_error_in_words() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        tool.create_and_serve(scene, "web1", "64M", 1)?;
        let said = tool.refused(&["volume", "destroy", "web1", "--yes"])?;
        ensure!(said.contains("served") && said.contains("force"), "{said}");
        for bad in [
            &["volume", "create", "web1", "--size", "64M"][..],
            &["volume", "create", "../etc", "--size", "64M"],
            &["volume", "create", "odd", "--size", "1000"],
            &["volume", "show", "nobody"],
            &["mark", "nobody", "label"],
            &["extract", "web1@mark:nothing", "/nonexistent/file"],
        ] {
            let said = tool.refused(bad)?;
            ensure!(!said.trim().is_empty() && !said.contains("panicked"), "{bad:?}: {said}");
        }
        let listed = tool.json_lines(&["volume", "list"])?;
        ensure!(listed.len() == 1 && listed[0]["name"] == "web1", "{listed:?}");
        tool.run(&["volume", "destroy", "web1", "--yes", "--force"])?;
        tool.refused(&["volume", "show", "web1"])?;
        cdpd.stop()
    });
}
