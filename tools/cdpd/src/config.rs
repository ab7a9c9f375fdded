//! What the daemon is told: a file, and flags that override it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use cdp_store::StoreOptions;
use serde::{Deserialize, Deserializer};

use crate::callback::{Callback, CheckpointSection};
use crate::logging::LogFormat;
use crate::nbd::{Nbd, NbdAddress};
use crate::size::ByteSize;

/// The file's name in the store's directory.
pub const FILE_NAME: &str = "cdpd.toml";

/// All that the daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The store's directory.
    pub store: PathBuf,
    /// Whether a store may be made where there is none.
    pub create: bool,
    /// How the store works.
    pub options: StoreOptions,
    /// The control socket's mode.
    pub socket_mode: u32,
    /// Where else the API listens.
    pub http: Option<SocketAddr>,
    /// How the log looks.
    pub log_format: LogFormat,
    /// What goes into it, as in `RUST_LOG`.
    pub log_filter: String,
    /// What clients may use up.
    pub limits: Limits,
    /// How volumes are served.
    pub vhost_user: VhostUser,
    /// How volumes and their instants are exported.
    pub nbd: Nbd,
    /// Who is told of each cut of a machine's disks.
    pub callback: Option<Callback>,
}

/// How volumes are served.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VhostUser {
    /// The sockets' mode, unless the server's default is right.
    pub mode: Option<SocketMode>,
    /// How long a queue's thread looks for new requests before it sleeps, in microseconds.
    pub busy_poll_us: Option<u64>,
}

/// What clients of the API may use up together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections; more wait to be accepted.
    pub connections: usize,
    /// Requests at work; more are refused.
    pub requests: usize,
    /// Among them long ones: lists of records, verification, import, extraction; more are refused.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, requests: 64, streams: 16 }
    }
}

/// What flags say; each overrides the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The configuration file; if none, `cdpd.toml` in the store's directory, if it is there.
    pub file: Option<PathBuf>,
    /// Refuse to make a store where there is none.
    pub no_create: bool,
    /// Where else the API listens.
    pub http: Option<SocketAddr>,
    /// Whether that may be an address that others can reach.
    pub http_allow_remote: bool,
    /// Where NBD listens, besides what the file says.
    pub nbd: Vec<NbdAddress>,
    /// Whether that may be an address that others can reach.
    pub nbd_allow_remote: bool,
    /// How the log looks.
    pub log_format: Option<LogFormat>,
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    store: StoreSection,
    control: ControlSection,
    vhost_user: VhostUser,
    http: HttpSection,
    nbd: Nbd,
    checkpoint: CheckpointSection,
    log: LogSection,
    limits: Limits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreSection {
    create: Option<bool>,
    segment_size: Option<ByteSize>,
    pool_segments: Option<usize>,
    map_budget: Option<ByteSize>,
    index_memory: Option<ByteSize>,
    reserve: Option<ByteSize>,
    full_wait_s: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ControlSection {
    mode: Option<SocketMode>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HttpSection {
    listen: Option<SocketAddr>,
    allow_remote: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogSection {
    format: Option<LogFormat>,
    filter: Option<String>,
}

/// `"0600"` or `"0660"`. In quotes, since TOML has no leading zeroes.
#[derive(Clone, Copy, Debug)]
pub struct SocketMode(pub u32);

impl<'de> Deserialize<'de> for SocketMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "0600" | "600" => Ok(Self(0o600)),
            "0660" | "660" => Ok(Self(0o660)),
            // Whoever can write to the socket can destroy volumes.
            other => {
                Err(serde::de::Error::custom(format!("mode \"{other}\": \"0600\" or \"0660\" is possible")))
            }
        }
    }
}

impl Config {
    /// The defaults, for a store in this directory.
    #[must_use]
    pub fn new(store: impl Into<PathBuf>) -> Self {
        Self {
            store: store.into(),
            create: true,
            options: StoreOptions::default(),
            socket_mode: 0o600,
            http: None,
            log_format: LogFormat::default(),
            log_filter: "info".to_owned(),
            limits: Limits::default(),
            vhost_user: VhostUser::default(),
            nbd: Nbd::default(),
            callback: None,
        }
    }

    /// The file's word, then the flags'.
    ///
    /// # Errors
    /// The file cannot be read or says something unknown (with its line), or the result is unsafe.
    pub fn load(store: &Path, flags: &Overrides) -> anyhow::Result<Self> {
        // Sockets and logs name files of the store, which must not change their meaning with the directory.
        let store = std::path::absolute(store).with_context(|| format!("'{}'", store.display()))?;
        let path = flags.file.clone().unwrap_or_else(|| store.join(FILE_NAME));
        let file = match fs::read_to_string(&path) {
            Ok(text) => {
                toml::from_str(&text).with_context(|| format!("in the configuration {}", path.display()))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && flags.file.is_none() => File::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let allow_remote = flags.http_allow_remote || file.http.allow_remote;
        let mut config = Self::new(store);
        config.callback = file
            .checkpoint
            .callback()
            .with_context(|| format!("in the configuration {}, section [checkpoint]", path.display()))?;
        config.apply(file);
        config.create &= !flags.no_create;
        config.http = flags.http.or(config.http);
        config.nbd.listen.extend(flags.nbd.iter().cloned());
        config.nbd.allow_remote |= flags.nbd_allow_remote;
        config.log_format = flags.log_format.unwrap_or(config.log_format);
        config.check(allow_remote)?;
        Ok(config)
    }

    fn apply(&mut self, file: File) {
        let options = &mut self.options;
        let store = file.store;
        options.segment_bytes = store.segment_size.map_or(options.segment_bytes, |size| size.0);
        options.pool_segments = store.pool_segments.unwrap_or(options.pool_segments);
        let budget = store.map_budget.map_or_else(|| map_budget(memory_bytes()), |size| size.0);
        options.map_budget_bytes = usize::try_from(budget).unwrap_or(usize::MAX);
        let memory = store.index_memory.map_or_else(|| index_memory(memory_bytes()), |size| size.0);
        options.index_memory_bytes = usize::try_from(memory).unwrap_or(usize::MAX);
        options.reserve_bytes = store.reserve.map_or(options.reserve_bytes, |size| size.0);
        options.full_wait = store.full_wait_s.map_or(options.full_wait, Duration::from_secs);
        self.create = store.create.unwrap_or(self.create);
        self.limits = file.limits;
        self.http = file.http.listen;
        self.vhost_user = file.vhost_user;
        self.nbd = file.nbd;
        self.socket_mode = file.control.mode.map_or(self.socket_mode, |mode| mode.0);
        self.log_format = file.log.format.unwrap_or(self.log_format);
        self.log_filter = file.log.filter.unwrap_or_else(|| self.log_filter.clone());
    }

    fn check(&self, allow_remote: bool) -> anyhow::Result<()> {
        let Limits { connections, requests, streams } = self.limits;
        if [connections, requests, streams].contains(&0) {
            bail!("[limits]: connections, requests and streams must each be 1 at the least");
        }
        if let Some(address) = self.http.filter(|address| !address.ip().is_loopback() && !allow_remote) {
            bail!(
                "others could reach the API on {address}, and it asks nobody who they are: \
                 use a loopback address, or say --http-allow-remote"
            );
        }
        self.nbd.check()
    }
}

/// The map's budget where none is configured, in bytes: 1/128 of the memory there is, from 48 MiB to 1 GiB. It is used
/// only as far as guests work on so much; without it their reads would wait for the index.
fn map_budget(memory_bytes: u64) -> u64 {
    (memory_bytes / 128).clamp(48 << 20, 1 << 30)
}

/// The time index's memory where none is configured, in bytes: 1/256 of the memory there is, from 48 to 512 MiB. Half of it
/// caches what a look into the index needs first, the indexes of its tables.
fn index_memory(memory_bytes: u64) -> u64 {
    (memory_bytes / 256).clamp(48 << 20, 512 << 20)
}

/// The memory that this process can have, in bytes: the machine's, or what its control groups allow (`memory.max`, see
/// "Memory Interface Files" in the kernel's `cgroup-v2.rst`); 0 if it cannot be told.
fn memory_bytes() -> u64 {
    let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = group.lines().find_map(|line| line.strip_prefix("0::/"));
    let allowed = path.and_then(|path| memory_allowed(Path::new("/sys/fs/cgroup"), Path::new(path)));
    allowed.map_or_else(machine_bytes, |allowed| machine_bytes().min(allowed))
}

/// The least that a control group and those above it allow, in bytes, if any of them does.
fn memory_allowed(root: &Path, group: &Path) -> Option<u64> {
    let limit =
        |group: &Path| fs::read_to_string(root.join(group).join("memory.max")).ok()?.trim().parse().ok();
    group.ancestors().filter_map(limit).min()
}

fn machine_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB")?.trim().parse().ok());
    total.map_or(0, |kib: u64| kib << 10)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn load(text: &str, flags: &Overrides) -> anyhow::Result<Config> {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE_NAME), text).unwrap();
        Config::load(directory.path(), flags)
    }

    #[test]
    fn without_a_file_the_defaults_hold() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config::load(directory.path(), &Overrides::default()).unwrap();
        assert!(config.create && config.http.is_none());
        assert_eq!(config.socket_mode, 0o600);
    }

    #[test]
    fn the_map_may_have_more_where_there_is_more_memory() {
        assert_eq!(map_budget(0), 48 << 20);
        assert_eq!(map_budget(32 << 30), 256 << 20);
        assert_eq!(map_budget(1 << 40), 1 << 30);
        assert_eq!([0, 32 << 30, 1 << 40].map(index_memory), [48 << 20, 128 << 20, 512 << 20]);
        assert!(machine_bytes() > 64 << 20, "{}", machine_bytes());
        let groups = tempfile::tempdir().unwrap();
        fs::create_dir_all(groups.path().join("a/b")).unwrap();
        assert_eq!(memory_allowed(groups.path(), Path::new("a/b")), None);
        for (group, limit) in [("a/b", "max\n"), ("a", "1048576\n"), ("", "4194304\n")] {
            fs::write(groups.path().join(group).join("memory.max"), limit).unwrap();
        }
        assert_eq!(memory_allowed(groups.path(), Path::new("a/b")), Some(1 << 20));
        let config = load("[store]\n", &Overrides::default()).unwrap();
        assert_eq!(config.options.map_budget_bytes as u64, map_budget(memory_bytes()));
    }

    #[test]
    fn flags_override_the_file() {
        let text = r#"
            [store]
            create = true
            segment_size = "64M"
            map_budget = 1048576
            index_memory = "64M"
            full_wait_s = 3
            [control]
            mode = "0660"
            [vhost_user]
            busy_poll_us = 0
            [http]
            listen = "127.0.0.1:8080"
            [log]
            format = "json"
            [limits]
            streams = 2
        "#;
        let http = Some("[::1]:9".parse().unwrap());
        let flags = Overrides { http, no_create: true, ..Overrides::default() };
        let config = load(text, &flags).unwrap();
        assert_eq!(config.options.segment_bytes, 64 << 20);
        assert_eq!((config.options.map_budget_bytes, config.options.index_memory_bytes), (1 << 20, 64 << 20));
        assert_eq!(config.options.full_wait, Duration::from_secs(3));
        assert_eq!((config.socket_mode, config.log_format), (0o660, LogFormat::Json));
        assert_eq!(config.limits, Limits { streams: 2, ..Limits::default() });
        assert_eq!((config.http, config.create), (http, false));
        assert_eq!(config.vhost_user.busy_poll_us, Some(0));
    }

    #[test]
    fn a_refusal_names_the_line() {
        for (text, part) in [
            ("[store]\nsegmentsize = 1", "unknown field `segmentsize`"),
            ("\n[log]\nformat = \"xml\"", "unknown variant `xml`"),
            ("[control]\n\nmode = \"0666\"", "\"0600\" or \"0660\" is possible"),
            ("[store]\nreserve = \"10GB\"", "'10GB' is no size"),
            ("[store]\nreserve = -1", "cannot be negative"),
            ("store", "expected"),
        ] {
            let refusal = format!("{:#}", load(text, &Overrides::default()).unwrap_err());
            let line = format!("line {}", text.lines().count());
            assert!(refusal.contains(part) && refusal.contains(&line), "{text}: {refusal}");
            assert!(refusal.contains(FILE_NAME), "{refusal}");
        }
    }

    #[test]
    fn a_file_that_was_asked_for_must_be_there() {
        let flags = Overrides { file: Some("/nonexistent/x.toml".into()), ..Overrides::default() };
        let refusal = format!("{:#}", load("", &flags).unwrap_err());
        assert!(refusal.contains("cannot read /nonexistent/x.toml"), "{refusal}");
    }

    #[test]
    fn limits_that_let_nobody_in_are_refused() {
        for limit in ["connections", "requests", "streams"] {
            let with = |count: u32| load(&format!("[limits]\n{limit} = {count}"), &Overrides::default());
            let refusal = with(0).unwrap_err().to_string();
            assert!(refusal.contains("[limits]") && refusal.contains(limit), "{refusal}");
            assert!(with(1).is_ok());
        }
    }

    #[test]
    fn an_open_door_must_be_asked_for() {
        let http = Some("0.0.0.0:80".parse().unwrap());
        let flags = Overrides { http, ..Overrides::default() };
        let refusal = load("", &flags).unwrap_err().to_string();
        assert!(refusal.contains("--http-allow-remote"), "{refusal}");
        assert!(load("", &Overrides { http_allow_remote: true, ..flags }).is_ok());
        assert!(load("[http]\nlisten = \"192.0.2.1:80\"", &Overrides::default()).is_err());
    }
}
