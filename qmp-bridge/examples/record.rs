//! Records how a real QEMU answers: the transcripts in `tests/transcripts`.
//!
//! ```sh
//! cargo run --release -p qmp-bridge --features fake --example record -- \
//!     qemu-system-x86_64 qmp-bridge/tests/transcripts [QEMU ARGUMENTS…]
//! ```
//!
//! It starts the QEMU that is named, lets this crate describe a furnished machine, and send a small one's state in each
//! mode into a socket that reads it all. Between crate and QEMU is a tap ([`qmp_bridge::fake::tap`]), which writes down
//! who says what, with one path replaced: the directory of sockets becomes `/run/vm`. Files are called after QEMU's
//! version. `qemu-storage-daemon` is needed for the furnished machine's vhost-user disk.
//!
//! The transcripts of 10.0 are from Debian's `qemu-system-x86` of bookworm-backports, as it is installed by
//! `make deps`. Those of 7.2 are from bookworm's own, which need not be installed: get the packages `qemu-system-x86`,
//! `qemu-system-common`, `qemu-system-data` and `seabios` of that version with `apt-get download PACKAGE=VERSION`, unpack
//! them with `dpkg -x` into a directory DIR, and run this with `DIR/usr/bin/qemu-system-x86_64` and the arguments
//! `-L DIR/usr/share/qemu -L DIR/usr/share/seabios`.

#[path = "../tests/it/qemu.rs"]
mod qemu;
#[path = "../tests/it/scenario.rs"]
mod scenario;

use std::error::Error;
use std::path::Path;

use qmp_bridge::fake::{Step, Transcript, tap};
use qmp_bridge::migration::Mode;
use qmp_bridge::{Client, Options, Version};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

const USAGE: &str = "record QEMU DIRECTORY [QEMU ARGUMENTS…]";
/// What stands in transcripts for the directory of sockets.
const PLACE: &str = "/run/vm";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [program, out, more @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    let (version, transcript) = described(program, more).await?;
    write(out, &version, "describe", &transcript)?;
    for mode in [Mode::Hot, Mode::Live, Mode::Pause] {
        let (version, transcript) = checkpointed(program, more, mode).await?;
        write(out, &version, &mode.to_string(), &transcript)?;
    }
    Ok(())
}

async fn described(program: &str, more: &[String]) -> Result<(Version, Transcript), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let (vhost, disk) = (dir.path().join("vhost"), dir.path().join("disk"));
    std::fs::create_dir(&disk)?;
    let _daemon = qemu::storage_daemon(&vhost);
    let arguments = qemu::furnished(&vhost, &disk);
    let arguments: Vec<&str> = arguments.iter().chain(more).map(String::as_str).collect();
    let qemu = qemu::Qemu::start(program, dir.path(), &arguments);
    let (client, transcript) = tapped(dir.path(), &qemu).await?;
    let machine = scenario::describe(&client).await?;
    drop(client);
    Ok((machine.version, transcript.await??))
}

async fn checkpointed(
    program: &str,
    more: &[String],
    mode: Mode,
) -> Result<(Version, Transcript), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let arguments: Vec<&str> = qemu::SMALL.iter().copied().chain(more.iter().map(String::as_str)).collect();
    let qemu = qemu::Qemu::start(program, dir.path(), &arguments);
    let stream = dir.path().join("stream");
    let listener = UnixListener::bind(&stream)?;
    let sink = tokio::spawn(async move {
        let (mut state, _) = listener.accept().await?;
        let mut buffer = vec![0; 1 << 20];
        while state.read(&mut buffer).await? > 0 {}
        std::io::Result::Ok(())
    });
    let (client, transcript) = tapped(dir.path(), &qemu).await?;
    scenario::checkpoint(&client, mode, &stream).await?.verify(mode);
    sink.await??;
    let version = client.version().clone();
    drop(client);
    Ok((version, transcript.await??))
}

type Recording = tokio::task::JoinHandle<std::io::Result<Transcript>>;

async fn tapped(dir: &Path, qemu: &qemu::Qemu) -> Result<(Client, Recording), Box<dyn Error>> {
    let (listen, place) = (dir.join("tap"), dir.display().to_string());
    let transcript = tap(&listen, &qemu.qmp, move |line| line.replace(&place, PLACE)).await?;
    Ok((Client::connect(&listen, Options::default()).await?, transcript))
}

fn write(out: &str, version: &Version, name: &str, transcript: &Transcript) -> Result<(), Box<dyn Error>> {
    let file = Path::new(out).join(format!("{}.{}-{name}.jsonl", version.major, version.minor));
    let mut whole = Transcript::default();
    whole.push(Step::Note(format!("{name}, QEMU {version} ({})", version.package)));
    transcript.steps().iter().for_each(|step| whole.push(step.clone()));
    std::fs::write(&file, whole.to_string())?;
    println!("{}: {} lines", file.display(), whole.steps().len());
    Ok(())
}
