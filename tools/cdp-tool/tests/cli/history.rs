//! Going back and branching off.

use std::process::Output;

use blkio::Blkio;
use serde_json::Value;

use crate::{Bench, MIB, same};

impl Bench {
    /// A volume `img` of an image, and what the image holds.
    fn with_image() -> (Self, Vec<u8>) {
        let bench = Self::new();
        let (_, content) = bench.image();
        bench.text("volume create img --from image.raw --format raw");
        (bench, content)
    }

    /// The instant of a volume in which nothing was written yet.
    fn first_instant(&self, volume: &str) -> String {
        let records = self.lines(&format!("inspect records {volume}"));
        let first = records.iter().find(|r| r["kind"] == "write").unwrap()["seq"].as_u64().unwrap();
        format!("seq:{}", first - 1)
    }

    fn holds(&self, what: &str, content: &[u8]) {
        self.text(&format!("extract {what} out.raw"));
        same(&self.path("out.raw"), content);
    }
}

#[test]
fn a_revert_prints_the_command_that_undoes_it() {
    let (mut bench, content) = Bench::with_image();
    let (start, nothing) = (bench.first_instant("img"), vec![0; content.len()]);
    let said = bench.text(&format!("revert img@{start}"));
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("img is as it was at 20") && said.contains(&format!("({start})")), "{said}");
    bench.holds("img", &nothing);
    let (_, undo) = said.trim_end().split_once("; to undo: cdp-tool ").unwrap();
    bench.text(undo);
    bench.holds("img", &content);

    let reverted = bench.json(&format!("revert img --at {start}"));
    assert_eq!((&reverted["volume"], format!("seq:{}", reverted["at"]["seq"])), (&"img".into(), start));
    assert!(reverted["undo"]["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!(reverted["branch"], bench.json("volume show img")["branch"]);
    bench.stop();
    bench.holds("img", &nothing);
    bench.holds(&format!("img@seq:{}", reverted["undo"]["seq"]), &content);
}

#[test]
fn several_volumes_go_back_together_and_forth_in_one_command() {
    let (mut bench, content) = Bench::with_image();
    bench.text("volume create other --from image.raw --format raw");
    bench.text("mark img empty --json");
    bench.text(&format!("mark other@{} empty", bench.first_instant("other")));
    let said = bench.text("revert img other --at mark:empty");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(lines[0].starts_with("img is as it was") && lines[1].starts_with("other is as it was"), "{said}");
    bench.holds("other", &vec![0; content.len()]);
    let undo = lines[2].strip_prefix("to undo all of it: cdp-tool ").unwrap();
    assert_eq!(bench.lines(undo).len(), 2);
    bench.holds("other", &content);

    let heads =
        || ["img", "other"].map(|name| bench.json(&format!("volume show {name}"))["head"]["seq"].clone());
    let before = heads();
    for (line, part) in [
        ("revert img", "to which instant? say img@INSTANT, or --at INSTANT"),
        ("revert img@head --at -5m", "an instant of its own"),
        ("revert img@mark:empty nobody@head", "no volume 'nobody'"),
        ("revert img@mark:empty other@mark:none", "no mark 'none'"),
        ("revert img@mark:empty img@head", "named twice"),
        ("revert img@mark:empty other@-9d", "begins at 20"),
        ("revert img@seq:18446744073709551615", "the newest instant is seq:"),
        ("revert img@-5x", "is no instant"),
        ("revert i/mg@head", "not a valid volume name"),
    ] {
        let complaint = bench.complaint(line);
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
    assert_eq!(heads(), before, "what was refused has changed something");
    bench.stop();
    assert!(bench.complaint("revert img@head").contains("no cdpd serves the store"));
}

#[test]
fn a_revert_under_a_guest_needs_force() {
    let (mut bench, content) = Bench::with_image();
    let start = bench.first_instant("img");
    bench.text("volume serve img --vhost-user img.sock");
    let mut guest = Blkio::new("virtio-blk-vhost-user").unwrap();
    guest.set_str("path", bench.path("img.sock").to_str().unwrap()).unwrap();
    guest.connect().unwrap();
    let queues = guest.start().unwrap().queues;
    let complaint = bench.complaint(&format!("revert img@{start}"));
    assert!(complaint.contains("img.sock is running") && complaint.contains("--force"), "{complaint}");
    bench.holds("img", &content);
    bench.text(&format!("revert img@{start} --force"));
    bench.holds("img", &vec![0; content.len()]);
    assert_eq!(bench.json("volume show img")["serving"]["status"], "listening");
    drop((queues, guest));
    bench.stop();
}

#[test]
fn clones_are_volumes_of_their_own() {
    let (mut bench, content) = Bench::with_image();
    let start = bench.first_instant("img");
    assert_eq!(bench.text("clone img copy"), "copy is a clone of img@head\n");
    let empty = bench.json(&format!("clone img@{start} empty"));
    assert_eq!((&empty["name"], &empty["size_bytes"]), (&"empty".into(), &(64 * MIB).into()));
    let pair = bench.lines(&format!("clone img=pair1 copy=pair2 --at {start}"));
    assert_eq!(pair.iter().map(|v| v["name"].as_str().unwrap()).collect::<Vec<_>>(), ["pair1", "pair2"]);
    for (line, part) in [
        ("clone img copy", "copy"),
        ("clone img=new copy=empty", "empty"),
        ("clone img=new copy=new", "named twice"),
        ("clone nobody new", "no volume 'nobody'"),
        ("clone img@mark:none new", "no mark 'none'"),
        ("clone img@head new --at head", "an instant of its own"),
        ("clone img new more", "is no VOLUME=NEW"),
        ("clone img n/ew", "not a valid volume name"),
    ] {
        let complaint = bench.complaint(line);
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
    assert_eq!(bench.lines("volume list").len(), 5);

    bench.text("volume destroy img --yes");
    bench.holds("copy", &content);
    bench.holds("empty", &vec![0; content.len()]);
    let from = bench.text("branch list copy");
    assert!(from.contains("(volume "), "{from}");
    bench.stop();
    bench.holds("copy", &content);
}

#[test]
fn marks_are_set_listed_and_forgotten() {
    let (mut bench, _) = Bench::with_image();
    let start = bench.first_instant("img");
    let mark = bench.json(&format!("mark img@{start} empty --set ticket=4711 --set by=anna"));
    assert_eq!((format!("seq:{}", mark["seq"]), &mark["metadata"]["by"]), (start.clone(), &"anna".into()));
    let mut odd = bench.command("mark img odd");
    assert!(odd.args(["--set", "note=two\nlines \u{1b}[2J"]).output().unwrap().status.success());
    for line in ["marks img", "volume show img"] {
        let table = bench.text(line);
        assert!(table.contains("by=anna ticket=4711") && table.contains("note=two\\nlines"), "{table}");
        assert!(!table.contains('\u{1b}'), "{table:?}");
    }
    let listed = bench.lines("marks img");
    assert_eq!((listed.len(), &listed[0]), (2, &mark));
    for (line, part) in [
        ("mark img empty".to_owned(), "empty"),
        ("mark img x --set a=1 --set a=2".to_owned(), "'a' is set twice"),
        (format!("mark img x --set a={}", "v".repeat(17 << 10)), "16384 bytes"),
        ("mark img@mark:none x".to_owned(), "no mark 'none'"),
        ("unmark img none".to_owned(), "no mark 'none'"),
        ("unmark nobody x".to_owned(), "no volume 'nobody'"),
    ] {
        let complaint = bench.complaint(&line);
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
    assert!(bench.text("unmark img odd").contains("no mark odd any more"));
    assert_eq!(bench.json("unmark img empty")["unmarked"], "empty");
    assert_eq!(bench.text("marks img --json"), "");
    bench.stop();
}

#[test]
fn branches_are_listed_and_deleted() {
    let (mut bench, content) = Bench::with_image();
    let start = bench.first_instant("img");
    let reverted = bench.json(&format!("revert img@{start}"));
    let (left, head) = (&reverted["undo"]["branch"], &reverted["branch"]);
    bench.text(&format!("mark img@seq:{} full", reverted["undo"]["seq"]));
    let branches = bench.lines("branch list img");
    assert_eq!(branches.iter().map(|b| &b["id"]).collect::<Vec<_>>(), [left, head]);
    assert_eq!((&branches[0]["from"], &branches[1]["from"]["name"]), (&Value::Null, &"img".into()));
    let table = bench.text("branch list img");
    assert!(table.contains("left") && table.contains("img@seq:"), "{table}");

    let delete = format!("branch delete img {left}");
    for (line, part) in [
        (delete.clone(), "say --yes"),
        (format!("{delete} --yes"), "mark 'full' lies on branch"),
        (format!("branch delete img {head} --yes"), "is the head"),
        ("branch delete img 999 --yes".to_owned(), "no branch 999"),
        ("branch list nobody".to_owned(), "no volume 'nobody'"),
    ] {
        let complaint = bench.complaint(&line);
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
    bench.holds("img@mark:full", &content);
    assert_eq!(&bench.json(&format!("{delete} --yes --force"))["deleted"], left);
    assert_eq!(bench.text("marks img --json"), "");
    let refusal = bench.complaint(&format!("extract img@seq:{} gone.raw", reverted["undo"]["seq"]));
    assert!(refusal.contains("deleted") && refusal.contains("nearest instant left is"), "{refusal}");
    bench.holds("img", &vec![0; content.len()]);
    bench.stop();
    assert!(bench.text("branch list img").contains("head"));
}

#[test]
fn bad_words_are_usage_errors() {
    let (mut bench, _) = Bench::with_image();
    for (line, part) in [
        ("mark img a:b", "not a valid mark label"),
        ("mark img x --set novalue", "KEY=VALUE"),
        ("branch delete img main", "by its number"),
        ("revert", "VOLUME"),
        ("clone", "VOLUME"),
    ] {
        let Output { status, stderr, .. } = bench.run(line);
        let complaint = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(2), "{line}: {complaint}");
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
    bench.stop();
}
