//! Tests of what the seam promises, on real files.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use super::*;

fn put(family: Family, key: &[u8], value: &[u8]) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(family, key, value);
    batch
}

fn rows(kv: &RocksKv, family: Family, from: &[u8], to: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    kv.scan(family, from, to, &mut |key, value| {
        rows.push((key.to_vec(), value.to_vec()));
        true
    })
    .unwrap();
    rows
}

fn small() -> RocksOptions {
    RocksOptions { memory_bytes: 8 << 20, ..RocksOptions::default() }
}

/// The files of a database as a kill would leave them.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_killed_index_has_what_was_flushed_in_all_families_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (path, killed) = (directory.path().join("index"), directory.path().join("killed"));
    let kv = RocksKv::open(&path, &small()).unwrap();
    for family in Family::TIME_INDEX {
        kv.write(&put(*family, b"flushed", b"1")).unwrap();
    }
    kv.flush().unwrap();
    for family in Family::TIME_INDEX {
        kv.write(&put(*family, b"later", b"2")).unwrap();
        assert_eq!(kv.get(*family, b"later").unwrap().unwrap(), b"2");
    }
    copy(&path, &killed);
    let again = RocksKv::open(&killed, &small()).unwrap();
    for family in Family::TIME_INDEX {
        assert_eq!(again.get(*family, b"flushed").unwrap().unwrap(), b"1");
        assert_eq!(again.get(*family, b"later").unwrap(), None);
    }
}

/// Waits until RocksDB has no flush to do, so that its files can be copied.
fn settle(kv: &RocksKv) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let open = kv.opened("settle").unwrap();
    let busy = |name: &properties::PropName| {
        let handles = Family::TIME_INDEX.iter().map(|family| open.db.cf_handle(family.name()).unwrap());
        handles.map(|handle| open.db.property_int_value_cf(handle, name).unwrap().unwrap()).sum::<u64>() > 0
    };
    while [
        properties::NUM_IMMUTABLE_MEM_TABLE,
        properties::MEM_TABLE_FLUSH_PENDING,
        properties::NUM_RUNNING_FLUSHES,
        properties::NUM_RUNNING_COMPACTIONS,
    ]
    .into_iter()
    .any(busy)
    {
        assert!(Instant::now() < deadline, "RocksDB does not come to rest");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_memtable_that_fills_up_takes_the_watermark_of_its_rows_along() {
    let directory = tempfile::tempdir().unwrap();
    let (path, killed) = (directory.path().join("index"), directory.path().join("killed"));
    let kv = RocksKv::open(&path, &small()).unwrap();
    // Five megabytes, where a memtable has two, and nobody flushes.
    let batches = 1250u32;
    for number in 1..=batches {
        let mut batch = put(Family::Map, &number.to_be_bytes(), &[7; 4096]);
        batch.put(Family::Watermark, b"volume", &number.to_be_bytes());
        kv.write(&batch).unwrap();
    }
    settle(&kv);
    copy(&path, &killed);
    let again = RocksKv::open(&killed, &small()).unwrap();
    let mark = again.get(Family::Watermark, b"volume").unwrap().expect("something was flushed");
    let mark = u32::from_be_bytes(mark.try_into().unwrap());
    assert!(mark > 0 && mark < batches, "{mark} of {batches} batches were flushed");
    let rows = rows(&again, Family::Map, &[], &[0xff]);
    assert_eq!(rows.len(), mark as usize);
    assert_eq!(rows.last().unwrap().0, mark.to_be_bytes());
}

#[test]
fn a_killed_catalogue_has_every_row_that_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let (path, killed) = (directory.path().join("catalogue"), directory.path().join("killed"));
    let kv = RocksKv::open_synced(&path).unwrap();
    kv.write(&put(Family::Rows, b"a", b"1")).unwrap();
    copy(&path, &killed);
    let again = RocksKv::open_synced(&killed).unwrap();
    assert_eq!(again.get(Family::Rows, b"a").unwrap().unwrap(), b"1");
    drop(again);
    let looked_at = RocksKv::open_synced_read_only(&killed).unwrap();
    assert_eq!(looked_at.get(Family::Rows, b"a").unwrap().unwrap(), b"1");
}

#[test]
fn a_second_opening_is_told_that_the_first_has_it_and_may_look() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    kv.write(&put(Family::Map, b"k", b"v")).unwrap();
    kv.flush().unwrap();
    let error = RocksKv::open(directory.path(), &small()).unwrap_err();
    assert_eq!(error.kind(), IndexErrorKind::Locked, "{error}");
    let looking = RocksKv::open_read_only(directory.path()).unwrap();
    assert_eq!(looking.get(Family::Map, b"k").unwrap().unwrap(), b"v");
    for refused in [looking.write(&WriteBatch::new()), looking.flush(), looking.clear()] {
        assert_eq!(refused.unwrap_err().kind(), IndexErrorKind::Invalid);
    }
}

#[test]
fn a_database_without_the_newest_family_is_read_as_it_is_and_given_it_when_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    {
        let tuned = tuning::time_index(&small());
        let older = [Family::Map, Family::Time, Family::Watermark];
        let families = older.map(|family| (family.name(), tuned.family(family)));
        let db = DB::open_cf_with_opts(&tuned.database, directory.path(), families).unwrap();
        db.put_cf(db.cf_handle(Family::Map.name()).unwrap(), b"k", b"v").unwrap();
    }
    let looking = RocksKv::open_read_only(directory.path()).unwrap();
    assert_eq!(looking.get(Family::Map, b"k").unwrap().unwrap(), b"v");
    assert_eq!(looking.get(Family::Present, b"k").unwrap_err().kind(), IndexErrorKind::Invalid);
    looking.stats().unwrap();
    drop(looking);
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    kv.write(&put(Family::Present, b"k", b"w")).unwrap();
    assert_eq!(kv.get(Family::Map, b"k").unwrap().unwrap(), b"v");
    assert_eq!(kv.get(Family::Present, b"k").unwrap().unwrap(), b"w");
}

#[test]
fn it_fits_its_cache_until_it_is_larger() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    assert!(kv.fits_cache().unwrap());
    // Half of the memory is cache. Pseudo-random bytes: compression must not shorten them.
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    for row in 0..5u32 {
        let value: Vec<u8> = (0..1 << 20).map(|_| byte()).collect();
        kv.write(&put(Family::Map, &row.to_be_bytes(), &value)).unwrap();
    }
    kv.flush().unwrap();
    assert!(!kv.fits_cache().unwrap());
}

#[test]
fn a_database_that_is_not_there_is_missing_and_not_made_by_looking() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none");
    assert_eq!(RocksKv::open_read_only(&path).unwrap_err().kind(), IndexErrorKind::Missing);
    assert!(!path.exists());
}

/// The first file of a database whose name satisfies `named`.
fn file(path: &Path, named: impl Fn(&str) -> bool) -> PathBuf {
    let mut names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    names.find(|path| named(path.file_name().unwrap().to_str().unwrap())).unwrap()
}

type Damage = fn(&Path) -> io::Result<()>;

#[test]
fn a_damaged_database_says_so_and_can_be_made_anew() {
    let garbage: Damage = |path| fs::write(path, b"garbage");
    let gone: Damage = |path| fs::remove_file(path);
    let empty: Damage = |path| fs::write(path, b"");
    for (start, damage) in [
        ("CURRENT", garbage),
        ("MANIFEST", garbage),
        ("MANIFEST", gone),
        ("MANIFEST", empty),
        ("table", gone),
        ("table", empty),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index");
        let kv = RocksKv::open(&path, &small()).unwrap();
        kv.write(&put(Family::Map, b"k", b"v")).unwrap();
        kv.flush().unwrap();
        drop(kv);
        let is_damaged = |name: &str| {
            if start == "table" { name.ends_with(".sst") } else { name.starts_with(start) }
        };
        damage(&file(&path, is_damaged)).unwrap();
        let opened = RocksKv::open(&path, &small());
        // A table is opened on demand at the latest.
        let error = opened.and_then(|kv| kv.get(Family::Map, b"k")).unwrap_err();
        assert_eq!(error.kind(), IndexErrorKind::Corrupt, "{start}: {error}");
        RocksKv::destroy(&path).unwrap();
        assert!(!path.exists());
        let anew = RocksKv::open(&path, &small()).unwrap();
        assert_eq!(anew.get(Family::Map, b"k").unwrap(), None);
    }
}

#[test]
fn a_flipped_bit_in_a_table_is_corruption() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    let noise: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    kv.write(&put(Family::Map, b"0123456789abcdef_k", &noise)).unwrap();
    kv.flush().unwrap();
    drop(kv);
    let table = file(directory.path(), |name| name.ends_with(".sst"));
    let mut bytes = fs::read(&table).unwrap();
    bytes[1000] ^= 1;
    fs::write(&table, bytes).unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    let mut seen = 0;
    let scanned = kv.scan(Family::Map, b"", b"\xff", &mut |_, _| {
        seen += 1;
        true
    });
    assert_eq!(scanned.unwrap_err().kind(), IndexErrorKind::Corrupt);
    assert_eq!(seen, 0);
    assert_eq!(kv.get(Family::Map, b"0123456789abcdef_k").unwrap_err().kind(), IndexErrorKind::Corrupt);
}

#[test]
fn a_clear_leaves_nothing_and_a_half_done_one_is_finished_at_the_next_opening() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index");
    let kv = RocksKv::open(&path, &small()).unwrap();
    kv.write(&put(Family::Map, b"k", b"v")).unwrap();
    kv.clear().unwrap();
    assert_eq!(kv.get(Family::Map, b"k").unwrap(), None);
    kv.write(&put(Family::Map, b"k2", b"v")).unwrap();
    kv.flush().unwrap();
    drop(kv);

    fs::create_dir(discarded(&path)).unwrap();
    fs::write(discarded(&path).join("CURRENT"), b"x").unwrap();
    let kv = RocksKv::open(&path, &small()).unwrap();
    assert!(!discarded(&path).exists());
    assert_eq!(kv.get(Family::Map, b"k").unwrap(), None);
    assert_eq!(kv.get(Family::Map, b"k2").unwrap().unwrap(), b"v");
}

#[test]
fn scans_within_a_node_and_across_nodes_see_exactly_their_range() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    let key = |node: u8, row: u8| [&[node; NODE_PREFIX_LEN][..], &[row]].concat();
    // Each round ends in a file of its own, so that a scan has to merge; no file knows the odd nodes.
    for round in 0..3 {
        for node in (0..20).step_by(2) {
            kv.write(&put(Family::Map, &key(node, round), &[round])).unwrap();
        }
        kv.flush().unwrap();
    }
    kv.write(&put(Family::Map, &key(6, 3), &[3])).unwrap();
    let keys = |from: &[u8], to: &[u8]| -> Vec<Vec<u8>> {
        rows(&kv, Family::Map, from, to).into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(keys(&key(6, 1), &key(6, 255)), [key(6, 1), key(6, 2), key(6, 3)]);
    assert_eq!(keys(&key(6, 1), &key(6, 3)), [key(6, 1), key(6, 2)]);
    assert_eq!(keys(&key(7, 0), &key(7, 255)), Vec::<Vec<u8>>::new());
    assert_eq!(keys(&key(6, 2), &key(8, 1)), [key(6, 2), key(6, 3), key(8, 0)]);
    assert_eq!(keys(&key(7, 0), &key(8, 2)), [key(8, 0), key(8, 1)]);
    assert_eq!(keys(&[], &[0xff]).len(), 31);
    assert_eq!(keys(&key(8, 0), &key(6, 0)), Vec::<Vec<u8>>::new());
}

#[test]
fn a_reclaimed_range_gives_its_space_back_and_its_neighbours_stay() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    let mut random = 1u64;
    for branch in [1u8, 2, 3] {
        for row in 0..2000u16 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = [&[branch; NODE_PREFIX_LEN][..], &row.to_be_bytes()].concat();
            kv.write(&put(Family::Map, &key, &random.to_le_bytes().repeat(8))).unwrap();
        }
        kv.flush().unwrap();
    }
    let before = kv.stats().unwrap().disk_bytes;
    let mut batch = WriteBatch::new();
    batch.delete_range(Family::Map, &[2], &[3]);
    kv.write(&batch).unwrap();
    assert_eq!(rows(&kv, Family::Map, &[], &[0xff]).len(), 4000);
    kv.flush().unwrap();
    kv.reclaim(Family::Map, &[2], &[3]).unwrap();
    assert_eq!(rows(&kv, Family::Map, &[], &[0xff]).len(), 4000);
    let after = kv.stats().unwrap().disk_bytes;
    assert!(after < before * 3 / 4, "{after} of {before} bytes left");
}

#[test]
fn a_family_of_the_other_database_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path(), &small()).unwrap();
    assert_eq!(kv.write(&put(Family::Rows, b"k", b"v")).unwrap_err().kind(), IndexErrorKind::Invalid);
    assert_eq!(kv.get(Family::Rows, b"k").unwrap_err().kind(), IndexErrorKind::Invalid);
}

fn level_zero(kv: &RocksKv) -> u64 {
    let open = kv.opened("look").unwrap();
    let map = open.db.cf_handle(Family::Map.name()).unwrap();
    open.db.property_int_value_cf(map, properties::num_files_at_level(0)).unwrap().unwrap()
}

#[test]
fn files_are_compacted_sooner_while_nothing_is_written_and_only_then() {
    let directory = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(directory.path().join("index"), &small()).unwrap();
    let files = |some: std::ops::Range<u8>| {
        for number in some {
            kv.write(&put(Family::Map, &[number; 26], b"row")).unwrap();
            kv.flush().unwrap();
        }
        settle(&kv);
        level_zero(&kv)
    };
    assert_eq!(files(0..3), 3);
    kv.tidy().unwrap();
    settle(&kv);
    assert_eq!(level_zero(&kv), 3, "too few to be worth it");
    assert_eq!(files(3..5), 5);
    kv.tidy().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    // Two are needed for more, and of such few rows RocksDB moves one file at a time.
    while level_zero(&kv) > 1 {
        assert!(Instant::now() < deadline, "still {} files", level_zero(&kv));
        std::thread::sleep(Duration::from_millis(10));
    }
    settle(&kv);
    let left = level_zero(&kv);
    assert_eq!(files(5..11), left + 6, "it is written again");
    assert_eq!(rows(&kv, Family::Map, &[0; 26], &[12; 26]).len(), 11);
}

/// How many tables of a database this process has open.
fn open_tables(path: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
    targets.filter(|to| to.starts_with(path) && to.extension().is_some_and(|e| e == "sst")).count()
}

#[test]
fn preloading_opens_the_tables_that_reads_would_have_to_unless_it_is_told_to_stop() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap().join("index");
    let kv = RocksKv::open(&path, &small()).unwrap();
    // Fewer than make RocksDB compact them into one.
    for number in 0..7_u8 {
        kv.write(&put(Family::Map, &[number; 26], b"row")).unwrap();
        kv.flush().unwrap();
    }
    drop(kv);
    // With room for so few files RocksDB opens one or two by itself.
    let kv = RocksKv::open(&path, &RocksOptions { max_open_files: 20, ..small() }).unwrap();
    let before = open_tables(&path);
    assert!(before < 7, "nothing is left to do: {before}");
    kv.preload(&|| true);
    assert_eq!(open_tables(&path), before);
    kv.preload(&|| false);
    assert!((7..=10).contains(&open_tables(&path)), "{before}, then {}", open_tables(&path));
    assert_eq!(rows(&kv, Family::Map, &[3; 26], &[3; 27]).len(), 1);
}
