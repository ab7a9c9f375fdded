//! Disks that lie or decay: invariants 5 and 6.

use std::collections::BTreeMap;
use std::sync::Arc;

use cdp_store::storage::sim::{Fault, OpKind, When};
use cdp_store::{CloneSpec, Error, ErrorKind};
use cdp_types::{BlockDevice, Instant, IoErrorKind, Op, Origin, Seq};

use crate::bench::{Bench, block_of, write_op};
use crate::machine::Crash;

/// Blocks that the tests write, one after the other.
const BLOCKS: u64 = 6;
/// Where the payload of a small batch starts behind its header, in bytes.
const HEADER: u64 = 4096;

/// A store whose first volume has had block `i` written and flushed, for each `i`, and a last block written only.
fn with_flushed_blocks(seed: u64) -> Bench {
    let bench = Bench::new(seed);
    for block in 0..BLOCKS {
        bench.write(0, block, 100 + block).unwrap();
        bench.flush(0).unwrap();
    }
    bench.write(0, BLOCKS, 100 + BLOCKS).unwrap();
    bench.write(1, 0, 7).unwrap();
    bench
}

/// The volume says what is wrong, takes no writes, and reads what lies before the damage; the other goes on.
fn assert_read_only(bench: &Bench, whole_blocks: u64, file: &str) {
    let volume = bench.machine.volume(&bench.name(0));
    let Some((IoErrorKind::ReadOnly, why)) = volume.refusal() else {
        panic!("invariant 5 violated: rot is taken for a torn tail: {:?}", volume.refusal())
    };
    assert!(why.contains(file), "{why:?} does not name {file}");
    assert!(volume.info().read_only);
    assert_eq!(bench.write(0, 0, 1).unwrap_err().kind(), IoErrorKind::ReadOnly);
    for block in 0..whole_blocks {
        assert_eq!(bench.block(0, block).unwrap(), 100 + block);
    }
    bench.write(1, 1, 8).unwrap();
    assert_eq!((bench.block(1, 0).unwrap(), bench.block(1, 1).unwrap()), (7, 8));
}

#[test]
fn a_rotten_header_of_a_flushed_batch_makes_the_volume_read_only() {
    for block in 0..BLOCKS {
        for (byte, without_index) in
            [(0, false), (24, true), (96, true), (104, false), (130, true), (170, false)]
        {
            let mut bench = with_flushed_blocks(block);
            let record = &bench.records(0)[block as usize];
            let (file, offset) = (bench.file_of(record), record.offset);
            bench.machine.disk.flip_bit(&file, offset + byte, 3);
            let before = bench.machine.disk.contents(&file).unwrap();
            if without_index {
                bench.machine = bench.machine.fork_without_index(1);
            }
            bench.restart(Crash::Kill);
            assert_read_only(&bench, block, &file);
            bench.restart(Crash::Kill);
            assert_read_only(&bench, block, &file);
            let after = bench.machine.disk.contents(&file).unwrap();
            assert!(before == after, "invariant 5 violated: a damaged log was changed");
        }
    }
}

#[test]
fn what_lies_behind_damage_is_refused_to_whoever_refers_to_it() {
    for is_reverted in [false, true] {
        let mut bench = with_flushed_blocks(1);
        let (name, records) = (bench.name(0), bench.records(0));
        let (early, late) = (records[1].seq, records[BLOCKS as usize].seq);
        let store = bench.machine.store();
        for (at, copy) in [(early, "early"), (late, "late")] {
            let spec = CloneSpec { source: name.clone(), at: Instant::Seq(at), name: copy.parse().unwrap() };
            store.clone_volumes(&[spec]).unwrap();
        }
        store.mark(&name, &Instant::Seq(late), &"late".parse().unwrap(), BTreeMap::new()).unwrap();
        if is_reverted {
            store.revert(&[(name.clone(), Instant::Seq(early))], false).unwrap();
        }
        // A clone has something of its own in the leaf whose rest it inherits.
        let mut queue = bench.machine.volume(&"late".parse().unwrap()).open_queue().unwrap();
        bench.run(&mut *queue, write_op(9, 109, Origin(0))).unwrap();
        drop(queue);
        bench.machine.disk.flip_bit(&bench.file_of(&records[3]), records[3].offset + 96, 3);
        bench.machine = bench.machine.fork_without_index(1);
        bench.restart(Crash::Kill);

        let marked = Instant::Mark("late".parse().unwrap());
        let mark: Arc<dyn BlockDevice> = bench.machine.store().open_at(&name, &marked).unwrap();
        let clone: Arc<dyn BlockDevice> = bench.machine.volume(&"late".parse().unwrap());
        for device in [mark, clone] {
            let error = block_of(&*device, 1).expect_err("invariant 6 violated: what was before is returned");
            assert_eq!(error.kind(), IoErrorKind::Corrupt);
        }
        let spec = CloneSpec { source: name.clone(), at: marked, name: "later".parse().unwrap() };
        let refused = bench.machine.store().clone_volumes(&[spec]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
        // What was before the damage can be read, by whoever refers to that.
        let at_head = [0, 1, 2].map(|block| bench.block(0, block).unwrap());
        assert_eq!(at_head, [100, 101, if is_reverted { 0 } else { 102 }]);
        let clone = bench.machine.volume(&"early".parse().unwrap());
        assert_eq!([0, 1, 2].map(|block| block_of(&*clone, block).unwrap()), [100, 101, 0]);
        assert!(!bench.machine.store().verify(&mut |_| ()).unwrap().findings.is_empty());
    }
}

#[test]
fn rot_of_the_last_batch_shows_after_a_clean_stop() {
    let mut bench = with_flushed_blocks(1);
    let record = bench.records(0)[BLOCKS as usize].clone();
    let file = bench.file_of(&record);
    bench.machine.reopen();
    bench.machine.disk.flip_bit(&file, record.offset + 96, 0);
    bench.machine = bench.machine.fork_without_index(1);
    bench.restart(Crash::Kill);
    assert_read_only(&bench, BLOCKS, &file);
}

#[test]
fn rot_of_a_tail_that_an_opening_has_recovered_shows_without_an_index() {
    for byte in [0, 96, 170] {
        let mut bench = with_flushed_blocks(byte);
        let record = bench.records(0)[BLOCKS as usize].clone();
        let file = bench.file_of(&record);
        // The last write was never flushed. This opening finds it, and has it durable before it goes on.
        bench.restart(Crash::Kill);
        assert_eq!(bench.block(0, BLOCKS).unwrap(), 100 + BLOCKS);
        bench.machine.disk.flip_bit(&file, record.offset + byte, 3);
        bench.machine = bench.machine.fork_without_index(1);
        bench.restart(Crash::PowerCut);
        assert_read_only(&bench, BLOCKS, &file);
    }
}

#[test]
fn rot_that_only_the_index_shows_is_not_forgotten_with_it() {
    for byte in [0, 96, 170] {
        let mut bench = with_flushed_blocks(byte);
        // Nothing in the log says that its last batch was durable, but the index goes up to it.
        bench.machine.store().flush_index().unwrap();
        let record = bench.records(0)[BLOCKS as usize].clone();
        let file = bench.file_of(&record);
        bench.machine.disk.flip_bit(&file, record.offset + byte, 3);
        for _ in 0..3 {
            bench.restart(Crash::Kill);
            assert_read_only(&bench, BLOCKS, &file);
            // What does not belong to the log is no longer in the index, for good.
            bench.machine.store().flush_index().unwrap();
        }
    }
}

#[test]
fn a_torn_tail_is_cut_without_a_word() {
    for (byte, seed) in [(0, 1), (96, 2), (170, 3), (HEADER, 4), (2 * HEADER - 1, 5)] {
        let mut bench = with_flushed_blocks(seed);
        let record = bench.records(0)[BLOCKS as usize].clone();
        bench.machine.disk.flip_bit(&bench.file_of(&record), record.offset + byte, 7);
        bench.restart(Crash::Kill);
        let volume = bench.machine.volume(&bench.name(0));
        assert!(volume.refusal().is_none(), "invariant 5 violated: a torn tail is taken for rot");
        assert_eq!(bench.records(0).len() as u64, BLOCKS);
        assert_eq!(bench.block(0, BLOCKS).unwrap(), 0);
        bench.write(0, BLOCKS, 55).unwrap();
        bench.restart(Crash::Kill);
        assert_eq!(bench.block(0, BLOCKS).unwrap(), 55);
    }
}

#[test]
fn a_flipped_bit_of_data_is_an_error_and_never_data() {
    for byte in [0, 511, 512, 4095] {
        let mut bench = with_flushed_blocks(byte);
        let record = bench.records(0)[2].clone();
        let file = bench.file_of(&record);
        bench.machine.store().flush_index().unwrap();
        bench.machine.disk.flip_bit(&file, record.offset + HEADER + byte, (byte % 8) as u8);
        for round in 0..2 {
            let what = "invariant 6 violated: damaged data was returned";
            assert_eq!(bench.block(0, 2).expect_err(what).kind(), IoErrorKind::Corrupt);
            let past = bench.machine.store().open_at(&bench.name(0), &Instant::Seq(record.seq)).unwrap();
            assert_eq!(block_of(&*past, 2).expect_err(what).kind(), IoErrorKind::Corrupt);
            assert_eq!((bench.block(0, 1).unwrap(), bench.block(0, 3).unwrap()), (101, 103));
            assert_eq!(bench.machine.store().verify(&mut |_| ()).unwrap().findings.len(), 1);
            if round == 0 {
                bench.restart(Crash::Kill);
            }
        }
        // A write of a part must not lend its checksum to the damaged rest; one of the whole block heals it.
        let volume = bench.machine.volume(&bench.name(0));
        if volume.info().logical_block_size == 512 {
            let mut queue = volume.open_queue().unwrap();
            let ranges = [cdp_types::ByteRange::new(2 * 4096, 512)].into_iter().collect();
            let op = Op::WriteZeroes { ranges, unmap: false, origin: Origin(0), fua: false };
            assert_eq!(bench.run(&mut *queue, op).unwrap_err().kind(), IoErrorKind::Corrupt);
        }
        bench.write(0, 2, 77).unwrap();
        assert_eq!(bench.block(0, 2).unwrap(), 77);
    }
}

#[test]
fn a_write_that_went_nowhere_is_an_error_and_never_data() {
    let mut bench = with_flushed_blocks(1);
    bench.write(0, 1, 55).unwrap();
    bench.machine.disk.lose_nth_write(0);
    bench.write(0, 1, 56).unwrap();
    let error = bench.block(0, 1).expect_err("invariant 6 violated: older data was returned");
    assert!(matches!(error.kind(), IoErrorKind::Corrupt | IoErrorKind::Device), "{error}");
    // Once a later batch says that it had been made durable, it is missed.
    bench.flush(0).unwrap();
    bench.write(0, 2, 57).unwrap();
    bench.machine = bench.machine.fork_without_index(1);
    bench.restart(Crash::Kill);
    let refusal = bench.machine.volume(&bench.name(0)).refusal();
    assert!(refusal.is_some(), "invariant 5 violated: a lost write is taken for a torn tail");
    assert_eq!(bench.block(0, 1).unwrap(), 55);
}

#[test]
fn a_write_that_landed_elsewhere_is_an_error_and_never_data() {
    for victim in 0..BLOCKS {
        let bench = with_flushed_blocks(victim);
        let record = bench.records(0)[victim as usize].clone();
        bench.machine.disk.misdirect_nth_write(0, Some((&bench.file_of(&record), record.offset)));
        bench.write(0, BLOCKS, 56).unwrap();
        for block in [victim, BLOCKS] {
            let error =
                bench.block(0, block).expect_err("invariant 6 violated: data of another place was returned");
            assert!(matches!(error.kind(), IoErrorKind::Corrupt | IoErrorKind::Device), "{error}");
        }
    }
}

#[test]
fn what_a_guest_writes_is_never_taken_for_a_batch() {
    let mut bench = with_flushed_blocks(3);
    // The guest writes the bytes of the store's own batches, headers and all, into its blocks.
    let record = bench.records(0)[0].clone();
    let log = bench.machine.disk.contents(&bench.file_of(&record)).unwrap();
    let from = record.offset as usize;
    let bytes = &log[from..from + 8 * HEADER as usize];
    let volume = bench.machine.volume(&bench.name(0));
    let mut queue = volume.open_queue().unwrap();
    let from = cdp_types::IoBuf::from_bytes(bytes);
    bench.run(&mut *queue, Op::Write { offset: 504 * 4096, from, origin: Origin(0), fua: true }).unwrap();
    bench.run(&mut *queue, write_op(9, 99, Origin(0))).unwrap();
    drop((queue, volume));
    // The last batch is torn: what lies in the guest's blocks before it must not count for anything.
    let last = bench.records(0).last().unwrap().clone();
    bench.machine.disk.flip_bit(&bench.file_of(&last), last.offset + 96, 0);
    bench.machine = bench.machine.fork_without_index(1);
    bench.restart(Crash::Kill);
    assert!(bench.machine.volume(&bench.name(0)).refusal().is_none());
    assert_eq!((bench.block(0, 9).unwrap(), bench.block(0, BLOCKS).unwrap()), (0, 100 + BLOCKS));
}

#[test]
fn a_killed_process_spares_the_next_one_the_search_behind_the_end() {
    let bench = with_flushed_blocks(9);
    let steps = |forgets: bool| {
        let mut machine = bench.machine.fork(3);
        machine.crash(Crash::Kill);
        if forgets {
            machine.memory = tempfile::tempdir_in("/dev/shm").unwrap();
        }
        let before = machine.disk.io_steps();
        machine.open().unwrap();
        machine.disk.io_steps() - before
    };
    let (noted, forgotten) = (steps(false), steps(true));
    assert!(noted < forgotten, "{noted} steps with notes, {forgotten} without");
}

/// Kills the process, and opens the store again while reads of a file fail; of a segment, the first one is of its header.
fn restart_failing_reads(bench: &mut Bench, file: &str, whens: &[When]) -> Result<(), Error> {
    bench.machine.crash(Crash::Kill);
    for &when in whens {
        let file = Some(file.to_owned());
        bench.machine.disk.fail(Fault { kind: OpKind::Read, file, when, errno: libc::EIO });
    }
    bench.machine.open()
}

/// Nothing is read-only, and everything that was written is there.
fn assert_whole(bench: &Bench) {
    assert!(bench.machine.volume(&bench.name(0)).refusal().is_none());
    for block in 0..=BLOCKS {
        assert_eq!(bench.block(0, block).unwrap(), 100 + block);
    }
}

#[test]
fn one_copy_of_a_segments_header_is_enough() {
    // Both at once, then each: the first or the second of them is not read.
    for copy in [1, 2] {
        let mut bench = with_flushed_blocks(copy);
        let file = bench.file_of(&bench.records(0)[0]);
        restart_failing_reads(&mut bench, &file, &[When::Nth(0), When::Nth(copy)]).unwrap();
        assert_whole(&bench);
    }
}

#[test]
fn a_segment_of_which_no_header_is_read_keeps_the_store_closed() {
    let mut bench = with_flushed_blocks(4);
    let file = bench.file_of(&bench.records(0)[0]);
    let error = restart_failing_reads(&mut bench, &file, &[0, 1, 2].map(When::Nth)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains(&file), "{error} does not name {file}");
    bench.restart(Crash::Kill);
    assert_whole(&bench);
}

/// The superblock's two slots.
fn slots(bench: &Bench) -> [Vec<u8>; 2] {
    let bytes = bench.machine.disk.contents("superblock").unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    [first.to_vec(), second.to_vec()]
}

/// Where one of them is.
fn slot_at(bench: &Bench, slot: usize) -> usize {
    slots(bench)[0].len() * slot
}

/// Damages one of them.
fn spoil_slot(bench: &Bench, slot: usize) {
    bench.machine.disk.flip_bit("superblock", (slot_at(bench, slot) + 50) as u64, 3);
}

#[test]
fn one_slot_of_the_superblock_is_enough() {
    for unread in [0, 1] {
        for openings in [0, 1] {
            let mut bench = with_flushed_blocks(openings);
            (0..openings).for_each(|_| bench.restart(Crash::Kill));
            restart_failing_reads(&mut bench, "superblock", &[When::Nth(unread)]).unwrap();
            assert_whole(&bench);
            bench.restart(Crash::Kill);
            assert_whole(&bench);
        }
    }
    let mut bench = with_flushed_blocks(3);
    let error = restart_failing_reads(&mut bench, "superblock", &[When::From(0)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn a_superblock_of_which_a_newer_program_has_written_one_slot_is_refused() {
    for slot in [0, 1] {
        let mut bench = with_flushed_blocks(slot as u64);
        // Version 2, and the checksum over it (docs/format.md, "The prefix of every structure").
        let was = slots(&bench)[slot].clone();
        let mut newer = was[..4096].to_vec();
        newer[12] = 2;
        let checksum = cdp_types::crc32c([&[0; 8], &newer[..28], &newer[32..]]);
        newer[28..32].copy_from_slice(&checksum.to_le_bytes());
        for (at, (was, is)) in was.iter().zip(&newer).enumerate() {
            for bit in (0..8).filter(|bit| (was ^ is) >> bit & 1 == 1) {
                bench.machine.disk.flip_bit("superblock", (slot_at(&bench, slot) + at) as u64, bit);
            }
        }
        bench.machine.crash(Crash::Kill);
        assert_eq!(bench.machine.open().unwrap_err().kind(), ErrorKind::Newer);
    }
}

#[test]
fn an_opening_writes_over_no_superblock_slot_that_is_the_only_good_one() {
    for (openings, spoilt) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let mut bench = with_flushed_blocks(openings);
        (0..openings).for_each(|_| bench.restart(Crash::Kill));
        spoil_slot(&bench, spoilt);
        let before = slots(&bench);
        bench.restart(Crash::Kill);
        let after = slots(&bench);
        assert_eq!(before[1 - spoilt], after[1 - spoilt], "a power cut would have left neither");
        assert_ne!(before[spoilt], after[spoilt]);
        // Had it been torn.
        spoil_slot(&bench, spoilt);
        bench.restart(Crash::Kill);
        assert_whole(&bench);
    }
}

#[test]
fn a_log_that_cannot_be_read_keeps_no_other_volume_from_being_served() {
    for is_indexed in [false, true] {
        let mut bench = with_flushed_blocks(1);
        if is_indexed {
            bench.machine.store().flush_index().unwrap();
        }
        let head = bench.machine.volume(&bench.name(0)).head().seq;
        let file = bench.file_of(&bench.records(0)[0]);
        restart_failing_reads(&mut bench, &file, &[When::From(1)]).unwrap();
        assert_read_only(&bench, 0, &file);
        let known = bench.machine.volume(&bench.name(0)).head().seq;
        assert_eq!(known, if is_indexed { head } else { Seq::ZERO });
        // The disk is well again: nothing was cut.
        bench.restart(Crash::Kill);
        assert_whole(&bench);
    }
}

#[test]
fn what_cannot_be_read_ahead_hides_no_batch_before_it() {
    let mut bench = with_flushed_blocks(2);
    let file = bench.file_of(&bench.records(0)[0]);
    restart_failing_reads(&mut bench, &file, &[When::Nth(1)]).unwrap();
    assert_whole(&bench);
}

#[test]
fn a_segment_whose_header_has_rotted_is_not_thrown_away() {
    let mut bench = with_flushed_blocks(3);
    bench.machine.store().flush_index().unwrap();
    let file = bench.file_of(&bench.records(0)[0]);
    // Once in each copy. The second time it is as it was.
    let flip = |bench: &Bench| {
        for copy in [0_u64, 4096] {
            bench.machine.disk.flip_bit(&file, copy + 40, 3);
        }
    };
    flip(&bench);
    for _ in 0..2 {
        bench.restart(Crash::Kill);
        assert_read_only(&bench, 0, "the log");
        assert!(bench.machine.disk.contents(&file).is_some(), "invariant 5 violated: it was removed");
    }
    flip(&bench);
    bench.restart(Crash::Kill);
    assert_whole(&bench);
}
