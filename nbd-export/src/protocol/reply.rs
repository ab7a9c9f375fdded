//! Replies to requests, in the three kinds of headers.

use super::{EXTENDED_REPLY_MAGIC, Errno, Headers, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, clip};
use crate::exports::StatusExtent;

/// Writes replies as the client has asked for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoder {
    pub(crate) headers: Headers,
}

/// Which request a reply belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whose {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
}

impl Encoder {
    fn simple(out: &mut Vec<u8>, whose: Whose, error: u32) {
        out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend(error.to_be_bytes());
        out.extend(whose.cookie.to_be_bytes());
    }

    fn chunk(self, out: &mut Vec<u8>, whose: Whose, flags: u16, kind: u16, length: usize) {
        let extended = self.headers == Headers::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        out.extend(magic.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(whose.cookie.to_be_bytes());
        if extended {
            out.extend(whose.offset.to_be_bytes());
            out.extend((length as u64).to_be_bytes());
        } else {
            out.extend((length as u32).to_be_bytes());
        }
    }

    /// Done, without data. A simple reply does, unless headers are extended; but never for a read with structured
    /// replies, for which see `nothing`.
    pub(crate) fn done(self, out: &mut Vec<u8>, whose: Whose) {
        match self.headers {
            Headers::Simple | Headers::Structured => Self::simple(out, whose, 0),
            Headers::Extended => self.nothing(out, whose),
        }
    }

    /// A read of no bytes.
    pub(crate) fn nothing(self, out: &mut Vec<u8>, whose: Whose) {
        match self.headers {
            Headers::Simple => Self::simple(out, whose, 0),
            Headers::Structured | Headers::Extended => {
                self.chunk(out, whose, chunk::FLAG_DONE, chunk::NONE, 0);
            }
        }
    }

    /// Not done, and why.
    pub(crate) fn error(self, out: &mut Vec<u8>, whose: Whose, errno: Errno, message: &str) {
        if self.headers == Headers::Simple {
            return Self::simple(out, whose, errno as u32);
        }
        let message = clip(message).as_bytes();
        self.chunk(out, whose, chunk::FLAG_DONE, chunk::ERROR, 6 + message.len());
        out.extend((errno as u32).to_be_bytes());
        out.extend((message.len() as u16).to_be_bytes());
        out.extend(message);
    }

    /// What goes before the data of a read of at least one byte.
    pub(crate) fn data(self, out: &mut Vec<u8>, whose: Whose, length: usize) {
        match self.headers {
            Headers::Simple => Self::simple(out, whose, 0),
            Headers::Structured | Headers::Extended => {
                self.chunk(out, whose, chunk::FLAG_DONE, chunk::OFFSET_DATA, 8 + length);
                out.extend(whose.offset.to_be_bytes());
            }
        }
    }

    /// A read of which every byte is zero. Not for simple replies, nor with DF if the client insists on data.
    pub(crate) fn hole(self, out: &mut Vec<u8>, whose: Whose, length: u32) {
        self.chunk(out, whose, chunk::FLAG_DONE, chunk::OFFSET_HOLE, 12);
        out.extend(whose.offset.to_be_bytes());
        out.extend(length.to_be_bytes());
    }

    /// What one context says; not for simple replies. Lengths fit into 32 bits unless headers are extended.
    pub(crate) fn status(
        self,
        out: &mut Vec<u8>,
        whose: Whose,
        context: u32,
        extents: &[StatusExtent],
        last: bool,
    ) {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        if self.headers == Headers::Extended {
            self.chunk(out, whose, flags, chunk::BLOCK_STATUS_EXT, 8 + 16 * extents.len());
            out.extend(context.to_be_bytes());
            out.extend((extents.len() as u32).to_be_bytes());
            for extent in extents {
                out.extend(extent.len_bytes.to_be_bytes());
                out.extend(extent.flags.to_be_bytes());
            }
        } else {
            self.chunk(out, whose, flags, chunk::BLOCK_STATUS, 4 + 8 * extents.len());
            out.extend(context.to_be_bytes());
            for extent in extents {
                out.extend((extent.len_bytes as u32).to_be_bytes());
                out.extend((extent.flags as u32).to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOSE: Whose = Whose { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };

    fn encoded(headers: Headers, encode: impl FnOnce(Encoder, &mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        encode(Encoder { headers }, &mut out);
        out
    }

    #[test]
    fn headers_have_the_lengths_of_the_protocol() {
        let done = |headers| encoded(headers, |encoder, out| encoder.done(out, WHOSE)).len();
        assert_eq!([Headers::Simple, Headers::Structured, Headers::Extended].map(done), [16, 16, 32]);
        let data = |headers| encoded(headers, |encoder, out| encoder.data(out, WHOSE, 512)).len();
        assert_eq!([Headers::Simple, Headers::Structured, Headers::Extended].map(data), [16, 28, 40]);
    }

    #[test]
    fn a_read_of_nothing_is_never_simple_with_structured_replies() {
        let bytes = encoded(Headers::Structured, |encoder, out| encoder.nothing(out, WHOSE));
        assert_eq!(bytes, [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
    }

    #[test]
    fn errors_carry_a_message_where_there_is_room_for_one() {
        let simple = encoded(Headers::Simple, |e, out| e.error(out, WHOSE, Errno::NoSpc, "full"));
        assert_eq!(simple[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28]);
        let structured = encoded(Headers::Structured, |e, out| e.error(out, WHOSE, Errno::NoSpc, "full"));
        assert_eq!(structured[4..8], [0, 1, 0x80, 1]);
        assert_eq!(structured[16..], *b"\0\0\0\x0a\0\0\0\x1c\0\x04full");
    }

    #[test]
    fn extended_status_counts_its_descriptors() {
        let extents = [StatusExtent { len_bytes: 1 << 40, flags: 3 }];
        let bytes = encoded(Headers::Extended, |e, out| e.status(out, WHOSE, 9, &extents, true));
        assert_eq!(bytes[4..8], [0, 1, 0, 6]);
        assert_eq!(bytes[24..32], 24_u64.to_be_bytes());
        assert_eq!(bytes[32..40], [0, 0, 0, 9, 0, 0, 0, 1]);
        assert_eq!(bytes[40..48], (1_u64 << 40).to_be_bytes());
    }
}
