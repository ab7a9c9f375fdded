//! Invariant 3: RocksDB is derived. Without it, every instant of the past has the same content.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::workload::mix;
use e2e::{Cdpd, Guest, Tool, run_scene};

use crate::writers::{Writer, format};

const INSTANTS: u64 = 100;

#[test]
fn a_rebuilt_index_resolves_the_same_content_at_a_hundred_random_instants() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let socket = tool.create_and_serve(scene, "web1", "64M", 1)?;
        let mut guest = Guest::builder().disk(&socket).boot(scene)?;
        format(&mut guest, "vda")?;
        tool.run(&["mark", "web1", "formatted"])?;
        let mut synced = Writer::synced(&mut guest, "/mnt/vda/synced", 5)?;
        synced.wait_files(20)?;
        // Part of the history is in the index, part only in the log.
        cdpd.kill9()?;
        cdpd.start_again()?;
        synced.wait_files(20)?;
        synced.stop_and_check(&mut guest)?;
        guest.quit()?;

        let instants = pick_instants(&tool)?;
        let before = checksums(&tool, &instants)?;
        ensure!(before.windows(2).any(|pair| pair[0] != pair[1]), "the disk never changed");
        cdpd.stop()?;
        for database in ["catalogue", "index"] {
            let dir = cdpd.store().join(database);
            fs::remove_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
        }
        tool.run(&["rebuild-index"])?;
        tool.run(&["verify"])?;
        cdpd.start_again()?;
        ensure!(checksums(&tool, &instants)? == before, "the past has changed");
        cdpd.stop()
    });
}

/// Random instants of the volume's history, and a mark.
fn pick_instants(tool: &Tool) -> Result<Vec<String>> {
    let records = tool.records("web1")?;
    ensure!(records.len() > 100, "only {} records", records.len());
    let seqs: Vec<u64> = records.iter().filter_map(|record| record.get("seq")?.as_u64()).collect();
    ensure!(seqs.len() == records.len(), "a record without a seq");
    let mut instants: Vec<String> =
        (0..INSTANTS).map(|n| format!("web1@seq:{}", seqs[mix(n) as usize % seqs.len()])).collect();
    instants.push("web1@mark:formatted".to_owned());
    instants.push("web1@head".to_owned());
    Ok(instants)
}

fn checksums(tool: &Tool, instants: &[String]) -> Result<Vec<String>> {
    instants.iter().map(|at| tool.extract(at, "past.img")?.checksum()).collect()
}
