//! Why QEMU, or its guest's agent, could not be asked or did not do as asked.

use std::fmt;
use std::sync::Arc;

/// What a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Nobody listens at this path: is it right, does the machine run?
    Unreachable,
    /// Somebody may listen there, but this process cannot connect: it may not, or has no more files to open.
    CannotConnect,
    /// The socket is there, and nothing comes out of it: another client holds it, or QEMU hangs.
    Held,
    /// What answers there speaks, but not QMP: the path of another socket.
    NotQmp,
    /// No answer within the deadline. The command may still be carried out; the connection stays usable.
    Deadline,
    /// What came is no JSON, no QMP or too long. The connection has been given up.
    Nonsense,
    /// The connection ended before the answer came. Whether the command was carried out is not known.
    Gone,
    /// QEMU has refused the command: [`Error::refusal`] has its own words.
    Refused,
    /// This version of QEMU does not know the command.
    UnknownCommand,
    /// QEMU has answered, in a form that is not known here.
    Unexpected,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "the socket cannot be reached",
            Self::CannotConnect => "this process cannot connect to the socket",
            Self::Held => "the socket says nothing",
            Self::NotQmp => "this is not a QMP server",
            Self::Deadline => "no answer in time",
            Self::Nonsense => "the answer makes no sense",
            Self::Gone => "the connection is gone",
            Self::Refused => "refused",
            Self::UnknownCommand => "this version of QEMU has no such command",
            Self::Unexpected => "the answer has an unexpected form",
        })
    }
}

/// QEMU's own error: the `class` and `desc` of its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound`…
    pub class: String,
    /// A sentence for people.
    pub desc: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for Refusal {}

type Source = Arc<dyn std::error::Error + Send + Sync>;

/// What was asked of whom, what came of it, and why. Clones are cheap: all that waits on a connection gets the
/// same reason when it ends.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{subject}: {kind}{}{detail}", if detail.is_empty() { "" } else { ": " })]
pub struct Error {
    kind: ErrorKind,
    subject: String,
    detail: String,
    refusal: Option<Refusal>,
    #[source]
    source: Option<Source>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, subject: impl fmt::Display, detail: impl fmt::Display) -> Self {
        Self { kind, subject: subject.to_string(), detail: detail.to_string(), refusal: None, source: None }
    }

    pub(crate) fn because(
        kind: ErrorKind,
        subject: impl fmt::Display,
        detail: impl fmt::Display,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { source: Some(Arc::new(source)), ..Self::new(kind, subject, detail) }
    }

    pub(crate) fn refused(subject: impl fmt::Display, refusal: Refusal) -> Self {
        let kind = match refusal.class.as_str() {
            "CommandNotFound" => ErrorKind::UnknownCommand,
            _ => ErrorKind::Refused,
        };
        Self { refusal: Some(refusal.clone()), ..Self::new(kind, subject, refusal) }
    }

    /// The same, said of what the caller was about.
    pub(crate) fn of(&self, subject: impl fmt::Display) -> Self {
        Self { subject: subject.to_string(), ..self.clone() }
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// QEMU's own error, if it was QEMU that refused.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_who_what_and_why_in_one_line() {
        let refusal = Refusal { class: "GenericError".into(), desc: "Device 'vnc' blocks it".into() };
        let error = Error::refused("migrate", refusal);
        assert_eq!(error.to_string(), "migrate: refused: Device 'vnc' blocks it");
        assert_eq!(error.kind(), ErrorKind::Refused);
        let error = Error::new(ErrorKind::Gone, "stop", "");
        assert_eq!(error.to_string(), "stop: the connection is gone");
    }

    #[test]
    fn a_command_that_is_not_there_is_a_kind_of_its_own() {
        let refusal = Refusal { class: "CommandNotFound".into(), desc: "The command x…".into() };
        assert_eq!(Error::refused("x", refusal).kind(), ErrorKind::UnknownCommand);
    }
}
