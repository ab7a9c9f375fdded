//! Progress of what takes long: on a terminal, and only there.

use cdpd::api;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::say;

/// A bar on standard error; nothing if that is no terminal, or too soon for one to be of use.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for what is called `what`.
    pub(crate) fn new(what: &'static str) -> Self {
        let template = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        // The target hides itself where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(8));
        Self { bar: bar.with_style(style).with_message(what) }
    }

    /// Shows how far it has come.
    pub(crate) fn show(&self, progress: api::Progress) {
        if self.bar.length() != Some(progress.total_bytes) {
            self.bar.set_length(progress.total_bytes);
        }
        self.bar.set_position(progress.done_bytes);
    }

    /// Shows how far it has come, given as bytes.
    pub(crate) fn at(&self, done_bytes: u64, total_bytes: u64) {
        self.show(api::Progress { done_bytes, total_bytes });
    }

    /// Says something above the bar.
    pub(crate) fn note(&self, note: &str) {
        self.bar.suspend(|| say(note));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
