//! Reading a stream: memory page by page, everything else as bytes.

use std::collections::HashMap;
use std::io::Read;

use super::input::Input;
use super::{Content, Limits, MAGIC, Opaque, RAM, RAM_VERSION, RamBlock, VERSION, flag, section, tail};
use crate::firsts::Watch;
use crate::{Error, ErrorKind, PAGE_SIZE};

/// The commands among sections of memory are a handful of bytes.
const MAX_COMMAND_BYTES: usize = 64 << 10;
/// Longer than any machine type's name.
const MAX_MACHINE_NAME: u32 = 256;
/// More than QEMU has.
const MAX_CAPABILITIES: u32 = 64;
/// `TARGET_PAGE_BITS` of x86.
const PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();
/// The capability with which shared files are left out of the stream.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// By number (`enum qemu_vm_cmd`, savevm.c), and what to do about those that no checkpoint may have.
const COMMANDS: [(&str, Option<&str>); 12] = [
    ("INVALID", Some("no such command")),
    ("OPEN_RETURN_PATH", Some("switch the capability return-path off")),
    ("PING", Some("switch the capability return-path off")),
    ("POSTCOPY_ADVISE", Some("switch the capability postcopy-ram off")),
    ("POSTCOPY_LISTEN", Some("no postcopy")),
    ("POSTCOPY_RUN", Some("no postcopy")),
    ("POSTCOPY_RAM_DISCARD", Some("no postcopy")),
    ("PACKAGED", Some("no postcopy")),
    ("ENABLE_COLO", Some("switch the capability x-colo off")),
    ("POSTCOPY_RESUME", Some("no postcopy")),
    ("RECV_BITMAP", Some("no postcopy")),
    ("SWITCHOVER_START", None),
];

/// What a stream says of the machine that it comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Its type, with version: `pc-i440fx-10.0`.
    pub machine: String,
    /// The migration capabilities that both ends must have: `x-ignore-shared`, or none.
    pub capabilities: Vec<String>,
    /// The machine's UUID, with the capability `validate-uuid`.
    pub uuid: Option<[u8; 16]>,
}

/// A page of memory as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page<'a> {
    /// Which of the blocks, by its place in the list.
    pub block: usize,
    /// Where in the block, in bytes.
    pub offset: u64,
    /// What it holds.
    pub content: Content<'a>,
}

/// Reads a migration stream from a socket or a file, in reads of any size, with a buffer of one megabyte.
///
/// A page that comes again replaces what came before: the guest was running.
#[derive(Debug)]
pub struct StreamReader<R> {
    input: Input<R>,
    limits: Limits,
    configuration: Configuration,
    blocks: Vec<RamBlock>,
    by_name: HashMap<String, usize>,
    /// The block of the last page: CONTINUE refers to it.
    block: Option<usize>,
    opaque: Opaque,
    state: State,
    watch: Option<Watch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between two sections, with none or some sections of pages before.
    Between { pages: bool },
    /// In a section of pages, which may be the last one.
    Pages { last: bool },
    /// Behind the last section of memory, which said that it is the last.
    Ended,
    /// The next byte begins the first device.
    Tail,
}

impl<R: Read> StreamReader<R> {
    /// Reads up to the end of the list of RAM blocks.
    ///
    /// # Errors
    /// All kinds that a stream can have; none is worth a second try on the same stream.
    pub fn open(from: R, limits: Limits) -> Result<Self, Error> {
        let mut input = Input::new(from);
        input.record(false);
        if input.u32()? != MAGIC {
            return Err(input.error(ErrorKind::Malformed, "it does not begin with QEVM"));
        }
        let version = input.u32()?;
        if version != VERSION {
            return Err(input.error(ErrorKind::Unsupported, format!("stream version {version}")));
        }
        let configuration = read_configuration(&mut input)?;
        let mut reader = Self {
            opaque: Opaque { head: input.recorded(), ..Opaque::default() },
            input,
            limits,
            configuration,
            blocks: Vec::new(),
            by_name: HashMap::new(),
            block: None,
            state: State::Between { pages: false },
            watch: None,
        };
        reader.read_ram_start()?;
        Ok(reader)
    }

    /// Has the order of the first pages looked at.
    pub(crate) fn watched(self, watch: Watch) -> Self {
        Self { watch: Some(watch), ..self }
    }

    /// What the stream says of its machine.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// The machine's memory, in the order in which QEMU lists it.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// How many bytes have been taken out of the stream.
    pub fn position(&self) -> u64 {
        self.input.position()
    }

    /// The next page; nothing once all memory has come.
    ///
    /// # Errors
    /// As [`StreamReader::open`].
    pub fn next_page(&mut self) -> Result<Option<Page<'_>>, Error> {
        loop {
            match self.state {
                State::Pages { last } => {
                    if let Some((block, offset, zero)) = self.read_entry(last)? {
                        let blocks = &self.blocks;
                        self.watch.take_if(|watch| !watch.note(blocks, block, offset));
                        return Ok(Some(self.page(block, offset, zero)));
                    }
                }
                State::Tail => return Ok(None),
                State::Between { .. } | State::Ended => self.read_between()?,
            }
        }
    }

    /// Everything that is not memory. Reads up to the end of the stream.
    ///
    /// # Errors
    /// As [`StreamReader::open`]; `Incomplete` before [`StreamReader::next_page`] has said that no more comes.
    pub fn into_opaque(mut self) -> Result<Opaque, Error> {
        if self.state != State::Tail {
            return Err(self.input.error(ErrorKind::Incomplete, "its memory has not been read"));
        }
        let begin = self.input.position();
        self.opaque.tail = self.input.rest(self.limits.device_bytes)?;
        tail::check(&self.opaque.tail, begin)?;
        Ok(self.opaque)
    }

    fn page(&self, block: usize, offset: u64, zero: bool) -> Page<'_> {
        let content = match self.input.last(PAGE_SIZE * usize::from(!zero)).try_into() {
            Ok(bytes) => Content::Bytes(bytes),
            Err(_) => Content::Zero,
        };
        Page { block, offset, content }
    }

    fn unsupported<T>(&self, what: impl Into<String>) -> Result<T, Error> {
        Err(self.input.error(ErrorKind::Unsupported, what))
    }

    fn malformed<T>(&self, what: impl Into<String>) -> Result<T, Error> {
        Err(self.input.error(ErrorKind::Malformed, what))
    }

    /// The START section of `ram`, which is the first of all, and the commands before it.
    fn read_ram_start(&mut self) -> Result<(), Error> {
        loop {
            match self.input.u8()? {
                section::COMMAND => self.read_command()?,
                section::START => break,
                section::FULL => {
                    let (_, name) = self.read_section_name()?;
                    return self.unsupported(format!("device '{name}', whose state comes before the memory"));
                }
                other => return self.malformed(format!("a section of type {other:#04x} before the memory")),
            }
        }
        let (id, name) = self.read_section_name()?;
        let (instance, version) = (self.input.u32()?, self.input.u32()?);
        if name != RAM || instance != 0 {
            return self.unsupported(format!("section '{name}', instance {instance}, which comes in parts"));
        }
        if version != RAM_VERSION {
            return self.unsupported(format!("version {version} of the memory's section"));
        }
        self.opaque.ram_section = id;
        self.read_blocks()?;
        match self.input.u64()? {
            flag::EOS => self.read_footer(),
            entry => self.refuse_entry(entry),
        }
    }

    fn read_section_name(&mut self) -> Result<(u32, String), Error> {
        Ok((self.input.u32()?, self.input.name()?))
    }

    fn read_blocks(&mut self) -> Result<(), Error> {
        let entry = self.input.u64()?;
        if entry & flag::MASK != flag::MEM_SIZE {
            return self.refuse_entry(entry);
        }
        let mut left = entry & !flag::MASK;
        if left > self.limits.ram_bytes {
            let what = format!("{left} bytes of memory, {} are allowed", self.limits.ram_bytes);
            return Err(self.input.error(ErrorKind::Limit, what));
        }
        let addresses = self.configuration.capabilities.iter().any(|name| name == IGNORE_SHARED);
        while left > 0 {
            let name = self.input.name()?;
            let length = self.input.u64()?;
            if length == 0 || length > left || !length.is_multiple_of(PAGE_SIZE as u64) {
                return self.malformed(format!("RAM block '{name}' of {length} bytes, {left} are left"));
            }
            if self.blocks.len() >= self.limits.blocks {
                let what = format!("more than {} RAM blocks", self.limits.blocks);
                return Err(self.input.error(ErrorKind::Limit, what));
            }
            let address = if addresses { Some(self.input.u64()?) } else { None };
            if self.by_name.insert(name.clone(), self.blocks.len()).is_some() {
                return self.malformed(format!("two RAM blocks '{name}'"));
            }
            self.blocks.push(RamBlock { name, length, address });
            left -= length;
        }
        Ok(())
    }

    fn read_footer(&mut self) -> Result<(), Error> {
        let (mark, id) = (self.input.u8()?, self.input.u32()?);
        if mark != section::FOOTER || id != self.opaque.ram_section {
            return self
                .malformed(format!("a section of memory ends with {mark:#04x} {id}, not with its footer"));
        }
        Ok(())
    }

    /// What stands between two sections.
    fn read_between(&mut self) -> Result<(), Error> {
        let Some(kind) = self.input.peek()? else {
            return Err(self.input.error(ErrorKind::Truncated, "it ends before the devices"));
        };
        if kind == section::FULL && self.state != (State::Between { pages: false }) {
            self.state = State::Tail;
            return Ok(());
        }
        self.input.take(1)?;
        match kind {
            section::COMMAND => self.read_command(),
            section::PART | section::END => {
                let id = self.input.u32()?;
                if id != self.opaque.ram_section || self.state == State::Ended {
                    return self
                        .malformed(format!("a part of section {id}, which has not begun or has ended"));
                }
                self.state = State::Pages { last: kind == section::END };
                Ok(())
            }
            section::START => {
                let (_, name) = self.read_section_name()?;
                self.unsupported(format!("section '{name}', which comes in parts"))
            }
            other => self.malformed(format!("a section of type {other:#04x} after the memory's list")),
        }
    }

    /// A command behind the byte that says so, kept as it is.
    fn read_command(&mut self) -> Result<(), Error> {
        self.input.record(true);
        let (number, length) = (self.input.u16()?, self.input.u16()?);
        match COMMANDS.get(usize::from(number)) {
            None => return self.unsupported(format!("command {number}")),
            Some((name, Some(cure))) => return self.unsupported(format!("command {name}: {cure}")),
            Some((_, None)) => self.input.take(usize::from(length))?,
        };
        let command = self.input.recorded();
        if self.opaque.commands.len() + command.len() > MAX_COMMAND_BYTES {
            return Err(self.input.error(ErrorKind::Limit, "too many commands"));
        }
        self.opaque.commands.extend(command);
        Ok(())
    }

    /// One entry of a section of pages: block, offset, whether it is zero. Nothing if the section is over.
    fn read_entry(&mut self, last: bool) -> Result<Option<(usize, u64, bool)>, Error> {
        let entry = self.input.u64()?;
        let offset = entry & !flag::MASK;
        let zero = match entry & flag::MASK & !flag::CONTINUE {
            flag::PAGE => false,
            flag::ZERO => true,
            _ if entry == flag::EOS => {
                self.read_footer()?;
                self.state = if last { State::Ended } else { State::Between { pages: true } };
                return Ok(None);
            }
            _ => return self.refuse_entry(entry),
        };
        let block = match (entry & flag::CONTINUE != 0, self.block) {
            (true, Some(block)) => block,
            (true, None) => return self.malformed("the first page of all continues a block"),
            (false, _) => self.read_block_name()?,
        };
        self.block = Some(block);
        let RamBlock { name, length, .. } = &self.blocks[block];
        if offset >= *length {
            let what = format!("a page at {offset:#x} of RAM block '{name}', which is {length:#x} long");
            return self.malformed(what);
        }
        if !zero {
            self.input.take(PAGE_SIZE)?;
        } else if self.input.u8()? != 0 {
            return self.malformed(format!("a page that is filled with {:#04x}", self.input.last(1)[0]));
        }
        Ok(Some((block, offset, zero)))
    }

    fn read_block_name(&mut self) -> Result<usize, Error> {
        let name = self.input.name()?;
        match self.by_name.get(&name) {
            Some(&block) => Ok(block),
            None => self.malformed(format!("a page of an unknown RAM block '{name}'")),
        }
    }

    fn refuse_entry<T>(&self, entry: u64) -> Result<T, Error> {
        let names = [
            (flag::XBZRLE, "a page in XBZRLE: switch the capability xbzrle off"),
            (flag::HOOK, "RDMA"),
            (flag::COMPRESS_PAGE, "a compressed page: switch the capability compress off"),
            (flag::MULTIFD_FLUSH, "pages in other channels: switch the capability multifd off"),
        ];
        match names.iter().find(|(bit, _)| entry & bit != 0) {
            Some((_, what)) => self.unsupported(*what),
            None => self.malformed(format!("an entry of memory {entry:#018x}")),
        }
    }
}

/// The configuration section, which ends where no further subsection begins.
fn read_configuration<R: Read>(input: &mut Input<R>) -> Result<Configuration, Error> {
    let kind = input.u8()?;
    if kind != section::CONFIGURATION {
        let what = format!("{kind:#04x} instead of a configuration, as very old machine types send it");
        return Err(input.error(ErrorKind::Unsupported, what));
    }
    let length = input.u32()?;
    if length == 0 || length > MAX_MACHINE_NAME {
        return Err(input.error(ErrorKind::Malformed, format!("a machine type of {length} bytes")));
    }
    let Ok(machine) = String::from_utf8(input.take(length as usize)?.to_vec()) else {
        return Err(input.error(ErrorKind::Malformed, "a machine type that is no text"));
    };
    let mut configuration = Configuration { machine, ..Configuration::default() };
    // Each subsection comes at most once, so what the head makes us hold is bounded.
    let mut seen = Vec::new();
    while input.peek()? == Some(section::SUBSECTION) {
        input.take(1)?;
        let (name, version) = (input.name()?, input.u32()?);
        if version != 1 || seen.contains(&name) {
            let what = format!("subsection '{name}' a second time, or in version {version}");
            return Err(input.error(ErrorKind::Unsupported, what));
        }
        match name.as_str() {
            "configuration/target-page-bits" => {
                let bits = input.u32()?;
                if bits != PAGE_BITS {
                    return Err(input.error(ErrorKind::Unsupported, format!("pages of 2^{bits} bytes")));
                }
            }
            "configuration/capabilities" => configuration.capabilities = read_capabilities(input)?,
            "configuration/uuid" => {
                let mut uuid = [0; 16];
                uuid.copy_from_slice(input.take(16)?);
                configuration.uuid = Some(uuid);
            }
            _ => return Err(input.error(ErrorKind::Unsupported, format!("subsection '{name}'"))),
        }
        seen.push(name);
    }
    Ok(configuration)
}

fn read_capabilities<R: Read>(input: &mut Input<R>) -> Result<Vec<String>, Error> {
    let count = input.u32()?;
    if count > MAX_CAPABILITIES {
        return Err(input.error(ErrorKind::Malformed, format!("{count} capabilities")));
    }
    let mut names = Vec::new();
    for _ in 0..count {
        let name = input.name()?;
        if name != IGNORE_SHARED {
            return Err(input.error(ErrorKind::Unsupported, format!("switch the capability {name} off")));
        }
        names.push(name);
    }
    Ok(names)
}
