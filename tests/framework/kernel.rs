//! The guests' kernel and its modules, as `make deps` unpacked them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::run;
use crate::programs::{cache, system};

/// What the guest needs beyond what its kernel has built in.
const WANTED: [&str; 5] = ["virtio_pci", "virtio_blk", "ext4", "virtio_net", "nbd"];

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The kernel that QEMU boots.
    pub(crate) image: PathBuf,
    modules: PathBuf,
}

/// A kernel module, decompressed.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

impl Kernel {
    /// Finds the kernel in the cache.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn find() -> Result<Self> {
        let root = cache()?.join("kernel/current");
        let hint = || format!("no kernel for the guests in {}: run `make deps` first", root.display());
        let image = entries(&root.join("boot"))
            .with_context(hint)?
            .into_iter()
            .find(|path| name_of(path).starts_with("vmlinuz"))
            .with_context(hint)?;
        let lib = if root.join("lib/modules").is_dir() { "lib/modules" } else { "usr/lib/modules" };
        let modules = entries(&root.join(lib)).with_context(hint)?.pop().with_context(hint)?;
        Ok(Self { image, modules })
    }

    /// The modules that a guest needs, each after those that it depends on.
    ///
    /// # Errors
    /// A module is neither there nor built in, or cannot be unpacked.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        let mut files = BTreeMap::new();
        find_modules(&self.modules.join("kernel"), &mut files)?;
        let built_in = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let built_in = built_in.lines().map(|line| module_name(Path::new(line))).collect();
        let mut ordered = Vec::new();
        for name in WANTED {
            add(name, &files, &built_in, &mut ordered)?;
        }
        Ok(ordered)
    }
}

/// Adds a module behind its dependencies. The package has no `modules.dep` (that is made on installing),
/// so they come from the module itself.
fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    built_in: &BTreeSet<String>,
    ordered: &mut Vec<Module>,
) -> Result<()> {
    if built_in.contains(name) || ordered.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let file = files.get(name).with_context(|| format!("the guests' kernel has no {name}"))?;
    let bytes = load(file)?;
    for dependency in depends(&bytes) {
        add(&dependency, files, built_in, ordered)?;
    }
    ordered.push(Module { name: name.to_owned(), bytes });
    Ok(())
}

/// The names in a module's `depends=` entry, a NUL-terminated string of its `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

fn load(file: &Path) -> Result<Vec<u8>> {
    let unpack = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(fs::read(file)?),
    };
    let output = run(Command::new(system(unpack)?).arg("-dc").arg(file), Duration::from_secs(60))?;
    if !output.status.success() {
        bail!("{unpack} cannot unpack {}", file.display());
    }
    Ok(output.stdout)
}

fn find_modules(dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for path in entries(dir)? {
        if path.is_dir() {
            find_modules(&path, found)?;
        } else {
            found.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`.
fn module_name(path: &Path) -> String {
    let name = name_of(path);
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    let mut paths = read.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF..\0alias=x\0depends=virtio,virtio-ring\0name=y\0";
        assert_eq!(depends(module), ["virtio", "virtio_ring"]);
        assert!(depends(b"\x7fELF\0depends=\0name=virtio\0").is_empty());
        assert!(depends(b"").is_empty());
    }

    #[test]
    fn a_module_is_named_by_its_file() {
        assert_eq!(module_name(Path::new("kernel/drivers/char/hw_random/virtio-rng.ko.xz")), "virtio_rng");
        assert_eq!(module_name(Path::new("ext4.ko")), "ext4");
    }
}
