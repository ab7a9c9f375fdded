//! Runs inside the guest: the host's commands (`serve`), and the workloads that need more than a shell.

mod beat;
mod memory;
mod stillness;

use std::collections::VecDeque;
use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use e2e::agent::{Event, Request};
use e2e::workload::{KEPT_FILES, Progress, TestFile, files_of};

const USAGE: &str = "\
guest-agent serve PORT                    run the commands that come in on a serial port
guest-agent write DIR SEED synced|lazy    write test files until DIR.stop exists
guest-agent fill DIR SEED MIB             write test files of that many mebibytes
guest-agent check DIR SEED COUNT          compare the test files in DIR, which are so many, with what they must contain
guest-agent pages PAGES BLOCKS DISK...    fill pages by direct reads of blocks, and check them, for ever
guest-agent stamp WRITERS FIRST SLOTS DISK...
                                          keep counters in memory and in SLOTS blocks each from FIRST on, for ever
guest-agent beat PORT FILL_MIB DIRTY_MIB [DISK]
                                          fill memory, and say on a serial port every millisecond that we live
guest-agent still PORT DIR                freeze and thaw the file system at DIR as qemu-ga is asked to";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["serve", port] => serve(Path::new(port)),
        ["write", dir, seed, "synced"] => parse(seed).and_then(|seed| write_synced(Path::new(dir), seed)),
        ["write", dir, seed, "lazy"] => parse(seed).and_then(|seed| write_lazily(Path::new(dir), seed)),
        ["fill", dir, seed, mib] => {
            parse(seed).and_then(|seed| fill(Path::new(dir), seed, parse(mib)? << 20))
        }
        ["pages", pages, blocks, ref disks @ ..] => {
            parse(pages).and_then(|pages| memory::pages(pages, parse(blocks)?, disks))
        }
        ["stamp", writers, first, slots, ref disks @ ..] => {
            parse(writers).and_then(|writers| memory::stamp(writers, parse(first)?, parse(slots)?, disks))
        }
        ["beat", port, fill, dirty] => {
            parse(fill).and_then(|fill| beat::run(port, fill, parse(dirty)?, None))
        }
        ["beat", port, fill, dirty, disk] => {
            parse(fill).and_then(|fill| beat::run(port, fill, parse(dirty)?, Some(disk)))
        }
        ["still", port, mounted] => stillness::answer(Path::new(port), mounted),
        ["check", dir, seed, count] => {
            parse(seed).and_then(|seed| check(Path::new(dir), seed, parse(count)?))
        }
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(number: &str) -> Result<u64> {
    number.parse().with_context(|| format!("'{number}' is no number"))
}

/// Answers until the machine is switched off. Commands run side by side.
fn serve(port: &Path) -> Result<()> {
    let input = File::open(port)?;
    let output = Arc::new(Mutex::new(File::options().write(true).open(port)?));
    // The newline ends whatever an agent before a reset had left unfinished.
    output.lock().unwrap_or_else(PoisonError::into_inner).write_all(b"\n")?;
    tell(&output, &Event::Hello)?;
    for line in BufReader::new(input).lines() {
        let line = line?;
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                let output = Arc::clone(&output);
                std::thread::spawn(move || {
                    let id = request.id;
                    let status = run(&output, &request).unwrap_or_else(|error| {
                        // The host sees why in the exit line's stead; it has no other way to learn.
                        let _ = tell(&output, &Event::Line { id, text: format!("guest-agent: {error:#}") });
                        127
                    });
                    let _ = tell(&output, &Event::Exit { id, status });
                });
            }
            Err(error) => eprintln!("guest-agent: not a request: {error}: {line:?}"),
        }
    }
    bail!("{} was closed", port.display())
}

fn tell(output: &Mutex<File>, event: &Event) -> Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    output.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)?;
    Ok(())
}

fn run(output: &Mutex<File>, request: &Request) -> Result<i32> {
    let mut child = Command::new("sh")
        .args(["-c", "exec 2>&1; eval \"$1\"", "sh", &request.command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdout = BufReader::new(child.stdout.take().context("no output")?);
    let mut line = Vec::new();
    while stdout.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
        tell(output, &Event::Line { id: request.id, text })?;
        line.clear();
    }
    Ok(status_of(child.wait()?))
}

fn status_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// Says one line at once: the host acts on it while we run on.
fn say(progress: Progress) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{progress}")?;
    stdout.flush()?;
    Ok(())
}

/// True once the host has asked the writer of `dir` to stop.
fn told_to_stop(dir: &Path) -> bool {
    let mut name = dir.as_os_str().to_owned();
    name.push(".stop");
    PathBuf::from(name).exists()
}

/// Writes files one after the other, each made durable, and says so only then.
fn write_synced(dir: &Path, seed: u64) -> Result<()> {
    fs::create_dir_all(dir)?;
    let names = File::open(dir)?;
    let mut kept = VecDeque::new();
    for number in 0.. {
        if told_to_stop(dir) {
            break;
        }
        let test_file = TestFile { seed, number };
        let mut file = File::create(dir.join(test_file.name()))?;
        file.write_all(&test_file.content())?;
        file.sync_all()?;
        names.sync_all()?;
        say(Progress::Synced(number))?;
        kept.push_back(test_file);
        if kept.len() > KEPT_FILES
            && let Some(oldest) = kept.pop_front()
        {
            say(Progress::Removing(oldest.number))?;
            fs::remove_file(dir.join(oldest.name()))?;
        }
    }
    Ok(())
}

/// Writes files through the page cache, so that the kernel keeps many requests in flight; every file is
/// read and checked before it is removed.
fn write_lazily(dir: &Path, seed: u64) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut kept = VecDeque::new();
    for number in 0.. {
        if told_to_stop(dir) {
            break;
        }
        let test_file = TestFile { seed, number };
        fs::write(dir.join(test_file.name()), test_file.content())?;
        say(Progress::Written(number))?;
        kept.push_back(test_file);
        if kept.len() > KEPT_FILES
            && let Some(oldest) = kept.pop_front()
        {
            oldest.check(dir)?;
            fs::remove_file(dir.join(oldest.name()))?;
        }
    }
    Ok(())
}

/// Writes at least that many bytes of test files.
fn fill(dir: &Path, seed: u64, bytes: u64) -> Result<()> {
    fs::create_dir_all(dir)?;
    for number in 0..files_of(seed, bytes) {
        let file = TestFile { seed, number };
        fs::write(dir.join(file.name()), file.content())?;
    }
    Ok(())
}

/// Checks all test files of a directory, and that none is missing.
fn check(dir: &Path, seed: u64, count: u64) -> Result<()> {
    let mut checked = 0;
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("file-")).and_then(|n| n.parse().ok());
        let number = number.with_context(|| format!("{name:?} is no test file"))?;
        TestFile { seed, number }.check(dir)?;
        checked += 1;
    }
    ensure!(checked == count, "{} holds {checked} test files, not {count}", dir.display());
    Ok(())
}
