//! Where the programs are: those under test, and those of the machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::run_ok;

/// The directory with `cdpd`, `cdp-tool` and `guest-agent`: where this very program was built, or
/// `$HINDSIGHT_BIN_DIR` for the two first (to test an installed version).
///
/// # Errors
/// The program has not been built.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = env::current_exe()?;
    let own = own.parent().context("this program has no directory")?;
    // Test programs lie one level down.
    let built = if own.ends_with("deps") { own.parent().unwrap_or(own) } else { own };
    let dir = match env::var_os("HINDSIGHT_BIN_DIR") {
        Some(dir) if matches!(name, "cdpd" | "cdp-tool") => PathBuf::from(dir),
        _ => built.to_owned(),
    };
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `make build` first", path.display());
    }
    Ok(path)
}

/// A program of this machine; the administrator's directories count even where `$PATH` omits them.
///
/// # Errors
/// It is not installed.
pub fn system(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed: run `make deps` first"))
}

/// Where downloads are kept between runs.
///
/// # Errors
/// Neither `$XDG_CACHE_HOME` nor `$HOME` is set.
pub fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(&env::var_os("HOME").context("$HOME is not set")?).join(".cache"),
    };
    Ok(base.join("hindsight"))
}

/// QEMU's version, as (major, minor).
///
/// # Errors
/// QEMU is not installed or says something else.
pub fn qemu_version() -> Result<(u32, u32)> {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    if let Some(version) = VERSION.get() {
        return Ok(*version);
    }
    let qemu = system("qemu-system-x86_64")?;
    let text = run_ok(Command::new(qemu).arg("--version"), Duration::from_secs(60))?;
    let version = parse_version(&text).with_context(|| format!("no version in: {text}"))?;
    Ok(*VERSION.get_or_init(|| version))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn qemu_versions_are_read_from_what_it_prints() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopy"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian)"), Some((7, 2)));
        assert_eq!(parse_version("no such thing"), None);
    }
}
