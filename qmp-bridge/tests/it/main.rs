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

/// Short enough for tests that wait for it to pass, long enough for a busy machine where it must not.
const SOON: Duration = Duration::from_millis(300);

/// What a test does, within its deadline.
async fn timely<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, test).await.expect("the test hangs")
}

/// A client with deadlines that a test can wait for.
async fn hasty(path: &Path) -> qmp_bridge::Result<Client> {
    Client::connect(path, hasty_options()).await
}

fn hasty_options() -> Options {
    Options { greeting_deadline: SOON, command_deadline: SOON, max_line_bytes: 100_000 }
}
