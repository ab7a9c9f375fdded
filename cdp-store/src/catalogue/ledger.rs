//! The store log and the catalogue together: how a change of the store is committed.

use std::sync::Arc;

use cdp_types::Ordinal;

use super::{Catalogue, Change, POSITION_KEY, Position, put};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BatchPlace, Cut, Record, RecordKind};
use crate::index::{Kv, WriteBatch};
use crate::log::{LogContext, LogState};

/// The store log and the catalogue that follows from it. Used under one lock: the store's changes have one order.
#[derive(Debug)]
pub struct Ledger {
    log: LogState,
    catalogue: Catalogue,
    kv: Arc<dyn Kv>,
    /// Some rows could not be written: none are until the next opening, since a position behind them would say that they
    /// are there.
    lags: bool,
}

impl Ledger {
    /// The ledger whose log and catalogue recovery has brought in line.
    #[must_use]
    pub fn new(log: LogState, catalogue: Catalogue, kv: Arc<dyn Kv>) -> Self {
        Self { log, catalogue, kv, lags: false }
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

    /// Commits changes, all or none. Those that speak of what is not there (any more) are refused: the log would say what no
    /// opening can take in.
    ///
    /// 1. Append one record and sync it: the commit point. Crash before: nothing happened.
    /// 2. Take the changes in. Crash: recovery replays them.
    /// 3. Write the catalogue's rows. Crash: the same. They never say what the log does not.
    ///
    /// # Durability
    /// The changes survive a power cut once this returns.
    ///
    /// # Errors
    /// If the log cannot be written; [`ErrorKind::NoSpace`], as a rule before anything is; [`ErrorKind::Invalid`] if there is
    /// too much to say in one record; [`ErrorKind::NotFound`] as above.
    pub fn commit(&mut self, context: &LogContext, changes: &[Change]) -> Result<()> {
        self.catalogue.check(changes)?;
        let body = serde_json::to_vec(changes)
            .map_err(|e| Error::new(ErrorKind::Invalid, "encoding a store record").with(e))?;
        if body.len() > crate::log::Draft::MAX_BODY {
            return Err(Error::new(ErrorKind::Invalid, "too many changes at once"));
        }
        self.supply(context)?;
        if self.log.can_cut() {
            self.log.set_aside(context, Cut::LEN)?;
            self.log.cut(context);
            self.supply(context)?;
        }
        // A record that could be written only in part would be nobody's to take back.
        self.log.set_aside(context, body.len())?;
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

    fn supply(&mut self, context: &LogContext) -> Result<()> {
        if let Some(wish) = self.log.wants_segment(context)
            && let Some(spare) = self.log.supply(context.segments.create(wish.capacity)?)
        {
            context.segments.give_back(spare);
        }
        Ok(())
    }

    /// Whether a record could not be written, so that only the next opening can say whether it counts.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        self.log.poisoned().is_some()
    }

    /// Writes rows and the position that they bring the database to. What fails here, and everything after it, is made up
    /// for by the next opening, so it is no reason to fail a change that is durable already.
    pub fn write_rows(&mut self, mut rows: WriteBatch) {
        if self.lags {
            return;
        }
        let (crc, place) = self.log.acked_at();
        let (seq, time_ns) = self.log.head();
        let BatchPlace { incarnation, offset } = place;
        let position = Position { ordinal: self.log.acked(), crc, incarnation, offset, time_ns, seq };
        put(&mut rows, POSITION_KEY, &(position, self.catalogue.last));
        if let Err(error) = self.kv.write(&rows) {
            self.lags = true;
            tracing::warn!(
                "the catalogue's database is not updated any more: {error}; the next opening will make up for it"
            );
        }
    }
}
