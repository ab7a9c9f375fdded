//! Marks, reverts, clones and branches.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cdp_types::Seq;
use cdpd::api::{ApiError, Branch, ErrorKind, Mark, Reverted, ServingStatus, Volume};
use cdpd::frames::Frame;
use hyper::Method;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::machines::wait_until;
use crate::{Bench, MIB, data, start};

/// Blocks that hold something after [`Bench::filled`].
const FILLED: u64 = 4;

impl Bench {
    /// A volume whose first blocks are filled with sevens; returns where its history stands.
    pub(crate) fn filled(&self, name: &str) -> Seq {
        let frames = vec![start(MIB), data(0, 7, FILLED as usize * 4096), Frame::End];
        self.import(name, frames).unwrap().head.seq
    }

    /// Serves a volume on a socket of its name.
    pub(crate) fn serve_here(&self, name: &str) -> PathBuf {
        let socket = self.root.path().join(format!("{name}.sock"));
        self.serve(name, &socket).unwrap();
        socket
    }

    /// Lets a guest zero a volume's first block, and go; returns where its history stands then.
    fn zero_first_block(&self, name: &str) -> Seq {
        let socket = self.serve_here(name);
        Guest::start(&socket).zero(0, 4096);
        self.show(name).unwrap().head.seq
    }

    fn post<T: serde::de::DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, ApiError> {
        self.client.send(Method::POST, path, body)
    }

    pub(crate) fn revert(&self, name: &str, at: &str, force: bool) -> Result<Reverted, ApiError> {
        let body = json!({ "volumes": [{ "name": name, "at": at }], "force": force });
        self.post::<Vec<Reverted>>("/v1/revert", &body).map(|mut one| one.remove(0))
    }

    fn clone_one(&self, source: &str, at: &str, name: &str) -> Result<Volume, ApiError> {
        let body = json!({ "clones": [{ "source": source, "at": at, "name": name }] });
        self.post::<Vec<Volume>>("/v1/clone", &body).map(|mut one| one.remove(0))
    }

    fn branches(&self, name: &str) -> Vec<Branch> {
        self.client.get(&format!("/v1/volumes/{name}/branches")).unwrap()
    }

    /// Which blocks of a volume hold sevens at an instant; nothing else is in any.
    pub(crate) fn sevens(&self, name: &str, at: &str) -> Vec<u64> {
        let blocks = self.blocks(&format!("/v1/volumes/{name}/data?at={at}"));
        let full = |(block, bytes): (u64, Vec<u8>)| {
            assert!(bytes == [7; 4096] || bytes == [0; 4096], "block {block}");
            (bytes[0] == 7).then_some(block)
        };
        blocks.into_iter().filter_map(full).collect()
    }
}

#[test]
fn a_volume_goes_back_and_forth_and_every_instant_stays_what_it_was() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    let broken = bench.zero_first_block("web1");
    let (all, rest) = ([0, 1, 2, 3], [1, 2, 3]);
    assert_eq!(bench.sevens("web1", "head"), rest);

    let back = bench.revert("web1", &format!("seq:{before}"), false).unwrap();
    assert_eq!((back.volume.as_str(), back.at.seq, back.undo.seq), ("web1", before, broken));
    assert!(back.seq > broken && back.branch != back.at.branch && back.undo.branch == back.at.branch);
    assert_eq!(bench.sevens("web1", "head"), all);
    let shown = bench.show("web1").unwrap();
    assert_eq!((shown.branch, shown.head.seq), (back.branch, back.seq));

    let forth = bench.revert("web1", &format!("seq:{}", back.undo.seq), false).unwrap();
    assert_eq!(forth.undo.seq, back.seq);
    for _ in 0..2 {
        assert_eq!(bench.sevens("web1", "head"), rest);
        for (at, expected) in
            [(before, &all[..]), (broken, &rest[..]), (back.seq, &all[..]), (forth.seq, &rest[..])]
        {
            assert_eq!(bench.sevens("web1", &format!("seq:{at}")), expected, "seq:{at}");
        }
        let branches = bench.branches("web1");
        assert_eq!(branches.iter().map(|b| b.head).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(branches[0].from, None);
        let from: Vec<_> = branches[1..].iter().map(|b| b.from.clone().unwrap()).collect();
        assert_eq!((from[0].at.seq, from[1].at.seq), (before, broken));
        assert!(from.iter().all(|f| f.name.as_ref().unwrap().as_str() == "web1"));
        assert_eq!((branches[0].end.seq, branches[2].start), (broken, forth.seq));
        bench.restart();
    }
    bench.stop();
}

#[test]
fn volumes_are_reverted_all_or_none() {
    let mut bench = Bench::new();
    let first = bench.filled("a");
    let second = bench.filled("b");
    let broken = [bench.zero_first_block("a"), bench.zero_first_block("b")];
    let seq = |seq: Seq| format!("seq:{seq}");
    let both = |a: &str, b: (&str, &str)| {
        let body = json!({ "volumes": [{ "name": "a", "at": a }, { "name": b.0, "at": b.1 }] });
        bench.post::<Vec<Reverted>>("/v1/revert", &body)
    };
    for (b, kind, part) in [
        (("none", "head"), ErrorKind::NotFound, "no volume 'none'".to_owned()),
        (("b", "mark:none"), ErrorKind::NotFound, "no mark 'none'".to_owned()),
        (("b", "epoch:7"), ErrorKind::NotFound, "no epoch 7".to_owned()),
        (("b", "flush:-4000000000"), ErrorKind::NotFound, "flushes, not 4000000000".to_owned()),
        (("b", "2020-01-01T00:00:00Z"), ErrorKind::NotFound, "begins at 20".to_owned()),
        (
            ("b", "seq:18446744073709551615"),
            ErrorKind::Invalid,
            format!("newest instant is seq:{}", broken[1]),
        ),
        (("b", "-5x"), ErrorKind::Invalid, "is no instant".to_owned()),
        (("b/c", "head"), ErrorKind::Invalid, "not a valid volume name".to_owned()),
        (("a", "head"), ErrorKind::Invalid, "named twice".to_owned()),
    ] {
        let refusal = both(&seq(first), b).unwrap_err();
        assert_eq!(refusal.kind, kind, "{b:?}: {refusal}");
        assert!(refusal.message.contains(&part), "{b:?}: {refusal}");
    }
    for body in [
        json!({}),
        json!({ "volumes": [] }),
        json!({ "volumes": [{ "name": "a" }] }),
        json!({ "volumes": [{ "name": "a", "at": "head" }], "forse": true }),
    ] {
        let refusal = bench.post::<Value>("/v1/revert", &body).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Invalid, "{body}");
    }
    for (name, seq) in ["a", "b"].iter().zip(broken) {
        assert_eq!(bench.show(name).unwrap().head.seq, seq, "{name} was changed by what was refused");
        assert_eq!(bench.branches(name).len(), 1);
    }

    let back = both(&seq(first), ("b", &seq(second))).unwrap();
    assert_eq!(back.iter().map(|r| r.volume.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((bench.sevens("a", "head").len(), bench.sevens("b", "head").len()), (4, 4));
    // To one instant: that just before both went back.
    let forth = both(&seq(back[0].undo.seq), ("b", &seq(back[1].undo.seq))).unwrap();
    assert_eq!((bench.sevens("a", "head").len(), bench.sevens("b", "head").len()), (3, 3));
    assert_eq!(forth[0].seq, forth[1].seq);
    bench.stop();
}

#[test]
fn a_guest_that_runs_keeps_its_disk_unless_it_is_forced_off() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    let at = format!("seq:{before}");
    let socket = bench.serve_here("web1");
    let mut guest = Guest::start(&socket);
    guest.zero(0, 4096);

    let refusal = bench.revert("web1", &at, false).unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::Busy);
    for part in [socket.to_str().unwrap(), "is running", "QMP `stop`", "--force, which disconnects it"] {
        assert!(refusal.message.contains(part), "{refusal}");
    }
    // What could not be done in any case disconnects nobody.
    for (at, kind) in [("mark:none", ErrorKind::NotFound), ("seq:18446744073709551615", ErrorKind::Invalid)] {
        assert_eq!(bench.revert("web1", at, true).unwrap_err().kind, kind);
    }
    // So the guest is still there.
    guest.zero(4096, 4096);
    assert_eq!(bench.sevens("web1", "head"), [2, 3]);

    let reverted = bench.revert("web1", &at, true).unwrap();
    assert_eq!(reverted.at.seq, before);
    assert!(guest.is_cut_off());
    drop(guest);
    assert_eq!(bench.sevens("web1", "head"), [0, 1, 2, 3]);
    assert_eq!(bench.sevens("web1", &format!("seq:{}", reverted.undo.seq)), [2, 3]);
    let serving = bench.show("web1").unwrap().serving.unwrap();
    assert_eq!(
        (serving.status, serving.socket.as_str()),
        (ServingStatus::Listening, socket.to_str().unwrap())
    );
    // The next guest works on the new branch.
    Guest::start(&socket).zero(12288, 4096);
    assert_eq!(bench.sevens("web1", "head"), [0, 1, 2]);
    bench.stop();
}

#[test]
fn a_revert_whose_client_goes_away_comes_to_its_end_and_the_volume_is_served() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    let socket = bench.serve_here("web1");
    let targets = json!([{ "name": "web1", "at": format!("seq:{before}") }]);
    let body = json!({ "volumes": targets, "force": true }).to_string();
    let status = || bench.show("web1").unwrap().serving.unwrap().status;
    for branches in 1..=4 {
        let mut guest = Guest::start(&socket);
        guest.zero(0, 4096);
        assert_eq!((bench.branches("web1").len(), bench.sevens("web1", "head")), (branches, vec![1, 2, 3]));
        let mut client = UnixStream::connect(bench.store().join("cdpd.sock")).unwrap();
        let head = "POST /v1/revert HTTP/1.1\r\nHost: cdpd\r\nContent-Type: application/json";
        write!(client, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        // Before that it may not have begun, and then nothing happens.
        wait_until("the guest's server is stopped", || status() != ServingStatus::Connected);
        drop(client);
        wait_until("the volume is served again", || status() == ServingStatus::Listening);
        assert!(guest.is_cut_off());
        assert_eq!(bench.sevens("web1", "head"), [0, 1, 2, 3]);
    }
    bench.stop();
}

#[test]
fn of_several_guests_one_is_enough_to_keep_all_disks() {
    let mut bench = Bench::new();
    let seqs = [bench.filled("a"), bench.filled("b")];
    let sockets = [bench.serve_here("a"), bench.serve_here("b")];
    let body = |force: bool| {
        let [a, b] = seqs.map(|seq| format!("seq:{seq}"));
        json!({ "volumes": [{ "name": "a", "at": a }, { "name": "b", "at": b }], "force": force })
    };
    let names = |refusal: &ApiError| {
        sockets.each_ref().map(|socket| refusal.message.contains(socket.to_str().unwrap()))
    };
    let branches = || ["a", "b"].map(|name| bench.branches(name).len());
    let second = Guest::start(&sockets[1]);
    let refusal = bench.post::<Vec<Reverted>>("/v1/revert", &body(false)).unwrap_err();
    assert_eq!((refusal.kind, names(&refusal)), (ErrorKind::Busy, [false, true]), "{refusal}");
    assert_eq!(branches(), [1, 1], "neither was reverted");

    let mut guests = [Guest::start(&sockets[0]), second];
    guests.iter_mut().for_each(|guest| guest.zero(0, 4096));
    let refusal = bench.post::<Vec<Reverted>>("/v1/revert", &body(false)).unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::Busy);
    assert!(sockets.iter().all(|s| refusal.message.contains(s.to_str().unwrap())), "{refusal}");
    guests.iter_mut().for_each(|guest| guest.zero(4096, 4096));
    bench.post::<Vec<Reverted>>("/v1/revert", &body(true)).unwrap();
    assert_eq!((bench.sevens("a", "head").len(), bench.sevens("b", "head").len()), (4, 4));
    bench.stop();
}

#[test]
fn a_clone_has_the_past_of_its_source_and_a_present_of_its_own() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    bench.zero_first_block("web1");
    let made = bench.clone_one("web1", &format!("seq:{before}"), "old").unwrap();
    assert_eq!((made.name.as_str(), made.size_bytes, made.logical_block_size), ("old", MIB, 512));
    assert!(made.serving.is_none());
    let now: Vec<Volume> =
        bench.post("/v1/clone", &json!({ "clones": [{ "source": "web1", "name": "now" }] })).unwrap();
    assert_eq!(now.len(), 1);
    assert_eq!((bench.sevens("old", "head").len(), bench.sevens("now", "head")), (4, vec![1, 2, 3]));
    assert_eq!(bench.sevens("now", &format!("seq:{before}")).len(), 4);

    // What one writes, the other does not see.
    let socket = bench.serve_here("old");
    Guest::start(&socket).zero(4096, 4096);
    assert_eq!(bench.sevens("old", "head"), [0, 2, 3]);
    assert_eq!((bench.sevens("web1", "head"), bench.sevens("now", "head")), (vec![1, 2, 3], vec![1, 2, 3]));
    let from = bench.branches("old")[0].from.clone().unwrap();
    assert_eq!((from.name.unwrap().as_str(), from.at.seq), ("web1", before));

    // Clones outlive their source.
    bench.client.delete::<()>("/v1/volumes/web1?force=true").unwrap();
    for _ in 0..2 {
        assert_eq!(bench.sevens("old", "head"), [0, 2, 3]);
        assert_eq!(bench.sevens("old", &format!("seq:{before}")).len(), 4);
        assert_eq!(bench.sevens("now", "head"), [1, 2, 3]);
        assert_eq!(bench.branches("old")[0].from.as_ref().unwrap().name, None);
        bench.restart();
    }
    bench.stop();
}

#[test]
fn clones_are_made_all_or_none() {
    let mut bench = Bench::new();
    bench.filled("web1");
    bench.filled("taken");
    let two = |second: Value| {
        let body = json!({ "clones": [{ "source": "web1", "name": "good" }, second] });
        bench.post::<Vec<Volume>>("/v1/clone", &body)
    };
    for (second, kind, part) in [
        (json!({ "source": "web1", "name": "taken" }), ErrorKind::Exists, "taken"),
        (json!({ "source": "web1", "name": "good" }), ErrorKind::Invalid, "named twice"),
        (json!({ "source": "none", "name": "other" }), ErrorKind::NotFound, "no volume 'none'"),
        (json!({ "source": "web1", "at": "mark:x", "name": "other" }), ErrorKind::NotFound, "no mark 'x'"),
        (json!({ "source": "web1", "at": "soon", "name": "other" }), ErrorKind::Invalid, "is no instant"),
        (json!({ "source": "web1", "name": "a b" }), ErrorKind::Invalid, "not a valid volume name"),
        (json!({ "source": "web1" }), ErrorKind::Invalid, "name"),
        (json!({ "source": "web1", "name": "x", "size": 1 }), ErrorKind::Invalid, "size"),
    ] {
        let refusal = two(second).unwrap_err();
        assert_eq!(refusal.kind, kind, "{part}: {refusal}");
        assert!(refusal.message.contains(part), "{part}: {refusal}");
    }
    let refusal = bench.post::<Value>("/v1/clone", &json!({ "clones": [] })).unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::Invalid);
    assert_eq!(bench.client.get::<Vec<Volume>>("/v1/volumes").unwrap().len(), 2);

    let made = two(json!({ "source": "taken", "name": "other" })).unwrap();
    assert_eq!(made.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["good", "other"]);
    bench.stop();
}

#[test]
fn marks_name_any_instant_and_carry_what_is_given_to_them() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    bench.zero_first_block("web1");
    let path = "/v1/volumes/web1/marks";
    let at = format!("seq:{before}");
    let new = json!({ "label": "good", "at": at, "metadata": { "ticket": "4711", "note": "a=b ü" } });
    let mark: Mark = bench.post(path, &new).unwrap();
    assert_eq!((mark.at.seq, mark.metadata["note"].as_str()), (before, "a=b ü"));
    let bare: Mark = bench.post(path, &json!({ "label": "now" })).unwrap();
    assert!(bare.at.seq > before && bare.metadata.is_empty());
    assert_eq!(bench.sevens("web1", "mark:good").len(), 4);

    for (new, kind, part) in [
        (json!({ "label": "good" }), ErrorKind::Exists, "good"),
        (json!({ "label": "a:b" }), ErrorKind::Invalid, "not a valid mark label"),
        (json!({ "label": "x", "at": "mark:none" }), ErrorKind::NotFound, "no mark 'none'"),
        (
            json!({ "label": "x", "metadata": { "k": "v".repeat(17 << 10) } }),
            ErrorKind::Invalid,
            "16384 bytes",
        ),
        (json!({ "label": "x", "metadata": { "": "v" } }), ErrorKind::Invalid, "empty"),
        (json!({ "label": "x", "metadata": { "k": 1 } }), ErrorKind::Invalid, "metadata"),
    ] {
        let refusal = bench.post::<Mark>(path, &new).unwrap_err();
        assert_eq!(refusal.kind, kind, "{part}: {refusal}");
        assert!(refusal.message.contains(part), "{part}: {refusal}");
    }
    bench.restart();
    assert_eq!(bench.client.get::<Vec<Mark>>(path).unwrap(), [mark, bare.clone()]);
    assert_eq!(bench.show("web1").unwrap().marks.len(), 2);

    bench.client.delete::<()>(&format!("{path}/good")).unwrap();
    for (label, kind) in [("good", ErrorKind::NotFound), ("a:b", ErrorKind::Invalid)] {
        assert_eq!(bench.client.delete::<()>(&format!("{path}/{label}")).unwrap_err().kind, kind, "{label}");
    }
    let refusal = bench.client.delete::<()>("/v1/volumes/none/marks/good").unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::NotFound);
    assert_eq!(bench.client.get::<Vec<Mark>>(path).unwrap(), [bare]);
    assert_eq!(bench.sevens("web1", &at).len(), 4);
    bench.stop();
}

#[test]
fn a_deleted_branch_cannot_be_opened_but_what_others_inherit_stays() {
    let mut bench = Bench::new();
    let before = bench.filled("web1");
    let broken = bench.zero_first_block("web1");
    bench.clone_one("web1", &format!("seq:{broken}"), "keeper").unwrap();
    // Behind what the clone inherits.
    bench.zero_first_block("web1");
    bench.post::<Mark>("/v1/volumes/web1/marks", &json!({ "label": "broken" })).unwrap();
    let first = bench.revert("web1", &format!("seq:{before}"), false).unwrap();
    let path = "/v1/volumes/web1/branches";
    let (abandoned, head) = (first.undo.branch, first.branch);
    for (id, kind, part) in [
        (head.to_string(), ErrorKind::Busy, "is the head"),
        (abandoned.to_string(), ErrorKind::Busy, "mark 'broken' lies on branch"),
        ("999".to_owned(), ErrorKind::NotFound, "no branch 999"),
        ("main".to_owned(), ErrorKind::Invalid, "by its number"),
        ("-1".to_owned(), ErrorKind::Invalid, "by its number"),
    ] {
        let refusal = bench.client.delete::<()>(&format!("{path}/{id}")).unwrap_err();
        assert_eq!(refusal.kind, kind, "{id}: {refusal}");
        assert!(refusal.message.contains(part), "{id}: {refusal}");
    }
    let refusal = bench.client.delete::<()>(&format!("/v1/volumes/keeper/branches/{abandoned}")).unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::NotFound);

    bench.client.delete::<()>(&format!("{path}/{abandoned}?force=true")).unwrap();
    assert!(bench.show("web1").unwrap().marks.is_empty());
    for _ in 0..2 {
        assert_eq!(bench.sevens("web1", "head").len(), 4);
        assert_eq!(bench.sevens("keeper", "head").len(), 3);
        bench.restart();
    }
    // Once nobody inherits from its end any more, that end is gone, and a refusal names what is left.
    bench.client.delete::<()>("/v1/volumes/keeper").unwrap();
    let refusal = bench.revert("web1", &format!("seq:{broken}"), false).unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::NotFound, "{refusal}");
    assert!(refusal.message.contains(&format!("nearest instant left is seq:{before}")), "{refusal}");
    bench.stop();
}
