//! Images go in and come out with the bytes, and the holes, that they have.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::process::run_ok;
use e2e::programs::system;
use e2e::workload::TestFile;
use e2e::{Cdpd, run_scene};

const SIZE: u64 = 512 << 20;

/// A mostly empty image with data at its start, over a block border, and in its last bytes.
fn make_image(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(SIZE)?;
    let content = TestFile { seed: 21, number: 1 }.content();
    file.write_all_at(&content, 0)?;
    file.write_all_at(&content, (100 << 20) + 512)?;
    file.write_all_at(&content[..512], SIZE - 512)?;
    Ok(())
}

fn qemu_img(args: &[&str]) -> Result<String> {
    run_ok(Command::new(system("qemu-img")?).args(args), Duration::from_secs(60))
}

#[test]
fn raw_and_qcow2_images_come_back_byte_for_byte_and_holes_stay_holes() {
    run_scene(|scene| {
        let (raw, qcow2) = (scene.path("in.raw"), scene.path("in.qcow2"));
        make_image(&raw)?;
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw.to_string_lossy(), &qcow2.to_string_lossy()])?;
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        for (volume, file) in [("from-raw", &raw), ("from-qcow2", &qcow2)] {
            tool.run(&["volume", "create", volume, "--from", &file.to_string_lossy()])?;
            let out = tool.extract(volume, "out.raw")?;
            qemu_img(&[
                "compare",
                "-s",
                "-f",
                "raw",
                "-F",
                "raw",
                &raw.to_string_lossy(),
                &out.path().to_string_lossy(),
            ])?;
            let blocks = fs::metadata(out.path())?.blocks() * 512;
            ensure!(blocks < 16 << 20, "{volume}: the holes were filled: {blocks} bytes");

            let packed = tool.extract(volume, "out.qcow2")?;
            let packed = packed.path().to_string_lossy().into_owned();
            ensure!(qemu_img(&["info", "-f", "qcow2", &packed])?.contains("qcow2"));
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &raw.to_string_lossy(), &packed])?;
        }
        cdpd.stop()
    });
}

#[test]
fn an_import_that_fails_leaves_no_volume() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let tool = cdpd.tool();
        let missing = scene.path("missing.raw");
        tool.refused(&["volume", "create", "web1", "--from", &missing.to_string_lossy()])?;
        tool.refused(&["volume", "show", "web1"])?;
        tool.run(&["volume", "create", "web1", "--size", "1G"])?;
        cdpd.stop()
    });
}
