//! The guest's world: busybox, this machine's file-system tools, kernel modules and the agent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cpio::Cpio;
use crate::kernel::Module;
use crate::process::run;
use crate::programs::{built, system};

/// Programs of this machine that busybox has not, or only a lesser version of. Debian's busybox prefers its own even
/// to what `$PATH` names first: where it has one, only the path helps (`/tools/blkdiscard`).
const TOOLS: [&str; 5] = ["mke2fs", "e2fsck", "resize2fs", "blkdiscard", "nbd-client"];

/// The first program of the guest. Which of its three lives it leads is on the kernel's command line.
const INIT: &str = include_str!("init.sh");

/// Puts the guest's initramfs together.
///
/// # Errors
/// A program is missing on this machine.
pub(crate) fn build(modules: &[Module]) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    for dir in ["/proc", "/sys", "/dev", "/run", "/tmp", "/mnt", "/root", "/etc"] {
        cpio.directory(Path::new(dir));
    }
    cpio.file(Path::new("/init"), INIT.as_bytes());
    cpio.file(Path::new("/etc/mke2fs.conf"), &read(Path::new("/etc/mke2fs.conf"))?);
    let busybox = system("busybox")?;
    cpio.file(Path::new("/bin/busybox"), &read(&busybox)?);

    let mut libraries = BTreeSet::from_iter(shared_libraries(&busybox)?);
    let tools = TOOLS.iter().map(|name| system(name)).chain([built("guest-agent")]);
    for tool in tools {
        let tool = tool?;
        let name = tool.file_name().context("a program without a name")?;
        cpio.file(&Path::new("/tools").join(name), &read(&tool)?);
        libraries.extend(shared_libraries(&tool)?);
    }
    cpio.symlink(Path::new("/tools/mkfs.ext4"), "mke2fs");
    for library in libraries {
        cpio.file(&library, &read(&library)?);
    }

    let mut order = String::new();
    for Module { name, bytes } in modules {
        cpio.file(Path::new(&format!("/modules/{name}.ko")), bytes);
        order.push_str(name);
        order.push('\n');
    }
    cpio.file(Path::new("/modules/order"), order.as_bytes());
    Ok(cpio.finish())
}

/// What the dynamic linker would load, itself included, at the paths where it would look.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = run(Command::new("ldd").arg(program), Duration::from_secs(60))?;
    // A static program makes ldd fail; it needs nothing.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(parse_ldd(&text))
}

/// Lines are `libc.so.6 => /lib/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_the_linker_but_not_the_vdso() {
        let text = "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld.so (0x7f)\n";
        assert_eq!(parse_ldd(text), [PathBuf::from("/lib/libc.so.6"), PathBuf::from("/lib64/ld.so")]);
        assert!(parse_ldd("\tstatically linked\n").is_empty());
    }
}
