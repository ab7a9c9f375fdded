//! Made-up machines, and the streams that QEMU would send of them: written down from its sources, not with the code
//! that is tested.

use std::io::Read;

use ckpt::PAGE_SIZE;
use ckpt::stream::{Content, Limits, Opaque, RamBlock, StreamReader};
use rand::Rng;
use rand::rngs::SmallRng;

pub const PAGE: u64 = PAGE_SIZE as u64;
pub const ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// One block's pages; a page is its number, and 0 is a page of zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub name: String,
    pub pages: Vec<u32>,
}

/// A machine: its memory, and how it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub blocks: Vec<Block>,
    /// State of its one device.
    pub device: Vec<u8>,
}

pub fn page(number: u32) -> [u8; PAGE_SIZE] {
    let mut bytes = ZERO;
    if number != 0 {
        for chunk in bytes.chunks_exact_mut(4) {
            chunk.copy_from_slice(&number.to_le_bytes());
        }
    }
    bytes
}

impl Machine {
    pub fn new(blocks: &[(&str, &[u32])]) -> Self {
        let block = |&(name, pages): &(&str, &[u32])| Block { name: name.to_owned(), pages: pages.to_vec() };
        Self { blocks: blocks.iter().map(block).collect(), device: b"registers".to_vec() }
    }

    /// Some blocks of some pages, of which some are zero.
    pub fn random(random: &mut SmallRng) -> Self {
        let names = ["pc.ram", "pc.bios", "0000:00:02.0/vga.vram", "/rom@etc/acpi/tables", "x"];
        let first = random.random_range(0..names.len());
        let block = |name: &&str| Block { name: (*name).to_owned(), pages: Vec::new() };
        let mut blocks: Vec<_> =
            names.iter().cycle().skip(first).take(random.random_range(1..5)).map(block).collect();
        for block in &mut blocks {
            let most = if random.random_ratio(1, 8) { 2000 } else { 40 };
            let count = random.random_range(1..most);
            let number = |_| if random.random_ratio(1, 3) { 0 } else { random.random_range(1..9) };
            block.pages = (0..count).map(number).collect();
        }
        let device = (0..random.random_range(0..3000)).map(|_| random.random()).collect();
        Self { blocks, device }
    }

    /// Changes some of its pages.
    pub fn run(&mut self, random: &mut SmallRng) {
        for block in &mut self.blocks {
            for _ in 0..random.random_range(0..8) {
                let at = random.random_range(0..block.pages.len());
                block.pages[at] = if random.random_ratio(1, 4) { 0 } else { random.random() };
            }
        }
        self.device.push(random.random());
    }

    pub fn ram_blocks(&self) -> Vec<RamBlock> {
        let block = |block: &Block| RamBlock {
            name: block.name.clone(),
            length: block.pages.len() as u64 * PAGE,
            address: None,
        };
        self.blocks.iter().map(block).collect()
    }

    /// All pages in order, as block, page and number.
    pub fn pages(&self) -> Vec<(usize, usize, u32)> {
        let pages = |(block, content): (usize, &Block)| {
            content.pages.iter().enumerate().map(move |(at, &number)| (block, at, number)).collect::<Vec<_>>()
        };
        self.blocks.iter().enumerate().flat_map(pages).collect()
    }
}

/// A stream as QEMU would build it.
#[derive(Debug, Default)]
pub struct Draft {
    pub bytes: Vec<u8>,
    block: Option<usize>,
}

pub const RAM_SECTION: u32 = 2;

impl Draft {
    /// Up to and with the START section.
    pub fn begin(machine: &Machine, capabilities: &[&str]) -> Self {
        let mut draft = Self::default();
        draft.put(b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-1.0");
        draft.put(b"\x05\x1aconfiguration/capabilities\0\0\0\x01");
        draft.put(&(capabilities.len() as u32).to_be_bytes());
        capabilities.iter().for_each(|name| draft.name(name));
        draft.put(&[1]);
        draft.put(&RAM_SECTION.to_be_bytes());
        draft.name("ram");
        draft.put(&[0, 0, 0, 0, 0, 0, 0, 4]);
        let blocks = machine.ram_blocks();
        draft.number(blocks.iter().map(|block| block.length).sum::<u64>() | 4);
        for block in &blocks {
            draft.name(&block.name);
            draft.number(block.length);
            if capabilities.contains(&"x-ignore-shared") {
                draft.number(0x1000_0000);
            }
        }
        draft.end_section();
        draft
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    pub fn number(&mut self, number: u64) {
        self.put(&number.to_be_bytes());
    }

    pub fn name(&mut self, name: &str) {
        self.put(&[name.len() as u8]);
        self.put(name.as_bytes());
    }

    /// Begins a PART (2) or an END (3).
    pub fn begin_section(&mut self, kind: u8) {
        self.put(&[kind]);
        self.put(&RAM_SECTION.to_be_bytes());
    }

    pub fn end_section(&mut self) {
        self.number(0x10);
        self.put(&[0x7e]);
        self.put(&RAM_SECTION.to_be_bytes());
    }

    pub fn page(&mut self, machine: &Machine, block: usize, at: usize, number: u32) {
        let kind = if number == 0 { 2 } else { 8 };
        if self.block == Some(block) {
            self.number((at as u64 * PAGE) | kind | 0x20);
        } else {
            self.number((at as u64 * PAGE) | kind);
            self.name(&machine.blocks[block].name);
            self.block = Some(block);
        }
        if number == 0 { self.put(&[0]) } else { self.put(&page(number)) }
    }

    /// The device, EOF and the description.
    pub fn end(mut self, machine: &Machine) -> Vec<u8> {
        self.put(&[4, 0, 0, 0, 9]);
        self.name("cpu");
        self.put(&[0, 0, 0, 0, 0, 0, 0, 1]);
        self.put(&machine.device);
        self.put(&[0x7e, 0, 0, 0, 9, 0, 6]);
        let json = br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0}]}"#;
        self.put(&(json.len() as u32).to_be_bytes());
        self.put(json);
        self.bytes
    }
}

/// As a background snapshot, in one part: every page once.
pub fn hot(machine: &Machine) -> Vec<u8> {
    let mut draft = Draft::begin(machine, &[]);
    draft.begin_section(2);
    for (block, at, number) in machine.pages() {
        draft.page(machine, block, at, number);
    }
    draft.end_section();
    draft.end(machine)
}

/// One round of a live migration that goes on: every page.
pub fn round(machine: &Machine) -> Vec<u8> {
    let mut draft = Draft::default();
    draft.begin_section(2);
    for (block, at, number) in machine.pages() {
        draft.page(machine, block, at, number);
    }
    draft.end_section();
    draft.bytes
}

/// As a live migration: parts of random length; some pages come early with other content; a command before the END.
pub fn live(machine: &Machine, random: &mut SmallRng) -> Vec<u8> {
    let mut draft = Draft::begin(machine, &[]);
    let mut again = Vec::new();
    draft.begin_section(2);
    for (block, at, number) in machine.pages() {
        if random.random_ratio(1, 50) {
            draft.end_section();
            draft.begin_section(2);
        }
        if random.random_ratio(1, 4) {
            draft.page(machine, block, at, random.random_range(0..5));
            again.push((block, at, number));
        } else {
            draft.page(machine, block, at, number);
        }
    }
    draft.end_section();
    draft.put(&[8, 0, 11, 0, 0]);
    draft.begin_section(3);
    for (block, at, number) in again {
        draft.page(machine, block, at, number);
    }
    draft.end_section();
    draft.end(machine)
}

/// Gives what it has in pieces of random size.
#[derive(Debug)]
pub struct Pieces<'a> {
    pub bytes: &'a [u8],
    pub random: SmallRng,
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = if self.random.random_ratio(1, 2) { 12 } else { 10_000 };
        let count = self.random.random_range(1..most).min(into.len());
        self.bytes.read(&mut into[..count])
    }
}

/// What a stream says, whole: the machine and what is not memory.
pub fn read(from: impl Read) -> Result<(Machine, Opaque), ckpt::Error> {
    let limits = Limits { blocks: 16, ram_bytes: 64 << 20, device_bytes: 1 << 20 };
    let mut reader = StreamReader::open(from, limits)?;
    let empty = |block: &RamBlock| Block {
        name: block.name.clone(),
        pages: vec![u32::MAX; (block.length / PAGE) as usize],
    };
    let mut machine = Machine { blocks: reader.blocks().iter().map(empty).collect(), device: Vec::new() };
    while let Some(page) = reader.next_page()? {
        let number = match page.content {
            Content::Zero => 0,
            Content::Bytes(bytes) => u32::from_le_bytes(bytes[100..104].try_into().unwrap()),
        };
        machine.blocks[page.block].pages[(page.offset / PAGE) as usize] = number;
    }
    let opaque = reader.into_opaque()?;
    // Behind the header of its section, before its footer.
    let end = opaque.tail.windows(7).rposition(|bytes| bytes == [0x7e, 0, 0, 0, 9, 0, 6]).unwrap_or(17);
    machine.device = opaque.tail.get(17..end).unwrap_or_default().to_vec();
    Ok((machine, opaque))
}
