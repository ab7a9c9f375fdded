//! A Linux guest under QEMU: booted, spoken to, reset and killed.

mod builder;
mod channel;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::process::{Process, tail, wait_for};
use crate::qmp::Qmp;

pub use builder::{Boot, GuestBuilder};
use channel::Channel;
pub use channel::Running;

/// How long a boot may take: 3 s on an idle machine, far more with two emulators on two busy cores.
const BOOT: Duration = Duration::from_secs(120);
/// How long an ordinary command may take.
const COMMAND: Duration = Duration::from_secs(300);

/// A running guest; dropping it kills its QEMU.
#[derive(Debug)]
pub struct Guest {
    name: String,
    // Before the process, so that nothing is said to a dead one.
    channel: Option<Channel>,
    qmp: Qmp,
    qemu: Process,
    places: Places,
    /// Kept once it is there: QEMU forgets what a connection that has gone had typed.
    keyboard: Option<UnixStream>,
}

/// Paths that QEMU and the host meet at.
#[derive(Debug)]
struct Places {
    console: PathBuf,
    console_socket: PathBuf,
    agent: PathBuf,
    qmp: PathBuf,
    log: PathBuf,
    initramfs: PathBuf,
}

/// Connects to the console. What it says is in its log already, but must be read, or QEMU would stop for it.
fn connect_keyboard(socket: &Path) -> Result<UnixStream> {
    let keyboard = UnixStream::connect(socket)?;
    let mut screen = keyboard.try_clone()?;
    std::thread::spawn(move || std::io::copy(&mut screen, &mut std::io::sink()));
    Ok(keyboard)
}

/// Connects to a socket of QEMU once it is there.
fn connect(socket: &Path) -> Result<UnixStream> {
    let what = format!("QEMU's socket {}", socket.display());
    wait_for(&what, BOOT, || Ok(UnixStream::connect(socket).ok()))
}

impl Guest {
    /// Describes a guest, to be booted.
    #[must_use]
    pub fn builder() -> GuestBuilder {
        GuestBuilder::default()
    }

    /// Runs a shell command and returns its output; it must succeed, in a minute and a half.
    ///
    /// # Errors
    /// It fails or takes longer, the guest resets or dies meanwhile.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_within(command, COMMAND)
    }

    /// As [`Guest::run`], with another deadline.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (status, output) = self.spawn(command)?.finish(limit).with_context(|| self.describe(command))?;
        ensure!(status == 0, "{}: exit status {status}\n{output}", self.describe(command));
        Ok(output)
    }

    /// Starts a shell command that goes on while others run.
    ///
    /// # Errors
    /// QEMU is gone, or this guest has no agent.
    pub fn spawn(&mut self, command: &str) -> Result<Running> {
        self.qemu.must_run()?;
        self.channel()?.start(command)
    }

    /// Writes the guest's dirty pages to its disk and forgets the clean ones, so that reads come from the disk.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn drop_caches(&mut self) -> Result<()> {
        self.run("sync && echo 3 >/proc/sys/vm/drop_caches").map(drop)
    }

    /// Speaks to the QEMU that has taken the place of the one before, and to the agent of the machine that was put into it.
    ///
    /// # Errors
    /// There is none, or the agent does not answer.
    pub fn reconnect(&mut self) -> Result<()> {
        self.keyboard = None;
        self.qmp = Qmp::connect(&self.places.qmp)?;
        self.channel = Some(Channel::resumed(connect(&self.places.agent)?)?);
        self.run("true").map(drop)
    }

    /// QEMU's control socket.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Presses the reset button and waits until the guest has booted again; one that stood still runs then.
    ///
    /// # Errors
    /// QEMU refuses, or the guest does not come back.
    pub fn reset(&mut self) -> Result<()> {
        let boots = self.channel()?.boots();
        let stood_still = self.qmp.status()? == "paused";
        self.qmp.execute("system_reset", json!({}))?;
        if stood_still {
            self.qmp.execute("cont", json!({}))?;
        }
        self.wait_boot(boots + 1)
    }

    /// Ends QEMU in an orderly way, as a power-off of the virtual machine does.
    ///
    /// # Errors
    /// QEMU does not end in time, or not with success.
    pub fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", json!({}))?;
        let status = self.qemu.wait(BOOT)?;
        ensure!(status.success(), "QEMU: {status}");
        Ok(())
    }

    /// Kills QEMU: the guest's power cord is pulled.
    ///
    /// # Errors
    /// The operating system's.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill()?;
        // If `cdp-tool` has started it, the kernel kills it after that.
        wait_for(&format!("the end of {}'s QEMU", self.name), BOOT, || {
            Ok(UnixStream::connect(&self.places.qmp).is_err().then_some(()))
        })
    }

    /// Waits until the console has said `text`.
    ///
    /// # Errors
    /// It has not, within `limit`, or QEMU has ended.
    pub fn wait_console(&mut self, text: &str, limit: Duration) -> Result<()> {
        let console = self.places.console.clone();
        wait_for(&format!("'{text}' on the console"), limit, || {
            self.qemu.must_run()?;
            let said = std::fs::read(&console).unwrap_or_default();
            Ok(String::from_utf8_lossy(&said).contains(text).then_some(()))
        })
        .with_context(|| tail(&console, 40))
    }

    /// Types on the console.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn type_console(&mut self, text: &str) -> Result<()> {
        let keyboard = match &mut self.keyboard {
            Some(keyboard) => keyboard,
            empty => empty.insert(connect_keyboard(&self.places.console_socket)?),
        };
        keyboard.write_all(text.as_bytes())?;
        Ok(())
    }

    /// The lines that the console has said so far. One that is still being said is not among them: the serial port says a
    /// character at a time, so half a number would be a number, or none.
    ///
    /// # Errors
    /// The console's log cannot be read.
    pub fn said(&self) -> Result<String> {
        let console = &self.places.console;
        let bytes = std::fs::read(console).with_context(|| console.display().to_string())?;
        Ok(String::from_utf8_lossy(complete_lines(&bytes)).into_owned())
    }

    fn channel(&mut self) -> Result<&mut Channel> {
        self.channel.as_mut().context("this guest was booted without an agent")
    }

    fn wait_boot(&mut self, boots: u64) -> Result<()> {
        let console = self.places.console.clone();
        wait_for(&format!("{} to boot", self.name), BOOT, || {
            self.qemu.must_run()?;
            Ok((self.channel()?.boots() >= boots).then_some(()))
        })
        .with_context(|| tail(&console, 40))
    }

    fn describe(&self, command: &str) -> String {
        format!("{}: {command}", self.name)
    }
}

/// Without what is behind the last end of a line.
fn complete_lines(said: &[u8]) -> &[u8] {
    let end = said.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    &said[..end]
}

#[cfg(test)]
mod tests {
    use super::complete_lines;

    #[test]
    fn a_line_that_is_still_being_said_has_not_been_said() {
        assert_eq!(
            complete_lines(b"sweeps 1 mismatches 0\r\nsweeps 2 mismatches "),
            b"sweeps 1 mismatches 0\r\n"
        );
        assert_eq!(complete_lines(b"sweeps 1"), b"");
        assert_eq!(complete_lines(b"sweeps 1\n"), b"sweeps 1\n");
    }
}
