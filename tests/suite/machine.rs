//! A registered machine under load: saved, ended, and brought back.

use std::path::PathBuf;

use anyhow::{Context, Result};
use e2e::{Guest, GuestBuilder, Scene, Tool};
use serde_json::Value;

use crate::load::Load;

/// Its name.
pub(crate) const NAME: &str = "web1";

/// What a machine has of what checkpoints depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) cpus: u32,
    /// Of each disk.
    pub(crate) queues: u32,
    pub(crate) disks: usize,
}

impl Shape {
    /// Two processors, each with a queue to the one disk.
    pub(crate) const SIMPLE: Self = Self { cpus: 2, queues: 2, disks: 1 };

    /// A writer for each processor, so that all queues are busy.
    fn load(self) -> Load {
        Load { disks: self.disks, writers: u64::from(self.cpus) }
    }
}

/// A machine that the daemon knows, and how to start its QEMU.
pub(crate) struct Machine<'a> {
    scene: &'a Scene,
    tool: Tool,
    shape: Shape,
    builder: GuestBuilder,
    qmp: PathBuf,
}

impl<'a> Machine<'a> {
    /// Makes its disks, with what the load needs, and serves them. It is registered by the socket `registered`, if that
    /// is not QEMU's own.
    pub(crate) fn new(
        scene: &'a Scene,
        tool: &Tool,
        shape: Shape,
        registered: Option<PathBuf>,
    ) -> Result<Self> {
        let data = scene.path("data.img");
        shape.load().image(&data)?;
        let qmp = scene.path("web1.qmp");
        let mut builder = Guest::builder().queues(shape.queues).smp(shape.cpus).qmp(&qmp);
        let mut register = vec!["vm".to_owned(), "register".to_owned(), NAME.to_owned()];
        let path = registered.as_ref().unwrap_or(&qmp);
        register.extend(["--qmp".to_owned(), path.to_string_lossy().into_owned()]);
        for disk in 0..shape.disks {
            let volume = format!("{NAME}-{disk}");
            tool.run(&["volume", "create", &volume, "--from", &data.to_string_lossy(), "--format", "raw"])?;
            builder = builder.disk(&tool.serve(scene, &volume, shape.queues)?);
            register.extend(["--volume".to_owned(), volume]);
        }
        tool.run(&register.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(Self { scene, tool: tool.clone(), shape, builder, qmp })
    }

    /// The socket of its QEMU for the daemon.
    pub(crate) fn qmp(&self) -> &PathBuf {
        &self.qmp
    }

    /// Boots it and waits until its load is at work.
    pub(crate) fn boot(&self) -> Result<Guest> {
        let mut guest = self.builder.clone().boot(self.scene)?;
        self.shape.load().start(&mut guest)?;
        Load::wait_for_progress(&guest, 2)?;
        Ok(guest)
    }

    /// A QEMU that waits to become this machine, whose last one has left its disks.
    pub(crate) fn waiting(&self) -> Result<Guest> {
        (0..self.shape.disks).try_for_each(|disk| self.tool.wait_until_free(&format!("{NAME}-{disk}")))?;
        self.builder.clone().waiting().boot(self.scene)
    }

    /// Takes a checkpoint.
    pub(crate) fn take(&self, mode: &str) -> Result<Value> {
        let taken = self.tool.json(&["checkpoint", "take", NAME, "--mode", mode])?;
        println!("{mode}: {}", taken["figures"]);
        Ok(taken)
    }

    /// All its checkpoints, whatever became of them.
    pub(crate) fn checkpoints(&self) -> Result<Vec<Value>> {
        self.tool.json_lines(&["checkpoint", "list", NAME])
    }

    /// Has a new QEMU go on from a checkpoint, and sees it work for a while without a difference.
    pub(crate) fn bring_back(&self, to: &str) -> Result<Guest> {
        let twin = self.waiting()?;
        self.tool.run(&["vm", "revert", NAME, "--to", to])?;
        Load::wait_for_word(&twin)?;
        Load::wait_for_progress(&twin, 2)?;
        Load::must_match(&twin)?;
        Ok(twin)
    }

    /// Ends a guest's QEMU as a power cut would, and goes on from a checkpoint.
    pub(crate) fn go_back(&self, guest: Guest, to: &str) -> Result<Guest> {
        guest.kill()?;
        self.bring_back(to)
    }
}

/// The number of a checkpoint, as text.
pub(crate) fn id_of(checkpoint: &Value) -> Result<String> {
    checkpoint["id"].as_u64().map(|id| id.to_string()).with_context(|| format!("no id in {checkpoint}"))
}
