//! Whoever is told that the disks of a machine were cut: a program or a URL, which only the configuration names. If the
//! API could, everybody who may talk to the daemon could run programs as its user.
//!
//! It is told in the moment of the cut, before the checkpoint is complete, which it may never be; and once more if the
//! checkpoint has to be tried again, with the next epoch: the last one counts. In mode hot the guest runs meanwhile. In
//! live and pause it stands still until whoever is told has ended, and no longer than the deadline.

mod program;
mod url;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cdp_store::{CheckpointMode, VmInfo};
use cdp_types::{CheckpointId, Instant as At, VmName, VolumeName};
use ckpt::take::{AtCut, Called, CutNotice};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::api::rfc3339;
use url::Url;

/// How long whoever is told may take, unless the configuration says otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);
/// No guest is to stand still for longer.
const LONGEST: Duration = Duration::from_secs(600);

/// The section `[checkpoint]` of the configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CheckpointSection {
    callback: Option<Vec<String>>,
    callback_url: Option<String>,
    callback_timeout_s: Option<u64>,
    callback_required: bool,
}

/// Whom to tell, and how much that matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Callback {
    whom: Whom,
    timeout: Duration,
    required: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    /// A program and its arguments.
    Program(PathBuf, Vec<String>),
    Url(Url),
}

/// What is told, as JSON.
#[derive(Clone, Debug, Serialize)]
struct Notice {
    vm: VmName,
    checkpoint: CheckpointId,
    /// The instant of all disks: `epoch:N`.
    epoch: String,
    mode: CheckpointMode,
    volumes: Vec<VolumeName>,
    /// In RFC 3339.
    time: String,
    /// The same, in nanoseconds since 1970.
    time_ns: u64,
}

impl CheckpointSection {
    /// Whom to tell, if anybody.
    ///
    /// # Errors
    /// It names two, or none that could be told.
    pub(crate) fn callback(&self) -> anyhow::Result<Option<Callback>> {
        let whom = match (&self.callback, &self.callback_url) {
            (None, None) => {
                ensure!(!self.callback_required, "callback_required without a callback");
                return Ok(None);
            }
            (Some(_), Some(_)) => bail!("callback and callback_url: there can be only one of them"),
            (Some(command), None) => {
                let (program, arguments) = command.split_first().context("callback names no program")?;
                ensure!(Path::new(program).is_absolute(), "callback: '{program}' is no absolute path");
                Whom::Program(program.into(), arguments.to_vec())
            }
            (None, Some(url)) => Whom::Url(url.parse().context("callback_url")?),
        };
        let timeout = self.callback_timeout_s.map_or(TIMEOUT, Duration::from_secs);
        ensure!(
            (Duration::from_secs(1)..=LONGEST).contains(&timeout),
            "callback_timeout_s: 1 to {} are possible",
            LONGEST.as_secs()
        );
        Ok(Some(Callback { whom, timeout, required: self.callback_required }))
    }
}

impl Callback {
    /// What tells of the cuts of one machine.
    pub(crate) fn for_machine(self: &Arc<Self>, info: &VmInfo) -> AtCut {
        let (callback, vm, volumes) = (Arc::clone(self), info.name.clone(), info.volumes.clone());
        Arc::new(move |CutNotice { checkpoint, cut }: CutNotice| {
            let notice = Notice {
                vm: vm.clone(),
                checkpoint: checkpoint.id,
                epoch: At::Epoch(cut.epoch).to_string(),
                mode: checkpoint.mode,
                volumes: volumes.clone(),
                time: rfc3339(cut.time_ns),
                time_ns: cut.time_ns,
            };
            let callback = Arc::clone(&callback);
            Box::pin(async move { callback.call(&notice).await })
        })
    }

    async fn call(&self, notice: &Notice) -> Called {
        let began = Instant::now();
        let body = serde_json::to_vec(notice).unwrap_or_default();
        let called = match &self.whom {
            Whom::Program(program, arguments) => {
                program::run(program, arguments, notice.environment(), body, self.timeout).await
            }
            Whom::Url(url) => url.post(body, self.timeout).await,
        };
        let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let error = called.err().map(|error| format!("{error:#}"));
        match &error {
            None => tracing::info!(vm = %notice.vm, epoch = notice.epoch, duration_us, "callback: done"),
            Some(error) => tracing::warn!(vm = %notice.vm, epoch = notice.epoch, "callback: {error}"),
        }
        let figures = json!({ "ok": error.is_none(), "duration_us": duration_us, "error": error });
        let veto = error.filter(|_| self.required).map(|error| format!("the callback has failed: {error}"));
        Called { figures, veto }
    }
}

impl Notice {
    /// For programs that need no more than this.
    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("CDP_VM", self.vm.to_string()),
            ("CDP_CHECKPOINT", self.checkpoint.to_string()),
            ("CDP_EPOCH", self.epoch.clone()),
            ("CDP_MODE", format!("{:?}", self.mode).to_lowercase()),
        ]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn section(text: &str) -> anyhow::Result<Option<Callback>> {
        toml::from_str::<CheckpointSection>(text)?.callback()
    }

    fn told(text: &str) -> Called {
        let callback = section(text).unwrap().unwrap();
        let notice = Notice {
            vm: "web1".parse().unwrap(),
            checkpoint: CheckpointId(3),
            epoch: "epoch:5".to_owned(),
            mode: CheckpointMode::Hot,
            volumes: vec!["root".parse().unwrap()],
            time: rfc3339(1),
            time_ns: 1,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.unwrap().block_on(callback.call(&notice))
    }

    #[test]
    fn a_section_names_one_or_nobody() {
        assert_eq!(section("").unwrap(), None);
        let callback = section("callback = [\"/bin/x\", \"y\"]\ncallback_timeout_s = 9").unwrap().unwrap();
        assert_eq!(callback.whom, Whom::Program("/bin/x".into(), vec!["y".into()]));
        assert_eq!((callback.timeout, callback.required), (Duration::from_secs(9), false));
        for url in ["http://h", "http://h:/", "http://h:8080/x", "http://[::1]", "http://[::1]:80/"] {
            assert!(section(&format!("callback_url = \"{url}\"")).is_ok(), "{url}");
        }
        for (text, part) in [
            ("callback = []", "names no program"),
            ("callback = [\"x\"]", "no absolute path"),
            ("callback = [\"/x\"]\ncallback_url = \"http://h/\"", "only one"),
            ("callback_url = \"https://h/\"", "http only"),
            ("callback_url = \"h\"", "http only"),
            ("callback_url = \"http://h:80800/\"", "no port ':80800'"),
            ("callback_url = \"http://[::1]:8o80/\"", "no port ':8o80'"),
            ("callback_required = true", "without a callback"),
            ("callback = [\"/x\"]\ncallback_timeout_s = 0", "1 to 600"),
            ("callbak = 1", "unknown field"),
        ] {
            let refusal = format!("{:#}", section(text).unwrap_err());
            assert!(refusal.contains(part), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_program_gets_the_cut_on_its_input_and_in_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script =
            format!("(cat; echo; echo $CDP_VM $CDP_CHECKPOINT $CDP_EPOCH $CDP_MODE) > {}", out.display());
        let called = told(&format!("callback = [\"/bin/sh\", \"-c\", \"{script}\"]"));
        assert_eq!((called.figures["ok"].as_bool(), called.veto), (Some(true), None), "{}", called.figures);
        let said = std::fs::read_to_string(out).unwrap();
        let (notice, environment) = said.split_once('\n').unwrap();
        let notice: serde_json::Value = serde_json::from_str(notice).unwrap();
        assert_eq!(notice["volumes"][0], "root");
        assert_eq!((notice["vm"].as_str(), notice["mode"].as_str()), (Some("web1"), Some("hot")));
        assert_eq!(environment.trim(), "web1 3 epoch:5 hot");
    }

    #[test]
    fn a_failure_is_a_veto_only_if_that_is_said() {
        let failing = "callback = [\"/bin/sh\", \"-c\", \"echo no >&2; exit 3\"]";
        let called = told(failing);
        assert_eq!((called.figures["ok"].as_bool(), called.veto), (Some(false), None));
        let called = told(&format!("{failing}\ncallback_required = true"));
        assert!(called.veto.unwrap().contains("exit status: 3"));
        let called = told("callback = [\"/nonexistent/x\"]\ncallback_required = true");
        assert!(called.veto.unwrap().contains("/nonexistent/x"));
    }

    #[test]
    fn a_program_past_its_deadline_is_killed_with_all_that_it_has_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", pid.display());
        let began = Instant::now();
        let called = told(&format!(
            "callback = [\"/bin/sh\", \"-c\", \"{script}\"]\ncallback_timeout_s = 1\ncallback_required = true"
        ));
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert!(called.veto.unwrap().contains("not within 1s"));
        let sleeper = std::fs::read_to_string(pid).unwrap();
        let status = PathBuf::from(format!("/proc/{}/stat", sleeper.trim()));
        let gone = || std::fs::read_to_string(&status).map_or(true, |stat| stat.contains(") Z "));
        let by = Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(Instant::now() < by, "what it had started lives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_url_gets_the_cut_as_a_post_and_its_status_counts() {
        use std::io::{Read, Write};
        for (status, ok) in [("204 No Content", true), ("503 Busy", false)] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut heard, mut piece) = (Vec::new(), [0; 4096]);
                while !String::from_utf8_lossy(&heard).contains("}") {
                    let len = stream.read(&mut piece).unwrap();
                    heard.extend(&piece[..len]);
                }
                write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").unwrap();
                String::from_utf8(heard).unwrap()
            });
            let called = told(&format!("callback_url = \"http://{address}/cut?x=1\""));
            assert_eq!(called.figures["ok"], ok, "{}", called.figures);
            let heard = server.join().unwrap();
            assert!(heard.starts_with("POST /cut?x=1 HTTP/1.1\r\n"), "{heard}");
            assert!(heard.contains("content-type: application/json") && heard.contains("\"vm\":\"web1\""));
        }
    }

    #[test]
    fn a_url_that_does_not_answer_is_waited_for_until_the_deadline_only() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let began = Instant::now();
        let called = told(&format!("callback_url = \"{url}\"\ncallback_timeout_s = 1"));
        assert!(called.figures["error"].as_str().unwrap().contains("not within 1s"));
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
