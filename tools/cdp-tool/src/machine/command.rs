//! QEMU's command line: what the user says, and what a machine needs beside that to be served and saved.

use std::path::Path;

use anyhow::{Context, bail, ensure};

/// Options whose value may look like an option.
const FREE_TEXT: [&str; 4] = ["append", "name", "fw_cfg", "smbios"];
/// What processors are made of (`-smp`). What is not said is 1.
const TOPOLOGY: [&str; 8] =
    ["drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads"];
/// What QEMU gives a machine that is not told how much memory it has (`qemu-system-x86_64 -help`).
const DEFAULT_MEMORY: &str = "128M";
/// Memory for which `share` is on by default (`qemu-system-x86_64 -help`).
const SHARED_UNLESS_SAID: [&str; 2] = ["memory-backend-memfd", "memory-backend-shm"];
/// The id of the memory that is added.
const MEMORY_ID: &str = "hindsight-memory";

/// A disk that is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Where it is served.
    pub(crate) socket: String,
    /// How many queues it is served with.
    pub(crate) queues: u16,
    /// Further properties of its device: `bootindex=0,addr=0x10`.
    pub(crate) properties: String,
}

/// What is added to a command line.
#[derive(Clone, Debug)]
pub(crate) struct Additions<'a> {
    /// The machine's name.
    pub(crate) name: &'a str,
    /// Its disks, in its own order.
    pub(crate) disks: &'a [Disk],
    /// Where its QMP socket is to be.
    pub(crate) qmp: &'a str,
    /// Where the guest agent's socket is to be.
    pub(crate) agent: Option<&'a str>,
    /// QEMU's version: major, minor.
    pub(crate) version: (u32, u32),
}

/// A command line that has been read.
#[derive(Debug)]
pub(crate) struct Command<'a> {
    words: &'a [String],
    /// Options without their dashes, with their values.
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Command<'a> {
    /// Reads QEMU's program and arguments.
    ///
    /// # Errors
    /// There is none, or it has what a machine that is looked after cannot have.
    pub(crate) fn read(words: &'a [String]) -> anyhow::Result<Self> {
        let program = words.first().context("which QEMU? say it behind --, with its arguments")?;
        ensure!(!program.starts_with('-'), "'{program}' is no program: QEMU itself comes first behind --");
        let mut options = Vec::new();
        let mut rest = words[1..].iter().peekable();
        while let Some(word) = rest.next() {
            let Some(option) = option_name(word) else { continue };
            let takes_text = FREE_TEXT.contains(&option);
            let value = rest.next_if(|next| takes_text || option_name(next).is_none());
            options.push((option, value.map_or("", String::as_str)));
        }
        let command = Self { words, options };
        command.check()?;
        Ok(command)
    }

    fn check(&self) -> anyhow::Result<()> {
        for (option, why) in [
            ("incoming", "say --at CHECKPOINT instead: the machine then goes on from there"),
            ("daemonize", "the machine is looked after from here, so QEMU must stay in the foreground"),
            ("mem-path", "use -object memory-backend-file,share=on,… and -machine memory-backend=… instead"),
            ("loadvm", "its memory would not fit the disks"),
        ] {
            ensure!(!self.has(option), "-{option} is not possible: {why}");
        }
        Ok(())
    }

    /// QEMU's program.
    pub(crate) fn program(&self) -> &'a str {
        self.words.first().map_or("", String::as_str)
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|(name, _)| *name == option)
    }

    fn values(&self, names: &'static [&'static str]) -> impl DoubleEndedIterator<Item = &'a str> {
        self.options.iter().filter(|(name, _)| names.contains(name)).map(|(_, value)| *value)
    }

    /// How many virtual processors it asks for: as a number, or as so many threads of so many cores.
    pub(crate) fn vcpus(&self) -> u16 {
        let last = self.values(&["smp"]).next_back().unwrap_or("1");
        let number = |text: &str| text.parse::<u16>().ok();
        let first = last.split(',').next().and_then(number);
        let count = |name: &'static str| property(last, name).and_then(number);
        let all = || TOPOLOGY.into_iter().filter_map(count).fold(1, u16::saturating_mul);
        first.or_else(|| count("cpus")).or_else(|| count("maxcpus")).unwrap_or_else(all)
    }

    /// How much memory it asks for, as `-object` takes it.
    fn memory(&self) -> String {
        let last = self.values(&["m"]).next_back().unwrap_or(DEFAULT_MEMORY);
        let size = property(last, "size").or_else(|| last.split(',').next()).unwrap_or(DEFAULT_MEMORY);
        // A plain number is MiB here, and bytes there.
        if size.bytes().all(|b| b.is_ascii_digit()) { format!("{size}M") } else { size.to_owned() }
    }

    /// The ids of memory that the user has chosen himself, if he has.
    fn chosen_memory(&self) -> Vec<&'a str> {
        let of_machine = self.values(&["machine", "M"]).filter_map(|value| property(value, "memory-backend"));
        let of_nodes = self.values(&["numa"]).filter_map(|value| property(value, "memdev"));
        of_machine.chain(of_nodes).collect()
    }

    /// Options for memory that other processes can have; none if the user has seen to that.
    fn shared_memory(&self) -> anyhow::Result<Vec<String>> {
        let chosen = self.chosen_memory();
        for id in &chosen {
            let object = self.values(&["object"]).find(|value| property(value, "id") == Some(id));
            let Some(object) = object else { continue };
            let shared = match property(object, "share") {
                Some(said) => ["on", "true", "yes", "y"].contains(&said),
                None => SHARED_UNLESS_SAID.iter().any(|kind| object.starts_with(kind)),
            };
            ensure!(
                shared,
                "guest memory must be shared with the server of its disks: add share=on to -object {object}"
            );
        }
        if !chosen.is_empty() {
            return Ok(Vec::new());
        }
        if self.values(&["numa"]).any(|value| value.starts_with("node")) {
            bail!(
                "-numa node needs memory that is shared: -object memory-backend-memfd,share=on,… and memdev=…"
            );
        }
        Ok(vec![
            "-object".to_owned(),
            format!("memory-backend-memfd,id={MEMORY_ID},size={},share=on", self.memory()),
            "-machine".to_owned(),
            format!("memory-backend={MEMORY_ID}"),
        ])
    }

    /// The whole command line: program and arguments.
    ///
    /// # Errors
    /// Its memory cannot be shared.
    pub(crate) fn complete(&self, additions: &Additions<'_>, incoming: bool) -> anyhow::Result<Vec<String>> {
        let mut all = self.words.to_vec();
        let mut add = |option: &str, value: String| all.extend([format!("-{option}"), value]);
        if !self.has("name") {
            add("name", additions.name.to_owned());
        }
        // QEMU gives up on a server that is away for a moment unless it is told to come back.
        let reconnect = if additions.version >= (9, 2) { "reconnect-ms=500" } else { "reconnect=1" };
        for (index, disk) in additions.disks.iter().enumerate() {
            let queues = self.vcpus().min(disk.queues);
            let socket = escaped(&disk.socket);
            add("chardev", format!("socket,id=hindsight-{index},path={socket},{reconnect}"));
            let mut device = format!(
                "vhost-user-blk-pci,id=hindsight-disk-{index},chardev=hindsight-{index},num-queues={queues}"
            );
            if !disk.properties.is_empty() {
                device.push(',');
                device.push_str(&disk.properties);
            }
            add("device", device);
        }
        if let Some(agent) = additions.agent {
            add("chardev", format!("socket,id=hindsight-agent,path={},server=on,wait=off", escaped(agent)));
            add("device", "virtio-serial-pci,id=hindsight-serial".to_owned());
            let port =
                "virtserialport,bus=hindsight-serial.0,chardev=hindsight-agent,name=org.qemu.guest_agent.0";
            add("device", port.to_owned());
        }
        add("qmp", format!("unix:{},server=on,wait=off", escaped(additions.qmp)));
        if incoming {
            add("incoming", "defer".to_owned());
        }
        all.extend(self.shared_memory()?);
        Ok(all)
    }
}

/// The name of an option: QEMU takes one dash or two.
fn option_name(word: &str) -> Option<&str> {
    let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
    name.starts_with(|c: char| c.is_ascii_alphanumeric()).then_some(name)
}

/// A property among those of an option: `a=1,b=2`.
fn property<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    value
        .split(',')
        .find_map(|part| part.split_once('=').filter(|(key, _)| *key == name))
        .map(|(_, value)| value)
}

/// QEMU takes a comma in a value if it is doubled.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// A QEMU's version: major, minor. The program is the one that its name means in `directory`, where it is started.
///
/// # Errors
/// It cannot be started, or is no QEMU.
pub(crate) fn version_of(program: &str, directory: &Path) -> anyhow::Result<(u32, u32)> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .current_dir(directory)
        .output()
        .with_context(|| format!("cannot start {program} in {}", directory.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    read_version(&text).with_context(|| format!("{program} --version does not answer as a QEMU does"))
}

/// `QEMU emulator version 10.0.2 (Debian …)`.
fn read_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A command line as a shell takes it.
pub(crate) fn quoted(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+%".contains(c);
    let quote = |word: &String| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else if word.contains(char::is_control) {
            with_escapes(word)
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// A word as bash and zsh take it, with what a terminal would do something about as escapes.
fn with_escapes(word: &str) -> String {
    let mut quoted = String::from("$'");
    for c in word.chars() {
        match c {
            '\'' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                quoted.extend(c.to_string().bytes().map(|byte| format!("\\x{byte:02x}")));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

/// Refuses a path that no socket can have: `sun_path` has 108 bytes (unix(7)).
///
/// # Errors
/// It is too long, or no text.
pub(crate) fn socket_path(directory: &Path, name: &str) -> anyhow::Result<String> {
    let path = directory.join(name);
    let shown = path.display().to_string();
    ensure!(
        path.as_os_str().len() < 108,
        "{shown} is too long for a socket: give a shorter directory with --sockets"
    );
    path.to_str().map(str::to_owned).with_context(|| format!("{shown} is no text"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn complete(line: &str) -> anyhow::Result<String> {
        let disks =
            [Disk { socket: "/s/a,b.sock".to_owned(), queues: 16, properties: "bootindex=0".to_owned() }];
        let additions = Additions { name: "web1", disks: &disks, qmp: "/s/q", agent: None, version: (10, 0) };
        let words = words(line);
        Ok(quoted(&Command::read(&words)?.complete(&additions, false)?))
    }

    #[test]
    fn what_is_missing_is_added() {
        assert_eq!(
            complete("qemu -m 1024 -smp 4").unwrap(),
            "qemu -m 1024 -smp 4 -name web1 \
             -chardev socket,id=hindsight-0,path=/s/a,,b.sock,reconnect-ms=500 \
             -device vhost-user-blk-pci,id=hindsight-disk-0,chardev=hindsight-0,num-queues=4,bootindex=0 \
             -qmp unix:/s/q,server=on,wait=off \
             -object memory-backend-memfd,id=hindsight-memory,size=1024M,share=on \
             -machine memory-backend=hindsight-memory"
        );
    }

    #[test]
    fn processors_are_counted_however_they_are_said() {
        for (smp, count) in [
            ("4", 4),
            ("4,maxcpus=8", 4),
            ("cpus=3,sockets=1", 3),
            ("maxcpus=8,cpus=2", 2),
            ("maxcpus=6", 6),
            ("cores=4", 4),
            ("sockets=2,cores=3,threads=2", 12),
            ("sockets=65535,cores=2", u16::MAX),
        ] {
            let words = words(&format!("qemu -smp {smp}"));
            assert_eq!(Command::read(&words).unwrap().vcpus(), count, "{smp}");
        }
    }

    #[test]
    fn memory_is_as_large_as_the_user_says() {
        for (line, size) in [
            ("qemu", "128M"),
            ("qemu -m 512", "512M"),
            ("qemu --m 2G", "2G"),
            ("qemu -m 1G -m size=3G,slots=2,maxmem=8G", "3G"),
            ("qemu -append -m -m 1.5G", "1.5G"),
        ] {
            let all = complete(line).unwrap();
            assert!(all.contains(&format!("size={size},share=on")), "{line}: {all}");
        }
    }

    #[test]
    fn memory_that_the_user_shares_is_left_alone() {
        let own = "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on";
        for line in
            [format!("qemu {own} -machine q35,memory-backend=m"), format!("qemu {own} -numa node,memdev=m")]
        {
            assert!(!complete(&line).unwrap().contains("hindsight-memory"), "{line}");
        }
        for own in ["memory-backend-memfd,id=m,size=1G", "memory-backend-ram,id=m,size=1G,share=y"] {
            let all = complete(&format!("qemu -object {own} -M q35,memory-backend=m")).unwrap();
            assert!(!all.contains("hindsight-memory"), "{own}");
        }
        let off = complete("qemu -object memory-backend-memfd,id=m,size=1G,share=off -M memory-backend=m");
        assert!(off.unwrap_err().to_string().contains("add share=on"));
        let private = complete("qemu -object memory-backend-ram,id=m,size=1G -M q35,memory-backend=m");
        let why = private.unwrap_err().to_string();
        assert!(why.contains("add share=on to -object memory-backend-ram,id=m,size=1G"), "{why}");
    }

    #[test]
    fn what_cannot_be_looked_after_is_refused() {
        for (line, part) in [
            ("qemu -incoming defer", "--at CHECKPOINT"),
            ("qemu -daemonize", "foreground"),
            ("qemu -mem-path /x", "memory-backend-file"),
            ("qemu -numa node,nodeid=0", "memdev"),
            ("-m 1G", "QEMU itself"),
            ("", "which QEMU"),
        ] {
            let why = complete(line).unwrap_err().to_string();
            assert!(why.contains(part), "{line}: {why}");
        }
    }

    #[test]
    fn versions_of_all_packagers_are_read() {
        for (text, version) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", (10, 0)),
            ("QEMU emulator version 7.2.19 (v7.2.19)", (7, 2)),
        ] {
            assert_eq!(read_version(text), Some(version));
        }
        assert_eq!(read_version("GNU bash"), None);
    }

    #[test]
    fn a_shell_reads_what_was_meant() {
        let words = [String::from("a b"), String::from("it's"), String::new(), String::from("x=1,y")];
        assert_eq!(quoted(&words), r"'a b' 'it'\''s' '' x=1,y");
        let words = [String::from("it's\n\u{1b}[2J\\"), String::from("\u{9b}")];
        assert_eq!(quoted(&words), r"$'it\'s\x0a\x1b[2J\\' $'\xc2\x9b'");
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let why = socket_path(Path::new(&format!("/{}", "d".repeat(100))), "web1.qmp").unwrap_err();
        assert!(why.to_string().contains("--sockets"), "{why}");
    }
}
