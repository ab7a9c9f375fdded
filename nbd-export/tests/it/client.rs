//! A client that says what it is told to say, right or wrong.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::fixture::DEADLINE;

pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

pub(crate) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
    pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
    pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
    pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

pub(crate) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 2;
    pub(crate) const DF: u16 = 4;
    pub(crate) const REQ_ONE: u16 = 8;
    pub(crate) const FAST_ZERO: u16 = 16;
    pub(crate) const PAYLOAD_LEN: u16 = 32;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Headers {
    Simple,
    Structured,
    Extended,
}

/// What the server has said of one request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) message: String,
    pub(crate) data: Vec<u8>,
    /// Whether the data came as a hole.
    pub(crate) hole: bool,
    /// Of each context: its id and extents of length and flags.
    pub(crate) status: Vec<(u32, Vec<(u64, u64)>)>,
}

pub(crate) struct Client<S> {
    pub(crate) stream: S,
    pub(crate) headers: Headers,
    last_cookie: u64,
    /// What a simple reply to this cookie carries.
    expected: std::collections::HashMap<u64, usize>,
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

pub(crate) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub(crate) fn question(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

pub(crate) fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

impl Client<UnixStream> {
    /// Connected, and greeted without the wish for 124 zeroes.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut client = Self::new(connect(socket));
        client.greet(3);
        client
    }

    /// In transmission, with these headers and contexts.
    pub(crate) fn ready(socket: &Path, name: &str, headers: Headers, contexts: &[&str]) -> Self {
        let mut client = Self::greeted(socket);
        client.agree(name, headers, contexts);
        client
    }
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, headers: Headers::Simple, last_cookie: 0, expected: Default::default() }
    }

    pub(crate) fn greet(&mut self, flags: u32) {
        let greeting = self.take(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        self.send(&flags.to_be_bytes());
    }

    pub(crate) fn agree(&mut self, name: &str, headers: Headers, contexts: &[&str]) {
        match headers {
            Headers::Simple => {}
            Headers::Structured => {
                assert_eq!(self.ask(opt::STRUCTURED_REPLY, &[]).last().unwrap().0, rep::ACK)
            }
            Headers::Extended => assert_eq!(self.ask(opt::EXTENDED_HEADERS, &[]).last().unwrap().0, rep::ACK),
        }
        self.headers = headers;
        if !contexts.is_empty() {
            let replies = self.ask(opt::SET_META_CONTEXT, &queries(name, contexts));
            assert_eq!(replies.last().unwrap().0, rep::ACK);
        }
        let replies = self.ask(opt::GO, &question(name, &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK, "{replies:?}");
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub(crate) fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub(crate) fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Whether the server has ended the stream, and within the deadline.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
            }
        }
    }

    /// Sends an option and takes its replies: type and data of each.
    pub(crate) fn ask(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option(kind, data));
        self.answers(kind)
    }

    pub(crate) fn answers(&mut self, kind: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.take_u32(), kind);
            let reply = self.take_u32();
            let length = self.take_u32() as usize;
            replies.push((reply, self.take(length)));
            if reply == rep::ACK || reply >= 1 << 31 {
                return replies;
            }
        }
    }

    /// A request's bytes, without payload; `length` is what the header says.
    pub(crate) fn header(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
        self.last_cookie += 1;
        let extended = self.headers == Headers::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.last_cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        match extended {
            true => bytes.extend(length.to_be_bytes()),
            false => bytes.extend((length as u32).to_be_bytes()),
        }
        if command == cmd::READ {
            self.expected.insert(self.last_cookie, length as usize);
        }
        bytes
    }

    /// Sends a request and returns its cookie.
    pub(crate) fn start(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u64 {
        let bytes = self.header(command, flags, offset, length);
        self.send(&bytes);
        self.last_cookie
    }

    pub(crate) fn start_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let extended = self.headers == Headers::Extended;
        let flags = if extended { flags | flag::PAYLOAD_LEN } else { flags };
        let mut bytes = self.header(cmd::WRITE, flags, offset, data.len() as u64);
        bytes.extend(data);
        self.send(&bytes);
        self.last_cookie
    }

    pub(crate) fn call(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> Reply {
        let cookie = self.start(command, flags, offset, length);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.start_write(flags, offset, data);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply.error
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let reply = self.call(cmd::READ, 0, offset, length);
        assert_eq!(reply.error, 0, "{}", reply.message);
        reply.data
    }

    /// The next reply, whole. Chunks of one reply must not be mixed with others', which this server does not do.
    pub(crate) fn reply(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            match self.take_u32() {
                0x6744_6698 => {
                    assert_ne!(self.headers, Headers::Extended);
                    reply.error = self.take_u32();
                    reply.cookie = self.take_u64();
                    if let Some(length) = self.expected.remove(&reply.cookie)
                        && reply.error == 0
                    {
                        assert_eq!(self.headers, Headers::Simple, "a read must be answered by chunks");
                        reply.data = self.take(length);
                    }
                    return reply;
                }
                0x668e_33ef => assert_eq!(self.headers, Headers::Structured),
                0x6e8a_278c => assert_eq!(self.headers, Headers::Extended),
                other => panic!("a reply that begins with {other:#x}"),
            }
            let (flags, kind) = (self.take_u16(), self.take_u16());
            reply.cookie = self.take_u64();
            let length = match self.headers {
                Headers::Extended => {
                    self.take_u64(); // the request's offset
                    self.take_u64() as usize
                }
                _ => self.take_u32() as usize,
            };
            let payload = self.take(length);
            reply.chunk(kind, &payload);
            if flags & 1 == 1 {
                self.expected.remove(&reply.cookie);
                return reply;
            }
        }
    }
}

impl Reply {
    fn chunk(&mut self, kind: u16, payload: &[u8]) {
        let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
        match kind {
            0 => assert!(payload.is_empty()),
            1 => self.data = payload[8..].to_vec(),
            2 => {
                self.hole = true;
                self.data = vec![0; u32_at(8) as usize];
            }
            5 => {
                let extents = (4..payload.len()).step_by(8);
                let extents = extents.map(|at| (u64::from(u32_at(at)), u64::from(u32_at(at + 4))));
                self.status.push((u32_at(0), extents.collect()));
            }
            6 => {
                let extents: Vec<_> =
                    (8..payload.len()).step_by(16).map(|at| (u64_at(at), u64_at(at + 8))).collect();
                assert_eq!(u32_at(4) as usize, extents.len());
                self.status.push((u32_at(0), extents));
            }
            0x8001 => {
                self.error = u32_at(0);
                let length = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                self.message = String::from_utf8(payload[6..6 + length].to_vec()).unwrap();
            }
            other => panic!("a chunk of type {other}"),
        }
    }
}
