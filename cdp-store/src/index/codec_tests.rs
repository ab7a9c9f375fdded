//! Tests of the codecs: what goes in comes out, and nothing that is read can hurt.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const KEY: &[u8] = b"the row's key";

fn a_place() -> impl Strategy<Value = Place> {
    let bits = prop_oneof![any::<u64>(), 0u64..1 << 34];
    (bits, any::<u32>()).prop_map(|(bits, crc)| Place { pos: LogPos::from_bits(bits), crc })
}

fn a_change(level: u8) -> impl Strategy<Value = (u64, Change)> {
    let zero = (0u16..512, any::<u16>())
        .prop_map(|(first, count)| (first, count % (512 - first) + 1, ChangeState::Zero));
    let mapped = (0u16..512, a_place()).prop_map(|(first, place)| (first, 1, ChangeState::Mapped(place)));
    let what = if level == 0 { prop_oneof![zero, mapped].boxed() } else { zero.boxed() };
    let step = prop_oneof![Just(0u64), 1u64..300, 0u64..1 << 50];
    (step, what)
        .prop_map(|(step, (first, count, state))| (step, Change { seq: Seq::ZERO, first, count, state }))
}

fn changes(level: u8) -> impl Strategy<Value = Vec<Change>> {
    vec(a_change(level), 1..200).prop_map(|steps| {
        let mut seq = Seq(1);
        let ascending = steps.into_iter().map(|(step, change)| {
            seq = seq.plus(step);
            Change { seq, ..change }
        });
        ascending.collect()
    })
}

/// Leaves as they are: runs of nothing, of zeroes, of neighbours and of places anywhere.
fn states() -> impl Strategy<Value = Box<States>> {
    let run = (0u8..4, 1usize..80, a_place(), vec(a_place(), 80));
    vec(run, 1..40).prop_map(|runs| {
        let mut states = super::super::leaf::unsaid();
        let mut at = 0;
        for (kind, length, start, scattered) in runs {
            for (index, other) in scattered.iter().enumerate().take(length.min(FANOUT - at)) {
                states[at] = match kind {
                    0 => BlockState::Unsaid,
                    1 => BlockState::Zero,
                    2 => {
                        let pos = start.pos.to_bits().wrapping_add(index as u64 * BLOCK_UNITS);
                        BlockState::Mapped(Place { pos: LogPos::from_bits(pos), crc: other.crc })
                    }
                    _ => BlockState::Mapped(*other),
                };
                at += 1;
            }
        }
        states
    })
}

fn delta_bytes(changes: &[Change]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_delta(KEY, changes, &mut bytes);
    bytes
}

fn read_delta(key: &[u8], level: u8, first: Seq, bytes: &[u8]) -> Decoded<Vec<Change>> {
    decode_delta(key, level, first, bytes)?.collect()
}

/// `body` with a version and a checksum that match it.
fn sealed(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    seal(KEY, &mut bytes, |out| out.extend_from_slice(body));
    bytes
}

fn decode_all(bytes: &[u8]) -> bool {
    let deltas = (0..4).filter(|level| read_delta(KEY, *level, Seq(u64::MAX - 9), bytes).is_ok()).count();
    let image = decode_image(KEY, bytes).is_ok();
    let mark = decode_watermark(KEY, bytes).is_ok();
    deltas > 0
        || image
        || mark
        || decode_present(KEY, bytes).is_ok()
        || decode_bits(KEY, bytes).is_ok()
        || decode_numbers::<2>(KEY, bytes).is_ok()
        || last_time(KEY, (u64::MAX - 9, Seq(9)), bytes, |_| true).is_ok()
}

proptest! {
    #[test]
    fn a_delta_comes_back(level in 0u8..4, seed in any::<prop::sample::Index>(), leaf in changes(0), upper in changes(1)) {
        let changes = if level == 0 { leaf } else { upper };
        let changes = &changes[..=seed.index(changes.len())];
        let bytes = delta_bytes(changes);
        prop_assert_eq!(read_delta(KEY, level, changes[0].seq, &bytes).unwrap(), changes);
    }

    #[test]
    fn an_image_comes_back(states in states()) {
        let mut bytes = Vec::new();
        encode_image(KEY, &states, &mut bytes);
        prop_assert_eq!(decode_image(KEY, &bytes).unwrap(), states);
    }

    #[test]
    fn what_a_leaf_looks_like_and_bits_come_back(states in states(), since: u64, bits: [u64; 8]) {
        let mut bytes = Vec::new();
        encode_present(KEY, Seq(since), &states, &mut bytes);
        prop_assert_eq!(decode_present(KEY, &bytes).unwrap(), (Seq(since), states));
        bytes.clear();
        encode_bits(KEY, &bits, &mut bytes);
        prop_assert_eq!(decode_bits(KEY, &bytes).unwrap(), bits);
    }

    #[test]
    fn a_watermark_and_numbers_come_back(
        ordinal: u64, seq: u64, pos: u64, header_crc: u32, time_ns: u64,
    ) {
        let mark = Watermark {
            ordinal: Ordinal(ordinal), seq: Seq(seq), pos: LogPos::from_bits(pos), header_crc, time_ns,
        };
        let mut bytes = Vec::new();
        encode_watermark(KEY, &mark, &mut bytes);
        prop_assert_eq!(decode_watermark(KEY, &bytes).unwrap(), mark);
        bytes.clear();
        encode_numbers(KEY, &[ordinal, time_ns], &mut bytes);
        prop_assert_eq!(decode_numbers::<2>(KEY, &bytes).unwrap(), [ordinal, time_ns]);
        prop_assert!(decode_numbers::<1>(KEY, &bytes).is_err());
    }

    #[test]
    fn any_bytes_are_an_error(bytes in vec(any::<u8>(), 0..300)) {
        // A checksum that matches by chance is not to be expected here.
        prop_assert!(!decode_all(&bytes));
    }

    #[test]
    fn any_body_under_a_matching_checksum_is_a_value_or_an_error(body in vec(any::<u8>(), 0..300)) {
        decode_all(&sealed(&body));
    }

    #[test]
    fn damage_and_misplacement_are_found(
        changes in changes(0), at in any::<prop::sample::Index>(), flip in 1u8..=255,
    ) {
        let bytes = delta_bytes(&changes);
        prop_assert!(read_delta(b"another row's key", 0, changes[0].seq, &bytes).is_err());
        let mut damaged = bytes.clone();
        damaged[at.index(bytes.len())] ^= flip;
        prop_assert!(read_delta(KEY, 0, changes[0].seq, &damaged).is_err());
        prop_assert!(read_delta(KEY, 0, changes[0].seq, &bytes[..at.index(bytes.len())]).is_err());
    }
}

#[test]
fn what_lies_outside_its_node_or_leaf_is_an_error() {
    let delta = |body: &[u8]| read_delta(KEY, 0, Seq(1), &sealed(body));
    let head = |first: u64, kind: u64| {
        let mut out = Vec::new();
        put_varint(&mut out, first << 2 | kind);
        out
    };
    let with_count = |first, count| {
        let mut out = head(first, tag::ZERO_RUN);
        put_varint(&mut out, count);
        out
    };
    assert_eq!(delta(&with_count(511, 1)).unwrap().len(), 1);
    assert_eq!(delta(&with_count(0, 512)).unwrap().len(), 1);
    for (body, why) in [
        (with_count(511, 2), "past the end"),
        (with_count(0, 513), "past the end"),
        (with_count(0, 0), "empty run"),
        (with_count(0, u64::MAX), "huge run"),
        (head(512, tag::ZERO_ONE), "first past the end"),
        (head(u64::MAX >> 2, tag::ZERO_ONE), "huge first"),
        (head(0, 3), "unknown kind"),
        (head(0, tag::MAPPED), "no place"),
        (Vec::new(), "empty delta"),
    ] {
        assert!(delta(&body).is_err(), "{why}");
    }
    let mapped = [head(3, tag::MAPPED), vec![2, 1, 2, 3, 4]].concat();
    assert_eq!(delta(&mapped).unwrap().len(), 1);
    assert!(read_delta(KEY, 1, Seq(1), &sealed(&mapped)).is_err(), "a place above level 0");

    let image = |runs: &[(u64, u64)]| {
        let mut body = Vec::new();
        runs.iter().for_each(|(length, kind)| put_varint(&mut body, length << 2 | kind));
        decode_image(KEY, &sealed(&body))
    };
    assert!(image(&[(512, run::ZERO)]).is_ok());
    assert!(image(&[(500, run::UNSAID), (12, run::ZERO)]).is_ok());
    for runs in [&[(511, run::ZERO)][..], &[(513, run::ZERO)], &[(0, run::ZERO), (512, run::ZERO)], &[]] {
        assert!(image(runs).is_err(), "{runs:?}");
    }
}

#[test]
fn bits_are_as_many_as_leaves() {
    for (bytes, is_sound) in [(64, true), (63, false), (65, false), (56, false), (72, false), (0, false)] {
        assert_eq!(decode_bits(KEY, &sealed(&vec![1; bytes])).is_ok(), is_sound, "{bytes}");
    }
}

#[test]
fn a_seq_that_would_wrap_is_an_error() {
    let body = [vec![tag::ZERO_ONE as u8], vec![1], vec![tag::ZERO_ONE as u8]].concat();
    assert!(read_delta(KEY, 0, Seq::MAX, &sealed(&body)).is_err());
    assert!(read_delta(KEY, 0, Seq::MAX.before(), &sealed(&body)).is_ok());
}

#[test]
fn a_number_of_more_than_64_bits_is_an_error() {
    let number = |bytes: &[u8]| Reader { rest: bytes }.varint();
    assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]), Ok(u64::MAX));
    assert!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]).is_err());
    assert!(number(&[0x80; 11]).is_err());
    assert!(number(&[0x80]).is_err());
}

#[test]
fn a_sequential_leaf_is_small_and_a_random_one_has_a_bound() {
    let bytes = |pos: &dyn Fn(u64) -> u64| {
        let mut states = super::super::leaf::unsaid();
        for (index, state) in states.iter_mut().enumerate() {
            let pos = LogPos::from_bits(pos(index as u64));
            *state = BlockState::Mapped(Place { pos, crc: 7 });
        }
        let mut out = Vec::new();
        encode_image(KEY, &states, &mut out);
        out.len()
    };
    // A version, a run, its first place, 512 block checksums, the value's own.
    assert!(bytes(&|index| (5 << 24) + index * BLOCK_UNITS) < 512 * 4 + 16);
    assert!(bytes(&|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) <= 512 * (4 + 10) + 16);
}
