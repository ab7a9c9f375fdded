//! A device whose requests end on other threads, and are heard of only by its descriptor, as those of a ring are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cdp_types::{
    BlockDevice, DeviceIdentity, DeviceInfo, DeviceQueue, Event, MemoryConfig, MemoryDevice, Op, Origin,
    RequestId, Wait,
};
use nbd_export::{Export, ExportEntry, ExportError, Exports, Listen, Server, ServerConfig, StatusContext};
use rustix::event::{EventfdFlags, eventfd};

use crate::client::{Client, Headers, cmd};

#[derive(Debug)]
struct Distant(MemoryDevice);

struct DistantQueue {
    ended: Arc<Mutex<Vec<RequestId>>>,
    bell: Arc<OwnedFd>,
    in_flight: usize,
}

impl BlockDevice for Distant {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }
    fn identity(&self) -> DeviceIdentity {
        self.0.identity()
    }
    fn open_queue(&self) -> io::Result<Box<dyn DeviceQueue>> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Box::new(DistantQueue { ended: Arc::default(), bell, in_flight: 0 }))
    }
    fn new_origin(&self) -> Origin {
        Origin(0)
    }
    fn survived(&self, origins: &[Origin]) -> Vec<bool> {
        vec![false; origins.len()]
    }
    fn on_change(&self, _notify: cdp_types::Listener) {}
}

impl DeviceQueue for DistantQueue {
    fn submit(&mut self, id: RequestId, _op: Op) {
        self.in_flight += 1;
        let (ended, bell) = (Arc::clone(&self.ended), Arc::clone(&self.bell));
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(id.0 * 50));
            ended.lock().unwrap().push(id);
            rustix::io::write(&bell, &1_u64.to_ne_bytes()).unwrap();
        });
    }
    fn watch(&mut self, _eventfd: Arc<OwnedFd>, _tag: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unwatch(&mut self, _tag: u64) {}
    fn poll(&mut self, _wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        for id in self.ended.lock().unwrap().drain(..) {
            self.in_flight -= 1;
            events.push(Event::Completed { id, result: Ok(()) });
        }
        Ok(())
    }
    fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.bell.as_fd())
    }
    fn arm(&mut self) -> io::Result<Wait> {
        Ok(if self.ended.lock().unwrap().is_empty() { Wait::Forever } else { Wait::No })
    }
    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

struct One(Arc<dyn BlockDevice>);

impl Exports for One {
    fn list(&self) -> Result<Vec<ExportEntry>, ExportError> {
        Ok(Vec::new())
    }
    fn open(&self, _name: &str) -> Result<Arc<dyn Export>, ExportError> {
        Ok(Arc::new(Self(Arc::clone(&self.0))))
    }
}

impl Export for One {
    fn name(&self) -> &str {
        "distant"
    }
    fn description(&self) -> &str {
        ""
    }
    fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.0
    }
    fn writable(&self) -> bool {
        true
    }
    fn multi_conn(&self) -> bool {
        true
    }
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }
    fn context(&self, _query: &str) -> Result<Option<Arc<dyn StatusContext>>, ExportError> {
        Ok(None)
    }
}

#[test]
fn no_completion_is_slept_through() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let device = Arc::new(Distant(MemoryDevice::new(MemoryConfig::new(1 << 20)).unwrap()));
    let config = ServerConfig::new(vec![Listen::Unix { path: path.clone(), mode: 0o600 }]);
    let mut server = Server::start(config, Arc::new(One(device))).unwrap();
    let mut client = Client::ready(&path, "", Headers::Structured, &[]);
    for _ in 0..2000 {
        assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).error, 0);
    }
    for _ in 0..50 {
        (0..40).for_each(|_| {
            client.start(cmd::FLUSH, 0, 0, 0);
        });
        (0..40).for_each(|_| assert_eq!(client.reply().error, 0));
    }
    assert_eq!(server.shutdown(crate::fixture::DEADLINE), 0);
}
