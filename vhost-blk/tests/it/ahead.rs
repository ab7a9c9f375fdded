//! Pages are touched for the guest: saved before it asks, and not one byte of them is changed by that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vhost_blk::FilePage;

use crate::eventually;
use crate::guard::{Bed, NONE, PATIENT, stop};
use crate::guest::*;
use crate::saver::Saver;

const PAGE: u64 = 4096;
/// Where no ring and no request is, so that the device has no reason to touch anything.
const QUIET: u64 = 48 << 20;
/// So many pages from there on.
const PAGES: u64 = 200;

fn file_page(offset: u64) -> FilePage {
    FilePage { file_bytes: MEMORY_LEN, offset }
}

/// A guest that has written to its quiet pages before: QEMU sees to it that there is a page everywhere. Its rings are
/// stopped, and the window is open.
fn stopped(bed: &Bed) -> Guest {
    let mut guest = bed.guest(Options::default());
    for n in 0..PAGES {
        word(&guest, n).store(0, Ordering::Relaxed);
    }
    let _troubles = bed.arm();
    stop(&mut guest);
    guest
}

/// The first bytes of a quiet page, which a touch that writes would choose.
fn word(guest: &Guest, n: u64) -> &AtomicU64 {
    let word = guest.memory.mapped(BASE + QUIET + n * PAGE) as *const AtomicU64;
    // SAFETY: the address is aligned and in the guest's memory, which the guest keeps; all of the test's accesses are atomic.
    unsafe { &*word }
}

/// Has pages touched ahead in the window that is open.
fn touch_ahead(bed: &Bed, pages: impl IntoIterator<Item = FilePage>) -> Arc<AtomicBool> {
    let over = Arc::new(AtomicBool::new(false));
    bed.cutter.window.lock().unwrap().as_ref().unwrap().touch_ahead(pages, &over);
    over
}

fn have_ended(over: &Arc<AtomicBool>) -> bool {
    Arc::strong_count(over) == 1
}

#[test]
fn pages_that_were_touched_ahead_are_saved_though_nobody_has_written_to_them() {
    let bed = Bed::new(PATIENT);
    let guest = stopped(&bed);
    // As at a cut: the window comes first, and the protection some time later.
    let over = touch_ahead(&bed, (0..100).map(|n| file_page(QUIET + n * 2 * PAGE)));
    std::thread::sleep(Duration::from_millis(20));
    assert!(!have_ended(&over), "they wait for the protection");
    let saver = Saver::start(&guest.memory, Duration::ZERO);
    let saved = |n: u64| saver.has_saved(BASE + QUIET + n * PAGE);
    eventually("all are saved", || (0..100).all(|n| saved(2 * n)));
    assert!(!(0..100).any(|n| saved(2 * n + 1)), "and no others");
    eventually("the threads end by themselves", || have_ended(&over));
    assert_eq!(saver.finish(), NONE);
}

#[test]
fn what_the_guest_writes_meanwhile_stays() {
    let bed = Bed::new(PATIENT);
    let mut guest = bed.guest(Options::default());
    for round in 1..=20_u64 {
        let _troubles = bed.arm();
        let bases = stop(&mut guest);
        let over = touch_ahead(&bed, (0..64).map(|n| file_page(QUIET + n * PAGE)));
        let saver = Saver::start(&guest.memory, Duration::ZERO);
        for n in 0..64 {
            let word = word(&guest, n);
            for _ in 0..100 {
                word.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(word.load(Ordering::Relaxed), round * 100, "page {n}");
        }
        assert_eq!(saver.finish(), NONE);
        over.store(true, Ordering::Release);
        eventually("the threads end", || have_ended(&over));
        bed.cutter.window.lock().unwrap().take().unwrap().close();
        guest.start_rings(Some(&bases));
    }
}

#[test]
fn it_ends_when_the_guest_runs_again_and_with_the_window() {
    let bed = Bed::new(PATIENT);
    let _guest = stopped(&bed);
    let unprotected = touch_ahead(&bed, [file_page(QUIET)]);
    let to_the_end = touch_ahead(&bed, [file_page(QUIET)]);
    unprotected.store(true, Ordering::Release);
    eventually("one ends", || have_ended(&unprotected));
    assert!(!have_ended(&to_the_end));
    bed.cutter.window.lock().unwrap().take().unwrap().close();
    eventually("the other ends with the window", || have_ended(&to_the_end));
}

#[test]
fn pages_of_other_memory_are_passed_over() {
    let bed = Bed::new(PATIENT);
    let _guest = stopped(&bed);
    let elsewhere = FilePage { file_bytes: MEMORY_LEN / 2, offset: QUIET };
    let over = touch_ahead(&bed, [file_page(MEMORY_LEN), file_page(u64::MAX - 4095), elsewhere]);
    assert!(have_ended(&over), "nothing is left to touch");
}
