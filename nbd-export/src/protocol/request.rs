//! Requests: their headers, and what they may ask for.

use super::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command, command_flag, take_u16, take_u32, take_u64};

/// Which headers client and server have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Headers {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended both.
    Extended,
}

impl Headers {
    /// Bytes in the header of a request.
    pub(crate) fn request_len(self) -> usize {
        match self {
            Self::Simple | Self::Structured => 28,
            Self::Extended => 32,
        }
    }
}

/// The header of a request ("Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Of the part of the export that it is about, or of the payload: see `payload`.
    pub(crate) length: u64,
    headers: Headers,
}

impl RequestHeader {
    /// Reads a header of [`Headers::request_len`] bytes. None if the magic number is not there: the stream is out of
    /// step, and nothing that follows can be understood.
    pub(crate) fn parse(mut bytes: &[u8], headers: Headers) -> Option<Self> {
        let magic = take_u32(&mut bytes)?;
        let expected = match headers {
            Headers::Simple | Headers::Structured => REQUEST_MAGIC,
            Headers::Extended => EXTENDED_REQUEST_MAGIC,
        };
        if magic != expected {
            return None;
        }
        Some(Self {
            flags: take_u16(&mut bytes)?,
            command: take_u16(&mut bytes)?,
            cookie: take_u64(&mut bytes)?,
            offset: take_u64(&mut bytes)?,
            length: match headers {
                Headers::Simple | Headers::Structured => u64::from(take_u32(&mut bytes)?),
                Headers::Extended => take_u64(&mut bytes)?,
            },
            headers,
        })
    }

    /// Bytes that follow the header, whether the command has a use for them or not.
    ///
    /// With extended headers a write must say by its flag that it has a payload. QEMU's client (seen in 10.0) does
    /// not, and sends one; so, as QEMU's server does, every write is taken to have one.
    pub(crate) fn payload(&self) -> u64 {
        let announced = self.headers == Headers::Extended && self.has(command_flag::PAYLOAD_LEN);
        if announced || self.command == command::WRITE { self.length } else { 0 }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether every flag means something for this command ("Command flags").
    ///
    /// FUA is taken on every command, as the protocol demands once FUA has been offered. DF is not, without structured
    /// replies; PAYLOAD_LEN belongs to extended headers.
    pub(crate) fn flags_are_known(&self) -> bool {
        let extended = self.headers == Headers::Extended;
        let known = match self.command {
            command::READ if self.headers != Headers::Simple => command_flag::DF,
            command::WRITE if extended => command_flag::PAYLOAD_LEN,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS if extended => command_flag::REQ_ONE | command_flag::PAYLOAD_LEN,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => 0,
        };
        self.flags & !(known | command_flag::FUA) == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn compact(flags: u16, command: u16) -> Vec<u8> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(4096_u64.to_be_bytes());
        bytes.extend(512_u32.to_be_bytes());
        bytes
    }

    #[test]
    fn compact_headers_are_read_and_only_writes_have_a_payload() {
        let header = RequestHeader::parse(&compact(1, command::WRITE), Headers::Simple).unwrap();
        assert_eq!((header.flags, header.cookie, header.offset, header.length), (1, 7, 4096, 512));
        assert_eq!(header.payload(), 512);
        let header =
            RequestHeader::parse(&compact(command_flag::PAYLOAD_LEN, command::READ), Headers::Simple)
                .unwrap();
        assert_eq!(header.payload(), 0, "a compact header has no such flag, so nothing follows it");
        assert!(!header.flags_are_known());
    }

    #[test]
    fn the_other_kind_of_header_is_out_of_step() {
        let bytes = [compact(0, command::READ), vec![0; 4]].concat();
        assert!(RequestHeader::parse(&bytes, Headers::Extended).is_none());
        assert!(RequestHeader::parse(&bytes[..27], Headers::Simple).is_none());
    }

    #[test]
    fn in_extended_headers_the_flag_says_what_the_length_means() {
        let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        bytes.extend(command_flag::PAYLOAD_LEN.to_be_bytes());
        bytes.extend(command::WRITE.to_be_bytes());
        bytes.extend([0; 16]);
        bytes.extend((1_u64 << 40).to_be_bytes());
        let header = RequestHeader::parse(&bytes, Headers::Extended).unwrap();
        assert_eq!(header.payload(), 1 << 40);
        assert!(header.flags_are_known());
        let silent = RequestHeader { flags: 0, ..header };
        assert_eq!(silent.payload(), 1 << 40, "QEMU does not say it, and does it");
        let read = RequestHeader { command: command::READ, ..header };
        assert_eq!((read.payload(), read.flags_are_known()), (1 << 40, false));
        assert_eq!(RequestHeader { flags: 0, ..read }.payload(), 0);
    }

    #[test]
    fn dont_fragment_needs_structured_replies() {
        let parse =
            |headers| RequestHeader::parse(&compact(command_flag::DF, command::READ), headers).unwrap();
        assert!(!parse(Headers::Simple).flags_are_known());
        assert!(parse(Headers::Structured).flags_are_known());
    }
}
