//! What must be on a disk, sector by sector.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use super::content::{self, SECTOR, ZEROES};

/// What a request does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// They get this version.
    Write(u32),
    /// They become zeroes.
    Zero,
    /// They stay as they are, or become zeroes: virtio leaves that open.
    Discard,
}

/// The disk has not what it must have.
#[derive(Debug)]
pub(crate) struct Wrong {
    sector: u64,
    expected: Vec<u32>,
    found: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sector, expected, found } = self;
        let byte = sector * SECTOR as u64;
        write!(
            f,
            "sector {sector} (byte {byte}) must have one of the versions {expected:?}, and holds {found}"
        )
    }
}

impl std::error::Error for Wrong {}

/// The versions that every sector may have: one if the last request on it was answered; more if it was cut off, until
/// a read shows which.
#[derive(Debug)]
pub(crate) struct Model {
    seed: u64,
    certain: Vec<u32>,
    doubtful: HashMap<u64, Vec<u32>>,
    /// Sectors of requests in flight; no two requests in flight overlap, or their outcome would be open.
    busy: Vec<bool>,
    last_version: u32,
}

impl Model {
    /// A disk of zeroes.
    pub(crate) fn new(seed: u64, bytes: u64) -> Self {
        let sectors = bytes as usize / SECTOR;
        Self {
            seed,
            certain: vec![ZEROES; sectors],
            doubtful: HashMap::new(),
            busy: vec![false; sectors],
            last_version: ZEROES,
        }
    }

    /// How many sectors there are.
    pub(crate) fn sectors(&self) -> u64 {
        self.certain.len() as u64
    }

    /// Takes sectors for a request, unless another has some of them.
    pub(crate) fn claim(&mut self, sectors: &Range<u64>) -> bool {
        let busy = &mut self.busy[sectors.start as usize..sectors.end as usize];
        let free = !busy.contains(&true);
        if free {
            busy.fill(true);
        }
        free
    }

    /// Gives sectors back.
    pub(crate) fn release(&mut self, sectors: &Range<u64>) {
        self.busy[sectors.start as usize..sectors.end as usize].fill(false);
    }

    /// A version that no write has had, for a new one, and what it writes.
    pub(crate) fn next_version(&mut self, sectors: &Range<u64>, bytes: &mut [u8]) -> u32 {
        self.last_version += 1;
        for (number, sector) in sectors.clone().zip(bytes.chunks_exact_mut(SECTOR)) {
            content::make(sector, self.seed, number, self.last_version);
        }
        self.last_version
    }

    /// A request was answered.
    pub(crate) fn answered(&mut self, sectors: &Range<u64>, change: Change) {
        let version = match change {
            Change::Write(version) => version,
            Change::Zero => ZEROES,
            Change::Discard => return self.cut_off(sectors, change),
        };
        self.certain[sectors.start as usize..sectors.end as usize].fill(version);
        if !self.doubtful.is_empty() {
            for sector in sectors.clone() {
                self.doubtful.remove(&sector);
            }
        }
    }

    /// A request was in flight when the connection ended: it has happened, or not, for each sector.
    pub(crate) fn cut_off(&mut self, sectors: &Range<u64>, change: Change) {
        let version = match change {
            Change::Write(version) => version,
            Change::Zero | Change::Discard => ZEROES,
        };
        for sector in sectors.clone() {
            let certain = self.certain[sector as usize];
            let versions = self.doubtful.entry(sector).or_insert_with(|| vec![certain]);
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
    }

    /// How many sectors have more than one possible version.
    pub(crate) fn doubtful(&self) -> usize {
        self.doubtful.len()
    }

    /// Compares what was read with what must be there. What was open is settled by it: it must not change again.
    ///
    /// # Errors
    /// It differs.
    pub(crate) fn check(&mut self, sectors: &Range<u64>, bytes: &[u8]) -> Result<(), Wrong> {
        for (number, sector) in sectors.clone().zip(bytes.chunks_exact(SECTOR)) {
            let is = |version: &u32| content::is(sector, self.seed, number, *version);
            let index = number as usize;
            let versions = self.doubtful.get(&number);
            match versions.map_or(&self.certain[index..=index], Vec::as_slice).iter().copied().find(is) {
                Some(version) if versions.is_some() => {
                    self.certain[index] = version;
                    self.doubtful.remove(&number);
                }
                Some(_) => {}
                None => {
                    let expected = versions.cloned().unwrap_or_else(|| vec![self.certain[index]]);
                    return Err(Wrong {
                        sector: number,
                        expected,
                        found: content::describe(sector, self.seed),
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn written(model: &mut Model, sectors: Range<u64>) -> (u32, Vec<u8>) {
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR];
        let version = model.next_version(&sectors, &mut bytes);
        (version, bytes)
    }

    #[test]
    fn an_answered_write_must_be_there() {
        let mut model = Model::new(1, 8 * SECTOR as u64);
        let (version, bytes) = written(&mut model, 2..4);
        model.answered(&(2..4), Change::Write(version));
        model.check(&(2..4), &bytes).unwrap();
        let lost = model.check(&(2..4), &[0; 2 * SECTOR]).unwrap_err();
        assert!(lost.to_string().contains("sector 2") && lost.to_string().contains("holds zeroes"), "{lost}");
        assert!(model.check(&(1..3), &bytes).is_err(), "in the wrong place");
    }

    #[test]
    fn a_write_that_was_cut_off_has_happened_or_not_but_does_not_come_later() {
        let mut model = Model::new(1, 8 * SECTOR as u64);
        let (version, bytes) = written(&mut model, 0..1);
        model.cut_off(&(0..1), Change::Write(version));
        assert_eq!(model.doubtful(), 1);
        model.check(&(0..1), &[0; SECTOR]).unwrap();
        assert!(model.check(&(0..1), &bytes).is_err(), "it landed after it had been seen not to be there");

        let (version, bytes) = written(&mut model, 0..1);
        model.cut_off(&(0..1), Change::Write(version));
        model.check(&(0..1), &bytes).unwrap();
        assert!(model.check(&(0..1), &[0; SECTOR]).is_err(), "it was lost after it had been seen");
    }

    #[test]
    fn an_answer_ends_all_doubt() {
        let mut model = Model::new(1, 8 * SECTOR as u64);
        let (old, _) = written(&mut model, 0..2);
        model.cut_off(&(0..2), Change::Write(old));
        model.answered(&(0..2), Change::Zero);
        assert_eq!(model.doubtful(), 0);
        model.check(&(0..2), &[0; 2 * SECTOR]).unwrap();
        let (new, bytes) = written(&mut model, 0..2);
        model.answered(&(0..2), Change::Write(new));
        model.answered(&(0..2), Change::Discard);
        model.check(&(0..2), &bytes).unwrap();
    }

    #[test]
    fn requests_do_not_overlap() {
        let mut model = Model::new(1, 8 * SECTOR as u64);
        assert!(model.claim(&(2..4)));
        assert!(!model.claim(&(3..5)) && model.claim(&(4..5)));
        model.release(&(2..4));
        assert!(model.claim(&(3..4)));
    }
}
