//! A machine that goes back to a checkpoint begins with its write cache as its guest had it then, and no other does.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use cdp_store::Store;
use cdpd::api::{Order, Supervised};
use cdpd::client::{Client, Step};
use hyper::Method;
use serde_json::{Value, json};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};

use crate::destruction::checkpoint;
use crate::machines::wait_until;
use crate::{Bench, MIB, config};

const DEADLINE: Duration = Duration::from_secs(20);
/// Of a configuration (virtio 1.3, 5.2.4), and where it says whether the write cache is on.
const CONFIG_LEN: usize = 60;
const WRITEBACK: usize = 32;

/// What a machine that begins on a disk is shown of its write cache; none if it is turned away, since the last one is not
/// quite gone.
fn begin(socket: &Path) -> Option<u8> {
    let stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    let mut frontend = Frontend::from_stream(stream, 1);
    frontend.set_owner().ok()?;
    let features = frontend.get_features().ok()?;
    frontend.set_protocol_features(VhostUserProtocolFeatures::CONFIG).ok()?;
    frontend.set_features(features).ok()?;
    let (no_flags, buffer) = (VhostUserConfigFlags::empty(), [0_u8; CONFIG_LEN]);
    let (_, space) = frontend.get_config(0, CONFIG_LEN as u32, no_flags, &buffer).ok()?;
    space.get(WRITEBACK).copied()
}

fn shown_to_the_next(socket: &Path) -> u8 {
    let mut shown = None;
    wait_until("a machine can begin", || {
        shown = begin(socket);
        shown.is_some()
    });
    shown.unwrap()
}

#[test]
fn a_machine_that_goes_back_begins_with_its_write_cache_as_it_was_and_no_other_does() {
    for (off, writeback) in [(true, 0), (false, 1)] {
        let mut bench = Bench::new();
        bench.create("web1", MIB).unwrap();
        bench.register("vm", "web1");
        let socket = bench.serve_here("web1");
        bench.stop();
        let config = config(bench.root.path());
        let store = Store::open(&config.store, config.options).unwrap();
        let to = checkpoint(&store, &"vm".parse().unwrap(), off);
        store.close().unwrap();
        drop(store);
        bench.start_again();
        assert_eq!(shown_to_the_next(&socket), 1);

        // Whoever looks after the machine starts a QEMU, and is gone before that has got any memory.
        let (at, disk) = (bench.store(), socket.clone());
        let supervisor = thread::spawn(move || {
            let client = Client::find(&at).unwrap().unwrap();
            let mut shown = None;
            let path = "/v1/vms/vm/supervisor";
            let heard = client.lines::<Order, ()>(Method::POST, path, &mut |step| match step {
                Step::Item(Order::Restart) => {
                    shown = Some(shown_to_the_next(&disk));
                    false
                }
                Step::Item(_) | Step::Progress(_) => true,
            });
            heard.unwrap();
            shown
        });
        wait_until("it is attached", || bench.vm("vm").supervised == Some(Supervised::Starting));
        let body = json!({ "to": to.to_string() });
        let refused = bench.client.send::<Value>(Method::POST, "/v1/vms/vm/revert", &body).unwrap_err();
        assert!(refused.message.contains("has ended"), "{refused}");
        assert_eq!(supervisor.join().unwrap(), Some(writeback));
        assert_eq!(shown_to_the_next(&socket), 1, "nothing was put back");
        bench.stop();
    }
}
