//! Names for instants.

use std::collections::BTreeMap;

use cdp_types::{Instant, Label, VolumeName};

use super::Store;
use super::instants::check_still_there;
use crate::catalogue::{Change, MarkRow};
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{MarkInfo, Resolved, Volume};

/// The most that a mark's metadata may have, keys and values together, in bytes.
const MAX_METADATA_BYTES: usize = 16 << 10;

impl Store {
    /// Names an instant of a volume's history.
    ///
    /// # Durability
    /// The mark, and everything that it refers to, survives a power cut once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] as for [`Store::resolve`], [`ErrorKind::Exists`] if the volume has a mark of that name,
    /// [`ErrorKind::Invalid`] for more than 16 KiB of metadata.
    pub fn mark(
        &self,
        name: &VolumeName,
        instant: &Instant,
        label: &Label,
        metadata: BTreeMap<String, String>,
    ) -> Result<MarkInfo> {
        if metadata.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>() > MAX_METADATA_BYTES {
            let text = format!("a mark takes at most {MAX_METADATA_BYTES} bytes of metadata");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let volume = self.volume(name)?;
        let at = self.resolve_durably(&volume, instant)?;
        let mut ledger = self.ledger();
        check_still_there(ledger.catalogue(), &volume, &at)?;
        if ledger.catalogue().marks.contains_key(&(volume.id(), label.clone())) {
            let text = format!("volume '{name}' has a mark '{label}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let Resolved { branch, seq, time_ns } = at;
        let mark = MarkRow { volume: volume.id(), label: label.clone(), branch, seq, time_ns, metadata };
        self.commit(&mut ledger, &[Change::Mark { mark: mark.clone() }])?;
        Ok(mark.into())
    }

    /// A volume's marks, oldest first.
    #[must_use]
    pub fn marks(&self, volume: &Volume) -> Vec<MarkInfo> {
        let mut marks: Vec<MarkInfo> = self.marks_of(volume.id()).into_iter().map(MarkInfo::from).collect();
        marks.sort_by_key(|mark| mark.seq);
        marks
    }

    /// Forgets a mark. The instant stays what it is.
    ///
    /// # Durability
    /// Once this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn unmark(&self, name: &VolumeName, label: &Label) -> Result<()> {
        let volume = self.volume(name)?;
        let mut ledger = self.ledger();
        if !ledger.catalogue().marks.contains_key(&(volume.id(), label.clone())) {
            let text = format!("volume '{name}' has no mark '{label}'");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        self.commit(&mut ledger, &[Change::Unmark { volume: volume.id(), label: label.clone() }])
    }
}
