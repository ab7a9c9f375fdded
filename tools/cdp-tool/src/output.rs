//! What goes to standard output: tables for people, JSON for programs. And what is said beside it.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, StdoutLock, Write};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

/// Whoever read our output has gone (as in `| head`): a reason to stop, not to complain.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nobody reads the output")
    }
}

impl std::error::Error for ReaderGone {}

/// Standard output.
pub(crate) struct Output {
    to: io::BufWriter<StdoutLock<'static>>,
    json: bool,
    zone: TimeZone,
}

/// How a column of a table stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Column {
    Left(&'static str),
    Right(&'static str),
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let to = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
        Self { to, json, zone: TimeZone::system() }
    }

    /// Whether a program reads it.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Writes one line.
    pub(crate) fn line(&mut self, line: impl AsRef<str>) -> anyhow::Result<()> {
        self.line_as_it_is(&harmless(line.as_ref()))
    }

    fn line_as_it_is(&mut self, line: &str) -> anyhow::Result<()> {
        let written = self.to.write_all(line.as_bytes()).and_then(|()| self.to.write_all(b"\n"));
        written.map_err(complaint)
    }

    /// Writes bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.to.write_all(bytes).map_err(complaint)
    }

    /// Writes a value as JSON over several lines.
    pub(crate) fn value(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        self.line_as_it_is(&serde_json::to_string_pretty(value)?)
    }

    /// Writes one of many values as one line of JSON.
    pub(crate) fn item(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        self.line_as_it_is(&serde_json::to_string(value)?)
    }

    /// Writes a table as wide as it needs to be.
    pub(crate) fn table(&mut self, columns: &[Column], rows: &[Vec<String>]) -> anyhow::Result<()> {
        let title = |column: &Column| match *column {
            Column::Left(title) | Column::Right(title) => title.to_owned(),
        };
        let titles: Vec<_> = columns.iter().map(title).collect();
        let all = || std::iter::once(&titles).chain(rows);
        let widths: Vec<_> = (0..columns.len())
            .map(|at| all().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0))
            .collect();
        for row in all() {
            let cells = row.iter().zip(columns).zip(&widths).map(|((cell, column), width)| match column {
                Column::Left(_) => format!("{cell:<width$}"),
                Column::Right(_) => format!("{cell:>width$}"),
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            self.line(line.trim_end())?;
        }
        Ok(())
    }

    /// Writes names and what they stand for.
    pub(crate) fn facts(&mut self, facts: &[(&str, String)]) -> anyhow::Result<()> {
        let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, fact) in facts {
            self.line(format!("{name:<width$}  {fact}"))?;
        }
        Ok(())
    }

    /// A time as people here write it, still exact, and still an instant that can be given back to us.
    pub(crate) fn time(&self, time_ns: u64) -> String {
        if time_ns == 0 {
            return "before the first write".to_owned();
        }
        match Timestamp::from_nanosecond(i128::from(time_ns)) {
            Ok(time) => format!("{:.9}", time.display_with_offset(self.zone.to_offset(time))),
            Err(_) => time_ns.to_string(),
        }
    }

    /// Sends what is still buffered.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        self.to.flush().map_err(complaint)
    }
}

/// Says something on standard error. It may be as gone as any reader is: that ends nothing that is at work, as a QEMU that
/// is looked after.
pub(crate) fn say(what: impl Display) {
    let _ = writeln!(io::stderr(), "cdp-tool: {}", harmless(&what.to_string()));
}

/// Text as a terminal may have it. Guests, QEMU and other users have a say in what is shown, and none of them is to move its
/// cursor or hide what stands there.
fn harmless(text: &str) -> Cow<'_, str> {
    let is_command = |c: char| c.is_control() && c != '\n';
    if !text.contains(is_command) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_command(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// What was found or begun stands, whether or not somebody reads of it to the end.
pub(crate) fn unless_gone(written: anyhow::Result<()>) -> anyhow::Result<()> {
    written.or_else(|error| if error.is::<ReaderGone>() { Ok(()) } else { Err(error) })
}

fn complaint(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return anyhow::Error::new(ReaderGone);
    }
    anyhow::Error::new(error).context("cannot write the output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_do_something_about_is_only_shown() {
        for (text, shown) in [
            ("wörds\nand more", "wörds\nand more"),
            ("\u{1b}[2Jgone", "\\u{1b}[2Jgone"),
            ("\u{9b}2J", "\\u{9b}2J"),
            ("a\rb\u{7f}", "a\\rb\\u{7f}"),
        ] {
            assert_eq!(harmless(text), shown);
        }
    }
}
