//! What leaves look like now, kept beside their history.
//!
//! To read a leaf from its history takes a look into each level of the database. Of a leaf that has not changed for a
//! while one row says the same. Leaves that have changed since theirs was written, or were found to have none, are
//! *stale*: a bit for each, in memory, and in one row for each [`GROUP`] leaves, which is written together with the rows
//! that make them so. The row of a stale leaf does not count, and is left where it is until it is replaced.
//!
//! A leaf that is stale in memory may not be so in the database, and then the next write of changes says it; never the other
//! way round, but while the bits could not be read, when no row counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use cdp_types::{BranchId, Seq};

use super::codec::{self, DecodeError, States};
use super::error::{IndexError, IndexErrorKind, IndexResult};
use super::keys;
use super::kv::{Family, Kv, WriteBatch};
use super::read::corrupt;

/// Leaves whose bits share a row.
pub(super) const GROUP: u64 = 512;
/// A bit for each of them.
pub(super) type Bits = [u64; (GROUP / 64) as usize];

/// A branch, and which of its groups.
type Group = (BranchId, u64);

/// Some leaves of one group.
pub(super) type Leaves = (Group, Bits);

/// Adds a leaf to a list, which stays short if leaves of one group follow each other.
pub(super) fn add_leaf(leaves: &mut Vec<Leaves>, branch: BranchId, leaf: u64) {
    let of = (branch, leaf / GROUP);
    if leaves.last().is_none_or(|(last, _)| *last != of) {
        leaves.push((of, Bits::default()));
    }
    if let Some((_, bits)) = leaves.last_mut() {
        set(bits, leaf);
    }
}

fn word_and_bit(leaf: u64) -> (usize, u64) {
    let within = leaf % GROUP;
    ((within / 64) as usize, 1 << (within % 64))
}

fn set(bits: &mut Bits, leaf: u64) {
    let (word, bit) = word_and_bit(leaf);
    bits[word] |= bit;
}

#[derive(Debug, Default)]
struct Stale {
    groups: BTreeMap<Group, Bits>,
    /// Groups of which the database may have fewer bits: the next write of changes puts them.
    unsure: BTreeSet<Group>,
    /// The database's bits could not be read: no row counts, and the next write removes them all.
    unread: bool,
}

impl Stale {
    fn bits(&self, group: Group) -> Bits {
        self.groups.get(&group).copied().unwrap_or_default()
    }

    fn has(&self, branch: BranchId, leaf: u64) -> bool {
        let (word, bit) = word_and_bit(leaf);
        self.groups.get(&(branch, leaf / GROUP)).is_some_and(|bits| bits[word] & bit != 0)
    }
}

/// What there is of a leaf.
pub(super) enum Found {
    /// What it looks like since a `Seq`, as far as level 0 goes.
    Known(Seq, Box<States>),
    /// Only its history has it.
    Changed,
    /// The same, because no row was ever written, or it cannot be read.
    Missing,
}

/// The rows of [`Family::Present`], and which of them count.
pub(super) struct Presents {
    kv: Arc<dyn Kv>,
    stale: RwLock<Stale>,
}

impl Presents {
    /// Those of a database that was just opened.
    pub(super) fn new(kv: Arc<dyn Kv>) -> Self {
        let stale = load(&*kv).unwrap_or_else(|error| {
            // Of a database that is read as an older version has left it, it is no news.
            if error.kind() != IndexErrorKind::Invalid {
                tracing::warn!("what leaves look like now is read from their history: {error}");
            }
            Stale { unread: true, ..Stale::default() }
        });
        Self { kv, stale: RwLock::new(stale) }
    }

    /// Never held during a read or a write of the database: whoever reads a leaf asks.
    fn stale(&self) -> RwLockReadGuard<'_, Stale> {
        self.stale.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn stale_mut(&self) -> RwLockWriteGuard<'_, Stale> {
        self.stale.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a branch says about a leaf at an instant. Rows that are written meanwhile may be missing, as they may be from a
    /// scan that has begun before.
    pub(super) fn find(&self, branch: BranchId, leaf: u64, at: Seq) -> Found {
        let counts = {
            let stale = self.stale();
            !stale.unread && !stale.has(branch, leaf)
        };
        if !counts {
            return Found::Changed;
        }
        let key = keys::present(branch, leaf);
        let decode = |row: Vec<u8>| {
            let of = (Family::Present, branch, leaf);
            codec::decode_present(&key, &row).map_err(|error| corrupt(&*self.kv, of, error))
        };
        match self.kv.get(Family::Present, &key).and_then(|row| row.map(decode).transpose()) {
            Ok(Some((since, states))) if since <= at => Found::Known(since, states),
            Ok(Some(_)) => Found::Changed,
            Ok(None) => Found::Missing,
            Err(error) => {
                // Its history has all that it says.
                tracing::warn!("leaf {leaf} of branch {branch} is read from its history: {error}");
                Found::Missing
            }
        }
    }

    /// Makes a leaf stale whose row is missing, so that one will be written if its branch is a head.
    pub(super) fn missed(&self, branch: BranchId, leaf: u64) {
        let mut stale = self.stale_mut();
        let group = (branch, leaf / GROUP);
        set(stale.groups.entry(group).or_default(), leaf);
        stale.unsure.insert(group);
    }

    /// Makes leaves stale, ahead of the write that changes them. Returns what that has to write besides, and the bits in it.
    pub(super) fn before_write(&self, leaves: &[Leaves]) -> (WriteBatch, Vec<Leaves>) {
        let mut rows = WriteBatch::new();
        let mut stale = self.stale_mut();
        for (group, changed) in leaves {
            let bits = stale.groups.entry(*group).or_default();
            if bits.iter().zip(changed).any(|(word, changed)| changed & !word != 0) {
                bits.iter_mut().zip(changed).for_each(|(word, changed)| *word |= changed);
                stale.unsure.insert(*group);
            }
        }
        let put: Vec<Leaves> = stale.unsure.iter().map(|group| (*group, stale.bits(*group))).collect();
        if stale.unread {
            rows.delete_range(Family::Present, &[], &keys::PRESENT_END);
        }
        drop(stale);
        put.iter().for_each(|(group, bits)| put_bits(&mut rows, *group, bits));
        (rows, put)
    }

    /// What [`Self::before_write`] has returned is in the database.
    pub(super) fn after_write(&self, put: &[Leaves]) {
        let mut stale = self.stale_mut();
        for (group, bits) in put {
            // A reader may have missed another leaf of it meanwhile.
            if stale.bits(*group) == *bits {
                stale.unsure.remove(group);
            }
        }
        stale.unread = false;
    }

    /// Whether rows count at all, and all of these leaves of a branch are stale.
    pub(super) fn are_stale(&self, branch: BranchId, leaves: &[u64]) -> bool {
        let stale = self.stale();
        !stale.unread && leaves.iter().all(|leaf| stale.has(branch, *leaf))
    }

    /// Some stale leaves of a branch, the first ones from `from` on, up to `most`.
    pub(super) fn stale_leaves(&self, branch: BranchId, from: u64, most: usize) -> Vec<u64> {
        let stale = self.stale();
        let groups = stale.groups.range((branch, from / GROUP)..=(branch, u64::MAX));
        let words = groups.flat_map(|((_, group), bits)| bits.iter().zip((group * GROUP..).step_by(64)));
        let leaves = words.filter(|(word, _)| **word != 0).flat_map(|(word, first)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| first + bit)
        });
        leaves.filter(|leaf| *leaf >= from).take(most).collect()
    }

    /// The rows that say what stale leaves of a branch look like as of `seq`, and which leaves those are.
    pub(super) fn before_refresh<'a>(
        &self,
        branch: BranchId,
        seq: Seq,
        leaves: impl Iterator<Item = (u64, &'a States)>,
    ) -> (WriteBatch, Vec<Leaves>) {
        let (mut rows, mut groups) = (WriteBatch::new(), Vec::new());
        for (leaf, states) in leaves {
            let key = keys::present(branch, leaf);
            rows.put_with(Family::Present, &key, |out| codec::encode_present(&key, seq, states, out));
            add_leaf(&mut groups, branch, leaf);
        }
        let stale = self.stale();
        for (group, fresh) in &groups {
            let mut bits = stale.bits(*group);
            bits.iter_mut().zip(fresh).for_each(|(word, fresh)| *word &= !fresh);
            put_bits(&mut rows, *group, &bits);
        }
        drop(stale);
        (rows, groups)
    }

    /// Makes leaves count whose rows are written, if they are. Nothing is there of a write that has failed; but nothing
    /// depends on that.
    pub(super) fn after_refresh(&self, leaves: &[Leaves], written: bool) {
        let mut stale = self.stale_mut();
        if !written {
            stale.unsure.extend(leaves.iter().map(|(group, _)| *group));
            return;
        }
        for (group, fresh) in leaves {
            let Some(bits) = stale.groups.get_mut(group) else { continue };
            bits.iter_mut().zip(fresh).for_each(|(word, fresh)| *word &= !fresh);
            if *bits == Bits::default() {
                stale.groups.remove(group);
            }
        }
    }

    /// Has a batch remove all of a branch.
    pub(super) fn put_removal(branch: BranchId, batch: &mut WriteBatch) {
        for (from, to) in keys::presents_of(branch) {
            batch.delete_range(Family::Present, &from, &to);
        }
    }

    /// Forgets branches that are removed.
    pub(super) fn forget(&self, branches: &[BranchId]) {
        let mut stale = self.stale_mut();
        stale.groups.retain(|(of, _), _| !branches.contains(of));
        stale.unsure.retain(|(of, _)| !branches.contains(of));
    }

    /// Forgets all: the database is empty.
    pub(super) fn clear(&self) {
        *self.stale_mut() = Stale::default();
    }
}

fn put_bits(rows: &mut WriteBatch, (branch, group): Group, bits: &Bits) {
    let key = keys::stale(branch, group);
    match *bits == Bits::default() {
        true => rows.delete(Family::Present, &key),
        false => rows.put_with(Family::Present, &key, |out| codec::encode_bits(&key, bits, out)),
    }
}

fn load(kv: &dyn Kv) -> IndexResult<Stale> {
    let mut stale = Stale::default();
    let mut failed = Ok(());
    kv.scan(Family::Present, &[], &keys::STALE_END, &mut |key, value| {
        let group = keys::parse_stale(key).ok_or(DecodeError("malformed key"));
        match group.and_then(|group| Ok((group, codec::decode_bits(key, value)?))) {
            Ok((group, bits)) => {
                stale.groups.insert(group, bits);
            }
            Err(error) => failed = Err::<(), IndexError>(corrupt(kv, (Family::Present, key), error)),
        }
        failed.is_ok()
    })?;
    failed.map(|()| stale)
}

#[cfg(test)]
#[path = "present_tests.rs"]
mod tests;
