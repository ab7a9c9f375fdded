//! `cdpd`: serves one store's volumes to guests.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::Context;
use cdpd::systemd::{NotifyState, notify};
use cdpd::{Args, Config, Daemon, logging};
use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};

fn main() -> ! {
    let args = Args::parse();
    limit_arenas();
    cdpd::allow_open_files();
    match run(args) {
        // What is to be durable is. RocksDB's threads may still be ending.
        Ok(()) => exit_now(0),
        Err(error) => {
            eprintln!("cdpd: {error:#}");
            exit_now(2)
        }
    }
}

/// Allows glibc's allocator a heap for each processor, four at least.
///
/// Its habit is one for each thread, up to eight for each processor. Here much is allocated by one thread and freed by another
/// (changes by a queue's, which the index's frees; blocks of RocksDB's cache by whoever reads), so that each heap keeps holes.
/// With 8 million random writes 16 heaps took 160 MiB and four 110, at the same rate.
fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let arenas = i32::try_from(processors).unwrap_or(i32::MAX).max(4);
        // SAFETY: no other thread runs yet, and the call changes nothing but a limit (mallopt(3)).
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::load(&args.store, &args.overrides())?;
    logging::init(config.log_format, &config.log_filter)?;
    logging::abort_on_panic();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .thread_name("api")
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config));
    // A thread that is still at work for the API must not keep the process: the store is closed.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let daemon = tokio::select! {
        started = Daemon::start(config) => started?,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped while starting");
            exit_now(0);
        }
    };
    notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
    let name = tokio::select! {
        name = signals.next() => name,
        never = feed_watchdog(&daemon) => match never {},
    };
    tracing::info!(signal = name, "stopping");
    notify(&[NotifyState::Stopping]);
    tokio::select! {
        stopped = daemon.stop() => stopped,
        name = signals.next() => {
            tracing::warn!(signal = name, "stopping at once");
            exit_now(2);
        }
    }
}

/// The signals that stop the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let handle = |kind| signal(kind).context("cannot handle signals");
        Ok(Self { terminate: handle(SignalKind::terminate())?, interrupt: handle(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Feeds systemd's watchdog, if there is one, for as long as the store is alive.
async fn feed_watchdog(daemon: &Daemon) -> Infallible {
    let Some(deadline) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval((deadline / 3).max(Duration::from_millis(10)));
    loop {
        ticks.tick().await;
        daemon.pulse().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// Ends the process without running anything more: static destructors would run beside live threads.
fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any status and returns to nobody; it runs no handler that could expect anything
    // of us.
    unsafe { libc::_exit(status) }
}
