//! The client, the bridge and what is built on them, against a fake QEMU, against recordings of real ones, and against
//! the QEMU that is installed. A missing QEMU is a failure.

#![allow(clippy::unwrap_used, missing_docs)]

mod agent;
mod bridge;
mod faults;
mod order;
mod qemu;
mod real;
mod recorded;
mod scenario;
mod settings;

use std::path::Path;
use std::time::Duration;

use qmp_bridge::{Client, Options};

/// No test may take longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// Short enough for tests that wait for it to pass.
const SOON: Duration = Duration::from_millis(300);

/// Long enough for a machine that is busy with other things, where it must not pass.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a test does, within its deadline.
async fn timely<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, test).await.expect("the test hangs")
}

/// A client to which something else than a deadline happens.
async fn patient(path: &Path) -> qmp_bridge::Result<Client> {
    Client::connect(path, options(PATIENCE)).await
}

fn options(deadline: Duration) -> Options {
    Options { greeting_deadline: deadline, command_deadline: deadline, max_line_bytes: 100_000 }
}
