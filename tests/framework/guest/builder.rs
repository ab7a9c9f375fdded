//! From a description to a running QEMU.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result};

use super::{Channel, Guest, Places, connect};
use crate::cdpd::Tool;
use crate::initramfs;
use crate::kernel::Kernel;
use crate::process::{Process, tied};
use crate::programs::{qemu_version, system};
use crate::qmp::Qmp;
use crate::scene::Scene;

/// What the guest is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boot {
    /// Running commands: a small world in memory, with an agent in it.
    #[default]
    Agent,
    /// Handing over to the system installed on the first disk.
    Disk,
    /// A shell for a person, on the terminal of this process.
    Shell,
}

impl Boot {
    fn mode(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Disk => "root",
            Self::Shell => "shell",
        }
    }
}

/// A guest to be booted.
#[derive(Clone, Debug)]
pub struct GuestBuilder {
    disks: Vec<PathBuf>,
    queues: u32,
    memory_mb: u32,
    smp: u32,
    network: bool,
    boot: Boot,
    incoming: Option<String>,
    more_qmp: Option<PathBuf>,
    more_serial: Option<PathBuf>,
    more: Vec<String>,
    huge_pages: bool,
    private_memory: bool,
    /// `cdp-tool` starts it.
    supervised: bool,
}

impl Default for GuestBuilder {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            queues: 1,
            memory_mb: 256,
            smp: 1,
            network: false,
            boot: Boot::Agent,
            incoming: None,
            more_qmp: None,
            more_serial: None,
            more: Vec::new(),
            huge_pages: false,
            private_memory: false,
            supervised: false,
        }
    }
}

impl GuestBuilder {
    /// Adds a vhost-user-blk disk: the first is `/dev/vda`.
    #[must_use]
    pub fn disk(mut self, vhost_user_socket: &Path) -> Self {
        self.disks.push(vhost_user_socket.to_owned());
        self
    }

    /// Queues of each disk; a guest uses at most one per CPU.
    #[must_use]
    pub fn queues(mut self, queues: u32) -> Self {
        self.queues = queues;
        self
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory_mb(mut self, memory_mb: u32) -> Self {
        self.memory_mb = memory_mb;
        self
    }

    /// The guest's CPUs.
    #[must_use]
    pub fn smp(mut self, cpus: u32) -> Self {
        self.smp = cpus;
        self
    }

    /// Gives it a network card; this machine's loopback addresses are 10.0.2.2 for it.
    #[must_use]
    pub fn network(mut self) -> Self {
        self.network = true;
        self
    }

    /// What to boot into.
    #[must_use]
    pub fn into(mut self, boot: Boot) -> Self {
        self.boot = boot;
        self
    }

    /// Does not boot, but goes on where a guest that was built alike has been saved to this file. Its agent does not
    /// know that, so it can only be heard on its console.
    #[must_use]
    pub fn restored_from(mut self, saved: &Path) -> Self {
        // `file:` would do, but is younger than Debian 12's QEMU.
        let saved = saved.to_string_lossy().replace('\'', r"'\''");
        self.incoming = Some(format!("exec:cat '{saved}'"));
        self
    }

    /// Does not boot, but waits until it is told where a guest that was built alike comes from.
    #[must_use]
    pub fn waiting(mut self) -> Self {
        self.incoming = Some("defer".to_owned());
        self
    }

    /// Gives QEMU one more QMP socket, for the daemon: each serves one client.
    #[must_use]
    pub fn qmp(mut self, socket: &Path) -> Self {
        self.more_qmp = Some(socket.to_owned());
        self
    }

    /// Gives it one more serial port, `/dev/ttyS2`, which is this socket here. What it says while nobody is connected is
    /// lost.
    #[must_use]
    pub fn serial(mut self, socket: &Path) -> Self {
        self.more_serial = Some(socket.to_owned());
        self
    }

    /// Has its memory in huge pages, of which the administrator must have set enough aside (`vm.nr_hugepages`).
    #[must_use]
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Has its memory where only QEMU can change it: its vhost-user disks are of no use then, so it must not boot.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.private_memory = true;
        self
    }

    /// Gives QEMU more arguments.
    #[must_use]
    pub fn more(mut self, arguments: &[&str]) -> Self {
        self.more.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Starts QEMU and waits until the guest answers; one that boots from its disk or is restored is not waited for.
    ///
    /// # Errors
    /// QEMU, the kernel or a tool is missing, QEMU refuses, or the guest does not boot in time.
    pub fn boot(self, scene: &Scene) -> Result<Guest> {
        self.start(scene, None)
    }

    /// As [`GuestBuilder::boot`], but QEMU is started by a command of `cdp-tool` (`vm run`, `vm clone`), to which it is
    /// given behind `--`, without disks and shared memory. Killing the guest kills both.
    ///
    /// # Errors
    /// As [`GuestBuilder::boot`].
    pub fn run_by(self, scene: &Scene, tool: &Tool, command: &[&str]) -> Result<Guest> {
        self.start(scene, Some((tool, command)))
    }

    fn start(mut self, scene: &Scene, runner: Option<(&Tool, &[&str])>) -> Result<Guest> {
        self.supervised = runner.is_some();
        let name = format!("guest{}", scene.next_guest());
        let places = Places {
            console: scene.path(&format!("{name}.console.log")),
            console_socket: scene.path(&format!("{name}.console")),
            agent: scene.path(&format!("{name}.agent")),
            qmp: scene.path(&format!("{name}.qmp")),
            log: scene.path(&format!("{name}.qemu.log")),
            initramfs: scene.path("initramfs"),
        };
        let mut command = self.command(&places)?;
        command.args(["-display", "none", "-qmp"]).arg(listening(&places.qmp, ""));
        if let Some(socket) = &self.more_qmp {
            command.arg("-qmp").arg(listening(socket, ""));
        }
        let log = format!(",logfile={}", places.console.display());
        command.arg("-chardev").arg(named_socket("console", &places.console_socket, &log));
        command.arg("-chardev").arg(named_socket("agent", &places.agent, ""));
        command.args(["-serial", "chardev:console", "-serial", "chardev:agent"]);
        if let Some(socket) = &self.more_serial {
            command.arg("-chardev").arg(named_socket("more", socket, "")).args(["-serial", "chardev:more"]);
        }
        command.args(&self.more);
        if let Some((tool, words)) = runner {
            command = handed_over(scene, tool, words, &command)?;
        }

        let qemu = Process::spawn(&name, command, &places.log)?;
        let qmp = Qmp::connect(&places.qmp).with_context(|| crate::process::tail(&places.log, 20))?;
        let channel = match self.boot {
            Boot::Agent if self.incoming.is_none() => Some(Channel::new(connect(&places.agent)?)?),
            Boot::Agent | Boot::Disk | Boot::Shell => None,
        };
        let mut guest = Guest { name, channel, qmp, qemu, places, keyboard: None };
        if guest.channel.is_some() {
            guest.wait_boot(1)?;
            if self.network {
                // What QEMU's user network gives to its first guest.
                guest.run("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip link set lo up")?;
            }
        }
        Ok(guest)
    }

    /// Runs the guest on this process's terminal until QEMU ends.
    ///
    /// # Errors
    /// As [`GuestBuilder::boot`].
    pub fn run_on_terminal(self, scene: &Scene) -> Result<()> {
        let initramfs = scene.path("initramfs");
        let nowhere = PathBuf::new();
        let places = Places {
            console: nowhere.clone(),
            console_socket: nowhere.clone(),
            agent: nowhere.clone(),
            qmp: nowhere.clone(),
            log: nowhere,
            initramfs,
        };
        let mut command = self.command(&places)?;
        command.args(["-display", "none", "-serial", "mon:stdio"]);
        let status = command.status().context("cannot start QEMU")?;
        anyhow::ensure!(status.success(), "QEMU: {status}");
        Ok(())
    }

    /// QEMU with kernel, memory and disks; consoles are the caller's.
    fn command(&self, places: &Places) -> Result<Command> {
        let kernel = Kernel::find()?;
        if !places.initramfs.exists() {
            fs::write(&places.initramfs, shared_initramfs(&kernel)?)?;
        }
        let mut command = tied(&system("qemu-system-x86_64")?);
        // No KVM: ordinary CI machines have none, and one machine's result must be another's.
        command.args(["-nodefaults", "-no-user-config", "-accel", "tcg", "-cpu", "max,la57=off"]);
        let size = format!("{}M", self.memory_mb);
        // Room for a second processor: for a machine that can only have one QEMU's emulator leaves the fences out of
        // instructions with LOCK (CF_PARALLEL in accel/tcg), so that now and then a guest and a server in another process
        // each miss what the other has just said, and a disk stands still for ever.
        let smp = format!("{},maxcpus={}", self.smp, self.smp.max(2));
        command.args(["-machine", "q35", "-smp", &smp, "-m", &size]);
        if !self.supervised {
            // A vhost-user server maps the guest's memory, so it must be a file that can be shared.
            let huge = if self.huge_pages { ",hugetlb=on" } else { "" };
            let share = if self.private_memory { "off" } else { "on" };
            let memory = format!("memory-backend-memfd,id=mem,size={size},share={share}{huge}");
            command.args(["-object", &memory]);
            command.args(["-machine", "memory-backend=mem"]);
        }
        command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&places.initramfs);
        let mode = self.boot.mode();
        // One processor until the devices have their places, then the others (`init.sh`): while memory regions come and go,
        // as they do when the kernel sets up PCI, the emulator of QEMU before 10.0.4 can send another processor's access
        // through a map that it has freed already (https://gitlab.com/qemu-project/qemu/-/issues/3040). QEMU then ends
        // itself (`msix_table_mmio_write: Assertion`), or a processor's timer is never set and its clock stands still.
        command.args(["-append", &format!("console=ttyS0 loglevel=5 maxcpus=1 hindsight.mode={mode}")]);
        let reconnect = if qemu_version()? >= (9, 2) { "reconnect-ms=100" } else { "reconnect=1" };
        for (index, disk) in self.disks.iter().enumerate() {
            let socket = format!("socket,id=disk{index},{reconnect},path={}", disk.display());
            let queues = self.queues;
            let device = format!("vhost-user-blk-pci,chardev=disk{index},num-queues={queues}");
            command.args(["-chardev", &socket, "-device", &device]);
        }
        if let Some(saved) = self.incoming.as_ref().filter(|_| !self.supervised) {
            command.arg("-incoming").arg(saved);
        }
        if self.network {
            command.args(["-nic", "user,model=virtio-net-pci"]);
        }
        Ok(command)
    }
}

/// The command by which `cdp-tool` starts a QEMU. `cdp-tool` lets its QEMU live if it is killed itself; that of a test
/// must not outlive it.
fn handed_over(scene: &Scene, tool: &Tool, words: &[&str], qemu: &Command) -> Result<Command> {
    let script = scene.path("qemu");
    if !script.exists() {
        let qemu = system("qemu-system-x86_64")?;
        let qemu = qemu.display();
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && exec {qemu} --version\nexec setpriv --pdeathsig KILL -- {qemu} \"$@\"\n"
        );
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    }
    let mut command = tool.command(words)?;
    let arguments =
        qemu.get_args().skip_while(|word| !word.to_string_lossy().ends_with("qemu-system-x86_64"));
    command.arg("--").arg(script).args(arguments.skip(1));
    Ok(command)
}

/// One initramfs serves all guests of a test run: what goes into it does not change meanwhile.
fn shared_initramfs(kernel: &Kernel) -> Result<&'static [u8]> {
    static BUILT: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(bytes) = BUILT.get() {
        return Ok(bytes);
    }
    let bytes = initramfs::build(&kernel.modules()?)?;
    Ok(BUILT.get_or_init(|| bytes))
}

fn named_socket(id: &str, path: &Path, more: &str) -> String {
    format!("socket,id={id},path={},server=on,wait=off{more}", path.display())
}

fn listening(path: &Path, more: &str) -> String {
    format!("unix:{},server=on,wait=off{more}", path.display())
}
