//! QEMU's migration stream, as `migrate` to a Unix socket sends it: QEMU 7.2 to 10.0, x86, one channel.
//!
//! Integers are big-endian. What is said here was read in the sources of QEMU 7.2 and 10.0.2; the functions are the
//! same in both unless a version is named.
//!
//! ```text
//!  magic "QEVM", version 3                                                 head
//!  07 configuration: machine type, subsections 05 …                        head
//!  01 START  id "ram" 0 4 │ MEM_SIZE total, blocks, EOS │ 7e id
//!  02 PART   id           │ pages, EOS                  │ 7e id            any number
//!  08 COMMAND             │ number, length, bytes                          live, 10.0: SWITCHOVER_START
//!  03 END    id           │ pages, EOS                  │ 7e id            not in a background snapshot
//!  04 FULL   id name …    │ a device, no length         │ 7e id            tail: any number
//!  00 EOF                                                                  tail
//!  06 VMDESCRIPTION       │ length, JSON                                   tail
//! ```
//!
//! # Where the devices begin, and why that is certain
//!
//! A device's section has no length, and its bytes may look like anything, so it cannot be stepped over. It need not:
//!
//! - `migration.c`: `migration_thread` and `bg_migration_thread` both begin with `qemu_savevm_state_header` and
//!   `qemu_savevm_state_setup`. The latter (`savevm.c`) writes a START section for each handler with `save_setup`. On
//!   x86 these are `ram` and, if asked for or passed through, `dirty-bitmap` (`block-dirty-bitmap.c`), `block` (7.2,
//!   `block.c`) and VFIO devices: refused by name. From 8.0 on it also writes FULL sections of devices with
//!   `early_setup`, of which there is one, `virtio-mem`, whose priority puts it before `ram`: refused by name.
//! - Live, `qemu_savevm_state_iterate` writes PART sections of what was started, again and again;
//!   `migration_completion` stops the guest, sends `SWITCHOVER_START` (10.0, `migration_switchover_start`) and calls
//!   `qemu_savevm_state_complete_precopy`: first END sections of what was started (`…_iterable`), then FULL
//!   sections, EOF and VMDESCRIPTION (`…_non_iterable`). Nothing follows.
//! - A background snapshot writes what `…_non_iterable` writes into a buffer, while the guest is stopped, then PART
//!   sections until `ram` is through, and the buffer behind them (`bg_migration_completion`). There is no END.
//!
//! So memory is over at the first FULL section, and from there to the end all is *tail*. Sections of `ram` can be read
//! exactly, so the reader always knows whether it stands between two sections.
//!
//! # Whether the tail is whole
//!
//! It ends with `00 06`, four bytes of length and JSON of that length (`qemu_savevm_state_complete_precopy_non_iterable`;
//! only machine types up to 2.2 leave it out, `should_send_vmdesc`). `json-writer.c` escapes control characters, so
//! the JSON begins where, looking backwards from the end, the last text does, or up to four bytes later, if bytes of
//! its length look like text. It names the devices in order; the first must be the first section's.
//!
//! # Memory
//!
//! `ram.c`. Each entry is eight bytes, an offset whose low twelve bits are flags (`ram.h`):
//!
//! | flags | follows | from |
//! | --- | --- | --- |
//! | MEM_SIZE 004 | for each block: length ‖ name, u64 used length, with `x-ignore-shared` u64 address; until the used lengths add up to the offset | `ram_save_setup` |
//! | ZERO 002 | block, one zero byte | `save_zero_page` (7.2 `save_zero_page_to_file`) |
//! | PAGE 008 | block, 4096 bytes | `save_normal_page` |
//! | EOS 010 | end of the section | `ram_save_setup`, `ram_save_iterate`, `ram_save_complete` |
//!
//! *Block* is length ‖ name, or nothing with CONTINUE 020: the same as before, across sections too
//! (`save_page_header`, `last_sent_block`). Refused by name: XBZRLE 040, HOOK 080 (RDMA), COMPRESS_PAGE 100 (until
//! 9.0), MULTIFD_FLUSH 200. A cancelled migration may leave a section without EOS (`ram_save_iterate`): cut short.
//!
//! Every page of every block comes at least once: `ram_list_init_bitmaps` sets all bits in both modes. Exceptions are
//! memory that virtio-mem has unplugged (`migration_bitmap_clear_discarded_pages`; refused, see above), what the
//! guest reports as free (`qemu_guest_free_page_hint`: virtio-balloon with `free-page-hint=on`), and with
//! `x-ignore-shared` blocks that are shared files (`migrate_ram_is_ignored`).
//!
//! The configuration has no length either, but its subsections are known: `vmstate_configuration` in `savevm.c`.

mod input;
mod reader;
mod tail;
mod writer;

pub use reader::{Configuration, Page, StreamReader};
pub use writer::StreamWriter;

/// "QEVM" (`QEMU_VM_FILE_MAGIC`).
pub(crate) const MAGIC: u32 = 0x5145_564d;
/// `QEMU_VM_FILE_VERSION`.
pub(crate) const VERSION: u32 = 3;
/// The version of the section `ram` (`ram_mig_init`).
pub(crate) const RAM_VERSION: u32 = 4;
/// The name of the section of memory.
pub(crate) const RAM: &str = "ram";

/// What a section, or what stands between sections, begins with (`savevm.h`).
pub(crate) mod section {
    pub(crate) const EOF: u8 = 0x00;
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const END: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const VMDESCRIPTION: u8 = 0x06;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// The low bits of an entry of memory (`ram.h`).
pub(crate) mod flag {
    pub(crate) const ZERO: u64 = 0x002;
    pub(crate) const MEM_SIZE: u64 = 0x004;
    pub(crate) const PAGE: u64 = 0x008;
    pub(crate) const EOS: u64 = 0x010;
    pub(crate) const CONTINUE: u64 = 0x020;
    pub(crate) const XBZRLE: u64 = 0x040;
    pub(crate) const HOOK: u64 = 0x080;
    pub(crate) const COMPRESS_PAGE: u64 = 0x100;
    pub(crate) const MULTIFD_FLUSH: u64 = 0x200;
    pub(crate) const MASK: u64 = 0xfff;
}

/// The most that state of devices may be, in bytes, unless a reader is told otherwise; and in any case if it is to be kept.
pub(crate) const DEVICE_BYTES: usize = 256 << 20;

/// What a stream may make its reader hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// RAM blocks: each ROM of a device is one.
    pub blocks: usize,
    /// Memory of the machine, in bytes; the reader's users keep a bit for each of its pages.
    pub ram_bytes: u64,
    /// State of all devices, in bytes: usually under a megabyte, tens of them with a graphics card.
    pub device_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { blocks: 2048, ram_bytes: 16 << 40, device_bytes: DEVICE_BYTES }
    }
}

/// A piece of a machine's memory, as QEMU names it: `pc.ram`, `0000:00:02.0/vga.vram`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name; unique in a machine, at most 255 bytes, the same at every start with the same options.
    pub name: String,
    /// Its used length, in bytes: a multiple of 4096, never 0.
    pub length: u64,
    /// Where the guest sees it, if the stream says so, which it does with `x-ignore-shared`.
    pub address: Option<u64>,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Zeroes.
    Zero,
    /// These bytes.
    Bytes(&'a [u8; crate::PAGE_SIZE]),
}

/// All of a stream that is not memory, in order, to be sent again as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opaque {
    /// From the magic to the end of the configuration.
    pub head: Vec<u8>,
    /// The number of the section `ram`.
    pub ram_section: u32,
    /// The commands among the sections of memory.
    pub commands: Vec<u8>,
    /// From the first device to the end.
    pub tail: Vec<u8>,
}
