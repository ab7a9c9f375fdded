//! Going back, and branching off.

use anyhow::{Context, bail, ensure};
use cdp_types::{BranchId, Instant, VolumeAt, VolumeName};
use cdpd::api::{Branch, CloneRequest, NewClone, RevertRequest, RevertTarget, Reverted, Volume};
use cdpd::client::Client;
use hyper::Method;
use jiff::Zoned;

use crate::access::Access;
use crate::cli::{CloneArgs, RevertArgs};
use crate::commands::confirmed;
use crate::output::{Column, Output};

/// Puts volumes back to instants.
pub(super) fn revert(client: &Client, args: &RevertArgs, output: &mut Output) -> anyhow::Result<()> {
    let volumes = targets(args, &Zoned::now())?;
    let request = RevertRequest { volumes, force: args.force };
    let reverted: Vec<Reverted> = client.send(Method::POST, "/v1/revert", &request)?;
    if output.is_json() {
        return reverted.iter().try_for_each(|one| output.item(one));
    }
    let mut undo = Vec::new();
    for Reverted { volume, at, undo: before, .. } in &reverted {
        let back = format!("{volume}@seq:{}", before.seq);
        output.line(format!(
            "{volume} is as it was at {} (seq:{}); to undo: cdp-tool revert {back}",
            output.time(at.time_ns),
            at.seq
        ))?;
        undo.push(back);
    }
    if let [_, _, ..] = undo[..] {
        // What went back together had better go forth together.
        output.line(format!("to undo all of it: cdp-tool revert {}", undo.join(" ")))?;
    }
    Ok(())
}

/// What the arguments of `revert` name. All instants are read at one moment, so that `-5m` is one for all volumes.
fn targets(args: &RevertArgs, now: &Zoned) -> anyhow::Result<Vec<RevertTarget>> {
    let common = args.at.as_deref().map(|at| Instant::parse(at, now)).transpose()?;
    let target = |text: &String| {
        let VolumeAt { volume, instant } = place(text, common.as_ref(), now)?
            .with_context(|| format!("to which instant? say {text}@INSTANT, or --at INSTANT"))?;
        Ok(RevertTarget { name: volume, at: instant.to_string() })
    };
    args.what.iter().map(target).collect()
}

/// A volume and its instant, its own or the common one; `None` if it has neither.
fn place(text: &str, common: Option<&Instant>, now: &Zoned) -> anyhow::Result<Option<VolumeAt>> {
    let VolumeAt { volume, instant } = VolumeAt::parse(text, now)?;
    let own = text.contains('@').then_some(instant);
    ensure!(own.is_none() || common.is_none(), "'{text}' has an instant of its own, and --at says another");
    Ok(own.or_else(|| common.cloned()).map(|instant| VolumeAt { volume, instant }))
}

/// Makes volumes that share the history of others.
pub(super) fn clone(client: &Client, args: &CloneArgs, output: &mut Output) -> anyhow::Result<()> {
    let clones = clones(args, &Zoned::now())?;
    let request = CloneRequest { clones };
    let volumes: Vec<Volume> = client.send(Method::POST, "/v1/clone", &request)?;
    for (volume, spec) in volumes.iter().zip(&request.clones) {
        if output.is_json() {
            output.item(volume)?;
        } else {
            output.line(format!("{} is a clone of {}@{}", volume.name, spec.source, spec.at))?;
        }
    }
    Ok(())
}

/// What the arguments of `clone` name. All instants are read at one moment, as for [`targets`].
fn clones(args: &CloneArgs, now: &Zoned) -> anyhow::Result<Vec<NewClone>> {
    let common = args.at.as_deref().map(|at| Instant::parse(at, now)).transpose()?;
    let clone = |(source, name): (&str, &str)| {
        let name: VolumeName = name.parse()?;
        let at = place(source, common.as_ref(), now)?;
        // The present is what can be meant where no instant is said: nobody loses anything by it.
        let VolumeAt { volume: source, instant } = at.map_or_else(|| VolumeAt::parse(source, now), Ok)?;
        Ok(NewClone { source, at: instant.to_string(), name })
    };
    pairs(&args.what)?.into_iter().map(clone).collect()
}

/// One source and its clone's name as two words, or any number of them with `=` between.
fn pairs(words: &[String]) -> anyhow::Result<Vec<(&str, &str)>> {
    if let [source, name] = words
        && !source.contains('=')
        && !name.contains('=')
    {
        return Ok(vec![(source, name)]);
    }
    let pair = |word| str::split_once(word, '=').with_context(|| format!("'{word}' is no VOLUME=NEW"));
    words.iter().map(|word| pair(word.as_str())).collect()
}

/// Lists a volume's branches.
pub(super) fn branches(access: &Access, volume: &VolumeName, output: &mut Output) -> anyhow::Result<()> {
    let branches = access.branches(volume)?;
    if output.is_json() {
        return branches.iter().try_for_each(|branch| output.item(branch));
    }
    let row = |branch: &Branch| {
        let state = match (branch.head, branch.deleted) {
            (true, _) => "head",
            (_, true) => "deleted",
            _ => "left",
        };
        let from = branch.from.as_ref().map_or_else(
            || "-".to_owned(),
            |from| {
                let name = from
                    .name
                    .as_ref()
                    .map_or_else(|| format!("(volume {})", from.volume), VolumeName::to_string);
                format!("{name}@seq:{}", from.at.seq)
            },
        );
        vec![
            branch.id.to_string(),
            state.to_owned(),
            from,
            output.time(branch.created_ns),
            branch.start.to_string(),
            branch.end.seq.to_string(),
            output.time(branch.end.time_ns),
        ]
    };
    let rows: Vec<_> = branches.iter().map(row).collect();
    let columns = [
        Column::Right("BRANCH"),
        Column::Left("STATE"),
        Column::Left("FROM"),
        Column::Left("BEGAN"),
        Column::Right("FIRST"),
        Column::Right("LAST"),
        Column::Left("LAST CHANGE"),
    ];
    output.table(&columns, &rows)
}

/// Deletes a branch.
pub(super) fn delete_branch(
    client: &Client,
    volume: &VolumeName,
    branch: BranchId,
    force: bool,
    yes: bool,
    output: &mut Output,
) -> anyhow::Result<()> {
    let path = format!("/v1/volumes/{volume}/branches");
    // Asked first, so that a number that was mistyped is not asked about.
    let branches: Vec<Branch> = client.get(&path)?;
    let Some(known) = branches.iter().find(|known| known.id == branch && !known.deleted) else {
        bail!("volume '{volume}' has no branch {branch}");
    };
    let question = format!(
        "Delete branch {branch} of volume '{volume}', with its history from {} to {}? Type its number to confirm: ",
        output.time(known.created_ns),
        output.time(known.end.time_ns),
    );
    let what = format!("branch {branch} of volume '{volume}'");
    if !yes && !confirmed(&what, "deleted", &question, &branch.to_string())? {
        bail!("{what} was not deleted");
    }
    client.delete::<()>(&format!("{path}/{branch}?force={force}"))?;
    if output.is_json() {
        return output.value(&serde_json::json!({ "volume": volume, "deleted": branch }));
    }
    output.line(format!("deleted branch {branch} of {volume}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use jiff::Timestamp;
    use jiff::tz::TimeZone;

    use super::*;

    fn now() -> Zoned {
        "2026-11-21T11:00:00Z".parse::<Timestamp>().unwrap().to_zoned(TimeZone::UTC)
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// What is sent for a command line, or why nothing is.
    fn reverts(what: &str, at: Option<&str>) -> String {
        let args = RevertArgs { what: words(what), at: at.map(str::to_owned), force: false };
        let shown = |t: RevertTarget| format!("{}@{}", t.name, t.at);
        match targets(&args, &now()) {
            Ok(targets) => targets.into_iter().map(shown).collect::<Vec<_>>().join(" "),
            Err(error) => format!("{error:#}"),
        }
    }

    fn cloned(what: &str, at: Option<&str>) -> String {
        let args = CloneArgs { what: words(what), at: at.map(str::to_owned) };
        let shown = |c: NewClone| format!("{}@{}={}", c.source, c.at, c.name);
        match clones(&args, &now()) {
            Ok(clones) => clones.into_iter().map(shown).collect::<Vec<_>>().join(" "),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn volumes_go_back_to_instants_of_their_own_or_to_one() {
        assert_eq!(reverts("web1@seq:7", None), "web1@seq:7");
        assert_eq!(reverts("a@mark:x b@flush:-1", None), "a@mark:x b@flush:-1");
        let five_ago = "2026-11-21T10:55:00.000000000Z";
        assert_eq!(reverts("a b", Some("-5m")), format!("a@{five_ago} b@{five_ago}"));
        assert!(reverts("web1", None).contains("to which instant? say web1@INSTANT, or --at INSTANT"));
        assert!(reverts("a@head b", Some("-5m")).contains("'a@head' has an instant of its own"));
        assert!(reverts("a@-5x", None).contains("is no instant"));
        assert!(reverts("a/b@head", None).contains("not a valid volume name"));
        assert!(reverts("a", Some("soon")).contains("is no instant"));
    }

    #[test]
    fn clones_are_a_pair_of_words_or_pairs() {
        assert_eq!(cloned("web1 web2", None), "web1@head=web2");
        assert_eq!(cloned("web1@seq:7 web2", None), "web1@seq:7=web2");
        assert_eq!(cloned("web1 web2", Some("seq:7")), "web1@seq:7=web2");
        assert_eq!(cloned("a=b", None), "a@head=b");
        assert_eq!(cloned("a=b c=d", Some("mark:x")), "a@mark:x=b c@mark:x=d");
        assert_eq!(cloned("a@seq:1=b c@seq:2=d e=f", None), "a@seq:1=b c@seq:2=d e@head=f");
        for bad in ["a", "a b c", "a=b c"] {
            assert!(cloned(bad, None).contains("is no VOLUME=NEW"), "{bad}");
        }
        for bad in ["a a@b", "a=b=c", "a=", "=b"] {
            assert!(cloned(bad, None).contains("not a valid volume name"), "{bad}");
        }
        assert!(cloned("a@seq:1=b", Some("-5m")).contains("an instant of its own"));
    }
}
