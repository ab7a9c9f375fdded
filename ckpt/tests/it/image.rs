//! Memory images: what is written, what is refused, what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cdp_types::{IoBuf, MemoryConfig, MemoryDevice, MemoryFaults};
use ckpt::ErrorKind;
use ckpt::memory::{
    Completion, Control, MachineFacts, MemoryPages, PageStore, Progress, QueueStore, Request, Restorer,
    Saver, capacity_for, save_stream,
};
use ckpt::stream::{Content, Limits, Opaque, Page, StreamReader};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::machine::{Draft, Machine, hot, live, page, read};

pub fn facts() -> MachineFacts {
    MachineFacts { qemu_version: "10.0.2".into(), machine_type: "pc-1.0".into(), ..MachineFacts::default() }
}

/// Runs `act` with a control that nobody uses.
pub fn unhindered<T>(act: impl FnOnce(&mut Control<'_>) -> T) -> T {
    let (cancel, mut progress) = (AtomicBool::new(false), |_: &Progress| {});
    act(&mut Control { cancel: &cancel, progress: &mut progress })
}

pub fn save<S: PageStore>(stream: &[u8], store: S) -> Result<(S, Progress), ckpt::Error> {
    let reader = StreamReader::open(stream, Limits::default())?;
    unhindered(|control| save_stream(reader, store, facts(), control))
}

pub fn restore<S: PageStore>(store: S) -> Result<(S, Vec<u8>), ckpt::Error> {
    let mut stream = Vec::new();
    let (store, _) = unhindered(|control| Restorer::open(store, control)?.stream_to(&mut stream, control))?;
    Ok((store, stream))
}

/// A volume that outlives who uses it.
#[derive(Clone, Debug)]
struct Shared(Arc<std::sync::Mutex<MemoryPages>>);

impl PageStore for Shared {
    fn capacity(&self) -> u64 {
        self.0.lock().unwrap().capacity()
    }

    fn submit(&mut self, token: u64, request: Request) {
        self.0.lock().unwrap().submit(token, request);
    }

    fn completed(&mut self, patience: Duration, done: &mut Vec<Completion>) -> Result<(), ckpt::Error> {
        self.0.lock().unwrap().completed(patience, done)
    }

    fn in_flight(&self) -> usize {
        self.0.lock().unwrap().in_flight()
    }
}

fn blank() -> MemoryPages {
    MemoryPages::new(1 << 32)
}

fn some() -> Machine {
    Machine::new(&[("pc.ram", &[0, 1, 2, 0, 0, 3]), ("vga", &[7, 0])])
}

#[test]
fn what_was_saved_is_restored() {
    let (machine, opaque) = read(&hot(&some())[..]).unwrap();
    let (pages, progress) = save(&hot(&some()), blank()).unwrap();
    assert_eq!((progress.total, progress.received, progress.zero, progress.changed), (8, 8, 4, 4));
    let (_, stream) = restore(pages).unwrap();
    assert_eq!(read(&stream[..]).unwrap(), (machine, opaque));
}

#[test]
fn only_what_changed_is_written() {
    let mut machine = some();
    let (pages, _) = save(&hot(&machine), blank()).unwrap();
    let (pages, progress) = save(&hot(&machine), pages).unwrap();
    assert_eq!((progress.changed, progress.stored_bytes), (0, 0));
    // One page changes, one becomes zero; a block comes in front.
    machine.blocks[0].pages[1] = 9;
    machine.blocks[0].pages[5] = 0;
    machine.blocks.insert(0, Machine::new(&[("rom", &[4, 4])]).blocks.remove(0));
    let (pages, progress) = save(&hot(&machine), pages).unwrap();
    // The head does not differ, the tail does not: three pages, of which two are the new block's.
    assert_eq!((progress.changed, progress.stored_bytes), (4, 3 * 4096));
    assert_eq!(read(&restore(pages).unwrap().1[..]).unwrap().0, machine);
}

#[test]
fn blocks_that_have_gone_take_no_space() {
    let (pages, _) = save(&hot(&some()), blank()).unwrap();
    let used = pages.bytes_used();
    let smaller = Machine::new(&[("pc.ram", &[0, 1])]);
    let (pages, _) = save(&hot(&smaller), pages).unwrap();
    assert_eq!(pages.bytes_used(), used - 3 * 4096);
    assert_eq!(read(&restore(pages).unwrap().1[..]).unwrap().0, smaller);
}

#[test]
fn blocks_that_have_gone_make_room_where_there_is_none() {
    let machine = |name: &str, content: u32| Machine::new(&[(name, &[content, 0, 2])]);
    let capacity = capacity_for(&machine("mem0", 1).ram_blocks(), 1 << 20);
    let (mut pages, _) = save(&hot(&machine("mem0", 1)), MemoryPages::new(capacity)).unwrap();
    let used = pages.bytes_used();
    // Each name is a new block's, and the volume has room for one.
    for (name, content) in [("mem1", 3), ("mem2", 4), ("mem0", 5)] {
        let machine = machine(name, content);
        (pages, _) = save(&hot(&machine), pages).unwrap();
        assert_eq!(pages.bytes_used(), used);
        let (restored, stream) = restore(pages).unwrap();
        assert_eq!(read(&stream[..]).unwrap().0, machine);
        pages = restored;
    }
}

#[test]
fn what_an_unfinished_image_left_anywhere_takes_no_space_after_the_next() {
    let machine = Machine::new(&[("pc.ram", &[1, 2, 3])]);
    let (mut pages, _) = save(&hot(&machine), blank()).unwrap();
    let used = pages.bytes_used();
    // Saving it once more ends early, with something behind the block that nobody uses any more.
    let larger = Machine::new(&[("pc.ram", &[1, 2, 3, 4])]);
    let slot = 2 << 20;
    pages = unhindered(|control| {
        let store = Shared(Arc::new(std::sync::Mutex::new(pages)));
        drop(Saver::begin(store.clone(), &larger.ram_blocks(), facts(), control).unwrap());
        Arc::into_inner(store.0).unwrap().into_inner().unwrap()
    });
    pages.rot(slot + 5 * 4096);
    let (pages, _) = save(&hot(&machine), pages).unwrap();
    assert_eq!(pages.bytes_used(), used);
}

#[test]
fn the_last_of_many_versions_of_a_page_counts_in_any_order_of_requests() {
    for seed in 0..8 {
        let faults = MemoryFaults { seed, max_delay: Duration::from_millis(3), errors_per_million: 0 };
        let config = MemoryConfig { faults: Some(faults), ..MemoryConfig::new(1 << 30) };
        let device = Arc::new(MemoryDevice::new(config).unwrap());
        let machine = Machine::new(&[("pc.ram", &[0; 3000])]);
        let saved = unhindered(|control| {
            let store = QueueStore::open(device.clone() as _)?;
            let mut saver = Saver::begin(store, &machine.ram_blocks(), facts(), control)?;
            for version in 1..=5 {
                let content = page(version);
                for at in (0..3000).filter(|at| version == 1 || at % version == 0) {
                    let content = if version == 4 { Content::Zero } else { Content::Bytes(&content) };
                    saver.page(&Page { block: 0, offset: u64::from(at) * 4096, content }, control)?;
                }
            }
            saver.finish(&Opaque::default(), control)
        });
        saved.unwrap();
        let range = cdp_types::ByteRange::new(2 << 20, 3000 * 4096);
        for (at, bytes) in device.content(range).unwrap().chunks(4096).enumerate() {
            let last = (1..=5).rev().find(|version| *version == 1 || at % version == 0).unwrap();
            let expected = page(if last == 4 { 0 } else { last as u32 });
            assert!(bytes == expected, "seed {seed}, page {at} has {}", bytes[0]);
        }
    }
}

#[test]
fn a_page_that_never_came_leaves_no_image() {
    let machine = some();
    let mut draft = Draft::begin(&machine, &[]);
    draft.begin_section(2);
    for (block, at, number) in machine.pages().into_iter().skip(1) {
        draft.page(&machine, block, at, number);
    }
    draft.end_section();
    let stream = draft.end(&machine);
    let device = Arc::new(MemoryDevice::new(MemoryConfig::new(1 << 32)).unwrap());
    let error = save(&stream, QueueStore::open(device.clone() as _).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incomplete);
    let again = || QueueStore::open(device.clone() as _).unwrap();
    assert_eq!(restore(again()).unwrap_err().kind(), ErrorKind::Unfinished);
    // Saving over what was left is right again.
    save(&hot(&machine), again()).unwrap();
    assert_eq!(read(&restore(again()).unwrap().1[..]).unwrap().0, machine);
}

#[test]
fn a_block_that_is_left_out_as_a_shared_file_is_restored_as_left_out() {
    let machine = some();
    let mut draft = Draft::begin(&machine, &["x-ignore-shared"]);
    draft.begin_section(2);
    for (block, at, number) in machine.pages().into_iter().filter(|(block, ..)| *block == 1) {
        draft.page(&machine, block, at, number);
    }
    draft.end_section();
    let stream = draft.end(&machine);
    let (pages, _) = save(&stream, blank()).unwrap();
    let (_, restored) = restore(pages).unwrap();
    let (machine, _) = read(&restored[..]).unwrap();
    assert_eq!(machine.blocks[0].pages, [u32::MAX; 6]);
    assert_eq!(machine.blocks[1].pages, [7, 0]);
}

#[test]
fn what_the_volume_holds_is_checked() {
    assert_eq!(restore(blank()).unwrap_err().kind(), ErrorKind::NoImage);
    let mut foreign = blank();
    foreign.rot(17);
    assert_eq!(restore(foreign).unwrap_err().kind(), ErrorKind::NoImage);
    // Header, an entry, and the head, which has the third slot.
    for (at, kind) in [(50, ErrorKind::Damaged), (4100, ErrorKind::Damaged), (6 << 20, ErrorKind::Damaged)] {
        let (mut pages, _) = save(&hot(&some()), blank()).unwrap();
        pages.rot(at);
        assert_eq!(restore(pages).unwrap_err().kind(), kind, "byte {at}");
    }
}

#[test]
fn an_image_that_reaches_behind_its_volume_is_damaged() {
    let (mut pages, _) = save(&hot(&some()), blank()).unwrap();
    let header = IoBuf::zeroed(2 << 20);
    pages.submit(0, Request::Read { offset: 0, into: header.share() });
    let cut_off = || {
        let mut pages = MemoryPages::new(4 << 20);
        pages.submit(0, Request::Write { offset: 0, from: header.share() });
        pages.completed(Duration::ZERO, &mut Vec::new()).unwrap();
        pages
    };
    assert_eq!(restore(cut_off()).unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(save(&hot(&some()), cut_off()).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn a_volume_that_is_too_small_is_refused_before_anything_is_written() {
    let blocks = some().ram_blocks();
    let needed = capacity_for(&blocks, 1 << 20);
    save(&hot(&some()), MemoryPages::new(needed)).unwrap();
    for capacity in [0, 2 << 20, 4 << 20] {
        let store = Shared(Arc::new(std::sync::Mutex::new(MemoryPages::new(capacity))));
        let error = save(&hot(&some()), store.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let pages = store.0.lock().unwrap();
        assert_eq!((pages.bytes_written(), pages.flushes()), (0, 0), "{capacity} bytes");
    }
}

#[test]
fn a_header_that_is_longer_than_a_write_may_be_comes_back() {
    let mut config = MemoryConfig::new(1 << 32);
    config.info.max_write_bytes = 256 << 10;
    let device = Arc::new(MemoryDevice::new(config).unwrap());
    let store = || QueueStore::open(device.clone() as _).unwrap();
    let one_page: &[u32] = &[1];
    let names: Vec<String> = (0..900).map(|number| format!("dimm{number}")).collect();
    let blocks: Vec<(&str, &[u32])> = names.iter().map(|name| (name.as_str(), one_page)).collect();
    let machine = Machine::new(&blocks);
    save(&hot(&machine), store()).unwrap();
    unhindered(|control| {
        let restorer = Restorer::open(store(), control).unwrap();
        assert_eq!(restorer.image().blocks(), machine.ram_blocks());
    });
}

#[test]
fn a_volume_that_fails_ends_it_with_an_error() {
    for seed in 0..10 {
        let faults = MemoryFaults { seed, max_delay: Duration::ZERO, errors_per_million: 200_000 };
        let config = MemoryConfig { faults: Some(faults), ..MemoryConfig::new(1 << 32) };
        let device = Arc::new(MemoryDevice::new(config).unwrap());
        let pages: Vec<u32> = (1..5000).collect();
        let machine = Machine::new(&[("pc.ram", &pages)]);
        let error = save(&hot(&machine), QueueStore::open(device as _).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store, "seed {seed}");
    }
}

#[test]
fn both_ways_can_be_cancelled_and_tell_how_far_they_are() {
    let pages: Vec<u32> = (0..5000).collect();
    let machine = Machine::new(&[("pc.ram", &pages)]);
    let stream = live(&machine, &mut SmallRng::seed_from_u64(3));
    let cancel = AtomicBool::new(false);
    let mut seen = Vec::new();
    let mut progress = |progress: &Progress| {
        seen.push(progress.received);
        cancel.store(true, Ordering::Relaxed);
    };
    let mut control = Control { cancel: &cancel, progress: &mut progress };
    let reader = StreamReader::open(&stream[..], Limits::default()).unwrap();
    let error = save_stream(reader, blank(), facts(), &mut control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);

    let (pages, _) = save(&stream, blank()).unwrap();
    cancel.store(false, Ordering::Relaxed);
    let restorer = Restorer::open(pages, &mut control).unwrap();
    let error = restorer.stream_to(std::io::sink(), &mut control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(seen.len(), 2, "nobody asked before");
    assert!(seen[0] > 0 && seen[0] < 5000);
}

#[test]
fn facts_come_back() {
    let (pages, _) = save(&hot(&some()), blank()).unwrap();
    unhindered(|control| {
        let restorer = Restorer::open(pages, control).unwrap();
        assert_eq!(restorer.image().facts, facts());
        assert_eq!(restorer.image().blocks(), some().ram_blocks());
    });
}
