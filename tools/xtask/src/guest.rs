//! A guest to play with.

use std::path::Path;

use anyhow::{Result, ensure};
use e2e::{Boot, Guest, Scene};

/// Runs a guest on this terminal until it is switched off.
///
/// # Errors
/// Something that it needs is missing, or QEMU fails.
pub(crate) fn run(socket: &Path, queues: u32, installed: bool) -> Result<()> {
    ensure!(socket.exists(), "nothing listens on {}: is cdpd running?", socket.display());
    let scene = Scene::new()?;
    let boot = if installed { Boot::Disk } else { Boot::Shell };
    let memory_mb = if installed { 512 } else { 256 };
    let guest = Guest::builder().disk(socket).queues(queues).smp(queues).memory_mb(memory_mb);
    guest.into(boot).run_on_terminal(&scene)
}
