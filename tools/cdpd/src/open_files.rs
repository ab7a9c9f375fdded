//! How many files a process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More than any store needs that fits a disk: so many full segments are 256 TiB. Where nothing limits a process, a billion
/// descriptors would be asked for, which programs that it starts may all try to close.
const ENOUGH: u64 = 1 << 20;

/// Allows this process as many open files as it may allow itself, within reason: each segment of a store is one, and a
/// shell's usual 1024 are used up by 250 GiB of log. Programs that it starts inherit that: QEMU, qemu-img and callbacks, of
/// which only one that calls `select` could not cope with so many.
pub fn allow_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = maximum.map_or(ENOUGH, |maximum| maximum.min(ENOUGH));
    if current.is_none_or(|current| current >= most) {
        return;
    }
    // Nobody needs a right for this; without it, it goes on as it would have.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum });
}
