//! Serves a disk in memory, to try a front end with: `memdisk SOCKET [MEBIBYTES [QUEUES]]`.
//!
//! With QEMU:
//! ```text
//! qemu-system-x86_64 -m 512 -object memory-backend-memfd,id=m,size=512M,share=on -machine q35,memory-backend=m \
//!   -chardev socket,id=c,path=SOCKET,reconnect-ms=1000 -device vhost-user-blk-pci,chardev=c …
//! ```

use std::io::Read;
use std::sync::Arc;

use cdp_types::{MemoryConfig, MemoryDevice, NoVmControl};
use vhost_blk::{Server, ServerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: memdisk SOCKET [MEBIBYTES [QUEUES]]")?;
    let mebibytes: u64 = arguments.next().map_or(Ok(1024), |number| number.parse())?;
    let queues = arguments.next().map_or(Ok(4), |number| number.parse())?;
    let capacity = mebibytes.checked_mul(1 << 20).ok_or("that is too large")?;
    let disk = Arc::new(MemoryDevice::new(MemoryConfig::new(capacity))?);
    let config = ServerConfig { queues, ..ServerConfig::new(&socket) };
    let mut server = Server::bind(config, disk, Arc::new(NoVmControl))?;
    eprintln!("serving {mebibytes} MiB on {socket}; end of input stops it");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.shutdown();
    eprintln!("{:#?}", server.stats());
    Ok(())
}
