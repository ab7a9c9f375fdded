//! Options: what a client asks for during the handshake, and what it is told.

use super::{MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, clip, info, rep, take_u16, take_u32, take_u64};

/// The header of an option ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub(crate) option: u32,
    /// Bytes of data that follow.
    pub(crate) length: u32,
}

impl OptionHeader {
    pub(crate) const LEN: usize = 16;

    /// None if the magic number is not there.
    pub(crate) fn parse(mut bytes: &[u8]) -> Option<Self> {
        if take_u64(&mut bytes)? != OPTION_MAGIC {
            return None;
        }
        Some(Self { option: take_u32(&mut bytes)?, length: take_u32(&mut bytes)? })
    }
}

/// The data of NBD_OPT_INFO and NBD_OPT_GO.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ExportQuestion<'a> {
    pub(crate) name: &'a str,
    pub(crate) infos: Vec<u16>,
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaQuestion<'a> {
    pub(crate) name: &'a str,
    pub(crate) queries: Vec<&'a str>,
}

/// Takes a string off: UTF-8, without NUL, not too long.
fn string<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a str> {
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    if length > MAX_STRING || text.contains(&0) {
        return None;
    }
    std::str::from_utf8(text).ok()
}

/// None if it is not as the protocol wants it.
pub(crate) fn parse_export(mut bytes: &[u8]) -> Option<ExportQuestion<'_>> {
    let length = take_u32(&mut bytes)? as usize;
    let name = string(&mut bytes, length)?;
    let count = usize::from(take_u16(&mut bytes)?);
    if bytes.len() != count * 2 {
        return None;
    }
    let infos = std::iter::from_fn(|| take_u16(&mut bytes)).collect();
    Some(ExportQuestion { name, infos })
}

/// None if it is not as the protocol wants it.
pub(crate) fn parse_meta(mut bytes: &[u8]) -> Option<MetaQuestion<'_>> {
    let length = take_u32(&mut bytes)? as usize;
    let name = string(&mut bytes, length)?;
    let count = take_u32(&mut bytes)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        let length = take_u32(&mut bytes)? as usize;
        queries.push(string(&mut bytes, length)?);
    }
    bytes.is_empty().then_some(MetaQuestion { name, queries })
}

/// The replies to one option, in the order in which they go out.
pub(crate) struct OptionReplies {
    option: u32,
    bytes: Vec<u8>,
}

impl OptionReplies {
    pub(crate) fn to(option: u32) -> Self {
        Self { option, bytes: Vec::new() }
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn reply(&mut self, kind: u32, parts: &[&[u8]]) -> &mut Self {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((length as u32).to_be_bytes());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self
    }

    pub(crate) fn ack(&mut self) -> &mut Self {
        self.reply(rep::ACK, &[])
    }

    /// `kind` is one of `rep::ERR_*`.
    pub(crate) fn error(&mut self, kind: u32, message: &str) -> &mut Self {
        self.reply(kind, &[clip(message).as_bytes()])
    }

    pub(crate) fn server(&mut self, name: &str, description: &str) -> &mut Self {
        let length = (name.len() as u32).to_be_bytes();
        self.reply(rep::SERVER, &[&length, name.as_bytes(), clip(description).as_bytes()])
    }

    pub(crate) fn export(&mut self, size: u64, flags: u16) -> &mut Self {
        let kind = info::EXPORT.to_be_bytes();
        self.reply(rep::INFO, &[&kind, &size.to_be_bytes(), &flags.to_be_bytes()])
    }

    /// `kind` is `info::NAME` or `info::DESCRIPTION`.
    pub(crate) fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        self.reply(rep::INFO, &[&kind.to_be_bytes(), clip(text).as_bytes()])
    }

    pub(crate) fn block_size(&mut self, minimum: u32, preferred: u32, payload: u32) -> &mut Self {
        let sizes = [minimum, preferred, payload].map(u32::to_be_bytes);
        self.reply(rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()])
    }

    pub(crate) fn meta_context(&mut self, id: u32, name: &str) -> &mut Self {
        self.reply(rep::META_CONTEXT, &[&id.to_be_bytes(), clip(name).as_bytes()])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn strings_that_lie_about_their_length_are_refused() {
        let mut good = 3_u32.to_be_bytes().to_vec();
        good.extend(b"abc");
        good.extend([0, 1, 0, 3]);
        assert_eq!(parse_export(&good).unwrap(), ExportQuestion { name: "abc", infos: vec![3] });
        for cut in 0..good.len() {
            assert!(parse_export(&good[..cut]).is_none(), "cut to {cut}");
        }
        let mut long = u32::MAX.to_be_bytes().to_vec();
        long.extend(b"abc");
        assert!(parse_export(&long).is_none());
        assert!(parse_meta(&long).is_none());
    }

    #[test]
    fn strings_must_be_utf8_without_nul_and_not_too_long() {
        let question = |name: &[u8]| {
            let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
            bytes.extend(name);
            bytes.extend([0, 0]);
            bytes
        };
        assert!(parse_export(&question(b"a\0b")).is_none());
        assert!(parse_export(&question(b"\xff")).is_none());
        assert!(parse_export(&question(&[b'x'; 4097])).is_none());
        assert!(parse_export(&question(&[b'x'; 4096])).is_some());
    }

    #[test]
    fn a_number_of_queries_costs_nothing_before_they_are_there() {
        let mut bytes = 0_u32.to_be_bytes().to_vec();
        bytes.extend(u32::MAX.to_be_bytes());
        assert!(parse_meta(&bytes).is_none());
    }

    #[test]
    fn replies_carry_option_type_and_length() {
        let mut replies = OptionReplies::to(7);
        replies.export(1 << 30, 0x0103).ack();
        let bytes = replies.into_bytes();
        assert_eq!(&bytes[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(&bytes[8..20], [0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 12]);
        assert_eq!(&bytes[20..32], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 1, 3]);
        assert_eq!(&bytes[40..], [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn a_message_is_cut_at_a_characters_edge() {
        let text = format!("x{}", "ü".repeat(3000));
        assert_eq!(clip(&text).len(), 4095);
    }
}
