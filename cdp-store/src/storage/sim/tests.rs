#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use cdp_types::{IoBuf, Wait};

use super::{Fault, OpKind, SimDisk, When};
use crate::clock::Clock;
use crate::storage::{AlignedBuf, Done, File, Lane, Storage, conformance};

const SEEDS: std::ops::Range<u64> = 0..200;

fn filled(len: usize, with: u8) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(len);
    buffer.fill(with);
    buffer
}

/// A disk with a file `f` of `len` bytes of 1, durable by name and content.
fn disk_with_file(seed: u64, len: usize) -> (SimDisk, Arc<dyn File>) {
    let disk = SimDisk::new(seed);
    let storage = disk.open();
    let file = storage.create("f").unwrap();
    file.write_at(0, &filled(len, 1)).unwrap();
    file.sync().unwrap();
    storage.sync_directory("").unwrap();
    (disk, file)
}

fn finish(lane: &mut dyn Lane) -> Vec<Done> {
    let mut done = Vec::new();
    while lane.in_flight() > 0 {
        lane.poll(Wait::Forever, &mut done).unwrap();
    }
    done
}

/// Which of the file's sectors have which first byte.
fn sectors(disk: &SimDisk) -> Vec<u8> {
    disk.contents("f").unwrap().chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn it_is_a_storage() {
    for (name, check) in conformance::CHECKS {
        println!("{name}");
        check(&SimDisk::new(1).open());
    }
}

#[test]
fn the_same_seed_does_the_same() {
    let run = |seed| {
        let (disk, file) = disk_with_file(seed, 65536);
        let storage = disk.open();
        let mut lane = storage.lane().unwrap();
        disk.fail_rate(OpKind::Write, 0.2, libc::EIO);
        for n in 0..16 {
            lane.write(n, &file, n * 4096, filled(4096, 2), 0..4096);
            lane.sync(100 + n, &file);
        }
        for _ in 0..20 {
            assert!(disk.step());
        }
        let mut done = Vec::new();
        lane.poll(Wait::No, &mut done).unwrap();
        let order = format!("{done:?}");
        disk.kill_restart();
        disk.open().list("").unwrap();
        let killed = disk.contents("f");
        disk.power_cut();
        (order, killed, disk.contents("f"), disk.io_steps(), disk.clock().wall_ns())
    };
    assert!(run(7) == run(7));
    assert!(run(7) != run(8));
}

mod power {
    use super::*;

    #[test]
    fn what_was_synced_survives_every_cut() {
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 16384);
            file.write_at(4096, &filled(4096, 2)).unwrap();
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 8192, filled(4096, 3), 0..4096);
            finish(&mut *lane);
            lane.sync(2, &file);
            finish(&mut *lane);
            disk.kill_restart();
            disk.power_cut();
            disk.power_cut();
            let expected = [[1; 4096], [2; 4096], [3; 4096], [1; 4096]].concat();
            assert!(disk.contents("f").unwrap() == expected, "seed {seed}");
        }
    }

    #[test]
    fn a_sync_covers_what_had_ended_when_it_was_started() {
        let mut lost = 0;
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 8192);
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 0, filled(4096, 2), 0..4096);
            finish(&mut *lane);
            lane.sync(2, &file);
            lane.write(3, &file, 4096, filled(4096, 3), 0..4096);
            let done = finish(&mut *lane);
            disk.power_cut();
            let after = disk.contents("f").unwrap();
            assert!(after[..4096] == [2; 4096], "seed {seed}");
            let written_first = matches!(done[0], Done::Io { token: 3, .. });
            lost += u32::from(written_first && after[4096..] == [1; 4096]);
        }
        assert!(lost > 0, "a sync must not cover what was executed between its start and its own execution");
    }

    #[test]
    fn what_was_not_synced_is_lost_or_kept_each_write_on_its_own() {
        let mut seen = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 12288);
            for n in 0..3 {
                file.write_at(n * 4096, &filled(4096, 2)).unwrap();
            }
            disk.power_cut();
            let whole = |block: &[u8]| block.iter().all(|&byte| byte == 2);
            seen.insert(disk.contents("f").unwrap().chunks(4096).map(whole).collect::<Vec<_>>());
        }
        assert_eq!(seen.len(), 8, "{seen:?}");
    }

    #[test]
    fn writes_tear_between_sectors_and_take_their_physical_block_along() {
        let (mut torn, mut destroyed) = (0, 0);
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 16384);
            file.write_at(4096, &filled(4608, 2)).unwrap();
            disk.power_cut();
            let after = disk.contents("f").unwrap();
            assert!(
                after[..4096] == [1; 4096] && after[12288..] == [1; 4096],
                "seed {seed}: hit a foreign block"
            );
            let whole = |sector: &[u8], with: u8| sector.iter().all(|&byte| byte == with);
            let (mut old, mut new, mut garbage) = (0, 0, 0);
            for sector in after[4096..8704].chunks(512) {
                old += u32::from(whole(sector, 1));
                new += u32::from(whole(sector, 2));
                garbage += u32::from(!whole(sector, 1) && !whole(sector, 2));
            }
            torn += u32::from(old > 0 && new > 0 && garbage == 0);
            destroyed += u32::from(after[8704..12288] != [1; 3584]);
        }
        assert!(torn > 10 && destroyed > 10, "torn {torn}, destroyed {destroyed}");
    }

    #[test]
    fn the_length_is_durable_with_the_data() {
        let mut lengths = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            file.write_at(4096, &filled(4096, 2)).unwrap();
            file.sync().unwrap();
            file.write_at(8192, &filled(4096, 3)).unwrap();
            disk.power_cut();
            let len = disk.contents("f").unwrap().len();
            assert!((8192..=12288).contains(&len), "seed {seed}");
            lengths.insert(len);
        }
        assert!(lengths.contains(&8192) && lengths.contains(&12288), "{lengths:?}");
    }

    #[test]
    fn names_are_durable_with_their_directory_only() {
        let mut seen = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            let storage = disk.open();
            storage.create_directory("d").unwrap();
            storage.sync_directory("").unwrap();
            storage.create("d/durable").unwrap();
            storage.sync_directory("d").unwrap();
            storage.create("d/made").unwrap().sync().unwrap();
            storage.remove("f").unwrap();
            storage.create_directory("e").unwrap();
            storage.create("e/x").unwrap();
            storage.sync_directory("e").unwrap();
            file.sync().unwrap();
            disk.power_cut();
            let files = disk.files();
            assert!(files.contains(&"d/durable".to_owned()), "seed {seed}");
            if files.contains(&"f".to_owned()) {
                assert!(disk.contents("f").unwrap() == [1; 4096], "seed {seed}");
            }
            seen.insert(files);
        }
        assert_eq!(seen.len(), 8, "{seen:?}");
    }

    #[test]
    fn the_machine_is_started_again() {
        let disk = SimDisk::new(1);
        let clock = disk.clock();
        clock.advance(Duration::from_secs(1000));
        let (wall, boot) = (clock.wall_ns(), clock.boot_ns());
        disk.kill_restart();
        assert!(clock.boot_ns() > boot);
        disk.power_cut();
        assert!(clock.boot_ns() < boot && clock.wall_ns() > wall);
    }
}

mod kill {
    use super::*;

    #[test]
    fn what_was_executed_stays_and_the_rest_is_decided_sector_by_sector() {
        let mut seen = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 8192);
            file.write_at(0, &filled(4096, 2)).unwrap();
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 4096, filled(4096, 3), 0..4096);
            disk.kill_restart();
            let after = sectors(&disk);
            assert!(after[..8] == [2; 8], "seed {seed}");
            assert!(
                after[8..].iter().all(|&byte| byte == 1 || byte == 3),
                "seed {seed}: garbage without a power cut"
            );
            seen.insert(after[8..].to_vec());
        }
        assert!(seen.contains(&vec![1; 8]) && seen.contains(&vec![3; 8]) && seen.len() > 10, "{seen:?}");
    }

    #[test]
    fn writes_land_after_the_next_start() {
        let mut late = 0;
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 0, filled(4096, 2), 0..4096);
            disk.kill_restart();
            if disk.late_writes() == 0 {
                continue;
            }
            late += 1;
            let storage = disk.open();
            assert!(sectors(&disk) == [1; 8], "seed {seed}");
            while disk.late_writes() > 0 {
                storage.list("").unwrap();
            }
            assert!(sectors(&disk).contains(&2), "seed {seed}");
        }
        assert!(late > 20, "{late}");
    }

    #[test]
    fn outwaiting_lands_them_at_once_and_a_power_cut_ends_them() {
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 65536);
            let mut lane = disk.open().lane().unwrap();
            for n in 0..16 {
                lane.write(n, &file, n * 4096, filled(4096, 2), 0..4096);
            }
            disk.kill_restart();
            let other = disk.fork(seed + 1);
            disk.land_late_writes();
            let outwaited = disk.contents("f");
            other.power_cut();
            let cut = other.contents("f");
            for disk in [&disk, &other] {
                assert_eq!(disk.late_writes(), 0, "seed {seed}");
                for _ in 0..50 {
                    disk.open().list("").unwrap();
                }
            }
            assert!(disk.contents("f") == outwaited && other.contents("f") == cut, "seed {seed}");
        }
    }

    #[test]
    fn a_late_write_to_a_removed_file_harms_nobody() {
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 0, filled(4096, 2), 0..4096);
            disk.kill_restart();
            let storage = disk.open();
            storage.remove("f").unwrap();
            storage.create("f").unwrap().write_at(0, &filled(4096, 9)).unwrap();
            disk.land_late_writes();
            assert!(sectors(&disk) == [9; 8], "seed {seed}");
        }
    }

    #[test]
    fn the_dead_do_nothing() {
        let (disk, file) = disk_with_file(1, 4096);
        let storage = disk.open();
        let mut lane = storage.lane().unwrap();
        disk.kill_restart();
        assert_eq!(storage.create("g").unwrap_err().to_string(), "simulated crash");
        assert_eq!(file.sync().unwrap_err().to_string(), "simulated crash");
        lane.write(1, &file, 0, filled(4096, 5), 0..4096);
        assert_eq!(lane.poll(Wait::Forever, &mut Vec::new()).unwrap_err().to_string(), "simulated crash");
        drop(lane);
        assert_eq!((disk.outstanding(), sectors(&disk)), (0, vec![1; 8]));
    }

    #[test]
    fn a_process_dies_at_the_step_it_was_told() {
        let workload = |disk: &SimDisk| -> std::io::Result<()> {
            let storage = disk.open();
            let file = storage.create("g")?;
            file.write_at(0, &filled(4096, 1))?;
            file.sync()?;
            let mut lane = storage.lane()?;
            lane.write(1, &file, 0, filled(4096, 2), 0..4096);
            lane.poll(Wait::Forever, &mut Vec::new())?;
            storage.sync_directory("")
        };
        let whole = SimDisk::new(3);
        workload(&whole).unwrap();
        assert_eq!(whole.io_steps(), 5);
        for step in 0..5 {
            let disk = SimDisk::new(3);
            disk.crash_at(step);
            assert_eq!(workload(&disk).unwrap_err().to_string(), "simulated crash");
            assert!(disk.crashed() && disk.io_steps() == step);
            disk.kill_restart();
            assert!(!disk.crashed());
            disk.open().list("").unwrap();
        }
    }

    #[test]
    fn a_blocking_call_that_the_process_dies_in_happens_or_not() {
        let mut seen = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            let storage = disk.open();
            disk.crash_at(disk.io_steps());
            file.write_at(0, &filled(4096, 2)).unwrap_err();
            disk.kill_restart();
            disk.crash_at(disk.io_steps());
            drop(storage);
            disk.open().create("g").map(drop).unwrap_err();
            disk.kill_restart();
            disk.land_late_writes();
            seen.insert((sectors(&disk)[0], disk.files().len()));
        }
        assert_eq!(seen.len(), 4, "{seen:?}");
    }
}

mod lanes {
    use super::*;

    #[test]
    fn operations_are_executed_in_any_order() {
        let mut orders = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            let mut lane = disk.open().lane().unwrap();
            for token in 0..3 {
                lane.sync(token, &file);
            }
            let token = |done: Done| match done {
                Done::Io { token, .. } => token,
                Done::Ready { tag } => tag,
            };
            orders.insert(finish(&mut *lane).into_iter().map(token).collect::<Vec<_>>());
        }
        assert_eq!(orders.len(), 6);
    }

    #[test]
    fn nothing_is_executed_by_looking() {
        let (disk, file) = disk_with_file(1, 4096);
        let storage = disk.open();
        let (mut lane, mut other) = (storage.lane().unwrap(), storage.lane().unwrap());
        let mut done = Vec::new();
        lane.write(1, &file, 0, filled(4096, 2), 0..4096);
        lane.poll(Wait::No, &mut done).unwrap();
        other.poll(Wait::No, &mut done).unwrap();
        assert!(done.is_empty() && disk.outstanding() == 1);
        // Waiting on one lane moves the others' operations on.
        other.poll(Wait::For(Duration::from_secs(1)), &mut done).unwrap();
        assert!(done.is_empty() && disk.outstanding() == 0);
        lane.poll(Wait::No, &mut done).unwrap();
        assert_eq!(done.len(), 1);
        assert!(!disk.step());
    }

    #[test]
    fn waiting_in_vain_takes_its_time_or_is_a_deadlock() {
        let disk = SimDisk::new(1);
        let mut lane = disk.open().lane().unwrap();
        let before = disk.clock().boot_ns();
        lane.poll(Wait::For(Duration::from_secs(3)), &mut Vec::new()).unwrap();
        assert!(disk.clock().boot_ns() - before >= 3_000_000_000);
        let outcome = catch_unwind(AssertUnwindSafe(|| lane.poll(Wait::Forever, &mut Vec::new())));
        let message = *outcome.unwrap_err().downcast::<String>().unwrap();
        assert!(message.starts_with("deadlock: nothing outstanding"), "{message}");
    }
}

mod failing {
    use super::*;

    #[test]
    fn a_failed_sync_loses_data_that_no_later_sync_brings_back() {
        let mut lost = 0;
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            file.write_at(0, &filled(4096, 2)).unwrap();
            disk.fail_nth(OpKind::Sync, 0, libc::EIO);
            assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
            file.sync().unwrap();
            assert!(sectors(&disk) == [2; 8], "seed {seed}: reads must still show it");
            disk.power_cut();
            lost += u32::from(sectors(&disk) != [2; 8]);
        }
        assert!(lost > 20 && lost < 180, "{lost}");
    }

    #[test]
    fn a_failed_write_lands_or_not_or_in_part_or_late() {
        let mut seen = BTreeSet::new();
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 4096);
            disk.fail_nth(OpKind::Write, 0, libc::EIO);
            let mut lane = disk.open().lane().unwrap();
            lane.write(1, &file, 0, filled(4096, 2), 0..4096);
            match &finish(&mut *lane)[..] {
                [Done::Io { result: Err(error), buffer: Some(_), .. }] => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO));
                }
                other => panic!("{other:?}"),
            }
            let new = sectors(&disk).iter().filter(|&&byte| byte == 2).count();
            seen.insert((new.clamp(0, 2) + usize::from(new == 8), disk.late_writes()));
        }
        // Nothing, some, all, and nothing yet.
        assert!([(0, 0), (2, 0), (3, 0), (0, 1)].iter().all(|case| seen.contains(case)), "{seen:?}");
    }

    #[test]
    fn a_full_disk_says_so_and_has_room_again_after_a_removal() {
        for seed in SEEDS {
            let (disk, file) = disk_with_file(seed, 8192);
            let storage = disk.open();
            disk.set_capacity(Some(12288));
            assert_eq!(storage.free_bytes().unwrap(), 4096);
            let error = file.write_at(8192, &filled(8192, 2)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::StorageFull);
            assert!(disk.contents("f").unwrap().len() <= 12288, "seed {seed}");
            file.write_at(0, &filled(8192, 3)).unwrap();
            let other = storage.create("g").unwrap();
            storage.remove("f").unwrap();
            other.write_at(0, &filled(12288, 4)).unwrap();
            assert_eq!(storage.free_bytes().unwrap(), 0);
        }
    }

    #[test]
    fn blocks_set_aside_read_as_zeroes_and_may_be_lost_until_a_sync() {
        let mut lengths = BTreeSet::new();
        for seed in SEEDS.filter(|seed| seed % 2 == 0) {
            let (disk, file) = disk_with_file(seed, 4096);
            file.sync().unwrap();
            file.reserve(16384).unwrap();
            file.reserve(8192).unwrap();
            let contents = disk.contents("f").unwrap();
            assert!(contents.len() == 16384 && contents[4096..].iter().all(|&byte| byte == 0), "seed {seed}");
            let cut = disk.fork(seed + 1);
            cut.power_cut();
            lengths.insert(cut.contents("f").unwrap().len());
            file.sync().unwrap();
            disk.power_cut();
            assert_eq!(disk.contents("f").unwrap().len(), 16384, "seed {seed}");
        }
        assert_eq!(lengths, BTreeSet::from([4096, 16384]));
        let (_, file) = disk_with_file(1, 4096);
        assert_eq!(file.reserve(8192).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn faults_come_when_and_where_ordered() {
        let (disk, file) = disk_with_file(1, 4096);
        let storage = disk.open();
        let other = storage.create("other").unwrap();
        let fault = |when| Fault { kind: OpKind::Read, file: Some("f".to_owned()), when, errno: libc::EIO };
        disk.fail(fault(When::Nth(1)));
        let read = |file: &Arc<dyn File>| file.read_at(0, &mut AlignedBuf::zeroed(512)).is_ok();
        assert!(read(&other) && read(&other) && read(&file) && read(&other) && !read(&file) && read(&file));
        disk.fail(fault(When::From(1)));
        assert!(read(&file) && !read(&file) && !read(&file) && read(&other));
        disk.clear_faults();
        assert!(read(&file));
        disk.fail_rate(OpKind::Open, 1.0, libc::EMFILE);
        assert_eq!(storage.open("f").unwrap_err().raw_os_error(), Some(libc::EMFILE));
        disk.fail_nth(OpKind::Create, 0, libc::ENOSPC);
        assert_eq!(storage.create("g").unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(disk.files(), ["f", "other"]);
        let mut lane = storage.lane().unwrap();
        disk.fail_nth(OpKind::Read, 0, libc::EIO);
        lane.read(1, &file, 0, IoBuf::zeroed(512));
        assert!(matches!(&finish(&mut *lane)[..], [Done::Io { result: Err(_), .. }]));
    }

    #[test]
    fn rot_is_made_on_demand() {
        let (disk, file) = disk_with_file(5, 8192);
        file.write_at(4096, &filled(4096, 2)).unwrap();
        disk.flip_bit("f", 5000, 7);
        assert_eq!(disk.contents("f").unwrap()[5000], 0x82);
        file.sync().unwrap();
        disk.power_cut();
        assert_eq!(disk.contents("f").unwrap()[5000], 0x82);

        let storage = disk.open();
        let file = storage.open("f").unwrap();
        disk.lose_nth_write(1);
        disk.misdirect_nth_write(2, Some(("f", 512)));
        for (n, offset) in [(3, 0), (4, 4096), (5, 2048)] {
            file.write_at(offset, &filled(512, n)).unwrap();
        }
        let found = sectors(&disk);
        assert_eq!((found[0], found[1], found[4], found[8]), (3, 5, 1, 2));
        disk.misdirect_nth_write(0, None);
        file.write_at(0, &filled(512, 6)).unwrap();
        assert_eq!(sectors(&disk).iter().filter(|&&byte| byte == 6).count(), 1);
    }
}

#[test]
fn a_fork_goes_its_own_way() {
    let (disk, file) = disk_with_file(1, 65536);
    let mut lane = disk.open().lane().unwrap();
    for n in 0..16 {
        lane.write(n, &file, n * 4096, filled(4096, 2), 0..4096);
    }
    let mut seen = BTreeSet::new();
    for seed in 0..20 {
        let fork = disk.fork(seed);
        assert!(fork.open().list("").is_err(), "its process is dead");
        fork.kill_restart();
        fork.open().list("").unwrap();
        seen.insert(sectors(&fork));
    }
    assert!(seen.len() > 10);
    assert_eq!((disk.outstanding(), sectors(&disk)), (16, vec![1; 128]));
    finish(&mut *lane);
    assert_eq!(sectors(&disk), [2; 128]);
}

#[test]
fn clocks_move_by_themselves_and_by_hand() {
    let clock = SimDisk::new(1).clock();
    let (wall, boot) = (clock.wall_ns(), clock.boot_ns());
    assert!(clock.wall_ns() > wall && clock.boot_ns() > boot);
    clock.set_wall_ns(17);
    assert!((18..20_000).contains(&clock.wall_ns()));
    clock.set_boot_ns(1_000_000);
    clock.advance(Duration::from_micros(1));
    assert!((1_001_001..1_020_000).contains(&clock.boot_ns()));
}
