//! What is in the way of checkpoints is found beforehand, named, and refused in the same words.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::{Cdpd, Guest, Scene, Tool, run_scene};
use serde_json::Value;

/// The checks of a machine that are in the way, as lines, and the modes that are possible.
fn diagnosis(tool: &Tool) -> Result<(String, Vec<String>)> {
    let (_, said) = tool.finding(&["doctor", "vm", "web1", "--json"])?;
    let said: Value = serde_json::from_str(&said)?;
    let checks = said["checks"].as_array().context("no checks")?;
    let lines = checks.iter().filter(|check| check["verdict"] == "in-the-way").map(Value::to_string);
    let modes = said["modes"].as_array().context("no modes")?;
    let possible = modes.iter().filter(|mode| mode["possible"] == true);
    let possible = possible.filter_map(|mode| mode["mode"].as_str().map(str::to_owned)).collect();
    Ok((lines.collect::<Vec<_>>().join("\n"), possible))
}

/// Registers a machine with one disk, under this QMP socket.
fn register(tool: &Tool, qmp: &Path) -> Result<()> {
    tool.run(&["vm", "register", "web1", "--qmp", &qmp.to_string_lossy(), "--volume", "web1"]).map(drop)
}

/// All that doctor and taking say of a guest with more devices: each must name this.
fn in_the_way(scene: &Scene, tool: &Tool, more: &[&str], named: &[&str], possible: &[&str]) -> Result<()> {
    let (socket, qmp) = (scene.path("web1.sock"), scene.path("web1.qmp"));
    let guest = Guest::builder().disk(&socket).qmp(&qmp).more(more).boot(scene)?;
    let (found, modes) = diagnosis(tool)?;
    ensure!(named.iter().all(|name| found.contains(name)), "{named:?} should be in: {found}");
    ensure!(modes == possible, "{modes:?}, not {possible:?}");
    for mode in ["hot", "live", "pause"].iter().filter(|mode| !possible.contains(mode)) {
        let said = tool.refused(&["checkpoint", "take", "web1", "--mode", mode])?;
        ensure!(named.iter().any(|name| said.contains(name)), "{mode}: {said}");
    }
    for mode in possible {
        tool.run(&["checkpoint", "take", "web1", "--mode", mode])?;
    }
    guest.kill()
}

#[test]
fn a_machine_that_can_be_checkpointed_is_told_so() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let qmp = scene.path("web1.qmp");
        register(&tool, &qmp)?;
        let guest = Guest::builder().disk(&socket).qmp(&qmp).boot(scene)?;
        let (status, said) = tool.finding(&["doctor", "vm", "web1"])?;
        println!("{said}");
        ensure!(status == 0 && said.contains("hot    possible"), "{said}");
        ensure!(diagnosis(&tool)?.1 == ["hot", "live", "pause"], "{said}");
        tool.run(&["checkpoint", "take", "web1"])?;
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn what_is_in_the_way_is_named_with_its_cure() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        tool.create_and_serve(scene, "web1", "64M", 1)?;
        register(&tool, &scene.path("web1.qmp"))?;
        let (found, modes) = diagnosis(&tool)?;
        ensure!(
            modes.is_empty() && found.contains("-qmp unix:") && found.contains("no guest is connected"),
            "{found}"
        );

        // A disk that is not ours, but writable.
        let other = scene.path("other.raw");
        std::fs::File::create(&other)?.set_len(1 << 20)?;
        let drive = format!("if=virtio,format=raw,id=scratch,file={}", other.display());
        in_the_way(scene, &tool, &["-drive", &drive], &["scratch", "other.raw"], &[])?;
        // A device that cannot be migrated.
        let shared =
            ["-object", "memory-backend-memfd,id=iv,size=1M,share=on", "-device", "ivshmem-plain,memdev=iv"];
        in_the_way(scene, &tool, &shared, &["ivshmem"], &[])?;
        // Memory that only this QEMU sees in part.
        let private = ["-object", "memory-backend-ram,id=mine,size=1M,share=off"];
        in_the_way(scene, &tool, &private, &["'mine'", "share=on"], &["live", "pause"])?;
        // A volume of ours that the machine was not registered with.
        let second = tool.create_and_serve(scene, "more", "1M", 1)?;
        let chardev = format!("socket,id=cx,path={}", second.display());
        let unregistered =
            ["-chardev", &chardev, "-device", "vhost-user-blk-pci,id=extra,chardev=cx,num-queues=1"];
        in_the_way(scene, &tool, &unregistered, &["extra"], &[])?;
        tool.run(&["volume", "unserve", "web1"])?;
        let (found, modes) = diagnosis(&tool)?;
        ensure!(modes.is_empty() && found.contains("cdp-tool volume serve web1"), "{found}");
        let said = tool.refused(&["checkpoint", "take", "web1"])?;
        ensure!(said.contains("is not served"), "{said}");
        cdpd.stop()
    });
}

#[test]
fn private_memory_is_named_before_anything_is_touched() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let qmp = scene.path("web1.qmp");
        register(&tool, &qmp)?;
        let mut guest = Guest::builder().disk(&socket).qmp(&qmp).private_memory().waiting().boot(scene)?;
        let settings = guest.qmp().execute("query-migrate-capabilities", serde_json::json!({}))?;
        let (found, _) = diagnosis(&tool)?;
        ensure!(found.contains("'mem' is private") && found.contains("add share=on"), "{found}");
        let said = tool.refused(&["checkpoint", "take", "web1", "--mode", "hot"])?;
        ensure!(said.contains("'mem' is private") && said.contains("add share=on"), "{said}");
        ensure!(tool.json_lines(&["checkpoint", "list", "web1"])?.is_empty(), "one was begun");
        let now = guest.qmp().execute("query-migrate-capabilities", serde_json::json!({}))?;
        ensure!(now == settings && guest.qmp().status()? == "inmigrate", "QEMU was touched: {now}");
        guest.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_socket_behind_which_there_is_no_qemu_is_told_from_one_that_is_in_use() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        tool.create_and_serve(scene, "web1", "64M", 1)?;
        for (name, says, named) in [
            ("silent", "", "close the other client"),
            ("mail", "220 mail.example.org ESMTP\r\n", "220 mail.example.org"),
            ("odd", "{\"QMP\": 7}\r\n", "-qmp socket"),
        ] {
            let path = scene.path(name);
            let listener = UnixListener::bind(&path)?;
            let says = says.as_bytes().to_vec();
            std::thread::spawn(move || {
                // Clients are kept until the test ends.
                let mut clients = Vec::new();
                for mut client in listener.incoming().flatten() {
                    let _ = client.write_all(&says);
                    clients.push(client);
                }
            });
            register(&tool, &path)?;
            let (found, modes) = diagnosis(&tool)?;
            ensure!(modes.is_empty() && found.contains(named), "{name}: {found}");
            let said = tool.refused(&["checkpoint", "take", "web1"])?;
            ensure!(said.contains(&*path.to_string_lossy()), "{said}");
            tool.run(&["vm", "remove", "web1"])?;
        }
        cdpd.stop()
    });
}

#[test]
fn a_cut_is_told_to_the_program_of_the_configuration_which_may_forbid_it() {
    run_scene(|scene| {
        let (told, veto) = (scene.path("told"), scene.path("veto"));
        let script =
            format!("cat >>{0}; echo >>{0}; echo seen; test ! -e {1}", told.display(), veto.display());
        let section = format!(
            "[checkpoint]\ncallback = ['/bin/sh', '-c', '{script}']\ncallback_required = true\ncallback_timeout_s = 120\n"
        );
        std::fs::create_dir(scene.path("store"))?;
        std::fs::write(scene.path("store").join("cdpd.toml"), section)?;
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let qmp = scene.path("web1.qmp");
        register(&tool, &qmp)?;
        let mut guest = Guest::builder().disk(&socket).qmp(&qmp).boot(scene)?;
        for mode in ["hot", "live", "pause"] {
            let taken = tool.json(&["checkpoint", "take", "web1", "--mode", mode])?;
            println!("{mode}: {}", taken["figures"]);
            ensure!(taken["figures"]["callback"]["ok"] == true, "{taken}");
            let said = std::fs::read_to_string(&told)?;
            let last: Value = serde_json::from_str(said.lines().last().context("nobody was told")?)?;
            ensure!(last["epoch"] == taken["epoch"] && last["checkpoint"] == taken["id"], "{last}: {taken}");
            ensure!(last["volumes"][0] == "web1" && last["mode"] == mode, "{last}");
        }
        std::fs::write(&veto, "")?;
        for mode in ["hot", "live", "pause"] {
            let said = tool.refused(&["checkpoint", "take", "web1", "--mode", mode])?;
            ensure!(said.contains("callback has failed"), "{said}");
            guest.run("head -c 64k /dev/urandom >/dev/vda && sync")?;
        }
        guest.kill()?;
        cdpd.stop()
    });
}
