//! Reading a leaf at an instant.

use cdp_types::{BranchId, Seq};

use super::codec::{self, DecodeError, States};
use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::keys::{self, RowKind};
use super::kv::{Family, Kv};
use super::leaf::{self, ChangeState, FANOUT, LEVELS, LeafAt, NodeKey};
use super::place::BlockState;

/// A change, as it concerns the leaf that is being read.
struct Effect {
    seq: Seq,
    first: u16,
    count: u16,
    state: BlockState,
}

/// What the rows of a leaf and of the nodes above it say, up to an instant.
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

/// See [`TimeIndex::leaf_at`](super::TimeIndex::leaf_at).
pub(super) fn leaf_at(kv: &dyn Kv, branch: BranchId, leaf: u64, at: Seq) -> IndexResult<LeafAt> {
    let mut gathered =
        Gathered { at, base: Seq::ZERO, image: None, effects: Vec::new(), deltas: 0, changes: 0 };
    // The leaf first: its image says how far back the levels above have to be read.
    let nodes: [_; LEVELS as usize] = std::array::from_fn(|level| {
        let level = level as u8;
        if level == 0 {
            return (NodeKey { branch, level, node: leaf }, None);
        }
        let (node, child) = leaf::cover(leaf, level);
        (NodeKey { branch, level, node }, Some(child))
    });
    let bounds = nodes.map(|(node, _)| (keys::map(node, at, RowKind::Image), keys::map_end(node)));
    let ranges = bounds.each_ref().map(|(from, to)| (&from[..], &to[..]));
    let mut failed = Ok(());
    kv.scan_each(Family::Map, &ranges, &mut |which, key, value| {
        let (node, child) = nodes[which];
        failed.is_ok()
            && gathered.row(node, child, key, value).unwrap_or_else(|error| {
                failed = Err(corrupt(kv, (node, keys::parse_map_suffix(key)), error));
                false
            })
    })?;
    failed.map(|()| gathered.into_leaf())
}
