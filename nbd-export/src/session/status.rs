//! The loop that answers block status requests, one at a time, on threads that may block.

use std::sync::Arc;

use cdp_types::{ByteRange, IoError, IoErrorKind};

use super::{MAX_GATHERED, Session};
use crate::exports::{StatusContext, StatusExtent};
use crate::protocol::{Errno, Headers, Whose};
use crate::transport::Transport;

/// Extents in one reply to one context; what is left out the client asks for again.
const MAX_EXTENTS: usize = 16 << 10;

/// Extents that a context is asked for when one is wanted: neighbours may turn out to be one.
const ENOUGH_FOR_ONE: usize = 64;

/// A block status request.
pub(super) struct Query {
    pub(super) whose: Whose,
    /// Which of the selected contexts are wanted.
    pub(super) ids: Vec<u32>,
    pub(super) ask: Ask,
}

#[derive(Clone, Copy)]
pub(super) struct Ask {
    pub(super) range: ByteRange,
    /// Whether one extent is all that is wanted.
    pub(super) one: bool,
    pub(super) headers: Headers,
}

impl<T: Transport> Session<'_, T> {
    pub(super) async fn answer_queries(&self) {
        loop {
            let Some(Query { whose, ids, ask }) = self.queries.borrow_mut().pop_front() else {
                if self.ended.borrow().is_some() {
                    return;
                }
                self.queried.wait().await;
                continue;
            };
            // An answer is far longer than its question: those that were taken are not all made for a client that reads none.
            while self.outbox.borrow().gathered_bytes() >= MAX_GATHERED {
                self.queried.wait().await;
            }
            // Nobody would hear the answer, and it can take long to find.
            if self.mute.get() {
                self.close_request();
                continue;
            }
            let contexts: Vec<_> =
                ids.iter().filter_map(|&id| self.view.contexts.get(id as usize)).cloned().collect();
            let work = move || contexts.iter().map(|context| ask.of(context)).collect::<Result<Vec<_>, _>>();
            let answer = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
                Err(IoError::new(IoErrorKind::Device, format!("a status context's code has ended: {error}")))
            });
            match answer {
                Ok(answers) => self.reply(|encoder, bytes| {
                    for (place, (id, extents)) in ids.iter().zip(&answers).enumerate() {
                        encoder.status(bytes, whose, *id, extents, place + 1 == ids.len());
                    }
                }),
                Err(error) => {
                    self.complaints.borrow_mut().say(|more| {
                        tracing::warn!(
                            connection = self.control.id,
                            more,
                            "a status request has failed: {error}"
                        );
                    });
                    self.refuse(whose, Errno::from(error.kind()), &error.kind().to_string());
                }
            }
            self.close_request();
        }
    }
}

impl Ask {
    fn of(self, context: &Arc<dyn StatusContext>) -> Result<Vec<StatusExtent>, IoError> {
        let max = if self.one { ENOUGH_FOR_ONE } else { MAX_EXTENTS };
        let mut found = Vec::new();
        context.extents(self.range, max, &mut found)?;
        let extents = self.fit(&found);
        match extents.is_empty() {
            true => Err(IoError::new(
                IoErrorKind::Device,
                format!("{} says nothing of {}", context.name(), self.range),
            )),
            false => Ok(extents),
        }
    }

    /// Joins neighbours of the same status, and cuts to what the client has asked for and its headers can say.
    fn fit(self, found: &[StatusExtent]) -> Vec<StatusExtent> {
        let wide = self.headers == Headers::Extended;
        let max = if self.one { 1 } else { MAX_EXTENTS };
        // Multiples of every block size, so that no extent ends inside of a block.
        let longest = if wide { u64::MAX } else { u64::from(u32::MAX) & !0xffff };
        let mut left = self.range.len;
        let mut extents: Vec<StatusExtent> = Vec::new();
        for extent in found {
            let mut len = extent.len_bytes.min(left);
            left -= len;
            if let Some(last) = extents.last_mut()
                && last.flags == extent.flags
            {
                let room = len.min(longest - last.len_bytes);
                last.len_bytes += room;
                len -= room;
            }
            while len > 0 && extents.len() < max {
                extents.push(StatusExtent { len_bytes: len.min(longest), flags: extent.flags });
                len -= len.min(longest);
            }
            if len > 0 {
                break;
            }
        }
        extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(len: u64, one: bool, headers: Headers, found: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let found: Vec<_> =
            found.iter().map(|&(len_bytes, flags)| StatusExtent { len_bytes, flags }).collect();
        let ask = Ask { range: ByteRange::new(0, len), one, headers };
        ask.fit(&found).iter().map(|extent| (extent.len_bytes, extent.flags)).collect()
    }

    #[test]
    fn extents_are_joined_and_cut_to_the_request() {
        let found = [(512, 0), (512, 0), (0, 3), (1024, 3), (8192, 0)];
        assert_eq!(fit(4096, false, Headers::Structured, &found), [(1024, 0), (1024, 3), (2048, 0)]);
        assert_eq!(fit(4096, true, Headers::Structured, &found), [(1024, 0)]);
        assert_eq!(fit(700, true, Headers::Structured, &found), [(700, 0)]);
    }

    #[test]
    fn only_extended_headers_hold_long_extents() {
        let found = [(1 << 40, 3)];
        assert_eq!(fit(1 << 40, false, Headers::Extended, &found), [(1 << 40, 3)]);
        let short = fit(6 << 30, false, Headers::Structured, &found);
        assert_eq!(short, [(0xffff_0000, 3), ((6 << 30) - 0xffff_0000, 3)]);
        assert_eq!(fit(6 << 30, true, Headers::Structured, &found), [(0xffff_0000, 3)]);
    }
}
