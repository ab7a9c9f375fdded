//! Past instants and heads over NBD, as the clients of others see them: libnbd, QEMU, fio, nbdkit.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::process::{run, run_ok, tied, wait_for};
use e2e::programs::system;
use e2e::workload::{block_content, mix};
use e2e::{Cdpd, Scene, Tool, run_scene};
use serde_json::Value;

/// How long a client may take.
const CLIENT: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

/// Where a daemon serves NBD.
pub(crate) struct Nbd {
    socket: PathBuf,
    /// On this machine's loopback address.
    pub(crate) port: u16,
}

impl Nbd {
    /// Writes a configuration for the scene's daemon, which must not run yet: every head can be written to.
    pub(crate) fn configure(scene: &Scene) -> Result<Self> {
        let socket = scene.path("nbd.sock");
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let listen = format!("[\"unix:{}\", \"tcp:127.0.0.1:{port}\"]", socket.display());
        fs::create_dir_all(scene.path("store"))?;
        let text = format!("[nbd]\nlisten = {listen}\nwritable = [\"*\"]\n");
        fs::write(scene.path("store").join("cdpd.toml"), text)?;
        Ok(Self { socket, port })
    }

    /// An export, for clients that take URIs.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }
}

/// Runs a client that must succeed.
pub(crate) fn client(name: &str, args: &[&str]) -> Result<String> {
    run_ok(&mut command(name, args)?, CLIENT)
}

/// Clients run with Debian's own Python, whatever else is installed, and end with the test: some wait for a word from it.
fn command(name: &str, args: &[&str]) -> Result<Command> {
    let mut command = tied(&system(name)?);
    command.args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Ok(command)
}

/// Runs a client that must fail.
fn refused(name: &str, args: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = run(&mut command(name, args)?, CLIENT)?;
    ensure!(!status.success(), "{name} {args:?} succeeded");
    Ok(format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

/// A raw image with data, holes and zeroes that were written.
fn make_image(path: &Path, mib: u64) -> Result<()> {
    let mut bytes = vec![0; (mib * MIB) as usize];
    for (index, block) in bytes.chunks_exact_mut(4096).enumerate() {
        if index % 3 == 0 && !(2048..6144).contains(&index) {
            let word = mix(index as u64).to_le_bytes();
            block.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
        }
    }
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

fn same(one: &Path, other: &Path) -> Result<()> {
    let (a, b) = (fs::read(one)?, fs::read(other)?);
    ensure!(a.len() == b.len(), "{} and {} differ in size", one.display(), other.display());
    let at = a.iter().zip(&b).position(|(x, y)| x != y);
    ensure!(at.is_none(), "{} and {} differ from byte {at:?} on", one.display(), other.display());
    Ok(())
}

/// A daemon with one volume of 48 MiB, imported from `image.raw`, with the mark `first`.
fn with_volume(scene: &Scene) -> Result<(Cdpd, Tool, Nbd, PathBuf)> {
    let nbd = Nbd::configure(scene)?;
    let cdpd = Cdpd::start(scene)?;
    let tool = cdpd.tool();
    let image = scene.path("image.raw");
    make_image(&image, 48)?;
    tool.run(&["volume", "create", "web1", "--from", &image.to_string_lossy(), "--size", "48M"])?;
    tool.run(&["mark", "web1", "first", "--set", "why=test"])?;
    Ok((cdpd, tool, nbd, image))
}

#[test]
fn every_client_reads_the_same_bytes() {
    run_scene(|scene| {
        let (mut cdpd, _tool, nbd, image) = with_volume(scene)?;
        let first = nbd.uri("web1@mark:first");
        let out = scene.path("copy.raw");
        let (image_path, out_path) = (image.to_string_lossy(), out.to_string_lossy());

        let info: Value = serde_json::from_str(&client("nbdinfo", &["--json", &first])?)?;
        let export = &info["exports"][0];
        ensure!(export["export-size"] == 48 * MIB && export["is_read_only"] == true, "{export}");
        ensure!(export["can_multi_conn"] == true && export["block_size_minimum"] == 512, "{export}");
        let list = client("nbdinfo", &["--list", &nbd.uri("")])?;
        ensure!(list.contains("export=\"web1\"") && list.contains("volume web1 at"), "{list}");

        client("nbdcopy", &["--connections=4", &first, &out_path])?;
        same(&image, &out)?;
        client("qemu-img", &["convert", "-f", "raw", "-O", "raw", &first, &out_path])?;
        same(&image, &out)?;
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &first, &image_path])?;
        let through = format!("nbdcopy \"$uri\" {out_path}");
        client("nbdkit", &["-U", "-", "nbd", &format!("uri={first}"), "--run", &through])?;
        same(&image, &out)?;
        client("nbdcopy", &[&format!("nbd://127.0.0.1:{}/web1@mark:first", nbd.port), &out_path])?;
        same(&image, &out)?;

        // 2048..6144 is the hole; elsewhere one block of three has data.
        let map: Vec<Value> =
            serde_json::from_str(&client("qemu-img", &["map", "--output=json", "-f", "raw", &first])?)?;
        let data: u64 = map.iter().filter(|e| e["data"] == true).filter_map(|e| e["length"].as_u64()).sum();
        ensure!(data == (12288 - 4096) / 3 * 4096 + 4096, "data: {data}");
        let line: Vec<String> = block_content(3)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let read =
            client("qemu-io", &["-r", "-f", "raw", "-c", &format!("read -v {} 16", 3 * 4096), &first])?;
        ensure!(read.contains(&line.join(" ")), "not {line:?} in {read}");
        cdpd.stop()
    });
}

#[test]
fn a_head_is_written_and_verified_by_fio_and_a_past_instant_by_nobody() {
    run_scene(|scene| {
        let (mut cdpd, tool, nbd, image) = with_volume(scene)?;
        let (head, first) = (nbd.uri("web1"), nbd.uri("web1@mark:first"));
        let uri = format!("--uri={head}");
        let jobs = ["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bs=512-64k", "--bsrange=4k-64k"];
        let checks = [
            "--size=32M",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--fsync=64",
            "--randseed=7",
            "--verify_state_save=0",
        ];
        client("fio", &[&jobs[..], &checks[..], &[&uri]].concat())?;

        let write = [
            "-f",
            "raw",
            "-c",
            "write -P 5 0 4k",
            "-c",
            "write -z 40M 1M",
            "-c",
            "discard 41M 1M",
            "-c",
            "flush",
        ];
        client("qemu-io", &[&write[..], &[&head]].concat())?;
        let text = refused("qemu-io", &[&write[..], &[&first]].concat())?;
        ensure!(text.contains("ermission denied") || text.contains("ead-only"), "{text}");
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &first, &image.to_string_lossy()])?;

        // A client that insists, against the export's flags, is told so by the server.
        let script = "import nbd, errno\n\
            h.set_strict_mode(0)\n\
            h.connect_uri(uri)\n\
            try:\n    h.pwrite(b'x' * 512, 0)\n    raise SystemExit('a past instant was written to')\n\
            except nbd.Error as error:\n    assert error.errno in ('EPERM', 'EROFS'), error.errno\n\
            try:\n    h.pread(512, 48 << 20)\n    raise SystemExit('read past the end')\n\
            except nbd.Error as error:\n    assert error.errno == 'EINVAL', error.errno\n\
            assert len(h.pread(512, 0)) == 512\n";
        client("nbdsh", &["-c", &format!("uri = '{first}'"), "-c", script])?;

        // Kill -9 with everything flushed: the store has it.
        client("qemu-io", &["-f", "raw", "-c", "write -P 6 8k 4k", "-c", "flush", &head])?;
        cdpd.kill9()?;
        cdpd.start_again()?;
        client(
            "qemu-io",
            &[
                "-r",
                "-f",
                "raw",
                "-c",
                "read -P 5 0 4k",
                "-c",
                "read -P 6 8k 4k",
                "-c",
                "read -P 0 40M 2M",
                &head,
            ],
        )?;
        tool.run(&["verify"])?;
        cdpd.stop()
    });
}

#[test]
fn an_incremental_backup_is_the_disk() {
    run_scene(|scene| {
        let (mut cdpd, tool, nbd, _image) = with_volume(scene)?;
        let (head, backup) = (nbd.uri("web1"), scene.path("backup.raw"));
        let backup_path = backup.to_string_lossy();
        client("nbdcopy", &[&nbd.uri("web1@mark:first"), &backup_path])?;

        let writes = [
            "write -P 1 1M 64k",
            "write -P 2 7340032 512",
            "write -z 20M 3M",
            "discard 30M 2M",
            "write -P 3 47M 1M",
        ];
        let commands: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
        client("qemu-io", &[&["-f", "raw"], &commands[..], &["-c", "flush", &head]].concat())?;
        tool.run(&["mark", "web1", "second"])?;
        // What comes later is no part of this backup.
        client("qemu-io", &["-f", "raw", "-c", "write -P 9 2M 1M", "-c", "flush", &head])?;

        // Copies what the context says has changed, and nothing else.
        let second = nbd.uri("web1@mark:second");
        let script = format!(
            "import os\n\
            context = 'qemu:dirty-bitmap:since@mark:first'\n\
            h.add_meta_context(context)\n\
            h.connect_uri('{second}')\n\
            assert h.can_meta_context(context)\n\
            size, at, copied = h.get_size(), 0, 0\n\
            out = os.open('{backup_path}', os.O_WRONLY)\n\
            while at < size:\n\
            \x20   extents = []\n\
            \x20   h.block_status(min(size - at, 1 << 30), at, lambda c, o, e, err: extents.extend(e))\n\
            \x20   for length, flags in zip(extents[::2], extents[1::2]):\n\
            \x20       length = min(length, size - at)\n\
            \x20       for part in range(at, at + length, 1 << 20) if flags & 1 else []:\n\
            \x20           os.pwrite(out, h.pread(min(1 << 20, at + length - part), part), part)\n\
            \x20       copied += length if flags & 1 else 0\n\
            \x20       at += length\n\
            assert 1 << 20 < copied < 4 << 20, copied\n"
        );
        client("nbdsh", &["-c", &script])?;
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &second, &backup_path])?;
        let text = refused("qemu-img", &["compare", "-f", "raw", "-F", "raw", &head, &backup_path])?;
        ensure!(text.contains("mismatch"), "{text}");
        cdpd.stop()
    });
}

#[test]
fn what_is_open_never_changes_whatever_happens_to_the_volume() {
    run_scene(|scene| {
        let (mut cdpd, tool, nbd, _image) = with_volume(scene)?;
        let (opened, go_on) = (scene.path("opened"), scene.path("go-on"));
        let script = format!(
            "import hashlib, os, time\n\
            def look():\n\
            \x20   return [hashlib.sha256(h.pread(1 << 20, at)).digest() for at in range(0, h.get_size(), 1 << 20)]\n\
            h.connect_uri('{}')\n\
            before = look()\n\
            open('{}', 'w').close()\n\
            while not os.path.exists('{}'):\n\
            \x20   assert look() == before\n\
            assert look() == before\n",
            nbd.uri("web1@mark:first"),
            opened.display(),
            go_on.display()
        );
        let reader = std::thread::spawn(move || client("nbdsh", &["-c", &script]));
        wait_for("the reader", CLIENT, || Ok(opened.exists().then_some(())))?;

        client("qemu-io", &["-f", "raw", "-c", "write -P 1 0 48M", "-c", "flush", &nbd.uri("web1")])?;
        tool.run(&["clone", "web1@mark:first", "copy"])?;
        client("qemu-io", &["-f", "raw", "-c", "discard 0 48M", "-c", "flush", &nbd.uri("copy")])?;
        tool.run(&["revert", "web1@mark:first"])?;
        client("qemu-io", &["-f", "raw", "-c", "write -P 2 0 8M", "-c", "flush", &nbd.uri("web1")])?;
        let scratch = nbd.uri("web1@mark:first:scratch");
        client("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", "-c", "read -P 7 0 1M", &scratch])?;
        let volumes = tool.json_lines(&["volume", "list"])?;
        ensure!(volumes.len() == 2, "a scratch view is left behind: {volumes:?}");
        // Its first connection had gone: this is another view, without what the other wrote.
        wait_for("a view of its own", CLIENT, || {
            let read = refused("qemu-io", &["-r", "-f", "raw", "-c", "read -P 7 0 1M", &scratch]);
            Ok(read.ok().filter(|read| read.contains("Pattern verification failed")).map(drop))
        })?;
        tool.run(&["volume", "destroy", "web1", "--yes"])?;
        fs::write(&go_on, "")?;
        reader.join().map_err(|_| anyhow::anyhow!("the reader has panicked"))??;

        client("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 48M", &nbd.uri("copy")])?;
        tool.run(&["verify"])?;
        cdpd.stop()
    });
}

#[test]
fn a_client_that_has_a_head_keeps_it_from_being_reverted_until_it_is_forced_off() {
    run_scene(|scene| {
        let (mut cdpd, tool, nbd, _image) = with_volume(scene)?;
        let (opened, go_on) = (scene.path("opened"), scene.path("go-on"));
        let script = format!(
            "import os, time\n\
            h.connect_uri('{}')\n\
            h.pwrite(b'x' * 4096, 0)\n\
            open('{}', 'w').close()\n\
            while not os.path.exists('{}'):\n\
            \x20   time.sleep(0.05)\n\
            try:\n\
            \x20   h.pwrite(b'y' * 4096, 0)\n\
            except nbd.Error:\n\
            \x20   pass\n\
            else:\n\
            \x20   raise AssertionError('it can still write')\n",
            nbd.uri("web1"),
            opened.display(),
            go_on.display()
        );
        let writer = std::thread::spawn(move || client("nbdsh", &["-c", &script]));
        wait_for("the writer", CLIENT, || Ok(opened.exists().then_some(())))?;
        let said = tool.refused(&["revert", "web1@mark:first"])?;
        ensure!(said.contains("web1") && said.contains("in use"), "{said}");
        tool.run(&["revert", "web1@mark:first", "--force"])?;
        fs::write(&go_on, "")?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer has panicked"))??;
        let (head, first) = (nbd.uri("web1"), nbd.uri("web1@mark:first"));
        client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &head, &first])?;
        cdpd.stop()
    });
}

#[test]
fn names_that_mean_nothing_are_refused_with_the_reason() {
    run_scene(|scene| {
        let (mut cdpd, _tool, nbd, _image) = with_volume(scene)?;
        for (name, reason) in [
            ("web2", "there is no volume 'web2'"),
            ("web1@mark:none", "no mark 'none'"),
            ("web1@2001-01-01T00:00:00Z", "begins at"),
            ("web1@seq:99999999999999999", "not in the history yet"),
            ("web1@yesterday", "no instant"),
            ("web1%2Fx", "not a valid volume name"),
            ("web1@-5m:scratchy", "no instant"),
        ] {
            let text = refused("qemu-img", &["info", &nbd.uri(name)])?;
            ensure!(text.contains(reason), "{name}: {text}");
        }
        ensure!(
            client("nbdinfo", &["--size", &nbd.uri("")])?.trim() == (48 * MIB).to_string(),
            "the only volume"
        );
        cdpd.stop()
    });
}
