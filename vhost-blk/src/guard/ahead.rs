//! Pages that the guest itself will write soon: touched for it, so that QEMU has saved them before it asks.
//!
//! These touches only meet the protection. They write nothing, since the bytes are the guest's, and nothing depends on
//! them: a page that is touched too early, or not at all, is one that the guest waits for.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Guard;
use super::owner::{Owner, PAGE, RegionGuard};

/// Threads that touch ahead: as many pages are in QEMU's queue at once. More of them take the processors from the guest.
const THREADS: usize = 2;
/// Between two rounds: the protection is set up after the window was opened, at a time that nobody tells.
const ROUND: Duration = Duration::from_micros(500);
/// The longest that QEMU is waited for.
const LONGEST: Duration = Duration::from_secs(30);

/// A page of guest memory, by its place in the file that the front end has shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FilePage {
    /// Bytes of the file that are guest memory: which file it is, if there are several.
    pub file_bytes: u64,
    /// Where in the file, in bytes.
    pub offset: u64,
}

/// In an entry of `/proc/PID/pagemap`: userfaultfd protects the page against writes (since Linux 5.13; the kernel's
/// admin-guide/mm/pagemap.rst).
const PROTECTED: u64 = 1 << 57;

/// A page where its owner has it.
struct Place {
    owner: Arc<Owner>,
    pagemap: Arc<File>,
    address: u64,
}

/// Touches these pages from threads of their own as soon as they are protected, until `over` was set or the window is
/// closed. Pages that are in none of the regions are passed over.
pub(super) fn spawn(
    guard: &Arc<Guard>,
    window: u64,
    regions: &[Arc<RegionGuard>],
    pages: impl Iterator<Item = FilePage>,
    over: &Arc<AtomicBool>,
) {
    let files = file_bytes(regions);
    let mut shares: [Vec<Place>; THREADS] = Default::default();
    let mut pagemaps: HashMap<i32, Option<Arc<File>>> = HashMap::new();
    let places = pages.flat_map(|page| places(regions, &files, page));
    for ((owner, address), thread) in places.zip((0..THREADS).cycle()) {
        let pagemap = pagemaps.entry(owner.pid()).or_insert_with(|| owner.pagemap().map(Arc::new));
        if let Some(pagemap) = pagemap.clone() {
            shares[thread].push(Place { owner, pagemap, address });
        }
    }
    for share in shares.into_iter().filter(|share| !share.is_empty()) {
        let (guard, over) = (Arc::clone(guard), Arc::clone(over));
        let run = move || touch_all(&guard, window, share, &over);
        // Never joined, as those that touch for the device. Without them the guest waits longer, no more.
        if let Err(error) = std::thread::Builder::new().name("guard-ahead".to_owned()).spawn(run) {
            tracing::warn!("nothing is touched ahead for the guest: {error}");
        }
    }
}

/// How many bytes of each file are shared.
fn file_bytes(regions: &[Arc<RegionGuard>]) -> HashMap<(u64, u64), u64> {
    let mut files = HashMap::new();
    for region in regions {
        if let Some(file) = region.file() {
            let bytes: &mut u64 = files.entry(file).or_default();
            *bytes = (*bytes).max(region.offset().saturating_add(region.len()));
        }
    }
    files
}

/// Where the page may be: in each file of its size.
fn places(
    regions: &[Arc<RegionGuard>],
    files: &HashMap<(u64, u64), u64>,
    page: FilePage,
) -> Vec<(Arc<Owner>, u64)> {
    let holds = |region: &&Arc<RegionGuard>| {
        let size = region.file().and_then(|file| files.get(&file));
        size == Some(&page.file_bytes)
            && page.offset.checked_sub(region.offset()).is_some_and(|inside| inside < region.len())
    };
    let place =
        |region: &Arc<RegionGuard>| Some((region.owner()?, region.user() + (page.offset - region.offset())));
    regions.iter().filter(holds).filter_map(place).collect()
}

impl Place {
    /// Whether a write to the page would wait for QEMU. What cannot be read is not.
    fn is_protected(&self) -> bool {
        let mut entry = [0; 8];
        let at = self.address / PAGE * 8;
        self.pagemap.read_exact_at(&mut entry, at).is_ok() && u64::from_ne_bytes(entry) & PROTECTED != 0
    }
}

fn touch_all(guard: &Guard, window: u64, mut places: Vec<Place>, over: &AtomicBool) {
    let begun = Instant::now();
    let wanted = || guard.open.load(Ordering::Acquire) == window;
    loop {
        // Looked at before the round: what is protected by now is met in it.
        let last = over.load(Ordering::Acquire) || begun.elapsed() > LONGEST;
        places.retain(|place| {
            let touched = wanted() && place.is_protected();
            if touched {
                place.owner.meet_protection(place.address);
            }
            !touched && wanted()
        });
        if last || places.is_empty() {
            return;
        }
        std::thread::sleep(ROUND);
    }
}
