//! Interruptions: SIGINT and SIGTERM. They end the program, but leave no unfinished file behind, and nobody who still writes
//! one; and what can be given up in good order hears of them instead.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::Context;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::{Builder, NamedTempFile};
use tokio::signal::unix::{SignalKind, signal};

use crate::output::say;

/// Files to remove when a signal ends the program.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// A program to end when a signal ends this one.
static HELPER: Mutex<Option<OwnedFd>> = Mutex::new(None);
static WATCH: Once = Once::new();
static INTERRUPTION: Mutex<Interruption> = Mutex::new(Interruption::Ends);

/// The exit status of an interruption: a failure.
const INTERRUPTED: i32 = 2;

/// What becomes of an interruption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interruption {
    /// It ends the program.
    Ends,
    /// Somebody listens: whether there has been one. He may be waiting for a daemon that never answers, so a second one ends
    /// the program all the same.
    IsHeard(bool),
    /// Somebody else has signals come to him.
    IsSeenTo,
}

impl Interruption {
    /// There is one: whether the program ends.
    fn comes(&mut self) -> bool {
        match self {
            Self::Ends => true,
            Self::IsHeard(already) => std::mem::replace(already, true),
            Self::IsSeenTo => false,
        }
    }
}

/// Has a thread wait for signals, from now on. What the system would do about them does not come back.
fn watch_signals() {
    WATCH.call_once(|| {
        // Without the watcher an interruption leaves things behind, which is no reason to do nothing at all.
        let _ = std::thread::Builder::new().name("signals".to_owned()).spawn(watch);
    });
}

/// Leaves interruptions to the caller from now on, who has them come to himself.
pub(crate) fn leave_to_caller() {
    *interruption() = Interruption::IsSeenTo;
}

/// While it lives, an interruption does not end the program, but a second one does. There is one at a time.
pub(crate) struct Listening(());

impl Listening {
    pub(crate) fn begin() -> Self {
        watch_signals();
        *interruption() = Interruption::IsHeard(false);
        Self(())
    }

    /// Whether there has been an interruption since.
    pub(crate) fn was_interrupted(&self) -> bool {
        *interruption() == Interruption::IsHeard(true)
    }

    /// The same; from here on one ends the program.
    pub(crate) fn end(self) -> bool {
        std::mem::replace(&mut *interruption(), Interruption::Ends) == Interruption::IsHeard(true)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        *interruption() = Interruption::Ends;
    }
}

fn interruption() -> MutexGuard<'static, Interruption> {
    INTERRUPTION.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, a signal that ends this program ends the other one, too.
pub(crate) struct Helper(());

/// Starts a program that works for this one. There is one at a time.
pub(crate) fn start_helper(command: &mut Command) -> io::Result<(Child, Helper)> {
    watch_signals();
    // Held until it can be found there: a signal that comes now waits for that.
    let mut place = helper();
    let child = command.spawn()?;
    // One that cannot be found may outlive us, which is no reason to do without it.
    *place = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok();
    Ok((child, Helper(())))
}

impl Drop for Helper {
    fn drop(&mut self) {
        *helper() = None;
    }
}

fn helper() -> MutexGuard<'static, Option<OwnedFd>> {
    HELPER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new file in `directory`, removed unless it is kept: also when SIGINT or SIGTERM ends the program.
pub(crate) fn unfinished_file(directory: &Path) -> anyhow::Result<Unfinished> {
    watch_signals();
    let cannot = || format!("cannot make a file in {}", directory.display());
    let file = Builder::new()
        .prefix(".cdp-tool-")
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .with_context(cannot)?;
    // What the umask has left. Until it is finished it may hold what others must not read: a disk, a private image.
    let permissions = file.as_file().metadata().with_context(cannot)?.permissions();
    file.as_file().set_permissions(Permissions::from_mode(0o600)).with_context(cannot)?;
    unfinished().push(file.path().to_owned());
    Ok(Unfinished { file: Some(file), permissions })
}

/// A file that is not complete yet.
pub(crate) struct Unfinished {
    file: Option<NamedTempFile>,
    /// Those of a new file.
    permissions: Permissions,
}

impl Unfinished {
    /// The file.
    pub(crate) fn file(&self) -> anyhow::Result<&std::fs::File> {
        Ok(self.file.as_ref().context("the file has been finished")?.as_file())
    }

    /// Its present name.
    pub(crate) fn path(&self) -> anyhow::Result<&Path> {
        Ok(self.file.as_ref().context("the file has been finished")?.path())
    }

    /// Gives it its name, in place of a file that has it, whose permissions it takes over.
    ///
    /// # Durability
    /// Both content and name survive a power cut once this returns.
    pub(crate) fn finish(mut self, name: &Path) -> anyhow::Result<()> {
        // 1. Sync the content. Crash: the unfinished file is left, under its own name.
        self.file()?.sync_all().with_context(|| format!("cannot write {}", name.display()))?;
        let Some(file) = self.file.take() else { return Ok(()) };
        let permissions = std::fs::metadata(name).map_or(self.permissions.clone(), |old| old.permissions());
        let set = file.as_file().set_permissions(permissions);
        set.with_context(|| format!("cannot set the permissions of {}", name.display()))?;
        forget(file.path());
        // 2. Rename. Crash: the name means the old file or the new one, never a part.
        file.persist(name).with_context(|| format!("cannot make {}", name.display()))?;
        // 3. Sync the directory.
        let directory = std::fs::File::open(directory_of(name))?;
        directory.sync_all().with_context(|| format!("cannot make {} durable", name.display()))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            forget(file.path());
        }
    }
}

/// The directory of a file's name.
pub(crate) fn directory_of(name: &Path) -> &Path {
    match name.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn forget(path: &Path) {
    unfinished().retain(|other| other != path);
}

fn watch() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    let signalled = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if interruption().comes() {
                return std::io::Result::Ok(());
            }
        }
    });
    if signalled.is_ok() {
        // Held to the end, so that whoever waits for the helper does not come to complain of its death.
        let unfinished = unfinished();
        if let Some(process) = &*helper() {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        for path in &*unfinished {
            let _ = std::fs::remove_file(path);
        }
        say("interrupted");
        std::process::exit(INTERRUPTED);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_interruption_ends_the_program_unless_somebody_sees_to_it() {
        assert!(Interruption::Ends.comes());
        let mut heard = Interruption::IsHeard(false);
        assert_eq!([heard.comes(), heard.comes()], [false, true]);
        assert_eq!(heard, Interruption::IsHeard(true));
        let mut seen_to = Interruption::IsSeenTo;
        assert_eq!([seen_to.comes(), seen_to.comes()], [false, false]);
    }

    #[test]
    fn what_is_unfinished_is_private_and_what_is_replaced_keeps_its_permissions() {
        let directory = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let usual = directory.path().join("usual");
        std::fs::write(&usual, "").unwrap();

        let file = unfinished_file(directory.path()).unwrap();
        assert_eq!(mode(file.path().unwrap()), 0o600);
        let new = directory.path().join("new");
        file.finish(&new).unwrap();
        assert_eq!(mode(&new), mode(&usual));

        std::fs::set_permissions(&new, Permissions::from_mode(0o640)).unwrap();
        unfinished_file(directory.path()).unwrap().finish(&new).unwrap();
        assert_eq!(mode(&new), 0o640);
    }
}
