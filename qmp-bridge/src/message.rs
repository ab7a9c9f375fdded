//! What QEMU sends, and what is sent to it: the three kinds of message of QEMU's `docs/interop/qmp-spec.rst`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Refusal;
use crate::event::{EventKind, WireTime};

/// The version that a QEMU says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of 10.0.2, the 10.
    pub major: u32,
    /// Of 10.0.2, the 0.
    pub minor: u32,
    /// Of 10.0.2, the 2.
    pub micro: u32,
    /// What the distribution calls its package; may be empty.
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The first message of a QMP server.
#[derive(Debug, Deserialize)]
struct RawGreeting {
    #[serde(rename = "QMP")]
    qmp: RawQmp,
}

#[derive(Debug, Deserialize)]
struct RawQmp {
    version: RawVersion,
    #[serde(default)]
    capabilities: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct RawVersion {
    qemu: RawTriple,
    #[serde(default)]
    package: String,
}

#[derive(Debug, Deserialize)]
struct RawTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Debug)]
pub(crate) struct Greeting {
    pub(crate) version: Version,
    /// Whether commands may be sent out of band.
    pub(crate) oob: bool,
}

impl Greeting {
    /// None if this is no greeting of a QMP server.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let RawGreeting { qmp } = serde_json::from_slice(line).ok()?;
        let RawTriple { major, minor, micro } = qmp.version.qemu;
        let version = Version { major, minor, micro, package: qmp.version.package };
        Some(Self { version, oob: qmp.capabilities.iter().any(|offered| offered == "oob") })
    }
}

/// A message after the greeting.
#[derive(Debug)]
pub(crate) enum Message {
    Event { kind: EventKind, time_us: Option<u64> },
    Reply { id: Option<u64>, answer: Result<Value, Refusal> },
}

#[derive(Deserialize)]
struct RawMessage {
    event: Option<String>,
    #[serde(default)]
    data: Map<String, Value>,
    timestamp: Option<WireTime>,
    // `Some(None)` would be lost in an Option: a command may well return null.
    #[serde(rename = "return", default, deserialize_with = "present")]
    returned: Option<Value>,
    error: Option<RawRefusal>,
    id: Option<Value>,
}

#[derive(Deserialize)]
struct RawRefusal {
    class: String,
    desc: String,
}

fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

impl Message {
    /// Reads one line.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        let raw: RawMessage = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        if let Some(name) = raw.event {
            let time_us = raw.timestamp.and_then(WireTime::micros);
            return Ok(Self::Event { kind: EventKind::parse(name, raw.data), time_us });
        }
        let answer = match (raw.returned, raw.error) {
            (Some(value), None) => Ok(value),
            (None, Some(RawRefusal { class, desc })) => Err(Refusal { class, desc }),
            _ => return Err("neither an event nor a reply".into()),
        };
        let id = match raw.id {
            None => None,
            Some(id) => Some(id.as_u64().ok_or("a reply to nothing that was asked")?),
        };
        Ok(Self::Reply { id, answer })
    }
}

/// A command as it goes over the socket, with its line end.
pub(crate) fn command_line(name: &str, arguments: Option<&Value>, id: u64, oob: bool) -> Vec<u8> {
    #[derive(Serialize)]
    struct Command<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        execute: Option<&'a str>,
        #[serde(rename = "exec-oob", skip_serializing_if = "Option::is_none")]
        exec_oob: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        arguments: Option<&'a Value>,
        id: u64,
    }
    let (execute, exec_oob) = if oob { (None, Some(name)) } else { (Some(name), None) };
    // A struct of strings and a Value has no way to fail; an empty line would be ignored by QEMU.
    let mut line = serde_json::to_vec(&Command { execute, exec_oob, arguments, id }).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_greeting_needs_a_version() {
        let line = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "p"},
            "capabilities": ["oob"]}}"#;
        let greeting = Greeting::parse(line).unwrap();
        assert_eq!(greeting.version.to_string(), "7.2.22");
        assert!(greeting.oob);
        for other in [&b"SSH-2.0-OpenSSH"[..], b"{}", br#"{"QMP": {}}"#, br#"{"return": {}}"#, b""] {
            assert!(Greeting::parse(other).is_none());
        }
    }

    #[test]
    fn replies_of_null_are_replies() {
        let parsed = Message::parse(br#"{"return": null, "id": 3}"#).unwrap();
        assert!(matches!(parsed, Message::Reply { id: Some(3), answer: Ok(Value::Null) }));
    }

    #[test]
    fn what_is_neither_event_nor_reply_is_an_error() {
        for line in [
            &b"{}"[..],
            b"[]",
            b"{",
            br#"{"return": {}, "error": {"class": "a", "desc": "b"}}"#,
            br#"{"return": {}, "id": "x"}"#,
            br#"{"event": 7}"#,
        ] {
            assert!(Message::parse(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn commands_are_one_line() {
        let line = command_line("stop", None, 7, false);
        assert_eq!(line, b"{\"execute\":\"stop\",\"id\":7}\n");
        let arguments = serde_json::json!({"a": "line\nend"});
        let line = command_line("migrate-pause", Some(&arguments), 8, true);
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert!(line.starts_with(b"{\"exec-oob\":\"migrate-pause\""));
    }
}
