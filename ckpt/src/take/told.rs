//! Whoever is told of the cut, and what comes of it.

use serde_json::Value;
use tokio::task::JoinHandle;

use super::{AtCut, Called, CutNotice, TakeError};

/// A telling, which goes on by itself.
#[derive(Debug, Default)]
pub(super) struct Told {
    running: Option<JoinHandle<Called>>,
    ended: Option<Called>,
}

impl Told {
    /// Begins to tell, if anybody is to be told.
    pub(super) fn tell(&mut self, whom: Option<&AtCut>, notice: CutNotice) {
        self.running = whom.map(|whom| tokio::spawn(whom(notice)));
    }

    /// Ends when the checkpoint must not be completed: why. Cancel-safe.
    pub(super) async fn vetoed(&mut self) -> TakeError {
        match self.wait().await {
            Err(vetoed) => vetoed,
            Ok(()) => std::future::pending().await,
        }
    }

    /// Waits until it has ended, if it was begun. Cancel-safe.
    ///
    /// # Errors
    /// Why the checkpoint must not be completed.
    pub(super) async fn wait(&mut self) -> Result<(), TakeError> {
        if let Some(running) = &mut self.running {
            let ended = running.await;
            self.running = None;
            self.ended = Some(ended.unwrap_or_else(|error| Called {
                figures: Value::Null,
                veto: Some(format!("who is told of the cut has died: {error}")),
            }));
        }
        let veto = self.ended.as_ref().and_then(|ended| ended.veto.as_ref());
        veto.map_or(Ok(()), |why| Err(TakeError::new(why)))
    }

    /// What is to be kept of it.
    pub(super) fn figures(&self) -> Option<&Value> {
        self.ended.as_ref().map(|ended| &ended.figures)
    }
}
