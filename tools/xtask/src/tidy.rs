//! The rules that neither rustfmt nor clippy knows. Every breach is reported, not only the first.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::workspace_root;

/// The most lines that a Rust file may have, its tests not counted.
const MAX_LINES: usize = 800;
/// Words that promise work instead of doing it.
const PROMISES: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:"), concat!("HA", "CK:")];
/// What holds no sources. In a worktree of git, `.git` is a file.
const SKIPPED: [&str; 2] = [".git", "target"];
/// Directories of every machine: that a file names one says nothing about where anybody has the sources.
const EVERYWHERE: [&str; 13] = [
    "/",
    "/dev/shm",
    "/home",
    "/mnt",
    "/opt",
    "/root",
    "/run",
    "/srv",
    "/tmp",
    "/usr/local",
    "/usr/src",
    "/var/lib",
    "/var/tmp",
];

/// A file of the tree, with its path from the root.
struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn is(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|own| own == extension)
    }

    fn at(&self, line: usize) -> String {
        format!("{}:{}", self.path.display(), line + 1)
    }
}

/// Checks the whole tree.
///
/// # Errors
/// A rule is broken, or the tree cannot be read.
pub(crate) fn run() -> Result<()> {
    let root = &workspace_root()?;
    let mut sources = Vec::new();
    collect(root, Path::new(""), &mut sources)?;
    let mut breaches = Vec::new();
    for source in &sources {
        if source.is("rs") {
            rust_rules(source, &mut breaches);
        }
        if source.is("md") {
            links(root, source, &mut breaches);
            make_targets(root, source, &mut breaches)?;
        }
        places(root, source, &mut breaches);
    }
    packages(root, &sources, &mut breaches);
    if breaches.is_empty() {
        println!("tidy: {} files are in order", sources.len());
        return Ok(());
    }
    for breach in &breaches {
        eprintln!("{breach}");
    }
    bail!("{} breaches of this project's rules", breaches.len())
}

fn collect(root: &Path, dir: &Path, sources: &mut Vec<Source>) -> Result<()> {
    let full = root.join(dir);
    for entry in fs::read_dir(&full).with_context(|| full.display().to_string())? {
        let entry = entry?;
        if SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
            continue;
        }
        let path = dir.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(root, &path, sources)?;
        } else if kind.is_file()
            && let Ok(text) = String::from_utf8(fs::read(entry.path())?)
        {
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

/// Files stay readable in one sitting, and leave nothing undone.
fn rust_rules(source: &Source, breaches: &mut Vec<String>) {
    let lines = code_lines(&source.text);
    if lines > MAX_LINES {
        breaches.push(format!("{}: {lines} lines of code, {MAX_LINES} are allowed", source.path.display()));
    }
    for (number, line) in source.text.lines().enumerate() {
        if let Some(word) = PROMISES.iter().find(|word| line.contains(**word)) {
            breaches.push(format!("{}: '{word}': do it, or open an issue", source.at(number)));
        }
    }
}

/// Lines before the tests at the end of a file, which are a module in it. Whatever else is for tests only ends nothing.
fn code_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let is_module = |item: &&str| item.starts_with("mod ") && item.trim_end().ends_with('{');
    let begins_tests = |at: &usize| {
        lines[*at].trim_end() == "#[cfg(test)]"
            && lines[*at + 1..].iter().find(|line| !line.starts_with("#[")).is_some_and(is_module)
    };
    (0..lines.len()).find(begins_tests).unwrap_or(lines.len())
}

/// No file names the place where somebody has the sources, or what lies beside them.
fn places(root: &Path, source: &Source, breaches: &mut Vec<String>) {
    let parent = root.parent().filter(|parent| !EVERYWHERE.iter().any(|dir| *parent == Path::new(dir)));
    let place = format!("{}/", parent.unwrap_or(root).display());
    // In the middle of a path it is something else: a checkout may be called as a part of one is.
    let begins =
        |before: &str| !before.ends_with(|last: char| last.is_alphanumeric() || "._-~}".contains(last));
    for (number, line) in source.text.lines().enumerate() {
        if line.match_indices(&place).any(|(at, _)| begins(&line[..at])) {
            breaches.push(format!("{}: names '{place}', a place on one machine", source.at(number)));
        }
    }
}

/// Relative links of the documents lead to files.
fn links(root: &Path, source: &Source, breaches: &mut Vec<String>) {
    let dir = root.join(&source.path);
    let dir = dir.parent().unwrap_or(root);
    for (number, line) in source.text.lines().enumerate() {
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if !file.is_empty() && !link.contains("://") && !dir.join(file).exists() {
                breaches.push(format!("{}: the link to {link} leads nowhere", source.at(number)));
            }
        }
    }
}

/// Every `make TARGET` in code quotes of a document can be run.
fn make_targets(root: &Path, source: &Source, breaches: &mut Vec<String>) -> Result<()> {
    let makefile = fs::read_to_string(root.join("Makefile"))?;
    for (number, line) in source.text.lines().enumerate() {
        for rest in line.split("`make ").skip(1) {
            let target: String = rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
            if !makefile.lines().any(|rule| rule.starts_with(&format!("{target}:"))) {
                breaches.push(format!("{}: the Makefile has no target '{target}'", source.at(number)));
            }
        }
    }
    Ok(())
}

/// Every package obeys the workspace's lints and has its place on the map.
fn packages(root: &Path, sources: &[Source], breaches: &mut Vec<String>) {
    let map = fs::read_to_string(root.join("docs/architecture.md")).unwrap_or_default();
    for source in sources.iter().filter(|source| source.path.ends_with("Cargo.toml")) {
        let Some(dir) = source.path.parent().filter(|dir| !dir.as_os_str().is_empty()) else { continue };
        if !source.text.contains("[lints]\nworkspace = true") {
            breaches.push(format!("{}: without the workspace's lints", source.path.display()));
        }
        let dir = dir.display().to_string();
        if !map.contains(&dir) {
            breaches.push(format!("docs/architecture.md does not mention {dir}"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use e2e::Scene;

    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), text: text.into() }
    }

    #[test]
    fn tests_do_not_count_as_code_and_promises_are_found() {
        let (code, tests) = ("x\n".repeat(MAX_LINES), "y\n".repeat(500));
        let long = format!("{code}#[cfg(test)]\n#[allow(dead_code)]\nmod tests {{\n{tests}");
        let mut breaches = Vec::new();
        rust_rules(&source("a.rs", &long), &mut breaches);
        assert!(breaches.is_empty());
        rust_rules(&source("a.rs", &"x\n".repeat(MAX_LINES + 1)), &mut breaches);
        rust_rules(&source("b.rs", concat!("fn a() {}\n// TO", "DO later\n")), &mut breaches);
        assert_eq!(breaches.len(), 2);
        assert!(breaches[1].starts_with("b.rs:2"));
        for item in ["mod tests;", "use a::b;", "impl A {"] {
            rust_rules(&source("c.rs", &format!("#[cfg(test)]\n{item}\n{code}")), &mut breaches);
        }
        assert_eq!(breaches.len(), 5, "what tests use comes first, and what follows counts");
    }

    #[test]
    fn dead_links_and_foreign_places_are_found() {
        let mut breaches = Vec::new();
        let text = "[a](https://example.org) [b](#here) [c](missing.md#x)\n";
        links(Path::new("/nonexistent"), &source("README.md", text), &mut breaches);
        assert_eq!(breaches.len(), 1);
        places(Path::new("/srv/someone/tree"), &source("a.rs", "/srv/someone/x\n/srv/else\n"), &mut breaches);
        assert_eq!(breaches.len(), 2);
    }

    #[test]
    fn what_git_keeps_is_no_source_though_it_be_a_file() {
        let scene = Scene::new().unwrap();
        fs::write(scene.path(".git"), "gitdir: somewhere\n").unwrap();
        fs::write(scene.path("a.rs"), "fn a() {}\n").unwrap();
        let mut sources = Vec::new();
        collect(scene.dir(), Path::new(""), &mut sources).unwrap();
        let paths: Vec<&Path> = sources.iter().map(|source| source.path.as_path()).collect();
        assert_eq!(paths, [Path::new("a.rs")]);
    }

    #[test]
    fn a_checkout_in_a_directory_of_every_machine_has_only_itself_for_a_place() {
        let named = |root: &str, text: &str| {
            let mut breaches = Vec::new();
            places(Path::new(root), &source("a.rs", text), &mut breaches);
            breaches.len()
        };
        for parent in ["/root", "/srv", "/tmp"] {
            let root = format!("{parent}/checkout");
            assert_eq!(named(&root, &format!("{parent}/note\n")), 0, "{parent}");
            assert_eq!(named(&root, &format!("\"{root}/note\"\n")), 1, "{parent}");
        }
        let root = "/src";
        assert_eq!(named(root, "[the store](cdp-store/src/lib.rs), ../src/lib.rs, {}/src/lib.rs\n"), 0);
        assert_eq!(named(root, &format!("at {root}/lib.rs\n")), 1);
    }
}
