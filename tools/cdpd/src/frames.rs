//! The stream in which a volume's content goes over the API, in both directions.
//!
//! It is a sequence of frames: first one *start*, then *data* in ascending order of offset without overlap,
//! then one *end* or one *error*. What no data frame covers is zero. A stream that stops without an end is
//! incomplete.
//!
//! ```text
//!  byte   0        4        8                16
//!         +--------+--------+----------------+------------------+
//!         | kind   | length | offset         | payload (length) |      all little-endian
//!         +--------+--------+----------------+------------------+
//! ```
//!
//! | kind | offset | payload |
//! | --- | --- | --- |
//! | 1 start | the volume's size in bytes | JSON, [`ContentStart`] |
//! | 2 data | where it belongs, in bytes | at most [`MAX_PAYLOAD`] bytes |
//! | 3 end | 0 | none |
//! | 4 error | 0 | JSON, [`ApiError`] |

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use crate::api::{ApiError, At};

/// The media type of such a stream.
pub const CONTENT_TYPE: &str = "application/vnd.hindsight.content";
/// The most bytes that one frame carries. A reader refuses more, so that a stream cannot grow its memory.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of a frame before its payload.
pub const HEADER_BYTES: usize = 16;

/// What a stream begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentStart {
    /// The volume's size, in bytes.
    pub size_bytes: u64,
    /// Which instant it is; none in a stream that makes a new volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<At>,
}

/// One step of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Its beginning.
    Start(ContentStart),
    /// Bytes and where they belong.
    Data {
        /// Their first byte's place in the volume.
        offset: u64,
        /// At most [`MAX_PAYLOAD`].
        bytes: Vec<u8>,
    },
    /// It is complete.
    End,
    /// It ends here, incomplete.
    Error(ApiError),
}

impl Frame {
    /// The frame's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let json = |value: serde_json::Result<Vec<u8>>| value.unwrap_or_default();
        match self {
            Self::Start(start) => frame(1, start.size_bytes, &json(serde_json::to_vec(start))),
            Self::Data { offset, bytes } => frame(2, *offset, bytes),
            Self::End => frame(3, 0, &[]),
            Self::Error(error) => frame(4, 0, &json(serde_json::to_vec(error))),
        }
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// `UnexpectedEof` when the stream stops, even between two frames, since only [`Frame::End`] completes
    /// one; `InvalidData` when it is none; else what the source says.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        from.read_exact(&mut header)?;
        let (kind, rest) = split(&header);
        let (length, offset) = rest;
        if length > MAX_PAYLOAD {
            return Err(invalid(format!("a frame of {length} bytes is longer than {MAX_PAYLOAD}")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        match kind {
            1 => serde_json::from_slice(&payload).map(Self::Start).map_err(|e| invalid(e.to_string())),
            2 => Ok(Self::Data { offset, bytes: payload }),
            3 => Ok(Self::End),
            4 => serde_json::from_slice(&payload).map(Self::Error).map_err(|e| invalid(e.to_string())),
            _ => Err(invalid(format!("there is no frame of kind {kind}"))),
        }
    }
}

/// Kind, and length and offset, of a header.
fn split(header: &[u8; HEADER_BYTES]) -> (u32, (usize, u64)) {
    let [a, b, c, d, e, f, g, h, offset @ ..] = *header;
    (
        u32::from_le_bytes([a, b, c, d]),
        (u32::from_le_bytes([e, f, g, h]) as usize, u64::from_le_bytes(offset)),
    )
}

fn frame(kind: u32, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a content stream: {what}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::api::ErrorKind;

    fn frames() -> impl Strategy<Value = Frame> {
        prop_oneof![
            any::<u64>().prop_map(|size_bytes| Frame::Start(ContentStart { size_bytes, at: None })),
            (any::<u64>(), prop::collection::vec(any::<u8>(), 0..9000))
                .prop_map(|(offset, bytes)| Frame::Data { offset, bytes }),
            Just(Frame::End),
            ".{0,40}".prop_map(|message| Frame::Error(ApiError { kind: ErrorKind::Io, message })),
        ]
    }

    proptest! {
        #[test]
        fn a_stream_reads_as_it_was_written(frames in prop::collection::vec(frames(), 0..6)) {
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let mut rest = &bytes[..];
            for frame in frames {
                prop_assert_eq!(Frame::read(&mut rest).unwrap(), frame);
            }
            prop_assert_eq!(Frame::read(&mut rest).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0..6_u32) {
            let _ = Frame::read(&mut &bytes[..]);
            let _ = Frame::read(&mut &frame(kind, 7, &bytes)[..]);
        }
    }

    #[test]
    fn a_frame_cut_short_is_no_frame() {
        let bytes = Frame::Data { offset: 4096, bytes: vec![7; 100] }.encode();
        for len in 0..bytes.len() {
            assert_eq!(Frame::read(&mut &bytes[..len]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_length_from_the_wire_is_not_trusted() {
        let mut bytes = frame(2, 0, &[]);
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Frame::read(&mut &bytes[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
