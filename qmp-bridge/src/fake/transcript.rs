//! Who said what, as text.

use serde_json::{Value, json};

/// A conversation between QEMU and its client. The form is in the [module's documentation](super).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transcript {
    steps: Vec<Step>,
}

/// One line of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// For people.
    Note(String),
    /// What QEMU says.
    Qemu(Value),
    /// What its client says.
    Client(Value),
    /// What goes wrong.
    Fault(Fault),
}

/// What may go wrong in a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The connection stays open, and nothing more comes.
    Silence,
    /// The connection is closed.
    HangUp,
    /// These bytes come, whatever they mean.
    Say(Vec<u8>),
}

impl Transcript {
    /// Reads a transcript.
    ///
    /// # Errors
    /// The number of the line that is none of one, and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let steps = lines.map(|(number, line)| {
            Step::parse(line).map_err(|wrong| format!("line {}: {wrong}: {line}", number + 1))
        });
        Ok(Self { steps: steps.collect::<Result<_, _>>()? })
    }

    /// Its lines.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Adds a line.
    pub fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// The same up to line `steps`, where `fault` happens.
    #[must_use]
    pub fn broken_at(&self, steps: usize, fault: Fault) -> Self {
        let before = self.steps.iter().take(steps).cloned();
        Self { steps: before.chain([Step::Fault(fault)]).collect() }
    }
}

impl std::fmt::Display for Transcript {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "{}", step.as_json()))
    }
}

impl Step {
    fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let fields = value.as_object().ok_or("not an object")?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        if let Some(note) = text("note") {
            return Ok(Self::Note(note));
        }
        if let Some(said) = fields.get("qemu") {
            return Ok(Self::Qemu(said.clone()));
        }
        if let Some(said) = fields.get("client") {
            return Ok(Self::Client(said.clone()));
        }
        match text("fault").as_deref() {
            Some("silence") => Ok(Self::Fault(Fault::Silence)),
            Some("hang-up") => Ok(Self::Fault(Fault::HangUp)),
            Some("say") => Ok(Self::Fault(Fault::Say(text("text").ok_or("says no text")?.into_bytes()))),
            _ => Err("neither note, qemu, client nor a known fault".into()),
        }
    }

    fn as_json(&self) -> Value {
        match self {
            Self::Note(note) => json!({ "note": note }),
            Self::Qemu(said) => json!({ "qemu": said }),
            Self::Client(said) => json!({ "client": said }),
            Self::Fault(Fault::Silence) => json!({ "fault": "silence" }),
            Self::Fault(Fault::HangUp) => json!({ "fault": "hang-up" }),
            Self::Fault(Fault::Say(bytes)) => {
                json!({ "fault": "say", "text": String::from_utf8_lossy(bytes) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_transcript_is_written_as_it_was_read() {
        let text = "{\"note\":\"n\"}\n{\"qemu\":{\"QMP\":{}}}\n{\"client\":{\"execute\":\"stop\"}}\n\
                    {\"fault\":\"say\",\"text\":\"x\"}\n{\"fault\":\"silence\"}\n{\"fault\":\"hang-up\"}\n";
        let transcript = Transcript::parse(text).unwrap();
        assert_eq!(transcript.steps().len(), 6);
        assert_eq!(transcript.to_string(), text);
        assert_eq!(transcript.broken_at(2, Fault::Silence).steps().len(), 3);
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let wrong = Transcript::parse("{\"note\":\"n\"}\n\n{\"fault\":\"sulks\"}\n").unwrap_err();
        assert!(wrong.starts_with("line 3:"), "{wrong}");
    }
}
