//! Keys of the time index's rows. Their layout is in `docs/format.md`, "Time index".
//!
//! Numbers are big-endian, so that the order of keys is the order of numbers; those whose newest row is wanted
//! first are inverted.

use cdp_types::{BranchId, Seq, VolumeId};

use super::leaf::NodeKey;

/// Bytes of a map key that name the node: the unit of RocksDB's prefix filters.
pub(super) const NODE_PREFIX_LEN: usize = 17;
/// Bytes of a map key.
pub(super) const MAP_KEY_LEN: usize = NODE_PREFIX_LEN + 9;

/// What a row of the map is. Of two rows with one `Seq` the image is met first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowKind {
    Image = 0,
    Delta = 1,
}

fn concat<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut key = [0; N];
    let mut at = 0;
    for part in parts {
        key[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert_eq!(at, N);
    key
}

fn node_prefix(node: NodeKey) -> [u8; NODE_PREFIX_LEN] {
    concat(&[&node.branch.0.to_be_bytes(), &[node.level], &node.node.to_be_bytes()])
}

pub(super) fn map(node: NodeKey, seq: Seq, kind: RowKind) -> [u8; MAP_KEY_LEN] {
    concat(&[&node_prefix(node), &(!seq.0).to_be_bytes(), &[kind as u8]])
}

/// After every row of the node, and with the node's prefix.
pub(super) fn map_end(node: NodeKey) -> [u8; MAP_KEY_LEN + 1] {
    concat(&[&node_prefix(node), &[0xff; 10]])
}

/// `Seq` and kind of a row, from its key.
pub(super) fn parse_map_suffix(key: &[u8]) -> Option<(Seq, RowKind)> {
    let suffix: &[u8; 9] = key.get(NODE_PREFIX_LEN..)?.try_into().ok()?;
    let [inverted @ .., kind] = suffix;
    let kind = match kind {
        0 => RowKind::Image,
        1 => RowKind::Delta,
        _ => return None,
    };
    Some((Seq(!u64::from_be_bytes(*inverted)), kind))
}

/// The number of the node that a key belongs to.
pub(super) fn parse_node(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(9..NODE_PREFIX_LEN)?.try_into().ok()?))
}

/// The level of the node that a key belongs to.
pub(super) fn parse_level(key: &[u8]) -> Option<u8> {
    key.get(8).copied()
}

/// The first key of a branch, in any family that is keyed by branch.
pub(super) fn branch_start(branch: BranchId) -> [u8; 8] {
    branch.0.to_be_bytes()
}

/// After every key of a branch, in any family that is keyed by branch.
pub(super) fn branch_end(branch: BranchId) -> [u8; 32] {
    concat(&[&branch.0.to_be_bytes(), &[0xff; 24]])
}

const BY_TIME: u8 = 0;
const BY_SEQ: u8 = 1;
const FLATTENING: u8 = 2;

pub(super) fn by_time(branch: BranchId, time_ns: u64, seq: Seq) -> [u8; 25] {
    concat(&[&branch.0.to_be_bytes(), &[BY_TIME], &(!time_ns).to_be_bytes(), &(!seq.0).to_be_bytes()])
}

pub(super) fn by_time_end(branch: BranchId) -> [u8; 9] {
    concat(&[&branch.0.to_be_bytes(), &[BY_TIME + 1]])
}

/// (time, `Seq`) of a row of the order by time.
pub(super) fn parse_by_time(key: &[u8]) -> Option<(u64, Seq)> {
    let key: &[u8; 25] = key.try_into().ok()?;
    let (time, seq) = key[9..].split_first_chunk::<8>()?;
    let seq: [u8; 8] = seq.try_into().ok()?;
    Some((!u64::from_be_bytes(*time), Seq(!u64::from_be_bytes(seq))))
}

pub(super) fn by_seq(branch: BranchId, seq: Seq) -> [u8; 17] {
    concat(&[&branch.0.to_be_bytes(), &[BY_SEQ], &(!seq.0).to_be_bytes()])
}

pub(super) fn by_seq_end(branch: BranchId) -> [u8; 9] {
    concat(&[&branch.0.to_be_bytes(), &[BY_SEQ + 1]])
}

/// Of the one row that says how a branch's line was flattened.
pub(super) fn flattening(branch: BranchId) -> [u8; 9] {
    concat(&[&branch.0.to_be_bytes(), &[FLATTENING]])
}

/// `Seq` of a row of the order by `Seq`.
pub(super) fn parse_by_seq(key: &[u8]) -> Option<Seq> {
    let key: &[u8; 17] = key.try_into().ok()?;
    let seq: [u8; 8] = key[9..].try_into().ok()?;
    Some(Seq(!u64::from_be_bytes(seq)))
}

const STALE: u8 = 0;
const PRESENT: u8 = 1;

/// Of the row that says which leaves of a group are stale.
pub(super) fn stale(branch: BranchId, group: u64) -> [u8; 17] {
    concat(&[&[STALE], &branch.0.to_be_bytes(), &group.to_be_bytes()])
}

/// After every such row.
pub(super) const STALE_END: [u8; 1] = [STALE + 1];

/// (branch, group) of such a row.
pub(super) fn parse_stale(key: &[u8]) -> Option<(BranchId, u64)> {
    let key: &[u8; 17] = key.try_into().ok()?;
    let (branch, group) = key[1..].split_first_chunk::<8>()?;
    let group: [u8; 8] = group.try_into().ok()?;
    (key[0] == STALE).then_some((BranchId(u64::from_be_bytes(*branch)), u64::from_be_bytes(group)))
}

/// Of the row that says what a leaf looks like now.
pub(super) fn present(branch: BranchId, leaf: u64) -> [u8; 17] {
    concat(&[&[PRESENT], &branch.0.to_be_bytes(), &leaf.to_be_bytes()])
}

/// After every row of its family.
pub(super) const PRESENT_END: [u8; 1] = [PRESENT + 1];

/// Where a branch's rows of that family begin and end: those of either kind.
pub(super) fn presents_of(branch: BranchId) -> [([u8; 9], [u8; 18]); 2] {
    [STALE, PRESENT].map(|kind| {
        let branch = branch.0.to_be_bytes();
        (concat(&[&[kind], &branch]), concat(&[&[kind], &branch, &[0xff; 9]]))
    })
}

pub(super) fn watermark(volume: VolumeId) -> [u8; 8] {
    volume.0.to_be_bytes()
}

/// After every watermark.
pub(super) const WATERMARK_END: [u8; 9] = [0xff; 9];

pub(super) fn parse_watermark(key: &[u8]) -> Option<VolumeId> {
    Some(VolumeId(u64::from_be_bytes(key.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeKey = NodeKey { branch: BranchId(3), level: 1, node: 77 };

    #[test]
    fn newer_rows_come_first_and_an_image_before_a_delta() {
        let keys = [
            map(NODE, Seq::MAX, RowKind::Image),
            map(NODE, Seq(9), RowKind::Image),
            map(NODE, Seq(9), RowKind::Delta),
            map(NODE, Seq(8), RowKind::Delta),
            map(NODE, Seq::ZERO, RowKind::Delta),
        ];
        assert!(keys.is_sorted());
        assert!(keys.iter().all(|key| key[..] < map_end(NODE)[..]));
        assert!(map_end(NODE)[..] < map(NodeKey { node: 78, ..NODE }, Seq::MAX, RowKind::Image)[..]);
    }

    #[test]
    fn keys_give_back_what_they_were_made_of() {
        let key = map(NODE, Seq(9), RowKind::Delta);
        assert_eq!(parse_map_suffix(&key), Some((Seq(9), RowKind::Delta)));
        assert_eq!(parse_node(&key), Some(77));
        assert_eq!(parse_by_time(&by_time(BranchId(1), 5, Seq(6))), Some((5, Seq(6))));
        assert_eq!(parse_by_seq(&by_seq(BranchId(1), Seq(6))), Some(Seq(6)));
        assert_eq!(parse_watermark(&watermark(VolumeId(4))), Some(VolumeId(4)));
        for short in 0..key.len() {
            assert_eq!(parse_map_suffix(&key[..short]), None);
        }
    }

    #[test]
    fn a_branch_ends_after_all_its_keys_and_before_the_next_branch() {
        let end = branch_end(BranchId(3));
        let last = NodeKey { branch: BranchId(3), level: 3, node: u64::MAX };
        assert!(map(last, Seq::ZERO, RowKind::Delta)[..] < end[..]);
        assert!(by_seq(BranchId(3), Seq::ZERO)[..] < end[..]);
        assert!(end[..] < branch_start(BranchId(4))[..]);
    }
}
