//! A made-up QEMU with one disk of ours: what it says, and what its rings do, follows a script.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use cdp_types::{RingStop, VmControl};
use ckpt::gate::Gate;
use qmp_bridge::fake::{Fault, Say, Voice};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::machine::{Draft, Machine, hot, round};

/// What QEMU and those around it do, one after the other, once it was told to migrate.
#[derive(Clone, Debug)]
pub enum Act {
    /// The migration goes on to this state.
    State(&'static str),
    /// The migration stops the machine, if it runs.
    Stop,
    /// The migration has the machine go on, if it was it that stopped it.
    GoOn,
    /// Somebody else stops the machine.
    OthersStop,
    /// Somebody else has it go on.
    OthersGoOn,
    /// Waits for `migrate-continue`.
    AwaitContinue,
    /// The first half of the stream is sent.
    SendHalf,
    /// All pages are sent, whether or not they have been before; never together with the halves of a stream.
    SendRound,
    /// Something is sent that is no memory.
    SendNonsense,
    /// What is left of the stream is sent, and the socket closed.
    SendRest,
    /// The socket is closed.
    Close,
    /// The guest begins to use its disk.
    UseDisk,
    /// The guest uses its disk no more.
    LeaveDisk,
    /// The guest's driver resets its disk.
    ResetDisk,
    /// The disk's connection is lost.
    LoseDisk,
    /// An event.
    Event(&'static str, Value),
    /// The migration fails, and this is why.
    Fail(&'static str),
    /// QEMU's QMP connection ends.
    HangUp,
    /// QEMU takes so long to answer the next command.
    Hang(Duration),
    /// Whoever takes the checkpoint is told to give it up.
    Cancel,
}

/// The events of a checkpoint that nobody disturbs.
pub fn undisturbed(mode: cdp_store::CheckpointMode) -> Vec<Act> {
    use Act::{AwaitContinue, GoOn, SendHalf, SendRest, State, Stop};
    match mode {
        cdp_store::CheckpointMode::Hot => {
            vec![State("setup"), State("active"), Stop, GoOn, SendHalf, SendRest, State("completed")]
        }
        cdp_store::CheckpointMode::Live => vec![
            State("setup"),
            State("active"),
            SendHalf,
            Stop,
            State("pre-switchover"),
            AwaitContinue,
            State("device"),
            SendRest,
            State("completed"),
        ],
        cdp_store::CheckpointMode::Pause => {
            vec![State("setup"), State("active"), SendHalf, SendRest, State("completed")]
        }
    }
}

#[derive(Debug)]
pub struct State {
    pub running: bool,
    /// Whether the guest uses its disk.
    uses_disk: bool,
    stopped_by_migration: bool,
    pub migration: &'static str,
    error: Option<&'static str>,
    continued: bool,
    migrations: u32,
    pub capabilities: BTreeMap<String, bool>,
    pub parameters: Map<String, Value>,
    /// All that it was asked.
    pub commands: Vec<String>,
    /// For the migrations to come; then nothing disturbs them.
    pub scripts: VecDeque<Vec<Act>>,
    pub mode: cdp_store::CheckpointMode,
    /// The connection ends at this command, counted from now, and whether it is carried out before.
    pub hang_up: Option<(usize, bool)>,
    /// It takes so long to answer the next command.
    hang: Option<Duration>,
    /// So many events come before the settings are changed.
    pub flood: usize,
    /// Its host cannot write-protect memory.
    pub refuses_hot: bool,
    /// Somebody else migrates it.
    pub others_migrate: bool,
    pub cancel: Option<watch::Sender<bool>>,
    /// Of its memory.
    pub pages: Vec<u32>,
}

#[derive(Clone)]
pub struct Qemu {
    pub state: Arc<Mutex<State>>,
    pub gate: Arc<Gate>,
    pub disk: PathBuf,
    pub voice: Arc<Mutex<Option<Voice>>>,
}

impl Qemu {
    pub fn new(gate: Arc<Gate>, disk: PathBuf) -> Self {
        let capabilities = ["events", "background-snapshot", "pause-before-switchover", "xbzrle"];
        let parameters = json!({ "max-bandwidth": 1 << 27, "downtime-limit": 300, "tls-creds": "" });
        let state = State {
            running: true,
            uses_disk: true,
            stopped_by_migration: false,
            migration: "none",
            error: None,
            continued: false,
            migrations: 0,
            capabilities: capabilities.map(|name| (name.to_owned(), name == "xbzrle")).into(),
            parameters: parameters.as_object().unwrap().clone(),
            commands: Vec::new(),
            scripts: VecDeque::new(),
            mode: cdp_store::CheckpointMode::Hot,
            hang_up: None,
            hang: None,
            flood: 0,
            refuses_hot: false,
            others_migrate: false,
            cancel: None,
            pages: vec![1, 2, 3, 0, 5, 6, 7, 8],
        };
        gate.ring_started(&disk, 0);
        Self { state: Arc::new(Mutex::new(state)), gate, disk, voice: Arc::default() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn say(&self, say: Say) {
        if let Some(voice) = &*self.voice.lock().unwrap() {
            voice.say(say);
        }
    }

    /// Stops the rings, and then the machine.
    fn stop(&self) -> bool {
        if !std::mem::replace(&mut self.state().running, false) {
            return false;
        }
        if self.state().uses_disk {
            self.gate.ring_stopped(&self.disk, 0, RingStop::Asked, true);
        }
        true
    }

    fn go_on(&self) -> bool {
        if std::mem::replace(&mut self.state().running, true) {
            return false;
        }
        self.state().stopped_by_migration = false;
        if self.state().uses_disk {
            self.gate.ring_started(&self.disk, 0);
        }
        true
    }

    /// Has the guest, which runs, begin to use its disk, or leave it.
    pub fn use_disk(&self, uses: bool) {
        self.state().uses_disk = uses;
        if uses {
            self.gate.ring_started(&self.disk, 0);
        } else {
            self.gate.ring_stopped(&self.disk, 0, RingStop::Asked, true);
        }
    }

    /// What it does with a command.
    pub fn answer(&self, name: &str, arguments: &Value) -> Vec<Say> {
        let hang = self.state().hang.take();
        if let Some(time) = hang {
            return [Say::Wait(time)].into_iter().chain(self.answer(name, arguments)).collect();
        }
        self.state().commands.push(name.to_owned());
        let hang_up = match &mut self.state().hang_up {
            Some((0, carried_out)) => Some(*carried_out),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        if let Some(carried_out) = hang_up {
            self.state().hang_up = None;
            if carried_out {
                self.carry_out(name, arguments);
            }
            return vec![Say::Fault(Fault::HangUp)];
        }
        self.carry_out(name, arguments)
    }

    fn carry_out(&self, name: &str, arguments: &Value) -> Vec<Say> {
        let done = || vec![Say::Return(json!({}))];
        let event = |happened: bool, name| {
            let event = happened.then(|| Say::Event(name, json!({})));
            event.into_iter().chain(done()).collect()
        };
        match name {
            "stop" => event(self.stop(), "STOP"),
            "cont" => event(self.go_on(), "RESUME"),
            "migrate" => {
                let (qemu, uri) = (self.clone(), arguments["uri"].as_str().unwrap_or_default().to_owned());
                let mut state = self.state();
                (state.migration, state.error, state.continued) = ("setup", None, false);
                state.migrations += 1;
                let number = state.migrations;
                drop(state);
                std::thread::spawn(move || qemu.migrate(number, uri.trim_start_matches("unix:")));
                done()
            }
            "migrate_cancel" => {
                let mut state = self.state();
                if !matches!(state.migration, "setup" | "active" | "pre-switchover" | "device") {
                    return done();
                }
                state.migration = "cancelled";
                let event = Say::Event("MIGRATION", json!({ "status": "cancelled" }));
                [event].into_iter().chain(done()).collect()
            }
            "migrate-continue" => {
                self.state().continued = true;
                done()
            }
            "migrate-set-capabilities" => {
                let mut state = self.state();
                let wanted = arguments["capabilities"].as_array().unwrap();
                let is_hot = |one: &Value| one["capability"] == "background-snapshot" && one["state"] == true;
                if state.refuses_hot && wanted.iter().any(is_hot) {
                    let why = "Background-snapshot is not supported by host kernel";
                    return vec![Say::Refuse("GenericError", why.to_owned())];
                }
                for one in wanted {
                    let name = one["capability"].as_str().unwrap().to_owned();
                    state.capabilities.insert(name, one["state"] == true);
                }
                let flood = std::mem::take(&mut state.flood);
                (0..flood).map(|_| Say::Event("NIC_RX_FILTER_CHANGED", json!({}))).chain(done()).collect()
            }
            "migrate-set-parameters" => {
                self.state().parameters.extend(arguments.as_object().unwrap().clone());
                done()
            }
            _ => vec![Say::Return(self.query(name, arguments))],
        }
    }

    fn query(&self, name: &str, arguments: &Value) -> Value {
        let state = self.state();
        let finishes = state.stopped_by_migration && state.mode == cdp_store::CheckpointMode::Live;
        let status = match () {
            () if state.running => "running",
            () if finishes => "finish-migrate",
            () => "paused",
        };
        match name {
            "query-status" => json!({ "running": state.running, "status": status }),
            "query-migrate" => json!({ "status": state.migration, "error-desc": state.error }),
            "query-migrate-capabilities" => {
                let one = |(name, on): (&String, &bool)| json!({ "capability": name, "state": on });
                state.capabilities.iter().map(one).collect()
            }
            "query-migrate-parameters" => state.parameters.clone().into(),
            "query-memory-size-summary" => json!({ "base-memory": 1 << 20, "plugged-memory": 0 }),
            "query-cpus-fast" => json!([{}]),
            "query-uuid" => json!({ "UUID": "00000000-0000-0000-0000-000000000000" }),
            "query-kvm" => json!({ "enabled": true, "present": true }),
            "query-memdev" => json!([{ "id": "mem", "size": 1 << 20, "share": true }]),
            "query-chardev" => {
                json!([{ "label": "c0", "filename": "unix:x", "frontend-open": true }])
            }
            "query-block" => json!([]),
            "qom-list" if arguments["path"] == "/machine/peripheral" => {
                json!([{ "name": "d0", "type": "child<vhost-user-blk-pci>" }])
            }
            "qom-list" => json!([]),
            "qom-get" if arguments["property"] == "chardev" => json!("c0"),
            "qom-get" if arguments["property"] == "addr" => json!({ "path": self.disk }),
            "qom-get" => json!("pc-1.0-machine"),
            "human-monitor-command" => json!(""),
            _ => json!({}),
        }
    }

    /// Follows its script. Should it be cancelled, or nobody take the stream, that is the end.
    fn migrate(&self, number: u32, socket: &str) {
        let (script, machine) = {
            let mut state = self.state();
            let mode = state.mode;
            let script = state.scripts.pop_front().unwrap_or_else(|| undisturbed(mode));
            (script, Machine::new(&[("pc.ram", &state.pages)]))
        };
        let bytes = hot(&machine);
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        let mut beginning = Draft::begin(&machine, &[]).bytes;
        let mut stream = UnixStream::connect(socket).ok();
        for act in script {
            if self.is_over(number) {
                return;
            }
            let sent = match act {
                Act::SendHalf => stream.as_mut().map(|stream| stream.write_all(first)),
                Act::SendRound => {
                    let bytes = [std::mem::take(&mut beginning), round(&machine)].concat();
                    stream.as_mut().map(|stream| stream.write_all(&bytes))
                }
                Act::SendNonsense => stream.as_mut().map(|stream| stream.write_all(&[0xff; 64])),
                Act::SendRest => stream.take().map(|mut stream| stream.write_all(rest)),
                Act::Close => {
                    stream = None;
                    continue;
                }
                act => {
                    self.act(act);
                    continue;
                }
            };
            if !matches!(sent, Some(Ok(()))) && !self.is_over(number) {
                self.act(Act::Fail("Unable to write to socket: Broken pipe"));
                return;
            }
        }
        // QEMU keeps its socket until the migration has ended.
        let by = Instant::now() + Duration::from_secs(30);
        while self.state().migration == "active" && Instant::now() < by {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether a migration was cancelled, so that it says nothing more.
    fn is_over(&self, number: u32) -> bool {
        let state = self.state();
        state.migration == "cancelled" || state.migrations != number
    }

    fn say_state(&self) {
        let status = self.state().migration;
        self.say(Say::Event("MIGRATION", json!({ "status": status })));
    }

    pub fn act(&self, act: Act) {
        match act {
            Act::State(status) => {
                self.state().migration = status;
                self.say_state();
            }
            Act::Fail(why) => {
                self.state().error = Some(why);
                self.act(Act::State("failed"));
            }
            Act::Stop => {
                let stopped = self.stop();
                self.state().stopped_by_migration = stopped;
                if stopped {
                    self.say(Say::Event("STOP", json!({})));
                }
            }
            Act::GoOn => {
                if std::mem::take(&mut self.state().stopped_by_migration) && self.go_on() {
                    self.say(Say::Event("RESUME", json!({})));
                }
            }
            Act::OthersStop if self.stop() => self.say(Say::Event("STOP", json!({}))),
            Act::OthersGoOn if self.go_on() => self.say(Say::Event("RESUME", json!({}))),
            Act::OthersStop | Act::OthersGoOn => {}
            Act::AwaitContinue => {
                let by = Instant::now() + Duration::from_secs(30);
                let waits = || {
                    let state = self.state();
                    !state.continued && state.migration == "pre-switchover" && Instant::now() < by
                };
                while waits() {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            Act::UseDisk => self.use_disk(true),
            Act::LeaveDisk => self.use_disk(false),
            Act::ResetDisk => {
                self.gate.ring_stopped(&self.disk, 0, RingStop::Reset, true);
                self.gate.ring_started(&self.disk, 0);
            }
            Act::LoseDisk => {
                self.gate.disconnected(&self.disk);
                self.gate.ring_started(&self.disk, 0);
            }
            Act::Event(name, data) => self.say(Say::Event(name, data)),
            Act::HangUp => self.say(Say::Fault(Fault::HangUp)),
            Act::Hang(time) => self.state().hang = Some(time),
            Act::Cancel => {
                if let Some(cancel) = &self.state().cancel {
                    cancel.send_replace(true);
                }
            }
            Act::SendHalf | Act::SendRound | Act::SendNonsense | Act::SendRest | Act::Close => {}
        }
    }
}
