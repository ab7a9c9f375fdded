//! A guest that has turned its disk's write cache off relies on each write that was answered, wherever it goes on from.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::wait_for;
use e2e::{Cdpd, Guest, Tool, run_scene};

use crate::machine::id_of;
use crate::vm_run::wait_for_end;

const LIMIT: Duration = Duration::from_secs(120);
/// So many are looked at.
const WRITES: u64 = 64;
const SHOW: &str = "cat /sys/block/vda/cache_type";

/// Turns the cache off, and has the guest write from then on, each time for good, until it is stopped.
fn write_through(guest: &mut Guest) -> Result<()> {
    ensure!(guest.run(SHOW)? == "write back\n", "a machine that boots has it on");
    guest.run("echo 'write through' >/sys/block/vda/cache_type")?;
    let write = "dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync 2>/dev/null";
    let until_stopped = format!("(until [ -e /stop ]; do {write}; done; touch /stopped)");
    guest.run(&format!("{until_stopped} </dev/null >/dev/null 2>&1 &")).map(drop)
}

#[derive(Debug)]
struct Stats {
    writes: u64,
    flushes: u64,
    syncs: u64,
}

fn stats(tool: &Tool, volume: &str) -> Result<Stats> {
    let shown = tool.json(&["volume", "show", volume])?;
    let count = |what: &str| shown["stats"][what].as_u64().with_context(|| format!("no {what} in {shown}"));
    Ok(Stats { writes: count("writes")?, flushes: count("flushes")?, syncs: count("syncs")? })
}

/// Sees the guest write on, without a flush, and have its writes synced.
fn is_synced(tool: &Tool, volume: &str) -> Result<()> {
    let before = stats(tool, volume)?;
    let now = wait_for("the guest's writes", LIMIT, || {
        let now = stats(tool, volume)?;
        Ok((now.writes >= before.writes + WRITES).then_some(now))
    })?;
    ensure!(
        now.flushes == before.flushes,
        "the guest flushes, which this test is not about: {before:?} {now:?}"
    );
    // The daemon's own syncs, of which there is one a second, spare some and are not counted.
    ensure!(
        now.syncs >= before.syncs + WRITES / 2,
        "writes were answered without a sync: {before:?} {now:?}"
    );
    Ok(())
}

#[test]
fn a_write_cache_that_was_off_is_off_where_a_machine_goes_back_and_in_its_copy() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        tool.run(&["volume", "create", "web1", "--size", "64M"])?;
        let builder = Guest::builder().smp(2);
        let run = ["vm", "run", "web1", "--volume", "web1"];
        let mut guest = builder.clone().run_by(scene, &tool, &run)?;
        write_through(&mut guest)?;
        is_synced(&tool, "web1")?;
        tool.run(&["checkpoint", "take", "web1", "--label", "off"])?;
        guest.run("echo 'write back' >/sys/block/vda/cache_type")?;

        tool.run(&["vm", "revert", "web1", "--to", "off", "--no-save"])?;
        is_synced(&tool, "web1")?;
        let copy = ["vm", "clone", "web1", "web2", "--at", "off"];
        let copy = builder.clone().waiting().run_by(scene, &tool, &copy)?;
        is_synced(&tool, "web2")?;
        copy.kill()?;

        // A driver that begins anew finds it as QEMU has read it.
        guest.reconnect()?;
        guest.run("touch /stop; until [ -e /stopped ]; do usleep 10000; done")?;
        let begin_anew = "disk=$(basename $(readlink /sys/block/vda/device)) && cd /sys/bus/virtio/drivers/virtio_blk && \
             echo $disk >unbind && echo $disk >bind && cat /sys/bus/virtio/devices/$disk/block/*/cache_type";
        let shown = guest.run(begin_anew)?;
        ensure!(shown == "write through\n", "{shown}");
        guest.kill()?;

        wait_for_end(&tool, "web1")?;
        let mut plain = builder.run_by(scene, &tool, &["vm", "run", "web1"])?;
        ensure!(plain.run(SHOW)? == "write back\n", "it has booted");
        plain.kill()?;
        cdpd.stop()
    });
}

#[test]
fn a_write_cache_that_was_off_is_off_in_a_qemu_that_was_started_by_hand() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let (socket, qmp) = (tool.create_and_serve(scene, "web1", "64M", 1)?, scene.path("web1.qmp"));
        tool.run(&["vm", "register", "web1", "--qmp", &qmp.to_string_lossy(), "--volume", "web1"])?;
        let builder = Guest::builder().disk(&socket).qmp(&qmp);
        let mut guest = builder.clone().boot(scene)?;
        write_through(&mut guest)?;
        let taken = tool.json(&["checkpoint", "take", "web1"])?;
        guest.kill()?;
        tool.wait_until_free("web1")?;

        let twin = builder.waiting().boot(scene)?;
        tool.run(&["vm", "revert", "web1", "--to", &id_of(&taken)?])?;
        is_synced(&tool, "web1")?;
        cdpd.kill9()?;
        cdpd.start_again()?;
        is_synced(&tool, "web1")?;
        twin.kill()?;
        cdpd.stop()
    });
}
