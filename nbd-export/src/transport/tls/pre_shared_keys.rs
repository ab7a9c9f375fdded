//! TLS by keys that server and client share, with OpenSSL (RFC 8446, section 2.2; RFC 5489 for TLS 1.2).

use std::io::{self, Read, Write};
use std::path::Path;

use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::rand::rand_bytes;
use openssl::ssl::{
    self, ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslRef, SslSessionCacheMode,
    SslStream, SslVersion,
};

use super::key_file::KeyFile;
use super::{Engine, Received};
use crate::{Error, ErrorKind};

/// Of TLS 1.3, the faster first. OpenSSL binds a key that came by callback to SHA-256, as GnuTLS does.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// Of TLS 1.2: what OpenSSL and GnuTLS both have with fresh keys for each connection (what was recorded stays secret
/// when a shared key gets known) and without CBC.
const SUITES_TLS_1_2: &str = "ECDHE-PSK-CHACHA20-POLY1305";
/// Plaintext of a TLS record.
const RECORD: usize = 16 << 10;
/// What OpenSSL may want to send while it only receives, in bytes: answers to a client's KeyUpdate, say. They go with
/// the next reply; a client that provokes them and asks for nothing else would fill our memory.
const UNASKED: usize = 16 << 10;

/// See [`crate::TlsCredentials::PreSharedKeys`].
pub(super) struct PreSharedKeys {
    context: SslContext,
    claim: Index<Ssl, Claim>,
}

/// Who a client says it is.
struct Claim {
    user: Vec<u8>,
    known: bool,
}

impl PreSharedKeys {
    pub(super) fn load(path: &Path) -> Result<Self, Error> {
        let keys = KeyFile::read(path).map_err(|e| Error::because(ErrorKind::Tls, path.display(), e))?;
        Self::new(keys).map_err(|e| Error::because(ErrorKind::Tls, "OpenSSL", e))
    }

    fn new(keys: KeyFile) -> Result<Self, ErrorStack> {
        let claim = Ssl::new_ex_index()?;
        let mut builder = SslContextBuilder::new(SslMethod::tls_server())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        builder.set_ciphersuites(SUITES)?;
        builder.set_cipher_list(SUITES_TLS_1_2)?;
        builder
            .set_options(SslOptions::NO_RENEGOTIATION | SslOptions::NO_TICKET | SslOptions::NO_COMPRESSION);
        // Clients without instructions for AES say so by asking for ChaCha20 first.
        builder.set_options(SslOptions::CIPHER_SERVER_PREFERENCE | SslOptions::PRIORITIZE_CHACHA);
        // Who resumes a session would not have to know the key.
        builder.set_num_tickets(0)?;
        builder.set_session_cache_mode(SslSessionCacheMode::OFF);
        // Nobody knows this key. With it, unknown users fail where, when and how known ones do whose key is wrong.
        let mut nobodys = [0; 32];
        rand_bytes(&mut nobodys)?;
        builder.set_psk_server_callback(move |ssl: &mut SslRef, user, room| {
            let user = user.unwrap_or_default();
            let known = keys.key(user);
            ssl.set_ex_data(claim, Claim { user: user.to_vec(), known: known.is_some() });
            let key = known.unwrap_or(&nobodys);
            // OpenSSL has room for 256 bytes at least; no key at all would be a refusal, too.
            let Some(room) = room.get_mut(..key.len()) else { return Ok(0) };
            room.copy_from_slice(key);
            Ok(key.len())
        });
        Ok(Self { context: builder.build(), claim })
    }

    /// A new connection.
    pub(super) fn connect(&self) -> io::Result<Connection> {
        let stream = SslStream::new(Ssl::new(&self.context)?, Wire::default())?;
        Ok(Connection { stream, claim: self.claim, record: vec![0; RECORD].into() })
    }
}

/// What OpenSSL takes for a socket.
#[derive(Default)]
struct Wire {
    received: Received,
    outgoing: Vec<u8>,
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.received.bytes();
        if bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = bytes.len().min(into.len());
        into[..count].copy_from_slice(&bytes[..count]);
        self.received.consume(count);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One connection.
pub(super) struct Connection {
    stream: SslStream<Wire>,
    claim: Index<Ssl, Claim>,
    /// On its way from OpenSSL to whoever reads.
    record: Box<[u8]>,
}

impl Connection {
    /// Why a handshake has failed, for the log. The client is told nothing that depends on who it says it is.
    fn refusal(&self, error: &ssl::Error) -> io::Error {
        let mut why = reason(error);
        if let Some(Claim { user, known }) = self.stream.ssl().ex_data(self.claim) {
            let user = String::from_utf8_lossy(user);
            let unknown = if *known { "" } else { ", who has no key here" };
            why = format!("{why}; it says it is {user:?}{unknown}");
        }
        io::Error::new(io::ErrorKind::InvalidData, why)
    }
}

/// What OpenSSL says of an error, without the places in its code.
fn reason(error: &ssl::Error) -> String {
    let first = error.ssl_error().and_then(|stack| stack.errors().first()?.reason());
    first.map_or_else(|| error.to_string(), str::to_owned)
}

fn failed(error: &ssl::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason(error))
}

impl Engine for Connection {
    fn received(&mut self) -> &mut Received {
        &mut self.stream.get_mut().received
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        match self.stream.accept() {
            Ok(()) => Ok(true),
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(false),
            Err(error) => Err(self.refusal(&error)),
        }
    }

    fn decrypt(&mut self, most: usize, sink: &mut dyn FnMut(&[u8])) -> io::Result<Option<usize>> {
        let most = most.min(RECORD);
        let decrypted = match self.stream.ssl_read(&mut self.record[..most]) {
            Ok(count) => {
                sink(&self.record[..count]);
                Some(count)
            }
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => Some(0),
            Err(error) if error.code() == ErrorCode::WANT_READ => None,
            Err(error) => return Err(failed(&error)),
        };
        // What is encrypted on purpose is taken before anything is waited for, so that none of it is here.
        if self.stream.get_ref().outgoing.len() > UNASKED {
            let why = "it sends TLS messages that want answers, and nothing else";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(decrypted)
    }

    fn encrypt(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // With what a record has besides its plaintext.
        let records = bytes.len() / RECORD + 1;
        self.stream.get_mut().outgoing.reserve(bytes.len() + records * 64);
        self.stream.ssl_write(bytes).map_err(|e| failed(&e))
    }

    fn close(&mut self) {
        // After a failure there is nothing to be said any more: OpenSSL refuses.
        let _ = self.stream.shutdown();
    }

    fn outgoing(&mut self) -> io::Result<Vec<u8>> {
        Ok(std::mem::take(&mut self.stream.get_mut().outgoing))
    }
}
