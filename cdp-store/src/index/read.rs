//! Reading a leaf at an instant.

use cdp_types::{BranchId, Seq};

use super::codec::{self, DecodeError, States};
use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::keys::{self, RowKind};
use super::kv::{Family, Kv};
use super::leaf::{self, ChangeState, FANOUT, LEVELS, LeafAt, NodeKey};
use super::place::BlockState;

/// A change, as it concerns the leaf that is being read.
#[derive(Clone)]
struct Effect {
    seq: Seq,
    first: u16,
    count: u16,
    state: BlockState,
}

/// What the rows of a leaf and of the nodes above it say, up to an instant.
#[derive(Clone)]
struct Gathered {
    at: Seq,
    /// The image's `Seq`; before every change if there is none.
    base: Seq,
    image: Option<Box<States>>,
    effects: Vec<Effect>,
    deltas: u32,
    changes: u32,
}

pub(super) fn corrupt(kv: &dyn Kv, row: impl std::fmt::Debug, source: DecodeError) -> IndexError {
    IndexError::new(IndexErrorKind::Corrupt, "read a row", format!("{} at {row:?}", kv.place()))
        .because(source)
}

impl Gathered {
    /// Takes one row in, newest first. Returns whether older ones matter.
    ///
    /// Behind an image one delta is still read: it may begin before the image and go on after it.
    fn row(
        &mut self,
        node: NodeKey,
        child: Option<u16>,
        key: &[u8],
        value: &[u8],
    ) -> Result<bool, DecodeError> {
        let (seq, kind) = keys::parse_map_suffix(key).ok_or(DecodeError("malformed key"))?;
        if kind == RowKind::Image {
            if node.level != 0 {
                return Err(DecodeError("an image above level 0"));
            }
            if self.image.is_none() {
                self.image = Some(codec::decode_image(key, value)?);
                self.base = seq;
            }
            return Ok(true);
        }
        let mut newer = 0;
        for change in codec::decode_delta(key, node.level, seq, value)? {
            let change = change?;
            if change.seq > self.at {
                break;
            }
            if change.seq <= self.base {
                continue;
            }
            newer += 1;
            let state = match change.state {
                ChangeState::Zero => BlockState::Zero,
                ChangeState::Mapped(place) => BlockState::Mapped(place),
            };
            let (first, count) = match child {
                None => (change.first, change.count),
                Some(child) if (change.first..change.first + change.count).contains(&child) => {
                    (0, FANOUT as u16)
                }
                Some(_) => continue,
            };
            self.effects.push(Effect { seq: change.seq, first, count, state });
        }
        self.changes = self.changes.saturating_add(newer);
        self.deltas = self.deltas.saturating_add(u32::from(newer > 0));
        Ok(seq > self.base)
    }

    fn into_leaf(mut self) -> LeafAt {
        // Rows came newest first, level by level; the sort keeps the order of the log within one `Seq`.
        self.effects.sort_by_key(|effect| effect.seq);
        let mut states = self.image.unwrap_or_else(leaf::unsaid);
        for effect in &self.effects {
            let first = usize::from(effect.first);
            states[first..first + usize::from(effect.count)].fill(effect.state);
        }
        LeafAt { states, deltas_since_image: self.deltas, changes_since_image: self.changes }
    }
}

/// See [`TimeIndex::leaves_at`](super::TimeIndex::leaves_at).
pub(super) fn leaves_at(kv: &dyn Kv, branch: BranchId, leaves: &[u64], at: Seq) -> IndexResult<Vec<LeafAt>> {
    let nothing = Gathered { at, base: Seq::ZERO, image: None, effects: Vec::new(), deltas: 0, changes: 0 };
    // The leaves first: their images say how far back the levels above have to be read.
    let mut nodes: Vec<NodeKey> = leaves.iter().map(|&node| NodeKey { branch, level: 0, node }).collect();
    nodes.extend(above(branch, leaves));
    let gathered = gather(kv, leaves, &nodes, leaves.iter().map(|_| nothing.clone()).collect())?;
    Ok(gathered.into_iter().map(Gathered::into_leaf).collect())
}

/// What a leaf was as of `since`, if no row of level 0 is newer, after what rows above it say up to `at`.
pub(super) fn leaf_since(
    kv: &dyn Kv,
    leaf: NodeKey,
    (since, states): (Seq, Box<States>),
    at: Seq,
) -> IndexResult<Box<States>> {
    let known = Gathered { at, base: since, image: Some(states), effects: Vec::new(), deltas: 0, changes: 0 };
    let nodes: Vec<NodeKey> = above(leaf.branch, &[leaf.node]).collect();
    match gather(kv, &[leaf.node], &nodes, vec![known])?.pop() {
        Some(gathered) => Ok(gathered.into_leaf().states),
        None => unreachable!("one leaf was asked for"),
    }
}

/// The nodes that cover some leaves, level by level.
fn above(branch: BranchId, leaves: &[u64]) -> impl Iterator<Item = NodeKey> {
    (1..LEVELS).flat_map(move |level| {
        let mut above: Vec<u64> = leaves.iter().map(|&leaf| leaf::cover(leaf, level).0).collect();
        above.sort_unstable();
        above.dedup();
        above.into_iter().map(move |node| NodeKey { branch, level, node })
    })
}

/// Adds to what is known of some leaves what the rows of these nodes say: of the leaves themselves, in the same order, if
/// the first ones are of level 0, and of nodes above.
fn gather(
    kv: &dyn Kv,
    leaves: &[u64],
    nodes: &[NodeKey],
    mut gathered: Vec<Gathered>,
) -> IndexResult<Vec<Gathered>> {
    let Some(at) = gathered.first().map(|leaf| leaf.at) else { return Ok(gathered) };
    let bounds: Vec<_> =
        nodes.iter().map(|&node| (keys::map(node, at, RowKind::Image), keys::map_end(node))).collect();
    let ranges: Vec<(&[u8], &[u8])> = bounds.iter().map(|(from, to)| (&from[..], &to[..])).collect();
    // Of the current node, whether older rows do not matter to a leaf any more.
    let (mut current, mut finished) = (usize::MAX, vec![false; leaves.len()]);
    let mut take = |which: usize, key: &[u8], value: &[u8]| {
        let node = nodes[which];
        if current != which {
            current = which;
            finished.fill(false);
        }
        if node.level == 0 {
            return gathered[which].row(node, None, key, value);
        }
        for ((&number, leaf), finished) in leaves.iter().zip(&mut gathered).zip(&mut finished) {
            let (above, child) = leaf::cover(number, node.level);
            *finished = *finished || above != node.node || !leaf.row(node, Some(child), key, value)?;
        }
        Ok(finished.iter().any(|finished| !finished))
    };
    let mut failed = Ok(());
    kv.scan_each(Family::Map, &ranges, &mut |which, key, value| {
        failed.is_ok()
            && take(which, key, value).unwrap_or_else(|error| {
                failed = Err(corrupt(kv, (nodes[which], keys::parse_map_suffix(key)), error));
                false
            })
    })?;
    failed.map(|()| gathered)
}
