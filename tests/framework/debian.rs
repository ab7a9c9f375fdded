//! A real Debian, to be booted from a volume.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{run, run_ok};
use crate::programs::{cache, system};

/// The release: the newest that the oldest Debian we build on can install, and of the guests' kernel's age.
const RELEASE: &str = "bookworm";
/// Downloading and unpacking a hundred packages; a minute and a half here.
const BOOTSTRAP: Duration = Duration::from_secs(1200);

/// The name that the installed system goes by; its login prompt shows it.
pub const HOST_NAME: &str = "timetraveller";

/// A raw ext4 image of a minimal Debian with systemd, made once and kept in the cache.
///
/// # Errors
/// Not root, a program is missing, or Debian's mirror is out of reach.
pub fn root_image() -> Result<PathBuf> {
    image(RELEASE, "1G", &[])
}

/// The same with `PostgreSQL` as Debian packages it, which starts with the system.
///
/// # Errors
/// As [`root_image`].
pub fn postgresql_image() -> Result<PathBuf> {
    image(&format!("{RELEASE}-postgresql"), "2G", &["postgresql"])
}

/// The same with fio, which can be mounted elsewhere and run from there.
///
/// # Errors
/// As [`root_image`].
pub fn fio_image() -> Result<PathBuf> {
    image(&format!("{RELEASE}-fio"), "2G", &["fio"])
}

fn image(name: &str, size: &str, packages: &[&str]) -> Result<PathBuf> {
    let dir = cache()?.join("debian");
    let image = dir.join(format!("{name}.ext4"));
    if image.exists() {
        return Ok(image);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "debootstrap needs root, once: its result is kept in {}",
        dir.display()
    );
    fs::create_dir_all(&dir)?;
    let work = tempfile::tempdir_in(&dir)?;
    let root = work.path().join("root");
    let made = work.path().join("root.ext4");
    bootstrap(&root)?;
    if !packages.is_empty() {
        install(&root, packages)?;
    }
    configure(&root)?;
    let mut mke2fs = Command::new(system("mke2fs")?);
    mke2fs.args(["-q", "-t", "ext4", "-L", "root", "-d"]).arg(&root).arg(&made).arg(size);
    run_ok(&mut mke2fs, BOOTSTRAP)?;
    fs::rename(&made, &image)?;
    Ok(image)
}

fn bootstrap(root: &Path) -> Result<()> {
    let mut debootstrap = Command::new(system("debootstrap")?);
    debootstrap.args(["--variant=minbase", "--include=systemd-sysv,udev", RELEASE]).arg(root);
    debootstrap.arg("http://deb.debian.org/debian");
    let output = run(&mut debootstrap, BOOTSTRAP)?;
    if !output.status.success() {
        let log = fs::read_to_string(root.join("debootstrap/debootstrap.log")).unwrap_or_default();
        anyhow::bail!("debootstrap: {}\n{}\n{log}", output.status, String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// Installs packages into a bootstrapped system, without starting what is in them: that would run on this machine.
fn install(root: &Path, packages: &[&str]) -> Result<()> {
    let policy = root.join("usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
    // For the mirror's name.
    fs::copy("/etc/resolv.conf", root.join("etc/resolv.conf"))?;
    let mut apt = Command::new(system("chroot")?);
    apt.arg(root).args(["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]);
    apt.args(["apt-get", "-q", "-y", "--no-install-recommends", "install"]).args(packages);
    run_ok(&mut apt, BOOTSTRAP)?;
    fs::remove_file(policy)?;
    Ok(())
}

/// A host name, a root without a password, the disk, and no package files.
fn configure(root: &Path) -> Result<()> {
    fs::write(root.join("etc/hostname"), format!("{HOST_NAME}\n"))?;
    fs::write(root.join("etc/fstab"), "/dev/vda / ext4 errors=panic 0 1\n")?;
    let shadow = root.join("etc/shadow");
    let users = fs::read_to_string(&shadow)?;
    let (_, rest) = users.split_once('\n').context("no users")?;
    let (root_user, _) = users.split_once(':').context("no users")?;
    ensure!(root_user == "root", "the first user is {root_user}");
    fs::write(&shadow, format!("root::19000:0:99999:7:::\n{rest}"))?;
    let archives = root.join("var/cache/apt/archives");
    fs::remove_dir_all(&archives)?;
    fs::create_dir_all(archives.join("partial"))?;
    Ok(())
}
