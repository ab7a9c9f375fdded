//! The metrics: those that the operator's guide explains, and what they count.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::guest::Guest;
use crate::{Bench, MIB, ask_for_metrics};

const GUIDE: &str = include_str!("../../../../docs/operations.md");

/// Those of its tables.
fn explained() -> BTreeSet<&'static str> {
    let section = GUIDE.split("\n## ").find(|section| section.starts_with("What to watch\n")).unwrap();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    cells.flat_map(|cell| cell.split('`')).filter(|word| word.starts_with("cdpd_")).collect()
}

/// What the daemon exposes: its families, and its samples by name and labels.
struct Exposed {
    families: BTreeSet<String>,
    samples: BTreeMap<String, f64>,
}

impl Bench {
    fn metrics(&self) -> Exposed {
        let stream = UnixStream::connect(self.store().join("cdpd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let answer = ask_for_metrics(stream, "cdpd");
        let (_, text) = answer.split_once("\r\n\r\n").unwrap();
        let family = |line: &str| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned());
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse::<f64>().unwrap())
        };
        Exposed {
            families: text.lines().filter_map(family).collect(),
            samples: text.lines().filter(|line| !line.starts_with('#')).map(sample).collect(),
        }
    }
}

impl Exposed {
    /// How much a sample of volume `web1` has grown since.
    fn growth(&self, since: &Self, name: &str, label: &str) -> f64 {
        let key = format!("{name}{{volume=\"web1\"{label}}}");
        self.samples[&key] - since.samples[&key]
    }
}

#[test]
fn every_metric_is_explained_and_every_metric_that_is_explained_has_a_value() {
    let mut bench = Bench::with_nbd();
    bench.create("web1", MIB).unwrap();
    let guest = Guest::start(&bench.serve_here("web1"));
    let client = bench.nbd("web1");
    let exposed = bench.metrics();
    let explained: BTreeSet<String> = explained().into_iter().map(str::to_owned).collect();
    let (missing, vain): (Vec<_>, Vec<_>) = (
        exposed.families.difference(&explained).collect(),
        explained.difference(&exposed.families).collect(),
    );
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    assert!(vain.is_empty(), "only in docs/operations.md: {vain:?}");
    let named = exposed.samples.keys().map(|key| key.split('{').next().unwrap().to_owned());
    assert_eq!(named.collect::<BTreeSet<_>>(), exposed.families);
    drop((guest, client));
    bench.stop();
}

#[test]
fn counters_move_by_what_was_done() {
    let mut bench = Bench::with_nbd();
    bench.create("web1", MIB).unwrap();
    let socket = bench.serve_here("web1");
    let mut client = bench.nbd("web1");
    let before = bench.metrics();
    client.write(0, &[7; 8192]);
    client.read(4096, 12288);
    client.flush();
    let then = bench.metrics();
    let grown = |name: &str| then.growth(&before, name, "");
    assert_eq!((grown("cdpd_volume_writes_total"), grown("cdpd_volume_written_bytes_total")), (1.0, 8192.0));
    assert_eq!((grown("cdpd_volume_reads_total"), grown("cdpd_volume_read_bytes_total")), (1.0, 12288.0));
    assert_eq!((grown("cdpd_volume_clears_total"), grown("cdpd_volume_flushes_total")), (0.0, 1.0));
    assert_eq!((grown("cdpd_volume_errors_total"), grown("cdpd_vhost_connected")), (0.0, 0.0));

    let mut guest = Guest::start(&socket);
    guest.write(0, 16384);
    guest.write(65536, 4096);
    guest.read(0, 8192);
    guest.zero(0, 4096);
    guest.flush();
    let last = bench.metrics();
    let grown = |name: &str, label: &str| last.growth(&then, name, label);
    for (op, count) in
        [("write", 2.0), ("read", 1.0), ("flush", 1.0), ("write_zeroes", 1.0), ("discard", 0.0)]
    {
        assert_eq!(grown("cdpd_vhost_requests_total", &format!(",op=\"{op}\"")), count, "{op}");
    }
    let carried = |direction: &str| grown("cdpd_vhost_bytes_total", &format!(",direction=\"{direction}\""));
    assert_eq!((carried("write"), carried("read")), (20480.0, 8192.0));
    let of_volume = |name: &str| grown(&format!("cdpd_volume_{name}_total"), "");
    assert_eq!(["writes", "written_bytes"].map(of_volume), [2.0, 20480.0]);
    assert_eq!(["reads", "read_bytes"].map(of_volume), [1.0, 8192.0]);
    assert_eq!(["clears", "flushes", "errors"].map(of_volume), [1.0, 1.0, 0.0]);
    assert_eq!(grown("cdpd_vhost_errors_total", ""), 0.0);
    assert_eq!((grown("cdpd_vhost_connected", ""), grown("cdpd_vhost_connections_total", "")), (1.0, 1.0));
    drop(guest);
    bench.stop();
}

#[test]
fn nobody_is_connected_where_the_socket_could_not_be_made() {
    let mut bench = Bench::new();
    let directory = bench.root.path().join("run");
    std::fs::create_dir(&directory).unwrap();
    bench.create("web1", MIB).unwrap();
    bench.serve("web1", &directory.join("web1.sock")).unwrap();
    bench.stop();
    std::fs::remove_dir_all(&directory).unwrap();
    bench.start_again();
    let shown = bench.metrics();
    assert_eq!(shown.samples.get("cdpd_vhost_connected{volume=\"web1\"}"), Some(&0.0));
    bench.stop();
}
