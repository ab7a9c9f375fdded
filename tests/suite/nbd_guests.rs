//! NBD beside guests: the kernel's own client in one guest, and a head that another guest has.

use std::process::Command;

use anyhow::ensure;
use e2e::process::{run, wait_for};
use e2e::programs::system;
use e2e::workload::files_of;
use e2e::{Cdpd, Guest, run_scene};

use crate::nbd::{Nbd, client};
use crate::writers::{STEP, Writer, format};

const SEED: u64 = 23;
/// Bytes of files, in mebibytes.
const MIB: u64 = 16;

#[test]
fn a_guest_mounts_the_past_of_a_disk_that_another_guest_writes() {
    run_scene(|scene| {
        let nbd = Nbd::configure(scene)?;
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "256M", 1)?;
        let mut writer = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut writer, "vda")?;
        writer.run(&format!("guest-agent fill /mnt/vda/files {SEED} {MIB} && sync"))?;
        tool.run(&["mark", "web1", "filled"])?;
        writer.run("rm -rf /mnt/vda/files")?;
        let mut busy = Writer::synced(&mut writer, "/mnt/vda/busy", 1)?;

        let mut reader = Guest::builder().network().boot(scene)?;
        let port = nbd.port;
        reader.run(&format!("nbd-client 10.0.2.2 {port} /dev/nbd0 -N web1@mark:filled -R -b 512"))?;
        // Its journal is as the running guest had left it: not to be replayed on a disk that cannot be written.
        reader.run("mkdir -p /mnt/past && mount -t ext4 -o ro,noload /dev/nbd0 /mnt/past")?;
        let count = files_of(SEED, MIB << 20);
        reader.run(&format!("guest-agent check /mnt/past/files {SEED} {count}"))?;
        busy.wait_files(30)?;
        reader.run("echo 3 >/proc/sys/vm/drop_caches")?;
        reader
            .run(&format!("test ! -e /mnt/past/busy && guest-agent check /mnt/past/files {SEED} {count}"))?;
        reader.run("umount /mnt/past && nbd-client -d /dev/nbd0")?;

        // A writable view of the same instant: the journal is replayed there, and nowhere else.
        reader.run(&format!("nbd-client 10.0.2.2 {port} /dev/nbd1 -N web1@mark:filled:scratch -b 512"))?;
        reader.run("mount -t ext4 /dev/nbd1 /mnt/past && echo changed >/mnt/past/note && sync")?;
        reader.run(&format!("guest-agent check /mnt/past/files {SEED} {count} && umount /mnt/past"))?;
        reader.run("nbd-client -d /dev/nbd1")?;
        reader.quit()?;

        busy.stop_and_check(&mut writer)?;
        writer.run("umount /mnt/vda && e2fsck -f -n /dev/vda")?;
        writer.quit()?;
        cdpd.stop()
    });
}

#[test]
fn a_head_takes_no_writes_over_nbd_while_a_guest_has_it() {
    run_scene(|scene| {
        let nbd = Nbd::configure(scene)?;
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let head = nbd.uri("web1");
        let write = ["-f", "raw", "-c", "write -P 1 8M 4k", "-c", "flush", &head];
        client("qemu-io", &write)?;

        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        guest.run("dd if=/dev/zero of=/dev/vda bs=4k seek=2048 count=1 conv=fsync 2>/dev/null")?;
        let output = run(Command::new(system("qemu-io")?).args(write), STEP)?;
        let text =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(text.contains("failed") && !text.contains("wrote 4096"), "{text}");
        client("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 8M 4k", &head])?;
        guest.quit()?;
        wait_for("the guest to be gone", STEP, || {
            let output = run(Command::new(system("qemu-io")?).args(write), STEP)?;
            Ok(String::from_utf8_lossy(&output.stdout).contains("wrote 4096").then_some(()))
        })?;
        cdpd.stop()
    });
}
