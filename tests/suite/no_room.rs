//! The store's file system fills up while a machine is saved: it runs on, and is saved once there is room.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::{run_ok, wait_for};
use e2e::programs::system;
use e2e::{Cdpd, Guest, Scene, Tool, run_scene};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// What the store leaves free, and what it may have beyond that while there is too little: less than the guest changes
/// of its memory, and enough for all else.
const RESERVE: u64 = 64 * MIB;
const LITTLE: u64 = 32 * MIB;
/// What the guest changes of its memory.
const CHANGED: &str = "65536k";

/// A file system in memory, for which the test must be allowed to mount.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Result<Self> {
        std::fs::create_dir(at)?;
        let mut mount = Command::new(system("mount")?);
        run_ok(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at), LIMIT)
            .context("a small file system cannot be mounted; is the test run as root?")?;
        Ok(Self(at.to_owned()))
    }

    /// Fills it up but for so much.
    fn fill(&self, leave: u64) -> Result<()> {
        let ballast = self.0.join("ballast");
        let mut file = File::options().create(true).append(true).open(&ballast)?;
        let there = rustix::fs::statvfs(&self.0)?;
        let mut left = (there.f_bavail * there.f_frsize).saturating_sub(leave);
        let zeroes = vec![0; MIB as usize];
        while left > 0 {
            let now = left.min(MIB);
            file.write_all(&zeroes[..now as usize])?;
            left -= now;
        }
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: who still has a file open keeps it until then.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn states(tool: &Tool) -> Result<Vec<Value>> {
    Ok(tool.json_lines(&["checkpoint", "list", "web1"])?.iter().map(|one| one["state"].clone()).collect())
}

/// What the guest had in memory and what it reads from its disk.
fn is_alive(guest: &mut Guest) -> Result<()> {
    guest
        .run(
            "md5sum -c /sum >/dev/null && dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null >/dev/null",
        )
        .map(drop)
}

fn fails_without_room(scene: &Scene, mode: &str) -> Result<()> {
    let small = Small::mount(&scene.path("store"), "768M")?;
    let settings =
        format!("[store]\nsegment_size = '4M'\npool_segments = 1\nreserve = '{RESERVE}'\nfull_wait_s = 2\n");
    std::fs::write(scene.path("store").join("cdpd.toml"), settings)?;
    let mut cdpd = Cdpd::start(scene)?;
    let tool = cdpd.tool();
    let (socket, qmp) = (tool.create_and_serve(scene, "web1", "64M", 1)?, scene.path("web1.qmp"));
    tool.run(&["vm", "register", "web1", "--qmp", &qmp.to_string_lossy(), "--volume", "web1"])?;
    let mut guest = Guest::builder().disk(&socket).qmp(&qmp).boot(scene)?;
    let before = tool.json(&["checkpoint", "take", "web1", "--mode", mode])?;
    guest.run(&format!("head -c {CHANGED} /dev/urandom >/changed && md5sum /changed >/sum"))?;

    small.fill(RESERVE + LITTLE)?;
    let said = tool.refused(&["checkpoint", "take", "web1", "--mode", mode])?;
    println!("{mode}: {said}");
    ensure!(said.contains("no space for the memory image"), "{mode}: {said}");
    ensure!(guest.qmp().status()? == "running", "{mode}: the machine stands still");
    is_alive(&mut guest)?;
    ensure!(states(&tool)? == ["committed", "aborted"], "{mode}: {:?}", states(&tool)?);

    small.make_room()?;
    wait_for("the guest's disk to take writes", LIMIT, || {
        Ok(guest
            .run("head -c 64k /dev/urandom | dd of=/dev/vda conv=fsync 2>/dev/null")
            .is_ok()
            .then_some(()))
    })?;
    let after = tool.json(&["checkpoint", "take", "web1", "--mode", mode])?;
    ensure!(after["parent"] == before["id"], "{mode}: what was not saved is no parent: {after}");
    ensure!(states(&tool)? == ["committed", "aborted", "committed"], "{mode}: {:?}", states(&tool)?);
    is_alive(&mut guest)?;
    guest.kill()?;
    tool.run(&["verify"])?;
    cdpd.stop()
}

#[test]
fn a_hot_checkpoint_for_which_there_is_no_room_costs_the_guest_nothing() {
    run_scene(|scene| fails_without_room(scene, "hot"));
}

#[test]
fn a_live_checkpoint_for_which_there_is_no_room_costs_the_guest_nothing() {
    run_scene(|scene| fails_without_room(scene, "live"));
}
