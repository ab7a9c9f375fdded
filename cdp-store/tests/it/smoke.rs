//! A store on a real directory, used as a front end would use it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cdp_store::{ErrorKind, Store, StoreOptions, VerifyProgress, VolumeSpec};
use cdp_types::{BlockDevice, DeviceQueue, Event, Instant, IoBuf, IoErrorKind, Op, Origin, RequestId, Wait};

fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 4 << 20, pool_segments: 1, reserve_bytes: 0, ..StoreOptions::default() }
}

fn run(queue: &mut Box<dyn DeviceQueue>, op: Op) {
    queue.submit(RequestId(7), op);
    let mut events = Vec::new();
    for _ in 0..200 {
        queue.poll(Wait::For(Duration::from_millis(100)), &mut events).unwrap();
        if let Some(Event::Completed { result, .. }) = events.pop() {
            result.unwrap();
            return;
        }
    }
    panic!("the request did not end within 20 seconds");
}

fn write(queue: &mut Box<dyn DeviceQueue>, offset: u64, byte: u8, len: usize) {
    run(
        queue,
        Op::Write { offset, from: IoBuf::from_bytes(&vec![byte; len]), origin: Origin(0), fua: false },
    );
}

fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Vec<u8> {
    let mut queue = device.open_queue().unwrap();
    let into = IoBuf::zeroed(len);
    run(&mut queue, Op::Read { offset, into: into.share() });
    into.to_vec()
}

#[test]
fn what_is_written_is_read_back_at_every_instant_and_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    Store::create(&path, &options()).unwrap();
    let store = Store::open(&path, options()).unwrap();
    let name = "web1".parse().unwrap();
    let spec = VolumeSpec { size_bytes: 64 << 20, logical_block_size: 512 };
    let volume = store.create_volume(&name, spec).unwrap();
    let mut queue = volume.open_queue().unwrap();
    write(&mut queue, 0, 1, 8192);
    let first = volume.head();
    let mark = store.mark(&name, &Instant::Head, &"one".parse().unwrap(), BTreeMap::new()).unwrap();
    assert_eq!(mark.seq, first.seq);
    write(&mut queue, 4096, 2, 4096);
    write(&mut queue, 512, 3, 512);
    run(&mut queue, Op::Flush);
    run(
        &mut queue,
        Op::WriteZeroes {
            ranges: [cdp_types::ByteRange::new(1024, 8192)].into_iter().collect(),
            unmap: false,
            origin: Origin(0),
            fua: true,
        },
    );
    for index in 0..3000_u64 {
        write(&mut queue, (index * 7919 % 8000) * 4096 + (32 << 20), index as u8, 4096);
    }
    drop(queue);
    let check = |store: &Store| {
        let head = store.volume(&name).unwrap();
        let bytes = read(&*head, 0, 12288);
        assert_eq!(bytes[..512], [1; 512]);
        assert_eq!(bytes[512..1024], [3; 512]);
        assert_eq!(bytes[1024..9216], [0; 8192]);
        let at = |instant| read(&*store.open_at(&name, &instant).unwrap(), 0, 8192);
        assert_eq!(at(Instant::Seq(first.seq)), vec![1; 8192]);
        assert_eq!(at(Instant::Mark("one".parse().unwrap())), vec![1; 8192]);
        assert_eq!(at(Instant::Time(first.time_ns)), vec![1; 8192]);
        assert_eq!(at(Instant::Seq(first.seq.before())), vec![0; 8192]);
        let flushed = at(Instant::FlushBack(1));
        assert_eq!(flushed[512..1024], [3; 512]);
        assert_eq!(flushed[4096..8192], [2; 4096]);
        assert_eq!(read(&*head, (2999 * 7919 % 8000) * 4096 + (32 << 20), 4096)[0], 2999_u64 as u8);
        let report = store.verify(&mut |_| ()).unwrap();
        assert!(report.findings.is_empty(), "{report:?}");
        assert!(report.blocks_checked > 3000);
        let mut looks = 0;
        let given_up = store.verify_while(&mut |_| {
            looks += 1;
            looks < 3
        });
        assert_eq!((given_up.unwrap_err().kind(), looks), (ErrorKind::Closed, 3));
    };
    check(&store);
    store.close().unwrap();
    drop((volume, store));
    let store = Store::open(&path, options()).unwrap();
    check(&store);
    store.close().unwrap();
    drop(store);
    let told = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&told);
    let progress = move |progress: VerifyProgress| seen.store(progress.done_bytes, Ordering::Relaxed);
    Store::rebuild_index(&path, options(), Box::new(progress)).unwrap();
    let told = told.load(Ordering::Relaxed);
    assert!(told >= 10 << 20, "a rebuild says how far it has come: {told}");
    let store = Store::open_read_only(&path).unwrap();
    check(&store);
    assert!(store.create_volume(&"x".parse().unwrap(), spec).is_err());
    drop(store);
    let store = Store::open(&path, options()).unwrap();
    let volume = store.volume(&name).unwrap();
    let mut queue = volume.open_queue().unwrap();
    write(&mut queue, 0, 9, 512);
    run(&mut queue, Op::Flush);
    assert_eq!(read(&*volume, 0, 512), vec![9; 512]);
    drop(queue);
    drop(volume);
    let error = Store::open(&path, options()).unwrap_err();
    assert_eq!(error.kind(), cdp_store::ErrorKind::Locked);
    store.destroy_volume(&name, false).unwrap();
    assert!(store.volume(&name).is_err());
    store.close().unwrap();
}

/// More volumes than are recovered one after the other, each with a tail that the index does not have.
#[test]
fn many_volumes_come_back_each_with_its_own_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let options = StoreOptions { segment_bytes: 1 << 20, pool_segments: 0, ..options() };
    Store::create(&path, &options).unwrap();
    let name = |number: u8| format!("web{number}").parse().unwrap();
    let store = Store::open(&path, options).unwrap();
    for number in 1..=40 {
        let spec = VolumeSpec { size_bytes: 1 << 20, logical_block_size: 512 };
        let volume = store.create_volume(&name(number), spec).unwrap();
        let mut queue = volume.open_queue().unwrap();
        write(&mut queue, u64::from(number) * 4096, number, 4096);
        if number % 3 == 0 {
            run(&mut queue, Op::Flush);
        }
        write(&mut queue, 0, number, 512);
    }
    drop(store);
    // Its threads let go of the lock in their own time.
    let open = || Store::open(&path, options).inspect_err(|_| std::thread::sleep(Duration::from_millis(50)));
    let store = (0..1200).find_map(|_| open().ok()).unwrap();
    for number in 1..=40 {
        let volume = store.volume(&name(number)).unwrap();
        assert_eq!(read(&*volume, u64::from(number) * 4096, 4096), vec![number; 4096], "volume {number}");
        assert_eq!(read(&*volume, 0, 512), vec![number; 512], "volume {number}");
    }
    store.close().unwrap();
}

/// Reads many blocks at once; each holds the number of its leaf throughout, or its read may fail if `or_gone`.
fn read_leaves(queue: &mut Box<dyn DeviceQueue>, leaves: &[u64], or_gone: bool, meanwhile: impl FnOnce()) {
    let landing: Vec<IoBuf> = leaves.iter().map(|_| IoBuf::zeroed(4096)).collect();
    for (id, (leaf, into)) in leaves.iter().zip(&landing).enumerate() {
        queue.submit(RequestId(id as u64), Op::Read { offset: leaf * LEAF_BYTES, into: into.share() });
    }
    meanwhile();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let mut ended = 0;
    while ended < leaves.len() {
        assert!(std::time::Instant::now() < deadline, "{} reads never ended", leaves.len() - ended);
        let mut events = Vec::new();
        queue.poll(Wait::For(Duration::from_millis(100)), &mut events).unwrap();
        for event in events {
            let Event::Completed { id, result } = event else { continue };
            ended += 1;
            match result {
                Ok(()) => {
                    let number = leaves[id.0 as usize];
                    assert_eq!(landing[id.0 as usize].to_vec(), vec![number as u8; 4096], "leaf {number}");
                }
                Err(error) => assert!(or_gone && error.kind() == IoErrorKind::Gone, "{error}"),
            }
        }
    }
}

/// What a leaf of the map covers.
const LEAF_BYTES: u64 = 2 << 20;

#[test]
fn reads_of_more_leaves_than_the_map_may_keep_find_them_while_others_wait() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let options = StoreOptions { map_budget_bytes: 0, ..options() };
    Store::create(&path, &options).unwrap();
    let name: cdp_types::VolumeName = "web1".parse().unwrap();
    let store = Store::open(&path, options).unwrap();
    let spec = VolumeSpec { size_bytes: 200 * LEAF_BYTES, logical_block_size: 512 };
    let volume = store.create_volume(&name, spec).unwrap();
    let mut queue = volume.open_queue().unwrap();
    write(&mut queue, 0, 0, 4096);
    let first = Instant::Seq(volume.head().seq);
    (1..200).for_each(|leaf| write(&mut queue, leaf * LEAF_BYTES, leaf as u8, 4096));
    drop((queue, volume));
    store.close().unwrap();
    drop(store);

    let store = Store::open(&path, options).unwrap();
    let volume = store.volume(&name).unwrap();
    let mut queue = volume.open_queue().unwrap();
    let leaves: Vec<u64> = (0..64).map(|nth| nth * 77 % 200).collect();
    for round in 0..5 {
        let some: Vec<u64> = leaves.iter().map(|leaf| (leaf + round * 31) % 200).collect();
        read_leaves(&mut queue, &some, false, || ());
    }
    let loads = || store.volumes()[0].stats.leaf_loads;
    assert!(loads() >= 200, "most of these leaves were not at hand: {}", loads());
    // Whoever reads while the volume is reverted, or the store closed, gets an answer.
    let last = Instant::Seq(volume.head().seq);
    let revert = |to: &Instant| drop(store.revert(&[(name.clone(), to.clone())], true).unwrap());
    read_leaves(&mut queue, &leaves, true, || revert(&first));
    let mut queue = volume.open_queue().unwrap();
    read_leaves(&mut queue, &[0; 64], false, || ());
    // A revert keeps no leaf at hand.
    revert(&last);
    let mut queue = volume.open_queue().unwrap();
    let before = loads();
    read_leaves(&mut queue, &leaves, true, || store.close().unwrap());
    assert!(loads() > before, "the store was closed while nobody looked for a leaf");
}
