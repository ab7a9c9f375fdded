//! Waiting for a checkpoint that is being taken: how far it is, and giving it up.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use cdp_types::VmName;
use cdpd::api::{Checkpoint, NewCheckpoint, Vm};
use cdpd::client::Client;
use hyper::Method;

use crate::access::online;
use crate::interrupt::Listening;
use crate::progress::Progress;

/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// After how many times all memory it is said that the guest changes it about as fast as it is saved.
const OFTEN: u64 = 3;
/// A page of memory, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Takes a checkpoint, with a bar on a terminal. An interruption gives the checkpoint up; the machine runs on. Says too
/// whether there was one that came too late for that: whoever wanted to go on from there has been told not to. A second one
/// waits for nobody.
pub(super) fn take(
    client: &Client,
    store: &Path,
    vm: &VmName,
    new: &NewCheckpoint,
) -> anyhow::Result<(Checkpoint, bool)> {
    let (done, ended) = mpsc::channel();
    let listening = Listening::begin();
    let taken: Checkpoint = std::thread::scope(|threads| {
        // Without the watcher there is no bar, which is no reason to take no checkpoint.
        let listening = &listening;
        let _ = std::thread::Builder::new().name("taking".to_owned()).spawn_scoped(threads, move || {
            let _ = watch(store, vm, &ended, listening);
        });
        let taken = client.send(Method::POST, &format!("/v1/vms/{vm}/checkpoints"), new);
        drop(done);
        taken
    })?;
    Ok((taken, listening.end()))
}

/// Shows how far it is until nobody holds the other end of `ended`.
fn watch(store: &Path, vm: &VmName, ended: &mpsc::Receiver<()>, listening: &Listening) -> anyhow::Result<()> {
    let client = online(store)?;
    let vm_path = format!("/v1/vms/{vm}");
    let bar = Progress::new("saving memory");
    let (mut given_up, mut said, mut complaint) = (false, false, String::new());
    while ended.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
        if listening.was_interrupted() && !given_up {
            // It may not have begun: then it is asked again.
            match client.delete::<()>(&format!("{vm_path}/taking")) {
                Ok(()) => {
                    given_up = true;
                    bar.note("giving the checkpoint up");
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != complaint {
                        bar.note(&text);
                        complaint = text;
                    }
                }
            }
        }
        // Without an answer there is no bar, but interruptions are heard.
        let Ok(now) = client.get::<Vm>(&vm_path) else { continue };
        if let Some((came, total)) = now.taking.filter(|(_, total)| *total > 0) {
            bar.at(came.min(total) * PAGE_BYTES, total * PAGE_BYTES);
            if came >= OFTEN * total && !std::mem::replace(&mut said, true) {
                bar.note(&format!(
                    "the guest changes its memory about as fast as it is saved: it was sent {OFTEN} times so far"
                ));
            }
        }
    }
    Ok(())
}
