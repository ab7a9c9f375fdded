//! A stand-in for qemu-ga: as much of its protocol (QEMU's `qga/qapi-schema.json`) as stilling file systems takes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// In no JSON: begins a conversation anew, and its answer.
const DELIMITER: u8 = 0xff;

/// Answers on a serial port, for one file system, until the machine is switched off.
pub(crate) fn answer(port: &Path, mounted: &str) -> Result<()> {
    let input = File::open(port)?;
    let mut output = File::options().write(true).open(port)?;
    let mut frozen = false;
    for line in BufReader::new(input).split(b'\n') {
        let line = line?;
        let said = line.rsplit(|byte| *byte == DELIMITER).next().unwrap_or_default();
        // What is cut short is the rest of a conversation of which nobody waits for the end.
        let Ok(command) = serde_json::from_slice::<Value>(said) else { continue };
        let name = command["execute"].as_str().unwrap_or_default();
        let answer = match name {
            "guest-sync-delimited" => {
                output.write_all(&[DELIMITER])?;
                Ok(command["arguments"]["id"].clone())
            }
            "guest-fsfreeze-freeze" => switch(mounted, "--freeze", &mut frozen, true),
            "guest-fsfreeze-thaw" => switch(mounted, "--unfreeze", &mut frozen, false),
            "guest-fsfreeze-status" => Ok(json!(if frozen { "frozen" } else { "thawed" })),
            _ => Err(anyhow::anyhow!("The command {name} has not been found")),
        };
        let answer = match answer {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": { "class": "GenericError", "desc": format!("{error:#}") } }),
        };
        output.write_all(format!("{answer}\n").as_bytes())?;
    }
    bail!("{} was closed", port.display())
}

/// Freezes or thaws, unless that is how it stands: how many file systems changed.
fn switch(mounted: &str, how: &str, frozen: &mut bool, to: bool) -> Result<Value> {
    if *frozen == to {
        return Ok(json!(0));
    }
    let status = Command::new("fsfreeze").args([how, mounted]).status().context("fsfreeze")?;
    ensure!(status.success(), "fsfreeze {how} {mounted}: {status}");
    *frozen = to;
    Ok(json!(1))
}
