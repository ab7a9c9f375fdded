//! `cargo xtask mutants`: do the tests of the store notice bugs? Each bug of a list is planted in a copy of its sources,
//! and the tests must fail, naming the invariant that it breaks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::workspace_root;

/// The list, from the root.
const LIST: &str = "cdp-store/tests/mutants/mutants.toml";
/// What a copy of the store needs to be built.
const COPIED: [&str; 4] = ["Cargo.toml", "Cargo.lock", "cdp-store", "rust-toolchain.toml"];
/// Seeds of the crash test that a mutant is run with.
const SEEDS: &str = "4";
/// Seconds that the tests may take with a bug: many times what they take.
const LIMIT: &str = "3600";
/// How timeout(1) says that it had to end them.
const TIMED_OUT: i32 = 124;
/// Only the mutated package is compiled anew, and quickly.
const QUICK: &str =
    "\n[profile.release.package.cdp-store]\nopt-level = 1\ndebug = false\ncodegen-units = 16\n";

#[derive(Debug, Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

/// A planted bug.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    /// Of cdp-store.
    file: PathBuf,
    /// What occurs once in it.
    old: String,
    new: String,
    /// Which tests must notice; all if empty.
    test: String,
    /// Any of these must be in what they print.
    expect: Vec<String>,
}

/// What became of a mutant.
enum Verdict {
    Caught(String),
    Survived,
    Other(String),
}

/// Plants the bugs whose names contain `only` (all without it), one after the other.
///
/// # Errors
/// One was not noticed, or was noticed as something else, or does not compile.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    let root = &workspace_root()?;
    let list = fs::read_to_string(root.join(LIST)).with_context(|| format!("reading {LIST}"))?;
    let list: List = toml::from_str(&list).with_context(|| format!("reading {LIST}"))?;
    let copy = target_directory(root).join("mutants");
    prepare(root, &copy)?;
    let chosen = |m: &&Mutant| only.is_none_or(|only| m.name.contains(only));
    ensure!(list.mutant.iter().any(|m| chosen(&m)), "no planted bug has such a name");
    let mut failed = Vec::new();
    for mutant in list.mutant.iter().filter(chosen) {
        let started = Instant::now();
        let verdict = judge(root, &copy, mutant).with_context(|| format!("mutant \"{}\"", mutant.name))?;
        let seconds = started.elapsed().as_secs();
        let told = match verdict {
            Verdict::Caught(how) => format!("caught ({how})"),
            Verdict::Survived => "NOT NOTICED".to_owned(),
            Verdict::Other(why) => format!("noticed, but not as expected: {why}"),
        };
        println!("{:<72} {told}, {seconds} s", mutant.name);
        if !told.starts_with("caught") {
            failed.push(mutant.name.as_str());
        }
    }
    ensure!(failed.is_empty(), "{} planted bugs were not noticed: {}", failed.len(), failed.join("; "));
    Ok(())
}

fn target_directory(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// Makes a workspace of cdp-store alone, always in the same place, so that what it depends on is compiled once.
fn prepare(root: &Path, copy: &Path) -> Result<()> {
    if copy.exists() {
        fs::remove_dir_all(copy).with_context(|| format!("removing {}", copy.display()))?;
    }
    for name in COPIED {
        let from = root.join(name);
        if from.exists() {
            copy_tree(&from, &copy.join(name))?;
        }
    }
    let manifest = copy.join("Cargo.toml");
    let text = fs::read_to_string(&manifest)?;
    let (before, rest) = text.split_once("members = [").context("the workspace names no members")?;
    let (_, after) = rest.split_once(']').context("the workspace's members do not end")?;
    let text = format!("{before}members = [\"cdp-store\", \"cdp-store/types\"]{after}{QUICK}");
    fs::write(&manifest, text).with_context(|| format!("writing {}", manifest.display()))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let failed = || format!("copying {}", from.display());
    if from.is_file() {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(failed)?;
        }
        return fs::copy(from, to).map(drop).with_context(failed);
    }
    for entry in fs::read_dir(from).with_context(failed)? {
        let name = entry?.file_name();
        copy_tree(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

fn judge(root: &Path, copy: &Path, mutant: &Mutant) -> Result<Verdict> {
    let original = root.join("cdp-store").join(&mutant.file);
    let planted = copy.join("cdp-store").join(&mutant.file);
    let source = fs::read_to_string(&original).with_context(|| format!("reading {}", original.display()))?;
    let found = source.matches(&mutant.old).count();
    ensure!(found == 1, "{} has its place {found} times, not once", mutant.file.display());
    fs::write(&planted, source.replacen(&mutant.old, &mutant.new, 1))?;
    let verdict = test(copy, mutant);
    // The next one starts from the original again.
    fs::write(&planted, source)?;
    verdict
}

fn test(copy: &Path, mutant: &Mutant) -> Result<Verdict> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["test", "--release", "--package", "cdp-store", "--test", "it"];
    let mut build = Command::new(&cargo);
    let built = build.current_dir(copy).args(arguments).arg("--no-run").output().context("starting cargo")?;
    if !built.status.success() {
        bail!("it does not compile:\n{}", String::from_utf8_lossy(&built.stderr));
    }
    // timeout(1) ends what cargo has started, too, and is told to when this program is ended.
    let mut tests = Command::new("setpriv");
    tests.args(["--pdeathsig", "TERM", "--", "timeout", "--kill-after=10", LIMIT]);
    tests.arg(cargo).args(arguments).args(["--", &mutant.test]).current_dir(copy);
    let tested = tests.env("CRASH_SEEDS", SEEDS).env("RUST_BACKTRACE", "0").output().context("setpriv")?;
    let mut text = String::from_utf8_lossy(&tested.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&tested.stderr));
    if tested.status.success() {
        return Ok(Verdict::Survived);
    }
    if tested.status.code() == Some(TIMED_OUT) {
        return Ok(Verdict::Other(format!("its tests had not ended after {LIMIT} s")));
    }
    let caught = mutant.expect.iter().find(|expected| text.contains(expected.as_str()));
    let first =
        || text.lines().skip_while(|l| !l.contains("panicked at")).nth(1).unwrap_or("no panic").to_owned();
    Ok(caught.map_or_else(|| Verdict::Other(first()), |how| Verdict::Caught(how.clone())))
}
