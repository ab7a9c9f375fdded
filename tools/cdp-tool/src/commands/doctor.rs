//! What is in the way of checkpoints.

use cdp_store::CheckpointMode;
use cdp_types::VmName;
use cdpd::api::{Check, Diagnosis, ModeVerdict, Verdict};
use cdpd::client::Client;

use super::Outcome;
use crate::output::{Output, unless_gone};

/// Looks at a machine. It is well if it can be checkpointed hot.
pub(super) fn vm(client: &Client, name: &VmName, output: &mut Output) -> anyhow::Result<Outcome> {
    let diagnosis: Diagnosis = client.get(&format!("/v1/vms/{name}/doctor"))?;
    unless_gone(if output.is_json() {
        output.item(&diagnosis)
    } else {
        lines(&diagnosis).iter().try_for_each(|line| output.line(line))
    })?;
    Ok(if diagnosis.allows(CheckpointMode::Hot) { Outcome::Good } else { Outcome::Bad })
}

/// One line for each check, the cure below it, and at the end what follows for each mode.
fn lines(diagnosis: &Diagnosis) -> Vec<String> {
    let check = |check: &Check| {
        let cure = check.cure.as_ref().filter(|_| check.verdict != Verdict::Ok);
        let cure = cure.map(|cure| format!("            cure: {cure}"));
        [Some(format!("{:<10}  {}: {}", check.verdict, check.subject, check.found)), cure]
    };
    let mode = |verdict: &ModeVerdict| {
        let mode = format!("{:?}", verdict.mode).to_lowercase();
        match verdict.possible {
            true => format!("{mode:<5}  possible"),
            false => format!("{mode:<5}  not possible: {}", verdict.hindered_by.join(", ")),
        }
    };
    let checks = diagnosis.checks.iter().flat_map(check).flatten();
    checks.chain([String::new()]).chain(diagnosis.modes.iter().map(mode)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_check_is_a_line_with_its_cure_below_and_each_mode_has_a_verdict() {
        let hot = [CheckpointMode::Hot];
        let checks = vec![
            Check::ok("QEMU", "version 10.0.2"),
            Check::in_the_way(&hot, "memory", "'mem' is private", "add share=on"),
        ];
        let said = lines(&Diagnosis::new("web1".parse().unwrap(), checks)).join("\n");
        let expected = "\
ok          QEMU: version 10.0.2
in the way  memory: 'mem' is private
            cure: add share=on

hot    not possible: memory
live   possible
pause  possible";
        assert_eq!(said, expected);
    }
}
