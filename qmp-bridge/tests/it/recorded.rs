//! Recordings of QEMU 7.2 and 10.0, whole, and broken off at every step.

use std::path::Path;

use qmp_bridge::fake::{Fake, Fault, Step, Transcript};
use qmp_bridge::machine::{Accelerator, Backend, Machine, NetworkBackend};
use qmp_bridge::migration::Mode;
use qmp_bridge::{Client, ErrorKind, Options, Result};

use crate::scenario::{checkpoint, describe};
use crate::{PATIENCE, options, timely};

const VERSIONS: [&str; 2] = ["7.2", "10.0"];
const MODES: [Mode; 3] = [Mode::Hot, Mode::Live, Mode::Pause];

fn transcript(version: &str, name: &str) -> Transcript {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/transcripts/{version}-{name}.jsonl"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    Transcript::parse(&text).unwrap_or_else(|wrong| panic!("{}: {wrong}", file.display()))
}

/// The machine that `transcript` describes.
async fn described(transcript: Transcript) -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let fake = Fake::replay(&path, vec![transcript]).unwrap();
    let client = Client::connect(&path, Options::default()).await.unwrap();
    let machine = timely(describe(&client)).await.unwrap();
    drop(client);
    fake.finished().await.unwrap();
    machine
}

#[tokio::test]
async fn a_machine_of_either_version_is_described() {
    for version in VERSIONS {
        let machine = described(transcript(version, "describe")).await;
        assert!(machine.version.to_string().starts_with(version));
        assert_eq!(machine.machine_type, format!("pc-q35-{version}"));
        assert_eq!(machine.run_state, "running");
        assert_eq!(machine.accelerator, Accelerator::Tcg);
        assert_eq!((machine.cpus, machine.memory_bytes, machine.plugged_memory_bytes), (2, 64 << 20, 0));
        assert_eq!(machine.name.as_deref(), Some("web1"));
        assert_eq!(machine.uuid.as_deref(), Some("5e0a3c0e-6f8a-4e55-9d6c-3f6f3a0f1b11"));
        assert_eq!(machine.memory.len(), 1);
        assert_eq!(machine.private_memory().count(), 0);

        let served: Vec<_> = machine.served_elsewhere().collect();
        assert_eq!(served.len(), 1);
        assert_eq!((served[0].name(), served[0].kind.as_str()), ("blk0", "vhost-user-blk-pci"));
        assert_eq!(served[0].backend, Backend::VhostUser { chardev: Some("vu0".into()) });
        assert_eq!(machine.chardev("vu0").unwrap().socket.as_deref(), Some("/run/vm/vhost"));
        assert!(machine.chardev("vu0").unwrap().frontend_open);
        assert_eq!(machine.networks.len(), 1);
        assert_eq!(machine.networks[0].backend, NetworkBackend::Other);

        let disks: Vec<_> = machine.disks.iter().filter(|disk| disk.writable).collect();
        assert_eq!(disks.len(), 1);
        assert_eq!(disks[0].name, "fat0");
        assert!(machine.blockers.iter().any(|blocker| blocker.contains("vvfat")), "{:?}", machine.blockers);

        let kept: Machine = serde_json::from_str(&serde_json::to_string(&machine).unwrap()).unwrap();
        assert_eq!(kept, machine);
    }
}

#[tokio::test]
async fn two_machines_are_compared() {
    let old = described(transcript("7.2", "describe")).await;
    let new = described(transcript("10.0", "describe")).await;
    assert!(new.differences(&new).is_empty());
    let found = old.differences(&new);
    let said: Vec<_> = found.iter().map(ToString::to_string).collect();
    let expected = ["QEMU version: 7.2.22 and 10.0.2", "machine type: pc-q35-7.2 and pc-q35-10.0"];
    assert_eq!(said, expected);
    assert_eq!(found.iter().map(|difference| difference.fatal).collect::<Vec<_>>(), [false, true]);
    // The other way round: an older QEMU does not take what a newer one has written.
    assert!(new.differences(&old)[0].fatal);

    let mut other = new.clone();
    other.memory_bytes *= 2;
    other.devices.retain(|device| device.kind != "vhost-user-blk-pci");
    let said: Vec<_> = new.differences(&other).iter().map(ToString::to_string).collect();
    let expected = ["memory: 67108864 bytes and 134217728 bytes", "devices 'vhost-user-blk-pci': 1 and 0"];
    assert_eq!(said, expected);
}

#[tokio::test]
async fn checkpoints_of_every_mode_and_version_replay() {
    for version in VERSIONS {
        for mode in MODES {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("qmp");
            let fake = Fake::replay(&path, vec![transcript(version, &mode.to_string())]).unwrap();
            let client = Client::connect(&path, Options::default()).await.unwrap();
            let taken = timely(checkpoint(&client, mode, Path::new("/run/vm/stream"))).await.unwrap();
            taken.verify(mode);
            drop(client);
            fake.finished().await.unwrap_or_else(|wrong| panic!("{version} {mode}: {wrong}"));
        }
    }
}

async fn broken(transcript: Transcript, mode: Mode) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _fake = Fake::replay(&path, vec![transcript]).unwrap();
    let client = Client::connect(&path, options(PATIENCE)).await?;
    checkpoint(&client, mode, Path::new("/run/vm/stream")).await.map(drop)
}

/// Nothing panics and nothing hangs, and the reason is the right one, wherever QEMU goes away or goes mad.
#[tokio::test]
async fn a_checkpoint_that_breaks_off_anywhere_says_why() {
    for version in VERSIONS {
        for mode in MODES {
            let whole = transcript(version, &mode.to_string());
            for at in 1..whole.steps().len() {
                let gone = timely(broken(whole.broken_at(at, Fault::HangUp), mode)).await;
                let kind = gone.expect_err("all went well without QEMU").kind();
                assert_eq!(kind, ErrorKind::Gone, "{version} {mode}, hung up at {at}");

                let garbage = Fault::Say(b"\xff{\n".into());
                let mad = timely(broken(whole.broken_at(at, garbage), mode)).await;
                let kind = mad.expect_err("all went well with nonsense").kind();
                let greeted = whole.steps()[..at].iter().any(|step| matches!(step, Step::Qemu(_)));
                let expected = if greeted { ErrorKind::Nonsense } else { ErrorKind::NotQmp };
                assert_eq!(kind, expected, "{version} {mode}, nonsense at {at}");
            }
        }
    }
}
