//! What is read out of a stream, what is refused, and how.

use ckpt::stream::{Content, Limits, StreamReader, StreamWriter};
use ckpt::{ErrorKind, Place};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::machine::{Draft, Machine, Pieces, hot, live, page, read};

fn some() -> Machine {
    Machine::new(&[("pc.ram", &[0, 1, 2, 0, 0, 3]), ("vga", &[7, 0])])
}

/// The kind and the text of what a stream is refused with.
fn refusal(bytes: &[u8]) -> (ErrorKind, String) {
    let error = read(bytes).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn a_hot_and_a_live_stream_say_the_same_of_memory_and_devices() {
    let machine = some();
    let (from_hot, opaque) = read(&hot(&machine)[..]).unwrap();
    assert_eq!(from_hot, machine);
    assert!(opaque.commands.is_empty());
    for seed in 0..50 {
        let bytes = live(&machine, &mut SmallRng::seed_from_u64(seed));
        let (from_live, opaque) = read(&bytes[..]).unwrap();
        assert_eq!(from_live, machine, "seed {seed}");
        assert_eq!(opaque.commands, [8, 0, 11, 0, 0]);
    }
}

#[test]
fn every_cut_is_noticed_at_its_byte() {
    let bytes = live(&some(), &mut SmallRng::seed_from_u64(1));
    for cut in 0..bytes.len() {
        let error = read(&bytes[..cut]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "cut at {cut}");
        assert_eq!(error.place(), Place::Stream(cut as u64));
    }
    read(&bytes[..]).unwrap();
}

#[test]
fn sizes_of_reads_do_not_matter() {
    for seed in 0..30 {
        let mut random = SmallRng::seed_from_u64(seed);
        let machine = Machine::random(&mut random);
        let bytes = live(&machine, &mut random);
        assert_eq!(read(Pieces { bytes: &bytes, random }).unwrap(), read(&bytes[..]).unwrap(), "seed {seed}");
    }
}

#[test]
fn what_is_written_is_read_as_the_same() {
    let machine = some();
    let (_, opaque) = read(&live(&machine, &mut SmallRng::seed_from_u64(2))[..]).unwrap();
    let blocks = machine.ram_blocks();
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::new(&mut bytes, &opaque, &blocks).unwrap();
    for (block, at, number) in machine.pages().into_iter().rev() {
        let content = page(number);
        let content = if number == 0 { Content::Zero } else { Content::Bytes(&content) };
        writer.page(block, at as u64 * 4096, content).unwrap();
    }
    assert_eq!(writer.finish().unwrap(), bytes.len() as u64);
    assert_eq!(read(&bytes[..]).unwrap(), (machine, opaque));
}

#[test]
fn a_page_is_written_once_and_none_is_left_out() {
    let machine = some();
    let (_, opaque) = read(&hot(&machine)[..]).unwrap();
    let blocks = machine.ram_blocks();
    let mut writer = StreamWriter::new(std::io::sink(), &opaque, &blocks).unwrap();
    writer.page(0, 4096, Content::Zero).unwrap();
    for (block, offset) in [(0, 4096), (0, 6 * 4096), (0, 1), (2, 0)] {
        assert_eq!(writer.page(block, offset, Content::Zero).unwrap_err().kind(), ErrorKind::Incomplete);
    }
    let error = writer.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incomplete);
    assert!(
        error.to_string().contains("5 of the 6 pages of RAM block 'pc.ram' never came, the first at 0x0")
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let machine = some();
    let inside = |entry: u64| {
        let mut draft = Draft::begin(&machine, &[]);
        draft.begin_section(2);
        draft.number(entry);
        draft.bytes
    };
    let between = |bytes: &[u8]| {
        let mut draft = Draft::begin(&machine, &[]);
        draft.put(bytes);
        draft.bytes
    };
    let early = |bytes: &[u8]| {
        let whole = Draft::begin(&machine, &[]).bytes;
        let start = whole.windows(4).position(|bytes| bytes == b"\x03ram").unwrap() - 5;
        [&whole[..start], bytes].concat()
    };
    let unsupported = [
        (inside(0x40), "xbzrle"),
        (inside(0x80), "RDMA"),
        (inside(0x100), "compress"),
        (inside(0x200), "multifd"),
        (between(b"\x08\0\x01\0\0"), "OPEN_RETURN_PATH: switch the capability return-path off"),
        (between(b"\x08\0\x03\0\0"), "postcopy-ram"),
        (between(b"\x08\0\x07\0\x04"), "PACKAGED"),
        (between(b"\x08\0\x63\0\0"), "command 99"),
        (between(b"\x01\0\0\0\x05\x0cdirty-bitmap"), "dirty-bitmap"),
        (early(b"\x04\0\0\0\x01\x10virtio-mem-early\0\0"), "virtio-mem-early"),
        (early(b"\x01\0\0\0\x01\x05block\0\0\0\0\0\0\0\x01"), "'block'"),
        (early(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x05"), "version 5"),
        (early(b"\x05\x14configuration/answer\0\0\0\x01"), "configuration/answer"),
        (Draft::begin(&machine, &["mapped-ram"]).bytes, "mapped-ram"),
        (b"QEVM\0\0\0\x02".to_vec(), "version 2"),
        (b"QEVM\0\0\0\x03\x01".to_vec(), "very old machine types"),
    ];
    for (bytes, name) in unsupported {
        let (kind, text) = refusal(&bytes);
        assert_eq!(kind, ErrorKind::Unsupported, "{text}");
        assert!(text.contains(name), "'{text}' does not mention {name}");
    }
}

#[test]
fn what_qemu_never_sends_is_refused() {
    let machine = some();
    let pages = |act: &dyn Fn(&mut Draft)| {
        let mut draft = Draft::begin(&machine, &[]);
        draft.begin_section(2);
        act(&mut draft);
        draft.bytes
    };
    let malformed = [
        (b"KVM!\0\0\0\x03".to_vec(), "QEVM"),
        (pages(&|draft| draft.number(0x28)), "continues"),
        (pages(&|draft| draft.number(0x0a)), "0x000000000000000a"),
        (pages(&|draft| draft.number(0x1010)), "0x0000000000001010"),
        (
            pages(&|draft| draft.page(&machine, 1, 2, 0)),
            "a page at 0x2000 of RAM block 'vga', which is 0x2000",
        ),
        (pages(&|draft| draft.put(b"\0\0\0\0\0\0\0\x08\x07unknown")), "unknown"),
        (pages(&|draft| draft.put(b"\0\0\0\0\0\0\0\x02\x03vga\x01")), "filled with 0x01"),
        (pages(&|draft| draft.put(&[0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 3])), "footer"),
        (pages(&|draft| (draft.end_section(), draft.put(&[2, 0, 0, 0, 7])).1), "section 7"),
        (pages(&|draft| (draft.end_section(), draft.put(&[0])).1), "0x00"),
        ([&Draft::begin(&machine, &[]).bytes[..], &[4, 0, 0, 0, 1]].concat(), "0x04"),
        (Draft::begin(&Machine::new(&[("a", &[1]), ("a", &[1])]), &[]).bytes, "two RAM blocks 'a'"),
        (Draft::begin(&Machine::new(&[("", &[1])]), &[]).bytes, "empty"),
    ];
    for (bytes, name) in malformed {
        let (kind, text) = refusal(&bytes);
        assert_eq!(kind, ErrorKind::Malformed, "{text}");
        assert!(text.contains(name), "'{text}' does not mention {name}");
    }
}

#[test]
fn limits_hold() {
    let names: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let blocks: Vec<(&str, &[u32])> = names.iter().map(|name| (name.as_str(), &[1][..])).collect();
    assert_eq!(refusal(&hot(&Machine::new(&blocks))).0, ErrorKind::Limit);
    let large = Machine::new(&[("a", &vec![0; (64 << 20) / 4096 + 1])]);
    assert_eq!(refusal(&hot(&large)).0, ErrorKind::Limit);
    let mut devices = some();
    devices.device = vec![4; 1 << 20];
    assert_eq!(refusal(&hot(&devices)).0, ErrorKind::Limit);
}

#[test]
fn an_endless_stream_of_commands_ends() {
    let mut draft = Draft::begin(&some(), &[]);
    for _ in 0..3 {
        draft.put(b"\x08\0\x0b\x80\0");
        draft.put(&[0; 0x8000]);
    }
    assert_eq!(refusal(&draft.bytes).0, ErrorKind::Limit);
}

#[test]
fn the_machine_can_be_known_before_its_memory_is_read() {
    let bytes = Draft::begin(&some(), &["x-ignore-shared"]).bytes;
    let reader = StreamReader::open(&bytes[..], Limits::default()).unwrap();
    assert_eq!(reader.configuration().machine, "pc-1.0");
    assert_eq!(reader.configuration().capabilities, ["x-ignore-shared"]);
    assert_eq!(reader.blocks()[1].address, Some(0x1000_0000));
    assert_eq!(reader.position(), bytes.len() as u64);
    assert_eq!(reader.into_opaque().unwrap_err().kind(), ErrorKind::Incomplete);
}
