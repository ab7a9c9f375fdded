//! QEMU's own vhost-user-blk server, on a raw file: it tells a fault of this test bed from one of ours.

use std::path::Path;

use anyhow::Result;

use crate::process::{Process, tied, wait_for};
use crate::programs::system;
use crate::scene::Scene;

/// A running `qemu-storage-daemon`; dropping it kills it.
#[derive(Debug)]
pub struct StorageDaemon {
    /// Owns the process.
    process: Process,
}

impl StorageDaemon {
    /// Exports a raw file on a vhost-user socket.
    ///
    /// # Errors
    /// The program is missing or does not open its socket in time.
    pub fn export(scene: &Scene, image: &Path, socket: &Path, queues: u32) -> Result<Self> {
        let mut command = tied(&system("qemu-storage-daemon")?);
        let file = format!("driver=file,node-name=file,filename={},discard=unmap", image.display());
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=raw,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        );
        command.args(["--blockdev", &file]);
        command.args(["--blockdev", "driver=raw,node-name=raw,file=file,discard=unmap", "--export", &export]);
        let mut process = Process::spawn("qemu-storage-daemon", command, &scene.path("storage-daemon.log"))?;
        wait_for("qemu-storage-daemon's socket", std::time::Duration::from_secs(60), || {
            process.must_run()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { process })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}
