//! What the store consists of: volumes, branches, marks. The store log is the truth; rows in RocksDB are derived
//! from it, and so is the copy in memory that everything here is read from.

use std::collections::BTreeMap;
use std::sync::Arc;

use cdp_types::{BranchId, Generation, Label, Ordinal, Seq, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{BatchPlace, Record, RecordKind};
use crate::index::{Family, Kv, WriteBatch};
use crate::log::{Fence, LogContext, LogState};
use crate::volume::Serving;

/// The store log's own volume number.
pub const STORE_LOG: VolumeId = VolumeId(0);

/// A volume, as the catalogue knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRow {
    /// Its number.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What its guests address, in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// Its head branch.
    pub branch: BranchId,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Where it is served to guests, if it is.
    pub serving: Option<Serving>,
    /// Who may see it.
    pub stage: Stage,
}

/// Who may see a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Everyone.
    Visible,
    /// Whoever fills it: its name is taken, and nobody else can open it yet.
    Importing,
    /// Whoever made it, for as long as that one lives: a writable view of a past instant.
    Scratch,
    /// Nobody: it was destroyed, and others still share its history.
    Destroyed,
}

/// A branch. Its row is kept when its history is gone, so that no instant is mistaken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchRow {
    /// Its number.
    pub id: BranchId,
    /// Whose it is.
    pub volume: VolumeId,
    /// From which branch it inherits, and up to which `Seq`.
    pub parent: Option<(BranchId, Seq)>,
    /// The volume's instants from here on lie on it, until its next branch starts. After every change of the volume
    /// before; zero for the first branch of a volume that began empty.
    pub start: Seq,
    /// When it was made, on the store's clock, in nanoseconds since 1970.
    pub created_ns: u64,
    /// How much of it there is.
    pub state: BranchState,
}

/// How much of a branch there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BranchState {
    /// All of it.
    Kept,
    /// Only what other branches inherit from it: it was deleted.
    Deleted,
    /// Nothing.
    Gone,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkRow {
    /// Whose history.
    pub volume: VolumeId,
    /// Its name.
    pub label: Label,
    /// On which branch it lies.
    pub branch: BranchId,
    /// The instant.
    pub seq: Seq,
    /// The instant's time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// What its maker has to say of it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

/// One record of the store log: a change that is not a block write. `docs/format.md`, "Store records".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// The store was opened for writing.
    Generation {
        /// The generation that the opening claimed.
        generation: Generation,
    },
    /// Where volumes' logs had ended when the store was opened. Without it, what a dead process has written
    /// would come back when it lands late and nothing has been appended meanwhile.
    Fence {
        /// Each volume's log end.
        fences: Vec<(VolumeId, Fence)>,
    },
    /// A volume and its first branch begin.
    Create {
        /// The volume.
        volume: VolumeRow,
        /// Its branch.
        branch: BranchRow,
    },
    /// An import is complete: the volume can be seen.
    Import {
        /// The volume.
        volume: VolumeId,
    },
    /// A volume has another name.
    Rename {
        /// The volume.
        volume: VolumeId,
        /// Its new name.
        name: VolumeName,
    },
    /// A volume is served somewhere, or no longer.
    Serve {
        /// The volume.
        volume: VolumeId,
        /// Where.
        serving: Option<Serving>,
    },
    /// A volume has grown.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Its new size, in bytes.
        size_bytes: u64,
    },
    /// An instant has a name.
    Mark {
        /// The mark.
        mark: MarkRow,
    },
    /// An instant has a name no longer.
    Unmark {
        /// Whose history.
        volume: VolumeId,
        /// The name.
        label: Label,
    },
    /// A volume's head is on a new branch, which begins at an earlier instant.
    Revert {
        /// The branch.
        branch: BranchRow,
    },
    /// A branch is deleted, but for what others inherit from it. Marks on what is lost go with it.
    DeleteBranch {
        /// The branch.
        branch: BranchId,
    },
    /// Nothing is left of a deleted branch.
    ForgetBranch {
        /// The branch.
        branch: BranchId,
    },
    /// A volume is gone for its users. Others may share its history.
    Destroy {
        /// The volume.
        volume: VolumeId,
    },
    /// Nobody shares a destroyed volume's history; what it held is being given back.
    Reclaim {
        /// The volume.
        volume: VolumeId,
    },
    /// What a destroyed volume held has been given back.
    Retire {
        /// The volume.
        volume: VolumeId,
    },
}

/// Up to where the rows in the database reflect the store log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The last batch whose changes are in the rows.
    pub ordinal: Ordinal,
    /// Its header's checksum.
    pub crc: u32,
    /// Its segment.
    pub incarnation: u64,
    /// Its place in the segment, in bytes.
    pub offset: u64,
    /// Its time, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The last `Seq` in it.
    pub seq: Seq,
}

/// The catalogue in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    /// By number; those being imported too.
    pub volumes: BTreeMap<VolumeId, VolumeRow>,
    /// By number.
    pub branches: BTreeMap<BranchId, BranchRow>,
    /// By volume and name.
    pub marks: BTreeMap<(VolumeId, Label), MarkRow>,
    /// Where volumes' logs had ended when the store was last opened.
    pub fences: BTreeMap<VolumeId, Fence>,
    /// Volumes whose space is being given back.
    pub retiring: BTreeMap<VolumeId, Vec<BranchId>>,
    last_volume: u64,
    last_branch: u64,
}

fn gone(volume: VolumeId) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the store log speaks of volume {volume}, which it never made"))
}

impl Catalogue {
    /// The next unused volume number.
    #[must_use]
    pub fn next_volume(&self) -> VolumeId {
        VolumeId(self.last_volume + 1)
    }

    /// The next unused branch number.
    #[must_use]
    pub fn next_branch(&self) -> BranchId {
        BranchId(self.last_branch + 1)
    }

    fn volume_mut(&mut self, volume: VolumeId) -> Result<&mut VolumeRow> {
        self.volumes.get_mut(&volume).ok_or_else(|| gone(volume))
    }

    /// Takes in one change, and adds the rows that it touches to `rows`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it speaks of something that does not exist: the log is not whole.
    pub fn apply(&mut self, change: &Change, rows: &mut WriteBatch) -> Result<()> {
        let touched = match change {
            Change::Generation { .. } => return Ok(()),
            Change::Fence { fences } => {
                for (volume, fence) in fences {
                    put(rows, &fence_key(*volume), fence);
                    self.fences.insert(*volume, *fence);
                }
                return Ok(());
            }
            Change::Create { volume, branch } => {
                self.last_volume = self.last_volume.max(volume.id.0);
                self.last_branch = self.last_branch.max(branch.id.0);
                put(rows, &branch_key(branch.id), branch);
                self.branches.insert(branch.id, *branch);
                self.volumes.insert(volume.id, volume.clone());
                volume.id
            }
            Change::Import { volume } => {
                self.volume_mut(*volume)?.stage = Stage::Visible;
                *volume
            }
            Change::Rename { volume, name } => {
                self.volume_mut(*volume)?.name = name.clone();
                *volume
            }
            Change::Serve { volume, serving } => {
                self.volume_mut(*volume)?.serving.clone_from(serving);
                *volume
            }
            Change::Resize { volume, size_bytes } => {
                self.volume_mut(*volume)?.size_bytes = *size_bytes;
                *volume
            }
            Change::Mark { mark } => {
                put(rows, &mark_key(mark.volume, &mark.label), mark);
                self.marks.insert((mark.volume, mark.label.clone()), mark.clone());
                return Ok(());
            }
            Change::Unmark { volume, label } => {
                self.remove_marks(rows, |mark| mark.volume == *volume && mark.label == *label);
                return Ok(());
            }
            Change::Revert { branch } => {
                self.last_branch = self.last_branch.max(branch.id.0);
                put(rows, &branch_key(branch.id), branch);
                self.branches.insert(branch.id, *branch);
                self.volume_mut(branch.volume)?.branch = branch.id;
                branch.volume
            }
            Change::DeleteBranch { branch } => {
                let kept = self.inherited_upto(*branch);
                self.remove_marks(rows, |mark| {
                    mark.branch == *branch && kept.is_none_or(|kept| mark.seq > kept)
                });
                return self.set_branch_state(*branch, BranchState::Deleted, rows);
            }
            Change::ForgetBranch { branch } => {
                return self.set_branch_state(*branch, BranchState::Gone, rows);
            }
            Change::Destroy { volume } => {
                let row = self.volume_mut(*volume)?;
                row.stage = Stage::Destroyed;
                row.serving = None;
                self.remove_marks(rows, |mark| mark.volume == *volume);
                for branch in self.branches_of(*volume) {
                    self.set_branch_state(branch, BranchState::Deleted, rows)?;
                }
                *volume
            }
            Change::Reclaim { volume } => return self.reclaim(*volume, rows),
            Change::Retire { volume } => {
                for branch in self.retiring.remove(volume).unwrap_or_default() {
                    rows.delete(Family::Rows, &branch_key(branch));
                    self.branches.remove(&branch);
                }
                rows.delete(Family::Rows, &retiring_key(*volume));
                return Ok(());
            }
        };
        put(rows, &volume_key(touched), self.volume_mut(touched)?);
        Ok(())
    }

    fn remove_marks(&mut self, rows: &mut WriteBatch, which: impl Fn(&MarkRow) -> bool) {
        self.marks.retain(|(volume, label), mark| {
            let goes = which(mark);
            if goes {
                rows.delete(Family::Rows, &mark_key(*volume, label));
            }
            !goes
        });
    }

    fn set_branch_state(
        &mut self,
        branch: BranchId,
        state: BranchState,
        rows: &mut WriteBatch,
    ) -> Result<()> {
        let row = self.branches.get_mut(&branch).ok_or_else(|| {
            let text = format!("the store log speaks of branch {branch}, which it never made");
            Error::new(ErrorKind::Corrupt, text)
        })?;
        row.state = state;
        put(rows, &branch_key(branch), row);
        Ok(())
    }

    /// The branches of a volume, oldest first.
    #[must_use]
    pub fn branches_of(&self, volume: VolumeId) -> Vec<BranchId> {
        self.branches.values().filter(|b| b.volume == volume).map(|b| b.id).collect()
    }

    /// The last instant of a branch that another inherits.
    #[must_use]
    pub fn inherited_upto(&self, branch: BranchId) -> Option<Seq> {
        let children = self.branches.values().filter(|b| b.state != BranchState::Gone);
        children.filter_map(|b| b.parent.filter(|(parent, _)| *parent == branch)).map(|(_, fork)| fork).max()
    }

    /// Whether anything of a deleted branch is still needed: another inherits from it, or a mark names an instant of it.
    #[must_use]
    pub fn is_needed(&self, branch: BranchId) -> bool {
        self.inherited_upto(branch).is_some() || self.marks.values().any(|mark| mark.branch == branch)
    }

    /// Whether anybody outside a volume inherits from its branches.
    #[must_use]
    pub fn is_shared(&self, volume: VolumeId) -> bool {
        let parent_volume = |b: &BranchRow| {
            b.parent.and_then(|(parent, _)| self.branches.get(&parent)).map(|parent| parent.volume)
        };
        let others = self.branches.values().filter(|b| b.volume != volume && b.state != BranchState::Gone);
        others.map(parent_volume).any(|parent| parent == Some(volume))
    }

    fn reclaim(&mut self, volume: VolumeId, rows: &mut WriteBatch) -> Result<()> {
        self.volumes.remove(&volume).ok_or_else(|| gone(volume))?;
        rows.delete(Family::Rows, &volume_key(volume));
        rows.delete(Family::Rows, &fence_key(volume));
        self.fences.remove(&volume);
        let branches = self.branches_of(volume);
        put(rows, &retiring_key(volume), &branches);
        self.retiring.insert(volume, branches);
        Ok(())
    }

    /// Reads the catalogue back from its rows, with the position in the log that they reflect; `None` if there are
    /// none, or none that can be used: the log will say everything again.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn load(kv: &dyn Kv) -> Result<Option<(Self, Position)>> {
        let mut catalogue = Self::default();
        let mut position = None;
        let mut sound = true;
        kv.scan(Family::Rows, &[0], &[0xff], &mut |key, value| {
            sound = catalogue.load_row(key, value, &mut position).is_ok();
            sound
        })
        .map_err(|e| Error::new(ErrorKind::Io, "reading the catalogue").with(e))?;
        Ok(position.filter(|_| sound).map(|position| (catalogue, position)))
    }

    fn load_row(
        &mut self,
        key: &[u8],
        value: &[u8],
        position: &mut Option<Position>,
    ) -> serde_json::Result<()> {
        match key.split(|&b| b == b'/').next() {
            Some(b"volume") => {
                let row: VolumeRow = serde_json::from_slice(value)?;
                self.volumes.insert(row.id, row);
            }
            Some(b"branch") => {
                let row: BranchRow = serde_json::from_slice(value)?;
                self.branches.insert(row.id, row);
            }
            Some(b"mark") => {
                let row: MarkRow = serde_json::from_slice(value)?;
                self.marks.insert((row.volume, row.label.clone()), row);
            }
            Some(b"retiring") => drop(self.retiring.insert(volume_in(key), serde_json::from_slice(value)?)),
            Some(b"fence") => drop(self.fences.insert(volume_in(key), serde_json::from_slice(value)?)),
            Some(b"position") => {
                let (at, volume, branch) = serde_json::from_slice(value)?;
                *position = Some(at);
                (self.last_volume, self.last_branch) = (volume, branch);
            }
            _ => {}
        }
        Ok(())
    }
}

fn volume_key(volume: VolumeId) -> Vec<u8> {
    format!("volume/{:020}", volume.0).into_bytes()
}

fn branch_key(branch: BranchId) -> Vec<u8> {
    format!("branch/{:020}", branch.0).into_bytes()
}

fn retiring_key(volume: VolumeId) -> Vec<u8> {
    format!("retiring/{:020}", volume.0).into_bytes()
}

fn fence_key(volume: VolumeId) -> Vec<u8> {
    format!("fence/{:020}", volume.0).into_bytes()
}

/// The volume in a key that ends with one.
fn volume_in(key: &[u8]) -> VolumeId {
    let number = key.rsplit(|&b| b == b'/').next().and_then(|digits| std::str::from_utf8(digits).ok());
    VolumeId(number.and_then(|digits| digits.parse().ok()).unwrap_or(0))
}

fn mark_key(volume: VolumeId, label: &Label) -> Vec<u8> {
    format!("mark/{:020}/{label}", volume.0).into_bytes()
}

fn put<T: Serialize + ?Sized>(rows: &mut WriteBatch, key: &[u8], value: &T) {
    // Rows are plain structures with string keys: there is nothing in them that JSON cannot say.
    let value = serde_json::to_vec(value).unwrap_or_default();
    rows.put(Family::Rows, key, &value);
}

/// The store log and the catalogue that follows from it. Used under one lock: the store's changes have one order.
#[derive(Debug)]
pub struct Ledger {
    log: LogState,
    catalogue: Catalogue,
    kv: Arc<dyn Kv>,
}

impl Ledger {
    /// The ledger whose log and catalogue recovery has brought in line.
    #[must_use]
    pub fn new(log: LogState, catalogue: Catalogue, kv: Arc<dyn Kv>) -> Self {
        Self { log, catalogue, kv }
    }

    /// The catalogue.
    #[must_use]
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The last batch of the store log.
    #[must_use]
    pub fn end(&self) -> Ordinal {
        self.log.acked()
    }

    /// Commits changes, all or none.
    ///
    /// 1. Append one record and sync it: the commit point. Crash before: nothing happened.
    /// 2. Take the changes in. Crash: recovery replays them.
    /// 3. Write the catalogue's rows. Crash: the same. They never say what the log does not.
    ///
    /// # Durability
    /// The changes survive a power cut once this returns.
    ///
    /// # Errors
    /// If the log cannot be written; [`ErrorKind::Invalid`] if there is too much to say in one record.
    pub fn commit(&mut self, context: &LogContext, changes: &[Change]) -> Result<()> {
        let body = serde_json::to_vec(changes)
            .map_err(|e| Error::new(ErrorKind::Invalid, "encoding a store record").with(e))?;
        if body.len() > crate::log::Draft::MAX_BODY {
            return Err(Error::new(ErrorKind::Invalid, "too many changes at once"));
        }
        if let Some(wish) = self.log.wants_segment(context) {
            self.log.supply(context.segments.create(wish.capacity)?);
        }
        if self.log.can_cut() {
            self.log.cut(context);
            if let Some(wish) = self.log.wants_segment(context) {
                self.log.supply(context.segments.create(wish.capacity)?);
            }
        }
        let mut record = Record::event(RecordKind::Store, body.len() as u64);
        record.aux = body.len() as u64;
        self.log.append_synced(context, record, body)?;

        let mut rows = WriteBatch::new();
        for change in changes {
            self.catalogue.apply(change, &mut rows)?;
        }
        self.write_rows(rows);
        Ok(())
    }

    /// Writes rows and the position that they bring the database to. What fails here is made up for by the next
    /// opening, so it is no reason to fail a change that is durable already.
    pub fn write_rows(&mut self, mut rows: WriteBatch) {
        let (crc, place) = self.log.acked_at();
        let (seq, time_ns) = self.log.head();
        let BatchPlace { incarnation, offset } = place;
        let position = Position { ordinal: self.log.acked(), crc, incarnation, offset, time_ns, seq };
        put(&mut rows, b"position", &(position, self.catalogue.last_volume, self.catalogue.last_branch));
        if let Err(error) = self.kv.write(&rows) {
            tracing::warn!(
                "the catalogue's database was not updated: {error}; the next opening will make up for it"
            );
        }
    }
}
