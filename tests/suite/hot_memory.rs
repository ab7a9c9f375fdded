//! QEMU's background snapshot of a guest whose disk is ours: with the guard of guest memory it is the memory of one
//! instant; without, it is not, which shows that these tests can fail.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use e2e::process::{Process, tied, wait_for};
use e2e::programs::built;
use e2e::{Guest, GuestBuilder, Scene, run_scene};
use serde_json::json;

use crate::load::Load;

const LIMIT: Duration = Duration::from_secs(120);

/// A running `cutdisk`, an example of `vhost-blk`.
struct CutDisk {
    process: Process,
    socket: PathBuf,
    control: PathBuf,
}

impl CutDisk {
    fn serve(scene: &Scene, name: &str, data: &Path, mode: &str) -> Result<Self> {
        let (socket, control) = (scene.path(&format!("{name}.sock")), scene.path(&format!("{name}.control")));
        let mut command = tied(&built("examples/cutdisk")?);
        command.arg(&socket).arg(data).arg(&control).args([mode, "2"]);
        let mut process = Process::spawn(name, command, &scene.path(&format!("{name}.log")))?;
        wait_for("the disk's control socket", LIMIT, || {
            process.must_run()?;
            Ok(control.exists().then_some(()))
        })?;
        Ok(Self { process, socket, control })
    }

    fn command(&mut self, command: &str) -> Result<String> {
        self.process.must_run()?;
        let mut stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(LIMIT))?;
        writeln!(stream, "{command}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }
}

fn builder(disk: &CutDisk) -> GuestBuilder {
    Guest::builder().disk(&disk.socket).queues(2).smp(2)
}

/// Writes what comes on a socket to a file, no faster than some 60 MiB/s, so that much is read and written by the guest
/// while it is saved.
fn receive_slowly(socket: &Path, saved: &Path) -> Result<JoinHandle<std::io::Result<()>>> {
    let (listener, mut saved) = (UnixListener::bind(socket)?, File::create(saved)?);
    Ok(std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut piece = vec![0; 1 << 20];
        loop {
            match stream.read(&mut piece)? {
                0 => return Ok(()),
                len => saved.write_all(&piece[..len])?,
            }
            // A read brings what the socket holds: some 200 KiB.
            std::thread::sleep(Duration::from_millis(3));
        }
    }))
}

/// Saves a guest under load, and says how many mismatches its restored twin finds, in pages and in stamps.
fn save_and_restore(scene: &Scene, mode: &str) -> Result<(u64, u64)> {
    let (data, copy, saved) = (scene.path("data.img"), scene.path("copy.img"), scene.path("saved.state"));
    Load::SIMPLE.image(&data)?;
    let mut disk = CutDisk::serve(scene, "disk", &data, mode)?;
    let mut guest = builder(&disk).boot(scene)?;
    Load::SIMPLE.start(&mut guest)?;
    Load::wait_for_progress(&guest, 2)?;

    println!("{}", disk.command(&format!("arm {}", copy.display()))?);
    let capability = json!({ "capability": "background-snapshot", "state": true });
    guest.qmp().execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    let receiver = receive_slowly(&scene.path("stream.sock"), &saved)?;
    guest
        .qmp()
        .execute("migrate", json!({ "uri": format!("unix:{}", scene.path("stream.sock").display()) }))?;
    let migration = wait_for("the end of saving", LIMIT, || {
        let migration = guest.qmp().execute("query-migrate", json!({}))?;
        let status = migration["status"].as_str().unwrap_or_default().to_owned();
        ensure!(status != "failed" && status != "cancelled", "saving has failed: {migration}");
        Ok((status == "completed").then_some(migration))
    })?;
    println!("{mode}: saved in {} ms, downtime {} ms", migration["total-time"], migration["downtime"]);
    println!("{}", disk.command("close")?);
    receiver.join().map_err(|_| anyhow!("the receiver has panicked"))??;
    Load::wait_for_progress(&guest, 2)?;
    Load::must_match(&guest)?;
    guest.kill()?;
    drop(disk);

    let disk = CutDisk::serve(scene, "twin", &copy, "unguarded")?;
    let twin = builder(&disk).restored_from(&saved).boot(scene)?;
    Load::wait_for_word(&twin)?;
    Load::wait_for_progress(&twin, 2)?;
    let found = Load::mismatches(&twin)?;
    println!("{mode}: the restored guest finds {} pages and {} stamps that do not match", found.0, found.1);
    twin.kill()?;
    Ok(found)
}

#[test]
fn a_guarded_guest_is_saved_at_one_instant_while_it_runs() {
    run_scene(|scene| {
        ensure!(save_and_restore(scene, "guarded")? == (0, 0), "memory of several instants");
        Ok(())
    });
}

#[test]
fn without_the_guard_pages_of_later_instants_are_saved() {
    run_scene(|scene| {
        ensure!(save_and_restore(scene, "unguarded")?.0 > 0, "this test bed does not notice unsound memory");
        Ok(())
    });
}
