//! A QEMU in the foreground, looked after: ended in an orderly way, and started anew when the machine goes back to a
//! checkpoint.
//!
//! ```text
//!   child's end ──┐
//!   signals ──────┤ events, one at a time ──► the loop ──► start, end, tell the daemon
//!   orders ───────┤
//!   memory given ─┘
//! ```
//!
//! QEMU does not end with this program if that is killed: its guest would lose what it is doing. The daemon may be
//! away for a while; QEMU runs on, and is reported again when the daemon is back.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use cdp_types::VmName;
use cdpd::api::{ErrorKind, Order, Supervised, SupervisorReport};
use cdpd::client::{Client, Step};
use hyper::Method;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::signal::unix::{SignalKind, signal};

use super::still_frozen;
use crate::access::online;
use crate::interrupt;
use crate::output::say;

/// How long QEMU may take to end once it was told to.
const ENDING: Duration = Duration::from_secs(10);
/// How long QMP may take to pass on that the machine is to be switched off.
const ASKING: Duration = Duration::from_secs(5);
/// Between two attempts to reach a daemon that is away.
const AGAIN: Duration = Duration::from_secs(1);

/// A machine to be run.
pub(crate) struct Machine {
    /// The store of its disks.
    pub(crate) store: PathBuf,
    /// Its name.
    pub(crate) name: VmName,
    /// The command line that boots it.
    pub(crate) boot: Vec<String>,
    /// The command line that waits for its memory.
    pub(crate) incoming: Vec<String>,
    /// Where it is started.
    pub(crate) directory: PathBuf,
    /// Its QMP socket.
    pub(crate) qmp: PathBuf,
    /// How long its guest may take to switch itself off when it is asked to.
    pub(crate) patience: Duration,
}

/// How a QEMU that was just started gets its machine.
#[derive(Clone, Debug)]
pub(crate) enum Start {
    /// By booting it.
    Boot,
    /// From memory, which this request of the API gives it.
    Memory { path: String, body: serde_json::Value },
}

enum Event {
    Attached,
    Refused(anyhow::Error),
    Order(Order),
    Ended(std::io::Result<ExitStatus>),
    Restored(anyhow::Result<Option<String>>),
    Signal { again: bool },
    Interrupt,
}

/// A QEMU that runs.
struct Qemu {
    /// Names the process as long as it is held, whatever becomes of its number.
    process: OwnedFd,
}

impl Qemu {
    fn start(words: &[String], directory: &Path, events: &Sender<Event>) -> anyhow::Result<Self> {
        let (program, arguments) = words.split_first().context("no program")?;
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(directory)
            .spawn()
            .with_context(|| format!("cannot start {program} in {}", directory.display()))?;
        let process = match pid_of(&child).and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?)) {
            Ok(process) => process,
            Err(error) => {
                // Nobody could end it later.
                let _ = child.kill();
                return Err(error.context("cannot look after QEMU"));
            }
        };
        let events = events.clone();
        std::thread::Builder::new().name("qemu".to_owned()).spawn(move || {
            let _ = events.send(Event::Ended(child.wait()));
        })?;
        Ok(Self { process })
    }

    fn send(&self, signal: Signal) {
        // One that has ended needs no signal: its end is on its way here.
        let _ = pidfd_send_signal(&self.process, signal);
    }
}

fn pid_of(child: &Child) -> anyhow::Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("it has no process id")
}

/// Runs a machine until its QEMU has ended for good.
///
/// # Errors
/// Somebody else runs it, QEMU cannot be started or fails, or its memory cannot be given to it.
pub(crate) fn run(machine: &Machine, start: Start) -> anyhow::Result<()> {
    let (events, inbox) = mpsc::channel();
    listen_to_daemon(machine, &events)?;
    match inbox.recv().context("the threads of this program have died")? {
        Event::Attached => {}
        Event::Refused(error) => return Err(error),
        _ => bail!("the daemon has not said that it listens"),
    }
    listen_to_signals(&events)?;
    // Who made a copy has listened to them for its checkpoint.
    interrupt::leave_to_caller();
    let reports = Reports::to_daemon(&machine.store, &machine.name)?;
    Loop { machine, events, inbox, reports }.go(start)
}

struct Loop<'a> {
    machine: &'a Machine,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    reports: Reports,
}

/// What becomes of a machine whose QEMU has ended.
enum End {
    Final(ExitStatus),
    Anew,
}

impl Loop<'_> {
    fn go(&self, start: Start) -> anyhow::Result<()> {
        let mut incoming = false;
        if let Start::Memory { path, body } = start {
            self.ask_for_memory(path, body)?;
            incoming = self.wait_for_order()?;
            if !incoming {
                return Ok(());
            }
        }
        loop {
            let words = if incoming { &self.machine.incoming } else { &self.machine.boot };
            let qemu = Qemu::start(words, &self.machine.directory, &self.events)?;
            let state = if incoming { Supervised::Waiting } else { Supervised::Running };
            self.reports.tell(state);
            match self.attend(&qemu, state)? {
                End::Anew => incoming = true,
                End::Final(status) if status.success() => return Ok(()),
                End::Final(status) => bail!("QEMU has ended: {status}"),
            }
        }
    }

    /// Asks the daemon for the machine's memory, in a thread: QEMU may end meanwhile. What is answered then is why its file
    /// systems may still be frozen, if they may.
    fn ask_for_memory(&self, path: String, body: serde_json::Value) -> anyhow::Result<()> {
        let (store, events) = (self.machine.store.clone(), self.events.clone());
        std::thread::Builder::new().name("memory".to_owned()).spawn(move || {
            let given = online(&store).and_then(|client| {
                let answer: serde_json::Value = client.send(Method::POST, &path, &body)?;
                Ok(answer["still_frozen"].as_str().map(str::to_owned))
            });
            let _ = events.send(Event::Restored(given));
        })?;
        Ok(())
    }

    /// Waits until the daemon, asked for memory, orders a QEMU that waits for it. QEMU is not started before, since it
    /// reads at once how its disks are, which depends on the memory. False if somebody wants to end this.
    fn wait_for_order(&self) -> anyhow::Result<bool> {
        loop {
            match self.inbox.recv().context("the threads of this program have died")? {
                Event::Order(Order::Restart) => return Ok(true),
                Event::Restored(Err(error)) => return Err(error.context("the machine was not put back")),
                Event::Restored(Ok(_)) => bail!("another QEMU has got the machine's memory"),
                Event::Signal { .. } | Event::Interrupt => return Ok(false),
                Event::Attached => self.reports.tell(Supervised::Starting),
                Event::Order(Order::Attached | Order::Runs) | Event::Refused(_) | Event::Ended(_) => {}
            }
        }
    }

    /// Looks after a QEMU until it has ended.
    fn attend(&self, qemu: &Qemu, state: Supervised) -> anyhow::Result<End> {
        let mut state = state;
        // Started anew once it has ended; never once somebody wants it to end for good.
        let (mut anew, mut stopping) = (false, false);
        let mut deadline: Option<(Instant, Signal)> = None;
        loop {
            let event = match deadline {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((at, _)) => self.inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Ended(status)) => {
                    let status = status.context("cannot wait for QEMU")?;
                    return Ok(if anew && !stopping { End::Anew } else { End::Final(status) });
                }
                Ok(Event::Order(Order::Restart)) if stopping => {
                    say(format_args!("machine {} is being stopped, and does not go back", self.machine.name));
                }
                Ok(Event::Order(Order::Restart)) => {
                    say(format_args!("machine {} goes back to a checkpoint", self.machine.name));
                    self.reports.tell(Supervised::Starting);
                    anew = true;
                    qemu.send(Signal::TERM);
                    deadline = Some((Instant::now() + ENDING, Signal::KILL));
                }
                Ok(Event::Order(Order::Runs)) => state = Supervised::Running,
                Ok(Event::Restored(Ok(frozen))) => {
                    state = Supervised::Running;
                    if let Some(why) = frozen {
                        say(format_args!("machine {} goes on; {}", self.machine.name, still_frozen(&why)));
                    }
                }
                // It has got its memory: what has failed came after that, or is the daemon's answer.
                Ok(Event::Restored(Err(error))) if state == Supervised::Running => {
                    say(format_args!("machine {} runs, but: {error:#}", self.machine.name));
                }
                Ok(Event::Restored(Err(error))) => {
                    qemu.send(Signal::KILL);
                    return Err(error.context("the machine was not put back"));
                }
                Ok(Event::Attached) => self.reports.tell(state),
                Ok(Event::Signal { again: false }) => {
                    say("asking the guest to switch itself off (once more: at once)");
                    stopping = true;
                    switch_off(self.machine)?;
                    deadline = Some((Instant::now() + self.machine.patience, Signal::TERM));
                }
                Ok(Event::Signal { again: true } | Event::Interrupt) => {
                    stopping = true;
                    qemu.send(Signal::TERM);
                    deadline = Some((Instant::now() + ENDING, Signal::KILL));
                }
                Ok(Event::Order(Order::Attached) | Event::Refused(_)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let signal = deadline.map_or(Signal::TERM, |(_, signal)| signal);
                    qemu.send(signal);
                    deadline = Some((Instant::now() + ENDING, Signal::KILL));
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the threads of this program have died"),
            }
        }
    }
}

/// Tells the daemon how QEMU does, from a thread: one that hangs keeps nobody from looking after QEMU.
struct Reports(Sender<Supervised>);

impl Reports {
    fn to_daemon(store: &Path, name: &VmName) -> anyhow::Result<Self> {
        let (reports, inbox) = mpsc::channel();
        let (store, path) = (store.to_owned(), format!("/v1/vms/{name}/supervisor"));
        std::thread::Builder::new().name("reports".to_owned()).spawn(move || {
            for state in inbox {
                let told = online(&store).and_then(|client| {
                    Ok(client.send::<()>(Method::PUT, &path, &SupervisorReport { state })?)
                });
                if let Err(error) = told {
                    say(format_args!("the daemon does not know how QEMU does: {error:#}"));
                }
            }
        })?;
        Ok(Self(reports))
    }

    /// Tells it after what was told before; if the daemon is away, it is told when it is back.
    fn tell(&self, state: Supervised) {
        // A thread that has died tells nothing, as a daemon that is away.
        let _ = self.0.send(state);
    }
}

/// Hears the daemon's orders, and reconnects when it was away. The first event is `Attached` or `Refused`.
fn listen_to_daemon(machine: &Machine, events: &Sender<Event>) -> anyhow::Result<()> {
    let (store, name, events) = (machine.store.clone(), machine.name.clone(), events.clone());
    let listen = move || {
        let mut known = false;
        loop {
            let heard = online(&store).and_then(|client| hear(&client, &name, &mut known, &events));
            match heard {
                Ok(()) => {}
                Err(error) if !known => {
                    let _ = events.send(Event::Refused(error));
                    return;
                }
                // It is away, or still thinks that the old connection is there.
                Err(_) => {}
            }
            std::thread::sleep(AGAIN);
        }
    };
    std::thread::Builder::new().name("orders".to_owned()).spawn(listen)?;
    Ok(())
}

fn hear(client: &Client, name: &VmName, known: &mut bool, events: &Sender<Event>) -> anyhow::Result<()> {
    let path = format!("/v1/vms/{name}/supervisor");
    let mut step = |step: Step<Order>| {
        let event = match step {
            Step::Item(Order::Attached) => {
                *known = true;
                Event::Attached
            }
            Step::Item(order) => Event::Order(order),
            Step::Progress(_) => return true,
        };
        events.send(event).is_ok()
    };
    match client.lines::<Order, ()>(Method::POST, &path, &mut step) {
        // The daemon stops without a last word.
        Err(error) if error.kind == ErrorKind::Unavailable && *known => Ok(()),
        outcome => Ok(outcome.map(drop)?),
    }
}

/// Asks the guest to switch itself off, in a thread. QMP may be in use for as long as a checkpoint is taken: that is given up
/// then, and the guest is asked again for as long as it has to do as it is asked.
fn switch_off(machine: &Machine) -> anyhow::Result<()> {
    let (qmp, store, name) = (machine.qmp.clone(), machine.store.clone(), machine.name.clone());
    let by = Instant::now() + machine.patience;
    std::thread::Builder::new().name("switch-off".to_owned()).spawn(move || {
        let mut told = false;
        while let Err(error) = ask_to_switch_off(&qmp) {
            if !std::mem::replace(&mut told, true) {
                say(format_args!("the guest could not be asked to switch itself off: {error:#}"));
                if let Ok(client) = online(&store) {
                    // That none is being taken is the usual refusal.
                    let _ = client.delete::<()>(&format!("/v1/vms/{name}/taking"));
                }
            }
            let gone = error.downcast_ref::<qmp_bridge::Error>();
            let is_gone = gone.is_some_and(|error| error.kind() == qmp_bridge::ErrorKind::Unreachable);
            if is_gone || Instant::now() >= by {
                return;
            }
            std::thread::sleep(AGAIN);
        }
    })?;
    Ok(())
}

fn ask_to_switch_off(qmp: &Path) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let asking = async {
            let client = qmp_bridge::Client::connect(qmp, qmp_bridge::Options::default()).await?;
            qmp_bridge::control::system_powerdown(&client).await
        };
        match tokio::time::timeout(ASKING, asking).await {
            Ok(asked) => asked.map_err(anyhow::Error::from),
            Err(_) => Err(anyhow!("QEMU's QMP socket is in use")),
        }
    })
}

/// Turns signals into events. QEMU has the same terminal: it hears of an interruption from there itself.
fn listen_to_signals(events: &Sender<Event>) -> anyhow::Result<()> {
    let (events, runtime) = (events.clone(), runtime()?);
    let (mut terminate, mut interrupt, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let mut again = false;
            loop {
                let event = tokio::select! {
                    _ = terminate.recv() => Event::Signal { again: std::mem::replace(&mut again, true) },
                    _ = interrupt.recv() => Event::Interrupt,
                    _ = hangup.recv() => Event::Interrupt,
                };
                if events.send(event).is_err() {
                    return;
                }
            }
        });
    })?;
    Ok(())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_daemon_that_hangs_keeps_nobody_waiting() {
        let store = tempfile::tempdir().unwrap();
        // It takes connections, and answers nothing.
        let _daemon = cdpd::socket::bind(store.path(), 0o600).unwrap();
        let reports = Reports::to_daemon(store.path(), &"web1".parse().unwrap()).unwrap();
        let (done, told) = mpsc::channel();
        std::thread::spawn(move || {
            reports.tell(Supervised::Running);
            reports.tell(Supervised::Starting);
            done.send(())
        });
        told.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn file_systems_that_may_still_be_frozen_are_told_of() {
        let store = tempfile::tempdir().unwrap();
        let listener = cdpd::socket::bind(store.path(), 0o600).unwrap();
        listener.set_nonblocking(false).unwrap();
        let daemon = std::thread::spawn(move || {
            for mut stream in listener.incoming().map(Result::unwrap) {
                // A client looks first whether somebody listens.
                if stream.read(&mut [0; 4096]).unwrap() > 0 {
                    let answer = r#"{ "from": 1, "pages": 7, "still_frozen": "no agent" }"#;
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
                    stream.write_all((head + answer).as_bytes()).unwrap();
                    // The rest of the request, up to the client's end.
                    let _ = stream.read_to_end(&mut Vec::new());
                    return;
                }
            }
        });
        let machine = sleeper(store.path());
        let looking = told(&machine, []);
        looking.ask_for_memory("/v1/vms/web1/start".to_owned(), serde_json::Value::Null).unwrap();
        match looking.inbox.recv_timeout(Duration::from_secs(20)).unwrap() {
            Event::Restored(outcome) => assert_eq!(outcome.unwrap().as_deref(), Some("no agent")),
            _ => panic!("another event"),
        }
        daemon.join().unwrap();
    }

    /// A machine whose QEMU only sleeps.
    fn sleeper(directory: &Path) -> Machine {
        Machine {
            store: directory.to_owned(),
            name: "web1".parse().unwrap(),
            boot: ["sleep", "60"].map(str::to_owned).to_vec(),
            incoming: Vec::new(),
            directory: directory.to_owned(),
            qmp: directory.join("none"),
            patience: Duration::from_secs(60),
        }
    }

    /// A loop to which these events have come.
    fn told(machine: &Machine, came: impl IntoIterator<Item = Event>) -> Loop<'_> {
        let (events, inbox) = mpsc::channel();
        came.into_iter().for_each(|event| events.send(event).unwrap());
        Loop { machine, events, inbox, reports: Reports(mpsc::channel().0) }
    }

    /// How the loop ends for a QEMU after these events.
    fn after(events: impl IntoIterator<Item = Event>) -> End {
        let directory = tempfile::tempdir().unwrap();
        let machine = sleeper(directory.path());
        let looking = told(&machine, events);
        let qemu = Qemu::start(&machine.boot, &machine.directory, &looking.events).unwrap();
        looking.attend(&qemu, Supervised::Running).unwrap()
    }

    #[test]
    fn a_qemu_that_gets_memory_is_started_when_the_daemon_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let machine = sleeper(directory.path());
        let waited = |came: Vec<Event>| told(&machine, came).wait_for_order();
        assert!(waited(vec![Event::Attached, Event::Order(Order::Restart)]).unwrap());
        assert!(!waited(vec![Event::Interrupt, Event::Order(Order::Restart)]).unwrap());
        assert!(!waited(vec![Event::Signal { again: false }]).unwrap());
        let refused = waited(vec![Event::Restored(Err(anyhow!("no such checkpoint")))]).unwrap_err();
        assert_eq!(format!("{refused:#}"), "the machine was not put back: no such checkpoint");
    }

    #[test]
    fn a_machine_that_has_its_memory_is_not_ended_by_what_fails_after_that() {
        let directory = tempfile::tempdir().unwrap();
        let machine = sleeper(directory.path());
        let failed = || Event::Restored(Err(anyhow!("cdpd does not answer")));
        let attended = |came: Vec<Event>| {
            let looking = told(&machine, came);
            let qemu = Qemu::start(&machine.boot, &machine.directory, &looking.events).unwrap();
            looking.attend(&qemu, Supervised::Waiting)
        };
        assert!(attended(vec![failed()]).is_err());
        let ran = attended(vec![Event::Order(Order::Runs), failed(), Event::Interrupt]);
        assert!(matches!(ran, Ok(End::Final(_))));
    }

    #[test]
    fn what_is_stopped_is_not_started_anew_whatever_came_first() {
        assert!(matches!(after([Event::Order(Order::Restart)]), End::Anew));
        let stop = || Event::Signal { again: false };
        assert!(matches!(after([Event::Order(Order::Restart), Event::Interrupt]), End::Final(_)));
        assert!(matches!(after([Event::Order(Order::Restart), stop(), Event::Interrupt]), End::Final(_)));
        assert!(matches!(after([stop(), Event::Order(Order::Restart), Event::Interrupt]), End::Final(_)));
    }
}
